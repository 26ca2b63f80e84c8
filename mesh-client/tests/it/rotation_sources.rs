//! Certificates of files and of Istio's authority, rotated hundreds of times under load on both sides of our own transport: no call fails, and
//! nothing grows.

use crate::{
    mtls::MUTUAL,
    rotation::{CLIENT, Ca, SERVER},
    support::{
        ANY, GUARD, TARGET, hello,
        inbound::{Polite, Serving},
        routes, rule, service, to, until,
    },
};
use examples::greeter::greeter_server::GreeterServer;
use futures::future::BoxFuture;
use mesh_client::{Inbound, Mesh, MeshChannel};
use mesh_control::ControlPlane;
use mesh_tls::{
    CaAuth, CaTls, FileSource, FileSourceConfig, Identity, IstioCaConfig, IstioCaSource, ServerSettings, Source,
    default_provider,
    grpc::{CertificateRequest, CertificateResponse, IstioCa, IstioCaServer},
};
use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Handle, task::JoinSet};
use tonic::{Request, Response, Status, service::Routes, transport::Server};

const CALLERS: u64 = 4;
/// Authorities, one after the other; each issues so many pairs of certificates, and is exchanged in three steps more.
const AUTHORITIES: u32 = 8;
const PAIRS: u32 = 11;

/// Who issues, and whom everybody trusts.
#[derive(Clone)]
struct Authority(Arc<Mutex<Issuing>>);

struct Issuing {
    ca: Arc<Ca>,
    /// PEM.
    roots: String,
}

impl Authority {
    fn new(ca: &Arc<Ca>) -> Self {
        Self(Arc::new(Mutex::new(Issuing { ca: ca.clone(), roots: ca.pem() })))
    }

    fn set(&self, ca: &Arc<Ca>, trusted: &[&Arc<Ca>]) {
        let roots = trusted.iter().map(|ca| ca.pem()).collect();
        *self.0.lock().unwrap() = Issuing { ca: ca.clone(), roots };
    }

    async fn serve(&self) -> SocketAddr {
        let listener = TcpListener::bind(ANY).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let service = IstioCaServer::new(self.clone());
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        addr
    }
}

impl IstioCa for Authority {
    async fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        // The token is the name.
        let token = request.metadata().get("authorization").expect("it has a token").to_str().unwrap();
        let id = token.strip_prefix("Bearer ").unwrap().to_owned();
        let issuing = self.0.lock().unwrap();
        let leaf = issuing.ca.sign(&request.into_inner().csr, &id);
        Ok(Response::new(CertificateResponse { cert_chain: vec![leaf, issuing.roots.clone()] }))
    }
}

/// One side, whose source has new certificates made when it is told.
struct Party {
    source: Arc<dyn Source>,
    renew: Box<dyn Fn() + Send + Sync>,
    _files: TempDir,
}

impl Party {
    /// Files that somebody else replaces.
    fn of_files(authority: &Authority, id: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (authority, folder) = (authority.clone(), dir.path().to_owned());
        let write = move || {
            let issuing = authority.0.lock().unwrap();
            let (chain, key) = issuing.ca.issue_pem(id);
            for (name, text) in [("cert.pem", &chain), ("key.pem", &key), ("ca.pem", &issuing.roots)] {
                std::fs::write(folder.join(name), text).unwrap();
            }
        };
        write();
        let config = FileSourceConfig {
            certificate_file: Some(dir.path().join("cert.pem")),
            private_key_file: Some(dir.path().join("key.pem")),
            ca_certificate_file: Some(dir.path().join("ca.pem")),
            ..FileSourceConfig::new("files", default_provider())
        };
        let source = Arc::new(FileSource::new(config, &Handle::current()).unwrap());
        let read = source.clone();
        let renew = Box::new(move || {
            write();
            assert!(read.reload_now().unwrap(), "they are others");
        });
        Self { source, renew, _files: dir }
    }

    /// Keys of our own, signed by Istio's authority at this address.
    fn of_istio(authority: SocketAddr, id: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let token = |folder: &Path| folder.join("token");
        std::fs::write(token(dir.path()), id).unwrap();
        let auth = CaAuth::TokenFile(token(dir.path()));
        let mut config = IstioCaConfig::new("istio", authority.to_string(), CaTls::Plaintext, auth, default_provider());
        config.spiffe_id = Some(id.parse().unwrap());
        let source = Arc::new(IstioCaSource::new(config, &Handle::current()).unwrap());
        let asks = source.clone();
        Self { source, renew: Box::new(move || asks.renew()), _files: dir }
    }

    /// Has a new certificate, and trusts whom the authority trusts now.
    async fn renewed(&self) {
        let (mut generation, before) = (self.source.changed(), self.source.current().generation);
        (self.renew)();
        let changed = generation.wait_for(|now| *now > before);
        tokio::time::timeout(GUARD, changed).await.expect("it is renewed").expect("the source lives");
    }

    fn identity(&self) -> Weak<Identity> {
        self.source.current().identity.as_ref().map(Arc::downgrade).expect("it has one")
    }
}

/// Calls without end.
struct Load {
    calls: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    callers: JoinSet<()>,
}

impl Load {
    fn of(channel: &MeshChannel) -> Self {
        let mut load = Self { calls: Arc::default(), stop: Arc::default(), callers: JoinSet::new() };
        for _ in 0..CALLERS {
            let (channel, calls, stop) = (channel.clone(), load.calls.clone(), load.stop.clone());
            load.callers.spawn(async move {
                while !stop.load(Relaxed) {
                    assert_eq!(hello(&channel).await.expect("no call fails").peer, CLIENT);
                    calls.fetch_add(1, Relaxed);
                }
            });
        }
        load
    }

    fn calls(&self) -> u64 {
        self.calls.load(Relaxed)
    }

    async fn end(mut self) {
        self.stop.store(true, Relaxed);
        while let Some(end) = tokio::time::timeout(GUARD, self.callers.join_next()).await.expect("callers end") {
            end.unwrap();
        }
    }
}

/// Rotates the certificates of a client and a server, made by `party`, and the authority, hundreds of times under load.
async fn soak(party: impl for<'a> Fn(&'a Authority, &'static str) -> BoxFuture<'a, Party>) {
    let mut ca = Arc::new(Ca::new());
    let authority = Authority::new(&ca);
    let (client, server) = (party(&authority, CLIENT).await, party(&authority, SERVER).await);
    for party in [&client, &server] {
        tokio::time::timeout(GUARD, mesh_tls::ready(&*party.source)).await.expect("there is a first certificate");
    }
    let inbound = Inbound::builder().tls(ServerSettings::mtls(server.source.clone())).bind(ANY).await.unwrap();
    let serving = Serving::of(inbound, Routes::new(GreeterServer::new(Polite)));
    let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let yaml = service(&[("one", serving.addr)]) + &route + &rule(MUTUAL, &[]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let bootstrap = format!(
        r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}], "node": {{"id": "test"}}}}"#,
        cp.addr()
    );
    let mesh =
        Mesh::builder().bootstrap_json(&bootstrap).unwrap().certificate_provider("default", client.source.clone());
    let mesh = mesh.build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    let load = Load::of(&channel);

    let mut once = Vec::new();
    let mut rotate = async || {
        let old = client.identity();
        once.extend([old.clone(), server.identity()]);
        // Whom one of them is about to be, the other trusts already.
        tokio::join!(server.renewed(), client.renewed());
        let before = load.calls();
        until("no connection has the old certificate", async || old.strong_count() == 0).await;
        until("calls go on", async || load.calls() >= before + 2 * CALLERS).await;
    };
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let mut most = usize::MAX;
    for number in 0..AUTHORITIES {
        for _ in 0..PAIRS {
            rotate().await;
        }
        // By the book: both are trusted, then the new one issues, then the old one is not trusted any more.
        let next = Arc::new(Ca::new());
        for (issuing, trusted) in [(&ca, &[&ca, &next][..]), (&next, &[&ca, &next]), (&next, &[&next])] {
            authority.set(issuing, trusted);
            rotate().await;
        }
        ca = next;
        if number == 1 {
            // By now it is as large as it gets, a few connections that drain aside.
            most = tasks() + 64;
        }
        assert!(tasks() <= most, "{} tasks after {} authorities", tasks(), number + 1);
    }
    let (certificates, calls) = (u64::try_from(once.len()).unwrap(), load.calls());
    load.end().await;
    assert!(certificates >= 200, "{certificates}");
    assert!(calls >= CALLERS * certificates, "{calls} calls");
    until("old connections are gone", async || channel.load().connections <= 2).await;
    // The last one may have been accepted just before the server's last certificate, and live on with the one before.
    drop((channel, mesh));
    until("old certificates are gone", async || once.iter().all(|old| old.strong_count() == 0)).await;
    let generations = [&client, &server].map(|party| party.source.current().generation);
    assert!(generations.iter().all(|generation| *generation > certificates / 2), "{generations:?}");
    assert!([&client, &server].iter().all(|party| party.source.last_error().is_none()));
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_replaced_hundreds_of_times_under_load_fail_no_call_and_leave_nothing_behind() {
    soak(|authority, id| Box::pin(async move { Party::of_files(authority, id) })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istios_authority_asked_hundreds_of_times_under_load_fails_no_call_and_leaves_nothing_behind() {
    soak(|authority, id| Box::pin(async move { Party::of_istio(authority.serve().await, id) })).await;
}
