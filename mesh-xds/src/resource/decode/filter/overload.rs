//! Buffer, admission control, adaptive concurrency.

use crate::resource::{
    AdaptiveConcurrencyConfig, AdmissionControlConfig, BufferConfig,
    decode::{Decoder, Valid, u32_or},
};
use envoy_types::pb::envoy::{
    config::core::v3::{RuntimeFeatureFlag, RuntimePercent},
    extensions::filters::http::{
        adaptive_concurrency::v3::{
            AdaptiveConcurrency, GradientControllerConfig, adaptive_concurrency::ConcurrencyControllerConfig,
        },
        admission_control::v3::{
            AdmissionControl,
            admission_control::{EvaluationCriteria, SuccessCriteria},
        },
        buffer::v3::{Buffer, BufferPerRoute, buffer_per_route::Override},
    },
    r#type::v3::Percent,
};
use std::time::Duration;

impl Decoder<'_> {
    pub(super) fn buffer(&mut self, proto: Buffer) -> Valid<BufferConfig> {
        match u32_or(proto.max_request_bytes, 0) {
            0 => Err(self.invalid_at("max_request_bytes", "must be greater than zero")),
            max => Ok(BufferConfig { max_request_bytes: Some(max) }),
        }
    }

    pub(super) fn buffer_per_route(&mut self, proto: BufferPerRoute) -> Valid<BufferConfig> {
        match proto.r#override {
            Some(Override::Buffer(buffer)) => self.at("buffer", |cx| cx.buffer(buffer)),
            Some(Override::Disabled(true)) => Ok(BufferConfig { max_request_bytes: None }),
            Some(Override::Disabled(false)) => Err(self.invalid_at("disabled", "must be true where it is set")),
            None => Err(self.invalid("has neither disabled nor buffer")),
        }
    }

    pub(super) fn admission_control(&mut self, proto: AdmissionControl) -> Valid<AdmissionControlConfig> {
        let default = AdmissionControlConfig::default();
        let sampling_window = match self.duration("sampling_window", proto.sampling_window)? {
            None => default.sampling_window,
            Some(window) if window < Duration::from_secs(1) => {
                return Err(self.invalid_at("sampling_window", "is less than a second"));
            }
            Some(window) => Duration::from_secs(window.as_secs()),
        };
        let sr_threshold = self.runtime_percent("sr_threshold", proto.sr_threshold, default.sr_threshold)?;
        if sr_threshold < 0.01 {
            return Err(self.invalid_at("sr_threshold", "is less than 1 percent"));
        }
        let Some(EvaluationCriteria::SuccessCriteria(criteria)) = proto.evaluation_criteria else {
            return Err(self.invalid_at("success_criteria", "is missing"));
        };
        let mut config = AdmissionControlConfig {
            enabled: on(proto.enabled),
            sampling_window,
            aggression: proto.aggression.map_or(1.0, |aggression| aggression.default_value).max(1.0),
            sr_threshold,
            rps_threshold: proto.rps_threshold.map_or(0, |threshold| threshold.default_value),
            max_rejection_probability: self.runtime_percent(
                "max_rejection_probability",
                proto.max_rejection_probability,
                default.max_rejection_probability,
            )?,
            ..default
        };
        self.at("success_criteria", |cx| cx.success_criteria(&mut config, criteria))?;
        Ok(config)
    }

    fn success_criteria(&mut self, config: &mut AdmissionControlConfig, proto: SuccessCriteria) -> Valid<()> {
        if let Some(http) = proto.http_criteria {
            config.http_success =
                self.each("http_criteria.http_success_status", http.http_success_status, |cx, range| {
                    match (u16::try_from(range.start), u16::try_from(range.end)) {
                        (Ok(start @ 100..), Ok(end @ ..=600)) if start < end => Ok(start..end),
                        _ => Err(cx.invalid(format!("{}..{} is not a part of 100..600", range.start, range.end))),
                    }
                })?;
            if config.http_success.is_empty() {
                return Err(self.invalid_at("http_criteria.http_success_status", "must not be empty"));
            }
        }
        if let Some(grpc) = proto.grpc_criteria {
            let codes = self.each("grpc_criteria.grpc_success_status", grpc.grpc_success_status, |cx, code| {
                if code > 16 { Err(cx.invalid(format!("{code} is not a gRPC code"))) } else { Ok(code) }
            })?;
            if codes.is_empty() {
                return Err(self.invalid_at("grpc_criteria.grpc_success_status", "must not be empty"));
            }
            config.grpc_success = codes.into_iter().fold(0, |bits, code| bits | 1 << code);
        }
        Ok(())
    }

    pub(super) fn adaptive_concurrency(&mut self, proto: AdaptiveConcurrency) -> Valid<AdaptiveConcurrencyConfig> {
        let status = self.error_status(
            "concurrency_limit_exceeded_status",
            proto.concurrency_limit_exceeded_status,
            AdaptiveConcurrencyConfig::default().status,
        )?;
        let Some(ConcurrencyControllerConfig::GradientControllerConfig(gradient)) = proto.concurrency_controller_config
        else {
            return Err(self.invalid_at("gradient_controller_config", "is missing"));
        };
        let config = self.at("gradient_controller_config", |cx| cx.gradient(gradient))?;
        Ok(AdaptiveConcurrencyConfig { enabled: on(proto.enabled), status, ..config })
    }

    fn gradient(&mut self, proto: GradientControllerConfig) -> Valid<AdaptiveConcurrencyConfig> {
        let default = AdaptiveConcurrencyConfig::default();
        let percentile = self.part("sample_aggregate_percentile", proto.sample_aggregate_percentile, 0.5)?;
        let Some(rtt) = proto.min_rtt_calc_params else {
            return Err(self.invalid_at("min_rtt_calc_params", "is missing"));
        };
        let config = self.at("min_rtt_calc_params", |cx| {
            let fixed_min_rtt = cx.positive("fixed_value", rtt.fixed_value)?;
            let min_rtt_interval = match (cx.duration("interval", rtt.interval)?, fixed_min_rtt) {
                (Some(interval), None) if interval > Duration::ZERO => interval,
                (_, Some(_)) => default.min_rtt_interval,
                _ => return Err(cx.invalid_at("interval", "must be greater than zero, or fixed_value be set")),
            };
            Ok(AdaptiveConcurrencyConfig {
                percentile,
                min_rtt_interval,
                fixed_min_rtt,
                min_rtt_requests: cx
                    .above_zero("request_count", u32_or(rtt.request_count, default.min_rtt_requests))?,
                jitter: cx.part("jitter", rtt.jitter, default.jitter)?,
                min_concurrency: cx
                    .above_zero("min_concurrency", u32_or(rtt.min_concurrency, default.min_concurrency))?,
                buffer: cx.part("buffer", rtt.buffer, default.buffer)?,
                ..default
            })
        })?;
        let Some(limits) = proto.concurrency_limit_params else {
            return Err(self.invalid_at("concurrency_limit_params", "is missing"));
        };
        self.at("concurrency_limit_params", |cx| {
            let Some(update_interval) =
                cx.positive("concurrency_update_interval", limits.concurrency_update_interval)?
            else {
                return Err(cx.invalid_at("concurrency_update_interval", "is missing"));
            };
            let max_concurrency = u32_or(limits.max_concurrency_limit, config.max_concurrency);
            let max_concurrency = cx.above_zero("max_concurrency_limit", max_concurrency)?;
            let min_concurrency_limit = u32_or(limits.min_concurrency_limit, config.min_concurrency);
            if min_concurrency_limit > max_concurrency {
                return Err(cx.invalid_at("max_concurrency_limit", "is less than the least limit"));
            }
            Ok(AdaptiveConcurrencyConfig { update_interval, max_concurrency, min_concurrency_limit, ..config })
        })
    }

    fn above_zero(&mut self, field: &'static str, value: u32) -> Valid<u32> {
        if value == 0 { Err(self.invalid_at(field, "must be greater than zero")) } else { Ok(value) }
    }

    /// A percentage as a part of one.
    fn part(&mut self, field: &'static str, proto: Option<Percent>, default: f64) -> Valid<f64> {
        match proto.map(|percent| percent.value) {
            None => Ok(default),
            Some(percent) if (0.0..=100.0).contains(&percent) => Ok(percent / 100.0),
            Some(percent) => Err(self.invalid_at(field, format!("{percent} is not in 0..=100"))),
        }
    }

    fn runtime_percent(&mut self, field: &'static str, proto: Option<RuntimePercent>, default: f64) -> Valid<f64> {
        self.at(field, |cx| cx.part("default_value", proto.and_then(|proto| proto.default_value), default))
    }
}

/// Unset is on.
fn on(flag: Option<RuntimeFeatureFlag>) -> bool {
    flag.and_then(|flag| flag.default_value).is_none_or(|value| value.value)
}
