//! Request metrics under Istio's names. Handles are resolved once per cluster and result, never per request.

use super::access_log::ResponseFlags;
use metrics::{Counter, Histogram, counter, histogram};
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

/// Results of a cluster whose handles are kept. A cluster has few: the codes its callers see, times the flags that go with them.
const RESULTS: usize = 32;

/// What a request ended in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// HTTP status; 0 when there was no response.
    pub(crate) status: u16,
    /// gRPC code of a gRPC response.
    pub(crate) grpc: Option<u8>,
    /// Why, when it was not the backend's answer.
    pub(crate) flag: ResponseFlags,
}

/// The metrics of requests to one cluster.
pub(crate) struct RequestMetrics {
    service: Arc<str>,
    cluster: Arc<str>,
    /// Filled from the front. A linear scan of a few beats a map.
    results: [OnceLock<(Outcome, Counter)>; RESULTS],
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
        Self { service, cluster: cluster.clone(), results: [const { OnceLock::new() }; RESULTS], duration, retries }
    }

    /// Counts one finished request.
    pub(crate) fn record(&self, outcome: Outcome, took: Duration) {
        self.duration.record(took.as_secs_f64() * 1e3);
        for slot in &self.results {
            let (of, counter) = slot.get_or_init(|| (outcome, self.counter(outcome)));
            if *of == outcome {
                return counter.increment(1);
            }
        }
        self.counter(outcome).increment(1);
    }

    #[cold]
    fn counter(&self, outcome: Outcome) -> Counter {
        requests_total(&self.service, &self.cluster, outcome)
    }
}

/// Counts a request that ended before it came to a cluster that serves: `cluster` is the one it was for, if it got that far. Without
/// one the service is `unknown`, as in Istio.
#[cold]
pub(crate) fn unserved(cluster: Option<&str>, outcome: Outcome) {
    requests_total(cluster.map_or("unknown", service_of), cluster.unwrap_or_default(), outcome).increment(1);
}

fn requests_total(service: &str, cluster: &str, outcome: Outcome) -> Counter {
    counter!(
        "istio_requests_total",
        "reporter" => "source",
        "destination_service" => service.to_owned(),
        "cluster" => cluster.to_owned(),
        "request_protocol" => if outcome.grpc.is_some() { "grpc" } else { "http" },
        "response_code" => outcome.status.to_string(),
        "grpc_response_status" => outcome.grpc.map(|c| c.to_string()).unwrap_or_default(),
        "response_flags" => outcome.flag.to_string()
    )
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
