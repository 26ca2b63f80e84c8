//! Actions, compiled: clusters resolved, levels merged, and one compiled value for what routes share.

use super::{
    answer::{Answer, What},
    edits::{Edits, Ops},
    hash::Hasher,
    matcher::matched_length,
    mirror::Mirror,
    table::{ClusterChoice, Clusters, Forward, Part as SplitPart, RouteAction, Scope},
};
use crate::outbound::{
    filter::{Chain, Limits, Making},
    pick::MetadataKey,
    retry::Policy,
    route::Profile,
    timeout::Rules,
};
use mesh_xds::resource::{
    Action, AttemptCount, ClusterSpecifier, Forward as Forwarding, HeaderEdits, HeaderOps, HostRewrite, RetryPolicy,
    Route, VirtualHost, WeightedCluster,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

/// Compiles the routes of one virtual host.
pub(super) struct Compiler<'a> {
    vhost: &'a VirtualHost,
    scope: Scope<'a>,
    /// Position of the route that is compiled.
    index: usize,
    /// Every cluster of the virtual host; made when a header chooses among them.
    known: Option<BTreeSet<Arc<str>>>,
    /// The filters of routes that override nothing; outer `None`: not made yet.
    chain: Option<Option<Arc<Chain>>>,
    policies: HashMap<*const RetryPolicy, Option<Arc<Policy>>>,
    ops: HashMap<*const HeaderOps, Arc<Ops>>,
}

/// What the routes of a virtual host of a server answer, or change of requests that the server serves. One for each route.
pub(crate) fn of_server(vhost: &VirtualHost, scope: Scope<'_>) -> Vec<ServerRoute> {
    let mut compiler = Compiler::new(vhost, scope);
    let served = Forwarding::to(ClusterSpecifier::Cluster("".into()));
    let route = |route: &Route| {
        let action = match &route.action {
            Action::NonForwarding => compiler.forward(route, &served, &mut |_| ()),
            _ => compiler.action(0, route, &mut |_| ()),
        };
        match action {
            RouteAction::Answer(answer) => ServerRoute::Answered(answer),
            RouteAction::Forward(Forward { clusters: Clusters::Single(choice), .. }) => {
                ServerRoute::Served(choice.edits)
            }
            RouteAction::Forward(_) | RouteAction::Unsupported(_) => ServerRoute::Served(None),
        }
    };
    vhost.routes.iter().map(route).collect()
}

/// A route of a server.
#[derive(Debug)]
pub(crate) enum ServerRoute {
    /// It answers by itself.
    Answered(Box<Answer>),
    /// The server does, and this is changed of request and response.
    Served(Option<Box<Edits>>),
}

/// What a cluster of a route is, beside its name.
#[derive(Clone, Copy)]
struct Part<'a> {
    route: &'a Route,
    forward: &'a Forwarding,
    /// In a weighted split.
    weighted: Option<&'a WeightedCluster>,
}

impl<'a> Compiler<'a> {
    pub(super) fn new(vhost: &'a VirtualHost, scope: Scope<'a>) -> Self {
        Self { vhost, scope, index: 0, known: None, chain: None, policies: HashMap::new(), ops: HashMap::new() }
    }

    pub(super) fn action<C>(
        &mut self,
        index: usize,
        route: &Route,
        resolve: &mut dyn FnMut(&Arc<str>) -> C,
    ) -> RouteAction<C> {
        self.index = index;
        match &route.action {
            Action::Unsupported(reason) => RouteAction::Unsupported(reason.clone()),
            Action::NonForwarding => RouteAction::Unsupported("non_forwarding_action is for servers".into()),
            Action::Forward(forward) => self.forward(route, forward, resolve),
            Action::Redirect(redirect) => {
                let what = What::Redirect(redirect.clone(), matched_length(&route.matches.path));
                RouteAction::Answer(self.answer(route, what))
            }
            Action::Direct(direct) => RouteAction::Answer(self.answer(route, What::Direct(direct.clone()))),
        }
    }

    fn answer(&mut self, route: &Route, what: What) -> Box<Answer> {
        let filters = self.filters_of_answer(route);
        Box::new(Answer { what, edits: self.levels(route, None, |edits| &edits.response), filters })
    }

    /// Rate limits are of the route's action, which such a route does not have.
    fn filters_of_answer(&self, route: &Route) -> Option<Arc<Chain>> {
        let (host, routes) = (&self.vhost.filter_overrides, &self.scope.routes.filter_overrides);
        self.scope.shared.chain(Making {
            filters: self.scope.filters,
            listener: self.scope.listener,
            together: None,
            around: self.scope.around,
            names: [&self.vhost.name, &route.name, ""],
            route: self.index,
            limits: Limits { route: &[], virtual_host: &[], include: false },
            levels: [None, Some(&route.filter_overrides), Some(host), Some(routes)],
            profile: self.scope.profile,
        })
    }

    fn forward<C>(
        &mut self,
        route: &Route,
        forward: &Forwarding,
        resolve: &mut dyn FnMut(&Arc<str>) -> C,
    ) -> RouteAction<C> {
        let Some(clusters) = self.clusters(Part { route, forward, weighted: None }, resolve) else {
            return RouteAction::Unsupported("weighted_clusters: no cluster has a weight".into());
        };
        let retry = forward.retry_policy.as_ref().or(self.vhost.retry_policy.as_ref());
        let retry = retry.and_then(|policy| self.policy(policy));
        let Scope { profile, max_stream_duration, stream_idle_timeout, .. } = self.scope;
        let idle = (forward.idle_timeout.or(stream_idle_timeout))
            .filter(|limit| profile == Profile::Envoy && !limit.is_zero());
        let mirrors = forward.mirrors.iter().map(|mirror| Mirror::compile(mirror, self.known(), resolve)).collect();
        let priority = forward.priority;
        let hedge = forward.hedge.filter(|_| retry.is_some());
        // gRPC has a header of its own (gRFC A6).
        let attempt_count = if profile == Profile::Envoy { self.vhost.attempt_count } else { AttemptCount::default() };
        let forward = Forward {
            timeouts: Rules::compile(forward, max_stream_duration, profile),
            clusters,
            retry,
            idle,
            hedge,
            attempt_count,
            mirrors,
            hasher: Hasher::compile(&forward.hash_policies, profile).map(Box::new),
            general: false,
            priority,
            cluster_not_found: forward.cluster_not_found,
        };
        RouteAction::Forward(Forward { general: self.scope.general || forward.is_general(), ..forward })
    }

    fn clusters<C>(&mut self, part: Part<'_>, resolve: &mut dyn FnMut(&Arc<str>) -> C) -> Option<Clusters<C>> {
        Some(match &part.forward.cluster {
            ClusterSpecifier::Cluster(name) => Clusters::Single(self.choice(name, part, resolve)),
            ClusterSpecifier::Weighted(parts) if parts.iter().any(|part| part.weight > 0 && part.header.is_some()) => {
                self.split(parts, part, resolve)
            }
            ClusterSpecifier::Weighted(parts) => {
                let mut total = 0u32;
                let mut ends = Vec::with_capacity(parts.len());
                let mut choices = Vec::with_capacity(parts.len());
                for weighted in parts.iter().filter(|part| part.weight > 0) {
                    total = total.saturating_add(weighted.weight);
                    ends.push(total);
                    choices.push(self.choice(&weighted.name, Part { weighted: Some(weighted), ..part }, resolve));
                }
                if choices.len() < 2 {
                    return choices.pop().map(Clusters::Single);
                }
                Clusters::Weighted { ends: ends.into(), choices: choices.into() }
            }
            ClusterSpecifier::Header(header) => {
                let known: Vec<_> = self.known().iter().cloned().collect();
                let choices = known.iter().map(|name| self.choice(name, part, resolve)).collect();
                Clusters::Named { header: header.clone(), choices }
            }
        })
    }

    /// Parts of which a header names the cluster: each has every cluster of the virtual host.
    fn split<C>(
        &mut self,
        weighted: &[WeightedCluster],
        part: Part<'_>,
        resolve: &mut dyn FnMut(&Arc<str>) -> C,
    ) -> Clusters<C> {
        let (mut total, mut ends, mut parts, mut choices) = (0u32, Vec::new(), Vec::new(), Vec::new());
        let known: Vec<_> = self.known().iter().cloned().collect();
        for weighted in weighted.iter().filter(|part| part.weight > 0) {
            total = total.saturating_add(weighted.weight);
            ends.push(total);
            let names = if weighted.header.is_some() { &known[..] } else { std::slice::from_ref(&weighted.name) };
            let start = choices.len();
            let part = Part { weighted: Some(weighted), ..part };
            choices.extend(names.iter().map(|name| self.choice(name, part, resolve)));
            parts.push(SplitPart { header: weighted.header.clone(), choices: start..choices.len() });
        }
        Clusters::Split { ends: ends.into(), parts: parts.into(), choices: choices.into() }
    }

    fn choice<C>(
        &mut self,
        name: &Arc<str>,
        part: Part<'_>,
        resolve: &mut dyn FnMut(&Arc<str>) -> C,
    ) -> ClusterChoice<C> {
        ClusterChoice {
            cluster: resolve(name),
            name: name.clone(),
            weight: part.weighted.map_or(1, |weighted| weighted.weight),
            filters: self.filters(part),
            edits: self.edits(part),
            metadata: metadata(part).map(Box::new),
        }
    }

    fn known(&mut self) -> &BTreeSet<Arc<str>> {
        self.known.get_or_insert_with(|| self.vhost.cluster_names())
    }

    fn edits(&mut self, part: Part<'_>) -> Option<Box<Edits>> {
        let Part { route, forward, weighted } = part;
        let own = weighted.map(|weighted| &weighted.edits);
        let literal = weighted.and_then(|weighted| weighted.host_rewrite.clone()).map(HostRewrite::Literal);
        let host = literal.or_else(|| forward.host_rewrite.clone());
        let trusted = |trusted: bool| trusted || self.scope.profile == Profile::Envoy;
        let auto_host = matches!(host, Some(HostRewrite::Endpoint { trusted: t }) if trusted(t));
        let edits = Edits {
            request: self.levels(route, own, |edits| &edits.request),
            response: self.levels(route, own, |edits| &edits.response),
            path: forward.path_rewrite.clone().map(|rewrite| (rewrite, matched_length(&route.matches.path))),
            host: host.filter(|host| !matches!(host, HostRewrite::Endpoint { .. })),
            auto_host,
            forwarded_host: forward.append_x_forwarded_host,
        };
        (!edits.is_empty()).then(|| Box::new(edits))
    }

    /// The most specific level first, or last where it is to win.
    fn levels(
        &mut self,
        route: &Route,
        cluster: Option<&HeaderEdits>,
        side: impl Fn(&HeaderEdits) -> &HeaderOps,
    ) -> Box<[Arc<Ops>]> {
        let levels = [cluster, Some(&route.edits), Some(&self.vhost.edits), Some(&self.scope.routes.edits)];
        let levels = levels.into_iter().flatten().map(side).filter(|ops| !ops.is_empty());
        let compiled = levels
            .map(|ops| self.ops.entry(std::ptr::from_ref(ops)).or_insert_with(|| Arc::new(Ops::compile(ops))).clone());
        let mut compiled: Vec<_> = compiled.collect();
        if self.scope.routes.most_specific_edits_win {
            compiled.reverse();
        }
        compiled.into()
    }

    /// The filters of a cluster; those of the virtual host where nothing more specific is said.
    fn filters(&mut self, part: Part<'_>) -> Option<Arc<Chain>> {
        let cluster = part.weighted.map(|weighted| &weighted.filter_overrides);
        let Part { route, forward, weighted } = part;
        let general = route.filter_overrides.is_empty()
            && cluster.is_none_or(BTreeMap::is_empty)
            && forward.rate_limits.is_empty()
            && !forward.include_vh_rate_limits;
        if let Some(chain) = self.chain.as_ref().filter(|_| general) {
            return chain.clone();
        }
        let (host, routes) = (&self.vhost.filter_overrides, &self.scope.routes.filter_overrides);
        let chain = self.scope.shared.chain(Making {
            filters: self.scope.filters,
            listener: self.scope.listener,
            together: None,
            around: self.scope.around,
            names: [&self.vhost.name, &route.name, weighted.map_or("", part_name)],
            route: self.index,
            limits: Limits {
                route: &forward.rate_limits,
                virtual_host: &self.vhost.rate_limits,
                include: forward.include_vh_rate_limits,
            },
            levels: [cluster, Some(&part.route.filter_overrides), Some(host), Some(routes)],
            profile: self.scope.profile,
        });
        if general {
            self.chain = Some(chain.clone());
        }
        chain
    }

    fn policy(&mut self, policy: &Arc<RetryPolicy>) -> Option<Arc<Policy>> {
        let profile = self.scope.profile;
        let compile = || Policy::compile(policy, profile).map(Arc::new);
        self.policies.entry(Arc::as_ptr(policy)).or_insert_with(compile).clone()
    }
}

/// What a part of a split is called: by its cluster, or by the header that names it.
fn part_name(part: &WeightedCluster) -> &str {
    part.header.as_ref().map_or(&*part.name, http::HeaderName::as_str)
}

/// The route's, and the weighted cluster's over it.
fn metadata(part: Part<'_>) -> Option<MetadataKey> {
    let own = part.weighted.and_then(|weighted| weighted.metadata_match.as_deref());
    let levels = [part.forward.metadata_match.as_deref(), own].into_iter().flatten();
    let merged: BTreeMap<_, _> = levels.flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    MetadataKey::new(&merged)
}
