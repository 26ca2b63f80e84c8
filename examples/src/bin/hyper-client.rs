//! The smallest HTTP client in a mesh: a hyper client with the mesh's layer around it.
//!
//! Hosts that the mesh knows are routed by it; all others go to the inner client as they came. Needs a control plane that
//! GRPC_XDS_BOOTSTRAP or GRPC_XDS_BOOTSTRAP_CONFIG names, as README shows.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mesh_client::Mesh;
use tower::{Service, ServiceBuilder, ServiceExt};

#[tokio::main]
#[allow(clippy::print_stdout, reason = "the program's output")]
async fn main() -> anyhow::Result<()> {
    let mesh = Mesh::from_env().await?;
    let hyper = Client::builder(TokioExecutor::new()).build_http();
    let mut client = ServiceBuilder::new().layer(mesh.layer()).service(hyper);

    let mut urls: Vec<String> = std::env::args().skip(1).collect();
    if urls.is_empty() {
        urls.push("http://reviews.default.svc.cluster.local:9080/reviews/1".to_owned());
    }
    for url in urls {
        let request = Request::get(&url).body(Empty::<Bytes>::new())?;
        let answer = client.ready().await.map_err(anyhow::Error::from_boxed)?.call(request).await;
        let answer = answer.map_err(anyhow::Error::from_boxed)?;
        let by = if answer.body().is_mesh() { "through the mesh" } else { "past the mesh" };
        println!("{url}: {} {by}", answer.status());
        let body = answer.into_body().collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
        println!("{}", String::from_utf8_lossy(&body).trim_end());
    }
    Ok(())
}
