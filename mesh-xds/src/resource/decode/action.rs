//! `RouteAction`: clusters, limits, rewrites and mirrors.

use super::{Decoder, Valid, u32_or};
use crate::resource::{
    ClusterSpecifier, Format, Forward, Hedge, HostRewrite, MaxStreamDuration, Mirror, MirrorCluster, MirrorHost,
    PathMatcher, PathRewrite, RegexRewrite, RoutingPriority, TemplateRewrite, WeightedCluster,
};
use envoy_types::pb::envoy::{
    config::core::v3::RoutingPriority as ProtoPriority,
    config::route::v3::{
        HedgePolicy, RouteAction, WeightedCluster as ProtoWeighted,
        route_action::{
            ClusterNotFoundResponseCode, ClusterSpecifier as ProtoSpecifier, HostRewriteSpecifier, RequestMirrorPolicy,
        },
        weighted_cluster::cluster_weight,
    },
    extensions::path::rewrite::uri_template::v3::UriTemplateRewriteConfig,
    r#type::matcher::v3::RegexMatchAndSubstitute,
};
use http::HeaderName;
use std::sync::Arc;

/// What a route takes from the levels above it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surroundings<'a> {
    /// Optional cluster specifier plugins that were declared.
    pub(super) plugins: &'a [String],
    /// Of direct responses, in bytes.
    pub(super) max_body: usize,
    /// For routes that have none of their own.
    pub(super) mirrors: &'a Arc<[Mirror]>,
    /// For routes that have none of their own.
    pub(super) hedge: Option<Hedge>,
}

impl Decoder<'_> {
    /// `None`: the route is skipped, with a note.
    pub(super) fn forward(
        &mut self,
        proto: RouteAction,
        path: &PathMatcher,
        around: Surroundings<'_>,
    ) -> Valid<Option<Forward>> {
        let Some(cluster) = self.cluster_specifier(proto.cluster_specifier.as_ref(), around.plugins)? else {
            return Ok(None);
        };
        self.ignored(&[
            ("flush_timeout", proto.flush_timeout.is_some()),
            ("early_data_policy", proto.early_data_policy.is_some()),
            ("retry_policy_typed_config", proto.retry_policy_typed_config.is_some()),
            ("cors", proto.cors.is_some()),
            ("max_grpc_timeout", proto.max_grpc_timeout.is_some()),
            ("grpc_timeout_offset", proto.grpc_timeout_offset.is_some()),
            ("upgrade_configs", !proto.upgrade_configs.is_empty()),
            ("internal_redirect_policy", proto.internal_redirect_policy.is_some()),
            ("internal_redirect_action", proto.internal_redirect_action != 0),
        ]);
        let cluster_not_found = match ClusterNotFoundResponseCode::try_from(proto.cluster_not_found_response_code) {
            Ok(ClusterNotFoundResponseCode::ServiceUnavailable) => 503,
            Ok(ClusterNotFoundResponseCode::NotFound) => 404,
            Ok(ClusterNotFoundResponseCode::InternalServerError) => 500,
            Err(_) => return Err(self.invalid_at("cluster_not_found_response_code", "is unknown")),
        };
        let path_rewrite = self.path_rewrite(&proto, path)?;
        let mirrors = self.mirrors(proto.request_mirror_policies, around.mirrors)?;
        let hedge = match proto.hedge_policy {
            Some(policy) => self.at("hedge_policy", |cx| Ok(cx.hedge(&policy)))?,
            None => around.hedge,
        };
        let idle_timeout = self.duration("idle_timeout", proto.idle_timeout)?;
        let host_rewrite = self.host_rewrite(proto.host_rewrite_specifier)?;
        let timeout = self.duration("timeout", proto.timeout)?;
        let max_stream_duration = match proto.max_stream_duration {
            None => MaxStreamDuration::default(),
            Some(proto) => self.at("max_stream_duration", |cx| {
                Ok(MaxStreamDuration {
                    max_stream_duration: cx.duration("max_stream_duration", proto.max_stream_duration)?,
                    grpc_timeout_header_max: cx.duration("grpc_timeout_header_max", proto.grpc_timeout_header_max)?,
                    grpc_timeout_header_offset: cx
                        .duration("grpc_timeout_header_offset", proto.grpc_timeout_header_offset)?,
                })
            })?,
        };
        let retry_policy = match proto.retry_policy {
            Some(policy) => Some(self.at("retry_policy", |cx| cx.retry_policy(policy))?),
            None => None,
        };
        let rate_limits = self.rate_limits(proto.rate_limits)?;
        Ok(Some(Forward {
            rate_limits,
            include_vh_rate_limits: proto.include_vh_rate_limits.is_some_and(|include| include.value),
            cluster,
            timeout,
            max_stream_duration,
            retry_policy,
            hash_policies: self.hash_policies(proto.hash_policy)?,
            metadata_match: self.metadata_match(proto.metadata_match),
            path_rewrite,
            host_rewrite,
            append_x_forwarded_host: proto.append_x_forwarded_host,
            mirrors,
            idle_timeout,
            priority: match ProtoPriority::try_from(proto.priority) {
                Ok(ProtoPriority::Default) => RoutingPriority::Default,
                Ok(ProtoPriority::High) => RoutingPriority::High,
                Err(_) => return Err(self.invalid_at("priority", "is unknown")),
            },
            hedge,
            cluster_not_found,
        }))
    }

    /// The most specific level that has any wins; levels are not merged.
    pub(super) fn mirrors(&mut self, protos: Vec<RequestMirrorPolicy>, outer: &Arc<[Mirror]>) -> Valid<Arc<[Mirror]>> {
        if protos.is_empty() {
            return Ok(outer.clone());
        }
        let protos = protos.into_iter().enumerate();
        protos.map(|(i, proto)| self.at_index("request_mirror_policies", i, |cx| cx.mirror(proto))).collect()
    }

    /// A policy that hedges nothing hides the virtual host's.
    pub(super) fn hedge(&mut self, proto: &HedgePolicy) -> Option<Hedge> {
        // Envoy implements neither.
        self.ignored(&[
            ("initial_requests", u32_or(proto.initial_requests, 1) != 1),
            ("additional_request_chance", proto.additional_request_chance.is_some_and(|chance| chance.numerator > 0)),
        ]);
        proto.hedge_on_per_try_timeout.then_some(Hedge::PerTryTimeout)
    }

    fn mirror(&mut self, proto: RequestMirrorPolicy) -> Valid<Mirror> {
        self.ignored(&[("request_headers_mutations", !proto.request_headers_mutations.is_empty())]);
        let cluster = match (proto.cluster.as_str(), proto.cluster_header.as_str()) {
            ("", "") => return Err(self.invalid_at("cluster", "must not be empty")),
            (name, "") => MirrorCluster::Name(name.into()),
            ("", header) => MirrorCluster::Header(self.header_or_authority("cluster_header", header)?),
            _ => return Err(self.invalid_at("cluster_header", "cluster is set too: only one of them may be")),
        };
        let fraction = match proto.runtime_fraction.and_then(|fraction| fraction.default_value) {
            Some(fraction) => Some(self.at("runtime_fraction", |cx| cx.fraction("default_value", fraction))?),
            None => None,
        };
        let host = match proto.host_rewrite_literal.as_str() {
            "" if proto.disable_shadow_host_suffix_append => MirrorHost::Same,
            "" => MirrorHost::Shadow,
            host => MirrorHost::Literal(self.authority("host_rewrite_literal", host)?),
        };
        Ok(Mirror { cluster, fraction, trace_sampled: proto.trace_sampled.map(|sampled| sampled.value), host })
    }

    fn cluster_specifier(
        &mut self,
        proto: Option<&ProtoSpecifier>,
        plugins: &[String],
    ) -> Valid<Option<ClusterSpecifier>> {
        Ok(match proto {
            Some(ProtoSpecifier::Cluster(name)) if name.is_empty() => {
                return Err(self.invalid_at("cluster", "must not be empty"));
            }
            Some(ProtoSpecifier::Cluster(name)) => Some(ClusterSpecifier::Cluster(name.as_str().into())),
            Some(ProtoSpecifier::WeightedClusters(weighted)) => {
                Some(self.at("weighted_clusters", |cx| cx.weighted_clusters(weighted.clone()))?)
            }
            Some(ProtoSpecifier::ClusterHeader(name)) => {
                Some(ClusterSpecifier::Header(self.header_or_authority("cluster_header", name)?))
            }
            Some(ProtoSpecifier::ClusterSpecifierPlugin(name)) => {
                if !plugins.contains(name) {
                    return Err(self.invalid_at("cluster_specifier_plugin", format!("\"{name}\" is not declared")));
                }
                self.note("cluster_specifier_plugin", "not supported, optional, the route is skipped");
                None
            }
            Some(ProtoSpecifier::InlineClusterSpecifierPlugin(_)) => {
                self.note("inline_cluster_specifier_plugin", "not supported, the route is skipped");
                None
            }
            None => {
                self.note("cluster_specifier", "is missing, the route is skipped");
                None
            }
        })
    }

    fn weighted_clusters(&mut self, proto: ProtoWeighted) -> Valid<ClusterSpecifier> {
        let mut total: u64 = 0;
        let mut clusters = Vec::with_capacity(proto.clusters.len());
        for (index, entry) in proto.clusters.into_iter().enumerate() {
            let weight = u32_or(entry.weight, 0);
            total += u64::from(weight);
            let cluster = self.at_index("clusters", index, |cx| {
                let header = match (entry.name.as_str(), entry.cluster_header.as_str()) {
                    ("", "") => return Err(cx.invalid_at("name", "must not be empty")),
                    (_, "") => None,
                    ("", header) => Some(cx.header_or_authority("cluster_header", header)?),
                    _ => return Err(cx.invalid_at("cluster_header", "name is set too: only one of them may be")),
                };
                let metadata_match = cx.metadata_match(entry.metadata_match);
                let edits = cx.header_edits(
                    (entry.request_headers_to_add, entry.request_headers_to_remove),
                    (entry.response_headers_to_add, entry.response_headers_to_remove),
                )?;
                let host_rewrite = match entry.host_rewrite_specifier {
                    Some(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host)) if !host.is_empty() => {
                        Some(cx.authority("host_rewrite_literal", &host)?)
                    }
                    _ => None,
                };
                let filter_overrides = cx.filter_overrides(entry.typed_per_filter_config)?;
                Ok(WeightedCluster {
                    name: entry.name.into(),
                    header,
                    weight,
                    metadata_match,
                    filter_overrides,
                    edits,
                    host_rewrite,
                })
            })?;
            if weight > 0 {
                clusters.push(cluster);
            }
        }
        if total == 0 {
            return Err(self.invalid("the weights add up to zero"));
        }
        if total > u64::from(u32::MAX) {
            return Err(self.invalid(format!("the weights add up to {total}, more than {}", u32::MAX)));
        }
        Ok(ClusterSpecifier::Weighted(clusters))
    }

    /// At most one of four fields (Envoy).
    fn path_rewrite(&mut self, proto: &RouteAction, path: &PathMatcher) -> Valid<Option<PathRewrite>> {
        let set = [
            ("prefix_rewrite", !proto.prefix_rewrite.is_empty()),
            ("regex_rewrite", proto.regex_rewrite.is_some()),
            ("path_rewrite_policy", proto.path_rewrite_policy.is_some()),
            ("path_rewrite", !proto.path_rewrite.is_empty()),
        ];
        let set: Vec<_> = set.into_iter().filter(|(_, set)| *set).map(|(field, _)| field).collect();
        if let [_, second, ..] = set[..] {
            return Err(self.invalid_at(second, format!("{} is set too: only one rewrite of the path may be", set[0])));
        }
        if !proto.prefix_rewrite.is_empty() {
            return Ok(Some(PathRewrite::Prefix(proto.prefix_rewrite.clone())));
        }
        if let Some(rewrite) = &proto.regex_rewrite {
            return Ok(Some(PathRewrite::Regex(self.at("regex_rewrite", |cx| cx.regex_rewrite(rewrite))?)));
        }
        if !proto.path_rewrite.is_empty() {
            return Ok(Some(PathRewrite::Whole(self.format("path_rewrite", &proto.path_rewrite)?)));
        }
        let Some(policy) = &proto.path_rewrite_policy else { return Ok(None) };
        self.at("path_rewrite_policy", |cx| {
            let PathMatcher::Template(template) = path else {
                return Err(cx.invalid("a template rewrite needs a match by path template (path_match_policy)"));
            };
            let Some(config) = &policy.typed_config else { return Err(cx.invalid_at("typed_config", "is missing")) };
            let config: UriTemplateRewriteConfig = cx.at("typed_config", |cx| cx.any(config))?;
            let rewrite = TemplateRewrite::new(&config.path_template_rewrite, template)
                .map_err(|reason| cx.invalid_at("typed_config.path_template_rewrite", reason))?;
            Ok(Some(PathRewrite::Template(template.clone(), rewrite)))
        })
    }

    fn host_rewrite(&mut self, proto: Option<HostRewriteSpecifier>) -> Valid<Option<HostRewrite>> {
        Ok(match proto {
            None => None,
            Some(HostRewriteSpecifier::HostRewriteLiteral(host)) if host.is_empty() => None,
            Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
                Some(HostRewrite::Literal(self.authority("host_rewrite_literal", &host)?))
            }
            Some(HostRewriteSpecifier::AutoHostRewrite(auto)) => {
                auto.value.then_some(HostRewrite::Endpoint { trusted: self.trusted })
            }
            Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
                Some(HostRewrite::Header(self.header_name("host_rewrite_header", &name)?))
            }
            Some(HostRewriteSpecifier::HostRewritePathRegex(rewrite)) => {
                Some(HostRewrite::PathRegex(self.at("host_rewrite_path_regex", |cx| cx.regex_rewrite(&rewrite))?))
            }
            Some(HostRewriteSpecifier::HostRewrite(format)) => {
                Some(HostRewrite::Format(self.format("host_rewrite", &format)?))
            }
        })
    }

    pub(super) fn regex_rewrite(&mut self, proto: &RegexMatchAndSubstitute) -> Valid<RegexRewrite> {
        let Some(pattern) = &proto.pattern else { return Err(self.invalid_at("pattern", "is missing")) };
        RegexRewrite::new(&pattern.regex, &proto.substitution).map_err(|reason| self.invalid(reason))
    }

    fn format(&mut self, field: &'static str, text: &str) -> Valid<Format> {
        let format = Format::parse(text).map_err(|reason| self.invalid_at(field, reason))?;
        if format.has_unknowable() {
            self.note(field, format!("\"{text}\" has an operator that a client knows no value of: it stays empty"));
        }
        Ok(format)
    }

    pub(super) fn header_name(&mut self, field: &'static str, name: &str) -> Valid<HeaderName> {
        HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes())
            .map_err(|_| self.invalid_at(field, format!("\"{name}\" is not a header name")))
    }

    /// `:authority` is what `host` is to HTTP/1.1.
    fn header_or_authority(&mut self, field: &'static str, name: &str) -> Valid<HeaderName> {
        if name == ":authority" { Ok(http::header::HOST) } else { self.header_name(field, name) }
    }

    fn authority(&mut self, field: &'static str, host: &str) -> Valid<Arc<str>> {
        match host.parse::<http::uri::Authority>() {
            Ok(_) => Ok(host.into()),
            Err(error) => Err(self.invalid_at(field, format!("\"{host}\" is not an authority: {error}"))),
        }
    }
}
