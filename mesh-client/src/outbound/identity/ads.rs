//! The control plane's own connection (gRFC A65).

use super::Opener;
use crate::{error::BoxError, outbound::connect::DialRef};
use futures::future::BoxFuture;
use mesh_tls::{ClientSettings, ClientTls, PeerCheck, Roots};
use mesh_xds::{
    ads::{BoxedIo, Connect, connect_address},
    bootstrap::{ChannelCreds, FileWatcher, ServerAddress, ServerConfig, TlsCreds},
};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

/// Opens ADS connections, with TLS where the bootstrap asks for it.
#[derive(Debug)]
struct AdsConnect {
    opener: Opener,
    dial: Option<DialRef>,
    /// By credentials: servers with equal ones share their configuration.
    tls: Mutex<HashMap<TlsCreds, ClientTls>>,
}

/// How the ADS connection is opened.
pub(crate) fn ads_connector(opener: Opener, dial: Option<DialRef>) -> Arc<dyn Connect> {
    Arc::new(AdsConnect { opener, dial, tls: Mutex::default() })
}

impl AdsConnect {
    fn tls(&self, creds: &TlsCreds, server: &ServerConfig) -> Result<ClientTls, BoxError> {
        let mut cache = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tls) = cache.get(creds) {
            return Ok(tls.clone());
        }
        let files = FileWatcher {
            certificate_file: creds.certificate_file.clone(),
            private_key_file: creds.private_key_file.clone(),
            ca_certificate_file: creds.ca_certificate_file.clone(),
            spiffe_trust_bundle_map_file: creds.spiffe_trust_bundle_map_file.clone(),
            refresh_interval: creds.refresh_interval,
        };
        // no file at all is legal (gRFC A65): the roots of the system, and no certificate of our own
        let by_domain = files.spiffe_trust_bundle_map_file.is_some();
        let roots = by_domain || files.ca_certificate_file.is_some();
        let any = roots || files.certificate_file.is_some() || files.private_key_file.is_some();
        let name = format!("xds_servers {}", server.uri);
        let source = any.then(|| self.opener.open(&name, &files)).transpose()?;
        let roots = match &source {
            Some(source) if roots => Roots::Source(source.clone()),
            _ => Roots::System,
        };
        let settings = ClientSettings {
            identity: source.filter(|_| creds.certificate_file.is_some()),
            check: if by_domain { PeerCheck::SpiffeServerName } else { PeerCheck::ServerName },
            alpn: vec![b"h2".to_vec()],
            ..ClientSettings::new(roots)
        };
        let tls = ClientTls::new(settings, self.opener.crypto.clone())?;
        cache.insert(creds.clone(), tls.clone());
        Ok(tls)
    }
}

impl Connect for AdsConnect {
    fn connect(&self, server: &ServerConfig) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let tls = match &server.channel_creds {
            ChannelCreds::Insecure => Ok(None),
            ChannelCreds::Tls(creds) => self.tls(creds, server).map(Some),
        };
        let address = server.address.clone();
        let dial = self.dial.clone();
        Box::pin(async move {
            let tls = tls.map_err(io::Error::other)?;
            let io = match dial {
                None => connect_address(&address).await?,
                Some(DialRef(dial)) => dial.control_plane(&address).await?,
            };
            let Some(tls) = tls else { return Ok(io) };
            let name = match &address {
                ServerAddress::Tcp { host, .. } => Some(host.clone()),
                ServerAddress::Unix(_) => None,
            };
            let (stream, _) = tls.connect(io, name.as_deref()).await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as BoxedIo)
        })
    }
}
