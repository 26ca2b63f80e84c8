//! The accepting side: strict, permissive or no TLS, with the peer's identity.

mod incoming;
mod stream;

pub use incoming::Incoming;
pub use stream::{Accepted, ConnectInfo};

use crate::{
    CryptoProvider, Generations, PeerCheck, PeerIdentity, Rewind, Roots, SanMatcher, Side, Source, SpiffeId, TlsError,
    TlsVersions, TrustRoots,
    store::{Built, Parts, RootsFrom, Store},
    verify::{Verifier, with_refusal},
    version::preferring_post_quantum,
};
use rustls::{
    ServerConfig,
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

/// How long a refused client may take to read why.
const LINGER: Duration = Duration::from_secs(1);
/// How much a refused client may have sent already.
const LINGER_BYTES: u64 = 64 * 1024;
/// First byte of a TLS record with a handshake message, and first byte of its version.
const TLS_HANDSHAKE: [u8; 2] = [0x16, 0x03];

/// What connections an [`Acceptor`] takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// TLS only.
    #[default]
    Strict,
    /// TLS or plaintext, told apart by the first bytes: for the time of a migration.
    Permissive,
    /// Plaintext only.
    Disabled,
}

/// Whether clients present a certificate. One that is presented is always verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ClientAuth {
    /// They must.
    #[default]
    Required,
    /// They may.
    Optional,
    /// They are not asked.
    Off,
}

/// How connections are accepted and clients verified.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Our certificate.
    pub identity: Arc<dyn Source>,
    /// Whom we trust.
    pub roots: Roots,
    /// Whether clients present a certificate.
    pub client_auth: ClientAuth,
    /// What is asked of a client's name besides the matchers; [`PeerCheck::ServerName`] means nothing here.
    pub check: PeerCheck,
    /// Any matcher against any SAN; empty accepts any.
    pub san_matchers: Vec<SanMatcher>,
    /// ALPN protocols by preference; empty negotiates none.
    pub alpn: Vec<Vec<u8>>,
    /// Which versions of TLS are spoken.
    pub versions: TlsVersions,
    /// What connections are taken at first.
    pub mode: Mode,
    /// Limit for the first bytes and the handshake together. Default 10 s.
    pub handshake_timeout: Duration,
}

/// What the client of a connection showed when it was accepted: [`Acceptor::admits`] looks at it again.
#[derive(Clone, Debug, Default)]
pub struct Presented {
    generation: u64,
    /// When it was verified; 0 where nothing was shown.
    at: Duration,
    /// Its certificate, and the chain that it sent.
    chain: Vec<CertificateDer<'static>>,
}

/// Accepts connections. Cheap to clone; the clones share the mode.
#[derive(Clone, Debug)]
pub struct Acceptor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: ServerSettings,
    san_matchers: Arc<[SanMatcher]>,
    provider: Arc<CryptoProvider>,
    mode: AtomicU8,
    store: Store<ServerConfig>,
}

impl ServerSettings {
    /// Mutual TLS, strict, with both our certificate and the roots from `source`; clients show exactly one SPIFFE id
    /// ([`PeerCheck::Spiffe`]); ALPN `h2` and `http/1.1`.
    pub fn mtls(source: Arc<dyn Source>) -> Self {
        Self {
            roots: Roots::Source(source.clone()),
            identity: source,
            client_auth: ClientAuth::Required,
            check: PeerCheck::Spiffe,
            san_matchers: Vec::new(),
            alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            versions: TlsVersions::default(),
            mode: Mode::Strict,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

impl Acceptor {
    /// Checks the settings; the sources may still be empty.
    ///
    /// # Errors
    /// The provider lacks a version of TLS, or the system has no roots.
    pub fn new(settings: ServerSettings, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let roots = match (&settings.roots, settings.client_auth) {
            (_, ClientAuth::Off) => RootsFrom::Nowhere,
            (Roots::Source(source), _) => RootsFrom::Source(source.clone()),
            (Roots::System, _) => {
                RootsFrom::Fixed(TrustRoots::system().map_err(|e| TlsError::Settings(format!("system roots: {e}")))?)
            }
        };
        let acceptor = Self(Arc::new(Inner {
            san_matchers: settings.san_matchers.clone().into(),
            provider: preferring_post_quantum(provider),
            mode: AtomicU8::new(settings.mode as u8),
            store: Store::new(Some(settings.identity.clone()), roots),
            settings,
        }));
        match acceptor.built() {
            Ok(_) | Err(TlsError::NotReady { .. }) => Ok(acceptor),
            Err(error) => Err(error),
        }
    }

    /// The SPIFFE id of the certificate that new handshakes show.
    pub fn spiffe_id(&self) -> Option<SpiffeId> {
        self.0.settings.identity.current().identity.as_ref()?.spiffe_id().cloned()
    }

    /// The URI SANs of the certificate that new handshakes show; none while there is no certificate.
    pub fn uri_sans(&self) -> Vec<String> {
        self.0
            .settings
            .identity
            .current()
            .identity
            .as_ref()
            .map(|identity| identity.uri_sans().to_vec())
            .unwrap_or_default()
    }

    /// What connections are taken now.
    pub fn mode(&self) -> Mode {
        match self.0.mode.load(Ordering::Relaxed) {
            0 => Mode::Strict,
            1 => Mode::Permissive,
            _ => Mode::Disabled,
        }
    }

    /// Changes what connections are taken from now on; those already accepted stay.
    pub fn set_mode(&self, mode: Mode) {
        self.0.mode.store(mode as u8, Ordering::Relaxed);
    }

    /// Waits until the sources hold what handshakes need, or say why they do not. Not bounded in time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ready(&self) {
        self.0.store.ready().await;
    }

    /// Follows the generation of the material: it grows when our certificate or whom we trust changes.
    pub fn generations(&self) -> Generations {
        self.0.store.generations()
    }

    /// Whether the client of an open connection would still be let in, by what it showed then and whom we trust now: roots, revocation lists, names. True
    /// as long as nothing changed, and where clients show nothing. Validity is asked as of the handshake: a client that renewed its certificate keeps
    /// the connection that it made with the one before.
    pub fn admits(&self, client: &Presented) -> bool {
        if client.generation == self.0.store.generation() {
            return true;
        }
        let Some((leaf, others)) = client.chain.split_first() else { return true };
        // Nobody is let in while there are no roots, and nobody is sent away for that.
        let verifier = self.0.store.parts().ok().and_then(|(parts, _)| self.verifier(&parts));
        verifier.is_none_or(|verifier| {
            verifier.verify_client_cert(leaf, others, UnixTime::since_unix_epoch(client.at)).is_ok()
        })
    }

    /// Handshakes over `io`, with the newest material, within the handshake timeout.
    ///
    /// A client that is refused gets the TLS alert with the reason: its input is read for a moment longer, so that the
    /// alert is not lost to a connection reset.
    ///
    /// # Errors
    /// The client is refused, refuses us, speaks plaintext where TLS is required, or is too slow.
    ///
    /// # Cancel safety
    /// Dropping the future drops `io`.
    pub async fn accept<IO>(&self, io: IO) -> Result<Accepted<IO>, TlsError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        self.accept_in((), io).await
    }

    /// [`accept`](Self::accept), in a place among the handshakes that are under way (a permit): it is dropped when the handshake is over, before a
    /// refused client reads why.
    ///
    /// # Errors
    /// As for `accept`.
    ///
    /// # Cancel safety
    /// Dropping the future drops `io` and `place`.
    pub async fn accept_in<P, IO>(&self, place: P, io: IO) -> Result<Accepted<IO>, TlsError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let mode = self.mode();
        if mode == Mode::Disabled {
            return Ok(Accepted::plain(Rewind::new(io)));
        }
        let limit = self.0.settings.handshake_timeout;
        let result = timeout(limit, self.handshake(io, mode)).await;
        drop(place);
        let Ok(result) = result else {
            return Err(TlsError::Timeout { side: Side::Client, limit });
        };
        match result {
            Ok(accepted) => Ok(accepted),
            Err((error, None)) => Err(error),
            Err((error, Some(io))) => {
                linger(io).await;
                Err(error)
            }
        }
    }

    async fn handshake<IO>(&self, io: IO, mode: Mode) -> Result<Accepted<IO>, (TlsError, Option<Rewind<IO>>)>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let mut io = Rewind::new(io);
        if mode == Mode::Permissive {
            let first = io
                .peek::<{ TLS_HANDSHAKE.len() }>()
                .await
                .map_err(|error| (TlsError::Io { side: Side::Client, error }, None))?;
            if first.is_empty() {
                return Err((TlsError::Closed(Side::Client), None));
            }
            if !first.iter().zip(&TLS_HANDSHAKE).all(|(a, b)| a == b) {
                return Ok(Accepted::plain(io));
            }
        }
        let built = self.built().map_err(|error| (error, None))?;
        let accept = TlsAcceptor::from(built.config.clone()).accept(io).into_fallible();
        let (result, refusal) = with_refusal(accept).await;
        let stream = result.map_err(|(error, io)| {
            (TlsError::from_handshake(error, refusal, Side::Client, built.own.as_deref()), Some(io))
        })?;
        let peer = stream.get_ref().1.peer_certificates();
        let peer = peer.and_then(|chain| PeerIdentity::from_verified(chain, !self.0.san_matchers.is_empty()));
        Ok(Accepted::tls(stream, peer, built.generation))
    }

    /// Connections of `listener`, accepted concurrently; see [`Incoming`].
    pub fn incoming(&self, listener: TcpListener) -> Incoming {
        Incoming::new(self.clone(), listener)
    }

    fn built(&self) -> Result<Arc<Built<ServerConfig>>, TlsError> {
        self.0.store.get(|parts| self.build(parts))
    }

    fn build(&self, parts: &Parts) -> Result<ServerConfig, TlsError> {
        let Inner { settings, provider, .. } = &*self.0;
        let identity = parts.identity.as_ref().ok_or_else(|| TlsError::Settings("no certificate".into()))?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(settings.versions.supported()?)
            .map_err(|e| TlsError::Settings(e.to_string()))?;
        let builder = match self.verifier(parts) {
            Some(verifier) => builder.with_client_cert_verifier(Arc::new(verifier)),
            None => builder.with_client_cert_verifier(WebPkiClientVerifier::no_client_auth()),
        };
        let mut config = builder.with_cert_resolver(Arc::new(Own(identity.certified())));
        // a resumed session would skip the verifier
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols.clone_from(&settings.alpn);
        Ok(config)
    }

    /// `None`: clients are not asked for certificates.
    fn verifier(&self, parts: &Parts) -> Option<Verifier> {
        let Inner { settings, san_matchers, provider, .. } = &*self.0;
        let roots = parts.roots.clone()?;
        let mut verifier = Verifier::new(Side::Client, roots, settings.check, san_matchers.clone(), provider);
        verifier.mandatory = settings.client_auth == ClientAuth::Required;
        Some(verifier)
    }
}

/// Presents our certificate under every server name.
#[derive(Debug)]
struct Own(Arc<CertifiedKey>);

impl ResolvesServerCert for Own {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// Closes our half and reads on for a moment: closing with unread input would reset the connection, and the alert be lost.
async fn linger<IO: AsyncRead + AsyncWrite + Unpin>(mut io: IO) {
    let drain = async {
        if io.shutdown().await.is_ok() {
            let mut rest = io.take(LINGER_BYTES);
            let mut buffer = [0; 4096];
            while matches!(rest.read(&mut buffer).await, Ok(1..)) {}
        }
    };
    // whether the client left in time makes no difference
    let _ = timeout(LINGER, drain).await;
}
