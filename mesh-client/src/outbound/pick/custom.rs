//! Policies of the program's own (gRFC A52): registered by name, built when the endpoints change, asked for every request.

use mesh_xds::resource::{CustomLb, LocalityId, MetadataValue};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
    sync::Arc,
};

/// Makes pickers of one load-balancing policy: what [`MeshBuilder::lb_policy`](crate::MeshBuilder::lb_policy) registers.
///
/// A cluster names the policy in its `load_balancing_policy`, as a `TypedStruct` whose type URL ends in the registered name (gRFC A52).
pub trait LbPolicyFactory: Send + Sync + 'static {
    /// A picker among `endpoints`. `config` is the policy's configuration, an object. Asked again whenever the endpoints change (not
    /// when one of them becomes unavailable).
    fn build(&self, config: &serde_json::Value, endpoints: Vec<EndpointInfo>) -> Box<dyn EndpointPicker>;
}

/// Chooses an endpoint for each request. Called on the request path, by many threads: it should take well below a microsecond.
pub trait EndpointPicker: Send + Sync + 'static {
    /// The place of the chosen endpoint in the list that the picker was built with. When the choice is `None`, not available, or was
    /// tried before by the same request, another available endpoint is taken.
    fn pick(&self, request: &PickRequest<'_>, endpoints: &dyn Endpoints) -> Option<usize>;
}

/// The endpoints of a picker, as they are now.
pub trait Endpoints {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it takes requests: not ejected, and its last attempt to connect did not fail. False past the end.
    fn is_available(&self, endpoint: usize) -> bool;

    /// Requests in flight from this process.
    fn in_flight(&self, endpoint: usize) -> u32;
}

/// What a picker knows of a request.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct PickRequest<'a> {
    /// The hash that the route's `hash_policy` gives it; drawn at random when there is none.
    pub hash: u64,
    /// Its headers.
    pub headers: Option<&'a http::HeaderMap>,
}

/// An endpoint when a picker is built.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EndpointInfo {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its hostname, or empty.
    pub hostname: Arc<str>,
    /// Its weight within its locality.
    pub weight: u32,
    /// Where it is.
    pub locality: Arc<LocalityId>,
    /// Of its locality.
    pub locality_weight: u32,
    /// `metadata.filter_metadata`: by filter, by key.
    pub metadata: Option<Arc<BTreeMap<String, BTreeMap<String, MetadataValue>>>>,
}

/// The registered policies.
#[derive(Clone, Default)]
pub(crate) struct Registry(Arc<HashMap<String, Arc<dyn LbPolicyFactory>>>);

/// A picker at work.
pub(super) struct Custom(Box<dyn EndpointPicker>);

impl Registry {
    pub(crate) fn new(policies: HashMap<String, Arc<dyn LbPolicyFactory>>) -> Self {
        Self(Arc::new(policies))
    }

    /// `None`: it was never registered.
    pub(super) fn build(&self, config: &CustomLb, endpoints: Vec<EndpointInfo>) -> Option<Custom> {
        self.0.get(&*config.name).map(|factory| Custom(factory.build(&config.config, endpoints)))
    }
}

impl Custom {
    pub(super) fn pick(&self, request: &PickRequest<'_>, endpoints: &dyn Endpoints) -> Option<usize> {
        self.0.pick(request, endpoints)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
