//! What is counted of the weights that endpoints report (gRFC A78).

use crate::telemetry::metrics::{Instrument, Metrics};
use metrics::{Counter, Histogram, SharedString, counter, histogram};

/// The handles of one cluster; those that are off are `None`.
#[derive(Clone)]
pub(crate) struct WeightNumbers {
    fallback: Option<Counter>,
    unusable: Option<Counter>,
    stale: Option<Counter>,
    weights: Option<Histogram>,
}

/// The weight of an endpoint in one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Weighed {
    Usable(f64),
    /// No report, or not for long enough.
    NotYet,
    /// The last report is too old.
    Stale,
}

impl WeightNumbers {
    /// `None`: all are off. `target`: who used the cluster first.
    pub(crate) fn new(target: &str, on: Metrics) -> Option<Self> {
        use Instrument::{WrrEndpointWeightNotYetUsable, WrrEndpointWeightStale, WrrEndpointWeights, WrrRrFallback};
        let all = [WrrRrFallback, WrrEndpointWeightNotYetUsable, WrrEndpointWeightStale, WrrEndpointWeights];
        if !all.into_iter().any(|instrument| on.has(instrument)) {
            return None;
        }
        let target = SharedString::from(target.to_owned());
        let of = |instrument: Instrument| {
            on.has(instrument).then(|| counter!(instrument.name(), "grpc.target" => target.clone()))
        };
        Some(Self {
            fallback: of(WrrRrFallback),
            unusable: of(WrrEndpointWeightNotYetUsable),
            stale: of(WrrEndpointWeightStale),
            weights: on
                .has(WrrEndpointWeights)
                .then(|| histogram!(WrrEndpointWeights.name(), "grpc.target" => target.clone())),
        })
    }

    /// The weights were looked at.
    pub(crate) fn updated(&self, weights: impl Iterator<Item = Weighed>) {
        let (mut usable, mut unusable, mut stale) = (0u64, 0, 0);
        for weight in weights {
            let value = match weight {
                Weighed::Usable(weight) => {
                    usable += 1;
                    weight
                }
                Weighed::NotYet => {
                    unusable += 1;
                    0.0
                }
                Weighed::Stale => {
                    stale += 1;
                    0.0
                }
            };
            if let Some(weights) = &self.weights {
                weights.record(value);
            }
        }
        let add = |counter: &Option<Counter>, n: u64| {
            if let (Some(counter), true) = (counter, n > 0) {
                counter.increment(n);
            }
        };
        add(&self.fallback, u64::from(usable < 2));
        add(&self.unusable, unusable);
        add(&self.stale, stale);
    }
}

impl std::fmt::Debug for WeightNumbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightNumbers").finish_non_exhaustive()
    }
}
