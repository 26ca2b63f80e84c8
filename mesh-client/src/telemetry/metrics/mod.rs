//! Request metrics under Istio's names, and gRPC's instruments. Handles are resolved once per cluster and result, never per request.

mod config;
pub(crate) mod grpc;
mod labels;
mod server;

pub use config::{AttemptLabel, Instrument, Metrics};
pub(crate) use labels::{Source, Workload, service_of, subset_of};
pub(crate) use server::{Caller, PeerMetrics, ServerMetrics, own_labels};

use super::access_log::ResponseFlags;
use metrics::{Counter, Histogram, counter, histogram};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

/// Results of a cluster whose handles are kept. A cluster has few: the codes its callers see, times the flags that go with them.
const RESULTS: usize = 32;

/// What a request ended in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Outcome {
    /// HTTP status; 0 when there was no response.
    pub(crate) status: u16,
    /// gRPC code of a gRPC response.
    pub(crate) grpc: Option<u32>,
    /// Why, when it was not the backend's answer.
    pub(crate) flag: ResponseFlags,
}

/// The metrics of requests to one cluster.
pub(crate) struct RequestMetrics {
    source: Source,
    cluster: Arc<str>,
    /// Filled from the front. A linear scan of a few beats a map.
    results: [OnceLock<(Outcome, Handles)>; RESULTS],
    /// Of requests whose endpoint or sizes are told too; and what did not fit above.
    further: Mutex<HashMap<(Outcome, Option<Workload>), Further>>,
    pub(crate) retries: Counter,
    /// Retries that there were not, for all attempts were used up.
    pub(crate) exhausted: Counter,
    /// Or the budget was.
    pub(crate) overflow: Counter,
}

#[derive(Clone)]
struct Handles {
    total: Counter,
    duration: Histogram,
}

/// Made only where the mesh was built to.
#[derive(Clone)]
struct Further {
    handles: Handles,
    sizes: [Histogram; 2],
    messages: [Counter; 2],
}

/// What went each way in one request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sizes {
    /// Bytes of the bodies.
    pub(crate) bytes: [u64; 2],
    /// gRPC messages.
    pub(crate) messages: [u64; 2],
}

impl RequestMetrics {
    pub(crate) fn new(cluster: &Arc<str>, source: Source) -> Self {
        let of = |name: &'static str| counter!(name, "cluster" => cluster.to_string());
        let retries = of("mesh_request_retries_total");
        let exhausted = of("mesh_request_retry_limit_exceeded_total");
        let overflow = of("mesh_request_retry_overflows_total");
        let results = [const { OnceLock::new() }; RESULTS];
        Self { source, cluster: cluster.clone(), results, further: Mutex::default(), retries, exhausted, overflow }
    }

    /// Counts one finished request.
    pub(crate) fn record(&self, outcome: Outcome, took: Duration) {
        for slot in &self.results {
            let (of, handles) =
                slot.get_or_init(|| (outcome, Handles::new(&self.source, Some(&self.cluster), None, outcome)));
            if *of == outcome {
                return handles.record(took);
            }
        }
        self.further(outcome, None).handles.record(took);
    }

    /// The same, of an endpoint of this workload.
    pub(crate) fn record_workload(&self, outcome: Outcome, workload: Workload, took: Duration) {
        self.further(outcome, Some(workload)).handles.record(took);
    }

    /// What went each way.
    pub(crate) fn record_sizes(&self, outcome: Outcome, workload: Option<Workload>, sizes: Sizes) {
        let further = self.further(outcome, workload);
        for i in 0..2 {
            #[allow(clippy::cast_precision_loss, reason = "a histogram's values are floats")]
            further.sizes[i].record(sizes.bytes[i] as f64);
            if outcome.grpc.is_some() {
                further.messages[i].increment(sizes.messages[i]);
            }
        }
    }

    #[cold]
    fn further(&self, outcome: Outcome, workload: Option<Workload>) -> Further {
        let mut further = self.further.lock().unwrap_or_else(PoisonError::into_inner);
        let found = further.entry((outcome, workload)).or_insert_with_key(|(outcome, workload)| {
            let labels = labels::all(&self.source, Some(&self.cluster), workload.as_ref(), *outcome);
            Further {
                handles: Handles::of(&labels),
                sizes: ["istio_request_bytes", "istio_response_bytes"].map(|name| histogram!(name, labels.iter())),
                messages: ["istio_request_messages_total", "istio_response_messages_total"]
                    .map(|name| counter!(name, labels.iter())),
            }
        });
        found.clone()
    }
}

impl Handles {
    #[cold]
    fn new(source: &Source, cluster: Option<&str>, workload: Option<&Workload>, outcome: Outcome) -> Self {
        Self::of(&labels::all(source, cluster, workload, outcome))
    }

    fn of(labels: &[metrics::Label]) -> Self {
        Self {
            total: counter!("istio_requests_total", labels.iter()),
            duration: histogram!("istio_request_duration_milliseconds", labels.iter()),
        }
    }

    fn record(&self, took: Duration) {
        self.duration.record(took.as_secs_f64() * 1e3);
        self.total.increment(1);
    }
}

/// The metrics of one target's requests that came to no cluster: no route, answers of routes and of their filters.
pub(crate) struct Unserved {
    source: Source,
    /// Filled from the front.
    results: [OnceLock<(Outcome, Handles)>; RESULTS],
}

impl Unserved {
    pub(crate) fn new(source: Source) -> Self {
        Self { source, results: [const { OnceLock::new() }; RESULTS] }
    }

    /// Counts one.
    pub(crate) fn record(&self, outcome: Outcome, took: Duration) {
        for slot in &self.results {
            let (of, handles) = slot.get_or_init(|| (outcome, Handles::new(&self.source, None, None, outcome)));
            if *of == outcome {
                return handles.record(took);
            }
        }
        unserved(&self.source, None, outcome, took);
    }
}

impl fmt::Debug for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unserved").finish_non_exhaustive()
    }
}

/// Counts a request that ended before it came to a cluster that serves: `cluster` is the one it was for, if it got that far. Without
/// one the service is `unknown`, as in Istio.
#[cold]
pub(crate) fn unserved(source: &Source, cluster: Option<&str>, outcome: Outcome, took: Duration) {
    Handles::new(source, cluster, None, outcome).record(took);
}
