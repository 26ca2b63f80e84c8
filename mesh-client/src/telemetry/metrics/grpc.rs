//! gRPC's instruments of calls and attempts (gRFC A66, A96), for one target.

use super::config::{AttemptLabel, Instrument, Metrics};
use arc_swap::ArcSwap;
use mesh_xds::resource::LocalityId;
use metrics::{Counter, Histogram, Label, SharedString, counter, histogram};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

/// Methods of a target that are told apart; what comes after them is `other` (gRFC A66's word for methods it does not know).
const METHODS: usize = 512;
/// Places of a method's attempts that are told apart by handles that are kept.
const PLACES: usize = 64;
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The name of a code; another number is UNKNOWN.
pub(crate) fn code_name(code: u32) -> &'static str {
    CODES[index(code)]
}

fn index(code: u32) -> usize {
    usize::try_from(code).ok().filter(|code| *code < CODES.len()).unwrap_or(2)
}

/// The instruments of one target.
pub(crate) struct Calls {
    target: SharedString,
    on: Metrics,
    /// By path. A method is added when it is first called.
    methods: ArcSwap<HashMap<Box<str>, Arc<Method>>>,
}

/// The instruments of one method.
pub(crate) struct Method {
    target: SharedString,
    name: SharedString,
    on: Metrics,
    started: Option<Counter>,
    /// Of attempts whose place is not told, or that came to none.
    attempts: ByCode,
    /// Of the others. Filled from the front; a scan of a few beats a map.
    placed: [OnceLock<(Place, Box<ByCode>)>; PLACES],
    calls: [OnceLock<Histogram>; CODES.len()],
    /// Retries, transparent ones, hedges, delay.
    again: [Option<Histogram>; 4],
}

type ByCode = [OnceLock<Attempts>; CODES.len()];

/// Where an attempt went, for labels. Equal places are one, whatever configuration they are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) cluster: Arc<str>,
    pub(crate) locality: Arc<LocalityId>,
}

struct Attempts {
    duration: Option<Histogram>,
    sent: Option<Histogram>,
    received: Option<Histogram>,
}

/// What came of one attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttemptEnd {
    pub(crate) code: u32,
    pub(crate) took: Duration,
    /// Bytes of messages, without their framing.
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// What came of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallEnd {
    pub(crate) code: u32,
    pub(crate) took: Duration,
    pub(crate) retries: u32,
    pub(crate) transparent: u32,
    pub(crate) hedges: u32,
    /// With no attempt in flight, between two.
    pub(crate) delay: Duration,
}

impl Calls {
    pub(crate) fn new(target: &str, on: Metrics) -> Self {
        Self { target: target.to_owned().into(), on, methods: ArcSwap::default() }
    }

    /// The method of this path: `/package.Service/Method`.
    pub(crate) fn method(&self, path: &str) -> Arc<Method> {
        if let Some(known) = self.methods.load().get(path) {
            return known.clone();
        }
        let full = self.methods.load().len() >= METHODS;
        let path = if full { "other" } else { path };
        if let Some(known) = self.methods.load().get(path).filter(|_| full) {
            return known.clone();
        }
        let new = Arc::new(Method::new(self.target.clone(), path.trim_start_matches('/').to_owned().into(), self.on));
        self.methods.rcu(|methods| {
            let mut methods = HashMap::clone(methods);
            methods.entry(path.into()).or_insert_with(|| new.clone());
            methods
        });
        self.methods.load().get(path).cloned().unwrap_or(new)
    }
}

impl Method {
    fn new(target: SharedString, name: SharedString, on: Metrics) -> Self {
        let labels = || [("grpc.method", name.clone()), ("grpc.target", target.clone())];
        let again = [
            Instrument::CallRetries,
            Instrument::CallTransparentRetries,
            Instrument::CallHedges,
            Instrument::CallRetryDelay,
        ];
        Self {
            started: on.has(Instrument::AttemptStarted).then(|| counter!(Instrument::AttemptStarted.name(), &labels())),
            attempts: [const { OnceLock::new() }; CODES.len()],
            placed: [const { OnceLock::new() }; PLACES],
            calls: [const { OnceLock::new() }; CODES.len()],
            again: again.map(|instrument| on.has(instrument).then(|| histogram!(instrument.name(), &labels()))),
            target,
            name,
            on,
        }
    }

    /// An attempt begins.
    pub(crate) fn started(&self) {
        if let Some(started) = &self.started {
            started.increment(1);
        }
    }

    /// An attempt ended. `place`: where it went, if that is told.
    pub(crate) fn attempt(&self, end: &AttemptEnd, place: Option<&Place>) {
        let handles = |place: Option<&Place>| {
            let of = |on: Instrument| self.on.has(on).then(|| self.attempts_histogram(on, end.code, place));
            Attempts {
                duration: of(Instrument::AttemptDuration),
                sent: of(Instrument::AttemptSent),
                received: of(Instrument::AttemptReceived),
            }
        };
        let Some(place) = place else {
            return self.attempts[index(end.code)].get_or_init(|| handles(None)).record(end);
        };
        for slot in &self.placed {
            let (of, by_code) =
                slot.get_or_init(|| (place.clone(), Box::new([const { OnceLock::new() }; CODES.len()])));
            if of == place {
                return by_code[index(end.code)].get_or_init(|| handles(Some(place))).record(end);
            }
        }
        handles(Some(place)).record(end);
    }

    fn attempts_histogram(&self, instrument: Instrument, code: u32, place: Option<&Place>) -> Histogram {
        let mut labels = vec![
            Label::new("grpc.method", self.name.clone()),
            Label::new("grpc.target", self.target.clone()),
            Label::new("grpc.status", code_name(code)),
        ];
        if self.on.labels_with(AttemptLabel::Locality) {
            let LocalityId { region, zone, sub_zone } =
                place.map(|place| &*place.locality).cloned().unwrap_or_default();
            let text = format!("{{region=\"{region}\", zone=\"{zone}\", sub_zone=\"{sub_zone}\"}}");
            labels.push(Label::new("grpc.lb.locality", place.map(|_| text).unwrap_or_default()));
        }
        if self.on.labels_with(AttemptLabel::BackendService) {
            let cluster = place.map(|place| place.cluster.to_string()).unwrap_or_default();
            labels.push(Label::new("grpc.lb.backend_service", cluster));
        }
        histogram!(instrument.name(), labels.iter())
    }

    /// The call ended.
    pub(crate) fn call(&self, end: &CallEnd) {
        if self.on.has(Instrument::CallDuration) {
            let calls = self.calls[index(end.code)].get_or_init(|| self.histogram(Instrument::CallDuration, end.code));
            calls.record(end.took.as_secs_f64());
        }
        let values =
            [f64::from(end.retries), f64::from(end.transparent), f64::from(end.hedges), end.delay.as_secs_f64()];
        for (histogram, value) in self.again.iter().zip(values) {
            // A call without any is not reported.
            if let Some(histogram) = histogram.as_ref().filter(|_| value > 0.0) {
                histogram.record(value);
            }
        }
    }

    fn histogram(&self, instrument: Instrument, code: u32) -> Histogram {
        let status = SharedString::const_str(code_name(code));
        let labels =
            [("grpc.method", self.name.clone()), ("grpc.target", self.target.clone()), ("grpc.status", status)];
        histogram!(instrument.name(), &labels)
    }
}

impl Attempts {
    fn record(&self, end: &AttemptEnd) {
        #[allow(clippy::cast_precision_loss, reason = "a histogram's values are floats")]
        let values = [end.took.as_secs_f64(), end.sent as f64, end.received as f64];
        for (histogram, value) in [&self.duration, &self.sent, &self.received].into_iter().zip(values) {
            if let Some(histogram) = histogram {
                histogram.record(value);
            }
        }
    }
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("target", &self.target).finish_non_exhaustive()
    }
}
