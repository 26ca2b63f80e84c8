//! RBAC (gRFC A41, A59, Envoy). What cannot be honoured whole is refused: a policy that is applied by half lets in whom it must not.

use super::is_typed_struct;
use crate::resource::{
    AuditLoggerConfig, AuditLogging, FilterPayload, HeaderMatcher, MetadataMatcher, PathTemplate, PeerName, Permission,
    Principal, RbacAction, RbacConfig, RbacPolicy, RbacRules, StringMatcher,
    decode::{Decoder, Valid, type_name},
};
use envoy_types::pb::envoy::{
    config::{
        core::v3::TypedExtensionConfig,
        rbac::v3::{
            MetadataSource, Permission as ProtoPermission, Policy, Principal as ProtoPrincipal, Rbac as ProtoRules,
            SourcedMetadata,
            permission::Rule,
            principal::Identifier,
            rbac::{
                Action, AuditLoggingOptions,
                audit_logging_options::{AuditCondition, AuditLoggerConfig as ProtoLogger},
            },
        },
        route::v3::HeaderMatcher as ProtoHeader,
    },
    extensions::{
        filters::http::rbac::v3::{Rbac, RbacPerRoute},
        path::r#match::uri_template::v3::UriTemplateMatchConfig,
        rbac::principals::mtls_authenticated::v3::Config as MtlsAuthenticated,
        transport_sockets::tls::v3::{SubjectAltNameMatcher, subject_alt_name_matcher::SanType},
    },
    r#type::matcher::v3::{
        FilterStateMatcher, PathMatcher, filter_state_matcher::Matcher as StateMatcher, path_matcher,
    },
};
use std::{collections::HashMap, sync::Arc};

const STDOUT: &str = "envoy.extensions.rbac.audit_loggers.stream.v3.StdoutAuditLog";
/// What Istio's sidecars call the SPIFFE id of the peer.
const PEER_PRINCIPAL: &str = "io.istio.peer_principal";

impl Decoder<'_> {
    pub(super) fn rbac(&mut self, proto: Rbac) -> Valid<RbacConfig> {
        if proto.matcher.is_some() {
            return Err(self.invalid_at("matcher", "not supported: use rules"));
        }
        if proto.shadow_matcher.is_some() {
            return Err(self.invalid_at("shadow_matcher", "not supported: use shadow_rules"));
        }
        self.ignored(&[("track_per_rule_stats", proto.track_per_rule_stats)]);
        Ok(RbacConfig {
            rules: proto.rules.map(|rules| self.at("rules", |cx| cx.rbac_rules(rules))).transpose()?,
            shadow_rules: proto
                .shadow_rules
                .map(|rules| self.at("shadow_rules", |cx| cx.rbac_rules(rules)))
                .transpose()?,
            rules_stat_prefix: proto.rules_stat_prefix.into(),
            shadow_rules_stat_prefix: proto.shadow_rules_stat_prefix.into(),
        })
    }

    /// Without a config the filter is off (gRFC A41).
    pub(super) fn rbac_per_route(&mut self, proto: RbacPerRoute) -> Valid<RbacConfig> {
        proto.rbac.map_or(Ok(RbacConfig::default()), |rbac| self.at("rbac", |cx| cx.rbac(rbac)))
    }

    fn rbac_rules(&mut self, proto: ProtoRules) -> Valid<RbacRules> {
        let action = match Action::try_from(proto.action) {
            Ok(Action::Allow) => RbacAction::Allow,
            Ok(Action::Deny) => RbacAction::Deny,
            Ok(Action::Log) => RbacAction::Log,
            Err(_) => return Err(self.invalid_at("action", format!("unknown action {}", proto.action))),
        };
        Ok(RbacRules {
            action,
            policies: self.rbac_policies(proto.policies)?,
            audit: match proto.audit_logging_options {
                Some(options) => self.at("audit_logging_options", |cx| cx.audit_logging(options))?,
                None => None,
            },
        })
    }

    fn rbac_policies(&mut self, protos: HashMap<String, Policy>) -> Valid<Vec<RbacPolicy>> {
        let mut protos: Vec<_> = protos.into_iter().collect();
        protos.sort_by(|(a, _), (b, _)| a.cmp(b));
        let policy = |(name, proto): (String, Policy)| {
            self.at_key("policies", &name, |cx| {
                for (field, set) in
                    [("condition", proto.condition.is_some()), ("checked_condition", proto.checked_condition.is_some())]
                {
                    if set {
                        return Err(cx.invalid_at(field, "not supported (gRFC A41): no CEL"));
                    }
                }
                if proto.permissions.is_empty() {
                    return Err(cx.invalid_at("permissions", "must not be empty"));
                }
                if proto.principals.is_empty() {
                    return Err(cx.invalid_at("principals", "must not be empty"));
                }
                Ok(RbacPolicy {
                    permissions: cx.each("permissions", proto.permissions, |cx, proto| cx.permission(proto, 0))?,
                    principals: cx.each("principals", proto.principals, |cx, proto| cx.principal(proto, 0))?,
                    name: name.as_str().into(),
                })
            })
        };
        protos.into_iter().map(policy).collect()
    }

    fn permission(&mut self, proto: ProtoPermission, depth: usize) -> Valid<Permission> {
        self.nested(depth)?;
        Ok(match proto.rule {
            Some(Rule::Any(true)) => Permission::Any,
            Some(Rule::Any(false)) => return Err(self.invalid_at("any", "must be true")),
            Some(Rule::AndRules(set)) => {
                Permission::All(self.at("and_rules", |cx| cx.set(set.rules, "rules", Self::permission, depth))?)
            }
            Some(Rule::OrRules(set)) => {
                Permission::OneOf(self.at("or_rules", |cx| cx.set(set.rules, "rules", Self::permission, depth))?)
            }
            Some(Rule::NotRule(rule)) => {
                Permission::Not(Box::new(self.at("not_rule", |cx| cx.permission(*rule, depth + 1))?))
            }
            Some(Rule::Header(header)) => Permission::Header(self.at("header", |cx| cx.rbac_header(header))?),
            Some(Rule::UrlPath(path)) => Permission::UrlPath(self.at("url_path", |cx| cx.url_path(path))?),
            Some(Rule::DestinationIp(range)) => {
                Permission::DestinationIp(self.at("destination_ip", |cx| cx.cidr(&range))?)
            }
            Some(Rule::DestinationPort(port)) => match u16::try_from(port) {
                Ok(port) => Permission::DestinationPort(port),
                Err(_) => return Err(self.invalid_at("destination_port", format!("{port} is not a port"))),
            },
            Some(Rule::DestinationPortRange(range)) => match (u32::try_from(range.start), u32::try_from(range.end)) {
                (Ok(start), Ok(end)) if start < end && end <= 65_536 => Permission::DestinationPortRange(start, end),
                _ => {
                    let reason = format!("{}..{} is not a range of ports", range.start, range.end);
                    return Err(self.invalid_at("destination_port_range", reason));
                }
            },
            Some(Rule::Metadata(metadata)) => {
                Permission::Metadata(self.at("metadata", |cx| cx.metadata_matcher(metadata))?)
            }
            Some(Rule::SourcedMetadata(metadata)) => {
                Permission::Metadata(self.at("sourced_metadata", |cx| cx.sourced_metadata(metadata))?)
            }
            Some(Rule::RequestedServerName(matcher)) => {
                Permission::RequestedServerName(self.at("requested_server_name", |cx| cx.string_matcher(matcher))?)
            }
            Some(Rule::UriTemplate(config)) => {
                Permission::UriTemplate(self.at("uri_template", |cx| cx.uri_template(&config))?)
            }
            Some(Rule::Matcher(matcher)) => {
                let name = matcher.typed_config.as_ref().map_or("", |any| type_name(&any.type_url));
                return Err(self.invalid_at("matcher", format!("extension \"{name}\" has no meaning in a server")));
            }
            None => return Err(self.invalid("has no rule that is known")),
        })
    }

    fn principal(&mut self, proto: ProtoPrincipal, depth: usize) -> Valid<Principal> {
        self.nested(depth)?;
        Ok(match proto.identifier {
            Some(Identifier::Any(true)) => Principal::Any,
            Some(Identifier::Any(false)) => return Err(self.invalid_at("any", "must be true")),
            Some(Identifier::AndIds(set)) => {
                Principal::All(self.at("and_ids", |cx| cx.set(set.ids, "ids", Self::principal, depth))?)
            }
            Some(Identifier::OrIds(set)) => {
                Principal::OneOf(self.at("or_ids", |cx| cx.set(set.ids, "ids", Self::principal, depth))?)
            }
            Some(Identifier::NotId(id)) => {
                Principal::Not(Box::new(self.at("not_id", |cx| cx.principal(*id, depth + 1))?))
            }
            Some(Identifier::Authenticated(authenticated)) => {
                Principal::Authenticated(match authenticated.principal_name {
                    None => None,
                    Some(name) => Some(self.at("authenticated.principal_name", |cx| cx.string_matcher(name))?),
                })
            }
            Some(Identifier::SourceIp(range)) => Principal::RemoteIp(self.at("source_ip", |cx| cx.cidr(&range))?),
            Some(Identifier::DirectRemoteIp(range)) => {
                Principal::RemoteIp(self.at("direct_remote_ip", |cx| cx.cidr(&range))?)
            }
            Some(Identifier::RemoteIp(range)) => Principal::RemoteIp(self.at("remote_ip", |cx| cx.cidr(&range))?),
            Some(Identifier::Header(header)) => Principal::Header(self.at("header", |cx| cx.rbac_header(header))?),
            Some(Identifier::UrlPath(path)) => Principal::UrlPath(self.at("url_path", |cx| cx.url_path(path))?),
            Some(Identifier::Metadata(metadata)) => {
                Principal::Metadata(self.at("metadata", |cx| cx.metadata_matcher(metadata))?)
            }
            Some(Identifier::SourcedMetadata(metadata)) => {
                Principal::Metadata(self.at("sourced_metadata", |cx| cx.sourced_metadata(metadata))?)
            }
            Some(Identifier::FilterState(state)) => {
                Principal::PeerPrincipal(self.at("filter_state", |cx| cx.filter_state(state))?)
            }
            Some(Identifier::Custom(custom)) => {
                Principal::Certificate(self.at("custom", |cx| cx.mtls_authenticated(&custom))?)
            }
            None => return Err(self.invalid("has no identifier that is known")),
        })
    }

    /// gRFC A41: what gRPC itself owns of the headers cannot be asked for.
    fn rbac_header(&mut self, proto: ProtoHeader) -> Valid<HeaderMatcher> {
        let header = self.header_matcher(proto)?;
        if header.name == ":scheme" || header.name.starts_with("grpc-") {
            return Err(self.invalid_at("name", format!("\"{}\" cannot be matched (gRFC A41)", header.name)));
        }
        Ok(header)
    }

    fn url_path(&mut self, proto: PathMatcher) -> Valid<StringMatcher> {
        match proto.rule {
            Some(path_matcher::Rule::Path(path)) => self.at("path", |cx| cx.string_matcher(path)),
            None => Err(self.invalid_at("path", "is missing")),
        }
    }

    fn uri_template(&mut self, proto: &TypedExtensionConfig) -> Valid<Arc<PathTemplate>> {
        let Some(any) = &proto.typed_config else { return Err(self.invalid_at("typed_config", "is missing")) };
        self.at("typed_config", |cx| {
            let config: UriTemplateMatchConfig = cx.any(any)?;
            let template = PathTemplate::new(&config.path_template);
            template.map(Arc::new).map_err(|reason| cx.invalid_at("path_template", reason))
        })
    }

    fn sourced_metadata(&mut self, proto: SourcedMetadata) -> Valid<MetadataMatcher> {
        if proto.metadata_source() != MetadataSource::Dynamic {
            return Err(self.invalid_at("metadata_source", "not supported: only DYNAMIC"));
        }
        let Some(matcher) = proto.metadata_matcher else {
            return Err(self.invalid_at("metadata_matcher", "is missing"));
        };
        self.at("metadata_matcher", |cx| cx.metadata_matcher(matcher))
    }

    fn filter_state(&mut self, proto: FilterStateMatcher) -> Valid<StringMatcher> {
        if proto.key != PEER_PRINCIPAL {
            return Err(self.invalid_at("key", format!("\"{}\" is not known: only {PEER_PRINCIPAL}", proto.key)));
        }
        match proto.matcher {
            Some(StateMatcher::StringMatch(matcher)) => self.at("string_match", |cx| cx.string_matcher(matcher)),
            Some(StateMatcher::AddressMatch(_)) => Err(self.invalid_at("address_match", "a principal is no address")),
            None => Err(self.invalid("has no matcher")),
        }
    }

    fn mtls_authenticated(&mut self, proto: &TypedExtensionConfig) -> Valid<Option<PeerName>> {
        let Some(any) = &proto.typed_config else { return Err(self.invalid_at("typed_config", "is missing")) };
        self.at("typed_config", |cx| {
            let config: MtlsAuthenticated = cx.any(any)?;
            match (config.san_matcher, config.any_validated_client_certificate) {
                (Some(san), _) => cx.at("san_matcher", |cx| cx.peer_name(san)).map(Some),
                (None, true) => Ok(None),
                (None, false) => Err(cx.invalid("has neither san_matcher nor any_validated_client_certificate")),
            }
        })
    }

    fn peer_name(&mut self, proto: SubjectAltNameMatcher) -> Valid<PeerName> {
        let kind = proto.san_type();
        let Some(matcher) = proto.matcher else { return Err(self.invalid_at("matcher", "is missing")) };
        let matcher = self.at("matcher", |cx| cx.string_matcher(matcher))?;
        match kind {
            SanType::Uri => Ok(PeerName::Uri(matcher)),
            SanType::Dns => Ok(PeerName::Dns(matcher)),
            SanType::IpAddress => Ok(PeerName::Ip(matcher)),
            other => Err(self.invalid_at("san_type", format!("{} is not supported", other.as_str_name()))),
        }
    }

    /// gRFC A59. `None`: nothing is told to anybody.
    fn audit_logging(&mut self, proto: AuditLoggingOptions) -> Valid<Option<AuditLogging>> {
        let (on_deny, on_allow) = match AuditCondition::try_from(proto.audit_condition) {
            Ok(AuditCondition::None) => (false, false),
            Ok(AuditCondition::OnDeny) => (true, false),
            Ok(AuditCondition::OnAllow) => (false, true),
            Ok(AuditCondition::OnDenyAndAllow) => (true, true),
            Err(_) => {
                let reason = format!("unknown condition {}", proto.audit_condition);
                return Err(self.invalid_at("audit_condition", reason));
            }
        };
        let loggers = self.each("logger_configs", proto.logger_configs, Self::audit_logger)?;
        let loggers: Vec<_> = loggers.into_iter().flatten().collect();
        Ok(((on_deny || on_allow) && !loggers.is_empty()).then_some(AuditLogging { on_deny, on_allow, loggers }))
    }

    /// `None`: an optional one that is not known.
    fn audit_logger(&mut self, proto: ProtoLogger) -> Valid<Option<AuditLoggerConfig>> {
        let Some(any) = proto.audit_logger.and_then(|logger| logger.typed_config) else {
            return Err(self.invalid_at("audit_logger.typed_config", "is missing"));
        };
        let (name, payload) = match type_name(&any.type_url) {
            STDOUT => return Ok(Some(AuditLoggerConfig::Stdout)),
            name if is_typed_struct(name) => {
                let typed: super::TypedStruct = self.message(&any.value)?;
                let value = super::json(typed.value.unwrap_or_default());
                (type_name(&typed.type_url).to_owned(), FilterPayload::Json(value))
            }
            name => (name.to_owned(), FilterPayload::Message(any.value.clone())),
        };
        let Some(parser) = self.extensions.and_then(|extensions| extensions.audit_logger(&name)) else {
            if proto.is_optional {
                self.note("audit_logger", format!("unknown audit logger \"{name}\", optional, ignored"));
                return Ok(None);
            }
            return Err(self.invalid_at("audit_logger", format!("unknown audit logger \"{name}\" and not optional")));
        };
        match parser.parse(&payload) {
            Ok(made) => Ok(Some(AuditLoggerConfig::Custom { type_name: name.into(), payload, made })),
            Err(reason) => Err(self.invalid_at("audit_logger", reason)),
        }
    }
}
