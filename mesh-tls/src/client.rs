//! TLS to the endpoints of a cluster, or to a control plane.

use crate::{
    CryptoProvider, PeerCheck, PeerIdentity, SanMatcher, Side, Source, TlsError, TlsVersion, TlsVersions, TrustRoots,
    alert,
    store::{Built, Generations, Parts, RootsFrom, Store},
    verify::{Verifier, no_name, with_refusal},
    version::preferring_post_quantum,
};
use rustls::{
    ClientConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    sign::CertifiedKey,
};
use rustls_pki_types::ServerName;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Where the roots come from that servers are verified with.
#[derive(Clone, Debug)]
pub enum Roots {
    /// The roots of a source.
    Source(Arc<dyn Source>),
    /// The roots of the operating system (gRFC A82 `system_root_certs`).
    System,
}

/// How servers are spoken to and verified.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// Our certificate; `None` presents none.
    pub identity: Option<Arc<dyn Source>>,
    /// Whom we trust.
    pub roots: Roots,
    /// What is asked of the server's name besides the matchers.
    pub check: PeerCheck,
    /// Any matcher against any SAN; empty accepts any.
    pub san_matchers: Vec<SanMatcher>,
    /// The server's certificate must have a DNS SAN that covers the SNI sent; this replaces the matchers, which are asked
    /// only when no SNI is sent (gRFC A101 `auto_sni_san_validation`).
    pub auto_sni_san: bool,
    /// Sent as SNI when `connect` is given no server name; `None` sends none.
    pub sni: Option<String>,
    /// ALPN protocols by preference; empty negotiates none.
    pub alpn: Vec<Vec<u8>>,
    /// Which versions of TLS are spoken.
    pub versions: TlsVersions,
}

/// The client side of TLS for one cluster. Cheap to clone, shared by all its connections.
#[derive(Clone, Debug)]
pub struct ClientTls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: ClientSettings,
    san_matchers: Arc<[SanMatcher]>,
    provider: Arc<CryptoProvider>,
    store: Store<ClientConfig>,
}

impl ClientSettings {
    /// Mutual TLS with both our certificate and the roots from `source`.
    pub fn mtls(source: Arc<dyn Source>) -> Self {
        Self { identity: Some(source.clone()), ..Self::new(Roots::Source(source)) }
    }

    /// No certificate of our own, no name check, no SNI, no ALPN.
    pub fn new(roots: Roots) -> Self {
        Self {
            identity: None,
            roots,
            check: PeerCheck::Chain,
            san_matchers: Vec::new(),
            auto_sni_san: false,
            sni: None,
            alpn: Vec::new(),
            versions: TlsVersions::default(),
        }
    }
}

impl ClientTls {
    /// Checks the settings; the sources may still be empty. Of the provider's key exchanges the post-quantum one,
    /// X25519MLKEM768, is preferred where it has it.
    ///
    /// # Errors
    /// The provider lacks a version of TLS, the SNI is not a DNS name, or the system has no roots.
    pub fn new(settings: ClientSettings, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        if let Some(sni) = &settings.sni {
            parse_name(sni)?;
        }
        let roots = match &settings.roots {
            Roots::Source(source) => RootsFrom::Source(source.clone()),
            Roots::System => {
                RootsFrom::Fixed(TrustRoots::system().map_err(|e| TlsError::Settings(format!("system roots: {e}")))?)
            }
        };
        let store = Store::new(settings.identity.clone(), roots);
        let san_matchers = settings.san_matchers.clone().into();
        let provider = preferring_post_quantum(provider);
        let tls = Self(Arc::new(Inner { settings, san_matchers, provider, store }));
        match tls.built() {
            Ok(_) | Err(TlsError::NotReady { .. }) => Ok(tls),
            Err(error) => Err(error),
        }
    }

    /// Handshakes over `io` with the newest material. `server_name` is sent as SNI and overrides the setting; an IP
    /// address is never sent. Not bounded in time: the caller's connect timeout is the limit.
    ///
    /// Under TLS 1.3 a server may still refuse our certificate afterwards; the stream then fails with an
    /// [`io::Error`] that says so.
    ///
    /// # Errors
    /// A source is empty, the server is refused, refuses us, or the transport fails.
    ///
    /// # Cancel safety
    /// Dropping the future drops `io`.
    pub async fn connect<IO>(
        &self,
        io: IO,
        server_name: Option<&str>,
    ) -> Result<(ClientStream<IO>, PeerIdentity), TlsError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let name = match server_name.or(self.0.settings.sni.as_deref()) {
            Some(name) => parse_name(name)?,
            None if self.0.settings.check == PeerCheck::ServerName => {
                return Err(TlsError::ServerName("none was given, but the server is verified by name".into()));
            }
            None => no_name(),
        };
        let settings = &self.0.settings;
        let named = !settings.san_matchers.is_empty()
            || settings.check == PeerCheck::ServerName
            || (settings.auto_sni_san && matches!(name, ServerName::DnsName(_)));
        let built = self.built()?;
        let connect = TlsConnector::from(built.config.clone()).connect(name, io);
        let (result, refusal) = with_refusal(connect).await;
        let own = built.own.clone();
        let stream = result.map_err(|error| TlsError::from_handshake(error, refusal, Side::Server, own.as_deref()))?;
        let peer = stream.get_ref().1.peer_certificates();
        let Some(peer) = peer.and_then(|chain| PeerIdentity::from_verified(chain, named)) else {
            return Err(TlsError::Handshake { side: Side::Server, error: rustls::Error::NoCertificatesPresented });
        };
        Ok((ClientStream { stream, generation: built.generation, own, early: Early::Unread }, peer))
    }

    /// Waits until the sources hold what handshakes need, or say why they do not. Not bounded in time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ready(&self) {
        self.0.store.ready().await;
    }

    /// The generation of the newest material. A pool drains connections whose [`ClientStream::generation`] is lower.
    pub fn generation(&self) -> u64 {
        self.0.store.generation()
    }

    /// Follows the generation.
    pub fn generations(&self) -> Generations {
        self.0.store.generations()
    }

    fn built(&self) -> Result<Arc<Built<ClientConfig>>, TlsError> {
        self.0.store.get(|parts| self.build(parts))
    }

    fn build(&self, parts: &Parts) -> Result<ClientConfig, TlsError> {
        let Inner { settings, san_matchers, provider, .. } = &*self.0;
        let roots = parts.roots.clone().ok_or_else(|| TlsError::Settings("no trust roots".into()))?;
        let mut verifier = Verifier::new(Side::Server, roots, settings.check, san_matchers.clone(), provider);
        verifier.auto_sni_san = settings.auto_sni_san;
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(settings.versions.supported()?)
            .map_err(|e| TlsError::Settings(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(Own(parts.identity.as_ref().map(|identity| identity.certified()))));
        // a resumed session would skip the verifier
        config.resumption = Resumption::disabled();
        config.alpn_protocols.clone_from(&settings.alpn);
        Ok(config)
    }
}

fn parse_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name)
        .map(|name| name.to_owned())
        .map_err(|_| TlsError::ServerName(format!("{name:?} is neither a DNS name nor an IP address")))
}

/// Presents our certificate whenever the server asks for one.
#[derive(Debug)]
struct Own(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Own {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

/// A connection to a verified server.
///
/// When the server refuses us after the handshake, reads and writes fail with an [`io::Error`] that wraps
/// [`TlsError::RefusedByPeer`] and says why.
#[derive(Debug)]
pub struct ClientStream<IO> {
    stream: TlsStream<IO>,
    generation: u64,
    own: Option<Arc<str>>,
    early: Early,
}

/// Whether the server was heard, and what was read before the caller asked for it.
#[derive(Debug)]
enum Early {
    Unread,
    Read([u8; 1]),
    Heard,
}

impl<IO> ClientStream<IO> {
    /// The generation of the material that the connection was made with.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The negotiated ALPN protocol.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }

    /// The negotiated version of TLS.
    pub fn version(&self) -> Option<TlsVersion> {
        TlsVersion::negotiated(self.stream.get_ref().1)
    }

    /// The name of the negotiated key exchange group, such as `X25519MLKEM768`.
    pub fn key_exchange(&self) -> Option<String> {
        self.stream.get_ref().1.negotiated_key_exchange_group().map(|group| format!("{:?}", group.name()))
    }

    /// The transport below.
    pub fn get_ref(&self) -> &IO {
        self.stream.get_ref().0
    }

    /// Puts the sentence for an alert into the error.
    fn explain(&self, error: io::Error) -> io::Error {
        match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => {
                let own = self.own.as_deref().map(str::to_owned);
                let refused = TlsError::RefusedByPeer { side: Side::Server, alert: *alert, own };
                io::Error::new(io::ErrorKind::ConnectionRefused, refused)
            }
            _ => error,
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> ClientStream<IO> {
    /// A server that refuses us sends its alert and closes, and a write may notice the close first: look for the alert.
    fn explain_write(&mut self, error: io::Error, cx: &mut Context<'_>) -> io::Error {
        if matches!(self.early, Early::Unread) {
            let mut byte = [0];
            let mut buf = ReadBuf::new(&mut byte);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buf) {
                Poll::Ready(Err(alert)) if alert::describe_alert(&alert).is_some() => return self.explain(alert),
                Poll::Ready(Ok(())) if buf.filled().len() == 1 => self.early = Early::Read(byte),
                _ => {}
            }
        }
        self.explain(error)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for ClientStream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Early::Read(byte) = this.early
            && buf.remaining() > 0
        {
            buf.put_slice(&byte);
            this.early = Early::Heard;
            return Poll::Ready(Ok(()));
        }
        let result = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        if result.is_ok() && matches!(this.early, Early::Unread) {
            this.early = Early::Heard;
        }
        Poll::Ready(result.map_err(|error| this.explain(error)))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientStream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write(cx, buf));
        Poll::Ready(result.map_err(|error| this.explain_write(error, cx)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(result.map_err(|error| this.explain_write(error, cx)))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_flush(cx));
        Poll::Ready(result.map_err(|error| this.explain_write(error, cx)))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
