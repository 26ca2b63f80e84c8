//! Circuit breaker: how much may be in flight to a cluster at once, by priority (gRFC A32, Envoy's `circuit_breakers`). Retries are
//! limited by their own [`RetryBudget`](crate::outbound::retry::RetryBudget).

use crate::outbound::slots::Slots;
use mesh_xds::resource::{CircuitBreakers, RoutingPriority};
use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
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
#[error("{resource} limit of {limit} reached{}", of(*.priority))]
pub struct Overloaded {
    /// What is exhausted.
    pub(crate) resource: Resource,
    /// Its limit at that moment.
    pub(crate) limit: u32,
    /// Of this priority.
    pub(crate) priority: RoutingPriority,
}

/// Counts what is in flight to one cluster, against limits that can change at any time. Exact: never admits more than
/// the limit, whatever the number of threads; a lowered limit ends nothing that runs.
#[derive(Debug)]
pub(crate) struct Breaker {
    /// By priority and resource.
    gates: [[Gate; 3]; 2],
    /// In the labels of its metrics.
    cluster: Arc<str>,
}

/// Holds one unit of a resource until dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the unit back"]
pub(crate) struct Permit {
    breaker: Arc<Breaker>,
    resource: Resource,
    priority: RoutingPriority,
}

/// One count on a cache line of its own: every request of every core writes it.
#[derive(Debug)]
#[repr(align(128))]
struct Gate {
    in_use: Slots,
    limit: AtomicU32,
    /// `track_remaining`
    tracked: AtomicBool,
    remaining: OnceLock<Remaining>,
}

/// The gauges of what is left, and whether nothing is.
struct Remaining(metrics::Gauge, metrics::Gauge);

impl Resource {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Connections, Self::PendingRequests, Self::Requests];
}

impl Breaker {
    /// Of the cluster of this name.
    pub(crate) fn new(cluster: &Arc<str>, limits: &CircuitBreakers) -> Arc<Self> {
        let breaker = Self { gates: Default::default(), cluster: cluster.clone() };
        breaker.set_limits(limits);
        Arc::new(breaker)
    }

    /// Takes new limits; what is in flight stays counted.
    pub(crate) fn set_limits(&self, limits: &CircuitBreakers) {
        for priority in RoutingPriority::ALL {
            let limits = limits.at(priority);
            for resource in Resource::ALL {
                let gate = self.gate(priority, resource);
                gate.limit.store(
                    match resource {
                        Resource::Connections => limits.max_connections,
                        Resource::PendingRequests => limits.max_pending_requests,
                        Resource::Requests => limits.max_requests,
                    },
                    Relaxed,
                );
                if limits.track_remaining {
                    gate.remaining.get_or_init(|| {
                        Remaining(
                            metrics::gauge!("mesh_circuit_breaker_remaining", self.labels(priority, resource)),
                            metrics::gauge!("mesh_circuit_breaker_open", self.labels(priority, resource)),
                        )
                    });
                }
                gate.tracked.store(limits.track_remaining, Relaxed);
                gate.track(gate.in_use.in_use());
            }
        }
    }

    /// Takes one unit of `resource`.
    ///
    /// # Errors
    /// [`Overloaded`] when as many units as the limit allows are taken (the `>=` test of gRFC A32).
    pub(crate) fn acquire(
        self: &Arc<Self>,
        priority: RoutingPriority,
        resource: Resource,
    ) -> Result<Permit, Overloaded> {
        self.take(priority, resource).map(|()| Permit { breaker: self.clone(), resource, priority })
    }

    /// As [`acquire`](Self::acquire), for one who reaches the breaker in any case and [gives back](Self::give_back) himself:
    /// spares the count of a handle that all cores write.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    #[inline]
    pub(crate) fn take(&self, priority: RoutingPriority, resource: Resource) -> Result<(), Overloaded> {
        let gate = self.gate(priority, resource);
        let limit = gate.limit.load(Relaxed);
        if gate.try_take(limit) { Ok(()) } else { Err(self.overloaded(priority, resource, limit)) }
    }

    #[cold]
    fn overloaded(&self, priority: RoutingPriority, resource: Resource, limit: u32) -> Overloaded {
        metrics::counter!("mesh_circuit_breaker_overflows_total", self.labels(priority, resource)).increment(1);
        Overloaded { resource, limit, priority }
    }

    /// Ends what [`take`](Self::take) began.
    #[inline]
    pub(crate) fn give_back(&self, priority: RoutingPriority, resource: Resource) {
        let gate = self.gate(priority, resource);
        gate.track(gate.in_use.give_back());
    }

    /// Units of `resource` in use.
    pub(crate) fn in_use(&self, priority: RoutingPriority, resource: Resource) -> u32 {
        self.gate(priority, resource).in_use.in_use()
    }

    /// By all priorities.
    pub(crate) fn total(&self, resource: Resource) -> u32 {
        RoutingPriority::ALL.into_iter().map(|priority| self.in_use(priority, resource)).sum()
    }

    /// The limit now.
    pub(crate) fn limit(&self, priority: RoutingPriority, resource: Resource) -> u32 {
        self.gate(priority, resource).limit.load(Relaxed)
    }

    fn gate(&self, priority: RoutingPriority, resource: Resource) -> &Gate {
        &self.gates[priority as usize][resource as usize]
    }

    fn labels(&self, priority: RoutingPriority, resource: Resource) -> Vec<metrics::Label> {
        vec![
            metrics::Label::new("cluster", self.cluster.to_string()),
            metrics::Label::new("resource", resource.as_str()),
            metrics::Label::new("priority", if priority == RoutingPriority::High { "high" } else { "default" }),
        ]
    }
}

/// Nothing for the priority that needs no mention.
fn of(priority: RoutingPriority) -> &'static str {
    match priority {
        RoutingPriority::Default => "",
        RoutingPriority::High => " (priority HIGH)",
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.breaker.give_back(self.priority, self.resource);
    }
}

impl Gate {
    #[inline]
    fn try_take(&self, limit: u32) -> bool {
        match self.in_use.take(limit) {
            Some(in_use) => {
                self.track(in_use);
                true
            }
            None => false,
        }
    }

    /// Says how much is left, where that is asked for.
    #[inline]
    fn track(&self, in_use: u32) {
        if self.tracked.load(Relaxed)
            && let Some(Remaining(remaining, open)) = self.remaining.get()
        {
            let left = self.limit.load(Relaxed).saturating_sub(in_use);
            remaining.set(f64::from(left));
            open.set(if left == 0 { 1.0 } else { 0.0 });
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            in_use: Slots::new(),
            limit: AtomicU32::new(0),
            tracked: AtomicBool::new(false),
            remaining: OnceLock::new(),
        }
    }
}

impl Resource {
    /// As Envoy names it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "max_connections",
            Self::PendingRequests => "max_pending_requests",
            Self::Requests => "max_requests",
        }
    }
}

impl fmt::Debug for Remaining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Remaining")
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_xds::resource::Thresholds;
    use std::sync::atomic::Ordering::SeqCst;

    const DEFAULT: RoutingPriority = RoutingPriority::Default;
    const HIGH: RoutingPriority = RoutingPriority::High;

    fn breaker(limits: &CircuitBreakers) -> Arc<Breaker> {
        Breaker::new(&"c".into(), limits)
    }

    fn limits(max_requests: u32) -> CircuitBreakers {
        CircuitBreakers { default: Thresholds { max_requests, ..Thresholds::default() }, ..CircuitBreakers::default() }
    }

    #[test]
    fn a_limit_of_n_admits_exactly_n_and_names_itself() {
        let breaker = breaker(&limits(2));
        let first = breaker.acquire(DEFAULT, Resource::Requests).unwrap();
        let _second = breaker.acquire(DEFAULT, Resource::Requests).unwrap();
        let refused = breaker.acquire(DEFAULT, Resource::Requests).unwrap_err();
        assert_eq!(refused.to_string(), "max_requests limit of 2 reached");
        drop(first);
        assert!(breaker.acquire(DEFAULT, Resource::Requests).is_ok());
    }

    #[test]
    fn a_limit_of_zero_admits_nothing() {
        let breaker = breaker(&limits(0));
        assert!(breaker.acquire(DEFAULT, Resource::Requests).is_err());
        assert_eq!(breaker.in_use(DEFAULT, Resource::Requests), 0);
    }

    #[test]
    fn resources_are_counted_apart() {
        let breaker = breaker(&CircuitBreakers {
            default: Thresholds {
                max_connections: 1,
                max_pending_requests: 1,
                max_requests: 1,
                ..Thresholds::default()
            },
            ..CircuitBreakers::default()
        });
        let _held = Resource::ALL.map(|r| breaker.acquire(DEFAULT, r).unwrap_or_else(|e| panic!("{r}: {e}")));
        assert!(breaker.acquire(DEFAULT, Resource::Connections).is_err());
    }

    #[test]
    fn priorities_are_counted_apart() {
        let high = Thresholds { max_requests: 1, ..Default::default() };
        let breaker = breaker(&CircuitBreakers { high, ..limits(1) });
        let _default = breaker.acquire(DEFAULT, Resource::Requests).unwrap();
        let _high = breaker.acquire(HIGH, Resource::Requests).unwrap();
        assert_eq!((breaker.in_use(HIGH, Resource::Requests), breaker.total(Resource::Requests)), (1, 2));
        let refused = breaker.acquire(HIGH, Resource::Requests).unwrap_err();
        assert_eq!(refused.to_string(), "max_requests limit of 1 reached (priority HIGH)");
    }

    #[test]
    fn a_lowered_limit_ends_nothing_and_holds_for_new_requests() {
        let breaker = breaker(&limits(3));
        let mut held: Vec<_> = (0..3).map(|_| breaker.acquire(DEFAULT, Resource::Requests).unwrap()).collect();
        breaker.set_limits(&limits(1));
        held.truncate(1);
        assert!(breaker.acquire(DEFAULT, Resource::Requests).is_err());
        held.clear();
        assert!(breaker.acquire(DEFAULT, Resource::Requests).is_ok());
    }

    #[test]
    fn threads_never_overshoot_and_all_comes_back() {
        const LIMIT: u32 = 5;
        let breaker = breaker(&limits(LIMIT));
        let (inside, peak, admitted) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        if let Ok(permit) = breaker.acquire(DEFAULT, Resource::Requests) {
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
        assert_eq!(breaker.in_use(DEFAULT, Resource::Requests), 0);
    }
}
