//! The SPIFFE Workload API (`workload.proto` of the SPIFFE standard; the service has no package).

use super::{Answer, Replies, answer, refuse, stream, unary};
use prost_types::Struct;
use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    future::Future,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    client::{Grpc, GrpcService},
    codegen::{Body as HttpBody, Service, StdError, http},
    metadata::MetadataValue,
    server::NamedService,
};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The full name of the service.
pub const SERVICE: &str = "SpiffeWorkloadAPI";
/// The metadata key that every request carries with the value `true`, so that no browser or HTTP proxy can be tricked into
/// making one (SPIFFE Workload Endpoint, section 4).
pub const SECURITY_HEADER: &str = "workload.spiffe.io";

const FETCH_X509_SVID: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const FETCH_X509_BUNDLES: &str = "/SpiffeWorkloadAPI/FetchX509Bundles";
const FETCH_JWT_SVID: &str = "/SpiffeWorkloadAPI/FetchJWTSVID";
const FETCH_JWT_BUNDLES: &str = "/SpiffeWorkloadAPI/FetchJWTBundles";
const VALIDATE_JWT_SVID: &str = "/SpiffeWorkloadAPI/ValidateJWTSVID";

/// `X509SVIDRequest`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct X509SvidRequest {}

/// `X509SVIDResponse`: replaces the one before as a whole.
#[derive(Clone, PartialEq, prost::Message)]
pub struct X509SvidResponse {
    /// The identities of the caller; the first is its default.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<X509Svid>,
    /// Certificate revocation lists in DER.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub crl: Vec<Vec<u8>>,
    /// Roots of foreign trust domains: concatenated DER by trust domain, with or without `spiffe://`.
    #[prost(map = "string, bytes", tag = "3")]
    pub federated_bundles: HashMap<String, Vec<u8>>,
}

/// `X509SVID`. `Debug` does not show the key, which is wiped when this is dropped.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct X509Svid {
    /// The SPIFFE id.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// Concatenated DER: the leaf first, then intermediates.
    #[prost(bytes = "vec", tag = "2")]
    pub x509_svid: Vec<u8>,
    /// PKCS#8 in DER.
    #[prost(bytes = "vec", tag = "3")]
    pub x509_svid_key: Vec<u8>,
    /// Roots of the id's own trust domain: concatenated DER.
    #[prost(bytes = "vec", tag = "4")]
    pub bundle: Vec<u8>,
    /// Tells several identities apart.
    #[prost(string, tag = "5")]
    pub hint: String,
}

/// `X509BundlesRequest`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct X509BundlesRequest {}

/// `X509BundlesResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct X509BundlesResponse {
    /// Certificate revocation lists in DER.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub crl: Vec<Vec<u8>>,
    /// Concatenated DER by trust domain.
    #[prost(map = "string, bytes", tag = "2")]
    pub bundles: HashMap<String, Vec<u8>>,
}

/// `JWTSVIDRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JwtSvidRequest {
    /// At least one.
    #[prost(string, repeated, tag = "1")]
    pub audience: Vec<String>,
    /// Which identity; empty for all of the caller's.
    #[prost(string, tag = "2")]
    pub spiffe_id: String,
}

/// `JWTSVIDResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JwtSvidResponse {
    /// The first is the default.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<JwtSvid>,
}

/// `JWTSVID`. `Debug` does not show the token, which is wiped when this is dropped.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct JwtSvid {
    /// The SPIFFE id.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// The token, in JWS compact serialization.
    #[prost(string, tag = "2")]
    pub svid: String,
    /// Tells several identities apart.
    #[prost(string, tag = "3")]
    pub hint: String,
}

/// `JWTBundlesRequest`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct JwtBundlesRequest {}

/// `JWTBundlesResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JwtBundlesResponse {
    /// JWKS documents by trust domain.
    #[prost(map = "string, bytes", tag = "1")]
    pub bundles: HashMap<String, Vec<u8>>,
}

/// `ValidateJWTSVIDRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ValidateJwtSvidRequest {
    /// Must be among the token's audiences.
    #[prost(string, tag = "1")]
    pub audience: String,
    /// The token.
    #[prost(string, tag = "2")]
    pub svid: String,
}

/// `ValidateJWTSVIDResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ValidateJwtSvidResponse {
    /// Who the token speaks for.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// The token's claims.
    #[prost(message, optional, tag = "2")]
    pub claims: Option<Struct>,
}

/// A workload endpoint. Requests without the [`SECURITY_HEADER`] are refused before they come here.
pub trait WorkloadApi: Send + Sync + 'static {
    /// The caller's identities, now and whenever they change.
    fn fetch_x509_svid(
        &self,
        request: Request<X509SvidRequest>,
    ) -> impl Future<Output = Result<Response<Replies<X509SvidResponse>>, Status>> + Send;

    /// The roots that the caller may use, now and whenever they change.
    fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> impl Future<Output = Result<Response<Replies<X509BundlesResponse>>, Status>> + Send;

    /// Tokens for an audience.
    fn fetch_jwt_svid(
        &self,
        request: Request<JwtSvidRequest>,
    ) -> impl Future<Output = Result<Response<JwtSvidResponse>, Status>> + Send;

    /// The keys that verify tokens, now and whenever they change.
    fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> impl Future<Output = Result<Response<Replies<JwtBundlesResponse>>, Status>> + Send;

    /// Verifies a token.
    fn validate_jwt_svid(
        &self,
        request: Request<ValidateJwtSvidRequest>,
    ) -> impl Future<Output = Result<Response<ValidateJwtSvidResponse>, Status>> + Send;
}

/// Calls a workload endpoint; the [`SECURITY_HEADER`] is added to every request.
#[derive(Clone, Debug)]
pub struct WorkloadApiClient<T>(Grpc<T>);

impl<T> WorkloadApiClient<T>
where
    T: GrpcService<Body>,
    T::ResponseBody: HttpBody + Send + 'static,
    <T::ResponseBody as HttpBody>::Error: Into<StdError> + Send,
{
    /// Over a channel.
    pub fn new(channel: T) -> Self {
        Self(Grpc::new(channel))
    }

    /// Our identities, now and whenever they change.
    ///
    /// # Errors
    /// The endpoint's status (`PERMISSION_DENIED`: it has no identity for us), or `UNAVAILABLE`.
    pub async fn fetch_x509_svid(&mut self) -> Result<Response<Streaming<X509SvidResponse>>, Status> {
        stream(&mut self.0, marked(X509SvidRequest {}), FETCH_X509_SVID).await
    }

    /// The roots, now and whenever they change.
    ///
    /// # Errors
    /// As [`Self::fetch_x509_svid`].
    pub async fn fetch_x509_bundles(&mut self) -> Result<Response<Streaming<X509BundlesResponse>>, Status> {
        stream(&mut self.0, marked(X509BundlesRequest {}), FETCH_X509_BUNDLES).await
    }

    /// Tokens for an audience.
    ///
    /// # Errors
    /// As [`Self::fetch_x509_svid`].
    pub async fn fetch_jwt_svid(&mut self, request: JwtSvidRequest) -> Result<Response<JwtSvidResponse>, Status> {
        unary(&mut self.0, marked(request), FETCH_JWT_SVID).await
    }

    /// The keys that verify tokens, now and whenever they change.
    ///
    /// # Errors
    /// As [`Self::fetch_x509_svid`].
    pub async fn fetch_jwt_bundles(&mut self) -> Result<Response<Streaming<JwtBundlesResponse>>, Status> {
        stream(&mut self.0, marked(JwtBundlesRequest {}), FETCH_JWT_BUNDLES).await
    }

    /// Has a token verified.
    ///
    /// # Errors
    /// As [`Self::fetch_x509_svid`]; `INVALID_ARGUMENT` when the token is not valid.
    pub async fn validate_jwt_svid(
        &mut self,
        request: ValidateJwtSvidRequest,
    ) -> Result<Response<ValidateJwtSvidResponse>, Status> {
        unary(&mut self.0, marked(request), VALIDATE_JWT_SVID).await
    }
}

fn marked<M>(message: M) -> Request<M> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(SECURITY_HEADER, MetadataValue::from_static("true"));
    request
}

/// Serves a [`WorkloadApi`]: add it to tonic's server or `Routes`.
pub struct WorkloadApiServer<S>(Arc<S>);

impl<S: WorkloadApi> WorkloadApiServer<S> {
    /// Serves this endpoint.
    pub fn new(service: impl Into<Arc<S>>) -> Self {
        Self(service.into())
    }
}

impl<S: WorkloadApi, B> Service<http::Request<B>> for WorkloadApiServer<S>
where
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Answer {
        if request.headers().get(SECURITY_HEADER).is_none_or(|value| value != "true") {
            return refuse(Status::invalid_argument("security header missing from request"));
        }
        match request.uri().path() {
            FETCH_X509_SVID => answer!(self.0, server_streaming, fetch_x509_svid, request),
            FETCH_X509_BUNDLES => answer!(self.0, server_streaming, fetch_x509_bundles, request),
            FETCH_JWT_SVID => answer!(self.0, unary, fetch_jwt_svid, request),
            FETCH_JWT_BUNDLES => answer!(self.0, server_streaming, fetch_jwt_bundles, request),
            VALIDATE_JWT_SVID => answer!(self.0, unary, validate_jwt_svid, request),
            _ => refuse(Status::unimplemented("no such method")),
        }
    }
}

impl<S> NamedService for WorkloadApiServer<S> {
    const NAME: &'static str = SERVICE;
}

impl<S> Clone for WorkloadApiServer<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> fmt::Debug for WorkloadApiServer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadApiServer").finish_non_exhaustive()
    }
}

impl Drop for X509Svid {
    fn drop(&mut self) {
        self.x509_svid_key.zeroize();
    }
}

impl ZeroizeOnDrop for X509Svid {}

impl Drop for JwtSvid {
    fn drop(&mut self) {
        self.svid.zeroize();
    }
}

impl ZeroizeOnDrop for JwtSvid {}

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509Svid").field("spiffe_id", &self.spiffe_id).field("hint", &self.hint).finish_non_exhaustive()
    }
}

impl fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSvid").field("spiffe_id", &self.spiffe_id).field("hint", &self.hint).finish_non_exhaustive()
    }
}
