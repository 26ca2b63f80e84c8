//! Istio's control plane, built from `istiod/main.go`, on a folder of YAML.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::process::{ASK, Process, READY, get};
use crate::{free_addr, peer};

/// Where the client's node claims to run. No workload may share it: istiod takes a node for the workload at its address.
const CLIENT: &str = "127.0.2.1";
/// The folder of its configuration below its working folder, and the one file in it.
const CONFIG: &str = "config";
const FILE: &str = "mesh.yaml";

/// A running istiod.
#[derive(Debug)]
pub struct Istiod {
    process: Process,
    http: SocketAddr,
    grpc: SocketAddr,
}

impl Istiod {
    /// Starts istiod on this YAML, and returns when it serves xDS. It runs with its own assertions on, which end the
    /// process when a client breaks the protocol; [`Istiod::running`] then says so.
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn start(yaml: &str) -> Result<Self> {
        let binary = peer("istiod")?;
        let folder = tempfile::tempdir()?;
        let config = folder.path().join(CONFIG);
        std::fs::create_dir(&config)?;
        std::fs::write(config.join(FILE), yaml)?;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (http, grpc, tls) = (free_addr(loopback)?, free_addr(loopback)?, free_addr(loopback)?);
        let mut command = Command::new(binary);
        command
            .arg("-config")
            .arg(config)
            .args(["-http", &http.to_string(), "-grpc", &grpc.to_string(), "-tls", &tls.to_string()])
            .envs([
                ("POD_NAMESPACE", "istio-system"),
                ("POD_NAME", "istiod-0"),
                ("CLUSTER_ID", "Kubernetes"),
                ("ISTIOD_CUSTOM_HOST", "localhost,127.0.0.1"),
                ("PILOT_DEBOUNCE_AFTER", "10ms"),
                ("PILOT_MAX_REQUESTS_PER_SECOND", "1000"),
                ("UNSAFE_PILOT_ENABLE_RUNTIME_ASSERTIONS", "true"),
            ]);
        let mut process = Process::start("istiod", folder, &mut command)?;
        process.ready(http, "/ready").await?;
        Ok(Self { process, http, grpc })
    }

    /// The gRPC bootstrap of a proxyless client of this istiod.
    pub fn bootstrap(&self) -> String {
        json!({
            "xds_servers": [{
                "server_uri": self.grpc.to_string(),
                "channel_creds": [{"type": "insecure"}],
                "server_features": ["xds_v3"],
            }],
            "node": {
                "id": format!("sidecar~{CLIENT}~client.default~default.svc.cluster.local"),
                "metadata": {"GENERATOR": "grpc", "NAMESPACE": "default", "CLUSTER_ID": "Kubernetes"},
                "locality": {"region": "r1", "zone": "z1"},
            },
        })
        .to_string()
    }

    /// Where it serves xDS in plain text.
    pub fn addr(&self) -> SocketAddr {
        self.grpc
    }

    /// Checks that istiod still runs.
    ///
    /// # Errors
    /// It ended, as it does when a client broke the protocol; the message has the end of its output.
    pub fn running(&mut self) -> Result<()> {
        self.process.running()
    }

    /// Replaces the YAML; istiod sees it and pushes what changed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        let folder = self.process.folder();
        let written = folder.join(FILE);
        std::fs::write(&written, yaml)?;
        // Renamed into place: istiod must not see half a file.
        Ok(std::fs::rename(written, folder.join(CONFIG).join(FILE))?)
    }

    /// Waits until a client has acknowledged everything that istiod sent it, and returns how many types that are.
    ///
    /// # Errors
    /// It refused something; the message is its own. Or it acknowledged nothing in time, or istiod cannot be asked.
    pub async fn acknowledged(&self) -> Result<usize> {
        let acknowledged = async {
            loop {
                let proxies: Value = serde_json::from_str(&self.debug("/debug/syncz").await?)?;
                let resources = proxies.pointer("/0/resources").and_then(Value::as_object);
                let types: Vec<_> = resources.into_iter().flatten().collect();
                for (name, state) in &types {
                    if let Some(refusal) = state.get("lastError") {
                        anyhow::bail!("the client refused {name}: {refusal}");
                    }
                }
                if !types.is_empty() && types.iter().all(|(_, state)| state.get("acked") == state.get("sent")) {
                    return Ok(types.len());
                }
                tokio::time::sleep(ASK).await;
            }
        };
        tokio::time::timeout(READY, acknowledged).await.context("the client did not acknowledge what istiod sent")?
    }

    /// What istiod's debug interface says at `path`, as in `/debug/syncz`.
    ///
    /// # Errors
    /// It cannot be asked, or refuses.
    pub async fn debug(&self, path: &str) -> Result<String> {
        let (status, body) = get(self.http, path).await.with_context(|| format!("ask istiod for {path}"))?;
        anyhow::ensure!(status == 200, "istiod answered {path} with {status}: {body}");
        Ok(body)
    }
}
