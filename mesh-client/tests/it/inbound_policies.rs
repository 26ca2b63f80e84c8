//! Istio's security policies, from YAML to the answer that a caller gets.

use crate::{
    mtls::control_plane,
    support::{
        ANY, GUARD, TARGET, hello,
        inbound::{Polite, Serving},
        mesh_on, prompt_hello, routes, rule, service, to, until,
    },
};
use examples::greeter::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer};
use tonic::{Code, service::Routes};

fn document(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: default}}\nspec: {spec}\n"
    )
}

#[tokio::test]
async fn an_authorization_policy_lets_in_whom_it_says_and_changes_in_place() {
    let (cp, _dir) = control_plane().await;
    let server = mesh_on(&cp).await;
    let inbound = server.inbound(ANY).await.unwrap();
    let serving = Serving::of(inbound.clone(), Routes::new(GreeterServer::new(Polite)));
    let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let base = service(&[("one", serving.addr)])
        + &route
        + &rule("{tls: {mode: ISTIO_MUTUAL}}", &[])
        + &document("PeerAuthentication", "default", "{mtls: {mode: STRICT}}");
    let allow = |principal: &str, path: &str| {
        let spec = format!(
            "{{rules: [{{from: [{{source: {{principals: [\"{principal}\"]}}}}], to: [{{operation: {{paths: [\"{path}\"]}}}}]}}]}}"
        );
        base.clone() + &document("AuthorizationPolicy", "allow", &spec)
    };
    let client = "cluster.local/ns/default/sa/client";
    let hello_path = "/helloworld.Greeter/SayHello";
    cp.apply(&allow(client, hello_path)).await.unwrap();
    tokio::time::timeout(GUARD, inbound.ready()).await.unwrap();
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    until("the caller is let in", async || hello(&channel).await.is_ok()).await;
    let mut greeter = GreeterClient::new(channel.clone());
    let denied = greeter.say_hellos(HelloRequest { name: "x".into(), count: 1 }).await.unwrap_err();
    assert_eq!((denied.code(), denied.message()), (Code::PermissionDenied, "RBAC: access denied"));

    let code = async || prompt_hello(&channel).await.map_or_else(|status| status.code(), |_| Code::Ok);
    cp.apply(&allow("cluster.local/ns/default/sa/other", hello_path)).await.unwrap();
    until("another is let in", async || code().await == Code::PermissionDenied).await;
    cp.apply(&allow("*/sa/client", "/helloworld.Greeter/*")).await.unwrap();
    until("by the end of a name", async || code().await == Code::Ok).await;
    let deny = "{action: DENY, rules: [{from: [{source: {namespaces: [\"def*\"]}}], when: [{key: \"request.headers[x-no]\", notValues: [\"x\"]}]}]}";
    cp.apply(&(allow(client, "*") + &document("AuthorizationPolicy", "deny", deny))).await.unwrap();
    until("a denial wins", async || code().await == Code::PermissionDenied).await;
    cp.apply(&base).await.unwrap();
    until("without a policy everybody is let in", async || code().await == Code::Ok).await;
    let tokens = "{jwtRules: [{issuer: \"https://issuer\", jwks: '{\"keys\": []}'}]}";
    let required = "{action: DENY, rules: [{from: [{source: {notRequestPrincipals: [\"*\"]}}]}]}";
    let jwt = document("RequestAuthentication", "jwt", tokens) + &document("AuthorizationPolicy", "jwt", required);
    cp.apply(&(base.clone() + &jwt)).await.unwrap();
    until("a token is wanted", async || code().await == Code::PermissionDenied).await;
    let mut request = tonic::Request::new(HelloRequest { name: "x".into(), count: 1 });
    request.metadata_mut().insert("authorization", "Bearer a.b.c".parse().unwrap());
    let status = greeter.say_hello(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().starts_with("Jwt "), "{}", status.message());
}
