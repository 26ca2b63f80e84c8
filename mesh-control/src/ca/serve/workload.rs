//! The SPIFFE Workload API of one workload, and the sockets on which all of them are served.

use super::{is_of, secrets::Secrets, unknown};
use crate::ca::{CertificateAuthority, Error};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer;
use futures::{future::BoxFuture, stream};
use mesh_tls::grpc::{
    JwtBundlesRequest, JwtBundlesResponse, JwtSvid, JwtSvidRequest, JwtSvidResponse, Kind, ListValue, Replies, Struct,
    ValidateJwtSvidRequest, ValidateJwtSvidResponse, Value, WORKLOAD_API_SERVICE, WorkloadApi, WorkloadApiServer,
    X509BundlesRequest, X509BundlesResponse, X509Svid, X509SvidRequest, X509SvidResponse,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::Value as Json;
use std::{
    convert::Infallible,
    task::{Context, Poll},
    time::SystemTime,
};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService as _,
};

/// What one workload is told.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) ca: CertificateAuthority,
    pub(super) namespace: String,
    pub(super) account: String,
}

impl Workload {
    fn x509(&self) -> Result<X509SvidResponse, Status> {
        let svid = self.ca.current(&self.namespace, &self.account);
        let svid = svid.ok_or_else(|| Status::permission_denied("there is no such identity"))?;
        let svid = X509Svid {
            spiffe_id: svid.id.clone(),
            x509_svid: svid.certificate_der.clone(),
            x509_svid_key: svid.key_der.clone(),
            bundle: self.bundle(),
            hint: String::new(),
        };
        Ok(X509SvidResponse { svids: vec![svid], ..X509SvidResponse::default() })
    }

    /// The roots, as DER one after the other.
    fn bundle(&self) -> Vec<u8> {
        let pem = self.ca.root_pem();
        CertificateDer::pem_slice_iter(pem.as_bytes()).flatten().flat_map(|der| der.to_vec()).collect()
    }

    fn trust_domain(&self) -> String {
        format!("spiffe://{}", self.ca.trust_domain())
    }

    /// What `now` says, and again whenever it says something else.
    fn whenever<T>(&self, now: impl Fn(&Self) -> Result<T, Status> + Send + 'static) -> Replies<T>
    where
        T: Clone + PartialEq + Send + 'static,
    {
        let news = self.ca.news();
        let state = (self.clone(), now, news, None::<T>, false);
        Box::pin(stream::unfold(state, |(workload, now, mut news, last, failed)| async move {
            if failed {
                return None;
            }
            loop {
                news.mark_unchanged();
                match now(&workload) {
                    Ok(next) if last.as_ref() != Some(&next) => {
                        return Some((Ok(next.clone()), (workload, now, news, Some(next), false)));
                    }
                    Ok(_) => {}
                    Err(status) => return Some((Err(status), (workload, now, news, last, true))),
                }
                // `workload` holds the sender.
                news.changed().await.ok()?;
            }
        }))
    }
}

impl WorkloadApi for Workload {
    async fn fetch_x509_svid(
        &self,
        _: Request<X509SvidRequest>,
    ) -> Result<Response<Replies<X509SvidResponse>>, Status> {
        Ok(Response::new(self.whenever(Self::x509)))
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<X509BundlesRequest>,
    ) -> Result<Response<Replies<X509BundlesResponse>>, Status> {
        Ok(Response::new(self.whenever(|workload| {
            let bundles = [(workload.trust_domain(), workload.bundle())].into();
            Ok(X509BundlesResponse { bundles, ..X509BundlesResponse::default() })
        })))
    }

    async fn fetch_jwt_svid(&self, request: Request<JwtSvidRequest>) -> Result<Response<JwtSvidResponse>, Status> {
        let request = request.into_inner();
        let id = self.ca.spiffe_id(&self.namespace, &self.account);
        if request.audience.is_empty() || request.audience.iter().any(String::is_empty) {
            return Err(Status::invalid_argument("a token is for somebody: the audience is empty"));
        }
        if !request.spiffe_id.is_empty() && request.spiffe_id != id {
            return Err(Status::permission_denied(format!("{} is not the caller's", request.spiffe_id)));
        }
        let token = self.ca.token(&self.namespace, &self.account, &request.audience);
        let svid = token.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(JwtSvidResponse { svids: vec![JwtSvid { spiffe_id: id, svid, hint: String::new() }] }))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<JwtBundlesRequest>,
    ) -> Result<Response<Replies<JwtBundlesResponse>>, Status> {
        Ok(Response::new(self.whenever(|workload| {
            let bundles = [(workload.trust_domain(), workload.ca.jwks().as_bytes().to_vec())].into();
            Ok(JwtBundlesResponse { bundles })
        })))
    }

    async fn validate_jwt_svid(
        &self,
        request: Request<ValidateJwtSvidRequest>,
    ) -> Result<Response<ValidateJwtSvidResponse>, Status> {
        let request = request.into_inner();
        let verified = self.ca.tokens().verify(&request.svid, &request.audience, SystemTime::now());
        let verified = verified.map_err(|why| Status::invalid_argument(format!("the token is refused: {why}")))?;
        let Some(Kind::StructValue(claims)) = value(&verified.claims).kind else {
            return Err(Status::invalid_argument("the token has no claims"));
        };
        Ok(Response::new(ValidateJwtSvidResponse { spiffe_id: verified.subject, claims: Some(claims) }))
    }
}

fn value(json: &Json) -> Value {
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(*value),
        Json::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        Json::String(value) => Kind::StringValue(value.clone()),
        Json::Array(values) => Kind::ListValue(ListValue { values: values.iter().map(value).collect() }),
        Json::Object(fields) => {
            let fields = fields.iter().map(|(key, json)| (key.clone(), value(json))).collect();
            Kind::StructValue(Struct { fields })
        }
    };
    Value { kind: Some(kind) }
}

/// The services of a workload's socket.
#[derive(Clone, Debug)]
struct Services {
    workload: WorkloadApiServer<Workload>,
    secrets: SecretDiscoveryServiceServer<Secrets>,
}

impl Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if is_of(&request, WORKLOAD_API_SERVICE) {
            self.workload.call(request)
        } else if is_of(&request, SecretDiscoveryServiceServer::<Secrets>::NAME) {
            self.secrets.call(request)
        } else {
            unknown()
        }
    }
}

#[cfg(unix)]
pub(crate) use sockets::Sockets;

#[cfg(unix)]
mod sockets {
    use super::{
        CertificateAuthority, Error, SecretDiscoveryServiceServer, Secrets, Services, Workload, WorkloadApiServer,
    };
    use crate::ca::{files::bind_private, serve::PAUSE};
    use mesh_xds::server::{ResourceCache, ServerOptions, serve_connection_with};
    use std::{collections::BTreeSet, path::PathBuf};
    use tokio::{net::UnixListener, task::JoinSet};

    /// A socket for each identity of the authority.
    #[derive(Debug)]
    pub(crate) struct Sockets {
        ca: CertificateAuthority,
        cache: ResourceCache,
        open: BTreeSet<PathBuf>,
        tasks: JoinSet<()>,
    }

    impl Sockets {
        /// Opens the sockets of the identities that there are.
        ///
        /// # Errors
        /// One of them cannot be opened.
        ///
        /// # Panics
        /// Outside a tokio runtime.
        pub(crate) fn open(ca: CertificateAuthority, cache: ResourceCache) -> Result<Self, Error> {
            let mut sockets = Self { ca, cache, open: BTreeSet::new(), tasks: JoinSet::new() };
            sockets.open_missing()?;
            Ok(sockets)
        }

        /// Opens a socket for every identity that comes, forever.
        pub(crate) async fn follow(mut self) {
            let mut news = self.ca.news();
            loop {
                if let Err(error) = self.open_missing() {
                    tracing::error!(%error, "a workload has no socket");
                }
                // `self.ca` holds the sender.
                if news.changed().await.is_err() {
                    return;
                }
            }
        }

        fn open_missing(&mut self) -> Result<(), Error> {
            for (namespace, account) in self.ca.identities() {
                let path = self.ca.socket(&namespace, &account);
                if !self.open.insert(path.clone()) {
                    continue;
                }
                let listener = bind_private(&path);
                let listener =
                    listener.map_err(|source| Error::Listen { place: path.display().to_string(), source })?;
                let workload = Workload { ca: self.ca.clone(), namespace, account };
                let secrets = SecretDiscoveryServiceServer::new(Secrets::new(workload.clone()));
                let services = Services { workload: WorkloadApiServer::new(workload), secrets };
                self.tasks.spawn(serve(listener, self.cache.clone(), services));
            }
            Ok(())
        }
    }

    async fn serve(listener: UnixListener, cache: ResourceCache, services: Services) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (cache, services) = (cache.clone(), services.clone());
                        connections.spawn(serve_connection_with(stream, cache, ServerOptions::default(), services));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    }
}
