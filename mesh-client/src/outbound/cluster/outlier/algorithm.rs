//! The decisions of outlier detection, on plain values.

use super::{Cause, Ejection, Tally};
use crate::outbound::route::Profile;
use mesh_xds::resource::OutlierDetection;
use tokio::time::Instant;

/// A rate at the threshold is no outlier, however the sums were rounded.
const ROUNDING: f64 = 1e-9;

/// What decides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    pub(crate) config: &'a OutlierDetection,
    /// How shares are compared with their limits.
    pub(crate) profile: Profile,
}

/// One endpoint, as a sweep sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) ejection: Ejection,
    /// Of the interval that ends: what it answered.
    pub(crate) tally: Tally,
    /// And whether it answered, where that is counted apart.
    pub(crate) local: Tally,
}

/// What came of an endpoint that is to be ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is ejected.
    Ejected,
    /// It was already.
    Already,
    /// As many as `max_ejection_percent` allows are ejected.
    TooMany,
    /// The `enforcing_*` draw spared it.
    Spared,
}

/// What a sweep did, by index of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Found to be an outlier.
    Detected(usize, Cause, Verdict),
    /// Its time is over.
    Returned(usize),
}

/// A row of failures is complete. `ejected` of `total` endpoints are ejected, before this one.
pub(crate) fn consecutive(
    cause: Cause,
    ejection: &mut Ejection,
    (ejected, total): (usize, usize),
    rules: Rules<'_>,
    now: Instant,
    rng: &mut fastrand::Rng,
) -> Verdict {
    if ejection.is_ejected() {
        Verdict::Already
    } else if cause != Cause::FailureAccrual && rules.is_full(ejected, total) {
        Verdict::TooMany
    } else if rng.u32(0..100) >= cause.enforcing(rules.config) {
        Verdict::Spared
    } else {
        ejection.eject(cause, rules.config, now, rng.f64());
        Verdict::Ejected
    }
}

/// The end of an interval: success rate, failure percentage, returns, decay, in the order of gRFC A50.
pub(crate) fn sweep(hosts: &mut [Host], rules: Rules<'_>, now: Instant, rng: &mut fastrand::Rng) -> Vec<Event> {
    let config = rules.config;
    let mut events = Vec::new();
    let mut outliers = Vec::new();
    let mut judge = |success_rate: Cause, failure_percentage: Cause, tally: fn(&Host) -> Tally| {
        let tallies: Vec<Tally> = hosts.iter().map(tally).collect();
        if success_rate.enforcing(config) > 0 {
            outliers.extend(below_success_rate(&tallies, config).map(|i| (i, success_rate)));
        }
        if failure_percentage.enforcing(config) > 0 {
            outliers.extend(above_failure_percentage(&tallies, rules).map(|i| (i, failure_percentage)));
        }
    };
    judge(Cause::SuccessRate, Cause::FailurePercentage, |host| host.tally);
    if config.split_local_origin {
        judge(Cause::LocalOriginSuccessRate, Cause::LocalOriginFailurePercentage, |host| host.local);
    }
    let total = hosts.len();
    let mut ejected = hosts.iter().filter(|h| h.ejection.is_ejected()).count();
    for (i, cause) in outliers {
        let verdict = consecutive(cause, &mut hosts[i].ejection, (ejected, total), rules, now, rng);
        ejected += usize::from(verdict == Verdict::Ejected);
        if verdict != Verdict::Already {
            events.push(Event::Detected(i, cause, verdict));
        }
    }
    for host in hosts.iter_mut() {
        host.ejection.decay();
    }
    release_due(hosts.iter_mut().map(|h| &mut h.ejection), config, now, |i| events.push(Event::Returned(i)));
    // A host that returns at the end of an interval was not in it, so the next one is its first clean one.
    for event in &events {
        if let Event::Returned(i) = event {
            hosts[*i].ejection.returned = false;
        }
    }
    events
}

/// Releases the endpoints whose time is over.
pub(crate) fn release_due<'a>(
    ejections: impl Iterator<Item = &'a mut Ejection>,
    config: &OutlierDetection,
    now: Instant,
    mut released: impl FnMut(usize),
) {
    for (i, ejection) in ejections.enumerate() {
        if ejection.until(config).is_some_and(|until| now >= until) {
            ejection.release();
            released(i);
        }
    }
}

impl Rules<'_> {
    /// Whether no more may be ejected. gRPC (gRFC A50): when the share of the ejected has reached `max_ejection_percent`, so that with any
    /// positive percentage one endpoint can always go. Envoy: when one more would exceed it, unless `always_eject_one_host` lets the
    /// first one go.
    fn is_full(self, ejected: usize, total: usize) -> bool {
        let Self { config, profile } = self;
        let allowed = u64::from(config.max_ejection_percent) * total as u64;
        match profile {
            _ if ejected == 0 && config.always_eject_one_host => false,
            Profile::Grpc => ejected as u64 * 100 >= allowed,
            Profile::Envoy => (ejected as u64 + 1) * 100 > allowed,
        }
    }
}

/// The hosts whose success rate is more than `stdev_factor / 1000` population standard deviations below the mean of
/// the hosts that had enough requests.
fn below_success_rate(hosts: &[Tally], config: &OutlierDetection) -> impl Iterator<Item = usize> {
    let rates: Vec<(usize, f64)> = with_volume(hosts, config.success_rate_request_volume)
        .map(|(i, tally)| (i, f64::from(tally.successes) / tally.total()))
        .collect();
    let mut threshold = f64::NEG_INFINITY;
    if !rates.is_empty() && rates.len() >= config.success_rate_minimum_hosts as usize {
        let n = rates.len() as f64;
        let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / n;
        let variance = rates.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / n;
        threshold = mean - variance.sqrt() * f64::from(config.success_rate_stdev_factor) / 1000.0;
    }
    rates.into_iter().filter(move |(_, rate)| threshold - rate > ROUNDING).map(|(i, _)| i)
}

/// The hosts that failed more than `threshold` percent of their requests (gRFC A50), or as much (Envoy), among those with enough
/// requests, if there are enough of those.
fn above_failure_percentage(hosts: &[Tally], rules: Rules<'_>) -> impl Iterator<Item = usize> {
    let Rules { config, profile } = rules;
    let tallies: Vec<_> = with_volume(hosts, config.failure_percentage_request_volume).collect();
    let enough = tallies.len() >= config.failure_percentage_minimum_hosts as usize;
    let threshold = f64::from(config.failure_percentage_threshold);
    tallies
        .into_iter()
        .filter(move |(_, tally)| {
            let (failed, limit) = (f64::from(tally.failures) * 100.0, threshold * tally.total());
            enough && (failed > limit || (profile == Profile::Envoy && failed >= limit))
        })
        .map(|(i, _)| i)
}

fn with_volume(hosts: &[Tally], volume: u32) -> impl Iterator<Item = (usize, Tally)> {
    hosts.iter().copied().enumerate().filter(move |(_, tally)| tally.total() >= f64::from(volume.max(1)))
}

impl Tally {
    fn total(self) -> f64 {
        f64::from(self.successes) + f64::from(self.failures)
    }
}
