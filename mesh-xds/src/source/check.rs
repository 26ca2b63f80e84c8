//! What a policy from code must not say. Of a control plane the same is refused where its resources are decoded.

use super::Policy;
use crate::resource::{
    Action, AdaptiveConcurrencyConfig, AdmissionControlConfig, Cluster, ClusterSpecifier, ConnectionOptions,
    ConsistentHashing, Discovery, FaultConfig, FilterOverride, Forward, HealthCheck, HttpFilterConfig, LbPolicy,
    LbSettings, LocalityLb, MAX_RING, MAX_TABLE, Maglev, OutlierDetection, RetryPolicy, RingHash, Route, Thresholds,
    TokenBucket, WeightedRoundRobin, is_prime,
};
use std::{collections::BTreeMap, fmt, ops::RangeInclusive, sync::Arc, time::Duration};

/// What a preconnect ratio may be (Envoy).
const PRECONNECT: RangeInclusive<f64> = 1.0..=3.0;

/// A policy from code that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
#[non_exhaustive]
pub struct PolicyError {
    /// Where it says so: `clusters[canary].lb_policy.table_size`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

type Checked = Result<(), PolicyError>;

impl PolicyError {
    fn new(field: &str, reason: impl fmt::Display) -> Self {
        Self { field: field.to_owned(), reason: reason.to_string() }
    }

    fn below(self, outer: impl fmt::Display) -> Self {
        Self { field: format!("{outer}.{}", self.field), ..self }
    }
}

fn above_zero(field: &str, value: impl Into<u64>) -> Checked {
    if value.into() == 0 { Err(PolicyError::new(field, "must be greater than zero")) } else { Ok(()) }
}

fn lasting(field: &str, value: Duration) -> Checked {
    if value.is_zero() { Err(PolicyError::new(field, "must be greater than zero")) } else { Ok(()) }
}

fn within(field: &str, value: f64, range: RangeInclusive<f64>) -> Checked {
    if range.contains(&value) {
        return Ok(());
    }
    Err(PolicyError::new(field, format!("{value} is not between {} and {}", range.start(), range.end())))
}

fn percent(field: &str, value: u32) -> Checked {
    if value <= 100 { Ok(()) } else { Err(PolicyError::new(field, format!("{value} is more than 100 percent"))) }
}

impl Policy {
    /// Whether it can be used: numbers within the bounds that their fields name. What refers to a cluster that is not there is no
    /// mistake here: such requests fail.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(&self) -> Checked {
        if let Some(own) = &self.cluster {
            check_cluster(own).map_err(|error| error.below("cluster"))?;
        }
        for cluster in &self.clusters {
            let place = format!("clusters[{}]", cluster.name);
            check_cluster(cluster).map_err(|error| error.below(place))?;
        }
        for (index, route) in self.routes.iter().enumerate() {
            check_route(route).map_err(|error| error.below(format!("routes[{index}]")))?;
        }
        if let Some(retry) = &self.retry {
            check_retry(retry).map_err(|error| error.below("retry"))?;
        }
        for filter in &self.filters {
            filter.config.check().map_err(|error| error.below(format!("filters[{}]", filter.name)))?;
        }
        Ok(())
    }
}

fn check_cluster(cluster: &Cluster) -> Checked {
    cluster.lb_policy.check().map_err(|error| error.below("lb_policy"))?;
    check_settings(&cluster.lb).map_err(|error| error.below("lb"))?;
    lasting("connect_timeout", cluster.connect_timeout)?;
    let breakers = &cluster.circuit_breakers;
    for (name, thresholds) in [("default", &breakers.default), ("high", &breakers.high)] {
        check_thresholds(thresholds).map_err(|error| error.below(name).below("circuit_breakers"))?;
    }
    if let Some(most) = breakers.max_connections_per_host {
        above_zero("circuit_breakers.max_connections_per_host", most)?;
    }
    if let Some(outliers) = &cluster.outlier_detection {
        outliers.check().map_err(|error| error.below("outlier_detection"))?;
    }
    if let Some(checks) = &cluster.health_check {
        check_health(checks).map_err(|error| error.below("health_check"))?;
    }
    if let Discovery::Dns(dns) = &cluster.discovery {
        lasting("discovery.refresh.every", dns.refresh.every)?;
        lasting("discovery.refresh.failure", dns.refresh.failure.0)?;
    }
    if let Some(most) = cluster.max_requests_per_connection {
        above_zero("max_requests_per_connection", most)?;
    }
    check_connections(&cluster.connections).map_err(|error| error.below("connections"))
}

impl LbPolicy {
    /// Whether a balancer can be made of it.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(&self) -> Checked {
        match self {
            Self::LeastRequest { bias: Some(bias), .. } => within("bias", *bias, 0.0..=f64::MAX),
            Self::RingHash(RingHash { min_size, max_size, hashing, .. }) => {
                if !(1..=MAX_RING).contains(max_size) {
                    return Err(PolicyError::new("max_size", format!("{max_size} is not between 1 and {MAX_RING}")));
                }
                if min_size > max_size {
                    return Err(PolicyError::new("min_size", format!("{min_size} is more than the most, {max_size}")));
                }
                check_hashing(hashing)
            }
            Self::Maglev(Maglev { table_size, hashing }) => {
                if *table_size > MAX_TABLE {
                    return Err(PolicyError::new("table_size", format!("{table_size} is more than {MAX_TABLE}")));
                }
                if !is_prime(*table_size) {
                    return Err(PolicyError::new("table_size", format!("{table_size} is not a prime")));
                }
                check_hashing(hashing)
            }
            Self::WeightedRoundRobin(weighted) => {
                let WeightedRoundRobin { update, oob_period, error_penalty, .. } = &**weighted;
                lasting("update", *update)?;
                lasting("oob_period", oob_period.unwrap_or(Duration::MAX))?;
                within("error_penalty", *error_penalty, 0.0..=f64::MAX)
            }
            Self::RandomSubsetting { subset_size, child } => {
                above_zero("subset_size", *subset_size)?;
                child.check().map_err(|error| error.below("child"))
            }
            _ => Ok(()),
        }
    }
}

fn check_hashing(hashing: &ConsistentHashing) -> Checked {
    match hashing.balance_factor {
        Some(factor @ ..100) => Err(PolicyError::new("hashing.balance_factor", format!("{factor} is below 100"))),
        _ => Ok(()),
    }
}

fn check_settings(settings: &LbSettings) -> Checked {
    within("panic_threshold", settings.panic_threshold, 0.0..=100.0)?;
    if let LocalityLb::ZoneAware { enabled, .. } = settings.localities {
        within("localities.enabled", enabled, 0.0..=100.0)?;
    }
    if let Some(slow) = &settings.slow_start {
        within("slow_start.aggression", slow.aggression, f64::MIN_POSITIVE..=f64::MAX)?;
        within("slow_start.min_weight", slow.min_weight, 0.0..=100.0)?;
    }
    Ok(())
}

fn check_thresholds(thresholds: &Thresholds) -> Checked {
    match &thresholds.retry_budget {
        Some(budget) => within("retry_budget.percent", budget.percent, 0.0..=100.0),
        None => Ok(()),
    }
}

impl OutlierDetection {
    /// Whether endpoints can be judged by it.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(&self) -> Checked {
        lasting("interval", self.interval)?;
        for (field, value) in [
            ("max_ejection_percent", self.max_ejection_percent),
            ("enforcing_consecutive_5xx", self.enforcing_consecutive_5xx),
            ("enforcing_consecutive_gateway_failure", self.enforcing_consecutive_gateway_failure),
            ("enforcing_success_rate", self.enforcing_success_rate),
            ("failure_percentage_threshold", self.failure_percentage_threshold),
            ("enforcing_failure_percentage", self.enforcing_failure_percentage),
            ("enforcing_consecutive_local_origin_failure", self.enforcing_consecutive_local_origin_failure),
            ("enforcing_local_origin_success_rate", self.enforcing_local_origin_success_rate),
            ("enforcing_failure_percentage_local_origin", self.enforcing_failure_percentage_local_origin),
        ] {
            percent(field, value)?;
        }
        let Some(accrual) = &self.failure_accrual else { return Ok(()) };
        above_zero("failure_accrual.max_failures", accrual.max_failures)?;
        lasting("failure_accrual.min_pause", accrual.min_pause)?;
        if accrual.max_pause < accrual.min_pause {
            return Err(PolicyError::new("failure_accrual.max_pause", "is below min_pause"));
        }
        within("failure_accrual.jitter", accrual.jitter, 0.0..=1.0)
    }
}

fn check_health(checks: &HealthCheck) -> Checked {
    lasting("timeout", checks.timeout)?;
    lasting("interval", checks.interval)?;
    lasting("no_traffic_interval", checks.no_traffic_interval)?;
    for (field, interval) in [
        ("no_traffic_healthy_interval", checks.no_traffic_healthy_interval),
        ("unhealthy_interval", checks.unhealthy_interval),
        ("unhealthy_edge_interval", checks.unhealthy_edge_interval),
        ("healthy_edge_interval", checks.healthy_edge_interval),
    ] {
        lasting(field, interval.unwrap_or(Duration::MAX))?;
    }
    above_zero("unhealthy_threshold", checks.unhealthy_threshold)?;
    above_zero("healthy_threshold", checks.healthy_threshold)
}

fn check_connections(connections: &ConnectionOptions) -> Checked {
    lasting("max_duration", connections.max_duration.unwrap_or(Duration::MAX))?;
    within("max_duration_jitter", connections.max_duration_jitter, 0.0..=100.0)?;
    within("preconnect_ratio", connections.preconnect_ratio, PRECONNECT)?;
    within("predictive_preconnect_ratio", connections.predictive_preconnect_ratio, PRECONNECT)?;
    if let Some(most) = connections.max_concurrent_streams {
        above_zero("max_concurrent_streams", most)?;
    }
    let Some(keepalive) = &connections.http2_keepalive else { return Ok(()) };
    lasting("http2_keepalive.interval", keepalive.interval)?;
    lasting("http2_keepalive.timeout", keepalive.timeout)?;
    within("http2_keepalive.jitter", keepalive.jitter, 0.0..=100.0)
}

fn check_route(route: &Route) -> Checked {
    check_overrides(&route.filter_overrides)?;
    let Action::Forward(forward) = &route.action else { return Ok(()) };
    let Forward { cluster, retry_policy, .. } = &**forward;
    if let ClusterSpecifier::Weighted(parts) = cluster {
        let total: u64 = parts.iter().map(|part| u64::from(part.weight)).sum();
        if total == 0 || total > u64::from(u32::MAX) {
            let reason = format!("the weights add up to {total}, which is not between 1 and {}", u32::MAX);
            return Err(PolicyError::new("cluster", reason));
        }
        for part in parts {
            check_overrides(&part.filter_overrides).map_err(|error| error.below(format!("cluster[{}]", part.name)))?;
        }
    }
    match retry_policy {
        Some(retry) => check_retry(retry).map_err(|error| error.below("retry_policy")),
        None => Ok(()),
    }
}

fn check_overrides(overrides: &BTreeMap<Arc<str>, FilterOverride>) -> Checked {
    for (name, own) in overrides {
        if let Some(config) = &own.config {
            config.check().map_err(|error| error.below(format!("filter_overrides[{name}]")))?;
        }
    }
    Ok(())
}

fn check_retry(retry: &RetryPolicy) -> Checked {
    lasting("back_off.base", retry.back_off.base)?;
    if retry.back_off.max < retry.back_off.base {
        return Err(PolicyError::new("back_off.max", "is below base"));
    }
    Ok(())
}

impl HttpFilterConfig {
    /// Whether a filter can be made of it.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(&self) -> Checked {
        match self {
            Self::Fault(fault) => check_fault(fault),
            Self::AdmissionControl(control) => check_admission(control),
            Self::AdaptiveConcurrency(concurrency) => check_concurrency(concurrency),
            Self::LocalRateLimit(limit) => {
                for bucket in limit.bucket.iter().chain(limit.descriptors.iter().map(|descriptor| &descriptor.bucket)) {
                    check_bucket(bucket)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn check_fault(fault: &FaultConfig) -> Checked {
    match fault.response_rate_limit.as_ref().and_then(|limit| limit.kbps) {
        Some(kbps) => above_zero("response_rate_limit.kbps", kbps),
        None => Ok(()),
    }
}

fn check_bucket(bucket: &TokenBucket) -> Checked {
    above_zero("bucket.max_tokens", bucket.max_tokens)?;
    above_zero("bucket.tokens_per_fill", bucket.tokens_per_fill)?;
    lasting("bucket.fill_interval", bucket.fill_interval)
}

fn check_admission(control: &AdmissionControlConfig) -> Checked {
    if control.sampling_window < Duration::from_secs(1) {
        return Err(PolicyError::new("sampling_window", "is less than a second"));
    }
    within("aggression", control.aggression, 1.0..=f64::MAX)?;
    within("sr_threshold", control.sr_threshold, 0.01..=1.0)?;
    within("max_rejection_probability", control.max_rejection_probability, 0.0..=1.0)
}

fn check_concurrency(concurrency: &AdaptiveConcurrencyConfig) -> Checked {
    let AdaptiveConcurrencyConfig { min_concurrency_limit: least, max_concurrency: most, .. } = concurrency;
    if least > most {
        return Err(PolicyError::new("min_concurrency_limit", format!("{least} is more than the most, {most}")));
    }
    above_zero("max_concurrency", *most)?;
    lasting("update_interval", concurrency.update_interval)?;
    above_zero("min_rtt_requests", concurrency.min_rtt_requests)?;
    above_zero("min_concurrency", concurrency.min_concurrency)?;
    within("percentile", concurrency.percentile, 0.0..=1.0)?;
    within("jitter", concurrency.jitter, 0.0..=1.0)?;
    within("buffer", concurrency.buffer, 0.0..=f64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::{
        Denominator, FailureAccrual, FaultRateLimit, FractionalPercent, HttpFilter, LocalRateLimitConfig, SlowStart,
    };

    #[test]
    fn what_cannot_be_is_found_with_its_field() {
        let cluster = |edit: fn(&mut Cluster)| {
            let mut cluster = Cluster::fixed("c", Arc::default());
            edit(&mut cluster);
            Policy::default().with_cluster(cluster)
        };
        let filter = |config| Policy::default().with_filter(HttpFilter::new("f", config));
        let wrong = [
            (cluster(|c| c.lb_policy = LbPolicy::Maglev(Maglev { table_size: 0, ..Maglev::default() })), "table_size"),
            (
                cluster(|c| c.lb_policy = LbPolicy::Maglev(Maglev { table_size: 1000, ..Maglev::default() })),
                "table_size",
            ),
            (
                cluster(|c| c.lb_policy = LbPolicy::RingHash(RingHash { max_size: 0, ..RingHash::default() })),
                "max_size",
            ),
            (
                cluster(|c| {
                    let child = LbPolicy::WeightedRoundRobin(Arc::new(WeightedRoundRobin {
                        update: Duration::ZERO,
                        ..WeightedRoundRobin::default()
                    }));
                    c.lb_policy = LbPolicy::RandomSubsetting { subset_size: 1, child: Arc::new(child) };
                }),
                "child.update",
            ),
            (cluster(|c| c.lb.panic_threshold = f64::NAN), "panic_threshold"),
            (
                cluster(|c| {
                    let window = Duration::from_secs(1);
                    c.lb.slow_start = Some(SlowStart { window, aggression: 0.0, min_weight: 10.0 });
                }),
                "slow_start.aggression",
            ),
            (cluster(|c| c.connect_timeout = Duration::ZERO), "connect_timeout"),
            (
                cluster(|c| {
                    let outliers = OutlierDetection { max_ejection_percent: 101, ..OutlierDetection::default() };
                    c.outlier_detection = Some(Arc::new(outliers));
                }),
                "max_ejection_percent",
            ),
            (
                cluster(|c| {
                    let accrual = FailureAccrual { jitter: -1.0, ..FailureAccrual::default() };
                    let outliers = OutlierDetection { failure_accrual: Some(accrual), ..OutlierDetection::default() };
                    c.outlier_detection = Some(Arc::new(outliers));
                }),
                "failure_accrual.jitter",
            ),
            (cluster(|c| c.connections.preconnect_ratio = 4.0), "preconnect_ratio"),
        ];
        for (policy, field) in wrong {
            let error = policy.check().unwrap_err();
            assert!(error.field.starts_with("clusters[c].") && error.field.ends_with(field), "{error}");
        }
        let limit = FaultRateLimit {
            kbps: Some(0),
            percentage: FractionalPercent(1_000_000),
            denominator: Denominator::default(),
        };
        let concurrency = AdaptiveConcurrencyConfig { min_concurrency_limit: 2000, ..Default::default() };
        let bucket = TokenBucket { max_tokens: 0, tokens_per_fill: 1, fill_interval: Duration::from_secs(1) };
        let wrong = [
            (
                HttpFilterConfig::Fault(Arc::new(FaultConfig {
                    response_rate_limit: Some(limit),
                    ..FaultConfig::default()
                })),
                "kbps",
            ),
            (HttpFilterConfig::AdaptiveConcurrency(Arc::new(concurrency)), "min_concurrency_limit"),
            (
                HttpFilterConfig::AdmissionControl(Arc::new(AdmissionControlConfig {
                    sr_threshold: 95.0,
                    ..AdmissionControlConfig::default()
                })),
                "sr_threshold",
            ),
            (HttpFilterConfig::LocalRateLimit(Arc::new(LocalRateLimitConfig::of(bucket))), "max_tokens"),
        ];
        for (config, field) in wrong {
            let error = filter(config).check().unwrap_err();
            assert!(error.field.starts_with("filters[f].") && error.field.ends_with(field), "{error}");
        }
        assert_eq!(cluster(|_| {}).check(), Ok(()));
    }
}
