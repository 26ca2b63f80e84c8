//! Outlier detection (gRFC A50 and Envoy's).

use super::{Decoder, Valid, u32_or};
use crate::resource::OutlierDetection;
use envoy_types::pb::{
    envoy::config::cluster::v3::OutlierDetection as Proto,
    google::protobuf::{Duration as ProtoDuration, UInt32Value},
};
use std::time::Duration;

impl Decoder<'_> {
    /// gRFC A50: percentages up to 100, durations not negative.
    pub(super) fn outlier_detection(&mut self, proto: Proto) -> Valid<OutlierDetection> {
        self.ignored(&[
            ("monitors", !proto.monitors.is_empty()),
            ("detect_degraded_hosts", proto.detect_degraded_hosts.is_some_and(|value| value.value)),
        ]);
        let default = OutlierDetection::default();
        let counter = |value: Option<UInt32Value>, default: Option<u32>| match value {
            Some(value) => (value.value > 0).then_some(value.value),
            None => default,
        };
        let duration = |cx: &mut Self, field, value: Option<ProtoDuration>, default: Duration| {
            cx.duration(field, value).map(|value| value.unwrap_or(default))
        };
        let interval = self.positive("interval", proto.interval)?.unwrap_or(default.interval);
        let base_ejection_time =
            duration(self, "base_ejection_time", proto.base_ejection_time, default.base_ejection_time)?;
        let max_ejection_time = duration(
            self,
            "max_ejection_time",
            proto.max_ejection_time,
            default.max_ejection_time.max(base_ejection_time),
        )?;
        Ok(OutlierDetection {
            interval,
            base_ejection_time,
            max_ejection_time,
            max_ejection_time_jitter: duration(
                self,
                "max_ejection_time_jitter",
                proto.max_ejection_time_jitter,
                default.max_ejection_time_jitter,
            )?,
            always_eject_one_host: proto.always_eject_one_host.is_some_and(|value| value.value),
            max_ejection_percent: self.percent(
                "max_ejection_percent",
                proto.max_ejection_percent,
                default.max_ejection_percent,
            )?,
            consecutive_5xx: counter(proto.consecutive_5xx, default.consecutive_5xx),
            enforcing_consecutive_5xx: self.percent(
                "enforcing_consecutive_5xx",
                proto.enforcing_consecutive_5xx,
                default.enforcing_consecutive_5xx,
            )?,
            consecutive_gateway_failure: counter(
                proto.consecutive_gateway_failure,
                default.consecutive_gateway_failure,
            ),
            enforcing_consecutive_gateway_failure: self.percent(
                "enforcing_consecutive_gateway_failure",
                proto.enforcing_consecutive_gateway_failure,
                default.enforcing_consecutive_gateway_failure,
            )?,
            success_rate_stdev_factor: u32_or(proto.success_rate_stdev_factor, default.success_rate_stdev_factor),
            enforcing_success_rate: self.percent(
                "enforcing_success_rate",
                proto.enforcing_success_rate,
                default.enforcing_success_rate,
            )?,
            success_rate_minimum_hosts: u32_or(proto.success_rate_minimum_hosts, default.success_rate_minimum_hosts),
            success_rate_request_volume: u32_or(proto.success_rate_request_volume, default.success_rate_request_volume),
            failure_percentage_threshold: self.percent(
                "failure_percentage_threshold",
                proto.failure_percentage_threshold,
                default.failure_percentage_threshold,
            )?,
            enforcing_failure_percentage: self.percent(
                "enforcing_failure_percentage",
                proto.enforcing_failure_percentage,
                default.enforcing_failure_percentage,
            )?,
            failure_percentage_minimum_hosts: u32_or(
                proto.failure_percentage_minimum_hosts,
                default.failure_percentage_minimum_hosts,
            ),
            failure_percentage_request_volume: u32_or(
                proto.failure_percentage_request_volume,
                default.failure_percentage_request_volume,
            ),
            split_local_origin: proto.split_external_local_origin_errors,
            consecutive_local_origin_failure: counter(
                proto.consecutive_local_origin_failure,
                default.consecutive_local_origin_failure,
            ),
            enforcing_consecutive_local_origin_failure: self.percent(
                "enforcing_consecutive_local_origin_failure",
                proto.enforcing_consecutive_local_origin_failure,
                default.enforcing_consecutive_local_origin_failure,
            )?,
            enforcing_local_origin_success_rate: self.percent(
                "enforcing_local_origin_success_rate",
                proto.enforcing_local_origin_success_rate,
                default.enforcing_local_origin_success_rate,
            )?,
            enforcing_failure_percentage_local_origin: self.percent(
                "enforcing_failure_percentage_local_origin",
                proto.enforcing_failure_percentage_local_origin,
                default.enforcing_failure_percentage_local_origin,
            )?,
            health_check_unejects: proto.successful_active_health_check_uneject_host.is_none_or(|value| value.value),
            failure_accrual: None,
        })
    }
}
