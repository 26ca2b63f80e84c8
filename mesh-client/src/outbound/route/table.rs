//! The compiled routes of one virtual host.

use super::{
    Hasher, Profile, RequestHead, answer::Answer, compile::Compiler, edits::Edits, index::PathIndex, matcher::Matcher,
    mirror::Mirror,
};
use crate::outbound::{
    filter::{Chain, Filters, Surroundings},
    pick::MetadataKey,
    retry::Policy,
    timeout::Rules,
};
use http::HeaderName;
use mesh_xds::resource::{AttemptCount, Hedge, HttpFilter, RouteConfiguration, RoutingPriority, VirtualHost};
use std::{ops::Range, sync::Arc, time::Duration};

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
    /// The configuration that the virtual host is part of.
    pub(crate) routes: &'a RouteConfiguration,
    /// Name of the listener.
    pub(crate) listener: &'a Arc<str>,
    /// Of the connection manager, in order.
    pub(crate) filters: &'a [HttpFilter],
    /// Whose rules hold.
    pub(crate) profile: Profile,
    /// `common_http_protocol_options.max_stream_duration` of the connection manager.
    pub(crate) max_stream_duration: Option<Duration>,
    /// `stream_idle_timeout` of the connection manager.
    pub(crate) stream_idle_timeout: Option<Duration>,
    /// The mesh was built with what the direct road has not.
    pub(crate) general: bool,
    /// For filters that call services; `None`: there are none.
    pub(crate) around: Option<Surroundings<'a>>,
    /// What the filters of the mesh share.
    pub(crate) shared: &'a Filters,
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
    /// Answer here.
    Answer(Box<Answer>),
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
    /// How long the stream may stand still.
    pub(crate) idle: Option<Duration>,
    /// When a second request is sent while the first is on its way.
    pub(crate) hedge: Option<Hedge>,
    /// Who is told how often a request was tried.
    pub(crate) attempt_count: AttemptCount,
    /// Who gets copies of the requests. Nearly always empty.
    pub(crate) mirrors: Box<[Mirror<C>]>,
    /// Its calls need more than the direct road has.
    pub(crate) general: bool,
    /// What is hashed of requests. Nearly always absent.
    pub(crate) hasher: Option<Box<Hasher>>,
    /// Whose circuit breakers count its requests.
    pub(crate) priority: RoutingPriority,
    /// The HTTP status of requests whose cluster is not known.
    pub(crate) cluster_not_found: u16,
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
    /// By weight, where parts leave the name of their cluster to a header.
    Split {
        /// Running sums of the weights; the last one is the total.
        ends: Box<[u32]>,
        /// Parallel to `ends`.
        parts: Box<[Part]>,
        /// Those of all parts.
        choices: Box<[ClusterChoice<C>]>,
    },
    /// The one that a header of the request names.
    Named {
        /// The header.
        header: HeaderName,
        /// Every cluster of the virtual host, sorted by name.
        choices: Box<[ClusterChoice<C>]>,
    },
}

/// One part of a [split](Clusters::Split).
#[derive(Debug)]
pub(crate) struct Part {
    /// Names the cluster; `None`: there is but one.
    pub(crate) header: Option<HeaderName>,
    /// Among the choices of all parts; sorted by name.
    pub(crate) choices: Range<usize>,
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
    /// The filters in force. Nearly always absent.
    pub(crate) filters: Option<Arc<Chain>>,
    /// What is changed on requests and responses. Nearly always absent.
    pub(crate) edits: Option<Box<Edits>>,
    /// The metadata that an endpoint must have, where the cluster has subsets. Nearly always absent.
    pub(crate) metadata: Option<Box<MetadataKey>>,
}

/// The header that names the cluster does not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoCluster {
    /// It is absent.
    #[error("the request has no header {0}, which names the cluster")]
    NoHeader(HeaderName),
    /// It names no cluster of the virtual host.
    #[error("header {0} names cluster `{1}`, which no route of the virtual host names")]
    Unknown(HeaderName, String),
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
        let mut compiler = Compiler::new(vhost, scope);
        let compile = |(index, route): (usize, &mesh_xds::resource::Route)| {
            let entry = RouteEntry { name: route.name.clone(), index, action: compiler.action(index, route, resolve) };
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
    /// Whether its calls need more than the direct road has.
    pub(super) fn is_general(&self) -> bool {
        let auto_host = |choice: &ClusterChoice<C>| choice.edits.as_ref().is_some_and(|edits| edits.auto_host);
        self.idle.is_some()
            || !self.mirrors.is_empty()
            || self.hedge.is_some()
            || self.retry.as_ref().is_some_and(|policy| policy.per_try_idle_timeout().is_some())
            || self.clusters.iter().any(auto_host)
    }

    /// Chooses the call's cluster: O(1) for one, O(log n) for a split or a name. The number is for [`choice`](Self::choice).
    ///
    /// # Errors
    /// The request is to name the cluster, and does not.
    pub(crate) fn draw(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> Result<usize, NoCluster> {
        Ok(match &self.clusters {
            Clusters::Single(_) => 0,
            Clusters::Named { header, choices } => named(header, choices, head)?,
            Clusters::Weighted { ends, choices } => {
                let draw = rng(ends.last().copied().unwrap_or(1));
                ends.partition_point(|end| *end <= draw).min(choices.len() - 1)
            }
            Clusters::Split { ends, parts, choices } => {
                let draw = rng(ends.last().copied().unwrap_or(1));
                parts[ends.partition_point(|end| *end <= draw).min(parts.len() - 1)].choose(choices, head)?
            }
        })
    }

    /// Every cluster that this request may be drawn.
    pub(crate) fn possible(&self, head: &RequestHead<'_>) -> Vec<Result<&ClusterChoice<C>, NoCluster>> {
        match &self.clusters {
            Clusters::Single(_) | Clusters::Weighted { .. } => self.clusters.iter().map(Ok).collect(),
            Clusters::Named { header, choices } => vec![named(header, choices, head).map(|drawn| &choices[drawn])],
            Clusters::Split { parts, choices, .. } => {
                parts.iter().map(|part| part.choose(choices, head).map(|drawn| &choices[drawn])).collect()
            }
        }
    }

    /// What [`draw`](Self::draw) drew.
    pub(crate) fn choice(&self, drawn: usize) -> &ClusterChoice<C> {
        match &self.clusters {
            Clusters::Single(choice) => choice,
            Clusters::Weighted { choices, .. } | Clusters::Split { choices, .. } | Clusters::Named { choices, .. } => {
                &choices[drawn]
            }
        }
    }
}

/// Position of the cluster that a header names.
fn named<C>(header: &HeaderName, choices: &[ClusterChoice<C>], head: &RequestHead<'_>) -> Result<usize, NoCluster> {
    let name = head.first(header).ok_or_else(|| NoCluster::NoHeader(header.clone()))?;
    let at = choices.binary_search_by(|choice| (*choice.name).cmp(name));
    at.map_err(|_| NoCluster::Unknown(header.clone(), name.to_owned()))
}

impl Part {
    fn choose<C>(&self, choices: &[ClusterChoice<C>], head: &RequestHead<'_>) -> Result<usize, NoCluster> {
        match &self.header {
            None => Ok(self.choices.start),
            Some(header) => Ok(self.choices.start + named(header, &choices[self.choices.clone()], head)?),
        }
    }
}

impl<C> Clusters<C> {
    /// Sum of the weights.
    pub(crate) fn total_weight(&self) -> u32 {
        match self {
            Self::Single(choice) => choice.weight,
            Self::Weighted { ends, .. } | Self::Split { ends, .. } => ends.last().copied().unwrap_or(0),
            // Nothing is drawn.
            Self::Named { .. } => 1,
        }
    }

    /// Every cluster that can be drawn.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, ClusterChoice<C>> {
        match self {
            Self::Single(choice) => std::slice::from_ref(choice).iter(),
            Self::Weighted { choices, .. } | Self::Split { choices, .. } | Self::Named { choices, .. } => {
                choices.iter()
            }
        }
    }
}
