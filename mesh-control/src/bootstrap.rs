//! The bootstrap that a gRPC client, ours or any other, needs to find this control plane.

use crate::translate::{PROVIDER, SERVER_LISTENER_PREFIX};
use serde_json::{Value, json};
use std::{fmt, path::PathBuf};

/// `node.id` unless told otherwise.
pub const DEFAULT_NODE_ID: &str = "mesh-client";

/// The fields of a gRPC bootstrap (gRFC A27, A29). Its `Display` is the JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    /// `HOST:PORT` of the control plane.
    pub server: String,
    /// `node.id`.
    pub node_id: String,
    /// A folder with `cert.pem`, `key.pem` and `ca.pem`: becomes the certificate provider `default`.
    pub identity_dir: Option<PathBuf>,
    /// Namespace and service account of the client, as it says them: `NAMESPACE` and `SERVICE_ACCOUNT` of the node's metadata. They
    /// tell servers on a shared port apart.
    pub workload: Option<(String, String)>,
}

impl Bootstrap {
    /// For clients of the control plane at `server`.
    pub fn new(server: impl Into<String>) -> Self {
        Self { server: server.into(), node_id: DEFAULT_NODE_ID.to_owned(), identity_dir: None, workload: None }
    }

    fn json(&self) -> Value {
        let mut bootstrap = json!({
            "xds_servers": [{
                "server_uri": self.server,
                "channel_creds": [{"type": "insecure"}],
                "server_features": ["xds_v3"],
            }],
            // Some clients insist on every part of the locality.
            "node": {
                "id": self.node_id,
                "cluster": "mesh",
                "locality": {"region": "", "zone": "", "sub_zone": ""},
                "metadata": {"GENERATOR": "grpc"},
            },
            "server_listener_resource_name_template": format!("{SERVER_LISTENER_PREFIX}%s"),
        });
        if let Some((namespace, account)) = &self.workload {
            let metadata = &mut bootstrap["node"]["metadata"];
            metadata["NAMESPACE"] = namespace.as_str().into();
            metadata["SERVICE_ACCOUNT"] = account.as_str().into();
        }
        if let Some(dir) = &self.identity_dir {
            bootstrap["certificate_providers"] = json!({
                PROVIDER: {
                    "plugin_name": "file_watcher",
                    "config": {
                        "certificate_file": dir.join("cert.pem"),
                        "private_key_file": dir.join("key.pem"),
                        "ca_certificate_file": dir.join("ca.pem"),
                        "refresh_interval": "1s",
                    },
                },
            });
        }
        bootstrap
    }
}

impl fmt::Display for Bootstrap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.json())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_uri_has_no_scheme_and_providers_come_with_an_identity() {
        let plain: Value = serde_json::from_str(&Bootstrap::new("127.0.0.1:15010").to_string()).unwrap();
        assert_eq!(plain["xds_servers"][0]["server_uri"], "127.0.0.1:15010");
        assert_eq!(plain["xds_servers"][0]["channel_creds"][0]["type"], "insecure");
        assert_eq!(plain.get("certificate_providers"), None);
        assert_eq!(plain["server_listener_resource_name_template"], "xds.istio.io/grpc/lds/inbound/%s");
        let mutual = Bootstrap { identity_dir: Some("/id".into()), ..Bootstrap::new("127.0.0.1:15010") };
        let mutual: Value = serde_json::from_str(&mutual.to_string()).unwrap();
        assert_eq!(mutual["certificate_providers"]["default"]["config"]["private_key_file"], "/id/key.pem");
    }

    #[test]
    fn our_own_client_accepts_it() {
        let bootstrap = Bootstrap { identity_dir: Some("/id".into()), ..Bootstrap::new("127.0.0.1:15010") };
        mesh_xds::Bootstrap::from_json(&bootstrap.to_string()).unwrap();
    }
}
