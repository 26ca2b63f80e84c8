//! Retry policies (gRFC A44 and Envoy's conditions).

use super::{Decoder, Valid, type_name, u32_or};
use crate::resource::{BackOff, RetryOn, RetryPolicy};
use envoy_types::pb::envoy::config::route::v3::{
    RetryPolicy as Proto,
    retry_policy::{RetryBackOff, retry_host_predicate::ConfigType},
};
use std::{sync::Arc, time::Duration};

const PREVIOUS_HOSTS: &str = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate";

impl Decoder<'_> {
    /// A policy without a known condition retries nothing, but still hides the virtual host's (as in grpc-go).
    pub(super) fn retry_policy(&mut self, proto: Proto) -> Valid<Arc<RetryPolicy>> {
        let num_retries = u32_or(proto.num_retries, 1);
        if num_retries == 0 {
            return Err(self.invalid_at("num_retries", "must be at least 1 (gRFC A44)"));
        }
        let back_off = match proto.retry_back_off {
            None => BackOff::default(),
            Some(back_off) => self.at("retry_back_off", |cx| cx.back_off(back_off))?,
        };
        let mut avoid_previous_hosts = false;
        for predicate in &proto.retry_host_predicate {
            let by_type = match &predicate.config_type {
                Some(ConfigType::TypedConfig(any)) => type_name(&any.type_url) == PREVIOUS_HOSTS,
                None => false,
            };
            if by_type || predicate.name == "envoy.retry_host_predicates.previous_hosts" {
                avoid_previous_hosts = true;
            } else {
                self.note("retry_host_predicate", format!("unknown predicate \"{}\", ignored", predicate.name));
            }
        }
        self.ignored(&[
            ("retry_priority", proto.retry_priority.is_some()),
            ("retry_options_predicates", !proto.retry_options_predicates.is_empty()),
            ("rate_limited_retry_back_off", proto.rate_limited_retry_back_off.is_some()),
            ("retriable_headers", !proto.retriable_headers.is_empty()),
            ("retriable_request_headers", !proto.retriable_request_headers.is_empty()),
        ]);
        let per_try_timeout =
            self.duration("per_try_timeout", proto.per_try_timeout)?.filter(|timeout| !timeout.is_zero());
        let per_try_idle_timeout =
            self.duration("per_try_idle_timeout", proto.per_try_idle_timeout)?.filter(|timeout| !timeout.is_zero());
        let on = self.retry_on(&proto.retry_on, &proto.retriable_status_codes);
        Ok(Arc::new(RetryPolicy {
            on,
            num_retries,
            per_try_timeout,
            per_try_idle_timeout,
            back_off,
            avoid_previous_hosts,
        }))
    }

    fn back_off(&mut self, proto: RetryBackOff) -> Valid<BackOff> {
        let Some(base) = self.positive("base_interval", proto.base_interval)? else {
            return Err(self.invalid_at("base_interval", "is missing"));
        };
        let max = self.positive("max_interval", proto.max_interval)?;
        if max.is_some_and(|max| max < base) {
            return Err(self.invalid_at("max_interval", "is below base_interval"));
        }
        let base = base.max(Duration::from_millis(1));
        let max = max.unwrap_or_else(|| base.saturating_mul(10)).max(base);
        Ok(BackOff { base, max })
    }

    fn retry_on(&mut self, words: &str, codes: &[u32]) -> RetryOn {
        let mut on = RetryOn::default();
        for word in words.split(',').map(|word| word.trim().to_ascii_lowercase()).filter(|word| !word.is_empty()) {
            match word.as_str() {
                "cancelled" => on.grpc_codes |= 1 << 1,
                "deadline-exceeded" => on.grpc_codes |= 1 << 4,
                "resource-exhausted" => on.grpc_codes |= 1 << 8,
                "internal" => on.grpc_codes |= 1 << 13,
                "unavailable" => on.grpc_codes |= 1 << 14,
                "5xx" => on.http_5xx = true,
                "gateway-error" => on.gateway_error = true,
                "reset" => on.reset = true,
                "reset-before-request" => on.reset_before_request = true,
                "connect-failure" => on.connect_failure = true,
                "refused-stream" => on.refused_stream = true,
                "retriable-4xx" => on.retriable_4xx = true,
                "retriable-status-codes" => {
                    for code in codes {
                        match u16::try_from(*code) {
                            Ok(code @ 100..600) => on.statuses.push(code),
                            _ => self.note("retriable_status_codes", format!("{code} is no HTTP status, ignored")),
                        }
                    }
                }
                // Istio writes status codes among the words.
                other => match other.parse::<u16>() {
                    Ok(code @ 100..600) => on.statuses.push(code),
                    _ => self.note("retry_on", format!("unknown condition \"{other}\", ignored")),
                },
            }
        }
        on.statuses.sort_unstable();
        on.statuses.dedup();
        on
    }
}
