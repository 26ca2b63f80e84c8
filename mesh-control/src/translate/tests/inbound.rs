//! What servers are told. In the golden files each workload has at most one policy for an action: the maps of the generated types
//! print without an order.

use super::*;
use crate::model::MtlsMode;
use envoy_types::pb::envoy::config::core::v3::Node;
use serde_json::json;

const V1: &str = "xds.istio.io/grpc/lds/inbound/10.0.0.1:8080";
const V2: &str = "xds.istio.io/grpc/lds/inbound/10.0.0.2:81";
const EVERY: &str = "xds.istio.io/grpc/lds/inbound/0.0.0.0:8080";

fn policy(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: prod}}\nspec: {spec}\n"
    )
}

fn with(policies: &[String]) -> String {
    SERVICE.to_owned() + &policies.concat()
}

fn peers(spec: &str) -> String {
    policy("PeerAuthentication", "peers", spec)
}

fn authorization(name: &str, spec: &str) -> String {
    policy("AuthorizationPolicy", name, spec)
}

/// The listener of an address in words that show what counts.
fn listener(yaml: &str, name: &str) -> Listener {
    let set = translated(yaml);
    Listener::decode(set.get(ResourceType::Listener, name).unwrap_or_else(|| panic!("no {name}")).value.as_slice())
        .unwrap()
}

fn manager(listener: &Listener, chain: usize) -> HttpConnectionManager {
    use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
    let Some(ConfigType::TypedConfig(any)) = &listener.filter_chains[chain].filters[0].config_type else { panic!() };
    HttpConnectionManager::decode(any.value.as_slice()).unwrap()
}

fn filters(listener: &Listener) -> Vec<String> {
    manager(listener, 0).http_filters.into_iter().map(|filter| filter.name).collect()
}

#[test]
fn strict_server() {
    let yaml = with(&[peers("{mtls: {mode: STRICT}}")]);
    insta::assert_snapshot!(one(&yaml, ResourceType::Listener, V1));
}

#[test]
fn permissive_server_has_a_chain_for_each() {
    let permissive = listener(SERVICE, V1);
    let chains = permissive.filter_chains.iter().map(|chain| {
        let transport = chain.filter_chain_match.as_ref().map(|m| m.transport_protocol.as_str());
        (chain.name.as_str(), transport, chain.transport_socket.is_some())
    });
    assert_eq!(
        chains.collect::<Vec<_>>(),
        [("inbound-mtls", Some("tls"), true), ("inbound-plaintext", Some("raw_buffer"), false)]
    );
    let disabled = listener(&with(&[peers("{mtls: {mode: DISABLE}}")]), V1);
    assert_eq!(disabled.filter_chains.len(), 1);
    assert!(disabled.filter_chains[0].transport_socket.is_none());
}

#[test]
fn every_condition_of_an_authorization_policy() {
    let spec = r#"
  action: DENY
  rules:
  - from:
    - source: {principals: [td/ns/a/sa/b, 'td/*', '*/sa/x.y', '*'], notPrincipals: [td/ns/c/sa/d]}
    - source: {namespaces: ['a-*'], notNamespaces: [b]}
    - source: {serviceAccounts: [c, d/e]}
    - source: {ipBlocks: [10.0.0.0/8], notIpBlocks: ['::1'], remoteIpBlocks: [1.2.3.4], notRemoteIpBlocks: [1.2.0.0/16]}
    to:
    - operation: {hosts: [a.example, '*'], notHosts: ['*.b'], ports: ["80"], notPorts: ["81"]}
    - operation: {methods: [GET], notMethods: ['P*'], paths: [/a, '/b*', '*/c', '/d/{*}/{**}'], notPaths: [/e]}
    when:
    - {key: 'request.headers[X-A]', values: ['*', 'b*'], notValues: [c]}
    - {key: source.namespace, values: [n]}
    - {key: destination.ip, values: [10.0.0.1]}
    - {key: destination.port, notValues: ["1"]}
    - {key: connection.sni, values: ['*.c']}"#;
    let yaml = with(&[authorization("deny", spec), peers("{mtls: {mode: DISABLE}}")]);
    insta::assert_snapshot!(folded(&one(&yaml, ResourceType::Listener, V1)));
}

#[test]
fn every_condition_on_tokens() {
    let spec = r#"
  rules:
  - from: [{source: {requestPrincipals: ['https://i/s', '*', 'https://i/*', '*/s', 'i/s*', '*x', 'y*']}}]
    when:
    - {key: request.auth.principal, notValues: [i/s]}
    - {key: request.auth.audiences, values: [a, 'b*']}
    - {key: request.auth.presenter, values: [p]}
    - {key: 'request.auth.claims[groups][sub]', values: [g], notValues: [h]}"#;
    let tokens = r#"
  jwtRules:
  - issuer: https://i
    audiences: [a]
    jwks: '{"keys":[]}'
    fromHeaders: [{name: x-token, prefix: "Token "}]
    fromParams: [token]
    fromCookies: [session]
    outputPayloadToHeader: x-payload
    outputClaimToHeaders: [{header: x-sub, claim: sub}]
    forwardOriginalToken: true"#;
    let plain = peers("{mtls: {mode: DISABLE}}");
    let yaml = with(&[authorization("allow", spec), policy("RequestAuthentication", "tokens", tokens), plain]);
    insta::assert_snapshot!(folded(&one(&yaml, ResourceType::Listener, V1)));
}

#[test]
fn several_issuers_are_alternatives_and_all_optional() {
    let tokens = r#"
  jwtRules:
  - {issuer: b, jwksUri: 'http://greeter.example/keys'}
  - {issuer: a, jwks: '{"keys":[]}'}"#;
    let listener = listener(&with(&[policy("RequestAuthentication", "tokens", tokens)]), V1);
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
    let filters = manager(&listener, 0).http_filters;
    let Some(ConfigType::TypedConfig(any)) = &filters[0].config_type else { panic!() };
    let config = JwtAuthentication::decode(any.value.as_slice()).unwrap();
    assert_eq!(
        (config.providers["origins-0"].issuer.as_str(), config.providers["origins-1"].issuer.as_str()),
        ("a", "b")
    );
    let remote = format!("{:?}", config.providers["origins-1"].jwks_source_specifier);
    assert!(remote.contains("http://greeter.example/keys") && remote.contains(CLUSTER), "{remote}");
    let requires =
        format!("{:?}", config.rules[0].requirement_type).replace("JwtRequirement { requires_type: Some", "");
    let order: Vec<_> = ["RequiresAny", "\"origins-0\"", "\"origins-1\"", "RequiresAll", "AllowMissing"]
        .into_iter()
        .map(|part| requires.find(part).unwrap_or_else(|| panic!("{part}: {requires}")))
        .collect();
    assert!(order.is_sorted(), "{requires}");
}

#[test]
fn filters_stand_in_the_order_audit_deny_allow() {
    let yaml = with(&[
        authorization("allow", "{rules: [{}]}"),
        authorization("deny", "{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}"),
        authorization("audit", "{action: AUDIT, rules: [{}]}"),
        policy("RequestAuthentication", "tokens", "{jwtRules: [{issuer: a, jwks: '{\"keys\":[]}'}]}"),
    ]);
    let rbac = "envoy.filters.http.rbac";
    let expected = [
        "envoy.filters.http.jwt_authn",
        &format!("{rbac}.AUDIT"),
        &format!("{rbac}.DENY"),
        rbac,
        "envoy.filters.http.router",
    ];
    assert_eq!(filters(&listener(&yaml, V1)), expected);
    assert_eq!(filters(&listener(SERVICE, V1)), ["envoy.filters.http.router"], "without a policy there is no filter");
}

/// The RBAC filter of this name.
fn rbac(listener: &Listener, name: &str) -> HttpRbac {
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
    let filters = manager(listener, 0).http_filters;
    let filter = filters.iter().find(|filter| filter.name == name).unwrap_or_else(|| panic!("no {name}"));
    let Some(ConfigType::TypedConfig(any)) = &filter.config_type else { panic!() };
    HttpRbac::decode(any.value.as_slice()).unwrap()
}

#[test]
fn a_policy_without_rules_allows_nothing_and_a_refused_one_denies_everything() {
    let nothing =
        rbac(&listener(&with(&[authorization("nothing", "{}")]), V1), "envoy.filters.http.rbac").rules.unwrap();
    let policy = format!("{:?}", nothing.policies["ns[prod]-policy[nothing]-rule[0]"]);
    assert!(policy.contains("NotRule(Permission { rule: Some(Any(true)) })"), "{policy}");
    assert!(policy.contains("NotId(Principal { identifier: Some(Any(true)) })"), "{policy}");

    let custom =
        authorization("custom", "{action: CUSTOM, provider: {name: p}, rules: [{to: [{operation: {paths: [/a]}}]}]}");
    let refused = rbac(&listener(&with(&[custom]), V1), "envoy.filters.http.rbac.DENY").rules.unwrap();
    let policy = format!("{:?}", refused.policies["ns[prod]-policy[custom]-refused"]);
    assert!(policy.contains("permissions: [Permission { rule: Some(Any(true)) }]"), "{policy}");
}

#[test]
fn a_policy_on_trial_is_told_about_only() {
    let trial = authorization("trial", "{action: DENY, rules: [{}]}")
        .replace("namespace: prod}", "namespace: prod, annotations: {istio.io/dry-run: 'true'}}");
    let rbac = rbac(&listener(&with(&[trial]), V1), "envoy.filters.http.rbac.DENY");
    assert_eq!(rbac.rules, None);
    assert_eq!(rbac.shadow_rules.unwrap().policies.len(), 1);
    assert_eq!(rbac.shadow_rules_stat_prefix, "istio_dry_run_deny_");
}

#[test]
fn the_same_model_yields_the_same_bytes_however_many_policies() {
    let policies: Vec<_> = (0..20).map(|n| authorization(&format!("p{n}"), "{rules: [{}, {}]}")).collect();
    let yaml = with(&policies);
    let bytes = |_| translated(&yaml).get(ResourceType::Listener, V1).cloned();
    assert!((0..5).map(bytes).all(|other| other == bytes(0)));
    let listener = listener(&yaml, V1);
    assert_eq!(rbac(&listener, "envoy.filters.http.rbac").rules.unwrap().policies.len(), 40);
}

#[test]
fn policies_are_of_the_workloads_that_they_select() {
    let yaml = with(&[
        authorization("v2", "{selector: {matchLabels: {version: v2}}, rules: [{}]}"),
        authorization("other", "{action: DENY, rules: [{}]}").replace("namespace: prod", "namespace: elsewhere"),
        authorization("mesh", "{action: AUDIT, rules: [{}]}").replace("namespace: prod", "namespace: istio-system"),
    ]);
    let (audit, router) = ("envoy.filters.http.rbac.AUDIT", "envoy.filters.http.router");
    assert_eq!(filters(&listener(&yaml, V1)), [audit, router]);
    assert_eq!(filters(&listener(&yaml, V2)), [audit, "envoy.filters.http.rbac", router]);
}

#[test]
fn on_a_shared_port_the_node_says_who_it_is_and_obeys_everything_otherwise() {
    // 10.0.0.1 and ::1 both serve on 8080: the first with labels and an account, the second with a policy of its own.
    let yaml = with(&[
        authorization("v1", "{selector: {matchLabels: {version: v1}}, rules: [{}]}"),
        authorization("v2", "{selector: {matchLabels: {version: v2}}, action: DENY, rules: [{}]}"),
    ]);
    let set = translated(&yaml);
    let filters_for = |node: serde_json::Value| {
        let text = |v: &serde_json::Value| Value { kind: Some(Kind::StringValue(v.as_str().unwrap().to_owned())) };
        let fields = node.as_object().unwrap().iter().filter(|(key, _)| *key != "id").map(|(key, value)| {
            let value = match value.as_object() {
                None => text(value),
                Some(map) => {
                    let fields = map.iter().map(|(key, value)| (key.clone(), text(value))).collect();
                    Value { kind: Some(Kind::StructValue(Struct { fields })) }
                }
            };
            (key.clone(), value)
        });
        let node = Node {
            id: node["id"].as_str().unwrap_or_default().to_owned(),
            metadata: Some(Struct { fields: fields.collect() }),
            ..Node::default()
        };
        let any = set.get_for(&node, ResourceType::Listener, EVERY).unwrap();
        filters(&Listener::decode(any.value.as_slice()).unwrap())
    };
    let (deny, allow, router) =
        ("envoy.filters.http.rbac.DENY", "envoy.filters.http.rbac", "envoy.filters.http.router");
    for v1 in [json!({"id": "sidecar~10.0.0.1~a.prod~x"}), json!({"LABELS": {"version": "v1"}})] {
        assert_eq!(filters_for(v1), [allow, router]);
    }
    assert_eq!(filters_for(json!({"SERVICE_ACCOUNT": "two", "id": "sidecar~::1~a~x"})), [deny, router]);
    for unknown in [json!({}), json!({"NAMESPACE": "prod"}), json!({"NAMESPACE": "elsewhere"})] {
        let mut all = filters_for(unknown);
        all.sort();
        assert_eq!(all, [allow, deny, router]);
    }
}

#[test]
fn clients_speak_mutual_tls_to_whoever_takes_nothing_else() {
    let cluster = |yaml: &str, mtls| {
        let loaded = load(&[Source::inline(yaml)]).unwrap();
        let set = translate(&loaded.model, &Options { mtls, ..Options::default() });
        let cluster = Cluster::decode(set.get(ResourceType::Cluster, CLUSTER).unwrap().value.as_slice()).unwrap();
        let any = set.get(ResourceType::ClusterLoadAssignment, CLUSTER).unwrap();
        let endpoints = ClusterLoadAssignment::decode(any.value.as_slice()).unwrap();
        let marked = endpoints.endpoints.iter().flat_map(|l| &l.lb_endpoints).filter(|e| e.metadata.is_some()).count();
        (cluster.transport_socket.is_some(), cluster.transport_socket_matches.len(), marked)
    };
    assert_eq!(cluster(SERVICE, MtlsMode::Permissive), (false, 0, 0));
    assert_eq!(cluster(SERVICE, MtlsMode::Strict), (true, 0, 0));
    let some = with(&[peers("{selector: {matchLabels: {version: v2}}, mtls: {mode: STRICT}}")]);
    assert_eq!(cluster(&some, MtlsMode::Permissive), (false, 2, 2));
    let labelled = SERVICE.replace("version: v1", "version: v1, security.istio.io/tlsMode: istio");
    assert_eq!(cluster(&labelled, MtlsMode::Permissive), (false, 2, 1));
    assert_eq!(cluster(&(labelled + &peers("{mtls: {mode: DISABLE}}")), MtlsMode::Permissive), (false, 0, 0));
    let rule = with_rule("trafficPolicy: {tls: {mode: DISABLE}}");
    assert_eq!(cluster(&rule, MtlsMode::Strict), (false, 0, 0), "what a DestinationRule says holds");
}

#[test]
fn endpoints_that_speak_mutual_tls_among_others() {
    let yaml = with(&[peers("{selector: {matchLabels: {version: v1}}, mtls: {mode: STRICT}}")]);
    let types = [ResourceType::Cluster, ResourceType::ClusterLoadAssignment];
    insta::assert_snapshot!(all(&yaml, &types));
}
