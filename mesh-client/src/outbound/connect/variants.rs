//! Endpoints of one cluster that are connected to in different ways: `transport_socket_matches`, and SNI by endpoint.

use super::{Connector, connector::Security};
use mesh_xds::resource::{MetadataValue, TransportSocketMatch};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// What an assignment says of an endpoint, as far as the way it is connected to depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Said<'a> {
    /// `hostname`, or empty.
    pub(crate) hostname: &'a str,
    /// `metadata.filter_metadata`
    pub(crate) metadata: Option<&'a BTreeMap<String, BTreeMap<String, MetadataValue>>>,
}

/// One way to connect.
#[derive(Clone, Debug)]
pub(crate) struct Socket {
    pub(crate) security: Security,
    /// The SNI is the endpoint's hostname, where it has one (gRFC A101).
    pub(crate) auto_host_sni: bool,
}

/// All ways to connect to endpoints of a cluster.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// Those of endpoints with such metadata; the first that matches.
    pub(crate) matches: Vec<(TransportSocketMatch, Socket)>,
    /// That of all others.
    pub(crate) default: Socket,
}

/// The connectors of a cluster by what tells its endpoints apart, while they are used.
pub(super) struct Variants {
    sockets: Sockets,
    made: Mutex<HashMap<Key, Weak<Connector>>>,
}

/// The place of the socket (`None`: the default), and the SNI where it is the endpoint's.
type Key = (Option<usize>, Option<Arc<str>>);

impl Sockets {
    /// Whether endpoints can differ at all.
    pub(super) fn tell_apart(&self) -> bool {
        !self.matches.is_empty() || self.default.auto_host_sni
    }

    fn of(&self, said: Said<'_>) -> (Option<usize>, &Socket) {
        let place = self.matches.iter().position(|(wanted, _)| wanted.matches(said.metadata));
        (place, place.map_or(&self.default, |place| &self.matches[place].1))
    }

    /// A port has no place in a server name.
    fn server_name<'a>(socket: &Socket, said: Said<'a>) -> Option<&'a str> {
        let host = said.hostname;
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.contains(':') => name,
            _ => host,
        };
        (socket.auto_host_sni && !name.is_empty()).then_some(name)
    }
}

impl Variants {
    pub(super) fn new(sockets: Sockets) -> Self {
        Self { sockets, made: Mutex::default() }
    }

    pub(super) fn of(
        &self,
        said: Said<'_>,
        make: impl FnOnce(Security, Option<Arc<str>>) -> Arc<Connector>,
    ) -> Arc<Connector> {
        let (place, socket) = self.sockets.of(said);
        let key: Key = (place, Sockets::server_name(socket, said).map(Arc::from));
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connector) = made.get(&key).and_then(Weak::upgrade) {
            return connector;
        }
        let connector = make(socket.security.clone(), key.1.clone());
        made.retain(|_, connector| connector.strong_count() > 0);
        made.insert(key, Arc::downgrade(&connector));
        connector
    }

    pub(super) fn differ(&self, a: Said<'_>, b: Said<'_>) -> bool {
        let key = |said| {
            let (place, socket) = self.sockets.of(said);
            (place, Sockets::server_name(socket, said))
        };
        key(a) != key(b)
    }
}

impl fmt::Debug for Variants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Variants").field("sockets", &self.sockets).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_xds::resource::TransportSocket;

    fn socket(auto_host_sni: bool) -> Socket {
        Socket { security: Security::Plaintext, auto_host_sni }
    }

    fn sockets(auto_host_sni: bool) -> Sockets {
        let wanted = BTreeMap::from([("tlsMode".to_owned(), MetadataValue::String("istio".to_owned()))]);
        let tls = TransportSocketMatch { name: "tls".to_owned(), wanted, socket: TransportSocket::Plaintext };
        Sockets { matches: vec![(tls, socket(auto_host_sni))], default: socket(false) }
    }

    fn metadata(mode: &str) -> BTreeMap<String, BTreeMap<String, MetadataValue>> {
        let said = BTreeMap::from([("tlsMode".to_owned(), MetadataValue::String(mode.to_owned()))]);
        BTreeMap::from([("envoy.transport_socket_match".to_owned(), said)])
    }

    #[test]
    fn the_first_socket_whose_labels_the_endpoint_has_is_taken() {
        let variants = Variants::new(sockets(false));
        let (istio, other) = (metadata("istio"), metadata("disabled"));
        let said = |metadata| Said { hostname: "a", metadata };
        assert_eq!(variants.sockets.of(said(Some(&istio))).0, Some(0));
        assert_eq!(variants.sockets.of(said(Some(&other))).0, None);
        assert_eq!(variants.sockets.of(said(None)).0, None);
        assert!(variants.differ(said(Some(&istio)), said(None)));
        assert!(!variants.differ(said(Some(&other)), said(None)));
        let mut any = sockets(false);
        any.matches[0].0.wanted.clear();
        assert_eq!(any.of(said(None)).0, Some(0), "no labels match every endpoint");
    }

    #[test]
    fn the_hostname_is_the_server_name_without_its_port() {
        let istio = metadata("istio");
        for (hostname, expected) in [
            ("a.example.com", Some("a.example.com")),
            ("a.example.com:8443", Some("a.example.com")),
            ("::1", Some("::1")),
            ("", None),
        ] {
            let said = Said { hostname, metadata: Some(&istio) };
            assert_eq!(Sockets::server_name(&socket(true), said), expected);
            assert_eq!(Sockets::server_name(&socket(false), said), None);
        }
        let said = |hostname| Said { hostname, metadata: Some(&istio) };
        assert!(Variants::new(sockets(true)).differ(said("a"), said("b")));
        assert!(!Variants::new(sockets(false)).differ(said("a"), said("b")));
    }
}
