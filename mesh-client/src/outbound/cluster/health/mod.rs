//! Active health checks at work: one task for each endpoint that is checked, and what its results mean for the cluster.
//!
//! [`Health`] and [`delay`] decide; the time and the draws are arguments. The checks stop with the endpoint and with the cluster.

mod state;

pub(crate) use state::Failed;
pub(super) use state::Health;

use super::{Endpoint, Link, LiveCluster, Writer};
use crate::task::Task;
use mesh_xds::resource::{self, ClusterLoadAssignment, HealthCheck, HealthChecker, Locality};
use state::{Transition, delay, initial_delay};
use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

/// Where an endpoint is checked, and how.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CheckTarget {
    /// Of the check: not always that of the endpoint.
    pub(crate) address: SocketAddr,
    /// `:authority` of its requests, if it can be said over HTTP.
    pub(crate) authority: Arc<str>,
    /// What is asked.
    pub(crate) check: Arc<HealthCheck>,
}

/// The checks of the endpoints of a cluster, by address of the endpoint. They stop when this is dropped.
pub(super) struct Sessions<L: Link>(HashMap<SocketAddr, Session<L>>);

struct Session<L: Link> {
    endpoint: Weak<Endpoint<L>>,
    target: CheckTarget,
    _task: Task,
}

impl<L: Link> LiveCluster<L> {
    /// Checks what is to be checked, and nothing else. Of a cluster that begins all endpoints are used before they were checked; one
    /// that joins later waits for its first check.
    pub(super) fn set_health_checks(&self, writer: &mut Writer<L>) {
        let Some(check) = writer.cluster.health_check.clone() else {
            if !writer.checks.0.is_empty() {
                writer.checks = Sessions::default();
                writer.set.all().for_each(|endpoint| endpoint.set_health(Health::unknown(), None));
            }
            return;
        };
        let mut before = std::mem::take(&mut writer.checks.0);
        let begins = before.is_empty();
        for endpoint in writer.set.all() {
            let address = endpoint.address();
            let Some(target) = self.check_target(endpoint, &check) else {
                endpoint.set_health(Health::unknown(), None);
                continue;
            };
            let session = before.remove(&address);
            let known = session.is_some();
            let goes_on = session.filter(|s| s.target == target && s.endpoint.ptr_eq(&Arc::downgrade(endpoint)));
            let session = goes_on.unwrap_or_else(|| {
                if !known && !begins {
                    endpoint.set_health(Health::awaited(), None);
                }
                let connector = L::variant(&writer.connector, endpoint.placement().said());
                let run = run(self.me.clone(), Arc::downgrade(endpoint), connector, target.clone());
                let _task = Task::on(&self.deps.runtime, run);
                Session { endpoint: Arc::downgrade(endpoint), target, _task }
            });
            writer.checks.0.insert(address, session);
        }
        self.count_failing(writer);
    }

    /// `None`: this endpoint is not checked (`disable_active_health_check`).
    fn check_target(&self, endpoint: &Endpoint<L>, check: &Arc<HealthCheck>) -> Option<CheckTarget> {
        let placement = endpoint.placement();
        let own = placement.health_check.as_deref();
        if own.is_some_and(|own| own.disabled) {
            return None;
        }
        let mut address = own.and_then(|own| own.address).unwrap_or(endpoint.address());
        if let Some(port) = own.and_then(|own| own.port).or(check.alt_port) {
            address.set_port(port);
        }
        let host = match &check.checker {
            HealthChecker::Http(http) => http.host.as_deref(),
            HealthChecker::Grpc(grpc) => grpc.authority.as_deref(),
            HealthChecker::Tcp(_) => None,
        };
        let authority = match (own.map(|own| &own.hostname).filter(|name| !name.is_empty()), host) {
            (Some(own), _) => own.clone(),
            (None, Some(host)) => host.into(),
            (None, None) => self.name.clone(),
        };
        Some(CheckTarget { address, authority, check: check.clone() })
    }

    /// A check has ended: how long until the next one. `None`: there is none.
    fn checked(
        &self,
        endpoint: &Arc<Endpoint<L>>,
        target: &CheckTarget,
        result: Result<(), Failed>,
    ) -> Option<Duration> {
        let check = &*target.check;
        let mut writer = self.writer();
        if endpoint.is_retired() || !writer.checks.0.contains_key(&endpoint.address()) {
            return None;
        }
        let mut health = endpoint.health();
        let first_failure = !health.is_failing() && health == Health::unknown();
        let transition = health.checked(result.as_ref().copied(), check);
        let reason = result.as_ref().err().map(|failed| failed.reason.as_str().into());
        endpoint.set_health(health, reason);
        self.tell(endpoint, check, &result, transition, first_failure);
        if result.is_ok() {
            self.uneject(&mut writer, endpoint);
        }
        if transition == Transition::Changed {
            self.count_failing(&writer);
            let wanted = writer.wanted.clone();
            if health.is_failing() && !Arc::ptr_eq(&wanted, writer.set.assignment()) {
                // It may have been kept only for its health.
                self.set_endpoints(&mut writer, wanted);
                self.set_health_checks(&mut writer);
                self.cut(&mut writer);
            }
            self.publish(&writer);
        }
        let draws = [fastrand::f64(), fastrand::f64()];
        Some(delay(check, health, result.is_ok(), transition, L::is_used(&writer.connector), draws))
    }

    /// A success ends an ejection (`successful_active_health_check_uneject_host`).
    fn uneject(&self, writer: &mut Writer<L>, endpoint: &Endpoint<L>) {
        let unejects = writer.cluster.outlier_detection.as_ref().is_some_and(|config| config.health_check_unejects);
        let mut ejection = endpoint.ejection();
        if unejects && ejection.is_ejected() {
            ejection.release();
            endpoint.set_ejection(ejection);
            self.welcome(endpoint);
            self.count_ejected(writer);
            self.publish(writer);
        }
    }

    /// The event log.
    fn tell(
        &self,
        endpoint: &Endpoint<L>,
        check: &HealthCheck,
        result: &Result<(), Failed>,
        transition: Transition,
        first: bool,
    ) {
        let (cluster, address) = (&*self.name, endpoint.address());
        let label = match result {
            Ok(()) => "success",
            Err(failed) if failed.certain => "failure",
            Err(_) => "network_failure",
        };
        metrics::counter!("mesh_health_checks_total", "cluster" => cluster.to_owned(), "result" => label).increment(1);
        match (result, transition) {
            (Ok(()), Transition::Changed) => tracing::info!(cluster, %address, "endpoint is healthy"),
            (Ok(()), _) if check.always_log_successes => tracing::info!(cluster, %address, "health check passed"),
            (Err(failed), Transition::Changed) => {
                tracing::warn!(cluster, %address, reason = failed.reason, "endpoint is unhealthy");
            }
            (Err(failed), _) if check.always_log_failures || first => {
                tracing::info!(cluster, %address, reason = failed.reason, "health check failed");
            }
            _ => {}
        }
    }

    fn count_failing(&self, writer: &Writer<L>) {
        let failing = writer.set.all().filter(|endpoint| endpoint.is_failing()).count();
        let gauge = metrics::gauge!("mesh_health_check_failing_endpoints", "cluster" => self.name.to_string());
        #[allow(clippy::cast_precision_loss, reason = "a count of endpoints")]
        gauge.set(failing as f64);
    }

    /// The assignment, with the endpoints that left it and pass their checks: they stay until they fail them, unless the cluster says
    /// otherwise (`ignore_health_on_host_removal`).
    pub(super) fn with_proven(
        &self,
        writer: &Writer<L>,
        wanted: &Arc<ClusterLoadAssignment>,
    ) -> Arc<ClusterLoadAssignment> {
        if writer.cluster.health_check.is_none() || writer.cluster.ignore_health_on_host_removal {
            return wanted.clone();
        }
        let endpoints = |assignment: &'_ ClusterLoadAssignment| -> HashSet<SocketAddr> {
            let localities = assignment.priorities.iter().flatten();
            localities.flat_map(|locality| &locality.endpoints).map(|endpoint| endpoint.address).collect()
        };
        let named = endpoints(wanted);
        let checked = |endpoint: &&Arc<Endpoint<L>>| writer.checks.0.contains_key(&endpoint.address());
        let stays =
            |endpoint: &&Arc<Endpoint<L>>| endpoint.health().is_proven() && !named.contains(&endpoint.address());
        let mut kept = writer.set.all().filter(checked).filter(stays).peekable();
        if kept.peek().is_none() {
            return wanted.clone();
        }
        let mut assignment = ClusterLoadAssignment::clone(wanted);
        for endpoint in kept {
            let placement = endpoint.placement();
            let resource = resource::Endpoint {
                address: endpoint.address(),
                weight: placement.weight,
                health: placement.health,
                hostname: placement.hostname.clone(),
                metadata: placement.metadata.clone(),
                health_check: placement.health_check.clone(),
            };
            if assignment.priorities.is_empty() {
                assignment.priorities.push(Vec::new());
            }
            let last = assignment.priorities.len() - 1;
            let localities = &mut assignment.priorities[last.min(placement.priority as usize)];
            match localities.iter_mut().find(|locality| locality.id == placement.locality) {
                Some(locality) => locality.endpoints.push(resource),
                None => {
                    localities.push(Locality { id: placement.locality.clone(), weight: 1, endpoints: vec![resource] });
                }
            }
        }
        Arc::new(assignment)
    }
}

/// Checks one endpoint for as long as it is there.
async fn run<L: Link>(
    cluster: Weak<LiveCluster<L>>,
    endpoint: Weak<Endpoint<L>>,
    connector: Arc<L::Connector>,
    target: CheckTarget,
) {
    let check = target.check.clone();
    let mut kept = L::Kept::default();
    let mut wait = initial_delay(&check, fastrand::f64());
    loop {
        tokio::time::sleep(wait).await;
        let result = match tokio::time::timeout(check.timeout, L::check(&connector, &target, &mut kept)).await {
            Ok(result) => result,
            Err(_) => {
                kept = L::Kept::default();
                Err(Failed { certain: false, reason: format!("no answer within {:?}", check.timeout) })
            }
        };
        let (Some(cluster), Some(endpoint)) = (cluster.upgrade(), endpoint.upgrade()) else { return };
        match cluster.checked(&endpoint, &target, result) {
            Some(next) => wait = next,
            None => return,
        }
    }
}

impl<L: Link> Default for Sessions<L> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}
