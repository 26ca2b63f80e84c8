//! `istio.v1.auth.IstioCertificateService`: certificates by CSR (Istio's `security/v1alpha1/ca.proto`).

use super::{Answer, answer, refuse, unary};
use prost_types::Struct;
use std::{
    convert::Infallible,
    fmt,
    future::Future,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::{
    Request, Response, Status,
    body::Body,
    client::{Grpc, GrpcService},
    codegen::{Body as HttpBody, Service, StdError, http},
    server::NamedService,
};

/// The full name of the service.
pub const SERVICE: &str = "istio.v1.auth.IstioCertificateService";
const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    /// The certificate signing request in PEM (PKCS#10).
    #[prost(string, tag = "1")]
    pub csr: String,
    /// The wished lifetime in seconds; the authority may shorten it.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// Whatever the authority understands, for example `CertSigner`.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateResponse {
    /// PEM: the leaf first, then intermediates, the root last.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// A certificate authority.
pub trait IstioCa: Send + Sync + 'static {
    /// Signs a request of the authenticated caller: by bearer token in `authorization`, or by the connection's client
    /// certificate (in the request's extensions).
    fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> impl Future<Output = Result<Response<CertificateResponse>, Status>> + Send;
}

/// Calls a certificate authority.
#[derive(Clone, Debug)]
pub struct IstioCaClient<T>(Grpc<T>);

impl<T> IstioCaClient<T>
where
    T: GrpcService<Body>,
    T::ResponseBody: HttpBody + Send + 'static,
    <T::ResponseBody as HttpBody>::Error: Into<StdError> + Send,
{
    /// Over a channel.
    pub fn new(channel: T) -> Self {
        Self(Grpc::new(channel))
    }

    /// Has a certificate signed.
    ///
    /// # Errors
    /// The authority's status, or `UNAVAILABLE` when it cannot be reached.
    pub async fn create_certificate(
        &mut self,
        request: impl tonic::IntoRequest<CertificateRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        unary(&mut self.0, request.into_request(), CREATE_CERTIFICATE).await
    }
}

/// Serves an [`IstioCa`]: add it to tonic's server or `Routes`.
pub struct IstioCaServer<S>(Arc<S>);

impl<S: IstioCa> IstioCaServer<S> {
    /// Serves this authority.
    pub fn new(service: impl Into<Arc<S>>) -> Self {
        Self(service.into())
    }
}

impl<S: IstioCa, B> Service<http::Request<B>> for IstioCaServer<S>
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
        match request.uri().path() {
            CREATE_CERTIFICATE => answer!(self.0, unary, create_certificate, request),
            _ => refuse(Status::unimplemented("no such method")),
        }
    }
}

impl<S> NamedService for IstioCaServer<S> {
    const NAME: &'static str = SERVICE;
}

impl<S> Clone for IstioCaServer<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> fmt::Debug for IstioCaServer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCaServer").finish_non_exhaustive()
    }
}
