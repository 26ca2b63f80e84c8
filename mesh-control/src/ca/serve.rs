//! The servers of the authority: Istio's CA API beside ADS over TLS, and for each workload a unix socket with the SPIFFE Workload API and
//! SDS.
//!
//! Who asks over TLS says who it is by a token or a client certificate. Who can open the socket of a workload (`api.sock` in its folder,
//! which is for the owner only) has its identity, as who can read its files has.

mod secrets;
mod workload;

use super::{AUDIENCE, CertificateAuthority, Error, control_plane_names};
use envoy_types::pb::google::protobuf::value::Kind;
use futures::future::BoxFuture;
use mesh_tls::{
    Acceptor, ClientAuth, Identity, MemorySource, PeerIdentity, ServerSettings, SpiffeId, TrustRoots, default_provider,
    grpc::{CertificateRequest, CertificateResponse, ISTIO_CA_SERVICE, IstioCa, IstioCaServer},
};
use mesh_xds::server::{ResourceCache, ResourceSet, ResourceType, ServerOptions, Tailor, serve_connection_with};
use rcgen::SanType;
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
};

#[cfg(unix)]
pub(crate) use workload::Sockets;

/// Whom the control plane itself is.
const CONTROL_PLANE: (&str, &str) = ("istio-system", "istiod");
/// A listener that fails is tried again after this.
const PAUSE: Duration = Duration::from_millis(50);

/// Signs the requests of workloads.
#[derive(Debug)]
struct Signer {
    ca: CertificateAuthority,
}

impl Signer {
    fn caller<T>(&self, request: &Request<T>) -> Result<SpiffeId, Status> {
        let token = request.metadata().get("authorization").map(|value| value.to_str().unwrap_or_default());
        let id = match token {
            Some(header) => {
                let token = header.strip_prefix("Bearer ").or_else(|| header.strip_prefix("bearer "));
                let token = token.ok_or_else(|| Status::unauthenticated("the authorization is no bearer token"))?;
                let verified = self.ca.tokens().verify(token.trim(), AUDIENCE, SystemTime::now());
                let verified =
                    verified.map_err(|reason| Status::unauthenticated(format!("the token is refused: {reason}")))?;
                verified
                    .subject
                    .parse::<SpiffeId>()
                    .map_err(|_| Status::unauthenticated("the token's subject is no SPIFFE id"))?
            }
            None => {
                let peer = request.extensions().get::<PeerIdentity>().and_then(PeerIdentity::spiffe_id).cloned();
                peer.ok_or_else(|| Status::unauthenticated("there is neither a token nor a client certificate"))?
            }
        };
        if id.trust_domain_str() != self.ca.trust_domain() {
            return Err(Status::permission_denied(format!("{id} is of another trust domain")));
        }
        Ok(id)
    }
}

impl IstioCa for Signer {
    async fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        let id = self.caller(&request)?;
        let request = request.into_inner();
        let wanted = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        let signed = self.ca.sign(&request.csr, &id, wanted.map(Duration::from_secs));
        let chain = signed.map_err(|error| Status::invalid_argument(error.to_string()))?;
        tracing::debug!(%id, "certificate signed");
        Ok(Response::new(CertificateResponse { cert_chain: chain.into() }))
    }
}

/// The services of one connection over TLS, beside ADS.
#[derive(Clone)]
struct Authority {
    signer: IstioCaServer<Signer>,
    peer: Option<PeerIdentity>,
}

impl Service<http::Request<Body>> for Authority {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if let Some(peer) = self.peer.clone() {
            request.extensions_mut().insert(peer);
        }
        if is_of(&request, ISTIO_CA_SERVICE) { self.signer.call(request) } else { unknown() }
    }
}

fn is_of<B>(request: &http::Request<B>, service: &str) -> bool {
    request
        .uri()
        .path()
        .strip_prefix('/')
        .and_then(|path| path.strip_prefix(service))
        .is_some_and(|m| m.starts_with('/'))
}

fn unknown() -> BoxFuture<'static, Result<http::Response<Body>, Infallible>> {
    Box::pin(std::future::ready(Ok(Status::unimplemented("there is no such service here").into_http())))
}

/// Serves ADS and Istio's CA API over TLS, forever. Clients may show a certificate; one that they show is verified.
///
/// # Errors
/// The control plane's own certificate cannot be made.
pub(crate) fn secure(
    listener: TcpListener,
    addr: SocketAddr,
    ca: CertificateAuthority,
    cache: ResourceCache,
) -> Result<impl Future<Output = ()> + Send, Error> {
    let names = control_plane_names(addr.ip());
    let (identity, roots) = own(&ca, &names)?;
    let source = Arc::new(MemorySource::new("control plane", Some(identity), Some(roots)));
    let settings = ServerSettings {
        client_auth: ClientAuth::Optional,
        alpn: vec![b"h2".to_vec()],
        ..ServerSettings::mtls(source.clone())
    };
    let acceptor = Acceptor::new(settings, default_provider());
    let acceptor =
        acceptor.map_err(|error| Error::Listen { place: addr.to_string(), source: std::io::Error::other(error) })?;
    let signer = IstioCaServer::new(Signer { ca: ca.clone() });
    Ok(async move {
        let mut connections = JoinSet::new();
        connections.spawn(renew(ca, names, source));
        loop {
            tokio::select! {
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((tcp, peer)) => {
                        let (acceptor, cache, signer) = (acceptor.clone(), cache.clone(), signer.clone());
                        connections.spawn(async move {
                            match acceptor.accept(tcp).await {
                                Ok(stream) => {
                                    let others = Authority { signer, peer: stream.peer().cloned() };
                                    serve_connection_with(stream, cache, ServerOptions::default(), others).await;
                                }
                                Err(error) => tracing::debug!(%peer, %error, "refused"),
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    })
}

/// The control plane's certificate, and the roots of its clients.
fn own(ca: &CertificateAuthority, names: &[SanType]) -> Result<(Identity, Arc<TrustRoots>), Error> {
    let id = ca.spiffe_id(CONTROL_PLANE.0, CONTROL_PLANE.1);
    let svid = ca.svid(&id, names).map_err(|source| Error::Certificate { path: ca.dir().to_owned(), source })?;
    let unusable = |error: mesh_tls::MaterialError| Error::File {
        path: ca.dir().to_owned(),
        source: std::io::Error::other(error),
    };
    let (chain, key) = (svid.certificate_pem.as_bytes(), svid.key_pem.as_bytes());
    let identity = Identity::from_pem(chain, key, &default_provider()).map_err(unusable)?;
    let roots = TrustRoots::from_pem(ca.root_pem().as_bytes()).map_err(unusable)?;
    Ok((identity, Arc::new(roots)))
}

/// Keeps the control plane's certificate and roots new.
async fn renew(ca: CertificateAuthority, names: Vec<SanType>, source: Arc<MemorySource>) {
    let (mut news, mut roots) = (ca.news(), ca.root_pem());
    loop {
        let half = tokio::time::sleep(ca.lifetime() / 2);
        tokio::pin!(half);
        loop {
            tokio::select! {
                () = &mut half => break,
                changed = news.changed() => {
                    // `ca` holds the sender.
                    if changed.is_err() || ca.root_pem() != roots {
                        break;
                    }
                }
            }
        }
        roots = ca.root_pem();
        match own(&ca, &names) {
            Ok((identity, roots)) => source.replace(Some(identity), Some(roots)),
            Err(error) => {
                tracing::error!(%error, "the control plane's own certificate cannot be renewed");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// The secrets of all workloads, each for the nodes that say they are it.
pub(crate) fn secrets(ca: &CertificateAuthority, set: &mut ResourceSet) {
    let version = *ca.news().borrow();
    for name in [secrets::CERTIFICATE, secrets::ROOTS] {
        let none = secrets::empty(name);
        let authority = ca.clone();
        let tailor = Tailor::new(format!("{name} {version}"), move |node| {
            let said = |key: &str| match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
                Kind::StringValue(text) => Some(text.clone()),
                _ => None,
            };
            let workload = said("NAMESPACE").zip(said("SERVICE_ACCOUNT"));
            let workload =
                workload.map(|(namespace, account)| workload::Workload { ca: authority.clone(), namespace, account });
            workload.and_then(|workload| workload.secret(name)).unwrap_or_else(|| secrets::empty(name))
        });
        set.insert_tailored(ResourceType::Secret, name, none, tailor);
    }
}
