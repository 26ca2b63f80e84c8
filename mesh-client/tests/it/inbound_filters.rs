//! Filters of servers as a control plane says them: tokens with fetched keys, faults, limits, and what routes say of each.

use crate::{
    inbound_xds::{Pair, chain_with, manager},
    support::{
        ANY, CLUSTER, GUARD,
        inbound::Serving,
        policies::{Tokens, ask, get, plain, tell, with, with_token},
        service, until,
    },
};
use bytes::Bytes;
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    CidrRange, DataSource, HttpUri, RuntimeFractionalPercent, TypedExtensionConfig,
                    data_source::Specifier, http_uri::HttpUpstreamType,
                },
                listener::v3::FilterChainMatch,
                rbac::v3::{Permission, Policy, Principal, Rbac as Rules, permission::Rule, principal::Identifier},
                route::v3::{NonForwardingAction, Route, RouteMatch, route::Action, route_match::PathSpecifier},
            },
            extensions::filters::{
                http::{
                    fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
                    jwt_authn::v3::{
                        JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement,
                        JwtRequirementAndList, PerRouteConfig, RemoteJwks, RequirementRule,
                        jwt_provider::JwksSourceSpecifier, jwt_requirement::RequiresType,
                        per_route_config::RequirementSpecifier, requirement_rule::RequirementType,
                    },
                    local_ratelimit::v3::LocalRateLimit,
                    rbac::v3::{Rbac, RbacPerRoute},
                },
                network::http_connection_manager::v3::{HttpFilter, http_filter},
            },
            extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
            r#type::v3::{FractionalPercent, TokenBucket, fractional_percent::DenominatorType},
        },
        google::protobuf::{Any, Duration, UInt32Value},
    },
    util::pack_any,
};
use http::{Request, Response};
use http_body_util::Full;
use mesh_client::{Inbound, inbound::RequestBody};
use mesh_tls::default_provider;
use std::{convert::Infallible, sync::Arc};

pub(crate) fn route(path: &str, overrides: &[(&str, Any)]) -> Route {
    Route {
        name: path.into(),
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix(path.into())), ..RouteMatch::default() }),
        action: Some(Action::NonForwardingAction(NonForwardingAction {})),
        typed_per_filter_config: overrides.iter().map(|(name, config)| ((*name).to_owned(), config.clone())).collect(),
        ..Route::default()
    }
}

pub(crate) fn filter(name: &str, config: Any) -> HttpFilter {
    let config_type = Some(http_filter::ConfigType::TypedConfig(config));
    HttpFilter { name: name.into(), config_type, ..HttpFilter::default() }
}

fn always() -> FractionalPercent {
    FractionalPercent { numerator: 100, denominator: DenominatorType::Hundred.into() }
}

fn fault(status: Option<u32>) -> Any {
    let abort = |status| FaultAbort {
        error_type: Some(ErrorType::HttpStatus(status)),
        percentage: Some(always()),
        ..FaultAbort::default()
    };
    pack_any(HttpFault { abort: status.map(abort), ..HttpFault::default() })
}

pub(crate) fn deny(path: &str) -> Any {
    use envoy_types::pb::envoy::r#type::matcher::v3::{
        PathMatcher, StringMatcher, path_matcher, string_matcher::MatchPattern,
    };
    let prefix = StringMatcher { match_pattern: Some(MatchPattern::Prefix(path.into())), ..StringMatcher::default() };
    let path = PathMatcher { rule: Some(path_matcher::Rule::Path(prefix)) };
    let policy = Policy {
        permissions: vec![Permission { rule: Some(Rule::UrlPath(path)) }],
        principals: vec![Principal { identifier: Some(Identifier::Any(true)) }],
        ..Policy::default()
    };
    let rules = Rules { action: 1, policies: [("secret".to_owned(), policy)].into(), ..Rules::default() };
    pack_any(Rbac { rules: Some(rules), ..Rbac::default() })
}

fn limit(tokens: u32) -> Any {
    let hour = Some(Duration { seconds: 3600, nanos: 0 });
    let fill = Some(UInt32Value { value: tokens });
    let share =
        || Some(RuntimeFractionalPercent { default_value: Some(always()), ..RuntimeFractionalPercent::default() });
    pack_any(LocalRateLimit {
        stat_prefix: "limit".into(),
        token_bucket: Some(TokenBucket { max_tokens: tokens, tokens_per_fill: fill, fill_interval: hour }),
        filter_enabled: share(),
        filter_enforced: share(),
        ..LocalRateLimit::default()
    })
}

/// A remote provider `a`, whose subject becomes `x-sub`, and an inline one `b` with tokens in `x-token`. `/both` wants a token of each, `/one` of `a`.
fn authentication(b: &Tokens) -> JwtAuthentication {
    let keys = RemoteJwks {
        http_uri: Some(HttpUri {
            uri: "http://greeter.default.svc.cluster.local:50051/keys".into(),
            timeout: Some(Duration { seconds: 5, nanos: 0 }),
            http_upstream_type: Some(HttpUpstreamType::Cluster(CLUSTER.into())),
        }),
        ..RemoteJwks::default()
    };
    let remote = JwtProvider {
        issuer: "a".into(),
        jwks_source_specifier: Some(JwksSourceSpecifier::RemoteJwks(keys)),
        claim_to_headers: vec![JwtClaimToHeader {
            header_name: "x-sub".into(),
            claim_name: "sub".into(),
            ..JwtClaimToHeader::default()
        }],
        ..JwtProvider::default()
    };
    let inline = JwtProvider {
        issuer: "b".into(),
        jwks_source_specifier: Some(JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(Specifier::InlineString(b.jwks())),
            ..DataSource::default()
        })),
        from_headers: vec![JwtHeader { name: "x-token".into(), ..JwtHeader::default() }],
        ..JwtProvider::default()
    };
    let of = |name: &str| JwtRequirement { requires_type: Some(RequiresType::ProviderName(name.into())) };
    let both = JwtRequirementAndList { requirements: vec![of("a"), of("b")] };
    let rule = |path: &str, requirement| RequirementRule {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix(path.into())), ..RouteMatch::default() }),
        requirement_type: Some(RequirementType::Requires(requirement)),
    };
    JwtAuthentication {
        providers: [("a".to_owned(), remote), ("b".to_owned(), inline)].into(),
        rules: vec![
            rule("/both", JwtRequirement { requires_type: Some(RequiresType::RequiresAll(both)) }),
            rule("/one", of("a")),
        ],
        requirement_map: [("of-a".to_owned(), of("a"))].into(),
        ..JwtAuthentication::default()
    }
}

async fn world() -> Pair {
    Pair::serving(|inbound| async move { inbound.serve(tower::service_fn(tell)).await.unwrap() }).await
}

/// The server is to have these filters and routes.
pub(crate) async fn configured(pair: &Pair, filters: Vec<HttpFilter>, routes: Vec<Route>) {
    pair.serve(pair.listener(vec![chain_with("plain", "", None, |own| *own = manager(routes, filters))]));
    tokio::time::timeout(GUARD, pair.inbound.ready()).await.unwrap();
}

#[tokio::test]
async fn faults_limits_and_rules_of_a_server_are_what_its_routes_say() {
    let off = pack_any(RbacPerRoute::default());
    let filters = vec![filter("rbac", deny("/secret")), filter("fault", fault(None)), filter("limit", limit(1000))];
    let routes = vec![
        route("/secret/open", &[("rbac", off)]),
        route("/aborted", &[("fault", fault(Some(418)))]),
        route("/limited", &[("limit", limit(2))]),
        route("/", &[]),
    ];
    let pair = world().await;
    configured(&pair, filters, routes).await;
    let addr = pair.inbound.local_addr();
    for (path, expected) in [
        ("/", 200),
        ("/secret", 403),
        ("/secret/open", 200),
        ("/aborted", 418),
        ("/limited", 200),
        ("/limited", 200),
        ("/limited", 429),
        ("/", 200),
    ] {
        let (status, body, _) = plain(addr, get(path)).await;
        assert_eq!(status, expected, "{path}: {body}");
    }
}

#[tokio::test]
async fn tokens_of_two_issuers_are_asked_for_and_keys_are_fetched_from_a_cluster() {
    let (a, b) = (Tokens::new(), Tokens::new());
    let set = a.jwks();
    let answer = move |_: Request<RequestBody>| {
        let set = set.clone();
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(set)))) }
    };
    let keys = Serving::of(Inbound::builder().bind(ANY).await.unwrap(), tower::service_fn(answer));
    let per_route = |specifier| pack_any(PerRouteConfig { requirement_specifier: Some(specifier) });
    let routes = vec![
        route("/one/open", &[("jwt", per_route(RequirementSpecifier::Disabled(true)))]),
        route("/named", &[("jwt", per_route(RequirementSpecifier::RequirementName("of-a".into())))]),
        route("/", &[]),
    ];
    let pair = world().await;
    pair.cp.apply(&service(&[("one", keys.addr)])).await.unwrap();
    configured(&pair, vec![filter("jwt", pack_any(authentication(&b)))], routes).await;
    let addr = pair.inbound.local_addr();
    let (of_a, of_b) = (a.of("a", "anna"), b.of("b", "berta"));
    until("the keys are fetched", async || plain(addr, with_token("/one", &of_a)).await.0 == 200).await;
    let both = |path: &str| with(with_token(path, &of_a), "x-token", of_b.as_bytes());
    let (_, body, _) = plain(addr, with(both("/both"), "x-sub", b"admin")).await;
    assert!(body.contains("x-sub=anna "), "{body}");
    for (request, expected) in [
        (both("/both"), 200),
        (with_token("/both", &of_a), 401),
        (with(get("/both"), "x-token", of_b.as_bytes()), 401),
        (get("/one"), 401),
        (get("/named"), 401),
        (with_token("/named", &of_a), 200),
        (with_token("/one", &b.of("a", "anna")), 401),
        (get("/"), 200),
    ] {
        let uri = request.uri().clone();
        let (status, body, _) = plain(addr, request).await;
        assert_eq!(status, expected, "{uri}: {body}");
    }
    let (status, body, _) = plain(addr, with(get("/one/open"), "x-sub", b"admin")).await;
    assert_eq!(status, 200);
    assert!(body.contains("x-sub=- "), "where nothing is verified nobody says who it is: {body}");
}

#[tokio::test]
async fn a_server_of_a_mesh_verifies_tokens_by_the_crypto_provider_of_the_mesh() {
    let mut none = (*default_provider()).clone();
    none.signature_verification_algorithms.all = &[];
    let serve = |inbound: Inbound| async move { inbound.serve(tower::service_fn(tell)).await.unwrap() };
    let pair = Pair::of(|mesh| mesh.crypto_provider(Arc::new(none)), serve).await;
    let b = Tokens::new();
    let JwtAuthentication { providers, .. } = authentication(&b);
    let only = RequirementRule {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".into())), ..RouteMatch::default() }),
        requirement_type: Some(RequirementType::Requires(JwtRequirement {
            requires_type: Some(RequiresType::ProviderName("b".into())),
        })),
    };
    let config = JwtAuthentication {
        providers: providers.into_iter().filter(|(name, _)| name == "b").collect(),
        rules: vec![only],
        ..JwtAuthentication::default()
    };
    configured(&pair, vec![filter("jwt", pack_any(config))], vec![route("/", &[])]).await;
    let request = with(get("/"), "x-token", b.of("b", "berta").as_bytes());
    let (status, body, _) = plain(pair.inbound.local_addr(), request).await;
    assert_eq!((status, body.as_str()), (401, "Jwt header [alg] is not supported"));
}

#[tokio::test]
async fn chains_count_for_themselves_and_go_on_counting_after_an_update() {
    let pair = Pair::serving(|inbound| async move { inbound.serve(echo()).await.unwrap() }).await;
    let chain = |name: &str, from: &str, tokens: u32| {
        let mut chain = chain_with(name, "", None, |manager| {
            manager.http_filters.insert(0, filter("limit", limit(tokens)));
        });
        let range = CidrRange { address_prefix: from.into(), prefix_len: Some(UInt32Value { value: 32 }) };
        chain.filter_chain_match = Some(FilterChainMatch { source_prefix_ranges: vec![range], ..Default::default() });
        chain
    };
    let say = |tokens| pair.serve(pair.listener(vec![chain("a", "127.0.0.9", tokens), chain("b", "127.0.0.1", 2)]));
    say(7);
    tokio::time::timeout(GUARD, pair.inbound.ready()).await.unwrap();
    let mut client = crate::inbound_serve::http2::<Full<Bytes>>(pair.inbound.local_addr()).await;
    let mut ask = async || client.send_request(crate::inbound_serve::post("/", "")).await.unwrap().status().as_u16();
    assert_eq!([ask().await, ask().await, ask().await], [200, 200, 429]);
    // The other chain changes, and again: what is counted here is not forgotten.
    for tokens in [8, 9] {
        let before = pair.inbound.serving();
        say(tokens);
        until("it is in force", async || pair.inbound.serving() != before).await;
        assert_eq!(ask().await, 429);
    }
}

fn echo() -> crate::support::inbound::Echo {
    crate::support::inbound::Echo(Arc::default())
}

/// Of this path template.
fn of_template(template: &str) -> Option<RouteMatch> {
    let typed = UriTemplateMatchConfig { path_template: template.into() };
    let policy = TypedExtensionConfig { name: "template".into(), typed_config: Some(pack_any(typed)) };
    Some(RouteMatch { path_specifier: Some(PathSpecifier::PathMatchPolicy(policy)), ..RouteMatch::default() })
}

#[tokio::test]
async fn no_byte_in_a_path_gets_around_a_token_or_a_route_by_template() {
    let b = Tokens::new();
    let JwtAuthentication { providers, .. } = authentication(&b);
    let needed = RequirementRule {
        r#match: of_template("/admin/{id}"),
        requirement_type: Some(RequirementType::Requires(JwtRequirement {
            requires_type: Some(RequiresType::ProviderName("b".into())),
        })),
    };
    let jwt = JwtAuthentication {
        providers: providers.into_iter().filter(|(name, _)| name == "b").collect(),
        rules: vec![needed],
        ..JwtAuthentication::default()
    };
    let closed = RbacPerRoute { rbac: Some(Rbac { rules: Some(Rules::default()), ..Rbac::default() }) };
    let routes = vec![
        Route { r#match: of_template("/closed/{id}"), ..route("closed", &[("rbac", pack_any(closed))]) },
        route("/", &[]),
    ];
    let pair = world().await;
    configured(&pair, vec![filter("jwt", pack_any(jwt)), filter("rbac", deny("/nothing"))], routes).await;
    let addr = pair.inbound.local_addr();
    assert_eq!(plain(addr, get("/open/7")).await.0, 200);
    let mut refused = 0;
    for byte in (0x21..=0x7e_u8).filter(|byte| !b"/?#".contains(byte)).map(char::from).chain(['\u{e4}', '\u{4e2d}']) {
        for (path, expected) in [(format!("/admin/7{byte}"), 401), (format!("/closed/{byte}"), 403)] {
            let Ok(uri) = format!("http://shop.test{path}").parse::<http::Uri>() else { continue };
            for version in [http::Version::HTTP_11, http::Version::HTTP_2] {
                let request = Request::get(uri.clone()).body(http_body_util::Empty::new()).unwrap();
                let status = ask(version, addr, None, request).await.0;
                assert!(status == expected || status == 400, "{status}: {version:?} {path}");
                refused += usize::from(status == expected);
            }
        }
    }
    assert!(refused > 200, "{refused}");
}
