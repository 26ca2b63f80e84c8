//! CDS validation (gRFC A27, A32, A50, A105 and Envoy's thresholds).

use super::{Decoder, Invalid, Valid, u32_or};
use crate::resource::{self, CircuitBreakers, Cluster, Discovery, LbPolicy, LbSettings, RetryBudget, Thresholds};
use envoy_types::pb::{
    envoy::config::{
        cluster::v3::{
            CircuitBreakers as ProtoBreakers, Cluster as Proto, circuit_breakers::Thresholds as ProtoThresholds,
        },
        core::v3::{ConfigSource, RoutingPriority, config_source::ConfigSourceSpecifier},
    },
    google::protobuf::Duration as ProtoDuration,
};
use std::{sync::Arc, time::Duration};

impl Cluster {
    /// Decodes and validates a serialized `envoy.config.cluster.v3.Cluster`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        let proto: Proto = cx.message(bytes)?;
        cx.cluster(proto)
    }
}

impl Decoder<'_> {
    fn cluster(&mut self, mut proto: Proto) -> Valid<Cluster> {
        if proto.name.is_empty() {
            return Err(self.invalid_at("name", "must not be empty"));
        }
        let name: Arc<str> = proto.name.as_str().into();
        let discovery = self.discovery(&name, &mut proto)?;
        let mut lb = self.lb_settings(&mut proto)?;
        let lb_policy = self.effective_policy(&discovery, &proto, &mut lb)?;
        if let Some(source) = &proto.lrs_server {
            self.lrs_server(source)?;
        }
        if proto.transport_socket_matcher.is_some() {
            return Err(self.invalid_at("transport_socket_matcher", "not supported"));
        }
        let transport_socket = match proto.transport_socket.take() {
            Some(socket) => self.at("transport_socket", |cx| cx.transport_socket(socket))?,
            None => resource::TransportSocket::Fallback,
        };
        let matches = std::mem::take(&mut proto.transport_socket_matches);
        let transport_socket_matches = self.each("transport_socket_matches", matches, Self::socket_match)?;
        let connect_timeout =
            self.positive("connect_timeout", proto.connect_timeout)?.unwrap_or(Duration::from_secs(5));
        let circuit_breakers = match proto.circuit_breakers.take() {
            Some(breakers) => self.at("circuit_breakers", |cx| cx.circuit_breakers(breakers))?,
            None => CircuitBreakers::default(),
        };
        let outlier_detection = match proto.outlier_detection.take() {
            Some(outlier) => Some(Arc::new(self.at("outlier_detection", |cx| cx.outlier_detection(outlier))?)),
            None => None,
        };
        let health_check = self.health_checks(std::mem::take(&mut proto.health_checks))?;
        let options = self.protocol_options(&mut proto)?;
        self.ignored(&[
            ("upstream_bind_config", proto.upstream_bind_config.is_some()),
            ("filters", !proto.filters.is_empty()),
            ("upstream_config", proto.upstream_config.is_some()),
            ("alt_stat_name", !proto.alt_stat_name.is_empty()),
            ("lrs_report_endpoint_metrics", !proto.lrs_report_endpoint_metrics.is_empty()),
            ("connection_pool_per_downstream_connection", proto.connection_pool_per_downstream_connection),
            ("queuing_policies", proto.queuing_policies.is_some()),
            ("stats_matcher", proto.stats_matcher.is_some()),
            ("track_timeout_budgets", proto.track_timeout_budgets),
            ("protocol_selection", proto.protocol_selection != 0),
            (
                "per_connection_buffer_high_watermark_timeout",
                proto.per_connection_buffer_high_watermark_timeout.is_some(),
            ),
        ]);
        let transport_socket = options.server_name.of(transport_socket, &name);
        let transport_socket_matches = transport_socket_matches
            .into_iter()
            .map(|one| resource::TransportSocketMatch { socket: options.server_name.of(one.socket, &name), ..one })
            .collect();
        Ok(Cluster {
            name,
            discovery,
            lb_policy,
            lb,
            connect_timeout,
            circuit_breakers,
            outlier_detection,
            health_check,
            ignore_health_on_host_removal: proto.ignore_health_on_host_removal,
            transport_socket,
            transport_socket_matches,
            http_protocol: options.protocol,
            idle_timeout: options.idle_timeout.unwrap_or(Duration::from_secs(3600)),
            max_requests_per_connection: options.max_requests_per_connection,
            connections: options.connections,
        })
    }

    /// The policy in force. One endpoint is not balanced (gRFC A37): its addresses are tried in order.
    fn effective_policy(&mut self, discovery: &Discovery, proto: &Proto, lb: &mut LbSettings) -> Valid<LbPolicy> {
        match discovery {
            // gRFC A75 and Envoy: each of its clusters has its own.
            Discovery::Aggregate(_) => {
                let theirs = "has no effect: an aggregate's clusters have their own";
                let said = [
                    ("load_balancing_policy", proto.load_balancing_policy.is_some()),
                    ("outlier_detection", proto.outlier_detection.is_some()),
                    ("health_checks", !proto.health_checks.is_empty()),
                    ("transport_socket", proto.transport_socket.is_some()),
                ];
                for (field, _) in said.into_iter().filter(|(_, said)| *said) {
                    self.note(field, theirs);
                }
                Ok(LbPolicy::RoundRobin)
            }
            Discovery::Dns(dns) if dns.logical => {
                self.lb_policy(proto, lb)?;
                Ok(LbPolicy::PickFirst { shuffle: false })
            }
            _ => self.lb_policy(proto, lb),
        }
    }

    /// gRFC A27: only `self` names a load reporting server we know.
    fn lrs_server(&mut self, source: &ConfigSource) -> Valid<()> {
        if !matches!(source.config_source_specifier, Some(ConfigSourceSpecifier::Self_(_))) {
            return Err(self.invalid_at("lrs_server", "must be self"));
        }
        self.note("lrs_server", "load reporting is not supported, ignored");
        Ok(())
    }

    fn circuit_breakers(&mut self, proto: ProtoBreakers) -> Valid<CircuitBreakers> {
        let mut said = [Thresholds::default(); 2];
        // The first of each priority counts.
        let mut seen = [false; 2];
        for (index, thresholds) in proto.thresholds.into_iter().enumerate() {
            let priority = match RoutingPriority::try_from(thresholds.priority) {
                Ok(RoutingPriority::Default) => 0,
                Ok(RoutingPriority::High) => 1,
                Err(_) => {
                    return self.at_index("thresholds", index, |cx| Err(cx.invalid_at("priority", "is unknown")));
                }
            };
            if !std::mem::replace(&mut seen[priority], true) {
                said[priority] = self.at_index("thresholds", index, |cx| cx.thresholds(thresholds))?;
            }
        }
        let [default, high] = said;
        let max_connections_per_host = self.per_host(&proto.per_host_thresholds)?;
        Ok(CircuitBreakers { default, high, max_connections_per_host })
    }

    /// gRFC A105: the connections of the first for the default priority count, nothing else does.
    fn per_host(&mut self, protos: &[ProtoThresholds]) -> Valid<Option<u32>> {
        let mut connections = None;
        let mut seen = false;
        for (index, proto) in protos.iter().enumerate() {
            self.at_index("per_host_thresholds", index, |cx| {
                if proto.priority != RoutingPriority::Default as i32 {
                    cx.note("priority", "only DEFAULT is supported, ignored");
                    return Ok(());
                }
                if std::mem::replace(&mut seen, true) {
                    return Ok(());
                }
                connections = proto.max_connections.map(|max| max.value);
                if connections == Some(0) {
                    return Err(cx.invalid_at("max_connections", "must be greater than zero"));
                }
                cx.ignored(&[
                    ("max_pending_requests", proto.max_pending_requests.is_some()),
                    ("max_requests", proto.max_requests.is_some()),
                    ("max_retries", proto.max_retries.is_some()),
                    ("retry_budget", proto.retry_budget.is_some()),
                    ("track_remaining", proto.track_remaining),
                    ("max_connection_pools", proto.max_connection_pools.is_some()),
                ]);
                Ok(())
            })?;
        }
        Ok(connections)
    }

    fn thresholds(&mut self, proto: ProtoThresholds) -> Valid<Thresholds> {
        self.ignored(&[("max_connection_pools", proto.max_connection_pools.is_some())]);
        let default = Thresholds::default();
        let retry_budget = match proto.retry_budget {
            None => None,
            Some(budget) => {
                // Zero is what we do: the requests of the moment count.
                let interval = budget.budget_interval.is_some_and(|interval| interval != ProtoDuration::default());
                self.ignored(&[("retry_budget.budget_interval", interval)]);
                let percent = budget.budget_percent.map_or(20.0, |percent| percent.value);
                if !(0.0..=100.0).contains(&percent) {
                    return Err(
                        self.invalid_at("retry_budget.budget_percent", format!("{percent} is not between 0 and 100"))
                    );
                }
                Some(RetryBudget { percent, min_concurrency: u32_or(budget.min_retry_concurrency, 3) })
            }
        };
        Ok(Thresholds {
            max_connections: u32_or(proto.max_connections, default.max_connections),
            max_pending_requests: u32_or(proto.max_pending_requests, default.max_pending_requests),
            max_requests: u32_or(proto.max_requests, default.max_requests),
            max_retries: u32_or(proto.max_retries, default.max_retries),
            retry_budget,
            track_remaining: proto.track_remaining,
        })
    }
}
