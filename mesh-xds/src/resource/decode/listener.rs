//! LDS validation (gRFC A27, A31, A39, A41).

use super::{Decoder, Invalid, Valid, filter::Level};
use crate::resource::{
    HttpConnectionManager, HttpFilter, HttpFilterConfig, Listener, Resource, RouteSource, ServerListener, Tracing,
};
use envoy_types::pb::envoy::{
    config::listener::v3::Listener as Proto,
    extensions::filters::network::http_connection_manager::v3::{
        HttpConnectionManager as ProtoHcm, HttpFilter as ProtoFilter, http_connection_manager::RouteSpecifier,
        http_filter::ConfigType,
    },
    r#type::v3::Percent,
};
use std::{collections::HashSet, sync::Arc};

impl Listener {
    /// Decodes and validates a serialized `envoy.config.listener.v3.Listener` with an `api_listener`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        let proto: Proto = cx.message(bytes)?;
        cx.client_listener(proto)
    }
}

impl ServerListener {
    /// Decodes and validates a serialized `envoy.config.listener.v3.Listener` with an `address`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        let proto: Proto = cx.message(bytes)?;
        if proto.name.is_empty() {
            return Err(cx.invalid_at("name", "must not be empty"));
        }
        cx.server_listener(proto)
    }
}

impl Decoder<'_> {
    /// For clients with an `api_listener`, or else for servers with an `address`.
    pub(in crate::resource) fn listener(&mut self, bytes: &[u8]) -> Valid<Resource> {
        let proto: Proto = self.message(bytes)?;
        if proto.api_listener.is_none() && proto.address.is_some() && !proto.name.is_empty() {
            return Ok(Resource::ServerListener(Arc::new(self.server_listener(proto)?)));
        }
        Ok(Resource::Listener(Arc::new(self.client_listener(proto)?)))
    }

    fn client_listener(&mut self, proto: Proto) -> Valid<Listener> {
        if proto.name.is_empty() {
            return Err(self.invalid_at("name", "must not be empty"));
        }
        let Some(api) = proto.api_listener.and_then(|api| api.api_listener) else {
            let reason = "is missing: a client needs an api_listener, a server an address";
            return Err(self.invalid_at("api_listener", reason));
        };
        let http = self.at("api_listener", |cx| {
            let proto: ProtoHcm = cx.any(&api)?;
            cx.connection_manager(proto)
        })?;
        Ok(Listener { name: proto.name.into(), http })
    }

    pub(super) fn connection_manager(&mut self, proto: ProtoHcm) -> Valid<HttpConnectionManager> {
        if proto.xff_num_trusted_hops != 0 {
            return Err(self.invalid_at("xff_num_trusted_hops", "must be zero (gRFC A41)"));
        }
        if !proto.original_ip_detection_extensions.is_empty() {
            return Err(self.invalid_at("original_ip_detection_extensions", "must be empty (gRFC A41)"));
        }
        let routes = match proto.route_specifier {
            Some(RouteSpecifier::Rds(rds)) => self.at("rds", |cx| {
                cx.ads("config_source", rds.config_source.as_ref())?;
                if rds.route_config_name.is_empty() {
                    return Err(cx.invalid_at("route_config_name", "must not be empty"));
                }
                Ok(RouteSource::Rds(rds.route_config_name.into()))
            })?,
            Some(RouteSpecifier::RouteConfig(config)) => {
                RouteSource::Inline(Arc::new(self.at("route_config", |cx| cx.route_configuration(config))?))
            }
            Some(RouteSpecifier::ScopedRoutes(_)) => return Err(self.invalid_at("scoped_routes", "not supported")),
            None => return Err(self.invalid("has neither rds nor route_config")),
        };
        let common = proto.common_http_protocol_options;
        let max_stream_duration = self.at("common_http_protocol_options", |cx| {
            cx.duration("max_stream_duration", common.and_then(|common| common.max_stream_duration))
        })?;
        self.ignored(&[
            ("request_timeout", proto.request_timeout.is_some_and(|timeout| timeout.seconds != 0)),
            ("local_reply_config", proto.local_reply_config.is_some()),
        ]);
        let stream_idle_timeout = self.duration("stream_idle_timeout", proto.stream_idle_timeout)?;
        let own = proto.tracing.as_ref();
        self.ignored(&[
            ("tracing.provider", own.is_some_and(|tracing| tracing.provider.is_some())),
            ("tracing.custom_tags", own.is_some_and(|tracing| !tracing.custom_tags.is_empty())),
        ]);
        let tracing = proto.tracing.map(|tracing| {
            let share =
                |percent: Option<Percent>| percent.map_or(1.0, |percent| (percent.value / 100.0).clamp(0.0, 1.0));
            Tracing {
                client: share(tracing.client_sampling),
                random: share(tracing.random_sampling),
                overall: share(tracing.overall_sampling),
            }
        });
        let http_filters = self.http_filters(proto.http_filters)?;
        Ok(HttpConnectionManager { routes, max_stream_duration, stream_idle_timeout, tracing, http_filters })
    }

    /// gRFC A39: named once each, and the router exactly last.
    fn http_filters(&mut self, protos: Vec<ProtoFilter>) -> Valid<Vec<HttpFilter>> {
        let mut names = HashSet::new();
        let mut filters: Vec<HttpFilter> = Vec::with_capacity(protos.len());
        for (index, proto) in protos.into_iter().enumerate() {
            self.at_index("http_filters", index, |cx| {
                if proto.name.is_empty() {
                    return Err(cx.invalid_at("name", "must not be empty"));
                }
                if !names.insert(proto.name.clone()) {
                    return Err(cx.invalid_at("name", format!("\"{}\" is used twice", proto.name)));
                }
                if filters.iter().any(|filter| filter.config == HttpFilterConfig::Router) {
                    return Err(cx.invalid("stands behind the router, which must be the last filter"));
                }
                if let Some(config) = cx.http_filter(&proto)? {
                    filters.push(HttpFilter { name: proto.name.into(), config, disabled: proto.disabled });
                }
                Ok(())
            })?;
        }
        match filters.last() {
            None => Err(self.invalid_at("http_filters", "is empty: the router filter must be the last one")),
            Some(last) if last.config != HttpFilterConfig::Router => {
                Err(self.invalid_at("http_filters", format!("\"{}\" is last, but the router must be", last.name)))
            }
            Some(_) => Ok(filters),
        }
    }

    /// `None`: an optional filter that is not known.
    fn http_filter(&mut self, proto: &ProtoFilter) -> Valid<Option<HttpFilterConfig>> {
        let unknown = match &proto.config_type {
            Some(ConfigType::TypedConfig(any)) => {
                match self.at("typed_config", |cx| cx.filter_config(any, Level::Chain))? {
                    Ok(config) if config.is_of_server() && !self.server => {
                        "the filter has a meaning in a server only".to_owned()
                    }
                    Ok(config) => return Ok(Some(config)),
                    Err(name) => format!("unknown filter \"{name}\""),
                }
            }
            Some(ConfigType::ConfigDiscovery(_)) => "config_discovery is not supported".to_owned(),
            None => "has no config".to_owned(),
        };
        if proto.is_optional {
            self.note("typed_config", format!("{unknown}, optional, ignored"));
            Ok(None)
        } else {
            Err(self.invalid_at("typed_config", format!("{unknown} and not optional")))
        }
    }
}
