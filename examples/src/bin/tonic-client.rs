//! The smallest gRPC client in a mesh: a generated tonic client on a mesh channel.
//!
//! Needs a control plane that GRPC_XDS_BOOTSTRAP or GRPC_XDS_BOOTSTRAP_CONFIG names, as README shows.

use std::time::Duration;

use examples::greeter::HelloRequest;
use examples::greeter::greeter_client::GreeterClient;
use mesh_client::Mesh;

#[tokio::main]
#[allow(clippy::print_stdout, reason = "the program's output")]
async fn main() -> anyhow::Result<()> {
    let mesh = Mesh::from_env().await?;
    let channel = mesh.channel("xds:///greeter.default.svc.cluster.local:50051")?;
    channel.ready(Duration::from_secs(5)).await?; // optional: fails early, and says why

    let mut greeter = GreeterClient::new(channel);
    let reply = greeter.say_hello(HelloRequest { name: "mesh".to_owned(), count: 0 }).await?.into_inner();
    println!("{} says: {}", reply.backend, reply.message);
    Ok(())
}
