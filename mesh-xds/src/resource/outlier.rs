//! When endpoints are held out of the rotation for how they answer.

use std::time::Duration;

/// `outlier_detection` (gRFC A50 and Envoy's consecutive counters).
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierDetection {
    /// Sweep interval; default 10 s.
    pub interval: Duration,
    /// Default 30 s.
    pub base_ejection_time: Duration,
    /// Default 300 s (or `base_ejection_time` if larger).
    pub max_ejection_time: Duration,
    /// Up to this much is added to each ejection; default zero.
    pub max_ejection_time_jitter: Duration,
    /// 0..=100, default 10.
    pub max_ejection_percent: u32,
    /// One endpoint can be ejected whatever `max_ejection_percent` says. Default false. By gRPC's rules it always can, at any percentage
    /// above zero.
    pub always_eject_one_host: bool,
    /// `consecutive_5xx`: `None` when off. Envoy's default is 5 when outlier detection is configured with it.
    pub consecutive_5xx: Option<u32>,
    /// Percent of ejections enforced; default 100.
    pub enforcing_consecutive_5xx: u32,
    /// `consecutive_gateway_failure` (502, 503, 504, UNAVAILABLE and local failures).
    pub consecutive_gateway_failure: Option<u32>,
    /// Default 0.
    pub enforcing_consecutive_gateway_failure: u32,
    /// Success rate: factor/1000 standard deviations; default 1900.
    pub success_rate_stdev_factor: u32,
    /// Default 100 (0 turns success rate off).
    pub enforcing_success_rate: u32,
    /// Default 5.
    pub success_rate_minimum_hosts: u32,
    /// Default 100 requests an interval.
    pub success_rate_request_volume: u32,
    /// Failure percentage: default 85.
    pub failure_percentage_threshold: u32,
    /// Default 0: off.
    pub enforcing_failure_percentage: u32,
    /// Default 5.
    pub failure_percentage_minimum_hosts: u32,
    /// Default 50.
    pub failure_percentage_request_volume: u32,
    /// `split_external_local_origin_errors`: failures to get an answer (no connection, a reset, a timeout) are counted apart from what
    /// endpoints answer, by the `local_origin` settings. Default false: they count as gateway failures.
    pub split_local_origin: bool,
    /// `consecutive_local_origin_failure`: `None` when off; default 5. Counts with `split_local_origin` only.
    pub consecutive_local_origin_failure: Option<u32>,
    /// Default 100.
    pub enforcing_consecutive_local_origin_failure: u32,
    /// Success rate of getting an answer, with `split_local_origin`; default 100.
    pub enforcing_local_origin_success_rate: u32,
    /// Failure percentage of getting an answer, with `split_local_origin`; default 0: off.
    pub enforcing_failure_percentage_local_origin: u32,
    /// `successful_active_health_check_uneject_host`: an active health check that succeeds ends an ejection. Default true.
    pub health_check_unejects: bool,
    /// Linkerd's way to give up on an endpoint, beside or instead of the above. From code only.
    pub failure_accrual: Option<FailureAccrual>,
}

/// Consecutive failures, then single requests as probes (Linkerd's failure accrual). So many failures in a row take an endpoint out;
/// after a pause one request is let through, and its end decides: in again, or out for a longer pause. No share of the endpoints
/// is spared; when all are out, all are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FailureAccrual {
    /// Failures in a row: 5xx, the gRPC statuses that stand for one, and no answer at all. Greater than zero; Linkerd: 7.
    pub max_failures: u32,
    /// The first pause, doubled after each probe that fails. Linkerd: 1 s.
    pub min_pause: Duration,
    /// No pause is longer, but for the jitter. Linkerd: 60 s.
    pub max_pause: Duration,
    /// Each pause is up to this share of itself longer, 0..=1. Linkerd: 0.5.
    pub jitter: f64,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_time: Duration::from_secs(300),
            max_ejection_time_jitter: Duration::ZERO,
            max_ejection_percent: 10,
            always_eject_one_host: false,
            consecutive_5xx: Some(5),
            enforcing_consecutive_5xx: 100,
            consecutive_gateway_failure: Some(5),
            enforcing_consecutive_gateway_failure: 0,
            success_rate_stdev_factor: 1900,
            enforcing_success_rate: 100,
            success_rate_minimum_hosts: 5,
            success_rate_request_volume: 100,
            failure_percentage_threshold: 85,
            enforcing_failure_percentage: 0,
            failure_percentage_minimum_hosts: 5,
            failure_percentage_request_volume: 50,
            split_local_origin: false,
            consecutive_local_origin_failure: Some(5),
            enforcing_consecutive_local_origin_failure: 100,
            enforcing_local_origin_success_rate: 100,
            enforcing_failure_percentage_local_origin: 0,
            health_check_unejects: true,
            failure_accrual: None,
        }
    }
}

impl Default for FailureAccrual {
    fn default() -> Self {
        Self { max_failures: 7, min_pause: Duration::from_secs(1), max_pause: Duration::from_secs(60), jitter: 0.5 }
    }
}

impl OutlierDetection {
    /// Failure accrual and nothing else.
    pub fn accrual(accrual: FailureAccrual) -> Self {
        Self {
            consecutive_5xx: None,
            consecutive_gateway_failure: None,
            enforcing_success_rate: 0,
            enforcing_failure_percentage: 0,
            failure_accrual: Some(accrual),
            ..Self::default()
        }
    }
}
