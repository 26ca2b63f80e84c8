//! Istio's authority signs our certificates, and its policies are obeyed on both sides.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use interop::istiod::{Istiod, Workload};
use interop::{Outcome, free_addr, report};
use mesh_client::inbound::JwtProvider;
use mesh_client::{Inbound, Mesh, MeshChannel, TlsRenewal};
use mesh_tls::{CaAuth, CaTls, IstioCaConfig, IstioCaSource, ServerSettings, Source, default_provider};

use crate::common::{call, call_plainly, listed, serve};
use crate::istio_authority::{Issuer, roots};

const GREETER: &str = "xds:///greeter.default.svc.cluster.local:50051";
const USURPED: &str = "xds:///usurped.default.svc.cluster.local:50051";
/// Guards against a wait that never ends.
const READY: Duration = Duration::from_secs(60);

/// The greeter at `greeter`, and a service at `usurped` that is said to be the greeter's account too.
fn services(greeter: SocketAddr, usurped: SocketAddr) -> String {
    let service = |name: &str, addr: SocketAddr| {
        format!(
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{name}.default.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 50051, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: {}, ports: {{grpc: {}}}, serviceAccount: greeter, labels: {{app: {name}}}}}]
---
",
            addr.ip(),
            addr.port()
        )
    };
    service("greeter", greeter) + &service("usurped", usurped)
}

/// Mutual TLS and nothing else, on both sides.
const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: all, namespace: default}
spec:
  host: '*.default.svc.cluster.local'
  trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}
---
";

/// Servers that istiod gives one filter chain, which takes plaintext.
const PERMISSIVE: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: PERMISSIVE}}
---
";

/// The greeter lets in whom this says.
fn allow(from: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: greeter, namespace: default}}
spec:
  selector: {{matchLabels: {{app: greeter}}}}
  action: ALLOW
  rules: [{{from: [{{source: {from}}}], to: [{{operation: {{paths: [/helloworld.Greeter/*]}}}}]}}]
"
    )
}

/// Principals of these accounts.
fn account(name: &str) -> String {
    format!("{{principals: [cluster.local/ns/default/sa/{name}]}}")
}

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

/// A workload: what istiod's authority signed for it, and its mesh.
struct Member {
    certificates: Arc<IstioCaSource>,
    mesh: Mesh,
}

impl Member {
    /// By its token, with certificates that last so long.
    async fn join(istiod: &Istiod, token: PathBuf, name: &str, address: IpAddr, lifetime: Duration) -> Self {
        let tls = CaTls::Verified { roots: roots(&istiod.roots()), server_name: None };
        let auth = CaAuth::TokenFile(token.clone());
        let mut config = IstioCaConfig::new(name, istiod.tls_addr().to_string(), tls, auth, default_provider());
        config.spiffe_id = Some(spiffe(name).parse().unwrap());
        config.lifetime = lifetime;
        let certificates = Arc::new(IstioCaSource::new(config, &tokio::runtime::Handle::current()).unwrap());
        let bootstrap = istiod.bootstrap_of(&Workload { account: name, address, app: name, token: &token });
        let mesh = Mesh::builder()
            .bootstrap_json(&bootstrap)
            .unwrap()
            .certificate_provider("default", certificates.clone())
            // By default it takes ten seconds until connections have the new certificates.
            .tls_renewal(TlsRenewal::Within(Duration::from_millis(500)))
            .build()
            .await
            .unwrap();
        Self { certificates, mesh }
    }

    /// Who it is by its certificate.
    async fn identity(&self) -> String {
        let signed = tokio::time::timeout(READY, mesh_tls::ready(&*self.certificates)).await;
        let signed = signed.unwrap_or_else(|_| panic!("istiod signed nothing: {:?}", self.certificates.last_error()));
        signed.identity.as_ref().unwrap().spiffe_id().unwrap().to_string()
    }

    async fn channel(&self, target: &str) -> MeshChannel {
        let channel = self.mesh.channel(target).unwrap();
        channel.ready(READY).await.unwrap();
        channel
    }

    /// Serves at `addr` as istiod says.
    async fn serve(&self, addr: SocketAddr) -> Inbound {
        let inbound = self.mesh.inbound(addr).await.unwrap();
        serve(&inbound);
        let ready = tokio::time::timeout(READY, inbound.ready()).await;
        ready.unwrap_or_else(|_| panic!("istiod does not know the server: {:?}", inbound.serving()));
        inbound
    }
}

/// Calls until it comes out so.
async fn until(what: &str, channel: &MeshChannel, wanted: impl Fn(&Outcome) -> bool) -> Outcome {
    let came = async {
        loop {
            let seen = call(channel.clone(), 10, &[]).await;
            if wanted(&seen) {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(READY, came).await.unwrap_or_else(|_| panic!("{what}: it does not come"))
}

/// Where the greeter and the other service are.
fn addresses() -> [SocketAddr; 2] {
    [1, 2].map(|number| free_addr(IpAddr::V4(Ipv4Addr::new(127, 0, 1, number))).unwrap())
}

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 2, 1));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 2, 2));
const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn istiod_signs_us_and_its_policies_are_obeyed_on_both_sides() {
    let issuer = Issuer::start().await;
    let [addr, usurped] = addresses();
    let services = services(addr, usurped);
    let yaml = services.clone() + STRICT + &allow(&account("client"));
    let mut istiod = Istiod::start_with_authority(&yaml, &issuer.authority()).await.unwrap();
    let greeter = Member::join(&istiod, issuer.token_file("greeter"), "greeter", addr.ip(), DAY).await;
    let client = Member::join(&istiod, issuer.token_file("client"), "client", CLIENT, DAY).await;
    let stranger = Member::join(&istiod, issuer.token_file("stranger"), "stranger", STRANGER, DAY).await;
    for (member, name) in [(&greeter, "greeter"), (&client, "client"), (&stranger, "stranger")] {
        assert_eq!(member.identity().await, spiffe(name));
    }
    let path = "istiod's authority -> mesh";
    report::row(path, "certificates by CSR and token", "signed below an intermediate: greeter, client, stranger");

    // The server.
    let inbound = greeter.serve(addr).await;
    let (to_greeter, as_stranger) = (client.channel(GREETER).await, stranger.channel(GREETER).await);
    let allowed = call(to_greeter.clone(), 20, &[]).await;
    assert_eq!(allowed.ended_with("OK"), 20, "{allowed:?}");
    assert_eq!(allowed.callers.get(&client.identity().await), Some(&20), "{allowed:?}");
    let denied = call(as_stranger.clone(), 20, &[]).await;
    assert_eq!(denied.ended_with("PERMISSION_DENIED"), 20, "{denied:?}");
    let plain = call_plainly(addr).await;
    assert_eq!(plain.ended_with("UNAVAILABLE"), 1, "{plain:?}");
    let path = "istiod's STRICT -> mesh server";
    report::row(path, "mTLS, the caller's identity", &listed(&allowed.callers));
    report::row(
        path,
        "another account, and plain text",
        &format!("{}; {}", listed(&denied.codes), listed(&plain.codes)),
    );

    // The client: the same certificates, but not the account that istiod names.
    let identity = ServerSettings::mtls(stranger.certificates.clone());
    let impostor = Inbound::builder().tls(identity).bind(usurped).await.unwrap();
    serve(&impostor);
    let refused = call(client.channel(USURPED).await, 3, &[]).await;
    assert_eq!(refused.ended_with("UNAVAILABLE"), 3, "{refused:?}");
    let why = refused.details.keys().next().unwrap();
    assert!(why.contains(&spiffe("greeter")) && why.contains(&spiffe("stranger")), "{why}");
    report::row("istiod's STRICT -> mesh client", "a server of another account", &listed(&refused.codes));

    // Changes take hold on the connections that are open.
    istiod.apply(&(services.clone() + STRICT + &allow(&account("stranger")))).unwrap();
    until("the stranger is allowed", &as_stranger, |seen| seen.ended_with("OK") == 10).await;
    let denied = call(to_greeter.clone(), 10, &[]).await;
    assert_eq!(denied.ended_with("PERMISSION_DENIED"), 10, "{denied:?}");

    // Conditions on tokens come without what verifies tokens: they hold for nobody, whatever is sent.
    istiod.apply(&(services.clone() + STRICT + &allow("{requestPrincipals: ['*']}"))).unwrap();
    until("a token is asked for", &as_stranger, |seen| seen.ended_with("PERMISSION_DENIED") == 10).await;
    let forged = call(to_greeter.clone(), 1, &[("authorization", "Bearer e30.e30.e30")]).await;
    assert_eq!(forged.ended_with("PERMISSION_DENIED"), 1, "{forged:?}");

    // PERMISSIVE is plaintext alone for gRPC servers, and a client without DestinationRule speaks it.
    istiod.apply(&(services + PERMISSIVE + &allow("{ipBlocks: [127.0.0.0/8]}"))).unwrap();
    let open = until("plaintext is taken", &to_greeter, |seen| seen.ended_with("OK") == 10).await;
    assert_eq!(open.callers.get(""), Some(&10), "{open:?}");
    let plain = call_plainly(addr).await;
    assert_eq!(plain.ended_with("OK"), 1, "{plain:?}");
    report::row("istiod -> mesh server", "AuthorizationPolicy, PERMISSIVE", "changed in place on open connections");

    assert!(inbound.serving().is_serving());
    istiod.acknowledged().await.unwrap();
    istiod.running().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn tokens_that_code_verifies_are_what_conditions_of_istiod_ask_about() {
    let issuer = Issuer::start().await;
    let [addr, usurped] = addresses();
    let yaml =
        services(addr, usurped) + STRICT + &allow("{requestPrincipals: ['*/system:serviceaccount:default:user']}");
    let mut istiod = Istiod::start_with_authority(&yaml, &issuer.authority()).await.unwrap();
    let greeter = Member::join(&istiod, issuer.token_file("greeter"), "greeter", addr.ip(), DAY).await;
    let client = Member::join(&istiod, issuer.token_file("client"), "client", CLIENT, DAY).await;
    let tokens = JwtProvider::inline(issuer.url(), issuer.keys()).audience("istio-ca").optional();
    let inbound = greeter.mesh.inbound_builder().unwrap().jwt(tokens).bind(addr).await.unwrap();
    serve(&inbound);
    let channel = client.channel(GREETER).await;
    let bearer = |account: &str| -> &'static str {
        let token = std::fs::read_to_string(issuer.token_file(account)).unwrap();
        format!("Bearer {}", token.trim()).leak()
    };
    let mut seen = Vec::new();
    for (headers, code) in [
        (vec![], "PERMISSION_DENIED"),
        (vec![("authorization", "Bearer e30.e30.e30")], "UNAUTHENTICATED"),
        (vec![("authorization", bearer("other"))], "PERMISSION_DENIED"),
        (vec![("authorization", bearer("user"))], "OK"),
    ] {
        let outcome = call(channel.clone(), 5, &headers).await;
        assert_eq!(outcome.ended_with(code), 5, "{headers:?}: {outcome:?}");
        seen.push(format!("{code} 5"));
    }
    istiod.running().unwrap();
    report::row("istiod -> mesh server", "requestPrincipals: no token, bad, other, right", &seen.join(", "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn certificates_of_istiod_are_renewed_under_calls() {
    let issuer = Issuer::start().await;
    let [addr, usurped] = addresses();
    let yaml = services(addr, usurped) + STRICT + &allow(&account("client"));
    let mut istiod = Istiod::start_with_authority(&yaml, &issuer.authority()).await.unwrap();
    let lifetime = Duration::from_secs(4);
    let greeter = Member::join(&istiod, issuer.token_file("greeter"), "greeter", addr.ip(), lifetime).await;
    let client = Member::join(&istiod, issuer.token_file("client"), "client", CLIENT, lifetime).await;
    let _inbound = greeter.serve(addr).await;
    let channel = client.channel(GREETER).await;

    // Beyond the life of the first ones.
    let mut calls = 0;
    let first = [&greeter, &client].map(|member| member.certificates.current().generation);
    let renewed = |member: &Member, first: u64| member.certificates.current().generation - first;
    let under_calls = async {
        while renewed(&greeter, first[0]) < 4 || renewed(&client, first[1]) < 4 {
            let seen = call(channel.clone(), 50, &[]).await;
            assert_eq!(seen.ended_with("OK"), 50, "after {calls} calls: {seen:?}");
            assert_eq!(seen.callers.get(&spiffe("client")), Some(&50), "{seen:?}");
            calls += 50;
        }
    };
    tokio::time::timeout(READY, under_calls).await.expect("certificates are renewed");

    // By the certificate alone, with no token.
    let tls = CaTls::Verified { roots: roots(&istiod.roots()), server_name: None };
    let auth = CaAuth::Certificate(client.certificates.clone());
    let config = IstioCaConfig::new("again", istiod.tls_addr().to_string(), tls, auth, default_provider());
    let again = Arc::new(IstioCaSource::new(config, &tokio::runtime::Handle::current()).unwrap());
    let again = Member { certificates: again, mesh: client.mesh.clone() };
    assert_eq!(again.identity().await, spiffe("client"));
    istiod.running().unwrap();
    let times = renewed(&greeter, first[0]) + renewed(&client, first[1]);
    let seen = format!("renewed {times} times under {calls} calls, 0 failed");
    report::row("istiod's authority -> mesh", "certificates of 4 s, by token; by certificate", &seen);
}
