//! Retry policies (gRFC A44 and Envoy's conditions).

use super::{Decoder, Valid, endpoint::metadata_values, type_name, u32_or};
use crate::resource::{BackOff, OmitHosts, ResetFormat, ResetHeader, RetryOn, RetryPolicy};
use envoy_types::pb::envoy::{
    config::route::v3::{
        RetryPolicy as Proto,
        retry_policy::{
            RateLimitedRetryBackOff, ResetHeaderFormat, RetryBackOff, RetryHostPredicate, RetryPriority,
            retry_host_predicate::ConfigType, retry_priority::ConfigType as PriorityType,
        },
    },
    extensions::retry::{
        host::omit_host_metadata::v3::OmitHostMetadataConfig,
        priority::previous_priorities::v3::PreviousPrioritiesConfig,
    },
};
use prost::Name as _;
use std::{sync::Arc, time::Duration};

const PREVIOUS_HOSTS: &str = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate";
const OMIT_CANARY: &str = "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate";
const OMIT_METADATA: &str = "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig";

/// Envoy's `rate_limited_retry_back_off.max_interval` when unset.
const DEFAULT_MAX_RESET: Duration = Duration::from_secs(300);

/// What a `retry_host_predicate` asks for.
enum Predicate {
    PreviousHosts,
    Omit(OmitHosts),
}

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
        let mut omit_hosts = Vec::new();
        for (index, predicate) in proto.retry_host_predicate.iter().enumerate() {
            match self.at_index("retry_host_predicate", index, |cx| cx.host_predicate(predicate))? {
                Some(Predicate::PreviousHosts) => avoid_previous_hosts = true,
                Some(Predicate::Omit(hosts)) => omit_hosts.push(hosts),
                None => {
                    self.note("retry_host_predicate", format!("unknown predicate \"{}\", ignored", predicate.name));
                }
            }
        }
        let leave_priorities = match &proto.retry_priority {
            Some(priority) => self.at("retry_priority", |cx| cx.retry_priority(priority))?,
            None => 0,
        };
        self.ignored(&[
            ("retry_options_predicates", !proto.retry_options_predicates.is_empty()),
            ("refresh_cluster_on_retry", proto.refresh_cluster_on_retry),
        ]);
        let (reset_headers, max_reset) = match proto.rate_limited_retry_back_off {
            Some(back_off) => self.at("rate_limited_retry_back_off", |cx| cx.reset_headers(&back_off))?,
            None => (Vec::new(), DEFAULT_MAX_RESET),
        };
        let listed = words(&proto.retry_on).any(|word| word == "retriable-headers");
        let retriable_headers = if listed { proto.retriable_headers } else { Vec::new() };
        let retriable_headers = self.header_matchers("retriable_headers", retriable_headers)?;
        let retriable_request_headers =
            self.header_matchers("retriable_request_headers", proto.retriable_request_headers)?;
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
            omit_hosts,
            leave_priorities,
            retriable_headers,
            retriable_request_headers,
            reset_headers,
            max_reset,
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

    /// `None`: it is not known.
    fn host_predicate(&mut self, proto: &RetryHostPredicate) -> Valid<Option<Predicate>> {
        let any = proto.config_type.as_ref().map(|ConfigType::TypedConfig(any)| any);
        let of_type = any.map(|any| type_name(&any.type_url)).unwrap_or_default();
        let name = proto.name.strip_prefix("envoy.retry_host_predicates.").unwrap_or_default();
        Ok(match (of_type, name) {
            (PREVIOUS_HOSTS, _) | (_, "previous_hosts") => Some(Predicate::PreviousHosts),
            (OMIT_CANARY, _) | (_, "omit_canary_hosts") => Some(Predicate::Omit(OmitHosts::Canary)),
            (OMIT_METADATA, _) | (_, "omit_host_metadata") => {
                let config: OmitHostMetadataConfig = match any {
                    Some(any) => self.at("typed_config", |cx| cx.any(any))?,
                    None => OmitHostMetadataConfig::default(),
                };
                let fields = config.metadata_match.and_then(|mut metadata| metadata.filter_metadata.remove("envoy.lb"));
                let fields = fields.map(|fields| metadata_values(fields.fields)).unwrap_or_default();
                Some(Predicate::Omit(OmitHosts::Metadata(fields)))
            }
            _ => None,
        })
    }

    /// The attempts after which their priorities are left.
    fn retry_priority(&mut self, proto: &RetryPriority) -> Valid<u32> {
        match &proto.config_type {
            Some(PriorityType::TypedConfig(any))
                if type_name(&any.type_url) == PreviousPrioritiesConfig::full_name() =>
            {
                let config: PreviousPrioritiesConfig = self.at("typed_config", |cx| cx.any(any))?;
                match u32::try_from(config.update_frequency) {
                    Ok(frequency) if frequency > 0 => Ok(frequency),
                    _ => Err(self.invalid_at("typed_config.update_frequency", "must be greater than zero")),
                }
            }
            _ => {
                self.note("name", format!("unknown retry priority \"{}\", ignored", proto.name));
                Ok(0)
            }
        }
    }

    fn reset_headers(&mut self, proto: &RateLimitedRetryBackOff) -> Valid<(Vec<ResetHeader>, Duration)> {
        if proto.reset_headers.is_empty() {
            return Err(self.invalid_at("reset_headers", "must not be empty"));
        }
        let headers = proto.reset_headers.iter().enumerate().map(|(index, header)| {
            self.at_index("reset_headers", index, |cx| {
                let format = match ResetHeaderFormat::try_from(header.format) {
                    Ok(ResetHeaderFormat::Seconds) => ResetFormat::Seconds,
                    Ok(ResetHeaderFormat::UnixTimestamp) => ResetFormat::UnixTime,
                    Err(_) => return Err(cx.invalid_at("format", format!("unknown format {}", header.format))),
                };
                Ok(ResetHeader { name: cx.header_name("name", &header.name)?, format })
            })
        });
        let headers = headers.collect::<Valid<_>>()?;
        let max = self.positive("max_interval", proto.max_interval)?.unwrap_or(DEFAULT_MAX_RESET);
        Ok((headers, max))
    }

    fn retry_on(&mut self, text: &str, codes: &[u32]) -> RetryOn {
        let mut on = RetryOn::default();
        for word in words(text) {
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
                "envoy-ratelimited" => on.rate_limited = true,
                // Its matchers say what is retried.
                "retriable-headers" => {}
                "http3-post-connect-failure" => {
                    self.note("retry_on", "http3-post-connect-failure: HTTP/3 is not spoken here, ignored");
                }
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

/// The conditions of a `retry_on`.
fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(',').map(|word| word.trim().to_ascii_lowercase()).filter(|word| !word.is_empty())
}
