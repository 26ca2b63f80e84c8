//! JWT authentication.

use super::{super::filter::Level, *};
use crate::resource::{HttpFilterConfig, JwksSource, JwtConfig, JwtOfRoute, JwtRequirement, JwtTokenCache};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{DataSource, HttpUri, data_source::Specifier, http_uri::HttpUpstreamType},
            route::v3::{RouteMatch, route_match::PathSpecifier},
        },
        extensions::filters::http::jwt_authn::v3::{
            ExtractOnlyWithoutValidation, FilterStateRule, JwtAuthentication, JwtCacheConfig, JwtClaimToHeader,
            JwtHeader, JwtProvider, JwtRequirement as ProtoRequirement, JwtRequirementOrList, PerRouteConfig,
            RemoteJwks, RequirementRule, jwt_provider::JwksSourceSpecifier, jwt_requirement::RequiresType,
            per_route_config::RequirementSpecifier, requirement_rule::RequirementType,
        },
    },
    google::protobuf::Empty,
};
use std::sync::Arc;

fn inline(text: &str) -> Option<JwksSourceSpecifier> {
    let specifier = Some(Specifier::InlineString(text.into()));
    Some(JwksSourceSpecifier::LocalJwks(DataSource { specifier, ..DataSource::default() }))
}

fn provider() -> JwtProvider {
    JwtProvider {
        issuer: "https://issuer".into(),
        jwks_source_specifier: inline(r#"{"keys":[]}"#),
        ..JwtProvider::default()
    }
}

fn requires(kind: RequiresType) -> ProtoRequirement {
    ProtoRequirement { requires_type: Some(kind) }
}

fn named(name: &str) -> ProtoRequirement {
    requires(RequiresType::ProviderName(name.into()))
}

fn rule(requirement: Option<RequirementType>) -> RequirementRule {
    let path_specifier = Some(PathSpecifier::Prefix("/".into()));
    RequirementRule {
        r#match: Some(RouteMatch { path_specifier, ..RouteMatch::default() }),
        requirement_type: requirement,
    }
}

fn good() -> JwtAuthentication {
    JwtAuthentication {
        providers: [("p".to_owned(), provider())].into(),
        rules: vec![rule(Some(RequirementType::Requires(named("p"))))],
        requirement_map: [("none".to_owned(), ProtoRequirement::default()), ("one".to_owned(), named("p"))].into(),
        ..JwtAuthentication::default()
    }
}

fn remote(change: impl FnOnce(&mut RemoteJwks)) -> Option<JwksSourceSpecifier> {
    let mut jwks = RemoteJwks {
        http_uri: Some(HttpUri {
            uri: "https://issuer/keys".into(),
            timeout: seconds(5),
            http_upstream_type: Some(HttpUpstreamType::Cluster("issuer".into())),
        }),
        ..RemoteJwks::default()
    };
    change(&mut jwks);
    Some(JwksSourceSpecifier::RemoteJwks(jwks))
}

fn read(config: &JwtAuthentication) -> Result<Arc<JwtConfig>, Invalid> {
    let providers = providers();
    match Decoder::new(&providers).filter_config(&any(config), Level::Chain)? {
        Ok(HttpFilterConfig::Jwt(config)) => Ok(config),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_provider_has_envoys_defaults() {
    let config = read(&good()).unwrap();
    let provider = &config.providers["p"];
    assert_eq!((provider.clock_skew, provider.forward, provider.cache), (Duration::from_secs(60), false, None));
    assert_eq!(provider.jwks, JwksSource::Inline(r#"{"keys":[]}"#.into()));
    let one = JwtRequirement::Provider { name: "p".into(), audiences: None };
    assert_eq!(config.rules[0].requirement, Some(one.clone()));
    assert_eq!(config.requirements["one"], one);
    assert_eq!(config.requirements["none"], JwtRequirement::All(vec![]), "always met");
}

#[test]
fn what_is_configured_is_kept() {
    let mut proto = good();
    let provider = proto.providers.get_mut("p").unwrap();
    provider.from_headers = vec![JwtHeader { name: "X-Token".into(), value_prefix: "T ".into() }];
    provider.forward_payload_header = "X-Payload".into();
    provider.clock_skew_seconds = 5;
    provider.jwt_cache_config = Some(JwtCacheConfig { jwt_cache_size: 7, jwt_max_token_size: 0 });
    let claim = JwtClaimToHeader { header_name: "x-sub".into(), claim_name: "a.b".into(), claim_path: vec![] };
    provider.claim_to_headers = vec![claim];
    provider.jwks_source_specifier = remote(|jwks| jwks.cache_duration = seconds(30));
    let any = JwtRequirementOrList { requirements: vec![named("p"), requires(RequiresType::AllowMissing(Empty {}))] };
    proto.rules = vec![rule(None), rule(Some(RequirementType::Requires(requires(RequiresType::RequiresAny(any)))))];
    let config = read(&proto).unwrap();
    let provider = &config.providers["p"];
    assert_eq!(provider.from_headers[0].name, "x-token");
    assert_eq!(provider.forward_payload_header.as_ref().unwrap(), "x-payload");
    assert_eq!(provider.clock_skew, Duration::from_secs(5));
    assert_eq!(provider.cache, Some(JwtTokenCache { tokens: 7, max_length: 4096 }));
    assert_eq!(provider.claim_to_headers[0].path, ["a", "b"]);
    let JwksSource::Remote(jwks) = &provider.jwks else { panic!() };
    assert_eq!(
        (jwks.cache_duration, jwks.timeout, jwks.async_fetch),
        (Duration::from_secs(30), Duration::from_secs(5), false)
    );
    assert_eq!(config.clusters().map(|cluster| &**cluster).collect::<Vec<_>>(), ["issuer"]);
    assert_eq!(config.rules[0].requirement, None);
    assert!(
        matches!(&config.rules[1].requirement, Some(JwtRequirement::OneOf(any)) if any[1] == JwtRequirement::AllowMissing)
    );
}

#[test]
fn what_cannot_be_honoured_whole_is_refused_with_its_path() {
    type Case = (&'static str, &'static str, fn(&mut JwtAuthentication));
    fn one(config: &mut JwtAuthentication) -> &mut JwtProvider {
        config.providers.get_mut("p").unwrap()
    }
    fn needs(config: &mut JwtAuthentication, kind: RequiresType) {
        config.rules = vec![rule(Some(RequirementType::Requires(requires(kind))))];
    }
    let cases: &[Case] = &[
        ("filter_state_rules", "filter state", |c| c.filter_state_rules = Some(FilterStateRule::default())),
        ("providers[\"p\"]", "neither", |c| one(c).jwks_source_specifier = None),
        ("providers[\"p\"].local_jwks.inline_string", "Key Set", |c| one(c).jwks_source_specifier = inline("[]")),
        ("providers[\"p\"].local_jwks.inline_string", "Key Set", |c| one(c).jwks_source_specifier = inline("{")),
        ("providers[\"p\"].remote_jwks.http_uri", "missing", |c| {
            one(c).jwks_source_specifier = remote(|jwks| jwks.http_uri = None);
        }),
        ("providers[\"p\"].remote_jwks.http_uri.cluster", "missing", |c| {
            one(c).jwks_source_specifier = remote(|jwks| jwks.http_uri.as_mut().unwrap().http_upstream_type = None);
        }),
        ("providers[\"p\"].remote_jwks.http_uri.uri", "no host", |c| {
            one(c).jwks_source_specifier = remote(|jwks| jwks.http_uri.as_mut().unwrap().uri = "/keys".into());
        }),
        ("providers[\"p\"].forward_payload_header", "name of a header", |c| {
            one(c).forward_payload_header = "a b".into();
        }),
        ("providers[\"p\"].claim_to_headers[0].claim_name", "empty", |c| {
            let claim = JwtClaimToHeader { header_name: "x".into(), ..JwtClaimToHeader::default() };
            one(c).claim_to_headers = vec![claim];
        }),
        ("rules[0].match", "missing", |c| c.rules[0].r#match = None),
        ("rules[0].requirement_name", "requirement_map", |c| {
            c.rules[0].requirement_type = Some(RequirementType::RequirementName("x".into()));
        }),
        ("rules[0].requires.provider_name", "not configured", |c| {
            needs(c, RequiresType::ProviderName("x".into()));
        }),
        ("rules[0].requires.requires_any.requirements", "at least two", |c| {
            needs(c, RequiresType::RequiresAny(JwtRequirementOrList { requirements: vec![named("p")] }));
        }),
        ("rules[0].requires.extract_only_without_validation", "verified", |c| {
            needs(c, RequiresType::ExtractOnlyWithoutValidation(ExtractOnlyWithoutValidation::default()));
        }),
    ];
    for (path, reason, change) in cases {
        let mut config = good();
        change(&mut config);
        let error = read(&config).err().unwrap_or_else(|| panic!("{path}: {reason}: was accepted"));
        assert_eq!(&error.path, path, "{error}");
        assert!(error.reason.contains(reason), "{error} does not say \"{reason}\"");
    }
}

#[test]
fn a_route_names_a_requirement_or_switches_it_off() {
    let providers = providers();
    let read = |specifier| {
        let config = PerRouteConfig { requirement_specifier: specifier };
        Decoder::new(&providers).filter_config(&any(&config), Level::Route)
    };
    let route = |config| Ok(Ok(HttpFilterConfig::JwtOfRoute(config)));
    assert_eq!(read(Some(RequirementSpecifier::Disabled(true))), route(JwtOfRoute::Disabled));
    let named = Some(RequirementSpecifier::RequirementName("one".into()));
    assert_eq!(read(named), route(JwtOfRoute::Requirement("one".into())));
    assert!(read(None).is_err());
}
