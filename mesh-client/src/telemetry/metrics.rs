//! Request metrics under Istio's names. Handles are resolved once per cluster and result, never per request.

use arc_swap::ArcSwap;
use metrics::{Counter, Histogram, counter, histogram};
use std::{sync::Arc, time::Duration};

/// What a request ended in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// HTTP status; 0 when there was no response.
    pub(crate) status: u16,
    /// gRPC code of a gRPC response.
    pub(crate) grpc: Option<u8>,
    /// Envoy's response flag, `-` when there is nothing to say.
    pub(crate) flag: &'static str,
}

/// The metrics of requests to one cluster.
pub(crate) struct RequestMetrics {
    service: Arc<str>,
    cluster: Arc<str>,
    /// Few distinct results per cluster: a linear scan beats a map.
    results: ArcSwap<Vec<(Outcome, Counter)>>,
    duration: Histogram,
    pub(crate) retries: Counter,
}

impl RequestMetrics {
    pub(crate) fn new(cluster: &Arc<str>) -> Self {
        let service: Arc<str> = service_of(cluster).into();
        let duration = histogram!(
            "istio_request_duration_milliseconds",
            "reporter" => "source", "destination_service" => service.to_string(), "cluster" => cluster.to_string()
        );
        let retries = counter!("mesh_request_retries_total", "cluster" => cluster.to_string());
        Self { service, cluster: cluster.clone(), results: ArcSwap::default(), duration, retries }
    }

    /// Counts one finished request.
    pub(crate) fn record(&self, outcome: Outcome, took: Duration) {
        self.duration.record(took.as_secs_f64() * 1e3);
        let results = self.results.load();
        if let Some((_, counter)) = results.iter().find(|(o, _)| *o == outcome) {
            return counter.increment(1);
        }
        drop(results);
        let counter = counter!(
            "istio_requests_total",
            "reporter" => "source",
            "destination_service" => self.service.to_string(),
            "cluster" => self.cluster.to_string(),
            "request_protocol" => if outcome.grpc.is_some() { "grpc" } else { "http" },
            "response_code" => outcome.status.to_string(),
            "grpc_response_status" => outcome.grpc.map(|c| c.to_string()).unwrap_or_default(),
            "response_flags" => outcome.flag
        );
        counter.increment(1);
        self.results.rcu(|old| {
            let mut new = Vec::clone(old);
            new.push((outcome, counter.clone()));
            new
        });
    }
}

/// The host in Istio's cluster name `outbound|PORT|SUBSET|HOST`, or the name itself.
pub(crate) fn service_of(cluster: &str) -> &str {
    match cluster.strip_prefix("outbound|") {
        Some(rest) => rest.rsplit('|').next().unwrap_or(cluster),
        None => cluster,
    }
}

/// The subset in Istio's cluster name, when there is one.
pub(crate) fn subset_of(cluster: &str) -> Option<&str> {
    let mut parts = cluster.strip_prefix("outbound|")?.split('|');
    parts.nth(1).filter(|s| !s.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istio_names_are_taken_apart() {
        assert_eq!(
            service_of("outbound|50051|v1|greeter.default.svc.cluster.local"),
            "greeter.default.svc.cluster.local"
        );
        assert_eq!(subset_of("outbound|50051|v1|greeter"), Some("v1"));
        assert_eq!(subset_of("outbound|50051||greeter"), None);
        assert_eq!((service_of("plain"), subset_of("plain")), ("plain", None));
    }
}
