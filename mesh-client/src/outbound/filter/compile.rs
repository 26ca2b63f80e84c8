//! From the filters of a listener, and what its routes override, to chains (gRFC A39).

use super::{
    ActiveFaults, Chain, Filter,
    admission::{AdmissionControl, Window},
    buffer::Buffer,
    chain::Link,
    concurrency::{AdaptiveConcurrency, Controller},
    custom,
    descriptor::{Descriptors, Limits},
    fault::Fault,
    global_rate_limit::GlobalRateLimit,
    header_mutation::Mutation,
    local_rate_limit::{Buckets, LocalRateLimit},
    service::{Services, Surroundings},
    session::StatefulSession,
};
use crate::outbound::route::Profile;
use mesh_xds::resource::{
    FilterOverride, FractionalPercent, GlobalRateLimitConfig, HeaderMutationConfig, HttpFilter, HttpFilterConfig,
    LocalRateLimitConfig, RateLimitOfRoute,
};
use std::{
    any::Any,
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::time::Instant;

/// What the filters of a mesh share, and keep over changes of the configuration.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    pub(super) faults: ActiveFaults,
    kept: Mutex<HashMap<Key, Kept>>,
    pub(crate) services: Services,
}

/// Listener, filter, and the level whose config is in force.
type Key = (Arc<str>, Arc<str>, Option<Box<str>>);

/// What a filter counts, as long as its config stays the same and somebody uses it.
#[derive(Debug)]
struct Kept {
    config: HttpFilterConfig,
    live: Weak<dyn Any + Send + Sync>,
}

/// Where a chain belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Making<'a> {
    /// Name of the listener.
    pub(crate) listener: &'a Arc<str>,
    /// The first so many of `filters` count under this name, whatever `listener` is: those of the program, for all filter chains together.
    pub(crate) together: Option<(&'a Arc<str>, usize)>,
    /// Names of virtual host, route and cluster, for what is counted by route.
    pub(crate) names: [&'a str; 3],
    /// Position of the route.
    pub(crate) route: usize,
    /// Of the connection manager, in order.
    pub(crate) filters: &'a [HttpFilter],
    /// `typed_per_filter_config` of each level, the most specific first.
    pub(crate) levels: [Option<&'a BTreeMap<Arc<str>, FilterOverride>>; 4],
    /// Of the route and its virtual host.
    pub(crate) limits: Limits<'a>,
    pub(crate) profile: Profile,
    /// For filters that call services; `None`: there are none.
    pub(crate) around: Option<Surroundings<'a>>,
}

impl Filters {
    /// The chain of one cluster of a route; `None` when no filter has anything to do.
    pub(crate) fn chain(&self, making: Making<'_>) -> Option<Arc<Chain>> {
        let links: Box<[Link]> = making
            .filters
            .iter()
            .filter_map(|filter| Some(Link { name: filter.name.clone(), filter: self.filter(filter, making)? }))
            .collect();
        (!links.is_empty()).then(|| Arc::new(Chain { links }))
    }

    /// gRFC A39: the most specific override wins, nothing is merged; `disabled` can be lifted by an override.
    pub(crate) fn filter(&self, filter: &HttpFilter, making: Making<'_>) -> Option<Arc<dyn Filter>> {
        let mut levels = making.levels.into_iter().zip(0..);
        let specific = levels.find_map(|(level, number)| Some((level?.get(&filter.name)?, number)));
        let (specific, level) = (specific.map(|(specific, _)| specific), specific.map(|(_, level)| level));
        if specific.map_or(filter.disabled, |specific| specific.disabled) {
            return None;
        }
        let config = match specific.and_then(|specific| specific.config.as_ref()) {
            Some(config) if same_type(config, &filter.config) => config,
            Some(HttpFilterConfig::GlobalRateLimitOfRoute(_)) => &filter.config,
            Some(other) => {
                tracing::warn!(
                    filter = &*filter.name,
                    ?other,
                    "the config that a route has for a filter is of another type, ignored"
                );
                &filter.config
            }
            None => &filter.config,
        };
        let place = Place { filter, config, level: level.filter(|_| !std::ptr::eq(config, &filter.config)) };
        match config {
            HttpFilterConfig::Fault(config) => {
                (!config.is_inert()).then(|| Arc::new(Fault::compile(config, making.profile, self.faults.clone())) as _)
            }
            HttpFilterConfig::Custom(config) => custom::made(config),
            HttpFilterConfig::HeaderMutation(_) => mutation(filter, making),
            HttpFilterConfig::Buffer(config) => config.max_request_bytes.map(|max| Arc::new(Buffer(max.into())) as _),
            HttpFilterConfig::AdmissionControl(control) if control.enabled => {
                let window = self.kept(making, &place, || Window::new(Instant::now()));
                Some(Arc::new(AdmissionControl::new(control.clone(), window)))
            }
            HttpFilterConfig::AdaptiveConcurrency(concurrency) if concurrency.enabled => {
                let controller = self.kept(making, &place, || Controller::new(concurrency, Instant::now()));
                Some(Arc::new(AdaptiveConcurrency::new(concurrency.clone(), controller)))
            }
            HttpFilterConfig::StatefulSession(session) => {
                let state = session.state.as_ref()?;
                Some(Arc::new(StatefulSession(Arc::new(state.clone()))))
            }
            HttpFilterConfig::GlobalRateLimit(limit) => self.global_rate_limit(limit, specific, making),
            HttpFilterConfig::LocalRateLimit(limit) => self.local_rate_limit(limit, making, &place),
            _ => None,
        }
    }

    fn global_rate_limit(
        &self,
        config: &Arc<GlobalRateLimitConfig>,
        specific: Option<&FilterOverride>,
        making: Making<'_>,
    ) -> Option<Arc<dyn Filter>> {
        let route = match specific.and_then(|specific| specific.config.as_ref()) {
            Some(HttpFilterConfig::GlobalRateLimitOfRoute(route)) => RateLimitOfRoute::clone(route),
            _ => RateLimitOfRoute::default(),
        };
        let own = if route.rate_limits.is_empty() { &config.rate_limits } else { &route.rate_limits };
        let descriptors = Descriptors::compile(own, making.limits, route.virtual_host, config.stage, making.profile);
        if descriptors.is_empty() || config.enabled == FractionalPercent(0) {
            return None;
        }
        let service = self.services.get(&config.cluster, config.authority.as_ref(), making.around?)?;
        let domain = if route.domain.is_empty() { config.domain.clone() } else { route.domain };
        Some(Arc::new(GlobalRateLimit::new(config.clone(), domain, service, descriptors)))
    }

    fn local_rate_limit(
        &self,
        config: &Arc<LocalRateLimitConfig>,
        making: Making<'_>,
        place: &Place<'_>,
    ) -> Option<Arc<dyn Filter>> {
        if config.enabled == FractionalPercent(0) || (config.bucket.is_none() && config.descriptors.is_empty()) {
            return None;
        }
        let buckets = self.kept(making, place, || Buckets::new(config, Instant::now()));
        let descriptors =
            Descriptors::compile(&config.rate_limits, making.limits, config.virtual_host, config.stage, making.profile);
        Some(Arc::new(LocalRateLimit::new(config.clone(), buckets, descriptors)))
    }

    /// What a filter counts: what is there, if it was made by the same config in the same place.
    fn kept<T: Send + Sync + 'static>(
        &self,
        making: Making<'_>,
        place: &Place<'_>,
        make: impl FnOnce() -> T,
    ) -> Arc<T> {
        let listener = match making.together {
            Some((name, count)) if making.filters[..count].iter().any(|one| std::ptr::eq(one, place.filter)) => name,
            _ => making.listener,
        };
        let key = (listener.clone(), place.filter.name.clone(), place.level.map(|level| making.level(level)));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.get(&key).filter(|known| known.config == *place.config).and_then(|known| known.live.upgrade());
        if let Some(live) = known.and_then(|live| live.downcast().ok()) {
            return live;
        }
        kept.retain(|_, kept| kept.live.strong_count() > 0);
        let live = Arc::new(make());
        let weak = Arc::downgrade(&live);
        kept.insert(key, Kept { config: place.config.clone(), live: weak });
        live
    }
}

/// Whose config is in force.
struct Place<'a> {
    filter: &'a HttpFilter,
    config: &'a HttpFilterConfig,
    /// `None`: the filter's own.
    level: Option<usize>,
}

impl Making<'_> {
    /// A level in words: no two of a listener are the same.
    fn level(&self, level: usize) -> Box<str> {
        let [host, route, cluster] = self.names;
        let index = self.route;
        match level {
            0 => format!("{host}/{index} {route}/{cluster}").into(),
            1 => format!("{host}/{index} {route}").into(),
            2 => host.into(),
            _ => "".into(),
        }
    }
}

/// All levels are made, after the filter's own (Envoy).
fn mutation(filter: &HttpFilter, making: Making<'_>) -> Option<Arc<dyn Filter>> {
    let HttpFilterConfig::HeaderMutation(own) = &filter.config else { return None };
    let levels = making.levels.into_iter().flatten().filter_map(|level| level.get(&filter.name)?.config.as_ref());
    let mut configs: Vec<&HeaderMutationConfig> = levels
        .filter_map(|config| match config {
            HttpFilterConfig::HeaderMutation(config) => Some(&**config),
            _ => None,
        })
        .collect();
    if own.most_specific_wins {
        configs.reverse();
    }
    configs.insert(0, own);
    let inert = configs.iter().all(|config| config.is_empty());
    (!inert).then(|| Arc::new(Mutation::compile(&configs)) as _)
}

fn same_type(a: &HttpFilterConfig, b: &HttpFilterConfig) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}
