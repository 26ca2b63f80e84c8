//! The compiled routes of one virtual host.

use super::{Profile, RequestHead, index::PathIndex, matcher::Matcher};
use crate::outbound::{
    filter::{ActiveFaults, Fault},
    retry::Policy,
    timeout::Rules,
};
use mesh_xds::resource::{
    Action, ClusterSpecifier, FaultConfig, FilterOverride, HttpFilter, HttpFilterConfig, RetryPolicy, VirtualHost,
};
use std::{collections::BTreeMap, collections::HashMap, sync::Arc, time::Duration};

/// One virtual host, ready to be asked. `C` is what a cluster's name was resolved to.
#[derive(Debug)]
pub(crate) struct RouteTable<C> {
    name: Arc<str>,
    index: PathIndex,
    routes: Box<[(Matcher, RouteEntry<C>)]>,
}

/// What surrounds the virtual host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope<'a> {
    /// Of the connection manager, in order.
    pub(crate) filters: &'a [HttpFilter],
    /// Whose rules hold.
    pub(crate) profile: Profile,
    /// `common_http_protocol_options.max_stream_duration` of the connection manager.
    pub(crate) max_stream_duration: Option<Duration>,
    /// Counts the faults in progress; one for the whole mesh, so that `max_active_faults` survives config changes.
    pub(crate) active_faults: &'a ActiveFaults,
}

/// What the first matching route says.
#[derive(Debug)]
pub(crate) struct RouteEntry<C> {
    /// The route's name, or empty.
    pub(crate) name: Arc<str>,
    /// Its position in the virtual host, from 0.
    pub(crate) index: usize,
    /// What is done.
    pub(crate) action: RouteAction<C>,
}

/// The action of a route.
#[derive(Debug)]
pub(crate) enum RouteAction<C> {
    /// Forward to a cluster.
    Forward(Forward<C>),
    /// Fail the call as UNAVAILABLE with this reason (gRFC A28).
    Unsupported(Arc<str>),
}

/// A forwarding action.
#[derive(Debug)]
pub(crate) struct Forward<C> {
    /// Where to; the draw holds for all attempts of the call (gRFC A31).
    pub(crate) clusters: Clusters<C>,
    /// The route's, else the virtual host's; `None` when it has no condition that this profile knows.
    pub(crate) retry: Option<Arc<Policy>>,
    /// Limits of the whole call.
    pub(crate) timeouts: Rules,
}

/// One cluster, or a draw between several.
#[derive(Debug)]
pub(crate) enum Clusters<C> {
    /// Always this one, whatever its weight.
    Single(ClusterChoice<C>),
    /// By weight.
    Weighted {
        /// Running sums of the weights; the last one is the total.
        ends: Box<[u32]>,
        /// Parallel to `ends`.
        choices: Box<[ClusterChoice<C>]>,
    },
}

/// One cluster of a route.
#[derive(Debug)]
pub(crate) struct ClusterChoice<C> {
    /// What the name was resolved to.
    pub(crate) cluster: C,
    /// Its name.
    pub(crate) name: Arc<str>,
    /// Its weight; 1 when alone.
    pub(crate) weight: u32,
    /// The fault filters in force, in chain order, most specific override applied (gRFC A39). Nearly always empty.
    pub(crate) faults: Box<[Arc<Fault>]>,
}

/// No route matches.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("none of the {routes} routes of virtual host {virtual_host:?} matches")]
pub(crate) struct NoRoute {
    /// Name of the virtual host.
    pub(crate) virtual_host: Arc<str>,
    /// How many routes it has.
    pub(crate) routes: usize,
}

/// How a route was found, in words.
#[derive(Debug)]
pub(crate) struct Trail<'t, C> {
    /// The routes before it.
    pub(crate) skipped: Vec<Skipped>,
    /// The route.
    pub(crate) found: Result<&'t RouteEntry<C>, NoRoute>,
}

/// A route that did not apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Skipped {
    /// Its name, or empty.
    pub(crate) name: Arc<str>,
    /// Its position.
    pub(crate) index: usize,
    /// The first part of its match that failed, in words.
    pub(crate) reason: String,
}

impl<C> RouteTable<C> {
    /// Compiles `vhost`. `resolve` is asked once for every mention of a cluster.
    pub(crate) fn compile(vhost: &VirtualHost, scope: Scope<'_>, resolve: &mut dyn FnMut(&Arc<str>) -> C) -> Self {
        let mut compiler = Compiler { vhost, scope, faults: HashMap::new(), policies: HashMap::new() };
        let compile = |(index, route): (usize, &mesh_xds::resource::Route)| {
            let action = match &route.action {
                Action::Unsupported(reason) => RouteAction::Unsupported(reason.clone()),
                Action::Forward(forward) => {
                    match compiler.clusters(&forward.cluster, &route.filter_overrides, resolve) {
                        None => RouteAction::Unsupported("weighted_clusters: no cluster has a weight".into()),
                        Some(clusters) => RouteAction::Forward(Forward {
                            clusters,
                            retry: (forward.retry_policy.as_ref().or(vhost.retry_policy.as_ref()))
                                .and_then(|policy| compiler.policy(policy)),
                            timeouts: Rules::compile(forward, scope.max_stream_duration, scope.profile),
                        }),
                    }
                }
            };
            let entry = RouteEntry { name: route.name.clone(), index, action };
            (Matcher::compile(&route.matches, scope.profile), entry)
        };
        Self {
            name: vhost.name.clone(),
            index: PathIndex::compile(&vhost.routes),
            routes: vhost.routes.iter().enumerate().map(compile).collect(),
        }
    }

    /// The first route that matches. `rng(bound)` is uniform in `0..bound`, and drawn for fractions only.
    pub(crate) fn find(
        &self,
        head: &RequestHead<'_>,
        rng: &mut impl FnMut(u32) -> u32,
    ) -> Result<&RouteEntry<C>, NoRoute> {
        for number in self.index.candidates(head.path()) {
            let (matcher, entry) = &self.routes[number as usize];
            if matcher.check(head, rng).is_ok() {
                return Ok(entry);
            }
        }
        Err(self.no_route())
    }

    /// As [`find`](Self::find), and why each earlier route did not match.
    pub(crate) fn explain(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> Trail<'_, C> {
        let mut skipped = Vec::new();
        for (matcher, entry) in &self.routes {
            match matcher.check(head, rng) {
                Ok(()) => return Trail { skipped, found: Ok(entry) },
                Err(mismatch) => {
                    skipped.push(Skipped { name: entry.name.clone(), index: entry.index, reason: mismatch.to_string() })
                }
            }
        }
        Trail { skipped, found: Err(self.no_route()) }
    }

    /// The route at this position.
    pub(crate) fn entry(&self, index: usize) -> &RouteEntry<C> {
        &self.routes[index].1
    }

    fn no_route(&self) -> NoRoute {
        NoRoute { virtual_host: self.name.clone(), routes: self.routes.len() }
    }
}

impl<C> Forward<C> {
    /// Draws the call's cluster: O(1) for one, O(log n) for a split. The number is for [`choice`](Self::choice).
    pub(crate) fn draw(&self, rng: &mut impl FnMut(u32) -> u32) -> usize {
        match &self.clusters {
            Clusters::Single(_) => 0,
            Clusters::Weighted { ends, choices } => {
                let draw = rng(ends.last().copied().unwrap_or(1));
                ends.partition_point(|end| *end <= draw).min(choices.len() - 1)
            }
        }
    }

    /// What [`draw`](Self::draw) drew.
    pub(crate) fn choice(&self, drawn: usize) -> &ClusterChoice<C> {
        match &self.clusters {
            Clusters::Single(choice) => choice,
            Clusters::Weighted { choices, .. } => &choices[drawn],
        }
    }
}

impl<C> Clusters<C> {
    /// Sum of the weights.
    pub(crate) fn total_weight(&self) -> u32 {
        match self {
            Self::Single(choice) => choice.weight,
            Self::Weighted { ends, .. } => ends.last().copied().unwrap_or(0),
        }
    }

    /// Every cluster that can be drawn.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, ClusterChoice<C>> {
        match self {
            Self::Single(choice) => std::slice::from_ref(choice).iter(),
            Self::Weighted { choices, .. } => choices.iter(),
        }
    }
}

/// Shares what routes share: one compiled value per configured `Arc`.
struct Compiler<'a> {
    vhost: &'a VirtualHost,
    scope: Scope<'a>,
    faults: HashMap<*const FaultConfig, Arc<Fault>>,
    policies: HashMap<*const RetryPolicy, Option<Arc<Policy>>>,
}

impl Compiler<'_> {
    fn clusters<C>(
        &mut self,
        specifier: &ClusterSpecifier,
        route: &BTreeMap<Arc<str>, FilterOverride>,
        resolve: &mut dyn FnMut(&Arc<str>) -> C,
    ) -> Option<Clusters<C>> {
        Some(match specifier {
            ClusterSpecifier::Cluster(name) => Clusters::Single(ClusterChoice {
                cluster: resolve(name),
                name: name.clone(),
                weight: 1,
                faults: self.faults([None, Some(route)]),
            }),
            ClusterSpecifier::Weighted(parts) => {
                let mut total = 0u32;
                let mut ends = Vec::with_capacity(parts.len());
                let mut choices = Vec::with_capacity(parts.len());
                for part in parts.iter().filter(|part| part.weight > 0) {
                    total = total.saturating_add(part.weight);
                    ends.push(total);
                    choices.push(ClusterChoice {
                        cluster: resolve(&part.name),
                        name: part.name.clone(),
                        weight: part.weight,
                        faults: self.faults([Some(&part.filter_overrides), Some(route)]),
                    });
                }
                if choices.len() < 2 {
                    return choices.pop().map(Clusters::Single);
                }
                Clusters::Weighted { ends: ends.into(), choices: choices.into() }
            }
        })
    }

    /// gRFC A39: the most specific override wins, nothing is merged; `disabled` can be lifted by an override.
    fn faults(&mut self, overrides: [Option<&BTreeMap<Arc<str>, FilterOverride>>; 2]) -> Box<[Arc<Fault>]> {
        let mut faults = Vec::new();
        for filter in self.scope.filters {
            let HttpFilterConfig::Fault(config) = &filter.config else { continue };
            let levels = overrides.into_iter().flatten().chain([&self.vhost.filter_overrides]);
            let (config, disabled) = match levels.into_iter().find_map(|level| level.get(&filter.name)) {
                Some(specific) => (specific.fault.as_ref().unwrap_or(config), specific.disabled),
                None => (config, filter.disabled),
            };
            if disabled || (config.delay.is_none() && config.abort.is_none()) {
                continue;
            }
            let Scope { profile, active_faults, .. } = self.scope;
            let compile = || Arc::new(Fault::compile(config, profile, active_faults.clone()));
            faults.push(self.faults.entry(Arc::as_ptr(config)).or_insert_with(compile).clone());
        }
        faults.into()
    }

    fn policy(&mut self, policy: &Arc<RetryPolicy>) -> Option<Arc<Policy>> {
        let profile = self.scope.profile;
        let compile = || Policy::compile(policy, profile).map(Arc::new);
        self.policies.entry(Arc::as_ptr(policy)).or_insert_with(compile).clone()
    }
}
