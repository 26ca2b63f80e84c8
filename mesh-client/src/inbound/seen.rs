//! What is found out of a connection once, when the first request asks for it.

use super::{ConnectionInfo, authz, subject::subject};
use crate::telemetry::metrics::PeerMetrics;
use http::HeaderValue;
use mesh_xds::resource::ClientCertDetails;
use std::sync::{Arc, OnceLock};

/// Kept with the connection.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    subject: OnceLock<Box<str>>,
    /// The element of `x-forwarded-client-cert`, and what it was to say.
    pub(super) forwarded: OnceLock<(ClientCertDetails, HeaderValue)>,
    pub(super) metrics: OnceLock<Arc<PeerMetrics>>,
}

impl ConnectionInfo {
    /// The subject of the client's certificate as RFC 2253 writes it.
    pub(super) fn subject(&self) -> &str {
        let Some(peer) = self.peer() else { return "" };
        self.seen().subject.get_or_init(|| subject(peer.certificate()).unwrap_or_default().into())
    }

    /// As the rules of RBAC see it.
    pub(super) fn caller(&self) -> authz::Caller<'_> {
        authz::Caller {
            remote: self.remote_addr(),
            local: self.local_addr(),
            tls: self.is_tls(),
            server_name: self.sni().unwrap_or_default(),
            certificate: self.peer().map(|peer| authz::Certificate {
                uris: peer.uri_sans(),
                dns: peer.dns_sans(),
                ips: peer.ip_sans(),
                subject: self.subject(),
                spiffe: peer.spiffe_id().map(mesh_tls::SpiffeId::as_str),
            }),
        }
    }
}
