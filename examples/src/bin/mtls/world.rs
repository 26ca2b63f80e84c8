//! Everything that runs: the control plane with its authority, the two services, and the client.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use examples::greeter::greeter_server::GreeterServer;
use mesh_client::{Inbound, Mesh, MeshChannel};
use mesh_control::ControlPlane;
use mesh_control::model::MtlsMode;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::service::Routes;

use crate::services::{Callers, Service};

/// Of every certificate; they are renewed at half of it.
pub(crate) const LIFETIME: Duration = Duration::from_secs(6);
/// Bound of every wait for something that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

const SHOP: &str = "xds:///shop.default.svc.cluster.local:50052";
const GREETER: &str = "xds:///greeter.default.svc.cluster.local:50051";

/// The demonstration's parts.
#[derive(Debug)]
pub(crate) struct World {
    control: ControlPlane,
    client: Mesh,
    for_shop: Mesh,
    /// Kept: they serve as long as they live.
    greeter_mesh: Mesh,
    greeter_addr: SocketAddr,
    shop_callers: Callers,
    greeter_callers: Callers,
    servers: JoinSet<()>,
    _folder: TempDir,
}

impl World {
    /// Starts all of it on free loopback ports.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (shop, greeter) = (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
        let greeter_addr = greeter.local_addr()?;
        let control = ControlPlane::builder()
            .yaml(yaml(shop.local_addr()?, greeter_addr))
            .ca(folder.path().join("ca"))
            .certificate_lifetime(LIFETIME)
            .mtls(MtlsMode::Strict)
            .identity("default", "client")
            .start()
            .await?;
        let mesh = async |account: &str| -> anyhow::Result<Mesh> {
            Ok(Mesh::builder().bootstrap_json(&control.bootstrap_for("default", account))?.build().await?)
        };
        let (client, for_shop, greeter_mesh) = (mesh("client").await?, mesh("shop").await?, mesh("greeter").await?);

        let (shop_callers, greeter_callers) = (Callers::default(), Callers::default());
        let mut servers = JoinSet::new();
        let service = Service { name: "greeter", callers: greeter_callers.clone(), greeter: None };
        serve(&mut servers, greeter_mesh.inbound_builder()?.listener(greeter)?, service).await?;
        let through = Some(for_shop.channel(GREETER)?);
        let service = Service { name: "shop", callers: shop_callers.clone(), greeter: through };
        serve(&mut servers, for_shop.inbound_builder()?.listener(shop)?, service).await?;
        Ok(Self {
            control,
            client,
            for_shop,
            greeter_mesh,
            greeter_addr,
            shop_callers,
            greeter_callers,
            servers,
            _folder: folder,
        })
    }

    /// The shop, called by the client.
    pub(crate) fn shop(&self) -> anyhow::Result<MeshChannel> {
        Ok(self.client.channel(SHOP)?)
    }

    /// The greeter, called by the client.
    pub(crate) fn greeter_for_client(&self) -> anyhow::Result<MeshChannel> {
        Ok(self.client.channel(GREETER)?)
    }

    /// The greeter, called by the shop.
    pub(crate) fn greeter_for_shop(&self) -> anyhow::Result<MeshChannel> {
        Ok(self.for_shop.channel(GREETER)?)
    }

    /// Where the greeter listens.
    pub(crate) fn greeter_addr(&self) -> SocketAddr {
        self.greeter_addr
    }

    /// Who called the shop last.
    pub(crate) fn shop_saw(&self) -> String {
        self.shop_callers.last()
    }

    /// Every certificate that the shop's callers showed.
    pub(crate) fn certificates_at_shop(&self) -> HashSet<Vec<u8>> {
        self.shop_callers.certificates()
    }

    /// Every certificate that the greeter's callers showed.
    pub(crate) fn certificates_at_greeter(&self) -> HashSet<Vec<u8>> {
        self.greeter_callers.certificates()
    }

    /// The roots that are trusted, PEM.
    pub(crate) fn roots(&self) -> anyhow::Result<String> {
        Ok(self.control.ca().context("the authority is off")?.root_pem())
    }

    /// Begins to replace the root.
    pub(crate) fn rotate_root(&self) -> anyhow::Result<()> {
        Ok(self.control.ca().context("the authority is off")?.rotate_root()?)
    }

    /// Ends everything.
    pub(crate) async fn shutdown(mut self) {
        self.servers.shutdown().await;
        drop(self.greeter_mesh);
        self.control.shutdown().await;
    }
}

/// Serves once the control plane has said how.
async fn serve(servers: &mut JoinSet<()>, inbound: Inbound, service: Service) -> anyhow::Result<()> {
    let ready = tokio::time::timeout(PATIENCE, inbound.ready()).await;
    ready.with_context(|| format!("{} is not served: {:?}", service.name, inbound.serving()))?;
    let routes = Routes::new(GreeterServer::new(service));
    servers.spawn(async move {
        if let Err(error) = inbound.serve(routes).await {
            tracing::error!(%error, "a service ended");
        }
    });
    Ok(())
}

fn yaml(shop: SocketAddr, greeter: SocketAddr) -> String {
    let service = |name: &str, port: u16, addr: SocketAddr| {
        let (ip, target) = (addr.ip(), addr.port());
        format!(
            "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{name}.default.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: {port}, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: {ip}, ports: {{grpc: {target}}}, labels: {{app: {name}}}, serviceAccount: {name}}}]
"
        )
    };
    let policy = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: greeter, namespace: default}
spec:
  selector: {matchLabels: {app: greeter}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/shop]}}]
    to: [{operation: {paths: [/helloworld.Greeter/SayHello]}}]
";
    service("shop", 50052, shop) + &service("greeter", 50051, greeter) + policy
}
