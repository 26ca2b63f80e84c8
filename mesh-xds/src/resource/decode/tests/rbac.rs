//! RBAC (gRFC A41, A59).

use super::{super::filter::Level, *};
use crate::resource::{
    AuditLoggerConfig, AuditLoggerParser, FilterPayload, HttpFilterConfig, PeerName, Permission, Principal, RbacAction,
    RbacConfig, StringMatcher, ValueMatcher,
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{CidrRange, TypedExtensionConfig},
            rbac::v3::{
                MetadataSource, Permission as ProtoPermission, Policy, Principal as ProtoPrincipal, Rbac as Rules,
                SourcedMetadata,
                permission::{self, Rule},
                principal::{self, Identifier},
                rbac::{AuditLoggingOptions, audit_logging_options::AuditLoggerConfig as ProtoLogger},
            },
            route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier},
        },
        extensions::{
            filters::http::rbac::v3::{Rbac, RbacPerRoute},
            path::r#match::uri_template::v3::UriTemplateMatchConfig,
            rbac::{audit_loggers::stream::v3::StdoutAuditLog, principals::mtls_authenticated::v3::Config as Mtls},
            transport_sockets::tls::v3::SubjectAltNameMatcher,
        },
        r#type::{
            matcher::v3::{
                FilterStateMatcher, ListMatcher, MetadataMatcher, PathMatcher, StringMatcher as ProtoString,
                ValueMatcher as ProtoValue, filter_state_matcher, list_matcher,
                metadata_matcher::{PathSegment, path_segment::Segment},
                path_matcher,
                string_matcher::MatchPattern,
                value_matcher,
            },
            v3::Int32Range,
        },
    },
    google::api::expr::v1alpha1::{CheckedExpr, Expr},
    xds::r#type::matcher::v3::Matcher,
};
use std::{any::Any as StdAny, sync::Arc};

fn exact(text: &str) -> ProtoString {
    ProtoString { match_pattern: Some(MatchPattern::Exact(text.into())), ..ProtoString::default() }
}

fn permission(rule: Rule) -> ProtoPermission {
    ProtoPermission { rule: Some(rule) }
}

fn principal(identifier: Identifier) -> ProtoPrincipal {
    ProtoPrincipal { identifier: Some(identifier) }
}

fn policy(rule: Rule, identifier: Identifier) -> Policy {
    Policy { permissions: vec![permission(rule)], principals: vec![principal(identifier)], ..Policy::default() }
}

fn rbac_of(policies: Vec<(&str, Policy)>) -> Rbac {
    let policies = policies.into_iter().map(|(name, policy)| (name.to_owned(), policy)).collect();
    Rbac { rules: Some(Rules { policies, ..Rules::default() }), ..Rbac::default() }
}

fn good() -> Rbac {
    rbac_of(vec![("p", policy(Rule::Any(true), Identifier::Any(true)))])
}

fn read(config: &Any, level: Level) -> Result<(Arc<RbacConfig>, Vec<Note>), Invalid> {
    let providers = providers();
    let mut cx = Decoder::new(&providers);
    match cx.filter_config(config, level)? {
        Ok(HttpFilterConfig::Rbac(config)) => Ok((config, cx.take_notes())),
        other => panic!("{other:?}"),
    }
}

fn accepted(rbac: &Rbac) -> Arc<RbacConfig> {
    let (config, notes) = read(&any(rbac), Level::Chain).unwrap();
    assert_eq!(notes, []);
    config
}

fn one_permission(rule: Rule) -> Permission {
    let config = accepted(&rbac_of(vec![("p", policy(rule, Identifier::Any(true)))]));
    config.rules.as_ref().unwrap().policies[0].permissions[0].clone()
}

fn one_principal(identifier: Identifier) -> Principal {
    let config = accepted(&rbac_of(vec![("p", policy(Rule::Any(true), identifier))]));
    config.rules.as_ref().unwrap().policies[0].principals[0].clone()
}

fn extension<M: Message + Name>(message: &M) -> TypedExtensionConfig {
    TypedExtensionConfig { name: "x".into(), typed_config: Some(any(message)) }
}

fn header(name: &str) -> HeaderMatcher {
    HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
        ..HeaderMatcher::default()
    }
}

fn block(address: &str, length: Option<u32>) -> CidrRange {
    CidrRange { address_prefix: address.into(), prefix_len: length.and_then(uint) }
}

fn range(address: &str, bits: u32) -> crate::resource::CidrRange {
    crate::resource::CidrRange::new(address.parse().unwrap(), bits).unwrap()
}

fn claim(value: value_matcher::MatchPattern) -> MetadataMatcher {
    let key = |key: &str| PathSegment { segment: Some(Segment::Key(key.into())) };
    MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec![key("payload"), key("iss")],
        value: Some(ProtoValue { match_pattern: Some(value) }),
        invert: false,
    }
}

#[test]
fn policies_are_ordered_by_name() {
    let any = || policy(Rule::Any(true), Identifier::Any(true));
    let mut rbac = rbac_of(vec![("b", any()), ("c", any()), ("a", any())]);
    rbac.rules.as_mut().unwrap().action = 1;
    rbac.shadow_rules.clone_from(&rbac.rules);
    rbac.shadow_rules_stat_prefix = "istio_dry_run_deny_".into();
    let config = accepted(&rbac);
    let rules = config.rules.as_ref().unwrap();
    assert_eq!(rules.action, RbacAction::Deny);
    assert_eq!(rules.policies.iter().map(|policy| &*policy.name).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!((&config.shadow_rules, &*config.shadow_rules_stat_prefix), (&config.rules, "istio_dry_run_deny_"));
    assert!(accepted(&Rbac::default()).is_inert());
}

#[test]
fn every_permission_is_read() {
    let path = || PathMatcher { rule: Some(path_matcher::Rule::Path(exact("/a"))) };
    let set = || permission::Set { rules: vec![permission(Rule::Any(true))] };
    assert_eq!(one_permission(Rule::AndRules(set())), Permission::All(vec![Permission::Any]));
    assert_eq!(one_permission(Rule::OrRules(set())), Permission::OneOf(vec![Permission::Any]));
    let not = Rule::NotRule(Box::new(permission(Rule::Any(true))));
    assert_eq!(one_permission(not), Permission::Not(Box::new(Permission::Any)));
    assert!(matches!(one_permission(Rule::Header(header(":Method"))), Permission::Header(m) if m.name == ":method"));
    assert_eq!(one_permission(Rule::UrlPath(path())), Permission::UrlPath(StringMatcher::exact("/a")));
    let read = one_permission(Rule::DestinationIp(block("10.0.0.0", Some(8))));
    assert_eq!(read, Permission::DestinationIp(range("10.0.0.0", 8)));
    assert_eq!(one_permission(Rule::DestinationPort(80)), Permission::DestinationPort(80));
    let ports = Rule::DestinationPortRange(Int32Range { start: 80, end: 90 });
    assert_eq!(one_permission(ports), Permission::DestinationPortRange(80, 90));
    let name = Rule::RequestedServerName(exact("a"));
    assert_eq!(one_permission(name), Permission::RequestedServerName(StringMatcher::exact("a")));
    let template = UriTemplateMatchConfig { path_template: "/a/{id}".into() };
    assert!(
        matches!(one_permission(Rule::UriTemplate(extension(&template))), Permission::UriTemplate(t) if t.matches("/a/7"))
    );
    let metadata = claim(value_matcher::MatchPattern::StringMatch(exact("me")));
    let read = one_permission(Rule::Metadata(metadata.clone()));
    let Permission::Metadata(matcher) = &read else { panic!("{read:?}") };
    assert_eq!((&*matcher.filter, matcher.path.len()), ("envoy.filters.http.jwt_authn", 2));
    let sourced = SourcedMetadata { metadata_matcher: Some(metadata), metadata_source: 0 };
    assert_eq!(one_permission(Rule::SourcedMetadata(sourced)), read);
}

#[test]
fn every_principal_is_read() {
    let ids = || principal::Set { ids: vec![principal(Identifier::Any(true))] };
    assert_eq!(one_principal(Identifier::AndIds(ids())), Principal::All(vec![Principal::Any]));
    assert_eq!(one_principal(Identifier::OrIds(ids())), Principal::OneOf(vec![Principal::Any]));
    let not = Identifier::NotId(Box::new(principal(Identifier::Any(true))));
    assert_eq!(one_principal(not), Principal::Not(Box::new(Principal::Any)));
    let authenticated = |principal_name| Identifier::Authenticated(principal::Authenticated { principal_name });
    assert_eq!(one_principal(authenticated(None)), Principal::Authenticated(None));
    let named = one_principal(authenticated(Some(exact("spiffe://a/b"))));
    assert_eq!(named, Principal::Authenticated(Some(StringMatcher::exact("spiffe://a/b"))));
    for make in [Identifier::SourceIp, Identifier::DirectRemoteIp, Identifier::RemoteIp] {
        assert_eq!(one_principal(make(block("::1", Some(128)))), Principal::RemoteIp(range("::1", 128)));
    }
    assert_eq!(
        one_principal(Identifier::RemoteIp(block("10.0.0.0", None))),
        Principal::RemoteIp(range("10.0.0.0", 0)),
        "an unset prefix length is 0"
    );
    let state = |key: &str| FilterStateMatcher {
        key: key.into(),
        matcher: Some(filter_state_matcher::Matcher::StringMatch(exact("spiffe://a/b"))),
    };
    let peer = one_principal(Identifier::FilterState(state("io.istio.peer_principal")));
    assert_eq!(peer, Principal::PeerPrincipal(StringMatcher::exact("spiffe://a/b")));
    let san = SubjectAltNameMatcher { san_type: 3, matcher: Some(exact("spiffe://a/b")), ..Default::default() };
    let mtls = Mtls { san_matcher: Some(san), any_validated_client_certificate: false };
    let read = one_principal(Identifier::Custom(extension(&mtls)));
    assert_eq!(read, Principal::Certificate(Some(PeerName::Uri(StringMatcher::exact("spiffe://a/b")))));
    let list = ListMatcher {
        match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(ProtoValue {
            match_pattern: Some(value_matcher::MatchPattern::StringMatch(exact("admin"))),
        }))),
    };
    let metadata = claim(value_matcher::MatchPattern::ListMatch(Box::new(list)));
    let read = one_principal(Identifier::Metadata(metadata));
    let Principal::Metadata(matcher) = read else { panic!("{read:?}") };
    assert_eq!(matcher.value, ValueMatcher::List(Box::new(ValueMatcher::String(StringMatcher::exact("admin")))));
}

#[test]
fn what_cannot_be_honoured_whole_is_refused_with_its_path() {
    type Case = (&'static str, &'static str, fn(&mut Rbac));
    fn rules(rbac: &mut Rbac) -> &mut Rules {
        rbac.rules.as_mut().unwrap()
    }
    fn one(rbac: &mut Rbac) -> &mut Policy {
        rules(rbac).policies.get_mut("p").unwrap()
    }
    fn allow(rbac: &mut Rbac, rule: Rule) {
        one(rbac).permissions = vec![permission(rule)];
    }
    fn from(rbac: &mut Rbac, identifier: Identifier) {
        one(rbac).principals = vec![principal(identifier)];
    }
    let cases: &[Case] = &[
        ("matcher", "rules", |r| r.matcher = Some(Matcher::default())),
        ("shadow_matcher", "shadow_rules", |r| r.shadow_matcher = Some(Matcher::default())),
        ("rules.action", "unknown action", |r| rules(r).action = 9),
        ("rules.policies[\"p\"].condition", "CEL", |r| one(r).condition = Some(Expr::default())),
        ("rules.policies[\"p\"].checked_condition", "CEL", |r| {
            one(r).checked_condition = Some(CheckedExpr::default());
        }),
        ("rules.policies[\"p\"].permissions", "empty", |r| one(r).permissions.clear()),
        ("rules.policies[\"p\"].principals", "empty", |r| one(r).principals.clear()),
        ("rules.policies[\"p\"].permissions[0]", "no rule", |r| one(r).permissions[0].rule = None),
        ("rules.policies[\"p\"].principals[0]", "no identifier", |r| one(r).principals[0].identifier = None),
        ("rules.policies[\"p\"].permissions[0].any", "true", |r| allow(r, Rule::Any(false))),
        ("rules.policies[\"p\"].principals[0].any", "true", |r| from(r, Identifier::Any(false))),
        ("rules.policies[\"p\"].permissions[0].and_rules.rules", "empty", |r| {
            allow(r, Rule::AndRules(permission::Set::default()));
        }),
        ("rules.policies[\"p\"].principals[0].or_ids.ids", "empty", |r| {
            from(r, Identifier::OrIds(principal::Set::default()));
        }),
        ("rules.policies[\"p\"].permissions[0].header.name", "A41", |r| allow(r, Rule::Header(header(":scheme")))),
        ("rules.policies[\"p\"].principals[0].header.name", "A41", |r| {
            from(r, Identifier::Header(header("gRPC-timeout")))
        }),
        ("rules.policies[\"p\"].permissions[0].destination_ip.prefix_len", "bits", |r| {
            allow(r, Rule::DestinationIp(block("10.0.0.0", Some(33))));
        }),
        ("rules.policies[\"p\"].principals[0].remote_ip.address_prefix", "not an IP", |r| {
            from(r, Identifier::RemoteIp(block("localhost", Some(8))));
        }),
        ("rules.policies[\"p\"].permissions[0].destination_port", "not a port", |r| {
            allow(r, Rule::DestinationPort(65_536));
        }),
        ("rules.policies[\"p\"].permissions[0].destination_port_range", "range", |r| {
            allow(r, Rule::DestinationPortRange(Int32Range { start: 9, end: 9 }));
        }),
        ("rules.policies[\"p\"].permissions[0].matcher", "no meaning", |r| {
            allow(r, Rule::Matcher(TypedExtensionConfig::default()));
        }),
        ("rules.policies[\"p\"].permissions[0].uri_template.typed_config.path_template", "start with /", |r| {
            allow(r, Rule::UriTemplate(extension(&UriTemplateMatchConfig { path_template: "a".into() })));
        }),
        ("rules.policies[\"p\"].permissions[0].sourced_metadata.metadata_source", "DYNAMIC", |r| {
            let source = MetadataSource::Route as i32;
            allow(r, Rule::SourcedMetadata(SourcedMetadata { metadata_matcher: None, metadata_source: source }));
        }),
        ("rules.policies[\"p\"].principals[0].metadata.path", "empty", |r| {
            let matcher = MetadataMatcher { path: vec![], ..claim(value_matcher::MatchPattern::BoolMatch(true)) };
            from(r, Identifier::Metadata(matcher));
        }),
        ("rules.policies[\"p\"].principals[0].filter_state.key", "not known", |r| {
            from(r, Identifier::FilterState(FilterStateMatcher { key: "x".into(), matcher: None }));
        }),
        ("rules.policies[\"p\"].principals[0].custom.typed_config", "expected", |r| {
            from(r, Identifier::Custom(extension(&StdoutAuditLog {})));
        }),
        ("rules.audit_logging_options.audit_condition", "unknown", |r| {
            let options = AuditLoggingOptions { audit_condition: 7, ..AuditLoggingOptions::default() };
            rules(r).audit_logging_options = Some(options);
        }),
        ("rules.audit_logging_options.logger_configs[0].audit_logger", "not optional", |r| {
            let logger = ProtoLogger { audit_logger: Some(extension(&Mtls::default())), is_optional: false };
            let options = AuditLoggingOptions { audit_condition: 1, logger_configs: vec![logger] };
            rules(r).audit_logging_options = Some(options);
        }),
    ];
    for (path, reason, change) in cases {
        let mut rbac = good();
        change(&mut rbac);
        let error = read(&any(&rbac), Level::Chain).err().unwrap_or_else(|| panic!("{path}: {reason}: was accepted"));
        assert_eq!(&error.path, path, "{error}");
        assert!(error.reason.contains(reason), "{error} does not say \"{reason}\"");
        let mut rbac = good();
        change(&mut rbac);
        rbac.shadow_rules = rbac.rules.take();
        assert!(read(&any(&rbac), Level::Chain).is_err(), "shadow: {path}");
    }
}

#[test]
fn rules_are_nested_so_deep_and_no_deeper() {
    let nest =
        |depth| (0..depth).fold(permission(Rule::Any(true)), |inner, _| permission(Rule::NotRule(Box::new(inner))));
    let rbac = |depth| {
        let policy = Policy { permissions: vec![nest(depth)], ..policy(Rule::Any(true), Identifier::Any(true)) };
        any(&rbac_of(vec![("p", policy)]))
    };
    assert!(read(&rbac(30), Level::Chain).is_ok());
    assert!(read(&rbac(200), Level::Chain).is_err());
}

#[test]
fn a_route_replaces_the_rules_or_switches_them_off() {
    let off = read(&any(&RbacPerRoute { rbac: None }), Level::Route).unwrap().0;
    assert!(off.is_inert());
    let (own, _) = read(&any(&RbacPerRoute { rbac: Some(good()) }), Level::Route).unwrap();
    assert_eq!(own, accepted(&good()));
    let mut bad = good();
    bad.rules.as_mut().unwrap().action = 9;
    let error = read(&any(&RbacPerRoute { rbac: Some(bad) }), Level::Route).unwrap_err();
    assert_eq!(error.path, "rbac.rules.action");
    assert!(read(&any(&good()), Level::Route).is_err() && read(&any(&RbacPerRoute::default()), Level::Chain).is_err());
}

struct Parser;

impl AuditLoggerParser for Parser {
    fn parse(&self, payload: &FilterPayload) -> Result<Arc<dyn StdAny + Send + Sync>, String> {
        match payload {
            FilterPayload::Message(bytes) if bytes.is_empty() => Ok(Arc::new(7)),
            _ => Err("not empty".into()),
        }
    }
}

#[test]
fn audit_loggers_are_built_in_or_registered() {
    let with = |condition, loggers: Vec<(Any, bool)>| {
        let logger_configs = loggers.into_iter().map(|(config, is_optional)| ProtoLogger {
            audit_logger: Some(TypedExtensionConfig { name: "l".into(), typed_config: Some(config) }),
            is_optional,
        });
        let options = AuditLoggingOptions { audit_condition: condition, logger_configs: logger_configs.collect() };
        let mut rbac = good();
        rbac.rules.as_mut().unwrap().audit_logging_options = Some(options);
        rbac
    };
    let mut extensions = Extensions::default();
    extensions.add_audit_logger("type.googleapis.com/my.Logger", Arc::new(Parser));
    let providers = providers();
    let read = |rbac: &Rbac| {
        let mut cx = Decoder::new(&providers).with_extensions(&extensions);
        match cx.filter_config(&any(rbac), Level::Chain)?.unwrap() {
            HttpFilterConfig::Rbac(config) => {
                Ok::<_, Invalid>((config.rules.clone().unwrap().audit, cx.take_notes().len()))
            }
            other => panic!("{other:?}"),
        }
    };
    let stdout = || any(&StdoutAuditLog {});
    let (audit, _) = read(&with(3, vec![(stdout(), false), (unknown("my.Logger"), false)])).unwrap();
    let audit = audit.unwrap();
    assert!(audit.on_deny && audit.on_allow);
    assert!(
        matches!(&audit.loggers[..], [AuditLoggerConfig::Stdout, AuditLoggerConfig::Custom { type_name, .. }] if &**type_name == "my.Logger")
    );
    assert_eq!(read(&with(0, vec![(stdout(), false)])).unwrap(), (None, 0), "NONE tells nobody");
    assert_eq!(read(&with(1, vec![(unknown("x.Y"), true)])).unwrap(), (None, 1), "an optional one is left out");
    let bad = Any { value: vec![1], ..unknown("my.Logger") };
    assert!(read(&with(1, vec![(bad, true)])).unwrap_err().reason.contains("not empty"));
}

#[test]
fn a_client_has_no_use_for_it() {
    let providers = providers();
    let rbac = any(&good());
    let mut cx = Decoder::new(&providers);
    assert!(!cx.server && cx.filter_config(&rbac, Level::Chain).unwrap().unwrap().is_of_server());
}
