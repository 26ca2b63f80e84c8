//! Istio's control plane, built from `istiod/main.go`, on a folder of YAML.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

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
/// Where it looks for the key and the certificates of its authority, below its working folder.
const CACERTS: &str = "etc/cacerts";
/// The roots, there.
const ROOTS: &str = "root-cert.pem";

/// A running istiod.
#[derive(Debug)]
pub struct Istiod {
    process: Process,
    http: SocketAddr,
    grpc: SocketAddr,
    tls: SocketAddr,
}

/// Istio's certificate authority: what it signs with, in the files of Istio's secret `cacerts`, and who says who its callers are. All is PEM.
#[derive(Clone, Debug)]
pub struct Authority {
    /// `ca-cert.pem`: the certificate that it signs with.
    pub certificate: String,
    /// `ca-key.pem`, its key.
    pub key: String,
    /// `cert-chain.pem`: that certificate, and what is between it and the root.
    pub chain: String,
    /// `root-cert.pem`: one root or several.
    pub roots: String,
    /// The issuer of the tokens of workloads: a URL with `/.well-known/openid-configuration` below it. The tokens are for the audience
    /// `istio-ca`, and their subjects are Kubernetes': `system:serviceaccount:NAMESPACE:ACCOUNT`.
    pub issuer: String,
}

/// A workload that speaks to istiod over TLS and shows a token.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// Its service account, in the namespace `default`; the token has to be of this account.
    pub account: &'a str,
    /// Its address. Where an endpoint has it, that is what istiod takes the workload for.
    pub address: IpAddr,
    /// Its label `app`.
    pub app: &'a str,
    /// The file of its token.
    pub token: &'a Path,
}

impl Istiod {
    /// Starts istiod on this YAML, and returns when it serves xDS. It runs with its own assertions on, which end the
    /// process when a client breaks the protocol; [`Istiod::running`] then says so.
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn start(yaml: &str) -> Result<Self> {
        Self::run(yaml, None).await
    }

    /// Starts an istiod that signs certificates too, and knows workloads by their tokens.
    ///
    /// # Errors
    /// As [`Istiod::start`].
    pub async fn start_with_authority(yaml: &str, authority: &Authority) -> Result<Self> {
        Self::run(yaml, Some(authority)).await
    }

    async fn run(yaml: &str, authority: Option<&Authority>) -> Result<Self> {
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
        if let Some(authority) = authority {
            let cacerts = folder.path().join(CACERTS);
            std::fs::create_dir_all(&cacerts)?;
            std::fs::write(cacerts.join("ca-cert.pem"), &authority.certificate)?;
            std::fs::write(cacerts.join("ca-key.pem"), &authority.key)?;
            std::fs::write(cacerts.join("cert-chain.pem"), &authority.chain)?;
            std::fs::write(cacerts.join(ROOTS), &authority.roots)?;
            command.env("JWT_RULE", json!({"issuer": authority.issuer, "audiences": ["istio-ca"]}).to_string());
        }
        let mut process = Process::start("istiod", folder, &mut command)?;
        process.ready(http, "/ready").await?;
        Ok(Self { process, http, grpc, tls })
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

    /// The gRPC bootstrap of a workload that speaks to istiod itself, with none of Istio's agents between them: over TLS, with its token. It
    /// has no certificate providers: the certificates are the application's affair.
    pub fn bootstrap_of(&self, workload: &Workload<'_>) -> String {
        let Workload { account, address, app, token } = workload;
        json!({
            "xds_servers": [{
                "server_uri": self.tls.to_string(),
                "channel_creds": [{"type": "tls", "config": {"ca_certificate_file": self.roots()}}],
                "call_creds": [{"type": "jwt_token_file", "config": {"jwt_token_file": token}}],
                "server_features": ["xds_v3"],
            }],
            "server_listener_resource_name_template": "xds.istio.io/grpc/lds/inbound/%s",
            "node": {
                "id": format!("sidecar~{address}~{account}-1.default~default.svc.cluster.local"),
                "metadata": {
                    "GENERATOR": "grpc",
                    "NAMESPACE": "default",
                    "SERVICE_ACCOUNT": account,
                    "CLUSTER_ID": "Kubernetes",
                    "LABELS": {"app": app},
                },
            },
        })
        .to_string()
    }

    /// Where it serves xDS and its certificate authority over TLS.
    pub fn tls_addr(&self) -> SocketAddr {
        self.tls
    }

    /// The file of the roots of its authority, which signs for istiod itself too.
    pub fn roots(&self) -> PathBuf {
        self.process.folder().join(CACERTS).join(ROOTS)
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

    /// Waits until its clients have acknowledged everything that istiod sent them, and returns how many types that are.
    ///
    /// # Errors
    /// One refused something; the message is its own. Or one acknowledged nothing in time, or istiod cannot be asked.
    pub async fn acknowledged(&self) -> Result<usize> {
        let acknowledged = async {
            loop {
                let clients: Vec<Value> = serde_json::from_str(&self.debug("/debug/syncz").await?)?;
                let resources = clients.iter().filter_map(|client| client.get("resources")?.as_object()).flatten();
                let (mut types, mut behind) = (BTreeSet::new(), false);
                for (name, state) in resources {
                    if let Some(refusal) = state.get("lastError") {
                        anyhow::bail!("a client refused {name}: {refusal}");
                    }
                    behind |= state.get("acked") != state.get("sent");
                    types.insert(name);
                }
                if !types.is_empty() && !behind {
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
