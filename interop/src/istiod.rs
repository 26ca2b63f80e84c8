//! Istio's control plane, built from `istiod/main.go`, on a folder of YAML.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::json;
use tokio::process::Command;

use crate::process::{Process, get};
use crate::{free_addr, peer};

/// Where the client's node claims to run. No workload may share it: istiod takes a node for the workload at its address.
const CLIENT: &str = "127.0.2.1";

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
        let config = folder.path().join("config");
        std::fs::create_dir(&config)?;
        std::fs::write(config.join("mesh.yaml"), yaml)?;
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

    /// Checks that istiod still runs.
    ///
    /// # Errors
    /// It ended, as it does when a client broke the protocol; the message has the end of its output.
    pub fn running(&mut self) -> Result<()> {
        self.process.running()
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

    /// What istiod has written to its log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(self.process.output()?)
    }
}
