//! Envoy as a proxy whose clusters, endpoints and routes come from a control plane over ADS.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::process::{Process, get};
use crate::{free_addr, peer};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// A running Envoy with one listener.
#[derive(Debug)]
pub struct Envoy {
    process: Process,
    admin: SocketAddr,
    listener: SocketAddr,
}

impl Envoy {
    /// Starts Envoy with the control plane at `xds`, and a listener that routes by the RouteConfiguration `route`.
    /// Returns when it has everything it asked for.
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn start(xds: SocketAddr, route: &str) -> Result<Self> {
        let binary = peer("venv/bin/envoy")?;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (admin, listener) = (free_addr(loopback)?, free_addr(loopback)?);
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("envoy.json");
        std::fs::write(&file, config(xds, admin, listener, route).to_string())?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(file).args(["--concurrency", "1", "-l", "warning", "--disable-hot-restart"]);
        let mut process = Process::start("envoy", folder, &mut command)?;
        process.ready(admin, "/ready").await?;
        Ok(Self { process, admin, listener })
    }

    /// Where Envoy takes requests.
    pub fn listener(&self) -> SocketAddr {
        self.listener
    }

    /// Checks that Envoy still runs.
    ///
    /// # Errors
    /// It ended; the message has the end of its output.
    pub fn running(&mut self) -> Result<()> {
        self.process.running()
    }

    /// What Envoy's admin interface says at `path`, as in `/stats?filter=update_rejected`.
    ///
    /// # Errors
    /// It cannot be asked, or refuses.
    pub async fn admin(&self, path: &str) -> Result<String> {
        let (status, body) = get(self.admin, path).await.with_context(|| format!("ask Envoy for {path}"))?;
        anyhow::ensure!(status == 200, "Envoy answered {path} with {status}: {body}");
        Ok(body)
    }

    /// The sum of all of Envoy's counters whose names end with `suffix`.
    ///
    /// # Errors
    /// Envoy cannot be asked.
    pub async fn counter(&self, suffix: &str) -> Result<u64> {
        let stats = self.admin("/stats").await?;
        let values = stats.lines().filter_map(|line| line.split_once(": "));
        Ok(values.filter(|(name, _)| name.ends_with(suffix)).filter_map(|(_, value)| value.parse::<u64>().ok()).sum())
    }
}

fn config(xds: SocketAddr, admin: SocketAddr, listener: SocketAddr, route: &str) -> Value {
    let http2 = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    });
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    let manager = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "inbound",
        "codec_type": "AUTO",
        "rds": {"route_config_name": route, "config_source": ads},
        "http_filters": [
            {"name": "envoy.filters.http.fault", "typed_config": {"@type": format!("{TYPES}.filters.http.fault.v3.HTTPFault")}},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": format!("{TYPES}.filters.http.router.v3.Router")}},
        ],
    });
    json!({
        "node": {"id": "sidecar~127.0.2.2~envoy.default~default.svc.cluster.local", "cluster": "envoy.default"},
        "admin": {"address": address(admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "control-plane"}}],
            },
            "cds_config": ads,
        },
        "static_resources": {
            "clusters": [{
                "name": "control-plane",
                "type": "STATIC",
                "connect_timeout": "5s",
                "typed_extension_protocol_options": http2,
                "load_assignment": {
                    "cluster_name": "control-plane",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(xds)}}]}],
                },
            }],
            "listeners": [{
                "name": "inbound",
                "address": address(listener),
                "filter_chains": [{
                    "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
                }],
            }],
        },
    })
}

fn address(addr: SocketAddr) -> Value {
    json!({"socket_address": {"address": addr.ip().to_string(), "port_value": addr.port()}})
}
