//! What the tests share: greeters, channels and calls.

use examples::{
    backend::{Backend, Options},
    greeter::{HelloReply, HelloRequest, greeter_client::GreeterClient},
};
use mesh_client::{Mesh, MeshChannel};
use std::net::SocketAddr;
use tonic::{Request, Status};

/// Any free loopback port.
pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A greeter of this name.
pub(crate) async fn greeter(name: &str) -> Backend {
    Backend::start(name, ANY, Options::default()).await.expect("a free port")
}

/// A mesh without a control plane.
pub(crate) async fn plain_mesh() -> Mesh {
    Mesh::builder().build().await.expect("inside a runtime")
}

/// One call.
pub(crate) async fn hello(channel: &MeshChannel) -> Result<HelloReply, Status> {
    hello_with(channel, |_| {}).await
}

/// One call whose request is dressed up first.
pub(crate) async fn hello_with(
    channel: &MeshChannel,
    dress: impl FnOnce(&mut Request<HelloRequest>),
) -> Result<HelloReply, Status> {
    let mut request = Request::new(HelloRequest { name: "test".to_owned(), count: 0 });
    dress(&mut request);
    GreeterClient::new(channel.clone()).say_hello(request).await.map(tonic::Response::into_inner)
}
