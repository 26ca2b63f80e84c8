//! Rate limits of routes, token buckets, and the local rate limit filter.

use super::Level;
use crate::resource::{
    FractionalPercent, HeaderField, HeaderOps, LocalDescriptor, LocalRateLimitConfig, RateLimit, RateLimitAction,
    TokenBucket, VirtualHostLimits,
    decode::{Decoder, Valid, u32_or},
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{HeaderValueOption, RuntimeFractionalPercent},
            route::v3::{
                RateLimit as Proto,
                rate_limit::{
                    Action,
                    action::{ActionSpecifier, meta_data},
                },
            },
        },
        extensions::{
            common::ratelimit::v3::{LocalRateLimitDescriptor, VhRateLimitsOptions},
            filters::http::local_ratelimit::v3::LocalRateLimit,
        },
        r#type::v3::TokenBucket as ProtoBucket,
    },
    google::protobuf::{BoolValue, UInt32Value},
};
use std::time::Duration;

impl Decoder<'_> {
    /// `rate_limits` of a route, a virtual host or a filter.
    pub(in crate::resource::decode) fn rate_limits(&mut self, protos: Vec<Proto>) -> Valid<Vec<RateLimit>> {
        self.each("rate_limits", protos, Self::rate_limit)
    }

    fn rate_limit(&mut self, proto: Proto) -> Valid<RateLimit> {
        self.ignored(&[
            ("disable_key", !proto.disable_key.is_empty()),
            ("limit", proto.limit.is_some()),
            ("apply_on_stream_done", proto.apply_on_stream_done),
            ("x_ratelimit_option", proto.x_ratelimit_option != 0),
        ]);
        let stage = self.stage(u32_or(proto.stage, 0))?;
        let hits_addend = match proto.hits_addend {
            None => None,
            Some(addend) => self.at("hits_addend", |cx| {
                cx.ignored(&[("format", !addend.format.is_empty())]);
                Ok(addend.number.map(|number| number.value))
            })?,
        };
        if proto.actions.is_empty() {
            return Err(self.invalid_at("actions", "must not be empty"));
        }
        Ok(RateLimit { stage, actions: self.each("actions", proto.actions, Self::rate_limit_action)?, hits_addend })
    }

    pub(super) fn stage(&mut self, stage: u32) -> Valid<u32> {
        if stage > 10 {
            return Err(self.invalid_at("stage", format!("{stage} is not in 0..=10")));
        }
        Ok(stage)
    }

    fn rate_limit_action(&mut self, proto: Action) -> Valid<RateLimitAction> {
        let unknowable = |cx: &mut Self, field: &'static str, reason: &str| {
            cx.note(field, format!("{reason}: not supported, the descriptor is never made"));
            Ok(RateLimitAction::Unknowable)
        };
        let key = |given: String, default: &str| if given.is_empty() { default.into() } else { given.into() };
        Ok(match proto.action_specifier {
            Some(ActionSpecifier::DestinationCluster(_)) => RateLimitAction::DestinationCluster,
            Some(ActionSpecifier::RequestHeaders(of)) => self.at("request_headers", |cx| {
                let header = cx.header_field("header_name", &of.header_name)?;
                let key = cx.filled("descriptor_key", of.descriptor_key)?.into();
                Ok(RateLimitAction::RequestHeader { header, key, skip_if_absent: of.skip_if_absent })
            })?,
            Some(ActionSpecifier::QueryParameters(of)) => self.at("query_parameters", |cx| {
                let name = cx.filled("query_parameter_name", of.query_parameter_name)?;
                let key = cx.filled("descriptor_key", of.descriptor_key)?.into();
                Ok(RateLimitAction::QueryParameter { name, key, skip_if_absent: of.skip_if_absent })
            })?,
            Some(ActionSpecifier::GenericKey(of)) => self.at("generic_key", |cx| {
                let value = cx.filled("descriptor_value", of.descriptor_value)?.into();
                Ok(RateLimitAction::GenericKey { key: key(of.descriptor_key, "generic_key"), value })
            })?,
            Some(ActionSpecifier::HeaderValueMatch(of)) => self.at("header_value_match", |cx| {
                Ok(RateLimitAction::HeaderValueMatch {
                    key: key(of.descriptor_key, "header_match"),
                    value: cx.filled("descriptor_value", of.descriptor_value)?.into(),
                    expect: of.expect_match.is_none_or(|expect| expect.value),
                    headers: cx.header_matchers("headers", of.headers)?,
                })
            })?,
            Some(ActionSpecifier::QueryParameterValueMatch(of)) => self.at("query_parameter_value_match", |cx| {
                Ok(RateLimitAction::QueryParameterValueMatch {
                    key: key(of.descriptor_key, "query_match"),
                    value: cx.filled("descriptor_value", of.descriptor_value)?.into(),
                    expect: of.expect_match.is_none_or(|expect| expect.value),
                    parameters: cx.each("query_parameters", of.query_parameters, Self::query_parameter)?,
                })
            })?,
            // What is not known has its default, as in Envoy.
            Some(ActionSpecifier::DynamicMetadata(of)) if !of.default_value.is_empty() => {
                RateLimitAction::GenericKey { key: of.descriptor_key.into(), value: of.default_value.into() }
            }
            Some(ActionSpecifier::Metadata(of))
                if !of.default_value.is_empty() && of.source() == meta_data::Source::Dynamic =>
            {
                RateLimitAction::GenericKey { key: of.descriptor_key.into(), value: of.default_value.into() }
            }
            Some(ActionSpecifier::SourceCluster(_)) => {
                return unknowable(self, "source_cluster", "a filter does not know the bootstrap's node");
            }
            Some(ActionSpecifier::RemoteAddress(_)) if self.server => RateLimitAction::RemoteAddress,
            Some(ActionSpecifier::MaskedRemoteAddress(of)) if self.server => {
                let bits = |value: Option<UInt32Value>, most: u8| {
                    value.map_or(most, |value| u8::try_from(value.value).unwrap_or(most).min(most))
                };
                RateLimitAction::MaskedRemoteAddress {
                    v4: bits(of.v4_prefix_mask_len, 32),
                    v6: bits(of.v6_prefix_mask_len, 128),
                }
            }
            Some(ActionSpecifier::RemoteAddress(_)) => {
                return unknowable(self, "remote_address", "a client has no downstream address");
            }
            Some(ActionSpecifier::MaskedRemoteAddress(_)) => {
                return unknowable(self, "masked_remote_address", "a client has no downstream address");
            }
            Some(ActionSpecifier::DynamicMetadata(_) | ActionSpecifier::Metadata(_)) => {
                return unknowable(self, "metadata", "a client has no such metadata");
            }
            Some(_) => return unknowable(self, "action_specifier", "the action is not known"),
            // One newer than this client, as far as can be told.
            None => return unknowable(self, "action_specifier", "there is none that is known"),
        })
    }

    fn header_field(&mut self, field: &'static str, name: &str) -> Valid<HeaderField> {
        Ok(match name {
            ":method" => HeaderField::Method,
            ":path" => HeaderField::Path,
            ":authority" | "host" => HeaderField::Authority,
            ":scheme" => HeaderField::Scheme,
            name => HeaderField::Name(self.header_name(field, name)?),
        })
    }

    fn token_bucket(&mut self, proto: ProtoBucket) -> Valid<TokenBucket> {
        if proto.max_tokens == 0 {
            return Err(self.invalid_at("max_tokens", "must be greater than zero"));
        }
        let tokens_per_fill = match u32_or(proto.tokens_per_fill, 1) {
            0 => return Err(self.invalid_at("tokens_per_fill", "must be greater than zero")),
            tokens => tokens,
        };
        let Some(fill_interval) = self.duration("fill_interval", proto.fill_interval)? else {
            return Err(self.invalid_at("fill_interval", "is missing"));
        };
        if fill_interval < Duration::from_millis(50) {
            return Err(self.invalid_at("fill_interval", format!("{fill_interval:?} is less than 50 ms")));
        }
        Ok(TokenBucket { max_tokens: proto.max_tokens, tokens_per_fill, fill_interval })
    }

    /// `default_value` of a runtime fraction; unset is none.
    pub(super) fn runtime_fraction(
        &mut self,
        field: &'static str,
        proto: Option<RuntimeFractionalPercent>,
        default: FractionalPercent,
    ) -> Valid<FractionalPercent> {
        match proto.and_then(|proto| proto.default_value) {
            Some(fraction) => self.at(field, |cx| cx.fraction("default_value", fraction)),
            None => Ok(default),
        }
    }

    pub(super) fn added_headers(&mut self, field: &'static str, protos: Vec<HeaderValueOption>) -> Valid<HeaderOps> {
        Ok(HeaderOps { add: self.each(field, protos, Self::header_add)?, ..HeaderOps::default() })
    }

    /// Envoy: a status below 400 counts as the default.
    pub(super) fn error_status(
        &mut self,
        field: &'static str,
        proto: Option<envoy_types::pb::envoy::r#type::v3::HttpStatus>,
        default: u16,
    ) -> Valid<u16> {
        match proto.map(|status| u16::try_from(status.code)) {
            None => Ok(default),
            Some(Ok(status @ 400..=599)) => Ok(status),
            Some(Ok(100..400)) => Ok(default),
            _ => Err(self.invalid_at(field, "is not an HTTP status")),
        }
    }

    pub(super) fn virtual_host_limits(&mut self, field: &'static str, value: i32) -> Valid<VirtualHostLimits> {
        match VhRateLimitsOptions::try_from(value) {
            Ok(VhRateLimitsOptions::Override) => Ok(VirtualHostLimits::Override),
            Ok(VhRateLimitsOptions::Include) => Ok(VirtualHostLimits::Include),
            Ok(VhRateLimitsOptions::Ignore) => Ok(VirtualHostLimits::Ignore),
            Err(_) => Err(self.invalid_at(field, format!("unknown option {value}"))),
        }
    }

    pub(super) fn local_rate_limit(&mut self, proto: LocalRateLimit, level: Level) -> Valid<LocalRateLimitConfig> {
        self.ignored(&[
            ("local_rate_limit_per_downstream_connection", proto.local_rate_limit_per_downstream_connection),
            ("local_cluster_rate_limit", proto.local_cluster_rate_limit.is_some()),
        ]);
        let bucket = match proto.token_bucket {
            Some(bucket) => Some(self.at("token_bucket", |cx| cx.token_bucket(bucket))?),
            None if level == Level::Route => {
                return Err(self.invalid_at("token_bucket", "is missing: the config of a route needs one"));
            }
            None => None,
        };
        let none = FractionalPercent(0);
        let max_dynamic = match u32_or(proto.max_dynamic_descriptors, 20) {
            0 => return Err(self.invalid_at("max_dynamic_descriptors", "must be at least 1")),
            max => max as usize,
        };
        Ok(LocalRateLimitConfig {
            status: self.error_status("status", proto.status, 429)?,
            bucket,
            enabled: self.runtime_fraction("filter_enabled", proto.filter_enabled, none)?,
            enforced: self.runtime_fraction("filter_enforced", proto.filter_enforced, none)?,
            request_edits: self.added_headers(
                "request_headers_to_add_when_not_enforced",
                proto.request_headers_to_add_when_not_enforced,
            )?,
            response_edits: self.added_headers("response_headers_to_add", proto.response_headers_to_add)?,
            descriptors: self.each("descriptors", proto.descriptors, Self::local_descriptor)?,
            stage: self.stage(proto.stage)?,
            rate_limits: self.rate_limits(proto.rate_limits)?,
            virtual_host: self.virtual_host_limits("vh_rate_limits", proto.vh_rate_limits)?,
            always_consume_default: proto.always_consume_default_token_bucket.is_none_or(|BoolValue { value }| value),
            x_headers: proto.enable_x_ratelimit_headers == 1,
            retry_after: proto.enable_retry_after_header,
            resource_exhausted: proto.rate_limited_as_resource_exhausted,
            max_dynamic,
        })
    }

    fn local_descriptor(&mut self, proto: LocalRateLimitDescriptor) -> Valid<LocalDescriptor> {
        if proto.entries.is_empty() {
            return Err(self.invalid_at("entries", "must not be empty"));
        }
        let Some(bucket) = proto.token_bucket else { return Err(self.invalid_at("token_bucket", "is missing")) };
        let bucket = self.at("token_bucket", |cx| cx.token_bucket(bucket))?;
        let entries = self.each("entries", proto.entries, |cx, entry| {
            Ok((cx.filled("key", entry.key)?.into(), entry.value.into()))
        })?;
        Ok(LocalDescriptor { entries, bucket, shadow: proto.shadow_mode })
    }
}
