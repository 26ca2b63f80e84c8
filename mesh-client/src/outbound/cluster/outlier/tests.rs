use super::*;
use crate::outbound::cluster::Outcome;
use crate::outbound::route::Profile;
use mesh_xds::resource::FailureAccrual;
use std::collections::BTreeMap;

fn config() -> OutlierDetection {
    OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() }
}

fn hosts(tallies: &[(u32, u32)]) -> Vec<Host> {
    let host = |&(successes, failures)| Host {
        ejection: Ejection::default(),
        tally: Tally { successes, failures },
        local: Tally::default(),
    };
    tallies.iter().map(host).collect()
}

fn ejected(hosts: &[Host]) -> Vec<usize> {
    (0..hosts.len()).filter(|i| hosts[*i].ejection.is_ejected()).collect()
}

fn swept(config: &OutlierDetection, tallies: &[(u32, u32)]) -> Vec<usize> {
    swept_by(grpc(config), tallies)
}

fn swept_by(rules: Rules<'_>, tallies: &[(u32, u32)]) -> Vec<usize> {
    let mut hosts = hosts(tallies);
    sweep(&mut hosts, rules, Instant::now(), &mut fastrand::Rng::with_seed(1));
    ejected(&hosts)
}

fn grpc(config: &OutlierDetection) -> Rules<'_> {
    Rules { config, profile: Profile::Grpc }
}

fn envoy(config: &OutlierDetection) -> Rules<'_> {
    Rules { config, profile: Profile::Envoy }
}

/// gRFC A50 and Envoy's documentation, written down as they read, without a thought for speed.
struct Model {
    profile: Profile,
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
        let with_it = (self.ejected().len() + 1) as f64 * 100.0 / self.addresses.len() as f64;
        let max = f64::from(self.config.max_ejection_percent);
        let first = self.config.always_eject_one_host && self.ejected().is_empty();
        let full = match self.profile {
            Profile::Grpc => share >= max,
            Profile::Envoy => with_it > max,
        };
        if (full && !first) || self.addresses[&i].0.is_some() {
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
                    let (failed, limit) =
                        (100 * u64::from(f), u64::from(c.failure_percentage_threshold) * u64::from(s + f));
                    if failed > limit || (failed == limit && self.profile == Profile::Envoy) {
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
            always_eject_one_host: rng.bool(),
            base_ejection_time: Duration::from_secs(rng.u64(1..40)),
            max_ejection_time: Duration::from_secs(rng.u64(1..100)),
            ..config()
        };
        let profile = *rng.choice(&[Profile::Grpc, Profile::Envoy]).unwrap();
        let mut model = Model { profile, config: config.clone(), addresses: (0..n).map(|i| (i, (None, 0))).collect() };
        let mut real = hosts(&vec![(0, 0); n]);
        for round in 1..60 {
            let now = start + Duration::from_secs(10 * round);
            let calls: Vec<(u32, u32)> = (0..n)
                .map(|_| if rng.bool() { (rng.u32(0..80), 0) } else { (rng.u32(0..40), rng.u32(0..60)) })
                .collect();
            for (host, (successes, failures)) in real.iter_mut().zip(&calls) {
                host.tally = Tally { successes: *successes, failures: *failures };
            }
            sweep(&mut real, Rules { config: &config, profile: model.profile }, now, &mut rng);
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
fn failure_percentage_ejects_above_its_threshold_and_in_envoy_at_it() {
    let config = OutlierDetection { enforcing_failure_percentage: 100, enforcing_success_rate: 0, ..config() };
    let tallies = [(14, 86), (15, 85), (16, 84), (100, 0), (100, 0), (100, 0), (0, 49)];
    assert_eq!(swept(&config, &tallies), [0]);
    assert_eq!(swept_by(envoy(&config), &tallies), [0, 1]);
    let off = OutlierDetection { enforcing_failure_percentage: 0, ..config };
    assert_eq!(swept_by(envoy(&off), &tallies), [0; 0]);
}

#[test]
fn the_share_of_the_ejected_is_limited_by_the_rules_of_the_profile() {
    let config = |max_ejection_percent, always_eject_one_host| OutlierDetection {
        max_ejection_percent,
        always_eject_one_host,
        enforcing_failure_percentage: 100,
        failure_percentage_minimum_hosts: 1,
        ..config()
    };
    // Percentage, always one; of ten: by gRPC's rules, by Envoy's.
    let cases = [
        (0, false, 0, 0),
        (0, true, 1, 1),
        (1, false, 1, 0),
        (1, true, 1, 1),
        (10, false, 1, 1),
        (11, false, 2, 1),
        (20, true, 2, 2),
        (100, false, 10, 10),
    ];
    for (percent, always, grpc, of_envoy) in cases {
        let config = config(percent, always);
        assert_eq!(swept(&config, &[(0, 100); 10]).len(), grpc, "{percent} {always}");
        assert_eq!(swept_by(envoy(&config), &[(0, 100); 10]).len(), of_envoy, "{percent} {always}");
    }
}

#[test]
fn whether_there_was_an_answer_is_judged_apart_when_split() {
    let config = OutlierDetection {
        split_local_origin: true,
        enforcing_success_rate: 0,
        enforcing_failure_percentage_local_origin: 100,
        enforcing_local_origin_success_rate: 0,
        ..config()
    };
    let mut all = hosts(&[(100, 0); 5]);
    all[2].local = Tally { successes: 0, failures: 100 };
    (0..5).filter(|i| *i != 2).for_each(|i| all[i].local = Tally { successes: 100, failures: 0 });
    let mut rng = fastrand::Rng::with_seed(1);
    for (config, cause) in [
        (config.clone(), Cause::LocalOriginFailurePercentage),
        (
            OutlierDetection {
                enforcing_local_origin_success_rate: 100,
                enforcing_failure_percentage_local_origin: 0,
                ..config
            },
            Cause::LocalOriginSuccessRate,
        ),
    ] {
        let mut hosts = all.clone();
        let events = sweep(&mut hosts, grpc(&config), Instant::now(), &mut rng);
        assert_eq!(events, [Event::Detected(2, cause, Verdict::Ejected)]);
        assert_eq!(hosts[2].ejection.cause(), Some(cause));
        let joint = OutlierDetection { split_local_origin: false, ..config };
        assert_eq!(sweep(&mut all.clone(), grpc(&joint), Instant::now(), &mut rng), []);
    }
}

#[test]
fn jitter_makes_ejections_longer_by_up_to_its_length() {
    let second = Duration::from_secs(1);
    let config = OutlierDetection { max_ejection_time_jitter: 10 * second, ..config() };
    let (mut rng, now) = (fastrand::Rng::with_seed(5), Instant::now());
    let mut lengths: Vec<Duration> = (0..200)
        .map(|_| {
            let mut ejection = Ejection::default();
            consecutive(Cause::Consecutive5xx, &mut ejection, (0, 1), grpc(&config), now, &mut rng);
            ejection.until(&config).unwrap() - now
        })
        .collect();
    lengths.sort();
    assert!(lengths[0] >= 30 * second && lengths[0] < 31 * second && lengths[199] > 39 * second, "{lengths:?}");
    assert!(lengths[199] <= 40 * second);
}

#[test]
fn pauses_of_failure_accrual_double_until_a_probe_succeeds() {
    let second = Duration::from_secs(1);
    let accrual = FailureAccrual { min_pause: second, max_pause: 5 * second, jitter: 0.0, ..FailureAccrual::default() };
    let config = OutlierDetection { max_ejection_percent: 0, ..OutlierDetection::accrual(accrual) };
    let (mut rng, now) = (fastrand::Rng::with_seed(5), Instant::now());
    let mut ejection = Ejection::default();
    for seconds in [1, 2, 4, 5, 5] {
        let verdict = consecutive(Cause::FailureAccrual, &mut ejection, (9, 10), grpc(&config), now, &mut rng);
        assert_eq!(verdict, Verdict::Ejected, "no share is spared");
        assert_eq!(ejection.until(&config), Some(now + seconds * second));
        ejection.release();
        assert!(ejection.is_on_probation() && !ejection.is_ejected());
    }
    ejection.acquit();
    assert!(!ejection.is_on_probation());
    consecutive(Cause::FailureAccrual, &mut ejection, (0, 1), grpc(&config), now, &mut rng);
    assert_eq!(ejection.until(&config), Some(now + second));
    let jittered = FailureAccrual { jitter: 0.5, ..accrual };
    let config = OutlierDetection::accrual(jittered);
    let mut ejection = Ejection::default();
    consecutive(Cause::FailureAccrual, &mut ejection, (0, 1), grpc(&config), now, &mut rng);
    let length = ejection.until(&config).unwrap() - now;
    assert!(length > second && length < second * 3 / 2, "{length:?}");
}

#[test]
fn an_ejection_lasts_longer_each_time_up_to_the_maximum_and_shorter_after_clean_intervals() {
    let config = OutlierDetection { max_ejection_time: Duration::from_secs(70), ..config() };
    let mut rng = fastrand::Rng::with_seed(1);
    let mut now = Instant::now();
    let mut ejection = Ejection::default();
    for seconds in [30, 60, 70, 70] {
        let verdict = consecutive(Cause::Consecutive5xx, &mut ejection, (0, 1), grpc(&config), now, &mut rng);
        assert_eq!(verdict, Verdict::Ejected);
        assert_eq!(ejection.until(&config), Some(now + Duration::from_secs(seconds)));
        now += Duration::from_secs(seconds);
        let mut early = 0;
        release_due([&mut ejection].into_iter(), &config, now - Duration::from_nanos(1), |_| early += 1);
        assert_eq!(early, 0);
        release_due([&mut ejection].into_iter(), &config, now, |_| {});
        assert!(!ejection.is_ejected());
    }
    let mut hosts = [Host { ejection, tally: Tally::default(), local: Tally::default() }];
    // The interval in which it came back does not count as clean, the three after it do.
    for _ in 0..4 {
        sweep(&mut hosts, grpc(&config), now, &mut rng);
    }
    consecutive(Cause::Consecutive5xx, &mut hosts[0].ejection, (0, 1), grpc(&config), now, &mut rng);
    assert_eq!(hosts[0].ejection.until(&config), Some(now + Duration::from_secs(60)));
}

#[test]
fn enforcing_is_a_share_of_the_ejections() {
    let config = OutlierDetection { enforcing_consecutive_5xx: 30, ..config() };
    let mut rng = fastrand::Rng::with_seed(9);
    let now = Instant::now();
    let ejected = (0..10_000)
        .filter(|_| {
            let verdict =
                consecutive(Cause::Consecutive5xx, &mut Ejection::default(), (0, 1), grpc(&config), now, &mut rng);
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
        (Outcome::GatewayFailure, [None, None, None]),
        (Outcome::ServerError, [None, None, None]),
        (Outcome::LocalOrigin, [any, None, None]),
        (Outcome::GatewayFailure, [None, gateway, None]),
        (Outcome::GatewayFailure, [None, None, None]),
        (Outcome::GatewayFailure, [any, gateway, None]),
        (Outcome::ServerError, [None, None, None]),
        (Outcome::ServerError, [None, None, None]),
        (Outcome::Success, [None, None, None]),
        (Outcome::ServerError, [None, None, None]),
        (Outcome::ServerError, [None, None, None]),
        (Outcome::ServerError, [any, None, None]),
    ];
    for (i, (outcome, expected)) in steps.into_iter().enumerate() {
        assert_eq!(counters.record(outcome, &thresholds), expected, "step {i}");
    }
    assert_eq!(counters.take()[0], Tally { successes: 1, failures: 11 });
    assert_eq!(counters.take(), [Tally::default(); 2]);
}

#[test]
fn nothing_is_counted_while_it_is_off() {
    let (counters, thresholds) = (Counters::default(), Thresholds::default());
    for _ in 0..10 {
        assert_eq!(counters.record(Outcome::ServerError, &thresholds), [None; 3]);
    }
    assert_eq!(counters.take(), [Tally::default(); 2]);
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
            let [tally, _] = counters.take();
            total = (total.0 + tally.successes, total.1 + tally.failures);
        }
    });
    let [tally, _] = counters.take();
    assert_eq!((total.0 + tally.successes, total.1 + tally.failures), (40_000, 40_000));
}

#[test]
fn failures_to_get_an_answer_are_counted_apart_when_split() {
    let thresholds = Thresholds::default();
    thresholds.set(Some(&OutlierDetection {
        consecutive_5xx: Some(2),
        consecutive_gateway_failure: Some(2),
        consecutive_local_origin_failure: Some(2),
        split_local_origin: true,
        failure_accrual: Some(FailureAccrual { max_failures: 3, ..FailureAccrual::default() }),
        ..config()
    }));
    let counters = Counters::default();
    let (local, accrued) = (Some(Cause::ConsecutiveLocalOriginFailure), Some(Cause::FailureAccrual));
    let steps = [
        (Outcome::LocalOrigin, [None; 3]),
        (Outcome::ServerError, [None; 3]),
        (Outcome::LocalOrigin, [None, None, accrued]),
        (Outcome::LocalOrigin, [local, None, None]),
        (Outcome::ServerError, [Some(Cause::Consecutive5xx), None, None]),
        (Outcome::Success, [None; 3]),
        (Outcome::LocalOrigin, [None; 3]),
        (Outcome::Success, [None; 3]),
        (Outcome::LocalOrigin, [None; 3]),
    ];
    for (i, (outcome, expected)) in steps.into_iter().enumerate() {
        assert_eq!(counters.record(outcome, &thresholds), expected, "step {i}");
    }
    assert_eq!(counters.take(), [Tally { successes: 2, failures: 2 }, Tally { successes: 4, failures: 5 }]);
}
