//! RequestAuthentications as one `jwt_authn` filter: a token of a known issuer must be valid, none at all is as good (istiod's
//! `convertToEnvoyJwtConfig`).

use super::authz::PAYLOAD;
use crate::{
    model::{JwtKeys, JwtRule},
    translate::cluster_name,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{DataSource, HttpUri, data_source::Specifier, http_uri::HttpUpstreamType},
                route::v3::{RouteMatch, route_match::PathSpecifier},
            },
            extensions::filters::{
                http::jwt_authn::v3::{
                    JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement, JwtRequirementAndList,
                    JwtRequirementOrList, RemoteJwks, RequirementRule,
                    jwt_provider::{JwksSourceSpecifier, NormalizePayload},
                    jwt_requirement::RequiresType,
                    requirement_rule::RequirementType,
                },
                network::http_connection_manager::v3::HttpFilter,
            },
        },
        google::protobuf::{Any, Duration, Empty},
    },
    util::pack_any,
};

/// How long fetched keys are used.
const KEYS_LAST: Duration = Duration { seconds: 300, nanos: 0 };
/// How long fetching keys may take.
const FETCH_TIMEOUT: Duration = Duration { seconds: 5, nanos: 0 };

/// `None` where no issuer is known.
fn filter_of(rules: &[&JwtRule]) -> Option<Any> {
    if rules.is_empty() {
        return None;
    }
    let name = |index: usize| format!("origins-{index}");
    let provided = |index| requirement(RequiresType::ProviderName(name(index)));
    let any = |requirements| requirement(RequiresType::RequiresAny(JwtRequirementOrList { requirements }));
    let optional = |index| any(vec![provided(index), requirement(RequiresType::AllowMissing(Empty {}))]);
    let indices = 0..rules.len();
    let requires = if rules.len() == 1 {
        optional(0)
    } else {
        let all = JwtRequirementAndList { requirements: indices.clone().map(optional).collect() };
        any(indices.map(provided).chain([requirement(RequiresType::RequiresAll(all))]).collect())
    };
    let everywhere = RequirementRule {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        requirement_type: Some(RequirementType::Requires(requires)),
    };
    let mut config = pack_any(JwtAuthentication {
        rules: vec![everywhere],
        bypass_cors_preflight: true,
        ..JwtAuthentication::default()
    });
    // One by one: the map of the generated type has no order.
    for (index, rule) in rules.iter().enumerate() {
        let entry =
            JwtAuthentication { providers: [(name(index), provider(rule))].into(), ..JwtAuthentication::default() };
        config.value.extend(pack_any(entry).value);
    }
    Some(config)
}

pub(super) fn filter(rules: &[&JwtRule]) -> Option<HttpFilter> {
    let mut rules = rules.to_vec();
    rules.sort_by(|a, b| a.issuer.value.cmp(&b.issuer.value));
    Some(super::filter("envoy.filters.http.jwt_authn", filter_of(&rules)?))
}

fn requirement(requires: RequiresType) -> JwtRequirement {
    JwtRequirement { requires_type: Some(requires) }
}

fn provider(rule: &JwtRule) -> JwtProvider {
    let keys = match &rule.keys {
        JwtKeys::Inline(jwks) => JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(Specifier::InlineString(jwks.clone())),
            ..DataSource::default()
        }),
        JwtKeys::Uri(uri) => {
            let uri = &uri.value;
            JwksSourceSpecifier::RemoteJwks(RemoteJwks {
                http_uri: Some(HttpUri {
                    uri: uri.uri.clone(),
                    timeout: Some(FETCH_TIMEOUT),
                    http_upstream_type: Some(HttpUpstreamType::Cluster(cluster_name(uri.port, "", &uri.host))),
                }),
                cache_duration: Some(KEYS_LAST),
                ..RemoteJwks::default()
            })
        }
    };
    let header = |(name, prefix): &(String, String)| JwtHeader { name: name.clone(), value_prefix: prefix.clone() };
    let claim = |(header, claim): &(String, String)| JwtClaimToHeader {
        header_name: header.clone(),
        claim_name: claim.clone(),
        ..JwtClaimToHeader::default()
    };
    JwtProvider {
        issuer: rule.issuer.value.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward,
        from_headers: rule.from_headers.iter().map(header).collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        forward_payload_header: rule.payload_to_header.clone().unwrap_or_default(),
        claim_to_headers: rule.claims_to_headers.iter().map(claim).collect(),
        payload_in_metadata: PAYLOAD.to_owned(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: vec!["permission".to_owned(), "scope".to_owned()],
        }),
        jwks_source_specifier: Some(keys),
        ..JwtProvider::default()
    }
}
