use super::*;
use crate::outbound::cluster::Outcome;
use std::collections::BTreeMap;

fn config() -> OutlierDetection {
    OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() }
}

fn hosts(tallies: &[(u32, u32)]) -> Vec<Host> {
    let host = |&(successes, failures)| Host { ejection: Ejection::default(), tally: Tally { successes, failures } };
    tallies.iter().map(host).collect()
}

fn ejected(hosts: &[Host]) -> Vec<usize> {
    (0..hosts.len()).filter(|i| hosts[*i].ejection.is_ejected()).collect()
}

fn swept(config: &OutlierDetection, tallies: &[(u32, u32)]) -> Vec<usize> {
    let mut hosts = hosts(tallies);
    sweep(&mut hosts, config, Instant::now(), &mut fastrand::Rng::with_seed(1));
    ejected(&hosts)
}

/// gRFC A50, written down as it reads, without a thought for speed.
struct Model {
    config: OutlierDetection,
    /// Address -> (ejected at, multiplier).
    addresses: BTreeMap<usize, (Option<Instant>, u32)>,
}

impl Model {
    fn ejected(&self) -> Vec<usize> {
        self.addresses.iter().filter(|(_, (at, _))| at.is_some()).map(|(i, _)| *i).collect()
    }

    fn eject(&mut self, i: usize, now: Instant) {
        let share = self.ejected().len() as f64 * 100.0 / self.addresses.len() as f64;
        if share >= f64::from(self.config.max_ejection_percent) || self.addresses[&i].0.is_some() {
            return;
        }
        let multiplier = self.addresses[&i].1 + 1;
        self.addresses.insert(i, (Some(now), multiplier));
    }

    fn interval(&mut self, calls: &[(u32, u32)], now: Instant) {
        let c = self.config.clone();
        if c.enforcing_success_rate > 0 {
            let enough: Vec<(usize, f64)> = calls
                .iter()
                .enumerate()
                .filter(|(_, (s, f))| s + f >= c.success_rate_request_volume && s + f > 0)
                .map(|(i, (s, f))| (i, f64::from(*s) / f64::from(s + f)))
                .collect();
            if enough.len() >= c.success_rate_minimum_hosts as usize {
                let mean = enough.iter().map(|e| e.1).sum::<f64>() / enough.len() as f64;
                let variance = enough.iter().map(|e| (e.1 - mean) * (e.1 - mean)).sum::<f64>() / enough.len() as f64;
                let threshold = mean - variance.sqrt() * (f64::from(c.success_rate_stdev_factor) / 1000.0);
                for (i, rate) in enough {
                    // The rounding of a sum must not decide.
                    if rate < threshold && threshold - rate > 1e-9 {
                        self.eject(i, now);
                    }
                }
            }
        }
        if c.enforcing_failure_percentage > 0 {
            let volume = c.failure_percentage_request_volume.max(1);
            let enough: Vec<usize> = (0..calls.len()).filter(|i| calls[*i].0 + calls[*i].1 >= volume).collect();
            if enough.len() >= c.failure_percentage_minimum_hosts as usize {
                for i in enough {
                    let (s, f) = calls[i];
                    if 100 * u64::from(f) >= u64::from(c.failure_percentage_threshold) * u64::from(s + f) {
                        self.eject(i, now);
                    }
                }
            }
        }
        for (at, multiplier) in self.addresses.values_mut() {
            match at {
                None => *multiplier = multiplier.saturating_sub(1),
                Some(since) => {
                    let time = (c.base_ejection_time * *multiplier).min(c.base_ejection_time.max(c.max_ejection_time));
                    if now >= *since + time {
                        *at = None;
                    }
                }
            }
        }
    }
}

#[test]
fn sweeps_do_what_the_model_does() {
    let start = Instant::now();
    for seed in 0..300 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let n = rng.usize(1..12);
        let config = OutlierDetection {
            max_ejection_percent: *rng.choice(&[0, 1, 10, 34, 50, 100]).unwrap(),
            success_rate_minimum_hosts: rng.u32(0..6),
            success_rate_request_volume: rng.u32(0..60),
            success_rate_stdev_factor: *rng.choice(&[500, 1000, 1900]).unwrap(),
            enforcing_success_rate: *rng.choice(&[0, 100]).unwrap(),
            failure_percentage_minimum_hosts: rng.u32(0..6),
            failure_percentage_request_volume: rng.u32(0..60),
            failure_percentage_threshold: *rng.choice(&[50, 85, 100]).unwrap(),
            enforcing_failure_percentage: *rng.choice(&[0, 100]).unwrap(),
            base_ejection_time: Duration::from_secs(rng.u64(1..40)),
            max_ejection_time: Duration::from_secs(rng.u64(1..100)),
            ..config()
        };
        let mut model = Model { config: config.clone(), addresses: (0..n).map(|i| (i, (None, 0))).collect() };
        let mut real = hosts(&vec![(0, 0); n]);
        for round in 1..60 {
            let now = start + Duration::from_secs(10 * round);
            let calls: Vec<(u32, u32)> = (0..n)
                .map(|_| if rng.bool() { (rng.u32(0..80), 0) } else { (rng.u32(0..40), rng.u32(0..60)) })
                .collect();
            for (host, (successes, failures)) in real.iter_mut().zip(&calls) {
                host.tally = Tally { successes: *successes, failures: *failures };
            }
            sweep(&mut real, &config, now, &mut rng);
            model.interval(&calls, now);
            assert_eq!(ejected(&real), model.ejected(), "seed {seed}, round {round}, {calls:?}, {config:?}");
            for (host, (i, (_, multiplier))) in real.iter().zip(&model.addresses) {
                assert_eq!(host.ejection.multiplier, *multiplier, "multiplier of {i}, seed {seed}, round {round}");
            }
        }
    }
}

#[test]
fn success_rate_ejects_the_one_far_below_the_mean() {
    // Rates 1, 1, 1, 1, 0.5: mean 0.9, deviation 0.2, threshold 0.52.
    let tallies = [(100, 0), (100, 0), (100, 0), (100, 0), (50, 50)];
    assert_eq!(swept(&config(), &tallies), [4]);
    let near = [(100, 0), (100, 0), (100, 0), (90, 10), (85, 15)];
    assert_eq!(swept(&config(), &near), [0; 0]);
    assert_eq!(swept(&OutlierDetection { success_rate_minimum_hosts: 6, ..config() }, &tallies), [0; 0]);
    assert_eq!(swept(&OutlierDetection { success_rate_request_volume: 101, ..config() }, &tallies), [0; 0]);
    assert_eq!(swept(&OutlierDetection { enforcing_success_rate: 0, ..config() }, &tallies), [0; 0]);
}

#[test]
fn equal_rates_are_no_outliers() {
    for (successes, failures) in [(100, 0), (0, 100), (33, 67), (7, 93)] {
        assert_eq!(swept(&config(), &[(successes, failures); 9]), [0; 0]);
    }
}

#[test]
fn failure_percentage_ejects_from_its_threshold_on() {
    let config = OutlierDetection { enforcing_failure_percentage: 100, enforcing_success_rate: 0, ..config() };
    let tallies = [(15, 85), (16, 84), (100, 0), (100, 0), (100, 0), (0, 49)];
    assert_eq!(swept(&config, &tallies), [0]);
    assert_eq!(swept(&OutlierDetection { enforcing_failure_percentage: 0, ..config }, &tallies), [0; 0]);
}

#[test]
fn one_endpoint_can_go_at_any_positive_percentage_and_none_at_zero() {
    let config = |max_ejection_percent| OutlierDetection {
        max_ejection_percent,
        enforcing_failure_percentage: 100,
        failure_percentage_minimum_hosts: 1,
        ..config()
    };
    assert_eq!(swept(&config(0), &[(0, 100); 10]).len(), 0);
    assert_eq!(swept(&config(1), &[(0, 100); 10]).len(), 1);
    assert_eq!(swept(&config(10), &[(0, 100); 10]).len(), 1);
    assert_eq!(swept(&config(11), &[(0, 100); 10]).len(), 2);
    assert_eq!(swept(&config(100), &[(0, 100); 10]).len(), 10);
}

#[test]
fn an_ejection_lasts_longer_each_time_up_to_the_maximum_and_shorter_after_clean_intervals() {
    let config = OutlierDetection { max_ejection_time: Duration::from_secs(70), ..config() };
    let mut rng = fastrand::Rng::with_seed(1);
    let mut now = Instant::now();
    let mut ejection = Ejection::default();
    for seconds in [30, 60, 70, 70] {
        let verdict = consecutive(Cause::Consecutive5xx, &mut ejection, (0, 1), &config, now, &mut rng);
        assert_eq!(verdict, Verdict::Ejected);
        assert_eq!(ejection.until(&config), Some(now + Duration::from_secs(seconds)));
        now += Duration::from_secs(seconds);
        let mut early = 0;
        release_due([&mut ejection].into_iter(), &config, now - Duration::from_nanos(1), |_| early += 1);
        assert_eq!(early, 0);
        release_due([&mut ejection].into_iter(), &config, now, |_| {});
        assert!(!ejection.is_ejected());
    }
    let mut hosts = [Host { ejection, tally: Tally::default() }];
    // The interval in which it came back does not count as clean, the three after it do.
    for _ in 0..4 {
        sweep(&mut hosts, &config, now, &mut rng);
    }
    consecutive(Cause::Consecutive5xx, &mut hosts[0].ejection, (0, 1), &config, now, &mut rng);
    assert_eq!(hosts[0].ejection.until(&config), Some(now + Duration::from_secs(60)));
}

#[test]
fn enforcing_is_a_share_of_the_ejections() {
    let config = OutlierDetection { enforcing_consecutive_5xx: 30, ..config() };
    let mut rng = fastrand::Rng::with_seed(9);
    let now = Instant::now();
    let ejected = (0..10_000)
        .filter(|_| {
            let verdict = consecutive(Cause::Consecutive5xx, &mut Ejection::default(), (0, 1), &config, now, &mut rng);
            verdict == Verdict::Ejected
        })
        .count();
    assert!((2_817..=3_183).contains(&ejected), "{ejected} of 10000, four deviations are 183");
}

#[test]
fn rows_of_failures_are_counted_apart() {
    let thresholds = Thresholds::default();
    thresholds.set(Some(&OutlierDetection {
        consecutive_5xx: Some(3),
        consecutive_gateway_failure: Some(2),
        ..config()
    }));
    let counters = Counters::default();
    let any = Some(Cause::Consecutive5xx);
    let gateway = Some(Cause::ConsecutiveGatewayFailure);
    let steps = [
        (Outcome::GatewayFailure, [None, None]),
        (Outcome::ServerError, [None, None]),
        (Outcome::LocalOrigin, [any, None]),
        (Outcome::GatewayFailure, [None, gateway]),
        (Outcome::GatewayFailure, [None, None]),
        (Outcome::GatewayFailure, [any, gateway]),
        (Outcome::ServerError, [None, None]),
        (Outcome::ServerError, [None, None]),
        (Outcome::Success, [None, None]),
        (Outcome::ServerError, [None, None]),
        (Outcome::ServerError, [None, None]),
        (Outcome::ServerError, [any, None]),
    ];
    for (i, (outcome, expected)) in steps.into_iter().enumerate() {
        assert_eq!(counters.record(outcome, &thresholds), expected, "step {i}");
    }
    assert_eq!(counters.take(), Tally { successes: 1, failures: 11 });
    assert_eq!(counters.take(), Tally::default());
}

#[test]
fn nothing_is_counted_while_it_is_off() {
    let (counters, thresholds) = (Counters::default(), Thresholds::default());
    for _ in 0..10 {
        assert_eq!(counters.record(Outcome::ServerError, &thresholds), [None, None]);
    }
    assert_eq!(counters.take(), Tally::default());
}

#[test]
fn a_tally_under_threads_loses_nothing() {
    let (counters, thresholds) = (Counters::default(), Thresholds::default());
    thresholds.set(Some(&config()));
    let mut total = (0, 0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        counters.record(Outcome::Success, &thresholds);
                        counters.record(Outcome::ServerError, &thresholds);
                    }
                })
            })
            .collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            let tally = counters.take();
            total = (total.0 + tally.successes, total.1 + tally.failures);
        }
    });
    let tally = counters.take();
    assert_eq!((total.0 + tally.successes, total.1 + tally.failures), (40_000, 40_000));
}
