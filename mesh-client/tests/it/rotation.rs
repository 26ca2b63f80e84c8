//! Certificates and authorities rotated hundreds of times under load: no call fails, and nothing grows.

use crate::{
    mtls::{config, control_plane},
    support::{ANY, GUARD, TARGET, hello, until},
};
use examples::{
    backend::{Backend, Options},
    server::tls,
};
use mesh_client::Mesh;
use mesh_tls::{Acceptor, Identity, MemorySource, ServerSettings, Source, TrustRoots, default_provider};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use tokio::task::JoinSet;

pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
pub(crate) const SERVER: &str = "spiffe://cluster.local/ns/default/sa/greeter";
const MUTUAL: &str = "{tls: {mode: ISTIO_MUTUAL}}";
const CALLERS: u64 = 4;
/// Authorities, one after the other; each issues so many pairs of certificates, and is exchanged in two steps more.
const AUTHORITIES: u32 = 20;
const PAIRS: u32 = 8;

pub(crate) struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Its certificate.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A chain and its key.
    pub(crate) fn issue_pem(&self, id: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names.push(SanType::URI(id.try_into().unwrap()));
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// A chain for the key of this request.
    pub(crate) fn sign(&self, csr: &str, id: &str) -> String {
        let mut csr = CertificateSigningRequestParams::from_pem(csr).unwrap();
        csr.params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        csr.signed_by(&self.0).unwrap().pem()
    }

    pub(crate) fn issue(&self, id: &str) -> Arc<Identity> {
        let (chain, key) = self.issue_pem(id);
        Arc::new(Identity::from_pem(chain.as_bytes(), key.as_bytes(), &default_provider()).unwrap())
    }
}

pub(crate) fn roots(authorities: &[&Ca]) -> Arc<TrustRoots> {
    let pem: String = authorities.iter().map(|ca| ca.0.pem()).collect();
    Arc::new(TrustRoots::from_pem(pem.as_bytes()).unwrap())
}

/// What was in use once.
#[derive(Default)]
struct Once {
    identities: Vec<Weak<Identity>>,
    roots: Vec<Weak<TrustRoots>>,
}

impl Once {
    fn alive(&self) -> usize {
        let identities = self.identities.iter().filter(|weak| weak.strong_count() > 0).count();
        identities + self.roots.iter().filter(|weak| weak.strong_count() > 0).count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_rotations_under_load_fail_no_call_and_leave_nothing_behind() {
    let mut ca = Ca::new();
    let mut trust = roots(&[&ca]);
    let client = Arc::new(MemorySource::empty("default"));
    let server = Arc::new(MemorySource::empty("server"));
    let mut once = Once::default();
    let mut rotations = 0_u32;
    // returns what the client had before
    let mut rotate = |ca: &Ca, trust: &Arc<TrustRoots>| {
        let before = client.current().identity.as_ref().map(Arc::downgrade).unwrap_or_default();
        let (near, far) = (ca.issue(CLIENT), ca.issue(SERVER));
        once.identities.extend([Arc::downgrade(&near), Arc::downgrade(&far)]);
        once.roots.push(Arc::downgrade(trust));
        // the server first trusts whom the client is about to be
        server.set(Some(far), Some(trust.clone()));
        client.set(Some(near), Some(trust.clone()));
        rotations += 1;
        before
    };
    drop(rotate(&ca, &trust));

    let (cp, _dir) = control_plane().await;
    let acceptor = Acceptor::new(ServerSettings::mtls(server.clone()), default_provider()).unwrap();
    let options = Options { accept: tls(acceptor), ..Options::default() };
    let backend = Backend::start("rotated", ANY, options).await.unwrap();
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let bootstrap = format!(
        r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}], "node": {{"id": "test"}}}}"#,
        cp.addr()
    );
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().certificate_provider("default", client.clone());
    let mesh = mesh.build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);

    let (calls, stop, mut callers) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)), JoinSet::new());
    for _ in 0..CALLERS {
        let (channel, calls, stop) = (channel.clone(), calls.clone(), stop.clone());
        callers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(hello(&channel).await.expect("no call fails").peer, CLIENT);
                calls.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    // no handshake and no connection has the old certificate any more, and every caller goes on
    let renewed = async |old: Weak<Identity>| {
        let before = calls.load(Ordering::Relaxed);
        until("the old certificate is gone", async || old.strong_count() == 0).await;
        until("calls go on", async || calls.load(Ordering::Relaxed) >= before + 2 * CALLERS).await;
    };
    let mut most = usize::MAX;
    for authority in 0..AUTHORITIES {
        for _ in 0..PAIRS {
            renewed(rotate(&ca, &trust)).await;
        }
        // by the book: both are trusted, then the new one issues, then the old one is not trusted any more
        let next = Ca::new();
        trust = roots(&[&ca, &next]);
        renewed(rotate(&ca, &trust)).await;
        renewed(rotate(&next, &trust)).await;
        ca = next;
        trust = roots(&[&ca]);
        renewed(rotate(&ca, &trust)).await;
        if authority == 1 {
            // by now it is as large as it gets, a few connections that drain aside
            most = tasks() + 64;
        }
        assert!(tasks() <= most, "{} tasks after {} authorities", tasks(), authority + 1);
    }
    stop.store(true, Ordering::Relaxed);
    let ended = tokio::time::timeout(GUARD, async {
        while let Some(end) = callers.join_next().await {
            end.unwrap();
        }
    });
    ended.await.expect("callers end");
    assert!(rotations >= 200, "{rotations}");
    assert!(calls.load(Ordering::Relaxed) >= u64::from(rotations) * CALLERS);
    assert!(backend.connections() > 100, "{} connections", backend.connections());
    // what is alive is what is in use: two certificates, and the roots. The last connection may have been accepted just before the server's last
    // certificate, and live on with the one before
    drop((trust, channel, mesh));
    until("old certificates and roots are gone", async || once.alive() <= 3).await;
    assert!(client.current().generation >= 200);
}
