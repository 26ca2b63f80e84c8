//! Findings about Istio's security resources.

use super::*;

fn policy(kind: &str, spec: &str) -> String {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!("apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p}}\nspec:\n{spec}")
}

fn authorization(spec: &str) -> String {
    policy("AuthorizationPolicy", spec)
}

fn loaded(text: &str) -> Model {
    let (model, problems) = check(&[source("a.yaml", SERVICE), source("b.yaml", text)]);
    let errors: Vec<_> = problems.iter().filter(|p| p.severity == Severity::Error).collect();
    assert!(errors.is_empty(), "{errors:?}");
    model
}

#[test]
fn everything_istio_can_say_is_read_without_findings() {
    assert_findings(
        &authorization(
            "selector: {matchLabels: {version: v1}}
action: DENY
rules:
- from:
  - source:
      principals: [cluster.local/ns/a/sa/b, '*/sa/x', 'cluster.local/*', '*']
      notPrincipals: [cluster.local/ns/c/sa/d]
      namespaces: [a, 'b-*']
      notNamespaces: [c]
      ipBlocks: [10.0.0.0/8, '::1']
      notIpBlocks: [10.1.0.0/16]
      remoteIpBlocks: [1.2.3.4]
      notRemoteIpBlocks: [1.2.3.5]
  - source: {serviceAccounts: [b, ns/c], notServiceAccounts: [d]}
  to:
  - operation:
      hosts: [greeter, '*.example.com']
      notHosts: [x]
      ports: ['80']
      notPorts: ['81']
      methods: [GET]
      notMethods: [PUT]
      paths: [/a, /b*, '*/c', '/d/{*}/{**}']
      notPaths: [/e]
  when:
  - {key: 'request.headers[User-Agent]', values: ['x*'], notValues: [xy]}
  - {key: source.ip, values: [10.0.0.0/8]}
  - {key: remote.ip, notValues: [10.0.0.1]}
  - {key: source.namespace, values: [a]}
  - {key: source.principal, values: ['*']}
  - {key: destination.ip, values: [10.0.0.1]}
  - {key: destination.port, values: ['80']}
  - {key: connection.sni, values: [x.example.com]}
",
        ),
        &[],
    );
    assert_findings(
        &format!(
            "{}---\n{}",
            policy(
                "RequestAuthentication",
                "selector: {matchLabels: {version: v1}}
jwtRules:
- issuer: https://issuer.example
  audiences: [a, b]
  jwks: '{\"keys\": []}'
  fromHeaders: [{name: x-token, prefix: 'Bearer '}]
  fromParams: [token]
  fromCookies: [session]
  outputPayloadToHeader: x-payload
  outputClaimToHeaders: [{header: x-sub, claim: sub}]
  forwardOriginalToken: true
- {issuer: other, jwksUri: 'http://greeter.default.svc.cluster.local:50051/keys'}
"
            ),
            authorization(
                "rules:
- from: [{source: {requestPrincipals: ['*'], notRequestPrincipals: [a/b]}}]
  when:
  - {key: request.auth.principal, values: [a/b]}
  - {key: request.auth.audiences, values: [a]}
  - {key: request.auth.presenter, values: [a]}
  - {key: 'request.auth.claims[groups][x]', values: [a]}
"
            )
        ),
        &[],
    );
}

#[test]
fn peer_authentication_is_checked() {
    assert_findings(
        &policy("PeerAuthentication", "mtls: {mode: MAYBE}\nportLevelMtls: {80: {mode: STRICT}, x: {}}\nselectr: {}\n"),
        &[
            "b.yaml:5:16: unknown mtls.mode `MAYBE`: known are UNSET, DISABLE, PERMISSIVE, STRICT",
            "b.yaml:6:3: portLevelMtls needs a selector",
            "b.yaml:6:39: `x` is not a port number",
            "b.yaml:7:3: unknown field `selectr` in PeerAuthentication.spec: did you mean `selector`?",
        ],
    );
    let twice = policy("PeerAuthentication", "mtls: {mode: STRICT}\n");
    assert_findings(
        &format!("{twice}---\n{}", twice.replace("name: p", "name: q")),
        &["b.yaml:9:18: namespace default already has a PeerAuthentication, at b.yaml:3:18"],
    );
    let own = policy("PeerAuthentication", "selector: {matchLabels: {version: v1}}\nmtls: {mode: STRICT}\n");
    assert_findings(
        &format!("{own}---\n{}", own.replace("name: p", "name: q")),
        &["b.yaml:10:18: the endpoint at a.yaml:8:25 already has a PeerAuthentication, at b.yaml:3:18"],
    );
    assert_findings(
        &own.replace("{name: p}", "{name: p, namespace: istio-system}"),
        &[
            "b.yaml:3:18: warning: PeerAuthentication istio-system/p has no effect: in the root namespace it is about all \
           workloads, without a selector",
        ],
    );
}

#[test]
fn the_narrowest_peer_authentication_wins_and_unset_inherits() {
    let peer = |namespace: &str, name: &str, spec: &str| {
        policy("PeerAuthentication", spec).replace("{name: p}", &format!("{{name: {name}, namespace: {namespace}}}"))
    };
    let mesh = peer("istio-system", "mesh", "mtls: {mode: STRICT}\n");
    let unset = peer("default", "here", "mtls: {mode: UNSET}\n");
    let own = peer(
        "default",
        "own",
        "selector: {matchLabels: {version: v1}}\nmtls: {mode: DISABLE}\nportLevelMtls: {6001: {mode: PERMISSIVE}, 6002: {mode: UNSET}}\n",
    );
    let mode = |texts: &[&str], version: &str, port| {
        let labels = [("version".to_owned(), version.to_owned())].into();
        loaded(&texts.join("---\n")).security.mtls_mode("default", &labels, port, "istio-system")
    };
    use crate::model::MtlsMode::{Disable, Permissive, Strict};
    assert_eq!(mode(&[], "v1", 6001), None);
    assert_eq!(mode(&[&mesh, &unset], "v1", 6001), Some(Strict));
    assert_eq!(mode(&[&mesh, &unset, &own], "v1", 6001), Some(Permissive));
    assert_eq!(mode(&[&mesh, &unset, &own], "v1", 6002), Some(Disable));
    assert_eq!(mode(&[&mesh, &unset, &own], "v2", 6001), Some(Strict));
    assert_eq!(mode(&[&mesh, &peer("default", "here", "mtls: {mode: DISABLE}\n")], "v1", 6001), Some(Disable));
}

#[test]
fn an_authorization_policy_that_says_nothing_allows_nothing() {
    for text in [authorization("{}\n"), authorization("").replace("spec:\n", "")] {
        let model = loaded(&text);
        let policy = &model.security.authorizations[0];
        assert!(policy.rules.is_empty() && policy.refused.is_none());
        assert_eq!(policy.action, crate::model::AuthzAction::Allow);
    }
    assert_findings(
        &authorization("action: DENY\n"),
        &["b.yaml:3:18: warning: AuthorizationPolicy default/p has no rules: it matches no request"],
    );
}

#[test]
fn authorization_policy_is_checked_at_every_value() {
    assert_findings(
        &authorization(
            "action: PERMIT
selector: {matchLabels: {version: v9}}
targetRefs: [{kind: Gateway, name: g}]
rules:
- from: []
- from: [{source: {}}, {source: {principals: ['']}}, {sauce: {}}]
- from: [{source: {principals: ['spiffe://a/b'], ipBlocks: [10.0.0], serviceAccounts: ['a/b/c']}}]
- to: [{operation: {ports: ['99999'], paths: ['/a{id}', '/b*c']}}]
- when: [{key: request.header, values: [a]}, {key: source.ip}, {key: request.headers, values: [a]}]
- {to: [{operation: {methods: []}}], froom: []}
",
        ),
        &[
            "b.yaml:3:18: warning: AuthorizationPolicy default/p selects no endpoint",
            "b.yaml:5:11: unknown action `PERMIT`: known are ALLOW, DENY, AUDIT, CUSTOM",
            "b.yaml:7:3: targetRefs is not supported: use selector",
            "b.yaml:9:5: from is empty: leave it out, or say what it is",
            "b.yaml:10:21: the source says nothing",
            "b.yaml:10:49: an empty value matches nothing",
            "b.yaml:10:56: the item of from has no source",
            "b.yaml:10:57: unknown field `sauce` in an item of from: did you mean `source`?",
            "b.yaml:11:21: serviceAccounts do not go together with principals or namespaces",
            "b.yaml:11:35: `spiffe://a/b` has a scheme: a principal is written without spiffe://",
            "b.yaml:11:63: `10.0.0` is neither an IP address nor a range of them",
            "b.yaml:11:90: `a/b/c` is not a service account: NAME or NAMESPACE/NAME, without wildcards",
            "b.yaml:12:31: `99999` is not a port number",
            "b.yaml:12:49: `/a{id}` is not a template: an operator, {*} or {**}, is a segment of its own",
            "b.yaml:12:59: warning: `/b*c`: only a `*` at the beginning or the end is a wildcard",
            "b.yaml:13:18: unknown condition `request.header`: known are source.ip, remote.ip, source.namespace, \
             source.serviceAccount, source.principal, request.auth.principal, request.auth.audiences, \
             request.auth.presenter, destination.ip, destination.port, connection.sni, request.headers[NAME], \
             request.auth.claims[NAME]",
            "b.yaml:13:48: the condition has neither values nor notValues",
            "b.yaml:13:72: `request.headers`: expected request.headers[NAME]",
            "b.yaml:14:24: methods is empty: leave it out, or say what it is",
            "b.yaml:14:40: unknown field `froom` in a rule: did you mean `from`?",
        ],
    );
}

#[test]
fn what_cannot_be_honoured_refuses_the_policy_and_says_so() {
    let custom = authorization("action: CUSTOM\nprovider: {name: authz}\nrules: [{}]\n");
    assert_findings(
        &custom,
        &["b.yaml:5:11: warning: action CUSTOM is not supported: there is no external authorizer: the workloads that \
           this policy selects deny every request"],
    );
    let filter = authorization("rules:\n- when: [{key: 'experimental.envoy.filters.a[b]', values: [c]}]\n");
    assert_findings(
        &filter,
        &[
            "b.yaml:6:18: warning: the condition `experimental.envoy.filters.a[b]` is not supported: the workloads that \
           this policy selects deny every request",
        ],
    );
    for text in [custom, filter] {
        assert!(loaded(&text).security.authorizations[0].refused.is_some());
    }
}

#[test]
fn request_authentication_is_checked() {
    assert_findings(
        &policy(
            "RequestAuthentication",
            "jwtRules:
- {}
- {issuer: a, jwks: '[]'}
- {issuer: a, jwks: '{\"keys\": []}', jwksUri: 'http://x'}
- {issuer: a, jwksUri: 'ftp://x'}
- {issuer: a, jwksUri: 'https://keys.example/x', timeout: 5s}
- {issuer: a, jwksUri: 'http://greeter.default.svc.cluster.local/x', fromHeaders: [{}]}
",
        ),
        &[
            "b.yaml:6:5: the JWT rule has neither jwks nor jwksUri: keys are not discovered",
            "b.yaml:6:5: the JWT rule has no issuer",
            "b.yaml:7:23: jwks is not a JSON Web Key Set: an object with a list `keys`",
            "b.yaml:8:23: the JWT rule has both jwks and jwksUri",
            "b.yaml:9:26: `ftp://x` is not an http or https URI",
            "b.yaml:10:26: no ServiceEntry has the host keys.example",
            "b.yaml:10:52: warning: `timeout` is not honoured",
            "b.yaml:11:26: host greeter.default.svc.cluster.local has no port 80",
            "b.yaml:11:86: the header has no name",
        ],
    );
}

#[test]
fn keys_at_an_https_uri_want_tls() {
    let entry = "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: keys, namespace: default}
spec: {hosts: [keys.example], location: MESH_EXTERNAL, resolution: DNS, ports: [{number: 443, name: keys, protocol: HTTP}]}
";
    let rule = |tls: &str| {
        format!(
            "---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: keys, namespace: default}}
spec: {{host: keys.example, trafficPolicy: {{tls: {{{tls}}}}}}}
"
        )
    };
    let tokens = |uri: &str| policy("RequestAuthentication", &format!("jwtRules: [{{issuer: a, jwksUri: '{uri}'}}]\n"));
    let clear = "b.yaml:5:35: warning: no DestinationRule has TLS for keys.example:443: servers read no keys in the clear that an \
                 https URI names";
    for (uri, tls, found) in [
        ("https://keys.example/x", None, &[clear][..]),
        ("https://keys.example/x", Some("mode: DISABLE"), &[clear]),
        ("https://keys.example/x", Some("mode: SIMPLE, sni: keys.example, subjectAltNames: [keys.example]"), &[]),
        ("http://keys.example:443/x", None, &[]),
    ] {
        assert_findings(&(tokens(uri) + entry + &tls.map(rule).unwrap_or_default()), found);
    }
}

#[test]
fn a_policy_about_tokens_wants_to_know_some() {
    assert_findings(
        &authorization("rules: [{from: [{source: {requestPrincipals: ['*']}}]}]\n"),
        &[
            "b.yaml:5:29: warning: no RequestAuthentication is about the workloads of this policy: no token is ever known \
           to them",
        ],
    );
}

#[test]
fn what_a_server_would_refuse_is_said_at_its_place() {
    let text = authorization(
        "rules:
- to: [{operation: {methods: [GET]}}]
  when:
  - {key: 'request.headers[x-ok]', values: [a]}
  - {key: 'request.headers[grpc-timeout]', values: [a]}
",
    );
    let found = findings(&text);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("b.yaml:9:46: warning: mesh-client: principals[0]."), "{found:?}");
    let reason = "\"grpc-timeout\" cannot be matched (gRFC A41): the Listener is refused";
    assert!(found[0].ends_with(reason), "{found:?}");

    let text = policy(
        "RequestAuthentication",
        "jwtRules:
- {issuer: a, jwks: '{\"keys\": []}'}
- {issuer: b, jwks: '{\"keys\": []}', fromHeaders: [{name: 'x token'}]}
",
    );
    let found = findings(&text);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("b.yaml:7:"), "{found:?}");
    assert!(found[0].ends_with("\"x token\" is not the name of a header: the Listener is refused"), "{found:?}");
}
