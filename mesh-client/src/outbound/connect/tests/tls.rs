//! TLS to endpoints: identity, refusal, new certificates under load.

use super::support::{Server, call, connector, until, within};
use crate::outbound::connect::{Connectivity, ConnectorSettings, Security, Subchannel, TlsRenewal};
use futures::future::join_all;
use mesh_tls::{
    Acceptor, ClientSettings, ClientTls, Identity, MemorySource, ServerSettings, TrustRoots, default_provider,
};
use mesh_xds::resource::RoutingPriority;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};
use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("CA"))
    }

    fn roots(&self) -> Arc<TrustRoots> {
        Arc::new(TrustRoots::from_pem(self.0.pem().as_bytes()).expect("roots"))
    }

    fn svid(&self, id: &str) -> Identity {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.subject_alt_names.push(SanType::URI(id.try_into().expect("URI")));
        let chain = params.signed_by(&key, &self.0).expect("certificate").pem();
        Identity::from_pem(chain.as_bytes(), key.serialize_pem().as_bytes(), &default_provider()).expect("identity")
    }

    fn source(&self, id: &str) -> Arc<MemorySource> {
        Arc::new(MemorySource::new(id, Some(self.svid(id)), Some(self.roots())))
    }

    async fn server(&self) -> Server {
        let settings = ServerSettings::mtls(self.source("spiffe://td/server"));
        Server::tls(Acceptor::new(settings, default_provider()).expect("acceptor")).await
    }
}

fn settings(source: &Arc<MemorySource>) -> ConnectorSettings {
    let tls = ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(source.clone()) };
    let tls = ClientTls::new(tls, default_provider()).expect("client");
    ConnectorSettings { security: Security::Tls(tls), ..Default::default() }
}

fn in_words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

#[tokio::test]
async fn the_peer_is_known_by_its_identity() {
    let ca = Ca::new();
    let server = ca.server().await;
    let subchannel = Subchannel::new(server.address, connector(settings(&ca.source("spiffe://td/client")), None));
    let lease = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    let id = lease.peer().and_then(|peer| peer.spiffe_id()).expect("peer").to_string();
    assert_eq!(id, "spiffe://td/server");
    assert_eq!(call(lease, "/").await, "0");
}

#[tokio::test]
async fn a_refused_client_is_told_why() {
    let ca = Ca::new();
    let server = ca.server().await;
    let stranger = Ca::new();
    let source = MemorySource::new("client", Some(stranger.svid("spiffe://td/client")), Some(ca.roots()));
    let subchannel = Subchannel::new(server.address, connector(settings(&Arc::new(source)), None));
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("refused");
    let words = in_words(&*error);
    assert!(words.contains(&server.address.to_string()), "{words}");
    assert!(words.contains("spiffe://td/client") && words.contains("server"), "{words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_certificates_replace_connections_and_no_call_fails() {
    let ca = Ca::new();
    let mut server = ca.server().await;
    let source = ca.source("spiffe://td/client");
    let subchannel = Subchannel::new(server.address, connector(settings(&source), None));
    assert_eq!(call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"), "/").await, "0");
    let stop = Arc::new(AtomicBool::new(false));
    let callers = (0..4).map(|_| {
        let (subchannel, stop) = (Arc::clone(&subchannel), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut last = 0;
            while !stop.load(Ordering::SeqCst) {
                let lease = subchannel.acquire(RoutingPriority::Default).await.expect("lease");
                last = call(lease, "/").await.parse().expect("a number");
            }
            last
        })
    });
    let callers: Vec<_> = callers.collect();
    for generation in 1..=3 {
        source.replace(Some(ca.svid("spiffe://td/client")), Some(ca.roots()));
        within(async {
            while server.accepted.load(Ordering::SeqCst) <= generation {
                tokio::task::yield_now().await;
            }
        })
        .await;
        server.until_open(1).await;
    }
    stop.store(true, Ordering::SeqCst);
    let last: Vec<usize> =
        within(join_all(callers)).await.into_iter().map(|last| last.expect("no call failed")).collect();
    assert_eq!(server.accepted.load(Ordering::SeqCst), 4, "one connection per generation");
    assert!(last.iter().all(|&connection| connection >= 2), "{last:?}");
}

#[tokio::test]
async fn a_connection_with_certificates_no_longer_trusted_ends_within_the_bound() {
    let ca = Ca::new();
    let mut server = ca.server().await;
    let source = ca.source("spiffe://td/client");
    let settings = ConnectorSettings { renewal: TlsRenewal::Within(Duration::from_millis(50)), ..settings(&source) };
    let connector = connector(settings, None);
    let subchannel = Subchannel::new(server.address, Arc::clone(&connector));
    assert_eq!(call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"), "/").await, "0");
    // We no longer trust the server's authority.
    let other = Ca::new();
    source.replace(Some(ca.svid("spiffe://td/client")), Some(other.roots()));
    until(&subchannel, &connector, Connectivity::Idle).await;
    server.until_open(0).await;
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("not trusted");
    assert!(in_words(&*error).contains("spiffe://td/server"), "{}", in_words(&*error));
}

#[tokio::test]
async fn connections_can_be_kept_until_their_age_ends_them() {
    let ca = Ca::new();
    let server = ca.server().await;
    let source = ca.source("spiffe://td/client");
    let max_duration = Some(Duration::from_millis(300));
    let settings = ConnectorSettings { renewal: TlsRenewal::KeepUntilMaxAge, max_duration, ..settings(&source) };
    let subchannel = Subchannel::new(server.address, connector(settings, None));
    assert_eq!(call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"), "/").await, "0");
    source.replace(Some(ca.svid("spiffe://td/client")), Some(ca.roots()));
    // Those who follow the certificates have heard of them by now: every task had its turn.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.accepted.load(Ordering::SeqCst), 1);
    within(async {
        while call(subchannel.acquire(RoutingPriority::Default).await.expect("lease"), "/").await == "0" {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(server.accepted.load(Ordering::SeqCst), 2);
}
