//! What health checks make of an endpoint, on plain values (Envoy's `HealthCheckerImplBase`).

use mesh_xds::resource::HealthCheck;
use std::time::Duration;

/// Why a check failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// It says for sure that the endpoint is not well: it counts at once. Otherwise it counts towards the threshold.
    pub(crate) certain: bool,
    /// In words.
    pub(crate) reason: String,
}

/// What is known of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Health {
    standing: Standing,
    successes: u32,
    failures: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Not checked yet, and used: its cluster has just begun.
    Unknown,
    /// Not checked yet, and not used before it was: it joined others.
    Awaited,
    Healthy,
    Unhealthy,
}

/// What one check changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    /// Nothing.
    None,
    /// Nothing yet: more of the same will.
    Pending,
    /// The endpoint is healthy now, or unhealthy now.
    Changed,
}

impl Health {
    /// Of an endpoint that was there when its cluster began.
    pub(crate) const fn unknown() -> Self {
        Self { standing: Standing::Unknown, successes: 0, failures: 0 }
    }

    /// Of one that joins.
    pub(crate) const fn awaited() -> Self {
        Self { standing: Standing::Awaited, ..Self::unknown() }
    }

    /// Whether it is held out of the rotation.
    pub(crate) fn is_failing(self) -> bool {
        matches!(self.standing, Standing::Awaited | Standing::Unhealthy)
    }

    /// Whether a check has found it healthy.
    pub(crate) fn is_proven(self) -> bool {
        self.standing == Standing::Healthy
    }

    /// A check has ended. The first success makes an endpoint healthy, as in Envoy; so does the first failure make one unhealthy that
    /// was not checked before.
    pub(crate) fn checked(&mut self, result: Result<(), &Failed>, check: &HealthCheck) -> Transition {
        let (count, threshold, wanted) = match result {
            Ok(()) => {
                self.failures = 0;
                (&mut self.successes, check.healthy_threshold, Standing::Healthy)
            }
            Err(_) => {
                self.successes = 0;
                (&mut self.failures, check.unhealthy_threshold, Standing::Unhealthy)
            }
        };
        if self.standing == wanted {
            return Transition::None;
        }
        *count += 1;
        let first = matches!(self.standing, Standing::Unknown | Standing::Awaited);
        if !first && *count < threshold && !result.is_err_and(|failed| failed.certain) {
            return Transition::Pending;
        }
        *count = 0;
        self.standing = wanted;
        Transition::Changed
    }
}

/// How long after its start the first check of an endpoint is made. `draw` is in `0..1`.
pub(crate) fn initial_delay(check: &HealthCheck, draw: f64) -> Duration {
    check.initial_jitter.mul_f64(draw)
}

/// From the end of a check to the next one. `passed`: the check's result; `traffic`: the cluster was connected to for a request.
/// `draws` are in `0..1`.
pub(crate) fn delay(
    check: &HealthCheck,
    health: Health,
    passed: bool,
    transition: Transition,
    traffic: bool,
    draws: [f64; 2],
) -> Duration {
    let unhealthy = check.unhealthy_interval.unwrap_or(check.interval);
    let base = match (traffic, passed, transition) {
        (false, ..) if health.is_failing() => check.no_traffic_interval,
        (false, ..) => check.no_traffic_healthy_interval.unwrap_or(check.no_traffic_interval),
        (true, true, Transition::Changed) => check.healthy_edge_interval.unwrap_or(check.interval),
        (true, true, _) => check.interval,
        (true, false, Transition::Changed) => check.unhealthy_edge_interval.unwrap_or(unhealthy),
        (true, false, _) => unhealthy,
    };
    let percent = base.mul_f64(f64::from(check.interval_jitter_percent) / 100.0 * draws[0]);
    base.saturating_add(percent).saturating_add(check.interval_jitter.mul_f64(draws[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(certain: bool) -> Failed {
        Failed { certain, reason: "it says so".into() }
    }

    /// Checks one after another: `+` passes, `-` fails, `!` fails for sure. What each changed, and whether the endpoint is out after it.
    fn play(mut health: Health, check: &HealthCheck, checks: &str) -> String {
        let one = |c| {
            let transition = match c {
                '+' => health.checked(Ok(()), check),
                '-' => health.checked(Err(&failed(false)), check),
                _ => health.checked(Err(&failed(true)), check),
            };
            let letter = match transition {
                Transition::None => '.',
                Transition::Pending => 'p',
                Transition::Changed => 'c',
            };
            [letter, if health.is_failing() { 'x' } else { 'o' }]
        };
        checks.chars().flat_map(one).collect()
    }

    #[test]
    fn thresholds_make_and_unmake_an_endpoint_unhealthy() {
        let check = HealthCheck::http("/").thresholds(3, 2);
        assert_eq!(play(Health::unknown(), &check, "+---"), "copopocx");
        assert_eq!(play(Health::unknown(), &check, "+--+---"), "copopo.opopocx", "a success ends the row");
        assert_eq!(play(Health::unknown(), &check, "+---+-++"), "copopocxpx.xpxco", "and a failure");
        assert_eq!(play(Health::unknown(), &check, "+!-!+!++"), "cocx.x.xpx.xpxco", "one that says so counts at once");
    }

    #[test]
    fn the_first_check_decides() {
        let check = HealthCheck::http("/").thresholds(3, 2);
        assert!(!Health::unknown().is_failing() && Health::awaited().is_failing());
        assert_eq!(play(Health::unknown(), &check, "-++"), "cxpxco");
        assert_eq!(play(Health::awaited(), &check, "+"), "co");
        assert_eq!(play(Health::awaited(), &check, "-+"), "cxpx");
    }

    #[test]
    fn the_next_check_is_as_far_as_the_state_says() {
        let seconds = Duration::from_secs;
        let mut check = HealthCheck::http("/").thresholds(1, 1).interval(seconds(5)).no_traffic_interval(seconds(60));
        let (mut healthy, mut unhealthy) = (Health::unknown(), Health::unknown());
        healthy.checked(Ok(()), &check);
        unhealthy.checked(Err(&failed(false)), &check);
        let next = |check: &HealthCheck, passed, transition, traffic| {
            let health = if passed { healthy } else { unhealthy };
            delay(check, health, passed, transition, traffic, [0.0, 0.0]).as_secs()
        };
        use Transition::{Changed, None as Same};
        for passed in [true, false] {
            assert_eq!((next(&check, passed, Changed, true), next(&check, passed, Same, true)), (5, 5));
            assert_eq!(next(&check, passed, Same, false), 60);
        }
        check.unhealthy_interval = Some(seconds(1));
        assert_eq!((next(&check, false, Changed, true), next(&check, false, Same, true)), (1, 1));
        check.unhealthy_edge_interval = Some(seconds(2));
        check.healthy_edge_interval = Some(seconds(3));
        check.no_traffic_healthy_interval = Some(seconds(90));
        assert_eq!((next(&check, false, Changed, true), next(&check, false, Same, true)), (2, 1));
        assert_eq!((next(&check, true, Changed, true), next(&check, true, Same, true)), (3, 5));
        assert_eq!((next(&check, true, Same, false), next(&check, false, Same, false)), (90, 60));
    }

    #[test]
    fn jitter_makes_waits_longer() {
        let mut check = HealthCheck::tcp().interval(Duration::from_secs(10));
        check.initial_jitter = Duration::from_secs(4);
        check.interval_jitter = Duration::from_secs(2);
        check.interval_jitter_percent = 50;
        let next = |draws| delay(&check, Health::unknown(), true, Transition::None, true, draws);
        assert_eq!(next([0.0, 0.0]), Duration::from_secs(10));
        assert_eq!(next([0.5, 0.5]), Duration::from_millis(13_500));
        assert_eq!(initial_delay(&check, 0.25), Duration::from_secs(1));
    }
}
