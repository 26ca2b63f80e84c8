//! HTTP filters: their configs and their overrides (gRFC A33, A39).

use super::{Decoder, Valid, type_name};
use crate::resource::{FaultAbort, FaultConfig, FaultDelay, FilterOverride, FractionalPercent, HttpFilterConfig};
use envoy_types::pb::{
    envoy::{
        config::route::v3::FilterConfig,
        extensions::filters::{
            common::fault::v3::fault_delay::FaultDelaySecifier,
            http::fault::v3::{HttpFault, fault_abort::ErrorType},
        },
    },
    google::protobuf::{Any, Struct},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";
const FAULT: &str = "envoy.extensions.filters.http.fault.v3.HTTPFault";
const FILTER_CONFIG: &str = "envoy.config.route.v3.FilterConfig";

/// `xds.type.v3.TypedStruct` and `udpa.type.v1.TypedStruct`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TypedStruct {
    /// The type of the config.
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    /// The config as JSON.
    #[prost(message, optional, tag = "2")]
    pub(super) value: Option<Struct>,
}

/// Whether this is a TypedStruct, of either name.
pub(super) fn is_typed_struct(name: &str) -> bool {
    name == "xds.type.v3.TypedStruct" || name == "udpa.type.v1.TypedStruct"
}

impl Decoder<'_> {
    /// The inner error is the name of a filter that is not known.
    pub(super) fn filter_config(&mut self, any: &Any) -> Valid<Result<HttpFilterConfig, String>> {
        match type_name(&any.type_url) {
            ROUTER => Ok(Ok(HttpFilterConfig::Router)),
            FAULT => {
                let fault: HttpFault = self.message(&any.value)?;
                Ok(Ok(HttpFilterConfig::Fault(Arc::new(self.fault(fault)?))))
            }
            name if is_typed_struct(name) => {
                let typed: TypedStruct = self.message(&any.value)?;
                Ok(match type_name(&typed.type_url) {
                    ROUTER => Ok(HttpFilterConfig::Router),
                    name => Err(name.to_owned()),
                })
            }
            name => Ok(Err(name.to_owned())),
        }
    }

    /// `typed_per_filter_config`: keyed by filter instance name; a type that is not known is rejected unless optional.
    pub(super) fn filter_overrides(
        &mut self,
        protos: HashMap<String, Any>,
    ) -> Valid<BTreeMap<Arc<str>, FilterOverride>> {
        let mut overrides = BTreeMap::new();
        for (instance, any) in protos {
            let entry = self.at_key("typed_per_filter_config", &instance, |cx| cx.filter_override(any))?;
            if let Some(entry) = entry {
                overrides.insert(instance.into(), entry);
            }
        }
        Ok(overrides)
    }

    fn filter_override(&mut self, any: Any) -> Valid<Option<FilterOverride>> {
        let wrapper = match type_name(&any.type_url) {
            FILTER_CONFIG => self.message::<FilterConfig>(&any.value)?,
            _ => FilterConfig { config: Some(any), is_optional: false, disabled: false },
        };
        let disabled = wrapper.disabled;
        let Some(config) = wrapper.config else {
            return if disabled { Ok(Some(FilterOverride { disabled, fault: None })) } else { Ok(None) };
        };
        match self.filter_config(&config)? {
            Ok(HttpFilterConfig::Fault(fault)) => Ok(Some(FilterOverride { disabled, fault: Some(fault) })),
            Ok(HttpFilterConfig::Router) => Ok(None),
            Err(_) if disabled => Ok(Some(FilterOverride { disabled, fault: None })),
            Err(name) if wrapper.is_optional => {
                self.note("config", format!("unknown filter \"{name}\", optional, ignored"));
                Ok(None)
            }
            Err(name) => Err(self.invalid(format!("unknown filter \"{name}\" and not optional"))),
        }
    }

    /// gRFC A33.
    fn fault(&mut self, proto: HttpFault) -> Valid<FaultConfig> {
        self.ignored(&[
            ("upstream_cluster", !proto.upstream_cluster.is_empty()),
            ("downstream_nodes", !proto.downstream_nodes.is_empty()),
            ("response_rate_limit", proto.response_rate_limit.is_some()),
        ]);
        let delay = match proto.delay {
            None => None,
            Some(delay) => self.at("delay", |cx| {
                let percentage = match delay.percentage {
                    Some(percentage) => cx.fraction("percentage", percentage)?,
                    None => FractionalPercent(0),
                };
                let fixed = match delay.fault_delay_secifier {
                    Some(FaultDelaySecifier::FixedDelay(fixed)) => cx.duration("fixed_delay", Some(fixed))?,
                    Some(FaultDelaySecifier::HeaderDelay(_)) => None,
                    None => return Err(cx.invalid("has neither fixed_delay nor header_delay")),
                };
                Ok(Some(FaultDelay { fixed, percentage }))
            })?,
        };
        let abort = match proto.abort {
            None => None,
            Some(abort) => self.at("abort", |cx| {
                let percentage = match abort.percentage {
                    Some(percentage) => cx.fraction("percentage", percentage)?,
                    None => FractionalPercent(0),
                };
                match abort.error_type {
                    Some(ErrorType::HttpStatus(status @ 200..600)) => {
                        let status = u16::try_from(status).map_err(|_| cx.invalid("http_status out of range"))?;
                        Ok(Some(FaultAbort::Http { status, percentage }))
                    }
                    Some(ErrorType::HttpStatus(other)) => {
                        cx.note("http_status", format!("{other} is not in 200..600, ignored"));
                        Ok(None)
                    }
                    // gRFC A33: codes above 16 become UNKNOWN.
                    Some(ErrorType::GrpcStatus(code)) => {
                        Ok(Some(FaultAbort::Grpc { code: if code > 16 { 2 } else { code }, percentage }))
                    }
                    Some(ErrorType::HeaderAbort(_)) => Ok(Some(FaultAbort::Header { percentage })),
                    None => Err(cx.invalid("has no error type")),
                }
            })?,
        };
        Ok(FaultConfig {
            delay,
            abort,
            headers: self.header_matchers("headers", proto.headers)?,
            max_active_faults: proto.max_active_faults.map(|value| value.value),
        })
    }
}
