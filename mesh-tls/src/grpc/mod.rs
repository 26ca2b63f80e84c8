//! The gRPC services that issue certificates, as messages with a client and a server of each: the SPIFFE Workload API
//! and Istio's certificate authority. Written by hand: both are small and do not change.

mod istio_ca;
mod workload;

pub use istio_ca::{
    CertificateRequest, CertificateResponse, IstioCa, IstioCaClient, IstioCaServer, SERVICE as ISTIO_CA_SERVICE,
};
pub use workload::{
    JwtBundlesRequest, JwtBundlesResponse, JwtSvid, JwtSvidRequest, JwtSvidResponse, SECURITY_HEADER,
    SERVICE as WORKLOAD_API_SERVICE, ValidateJwtSvidRequest, ValidateJwtSvidResponse, WorkloadApi, WorkloadApiClient,
    WorkloadApiServer, X509BundlesRequest, X509BundlesResponse, X509Svid, X509SvidRequest, X509SvidResponse,
};

/// `google.protobuf.Struct` and its values, as messages of these services use them.
pub use prost_types::{ListValue, Struct, Value, value::Kind};

use futures::{Stream, future::BoxFuture};
use std::{convert::Infallible, pin::Pin};
use tonic::{
    Request, Response, Status,
    body::Body,
    client::GrpcService,
    codegen::http::{self, uri::PathAndQuery},
};
use tonic_prost::ProstCodec;

/// The messages of a server stream.
pub type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a server answers.
type Answer = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

async fn ready<T: GrpcService<Body>>(inner: &mut tonic::client::Grpc<T>) -> Result<(), Status> {
    inner.ready().await.map_err(|error| {
        let error: tonic::codegen::StdError = error.into();
        Status::unavailable(format!("the connection failed: {error}"))
    })
}

async fn unary<T, M, R>(
    inner: &mut tonic::client::Grpc<T>,
    request: Request<M>,
    path: &'static str,
) -> Result<Response<R>, Status>
where
    T: GrpcService<Body>,
    T::ResponseBody: tonic::codegen::Body + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
    M: prost::Message + Send + Sync + 'static,
    R: prost::Message + Default + Send + Sync + 'static,
{
    ready(inner).await?;
    inner.unary(request, PathAndQuery::from_static(path), ProstCodec::<M, R>::default()).await
}

async fn stream<T, M, R>(
    inner: &mut tonic::client::Grpc<T>,
    request: Request<M>,
    path: &'static str,
) -> Result<Response<tonic::Streaming<R>>, Status>
where
    T: GrpcService<Body>,
    T::ResponseBody: tonic::codegen::Body + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
    M: prost::Message + Send + Sync + 'static,
    R: prost::Message + Default + Send + Sync + 'static,
{
    ready(inner).await?;
    inner.server_streaming(request, PathAndQuery::from_static(path), ProstCodec::<M, R>::default()).await
}

/// Answers with a status and no body.
fn refuse(status: Status) -> Answer {
    Box::pin(std::future::ready(Ok(status.into_http())))
}

/// One method: its closure makes a tower service of tonic's kind of it.
macro_rules! answer {
    ($service:expr, $kind:ident, $method:ident, $request:expr) => {{
        let service = $service.clone();
        Box::pin(async move {
            let method = tower::service_fn(|request| {
                let service = service.clone();
                async move { service.$method(request).await }
            });
            Ok(tonic::server::Grpc::new(tonic_prost::ProstCodec::default()).$kind(method, $request).await)
        })
    }};
}

use answer;
