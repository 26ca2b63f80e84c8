//! An Envoy between the client and the backends, when there is one on this machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// A running Envoy. It is killed when this is dropped.
#[derive(Debug)]
pub struct Envoy {
    /// Where clients connect.
    pub address: SocketAddr,
    child: Child,
    _config: TempDir,
}

/// Finds an `envoy` on the PATH or in what `interop/run` installed.
#[must_use]
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|root| root.join("interop/.peers"));
    let folders = peers.iter().flat_map(|peers| [peers.clone(), peers.join("bin"), peers.join("venv/bin")]);
    std::env::split_paths(&path).chain(folders).map(|folder| folder.join("envoy")).find(|file| file.is_file())
}

impl Envoy {
    /// Starts `binary` with two workers as a round robin HTTP/2 proxy in front of `backends`.
    ///
    /// # Errors
    /// When it does not listen within ten seconds.
    pub async fn start(binary: &Path, backends: &[SocketAddr]) -> Result<Self> {
        // Envoy names no port it chose itself without an admin listener, so a free one is found for it.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?;
        let config = tempfile::tempdir()?;
        let file = config.path().join("envoy.json");
        std::fs::write(&file, bootstrap(address, backends).to_string())?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(&file).args(["--concurrency", "2", "-l", "error", "--disable-hot-restart"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true).spawn()?;
        for _ in 0..200 {
            if TcpStream::connect(address).await.is_ok() {
                return Ok(Self { address, child, _config: config });
            }
            if let Some(status) = child.try_wait()? {
                bail!("envoy ended: {status}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("envoy does not listen on {address}")
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub async fn stop(mut self) -> Result<()> {
        self.child.kill().await.context("envoy cannot be ended")
    }
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn bootstrap(listen: SocketAddr, backends: &[SocketAddr]) -> Value {
    let endpoints: Vec<Value> =
        backends.iter().map(|backend| json!({"endpoint": {"address": socket(*backend)}})).collect();
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let manager =
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    json!({"static_resources": {
        "listeners": [{"name": "in", "address": socket(listen), "filter_chains": [{"filters": [{
            "name": "http",
            "typed_config": {
                "@type": manager,
                "stat_prefix": "in",
                "codec_type": "HTTP2",
                "route_config": {"virtual_hosts": [{
                    "name": "all", "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "echo"}}],
                }]},
                "http_filters": [{"name": "router", "typed_config": {"@type": router}}],
            },
        }]}]}],
        "clusters": [{
            "name": "echo", "type": "STATIC", "lb_policy": "ROUND_ROBIN",
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options, "explicit_http_config": {"http2_protocol_options": {}},
            }},
            "circuit_breakers": {"thresholds": [{"max_requests": 1_000_000, "max_pending_requests": 1_000_000}]},
            "load_assignment": {"cluster_name": "echo", "endpoints": [{"lb_endpoints": endpoints}]},
        }],
    }})
}
