//! Where a request that this process sends on came from, and what is known of it: what Envoy takes from its downstream connection and its
//! filters.

use crate::inbound::ConnectionInfo;
use http::Extensions;
use mesh_xds::resource::Value;
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

/// Facts about a request that routes and hash policies may ask for and that are not part of it. Put into its
/// [extensions](http::Request::extensions_mut) by a server that sends requests on, or by the application; cheap to clone.
///
/// - the [source](Self::with_source): the hash policy `connection_properties.source_ip`; where it is not told, the
///   [`ConnectionInfo`] of a request that came to an [`Inbound`](crate::Inbound) says;
/// - [metadata](Self::with_metadata): route matches by `dynamic_metadata`;
/// - [filter state](Self::with_filter_state): the hash policy `filter_state`, and route matches by it.
///
/// What is not there matches nothing and is not hashed. A match by `tls_context` goes by the [`mesh_tls::PeerIdentity`] in the extensions:
/// with one the caller presented a certificate that was verified, without one it did not.
///
/// ```
/// use mesh_client::Downstream;
/// let mut request = http::Request::get("http://reviews/").body(()).unwrap();
/// let caller = "10.0.0.7:4711".parse().unwrap();
/// let tenant = serde_json::json!({"tenant": "blue"});
/// let facts = Downstream::new().with_source(caller).with_metadata("example.auth", tenant);
/// request.extensions_mut().insert(facts);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Downstream(Arc<Facts>);

#[derive(Clone, Debug, Default)]
struct Facts {
    source: Option<SocketAddr>,
    metadata: BTreeMap<String, Value>,
    filter_state: BTreeMap<String, String>,
}

impl Downstream {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The address that the request came from.
    #[must_use]
    pub fn with_source(mut self, source: SocketAddr) -> Self {
        Arc::make_mut(&mut self.0).source = Some(source);
        self
    }

    /// Dynamic metadata of a namespace, in Envoy the name of the filter that set it. Replaces what the namespace had.
    #[must_use]
    pub fn with_metadata(mut self, namespace: impl Into<String>, value: impl Into<Value>) -> Self {
        Arc::make_mut(&mut self.0).metadata.insert(namespace.into(), value.into());
        self
    }

    /// An object of the filter state.
    #[must_use]
    pub fn with_filter_state(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).filter_state.insert(key.into(), value.into());
        self
    }

    /// The address that the request came from.
    pub fn source(&self) -> Option<SocketAddr> {
        self.0.source
    }

    /// The metadata of a namespace.
    pub fn metadata(&self, namespace: &str) -> Option<&Value> {
        self.0.metadata.get(namespace)
    }

    /// An object of the filter state.
    pub fn filter_state(&self, key: &str) -> Option<&str> {
        self.0.filter_state.get(key).map(String::as_str)
    }

    /// Where a request with these extensions came from: as it is told here, or else the other end of the connection that our own server
    /// took it from.
    pub(crate) fn source_of(extensions: Option<&Extensions>) -> Option<SocketAddr> {
        let told = Self::of(extensions).and_then(Self::source);
        told.or_else(|| Some(extensions?.get::<ConnectionInfo>()?.remote_addr()))
    }

    /// That of a request with these extensions.
    pub(crate) fn of(extensions: Option<&Extensions>) -> Option<&Self> {
        extensions?.get()
    }
}
