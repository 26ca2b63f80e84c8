//! Metrics of requests that are served (`reporter="destination"`): handles by caller and result, resolved once for each.

use super::{
    Handles, Outcome,
    labels::{destination, name_and_namespace},
};
use metrics::Label;
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

/// Results of a caller whose handles are found without a lock.
const RESULTS: usize = 12;

/// What callers of one server are counted by.
#[derive(Default)]
pub(crate) struct ServerMetrics {
    /// Of the server: `destination_*`, from the node and the service.
    own: Vec<Label>,
    callers: Mutex<HashMap<Caller, Weak<PeerMetrics>>>,
}

/// Who calls, as far as labels tell.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Caller {
    /// The SPIFFE id, or another name of the certificate.
    pub(crate) principal: Option<Arc<str>>,
    /// With a certificate of both sides.
    pub(crate) mutual: bool,
}

/// The metrics of the requests of one caller.
pub(crate) struct PeerMetrics {
    labels: Vec<Label>,
    /// Filled from the front.
    results: [OnceLock<(Outcome, Handles)>; RESULTS],
    /// What did not fit.
    further: Mutex<HashMap<Outcome, Handles>>,
}

impl ServerMetrics {
    /// Of a server with these labels (`destination_*`).
    pub(crate) fn new(own: Vec<Label>) -> Self {
        Self { own, callers: Mutex::default() }
    }

    /// Those of a caller: the same for all its connections.
    pub(crate) fn of(&self, caller: Caller) -> Arc<PeerMetrics> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = callers.get(&caller).and_then(Weak::upgrade) {
            return known;
        }
        callers.retain(|_, known| known.strong_count() > 0);
        let metrics = Arc::new(PeerMetrics::new(&self.own, &caller));
        callers.insert(caller, Arc::downgrade(&metrics));
        metrics
    }
}

impl PeerMetrics {
    fn new(own: &[Label], caller: &Caller) -> Self {
        let principal = caller.principal.as_deref();
        let namespace = principal.and_then(|id| id.split_once("/ns/")).and_then(|(_, rest)| rest.split('/').next());
        let unknown = "unknown".to_owned();
        let labels = [
            Label::new("reporter", "destination"),
            Label::new("source_principal", principal.map_or(unknown.clone(), str::to_owned)),
            Label::new("source_workload_namespace", namespace.map_or(unknown, str::to_owned)),
            Label::new("connection_security_policy", if caller.mutual { "mutual_tls" } else { "none" }),
        ];
        let labels = labels.into_iter().chain(own.iter().cloned()).collect();
        Self { labels, results: [const { OnceLock::new() }; RESULTS], further: Mutex::default() }
    }

    /// Counts one finished request.
    pub(crate) fn record(&self, outcome: Outcome, took: Duration) {
        for slot in &self.results {
            let (of, handles) = slot.get_or_init(|| (outcome, self.handles(outcome)));
            if *of == outcome {
                return handles.record(took);
            }
        }
        let mut further = self.further.lock().unwrap_or_else(PoisonError::into_inner);
        further.entry(outcome).or_insert_with(|| self.handles(outcome)).record(took);
    }

    #[cold]
    fn handles(&self, outcome: Outcome) -> Handles {
        Handles::of(&destination(&self.labels, outcome))
    }
}

/// The labels of a server: those of its node, and of the service that it is.
pub(crate) fn own_labels(mut node: Vec<Label>, service: Option<&str>) -> Vec<Label> {
    let (name, namespace) = service.map_or(("unknown", None), name_and_namespace);
    node.extend([
        Label::new("destination_service", service.unwrap_or("unknown").to_owned()),
        Label::new("destination_service_name", name.to_owned()),
        Label::new("destination_service_namespace", namespace.unwrap_or("unknown").to_owned()),
    ]);
    node
}

impl fmt::Debug for ServerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerMetrics").finish_non_exhaustive()
    }
}

impl fmt::Debug for PeerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerMetrics").finish_non_exhaustive()
    }
}
