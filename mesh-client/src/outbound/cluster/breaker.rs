//! Circuit breaker: how much may be in flight to a cluster at once (gRFC A32, Envoy's `circuit_breakers`). Retries are limited
//! by their own [`Budget`](crate::outbound::retry::Budget).

use mesh_xds::resource::CircuitBreakers;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

/// The resources that are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Open connections.
    Connections,
    /// Requests waiting for a connection.
    PendingRequests,
    /// Requests, from their start to the end of their stream.
    Requests,
}

/// A limit was reached. Displays as a sentence naming the limit as Envoy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{resource} limit of {limit} reached")]
pub struct Overloaded {
    /// What is exhausted.
    pub(crate) resource: Resource,
    /// Its limit at that moment.
    pub(crate) limit: u32,
}

/// Counts what is in flight to one cluster, against limits that can change at any time. Exact: never admits more than
/// the limit, whatever the number of threads; a lowered limit ends nothing that runs.
#[derive(Debug)]
pub(crate) struct Breaker {
    connections: Gate,
    pending: Gate,
    requests: Gate,
}

/// Holds one unit of a resource until dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the unit back"]
pub(crate) struct Permit {
    breaker: Arc<Breaker>,
    resource: Resource,
}

/// One count on a cache line of its own: every request of every core writes it.
#[derive(Debug)]
#[repr(align(128))]
struct Gate {
    in_use: AtomicU32,
    limit: AtomicU32,
}

impl Resource {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Connections, Self::PendingRequests, Self::Requests];
}

impl Breaker {
    pub(crate) fn new(limits: &CircuitBreakers) -> Arc<Self> {
        Arc::new(Self {
            connections: Gate::new(limits.max_connections),
            pending: Gate::new(limits.max_pending_requests),
            requests: Gate::new(limits.max_requests),
        })
    }

    /// Takes new limits; what is in flight stays counted.
    pub(crate) fn set_limits(&self, limits: &CircuitBreakers) {
        self.connections.limit.store(limits.max_connections, Relaxed);
        self.pending.limit.store(limits.max_pending_requests, Relaxed);
        self.requests.limit.store(limits.max_requests, Relaxed);
    }

    /// Takes one unit of `resource`.
    ///
    /// # Errors
    /// [`Overloaded`] when as many units as the limit allows are taken (the `>=` test of gRFC A32).
    pub(crate) fn acquire(self: &Arc<Self>, resource: Resource) -> Result<Permit, Overloaded> {
        self.take(resource).map(|()| Permit { breaker: self.clone(), resource })
    }

    /// As [`acquire`](Self::acquire), for one who reaches the breaker in any case and [gives back](Self::give_back) himself:
    /// spares the count of a handle that all cores write.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub(crate) fn take(&self, resource: Resource) -> Result<(), Overloaded> {
        let limit = self.limit(resource);
        if self.gate(resource).try_take(limit) { Ok(()) } else { Err(Overloaded { resource, limit }) }
    }

    /// Ends what [`take`](Self::take) began.
    pub(crate) fn give_back(&self, resource: Resource) {
        self.gate(resource).in_use.fetch_sub(1, Relaxed);
    }

    /// Units of `resource` in use.
    pub(crate) fn in_use(&self, resource: Resource) -> u32 {
        self.gate(resource).in_use.load(Relaxed)
    }

    /// The limit now.
    pub(crate) fn limit(&self, resource: Resource) -> u32 {
        self.gate(resource).limit.load(Relaxed)
    }

    fn gate(&self, resource: Resource) -> &Gate {
        match resource {
            Resource::Connections => &self.connections,
            Resource::PendingRequests => &self.pending,
            Resource::Requests => &self.requests,
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.breaker.give_back(self.resource);
    }
}

impl Gate {
    fn new(limit: u32) -> Self {
        Self { in_use: AtomicU32::new(0), limit: AtomicU32::new(limit) }
    }

    fn try_take(&self, limit: u32) -> bool {
        self.in_use.fetch_update(Relaxed, Relaxed, |n| (n < limit).then(|| n + 1)).is_ok()
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections => "max_connections",
            Self::PendingRequests => "max_pending_requests",
            Self::Requests => "max_requests",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    fn limits(max_requests: u32) -> CircuitBreakers {
        CircuitBreakers { max_requests, ..CircuitBreakers::default() }
    }

    #[test]
    fn a_limit_of_n_admits_exactly_n_and_names_itself() {
        let breaker = Breaker::new(&limits(2));
        let first = breaker.acquire(Resource::Requests).unwrap();
        let _second = breaker.acquire(Resource::Requests).unwrap();
        let refused = breaker.acquire(Resource::Requests).unwrap_err();
        assert_eq!(refused.to_string(), "max_requests limit of 2 reached");
        drop(first);
        assert!(breaker.acquire(Resource::Requests).is_ok());
    }

    #[test]
    fn a_limit_of_zero_admits_nothing() {
        let breaker = Breaker::new(&limits(0));
        assert!(breaker.acquire(Resource::Requests).is_err());
        assert_eq!(breaker.in_use(Resource::Requests), 0);
    }

    #[test]
    fn resources_are_counted_apart() {
        let breaker = Breaker::new(&CircuitBreakers { max_connections: 1, max_pending_requests: 1, ..limits(1) });
        let _held = Resource::ALL.map(|r| breaker.acquire(r).unwrap_or_else(|e| panic!("{r}: {e}")));
        assert!(breaker.acquire(Resource::Connections).is_err());
    }

    #[test]
    fn a_lowered_limit_ends_nothing_and_holds_for_new_requests() {
        let breaker = Breaker::new(&limits(3));
        let mut held: Vec<_> = (0..3).map(|_| breaker.acquire(Resource::Requests).unwrap()).collect();
        breaker.set_limits(&limits(1));
        held.truncate(1);
        assert!(breaker.acquire(Resource::Requests).is_err());
        held.clear();
        assert!(breaker.acquire(Resource::Requests).is_ok());
    }

    #[test]
    fn threads_never_overshoot_and_all_comes_back() {
        const LIMIT: u32 = 5;
        let breaker = Breaker::new(&limits(LIMIT));
        let (inside, peak, admitted) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        if let Ok(permit) = breaker.acquire(Resource::Requests) {
                            peak.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                            admitted.fetch_add(1, SeqCst);
                            std::thread::yield_now();
                            inside.fetch_sub(1, SeqCst);
                            drop(permit);
                        }
                    }
                });
            }
        });
        assert!(peak.load(SeqCst) <= LIMIT, "{} at once", peak.load(SeqCst));
        assert!(admitted.load(SeqCst) > 0);
        assert_eq!(breaker.in_use(Resource::Requests), 0);
    }
}
