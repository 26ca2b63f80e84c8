//! HTTP filters: their configs and their overrides (gRFC A39).

mod fault;
mod global_rate_limit;
mod header_mutation;
mod jwt;
mod overload;
mod rate_limit;
mod rbac;
mod session;

use super::{Decoder, Invalid, Valid, type_name};
use crate::resource::{CustomFilter, FilterOverride, FilterPayload, HttpFilterConfig};
use envoy_types::pb::{
    envoy::{
        config::route::v3::FilterConfig,
        extensions::filters::http::header_mutation::v3::{HeaderMutation, HeaderMutationPerRoute},
    },
    google::protobuf::{Any, Struct, Value, value::Kind},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";
const FAULT: &str = "envoy.extensions.filters.http.fault.v3.HTTPFault";
const HEADER_MUTATION: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";
const HEADER_MUTATION_PER_ROUTE: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute";
const LOCAL_RATE_LIMIT: &str = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";
const BUFFER: &str = "envoy.extensions.filters.http.buffer.v3.Buffer";
const BUFFER_PER_ROUTE: &str = "envoy.extensions.filters.http.buffer.v3.BufferPerRoute";
const ADMISSION_CONTROL: &str = "envoy.extensions.filters.http.admission_control.v3.AdmissionControl";
const ADAPTIVE_CONCURRENCY: &str = "envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency";
const SESSION: &str = "envoy.extensions.filters.http.stateful_session.v3.StatefulSession";
const SESSION_PER_ROUTE: &str = "envoy.extensions.filters.http.stateful_session.v3.StatefulSessionPerRoute";
const RATE_LIMIT: &str = "envoy.extensions.filters.http.ratelimit.v3.RateLimit";
const RATE_LIMIT_PER_ROUTE: &str = "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute";
const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
const RBAC_PER_ROUTE: &str = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute";
const JWT: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
const JWT_PER_ROUTE: &str = "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig";
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

/// Where a filter's config stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// In the filter chain.
    Chain,
    /// In a `typed_per_filter_config`.
    Route,
}

impl Decoder<'_> {
    /// The inner error is the name of a filter that is not known.
    pub(super) fn filter_config(&mut self, any: &Any, level: Level) -> Valid<Result<HttpFilterConfig, String>> {
        let name = type_name(&any.type_url);
        Ok(Ok(match (name, level) {
            (ROUTER, _) => HttpFilterConfig::Router,
            (FAULT, _) => {
                let fault = self.message(&any.value)?;
                HttpFilterConfig::Fault(Arc::new(self.fault(fault)?))
            }
            (HEADER_MUTATION, Level::Chain) => {
                let proto: HeaderMutation = self.message(&any.value)?;
                let config = self.mutations(proto.mutations, proto.most_specific_header_mutations_wins)?;
                HttpFilterConfig::HeaderMutation(Arc::new(config))
            }
            (HEADER_MUTATION_PER_ROUTE, Level::Route) => {
                let proto: HeaderMutationPerRoute = self.message(&any.value)?;
                HttpFilterConfig::HeaderMutation(Arc::new(self.mutations(proto.mutations, false)?))
            }
            (HEADER_MUTATION | HEADER_MUTATION_PER_ROUTE, _) => return Err(self.misplaced(name)),
            (LOCAL_RATE_LIMIT, level) => {
                let limit = self.message(&any.value)?;
                HttpFilterConfig::LocalRateLimit(Arc::new(self.local_rate_limit(limit, level)?))
            }
            (BUFFER, Level::Chain) => {
                let buffer = self.message(&any.value)?;
                HttpFilterConfig::Buffer(self.buffer(buffer)?)
            }
            (BUFFER_PER_ROUTE, Level::Route) => {
                let buffer = self.message(&any.value)?;
                HttpFilterConfig::Buffer(self.buffer_per_route(buffer)?)
            }
            (BUFFER | BUFFER_PER_ROUTE, _) => return Err(self.misplaced(name)),
            (ADMISSION_CONTROL, _) => {
                let control = self.message(&any.value)?;
                HttpFilterConfig::AdmissionControl(Arc::new(self.admission_control(control)?))
            }
            (ADAPTIVE_CONCURRENCY, _) => {
                let concurrency = self.message(&any.value)?;
                HttpFilterConfig::AdaptiveConcurrency(Arc::new(self.adaptive_concurrency(concurrency)?))
            }
            (SESSION, Level::Chain) => {
                let session = self.message(&any.value)?;
                HttpFilterConfig::StatefulSession(Arc::new(self.stateful_session(session)?))
            }
            (SESSION_PER_ROUTE, Level::Route) => {
                let session = self.message(&any.value)?;
                HttpFilterConfig::StatefulSession(Arc::new(self.session_per_route(session)?))
            }
            (SESSION | SESSION_PER_ROUTE, _) => return Err(self.misplaced(name)),
            (RATE_LIMIT, Level::Chain) => {
                let limit = self.message(&any.value)?;
                HttpFilterConfig::GlobalRateLimit(Arc::new(self.global_rate_limit(limit)?))
            }
            (RATE_LIMIT_PER_ROUTE, Level::Route) => {
                let limit = self.message(&any.value)?;
                HttpFilterConfig::GlobalRateLimitOfRoute(Arc::new(self.rate_limit_per_route(limit)?))
            }
            (RATE_LIMIT | RATE_LIMIT_PER_ROUTE, _) => return Err(self.misplaced(name)),
            (RBAC, Level::Chain) => {
                let rbac = self.message(&any.value)?;
                HttpFilterConfig::Rbac(Arc::new(self.rbac(rbac)?))
            }
            (RBAC_PER_ROUTE, Level::Route) => {
                let rbac = self.message(&any.value)?;
                HttpFilterConfig::Rbac(Arc::new(self.rbac_per_route(rbac)?))
            }
            (RBAC | RBAC_PER_ROUTE, _) => return Err(self.misplaced(name)),
            (JWT, Level::Chain) => {
                let jwt = self.message(&any.value)?;
                HttpFilterConfig::Jwt(Arc::new(self.jwt(jwt)?))
            }
            (JWT_PER_ROUTE, Level::Route) => {
                let route = self.message(&any.value)?;
                HttpFilterConfig::JwtOfRoute(self.jwt_of_route(route)?)
            }
            (JWT | JWT_PER_ROUTE, _) => return Err(self.misplaced(name)),
            (name, _) if is_typed_struct(name) => {
                let typed: TypedStruct = self.message(&any.value)?;
                return match type_name(&typed.type_url) {
                    ROUTER => Ok(Ok(HttpFilterConfig::Router)),
                    name => self.custom(name, FilterPayload::Json(json(typed.value.unwrap_or_default())), level),
                };
            }
            (name, _) => return self.custom(name, FilterPayload::Message(any.value.clone()), level),
        }))
    }

    /// A config of the filter where one of the route belongs, or the other way round.
    fn misplaced(&self, name: &str) -> Invalid {
        self.invalid(format!(
            "\"{name}\" does not belong here: a filter and its routes have configs of different types"
        ))
    }

    fn custom(&mut self, name: &str, payload: FilterPayload, level: Level) -> Valid<Result<HttpFilterConfig, String>> {
        let Some(parser) = self.extensions.and_then(|extensions| extensions.filter(name)) else {
            return Ok(Err(name.to_owned()));
        };
        match parser.parse(&payload, level == Level::Route) {
            Ok(made) => Ok(Ok(HttpFilterConfig::Custom(CustomFilter { type_name: name.into(), payload, made }))),
            Err(reason) => Err(self.invalid(reason)),
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
            FILTER_CONFIG => self.message(&any.value)?,
            _ => FilterConfig { config: Some(any), is_optional: false, disabled: false },
        };
        // Envoy: the config of a filter that is switched off is not looked at; an empty one only switches it on.
        if wrapper.disabled {
            return Ok(Some(FilterOverride { disabled: true, config: None }));
        }
        let Some(config) = wrapper.config else { return Ok(None) };
        if config.type_url.is_empty() {
            return Ok(Some(FilterOverride { disabled: false, config: None }));
        }
        match self.filter_config(&config, Level::Route)? {
            Ok(HttpFilterConfig::Router) => Ok(None),
            Ok(config) => Ok(Some(FilterOverride { disabled: false, config: Some(config) })),
            Err(name) if wrapper.is_optional => {
                self.note("config", format!("unknown filter \"{name}\", optional, ignored"));
                Ok(None)
            }
            Err(name) => Err(self.invalid(format!("unknown filter \"{name}\" and not optional"))),
        }
    }
}

pub(super) fn json(object: Struct) -> serde_json::Map<String, serde_json::Value> {
    object.fields.into_iter().map(|(key, value)| (key, json_value(value))).collect()
}

fn json_value(value: Value) -> serde_json::Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(flag)) => flag.into(),
        Some(Kind::NumberValue(number)) => number.into(),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::ListValue(list)) => list.values.into_iter().map(json_value).collect(),
        Some(Kind::StructValue(object)) => json(object).into(),
    }
}
