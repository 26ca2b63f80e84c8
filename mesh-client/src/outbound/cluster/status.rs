//! What a cluster says of itself, for `explain` and for dumps.

use super::{Cause, Connectivity, Link, LiveCluster, Resource};
use mesh_xds::resource::{HealthStatus, LocalityId, RoutingPriority};
use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};
use tokio::time::Instant;

/// One moment of a cluster.
#[derive(Clone, Debug)]
pub(crate) struct ClusterStatus {
    /// The priority in force; `None`: no endpoint can be picked.
    pub(crate) priority: Option<usize>,
    /// Ejected endpoints are picked, because nothing else is left.
    pub(crate) panic: bool,
    /// In use and allowed, of each limited resource.
    pub(crate) breaker: [(Resource, u32, u32); 3],
    /// The same of priority HIGH.
    pub(crate) high: [(Resource, u32, u32); 3],
    /// Retries in flight.
    pub(crate) retries: u32,
    /// Calls that would have to wait for a connection fail at once.
    pub(crate) fails_fast: bool,
    /// In the order of the assignment.
    pub(crate) endpoints: Vec<EndpointStatus>,
}

/// One moment of an endpoint.
#[derive(Clone, Debug)]
pub(crate) struct EndpointStatus {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Its locality.
    pub(crate) locality: Arc<LocalityId>,
    /// 0 is the highest.
    pub(crate) priority: u32,
    /// Within its locality.
    pub(crate) weight: u32,
    /// As the control plane sees it.
    pub(crate) health: HealthStatus,
    /// Of its connection.
    pub(crate) state: Connectivity,
    /// For how long it is still held out by outlier detection; `None`: it is not.
    pub(crate) ejected_for: Option<Duration>,
    /// And why.
    pub(crate) cause: Option<Cause>,
    /// Its health checks hold it out, for this reason; empty: it was not checked yet.
    pub(crate) failing: Option<Arc<str>>,
    /// One request is to find out whether it is well again.
    pub(crate) on_probation: bool,
    /// Requests.
    pub(crate) in_flight: u32,
    /// Why it last failed to connect, in words, with its causes.
    pub(crate) last_error: Option<String>,
}

impl<L: Link> LiveCluster<L> {
    /// What it looks like now. Costs a pass over all endpoints.
    pub(crate) fn status(&self, now: Instant) -> ClusterStatus {
        let view = self.view.load_full();
        let picker = view.balancer.all();
        let outlier_detection = view.cluster.outlier_detection.as_deref();
        let fails_fast = self.fails_fast().is_some();
        let writer = self.writer();
        let endpoint = |endpoint: &Arc<super::Endpoint<L>>| {
            let placement = endpoint.placement();
            let until = outlier_detection.and_then(|config| endpoint.ejection().until(config));
            EndpointStatus {
                address: endpoint.address(),
                locality: placement.locality.clone(),
                priority: placement.priority,
                weight: placement.weight,
                health: placement.health,
                state: endpoint.connectivity(),
                ejected_for: until.map(|until| until.saturating_duration_since(now)),
                cause: endpoint.ejection().cause(),
                failing: endpoint.is_failing().then(|| endpoint.ailment().unwrap_or_default()),
                on_probation: endpoint.is_on_probation(),
                in_flight: endpoint.in_flight(),
                last_error: endpoint.last_error().map(|error| in_words(&*error)),
            }
        };
        let of = |p| Resource::ALL.map(|r| (r, self.breaker.in_use(p, r), self.breaker.limit(p, r)));
        ClusterStatus {
            priority: picker.map(|picker| picker.priority()),
            panic: picker.is_some_and(|picker| picker.is_panic()),
            retries: RoutingPriority::ALL.map(|priority| self.budget(priority).in_flight()).iter().sum(),
            breaker: of(RoutingPriority::Default),
            high: of(RoutingPriority::High),
            fails_fast,
            endpoints: writer.set.all().map(endpoint).collect(),
        }
    }
}

impl EndpointStatus {
    /// Whether picks step over it, or lately could not connect to it.
    pub(crate) fn is_held_out(&self) -> bool {
        self.ejected_for.is_some()
            || self.failing.is_some()
            || self.on_probation
            || self.last_error.is_some()
            || !self.health.is_usable()
    }
}

impl fmt::Display for ClusterStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.priority {
            None => f.write_str("no endpoint can be used")?,
            Some(priority) => write!(f, "priority {priority}")?,
        }
        if self.panic {
            f.write_str(", ejected endpoints are used because there are no others")?;
        }
        if self.fails_fast {
            f.write_str(", fails fast: no endpoint is ready")?;
        }
        for (resource, in_use, limit) in self.breaker {
            write!(f, ", {resource} {in_use} of {limit}")?;
        }
        for (resource, in_use, limit) in self.high.into_iter().filter(|(_, in_use, _)| *in_use > 0) {
            write!(f, ", {resource} of priority HIGH {in_use} of {limit}")?;
        }
        write!(f, ", {} retries in flight", self.retries)
    }
}

impl fmt::Display for EndpointStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}, {} in flight", self.address, self.state, self.in_flight)?;
        if self.priority > 0 {
            write!(f, ", priority {}", self.priority)?;
        }
        let LocalityId { region, zone, sub_zone } = &*self.locality;
        if [region, zone, sub_zone].iter().any(|part| !part.is_empty()) {
            write!(f, ", in {region}/{zone}/{sub_zone}")?;
        }
        if self.weight != 1 {
            write!(f, ", weight {}", self.weight)?;
        }
        if !self.health.is_usable() {
            write!(f, ", {:?} says the control plane", self.health)?;
        }
        if let Some(left) = self.ejected_for {
            write!(f, ", ejected for {left:?} more")?;
        }
        if let Some(cause) = self.cause {
            write!(f, " by {cause}")?;
        }
        match self.failing.as_deref() {
            None => {}
            Some("") => f.write_str(", not used before its first health check")?,
            Some(reason) => write!(f, ", fails its health checks: {reason}")?,
        }
        if self.on_probation {
            f.write_str(", on probation: one request at a time")?;
        }
        if let Some(error) = &self.last_error {
            write!(f, ", last error: {error}")?;
        }
        Ok(())
    }
}

/// An error with all its causes.
pub(super) fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}
