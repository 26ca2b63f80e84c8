//! The SPIFFE Workload API, against an agent on a socket.

use crate::support::*;
use futures::{Stream, StreamExt, stream};
use mesh_tls::{
    Source, SvidChoice, WorkloadApiConfig, WorkloadApiSource, WorkloadEndpoint,
    grpc::{
        JwtBundlesRequest, JwtBundlesResponse, JwtSvid, JwtSvidRequest, JwtSvidResponse, Replies,
        ValidateJwtSvidRequest, ValidateJwtSvidResponse, WorkloadApi, WorkloadApiServer, X509BundlesRequest,
        X509BundlesResponse, X509Svid, X509SvidRequest, X509SvidResponse,
    },
    ready,
};
use std::{io, path::Path, sync::Arc};
use tokio::{
    net::{TcpListener, UnixListener},
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
};
use tonic::{Request, Response, Status, transport::Server};

/// An agent that sends the newest message to everyone, or knows nobody.
struct Agent(watch::Receiver<Option<X509SvidResponse>>);

type Latest = watch::Sender<Option<X509SvidResponse>>;

impl WorkloadApi for Agent {
    async fn fetch_x509_svid(
        &self,
        _: Request<X509SvidRequest>,
    ) -> Result<Response<Replies<X509SvidResponse>>, Status> {
        let mut latest = self.0.clone();
        if latest.borrow().is_none() {
            return Err(Status::permission_denied("no identity issued"));
        }
        latest.mark_changed();
        let replies = stream::unfold(latest, |mut latest| async {
            latest.changed().await.ok()?;
            let message = latest.borrow_and_update().clone()?;
            Some((Ok(message), latest))
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<X509BundlesRequest>,
    ) -> Result<Response<Replies<X509BundlesResponse>>, Status> {
        let bundles = self.0.borrow().iter().flat_map(|m| m.federated_bundles.clone()).collect();
        Ok(Response::new(stream::iter([Ok(X509BundlesResponse { crl: vec![], bundles })]).boxed()))
    }

    async fn fetch_jwt_svid(&self, request: Request<JwtSvidRequest>) -> Result<Response<JwtSvidResponse>, Status> {
        let request = request.into_inner();
        let id = if request.spiffe_id.is_empty() { ALICE.to_owned() } else { request.spiffe_id };
        // {"exp":4102444800}
        let svid = format!("head-{}.eyJleHAiOjQxMDI0NDQ4MDB9.signature", request.audience.join("+"));
        Ok(Response::new(JwtSvidResponse { svids: vec![JwtSvid { spiffe_id: id, svid, hint: String::new() }] }))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<JwtBundlesRequest>,
    ) -> Result<Response<Replies<JwtBundlesResponse>>, Status> {
        Err(Status::unimplemented("none"))
    }

    async fn validate_jwt_svid(
        &self,
        request: Request<ValidateJwtSvidRequest>,
    ) -> Result<Response<ValidateJwtSvidResponse>, Status> {
        let svid = request.into_inner().svid;
        Ok(Response::new(ValidateJwtSvidResponse { spiffe_id: svid, claims: None }))
    }
}

fn serve_unix(path: &Path, agent: &Latest) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    serve(stream::unfold(listener, |l| async { Some((l.accept().await.map(|(io, _)| io), l)) }), agent)
}

fn serve<IO>(incoming: impl Stream<Item = io::Result<IO>> + Send + 'static, agent: &Latest) -> JoinHandle<()>
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + tonic::transport::server::Connected + Unpin + Send + 'static,
{
    let server = WorkloadApiServer::new(Agent(agent.subscribe()));
    tokio::spawn(async { Server::builder().add_service(server).serve_with_incoming(incoming).await.unwrap() })
}

fn svid(ca: &Ca, id: &str) -> X509Svid {
    let (chain, key) = ca.svid(id).der();
    X509Svid {
        spiffe_id: id.into(),
        x509_svid: chain.concat(),
        x509_svid_key: key,
        bundle: ca.der().to_vec(),
        hint: String::new(),
    }
}

fn message(svids: Vec<X509Svid>) -> X509SvidResponse {
    X509SvidResponse { svids, ..X509SvidResponse::default() }
}

fn follow(endpoint: WorkloadEndpoint, svid: SvidChoice) -> Arc<WorkloadApiSource> {
    let config = WorkloadApiConfig { svid, ..WorkloadApiConfig::new("agent", endpoint, provider()) };
    Arc::new(WorkloadApiSource::new(config, &Handle::current()))
}

async fn generation(source: &WorkloadApiSource, at_least: u64) {
    source.changed().wait_for(|now| *now >= at_least).await.unwrap();
}

#[tokio::test]
async fn identities_bundles_and_their_changes_come_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let mut first = message(vec![svid(&ours, ALICE)]);
    first.federated_bundles.insert("spiffe://far".into(), theirs.der().to_vec());
    let agent = Latest::new(Some(first));
    let serving = serve_unix(&socket, &agent);

    let source = follow(WorkloadEndpoint::Unix(socket.clone()), SvidChoice::Default);
    let material = ready(&*source).await;
    assert_eq!(material.identity.as_ref().unwrap().spiffe_id().unwrap().as_str(), ALICE);
    let server = mtls_server(&source);
    let near = mtls_client(&crate::support::source(&ours.svid(BOB), ours.roots()));
    let far = mtls_client(&crate::support::source(&theirs.svid("spiffe://far/carol"), ours.roots()));
    let liar = mtls_client(&crate::support::source(&theirs.svid(BOB), ours.roots()));
    assert_eq!(handshake(&near, &server, None).await.1.unwrap().peer().unwrap().to_string(), BOB);
    assert_eq!(handshake(&far, &server, None).await.1.unwrap().peer().unwrap().to_string(), "spiffe://far/carol");
    let refused = handshake(&liar, &server, None).await.1.unwrap_err().to_string();
    assert!(refused.contains("trust for trust domain td"), "{refused}");

    // what cannot be used changes nothing, and what comes after it counts
    let mut foreign = svid(&ours, ALICE);
    foreign.x509_svid_key = svid(&ours, ALICE).x509_svid_key.clone();
    agent.send_replace(Some(message(vec![foreign])));
    until(|| source.last_error().is_some()).await;
    let said = source.last_error().unwrap();
    assert!(said.contains("the private key does not belong to the certificate"), "{said}");
    assert_eq!(source.current().generation, 1);
    agent.send_replace(Some(message(vec![svid(&ours, "spiffe://td/renamed")])));
    generation(&source, 2).await;
    assert_eq!(source.last_error(), None);
    let (near, _) = handshake(&near, &server, None).await;
    assert_eq!(near.unwrap().1.to_string(), "spiffe://td/renamed");
    // the bundle of the federated domain was withdrawn with this message
    assert!(handshake(&far, &server, None).await.1.unwrap_err().to_string().contains("trust domain far is not one"));

    // the agent restarts: nothing is lost meanwhile, and it is found again
    serving.abort();
    agent.send_replace(None);
    until(|| source.last_error().is_some()).await;
    assert_eq!(source.current().generation, 2);
    std::fs::remove_file(&socket).unwrap();
    agent.send_replace(Some(message(vec![svid(&ours, BOB)])));
    let _serving = serve_unix(&socket, &agent);
    generation(&source, 3).await;
    assert_eq!(source.current().identity.as_ref().unwrap().name(), BOB);
}

#[tokio::test]
async fn members_of_federated_domains_are_trusted_where_they_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let mut first = message(vec![svid(&ours, ALICE)]);
    for domain in ["spiffe://far", "spiffe://farther"] {
        first.federated_bundles.insert(domain.into(), theirs.der().to_vec());
    }
    let _serving = serve_unix(&socket, &Latest::new(Some(first)));
    let far = mtls_client(&source(&theirs.svid("spiffe://far/carol"), ours.roots()));
    let near = mtls_client(&source(&ours.svid(BOB), ours.roots()));
    for (federated, trusted) in
        [(None, true), (Some(vec!["far"]), true), (Some(vec!["farther"]), false), (Some(vec![]), false)]
    {
        let mut config = WorkloadApiConfig::new("agent", WorkloadEndpoint::Unix(socket.clone()), provider());
        config.federated = federated.clone().map(|all| all.iter().map(|one| one.parse().unwrap()).collect());
        let agent = Arc::new(WorkloadApiSource::new(config, &Handle::current()));
        ready(&*agent).await;
        let server = mtls_server(&agent);
        assert_eq!(handshake(&far, &server, None).await.1.is_ok(), trusted, "{federated:?}");
        assert!(handshake(&near, &server, None).await.1.is_ok(), "{federated:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_takes_connections_and_says_nothing_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let silent = UnixListener::bind(&socket).unwrap();
    let source = follow(WorkloadEndpoint::Unix(socket), SvidChoice::Default);
    until(|| source.last_error().is_some()).await;
    let said = source.last_error().unwrap();
    assert!(said.contains("agent.sock says nothing within 30s"), "{said}");
    let token = source.jwt_svid(&["reviews"], None).await.unwrap_err().to_string();
    assert!(token.contains("agent.sock says nothing within 30s"), "{token}");
    drop(silent);
}

#[tokio::test]
async fn an_identity_is_chosen_by_hint_or_id_and_revocation_lists_are_obeyed() {
    let ca = Ca::new("ca");
    let mut hinted = svid(&ca, BOB);
    hinted.hint = "internal".into();
    let revoked = ca.svid("spiffe://td/mallory");
    let mut all = message(vec![svid(&ca, ALICE), hinted]);
    all.crl = vec![ca.crl(&[&revoked])];
    let agent = Latest::new(Some(all));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = WorkloadEndpoint::Tcp(listener.local_addr().unwrap());
    serve(stream::unfold(listener, |l| async { Some((l.accept().await.map(|(io, _)| io), l)) }), &agent);
    for (choice, name) in [
        (SvidChoice::Default, ALICE),
        (SvidChoice::Hint("internal".into()), BOB),
        (SvidChoice::Id(BOB.parse().unwrap()), BOB),
    ] {
        let source = follow(endpoint.clone(), choice);
        assert_eq!(ready(&*source).await.identity.as_ref().unwrap().name(), name);
        let mallory = mtls_client(&crate::support::source(&revoked, ca.roots()));
        let refused = handshake(&mallory, &mtls_server(&source), None).await.1.unwrap_err().to_string();
        assert!(refused.contains("spiffe://td/mallory was refused: it was revoked by its authority"), "{refused}");
    }
    let nobody = follow(endpoint, SvidChoice::Hint("other".into()));
    until(|| nobody.last_error().is_some()).await;
    let said = nobody.last_error().unwrap();
    assert!(said.contains("no such identity") && said.contains(ALICE), "{said}");
}

#[tokio::test]
async fn an_agent_that_does_not_know_us_is_asked_again_until_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let source = follow(WorkloadEndpoint::Unix(socket.clone()), SvidChoice::Default);
    until(|| source.last_error().is_some()).await;
    let said = source.last_error().unwrap();
    assert!(said.contains("agent.sock cannot be reached: No such file"), "{said}");
    let agent = Latest::new(None);
    let _serving = serve_unix(&socket, &agent);
    until(|| source.last_error().unwrap().contains("has no identity for us: no identity issued")).await;
    let refused = mtls_client(&crate::support::source(&Ca::new("a").svid(BOB), Ca::new("a").roots()));
    let not_ready = handshake(&refused, &mtls_server(&source), None).await.1.unwrap_err().to_string();
    assert!(not_ready.contains("has no certificate yet") && not_ready.contains("no identity issued"), "{not_ready}");
    agent.send_replace(Some(message(vec![svid(&Ca::new("ca"), ALICE)])));
    assert_eq!(ready(&*source).await.identity.as_ref().unwrap().name(), ALICE);
}

#[tokio::test]
async fn tokens_are_fetched_for_an_audience_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let agent = Latest::new(Some(message(vec![svid(&Ca::new("ca"), ALICE)])));
    let _serving = serve_unix(&socket, &agent);
    let source = follow(WorkloadEndpoint::Unix(socket), SvidChoice::Default);
    let token = source.jwt_svid(&["reviews", "ratings"], None).await.unwrap();
    assert!(token.token().starts_with("head-reviews+ratings."), "{}", token.token());
    assert_eq!(token.spiffe_id().as_str(), ALICE);
    let year_2100 = std::time::UNIX_EPOCH + std::time::Duration::from_secs(4_102_444_800);
    assert_eq!(token.expires_at(), year_2100);
    assert!(!format!("{token:?}").contains("head-"), "{token:?}");
    let bob = source.jwt_svid(&["reviews"], Some(&BOB.parse().unwrap())).await.unwrap();
    assert_eq!(bob.spiffe_id().as_str(), BOB);
    assert!(source.jwt_svid(&[], None).await.unwrap_err().to_string().contains("no audience"));
    let mut client = source.client().await.unwrap();
    let request = ValidateJwtSvidRequest { audience: "reviews".into(), svid: BOB.into() };
    assert_eq!(client.validate_jwt_svid(request).await.unwrap().into_inner().spiffe_id, BOB);
    assert!(client.fetch_x509_bundles().await.unwrap().into_inner().message().await.unwrap().is_some());
}

#[tokio::test]
async fn requests_without_the_security_header_are_refused() {
    use tower::Service;
    let agent = Latest::new(Some(message(vec![svid(&Ca::new("ca"), ALICE)])));
    let mut server = WorkloadApiServer::new(Agent(agent.subscribe()));
    let request = http::Request::post("http://agent/SpiffeWorkloadAPI/FetchX509SVID");
    let response = server.call(request.body(tonic::body::Body::empty()).unwrap()).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "3");
}

#[tokio::test]
async fn an_identity_whose_time_is_over_replaces_nothing_and_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let ca = Ca::new("ours");
    let over = |svid: &mut X509Svid| {
        let old = ca.issue(|params| {
            params.subject_alt_names.push(uri(ALICE));
            params.not_after = rcgen::date_time_ymd(2021, 3, 4);
        });
        let (chain, key) = old.der();
        (svid.x509_svid, svid.x509_svid_key) = (chain.concat(), key);
    };
    let mut old = svid(&ca, ALICE);
    over(&mut old);
    let agent: Latest = watch::Sender::new(Some(message(vec![old.clone()])));
    let _server = serve_unix(&socket, &agent);
    let source = follow(WorkloadEndpoint::Unix(socket), SvidChoice::Default);
    until(|| source.last_error().is_some()).await;
    let error = source.last_error().unwrap();
    assert!(error.contains(ALICE) && error.contains("the certificate expired at 2021-03-04"), "{error}");
    assert_eq!(source.current().generation, 0);
    agent.send_replace(Some(message(vec![svid(&ca, ALICE)])));
    generation(&source, 1).await;
    assert_eq!(source.last_error(), None);
    agent.send_replace(Some(message(vec![old])));
    until(|| source.last_error().is_some()).await;
    assert_eq!(source.current().generation, 1, "the good one stays");
}

#[tokio::test]
async fn keys_of_the_endpoint_appear_nowhere_and_are_wiped() {
    use zeroize::ZeroizeOnDrop;
    fn is_wiped<T: ZeroizeOnDrop>(_: &T) {}
    let captured = crate::providers::Captured::default();
    let guard = tracing::subscriber::set_default(captured.clone());
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let ca = Ca::new("ours");
    let (good, mut bad) = (svid(&ca, ALICE), svid(&ca, ALICE));
    let token = JwtSvid { spiffe_id: ALICE.into(), svid: "head.payload.signature".into(), hint: String::new() };
    is_wiped(&good);
    is_wiped(&token);
    bad.x509_svid_key.truncate(70);
    let agent: Latest = watch::Sender::new(Some(message(vec![bad.clone()])));
    let _server = serve_unix(&socket, &agent);
    let source = follow(WorkloadEndpoint::Unix(socket), SvidChoice::Default);
    until(|| source.last_error().is_some()).await;
    let mut shown = format!("{:?}{source:?}{bad:?}{good:?}{token:?}", source.last_error());
    agent.send_replace(Some(message(vec![good.clone()])));
    generation(&source, 1).await;
    shown += &format!("{source:?}{:?}{:?}", source.current(), message(vec![good.clone()]));
    drop(guard);
    shown += &captured.0.lock().unwrap();
    assert!(shown.contains("new certificates") && shown.contains("the private key cannot be used"), "{shown}");
    for svid in [&good, &bad] {
        assert!(!crate::providers::shows(&shown, &svid.x509_svid_key[36..68]));
    }
    assert!(!shown.contains("head.payload"));
}
