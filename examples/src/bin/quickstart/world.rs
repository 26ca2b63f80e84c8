//! Everything that runs: the control plane on a copy of `examples/mesh`, the backends, and the client's mesh.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use examples::backend::{Backend, HttpBackend, Options};
use examples::server::{acceptor, tls};
use mesh_client::{Mesh, MeshChannel};
use mesh_control::{CertificateAuthority, ControlPlane, Event};
use mesh_tls::{Acceptor, Mode};
use tempfile::TempDir;

use crate::traffic::Traffic;
use examples::report::Report;

pub(crate) const GREETER: &str = "xds:///greeter.default.svc.cluster.local:50051";
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
/// Bound of every wait for something that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The demonstration's parts.
#[derive(Debug)]
pub(crate) struct World {
    folder: TempDir,
    control: Option<ControlPlane>,
    control_addr: SocketAddr,
    /// Two of version v1, one of v2.
    pub(crate) greeters: Vec<Backend>,
    pub(crate) reviews: HttpBackend,
    acceptor: Acceptor,
    pub(crate) mesh: Mesh,
    pub(crate) greeter: MeshChannel,
}

impl World {
    /// Starts all of it on free loopback ports.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (mesh_dir, ca_dir) = (folder.path().join("mesh"), folder.path().join("ca"));
        std::fs::create_dir(&mesh_dir)?;
        // The greeters hold certificates from the dev CA from the start; they take plaintext too, until told otherwise.
        let ca = CertificateAuthority::open(&ca_dir, "cluster.local", Duration::from_secs(24 * 3600))?;
        let acceptor = acceptor(&ca.issue("default", "greeter")?, Mode::Permissive)?;

        let mut greeters = Vec::new();
        for name in ["v1-a", "v1-b", "v2"] {
            let options = Options { accept: tls(acceptor.clone()), ..Options::default() };
            greeters.push(Backend::start(name, ANY, options).await?);
        }
        let reviews = Backend::http("reviews", ANY, Options::default()).await?;

        let ports = [
            (6001, greeters[0].addr()),
            (6002, greeters[1].addr()),
            (6003, greeters[2].addr()),
            (6080, reviews.addr()),
        ];
        copy_yaml(&mesh_dir, &ports)?;
        let control = ControlPlane::builder().dir(&mesh_dir).ca(&ca_dir).identity("default", "client").start().await?;
        let control_addr = control.addr();
        let mesh = Mesh::builder().bootstrap_json(&control.bootstrap())?.build().await?;
        let greeter = mesh.channel(GREETER)?;
        Ok(Self { folder, control: Some(control), control_addr, greeters, reviews, acceptor, mesh, greeter })
    }

    /// The control plane.
    pub(crate) fn control(&self) -> anyhow::Result<&ControlPlane> {
        self.control.as_ref().context("the control plane is down")
    }

    /// Kills the control plane.
    pub(crate) async fn stop_control(&mut self) {
        if let Some(control) = self.control.take() {
            control.shutdown().await;
        }
    }

    /// Starts it again on its address and folder.
    pub(crate) async fn start_control(&mut self) -> anyhow::Result<()> {
        let (mesh_dir, ca_dir) = (self.mesh_dir(), self.ca_dir());
        let control = ControlPlane::builder().dir(mesh_dir).ca(ca_dir).listen(self.control_addr);
        self.control = Some(control.identity("default", "client").start().await?);
        Ok(())
    }

    /// The folder of the YAML files.
    pub(crate) fn mesh_dir(&self) -> PathBuf {
        self.folder.path().join("mesh")
    }

    /// The folder of the dev CA.
    pub(crate) fn ca_dir(&self) -> PathBuf {
        self.folder.path().join("ca")
    }

    /// The control plane's address.
    pub(crate) fn control_addr(&self) -> SocketAddr {
        self.control_addr
    }

    /// Changes what connections the greeters take.
    pub(crate) fn set_mode(&self, mode: Mode) {
        self.acceptor.set_mode(mode);
    }

    /// Edits one YAML file as an editor does, by rename.
    pub(crate) fn edit(&self, file: &str, change: impl FnOnce(String) -> String) -> anyhow::Result<()> {
        let path = self.mesh_dir().join(file);
        let text = change(std::fs::read_to_string(&path)?);
        let new = self.folder.path().join(format!("{file}.edited"));
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(new, path)?)
    }

    /// Edits, and waits until the control plane has taken it or said why not: the outcome in words.
    pub(crate) async fn edit_and_wait(
        &self,
        file: &str,
        change: impl FnOnce(String) -> String,
    ) -> anyhow::Result<Result<u64, String>> {
        let mut events = self.control()?.events();
        self.edit(file, change)?;
        let outcome = async {
            match events.next().await {
                Some(Event::Applied { version, .. }) => Ok(Ok(version)),
                Some(Event::Rejected { reason, .. }) => Ok(Err(reason)),
                Some(Event::Nack(nack)) => anyhow::bail!("a client refused the configuration: {nack:?}"),
                None => anyhow::bail!("the control plane is gone"),
            }
        };
        tokio::time::timeout(PATIENCE, outcome).await.context("the control plane did not notice the edit")?
    }

    /// Slow traffic until Ctrl-C.
    pub(crate) async fn stay(&self, report: &mut Report) -> anyhow::Result<()> {
        let bootstrap = self.folder.path().join("bootstrap.json");
        std::fs::write(&bootstrap, self.control()?.bootstrap())?;
        report.step("The mesh stays; Ctrl-C ends it. Things to try in another terminal:");
        report.text(format!("export GRPC_XDS_BOOTSTRAP={}", bootstrap.display()));
        report.text(format!("cargo run -p examples --bin greeter-client -- {GREETER} --requests 100"));
        report.text(format!("cargo run -p examples --bin greeter-client -- {GREETER} --header x-canary=1 --explain"));
        report.text(format!("$EDITOR {}", self.mesh_dir().join("routes.yaml").display()));
        report.text(format!("cargo run -p mesh-control -- lint {}/*.yaml", self.mesh_dir().display()));
        let mut traffic = Traffic::start(&self.greeter, 1, Some(Duration::from_millis(200)));
        let mut every = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                end = tokio::signal::ctrl_c() => { end?; break }
                _ = every.tick() => report.progress(traffic.tally()),
            }
        }
        traffic.stop().await;
        Ok(())
    }

    /// Ends everything.
    pub(crate) async fn shutdown(mut self) {
        self.stop_control().await;
        for greeter in &mut self.greeters {
            greeter.kill().await;
        }
        self.reviews.kill().await;
    }
}

/// Copies `examples/mesh`, with the ports that are served here.
fn copy_yaml(to: &Path, ports: &[(u16, SocketAddr)]) -> anyhow::Result<()> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("mesh");
    for entry in std::fs::read_dir(&from).with_context(|| format!("{}", from.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        let mut text = std::fs::read_to_string(&path)?;
        for (port, addr) in ports {
            text = text.replace(&format!(": {port}}}"), &format!(": {}}}", addr.port()));
        }
        std::fs::write(to.join(name), text)?;
    }
    Ok(())
}
