//! The routes of a server (gRFC A36): which filters a request goes through, and whether it is served at all.

use super::{
    authz::Authorization,
    jwt::Authentication,
    policy::Making,
    steps::{Link, Steps},
};
use crate::outbound::{
    filter::{Limits, Making as FilterMaking},
    route::{Matcher, Profile, RequestHead, Scope, ServerRoute, of_server},
    timeout::Rules,
};
use mesh_xds::resource::{
    Action, ClusterSpecifier, FilterOverride, HttpFilter, HttpFilterConfig, JwtOfRoute, Route, RouteConfiguration,
    VirtualHost,
};
use std::{collections::BTreeMap, sync::Arc};

/// All of a filter chain's routes, compiled.
#[derive(Debug)]
pub(super) enum Routes {
    /// Every request.
    All(Arc<Entry>),
    Of(Arc<RouteConfiguration>, Box<[Host]>),
}

/// The routes of one virtual host, in order.
type Host = Box<[(Matcher, Arc<Entry>)]>;

/// One route.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) steps: Steps,
    /// What is answered instead, or changed.
    pub(super) action: ServerRoute,
    pub(super) timeouts: Rules,
    /// Why its requests are not served.
    pub(super) unavailable: Option<Arc<str>>,
}

impl Routes {
    /// Without a configuration of routes every request is served.
    pub(super) fn compile(routes: Option<&Arc<RouteConfiguration>>, making: &Making<'_>) -> Self {
        let Some(routes) = routes else {
            let steps =
                Steps(making.filters.iter().filter_map(|filter| link(filter, making, Place::default())).collect());
            let (action, timeouts) = (ServerRoute::Served(None), Rules::of_server(None, making.max_stream_duration));
            return Self::All(Arc::new(Entry { name: "".into(), steps, action, timeouts, unavailable: None }));
        };
        let host = |host: &VirtualHost| -> Box<[_]> {
            let actions = of_server(
                host,
                Scope {
                    routes,
                    listener: making.listener,
                    // Those of a server are its own steps.
                    filters: &[],
                    profile: Profile::Envoy,
                    max_stream_duration: None,
                    stream_idle_timeout: None,
                    general: false,
                    around: None,
                    shared: &making.shared.filters,
                },
            );
            let route = |((index, route), action): ((usize, &Route), ServerRoute)| {
                let place = Place { routes: Some(routes), host: Some(host), route: Some(route), index };
                let links = making.filters.iter().filter_map(|filter| link(filter, making, place));
                let entry = Entry {
                    name: route.name.clone(),
                    steps: Steps(links.collect()),
                    action,
                    timeouts: timeouts(&route.action, making),
                    unavailable: unavailable(&route.action),
                };
                (Matcher::of_server(&route.matches), Arc::new(entry))
            };
            host.routes.iter().enumerate().zip(actions).map(route).collect()
        };
        Self::Of(routes.clone(), routes.virtual_hosts.iter().map(host).collect())
    }

    /// Why no request at all is served.
    pub(super) fn refusal(&self) -> Option<&Arc<str>> {
        let Self::All(entry) = self else { return None };
        entry.steps.0.iter().find_map(|link| if let Link::Refuse(reason, _) = link { Some(reason) } else { None })
    }

    /// The route of a request.
    pub(super) fn find(&self, head: &RequestHead<'_>) -> Option<&Arc<Entry>> {
        match self {
            Self::All(entry) => Some(entry),
            Self::Of(routes, hosts) => {
                let host = &hosts[routes.virtual_host_for(head.authority)?];
                let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
                host.iter().find(|(matcher, _)| matcher.matches(head, &mut rng)).map(|(_, entry)| entry)
            }
        }
    }
}

/// How long the requests of a route may take.
fn timeouts(action: &Action, making: &Making<'_>) -> Rules {
    let forward = if let Action::Forward(forward) = action { Some(&**forward) } else { None };
    Rules::of_server(forward, making.max_stream_duration)
}

/// gRFC A36: a server serves requests by itself. What a route answers is answered, as by Envoy. Istio's sidecars forward to the application, which is us.
fn unavailable(action: &Action) -> Option<Arc<str>> {
    match action {
        Action::NonForwarding | Action::Redirect(_) | Action::Direct(_) => None,
        Action::Forward(forward) => match &forward.cluster {
            ClusterSpecifier::Cluster(name) if name.starts_with("inbound|") => None,
            _ => Some("the route forwards to a cluster, but a server serves by itself (gRFC A36)".into()),
        },
        Action::Unsupported(reason) => Some(reason.clone()),
    }
}

/// Where a chain belongs.
#[derive(Clone, Copy, Default)]
struct Place<'a> {
    routes: Option<&'a RouteConfiguration>,
    host: Option<&'a VirtualHost>,
    route: Option<&'a Route>,
    index: usize,
}

impl<'a> Place<'a> {
    /// The most specific first.
    fn levels(self) -> [Option<&'a BTreeMap<Arc<str>, FilterOverride>>; 4] {
        [
            None,
            self.route.map(|route| &route.filter_overrides),
            self.host.map(|host| &host.filter_overrides),
            self.routes.map(|routes| &routes.filter_overrides),
        ]
    }
}

/// Where tokens are not asked for nobody has verified what the headers say that are made of them: they are taken away there as well.
fn unclaimed(filter: &HttpFilter, making: &Making<'_>) -> Option<Link> {
    let HttpFilterConfig::Jwt(config) = &filter.config else { return None };
    let without = Authentication::without(config, making.keys.provider.clone());
    without.edits().then_some(Link::Authenticate(without))
}

/// One filter of a route; `None`: it has nothing to do there.
fn link(filter: &HttpFilter, making: &Making<'_>, place: Place<'_>) -> Option<Link> {
    let specific = place.levels().into_iter().flatten().find_map(|level| level.get(&filter.name));
    let own = specific.and_then(|specific| specific.config.as_ref());
    if specific.map_or(filter.disabled, |specific| specific.disabled) {
        return unclaimed(filter, making);
    }
    let refuse = |reason: String| Link::Refuse(reason.into(), making.shared.refusals.clone());
    let mixed = || {
        Some(refuse(format!(
            "route `{}` has a config of another type for filter `{}`",
            place.route.map_or("", |route| &route.name),
            filter.name
        )))
    };
    match (&filter.config, own) {
        (HttpFilterConfig::Rbac(config), None) | (HttpFilterConfig::Rbac(_), Some(HttpFilterConfig::Rbac(config))) => {
            Authorization::compile(&filter.name, config).map(Link::Authorize)
        }
        (HttpFilterConfig::Jwt(_), Some(HttpFilterConfig::JwtOfRoute(JwtOfRoute::Disabled))) => {
            unclaimed(filter, making)
        }
        (HttpFilterConfig::Jwt(config), own @ (None | Some(HttpFilterConfig::JwtOfRoute(_)))) => {
            let of_route = match own {
                Some(HttpFilterConfig::JwtOfRoute(of_route)) => Some(of_route),
                _ => None,
            };
            let refuse = |reason: String| refuse(format!("filter `{}`: {reason}", filter.name));
            Some(Authentication::compile(config, of_route, &making.keys).map_or_else(refuse, Link::Authenticate))
        }
        (HttpFilterConfig::Rbac(_) | HttpFilterConfig::Jwt(_), Some(_)) => mixed(),
        (HttpFilterConfig::GlobalRateLimit(limit), _) if making.around.is_none() && limit.deny_on_error.0 > 0 => {
            // Nobody can be asked, and it is for them to let requests in.
            Some(refuse(format!("the rate limit service of filter `{}` is not asked by servers", filter.name)))
        }
        (config, _) => {
            let limits = match place.route.map(|route| &route.action) {
                Some(Action::Forward(forward)) => Limits {
                    route: &forward.rate_limits,
                    virtual_host: place.host.map_or(&[], |host| &host.rate_limits),
                    include: forward.include_vh_rate_limits,
                },
                _ => {
                    Limits { virtual_host: place.host.map_or(&[], |host| &host.rate_limits), route: &[], include: true }
                }
            };
            let waits = !matches!(
                config,
                HttpFilterConfig::LocalRateLimit(_)
                    | HttpFilterConfig::HeaderMutation(_)
                    | HttpFilterConfig::AdmissionControl(_)
                    | HttpFilterConfig::Buffer(_)
            );
            let made = making.shared.filters.filter(
                filter,
                FilterMaking {
                    listener: making.listener,
                    together: making.together,
                    names: [place.host.map_or("", |host| &host.name), place.route.map_or("", |route| &route.name), ""],
                    route: place.index,
                    filters: making.filters,
                    levels: place.levels(),
                    limits,
                    profile: Profile::Envoy,
                    around: making.around,
                },
            );
            made.map(|made| Link::Filter { name: filter.name.clone(), filter: made, waits })
        }
    }
}
