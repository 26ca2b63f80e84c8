//! Envoy as a proxy whose clusters, endpoints and routes come from a control plane over ADS.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::process::{Process, get};
use crate::{free_addr, peer};

const TYPES: &str = "type.googleapis.com/envoy.extensions";
const HTTP2: &str = "http2_protocol_options";
const HTTP1: &str = "http_protocol_options";

/// A running Envoy.
#[derive(Debug)]
pub struct Envoy {
    process: Process,
    admin: SocketAddr,
    listener: SocketAddr,
    outbound: [SocketAddr; 2],
}

impl Envoy {
    /// Starts Envoy with the control plane at `xds`, and a listener that routes by the RouteConfiguration `route`.
    /// Returns when it has everything it asked for.
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn start(xds: SocketAddr, route: &str) -> Result<Self> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (admin, listener) = (free_addr(loopback)?, free_addr(loopback)?);
        Self::run(&config(xds, admin, listener, route), admin, listener, [listener; 2]).await
    }

    /// Starts Envoy with certificates by SDS from the unix socket `sds`: a listener that takes mutual TLS, in front of the plaintext HTTP/2
    /// server at `plain`; and two that take plaintext and speak mutual TLS to the server at `tls`, which must be `server`, a SPIFFE id: over
    /// HTTP/2 ([`Self::outbound`]) and over HTTP/1.1 ([`Self::outbound_http1`]).
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn mutual(sds: &Path, plain: SocketAddr, tls: SocketAddr, server: &str) -> Result<Self> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (admin, listener) = (free_addr(loopback)?, free_addr(loopback)?);
        let outbound = [free_addr(loopback)?, free_addr(loopback)?];
        let config = mutual(sds, admin, (listener, plain), (outbound, tls), server);
        Self::run(&config, admin, listener, outbound).await
    }

    async fn run(config: &Value, admin: SocketAddr, listener: SocketAddr, outbound: [SocketAddr; 2]) -> Result<Self> {
        let binary = peer("venv/bin/envoy")?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("envoy.json");
        std::fs::write(&file, config.to_string())?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(file).args(["--concurrency", "1", "-l", "warning", "--disable-hot-restart"]);
        let mut process = Process::start("envoy", folder, &mut command)?;
        process.ready(admin, "/ready").await?;
        Ok(Self { process, admin, listener, outbound })
    }

    /// Where Envoy takes requests.
    pub fn listener(&self) -> SocketAddr {
        self.listener
    }

    /// Where Envoy takes requests that it sends on as HTTP/2 over mutual TLS; see [`Self::mutual`].
    pub fn outbound(&self) -> SocketAddr {
        self.outbound[0]
    }

    /// Where Envoy takes requests that it sends on as HTTP/1.1 over mutual TLS; see [`Self::mutual`].
    pub fn outbound_http1(&self) -> SocketAddr {
        self.outbound[1]
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

fn mutual(
    sds: &Path,
    admin: SocketAddr,
    inbound: (SocketAddr, SocketAddr),
    (outbound, secured): ([SocketAddr; 2], SocketAddr),
    server: &str,
) -> Value {
    let secret = |name: &str| {
        json!({
            "name": name,
            "sds_config": {
                "resource_api_version": "V3",
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "sds"}}],
                },
            },
        })
    };
    let cluster = |name: &str, version: &str, address: Value| {
        json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
                    "explicit_http_config": {version: {}},
                }
            },
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
            },
        })
    };
    let tls = |name: &str, version: &str, alpn: &str| {
        let mut cluster = cluster(name, version, address(secured));
        cluster["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": format!("{TYPES}.transport_sockets.tls.v3.UpstreamTlsContext"),
                "common_tls_context": {
                    "alpn_protocols": [alpn],
                    "tls_certificate_sds_secret_configs": [secret("default")],
                    "combined_validation_context": {
                        "default_validation_context": {
                            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": server}}],
                        },
                        "validation_context_sds_secret_config": secret("ROOTCA"),
                    },
                },
            },
        });
        cluster
    };
    let listener = |name: &str, at: SocketAddr, to: &str| {
        let manager = json!({
            "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": name,
            "route_config": {
                "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to}}]}],
            },
            "http_filters": [
                {"name": "envoy.filters.http.router", "typed_config": {"@type": format!("{TYPES}.filters.http.router.v3.Router")}},
            ],
        });
        let filter = json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": manager});
        json!({"name": name, "address": address(at), "filter_chains": [{"filters": [filter]}]})
    };
    let mut inward = listener("inbound", inbound.0, "plain");
    inward["filter_chains"][0]["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": format!("{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext"),
            "require_client_certificate": true,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificate_sds_secret_configs": [secret("default")],
                "validation_context_sds_secret_config": secret("ROOTCA"),
            },
        },
    });
    let sds = cluster("sds", HTTP2, json!({"pipe": {"path": sds}}));
    let clusters =
        [sds, cluster("plain", HTTP2, address(inbound.1)), tls("http2", HTTP2, "h2"), tls("http1", HTTP1, "http/1.1")];
    let [http2, http1] = outbound;
    let listeners = [inward, listener("outbound-http2", http2, "http2"), listener("outbound-http1", http1, "http1")];
    json!({
        "node": {"id": "envoy", "cluster": "envoy"},
        "admin": {"address": address(admin)},
        "static_resources": {"clusters": clusters, "listeners": listeners},
    })
}
