//! A virtual host of many routes.

use crate::outbound::{
    filter::Filters,
    route::{Profile, RequestHead, RouteTable, Scope},
};
use http::{HeaderMap, Method, Uri};
use mesh_xds::resource::{
    Action, ClusterSpecifier, Forward, PathMatcher, Route, RouteConfiguration, RouteMatch, VirtualHost,
};
use std::sync::Arc;

/// Finds the route of a request among `n`, of which only one takes it.
#[derive(Debug)]
pub struct RouteBench {
    table: RouteTable<Arc<str>>,
    headers: HeaderMap,
    /// One request for each route that is asked for.
    uris: Vec<(usize, Uri)>,
}

/// What the routes match by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutePattern {
    /// `/service-N/Method`.
    Exact,
    /// `/service-N/`.
    Prefix,
}

/// Requests that are asked for in turn, spread over all routes.
const ASKED: usize = 64;

impl RouteBench {
    /// # Panics
    /// If `n` is 0.
    pub fn new(pattern: RoutePattern, n: usize) -> Self {
        let route = |number: usize| {
            let path = match pattern {
                RoutePattern::Exact => {
                    PathMatcher::Exact { path: format!("/service-{number}/Method"), case_sensitive: true }
                }
                RoutePattern::Prefix => {
                    PathMatcher::Prefix { prefix: format!("/service-{number}/"), case_sensitive: true }
                }
            };
            let action = Action::Forward(Arc::new(Forward::to(ClusterSpecifier::Cluster("cluster".into()))));
            Route::new("", RouteMatch { path, ..RouteMatch::default() }, action)
        };
        let host = VirtualHost { name: "bench".into(), routes: (0..n).map(route).collect(), ..VirtualHost::default() };
        let shared = Filters::default();
        let scope = Scope {
            routes: &RouteConfiguration::default(),
            listener: &"listener".into(),
            filters: &[],
            profile: Profile::Grpc,
            max_stream_duration: None,
            stream_idle_timeout: None,
            general: false,
            around: None,
            shared: &shared,
        };
        let table = RouteTable::compile(&host, scope, &mut Arc::clone);
        let asked = |at: usize| {
            let number = at * n / ASKED;
            (number, format!("http://bench/service-{number}/Method").parse().expect("a valid URI"))
        };
        Self { table, headers: HeaderMap::new(), uris: (0..ASKED).map(asked).collect() }
    }

    /// Whether the request of this turn found its route.
    pub fn find(&self, turn: usize) -> bool {
        let (number, uri) = &self.uris[turn % ASKED];
        let head = RequestHead::new(&Method::POST, uri, &self.headers);
        self.table.find(&head, &mut |_| 0).is_ok_and(|found| found.index == *number)
    }
}
