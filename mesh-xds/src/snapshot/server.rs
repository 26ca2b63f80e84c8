//! The immutable, complete view of one server listener.

use super::ResourceError;
use crate::resource::{FilterChain, RouteConfiguration, RouteSource, ServerListener};
use std::{collections::BTreeMap, sync::Arc};

/// Everything a server needs for one listening address (gRFC A36). Unchanged parts keep their `Arc` from one snapshot to the next.
#[derive(Clone, Debug)]
pub struct ServerSnapshot {
    /// The LDS name.
    pub name: Arc<str>,
    /// `version_info` of what it was built from, for people: "lds=3 rds=3".
    pub version: Arc<str>,
    /// The listener.
    pub listener: Arc<ServerListener>,
    /// The route configurations of its chains that come over RDS, by name. One that does not exist fails the requests of its
    /// chains with this cause (gRFC A36: UNAVAILABLE).
    pub routes: BTreeMap<Arc<str>, Result<Arc<RouteConfiguration>, Arc<ResourceError>>>,
}

impl ServerSnapshot {
    /// The routes of one of its chains. `None`: it is not one of this snapshot's.
    pub fn routes_of<'a>(
        &'a self,
        chain: &'a FilterChain,
    ) -> Option<Result<&'a Arc<RouteConfiguration>, &'a Arc<ResourceError>>> {
        match &chain.http.routes {
            RouteSource::Inline(routes) => Some(Ok(routes)),
            RouteSource::Rds(name) => self.routes.get(name).map(Result::as_ref),
        }
    }

    /// Whether two are made of the same parts.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.listener, &other.listener)
            && self.routes.len() == other.routes.len()
            && self.routes.iter().zip(&other.routes).all(|((name, routes), (other_name, other))| {
                let same = match (routes, other) {
                    (Ok(a), Ok(b)) => Arc::ptr_eq(a, b),
                    (Err(a), Err(b)) => Arc::ptr_eq(a, b),
                    _ => false,
                };
                name == other_name && same
            })
    }
}
