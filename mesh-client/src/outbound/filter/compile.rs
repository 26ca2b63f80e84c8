//! From the filters of a listener, and what its routes override, to chains (gRFC A39).

use super::{ActiveFaults, Chain, Filter, chain::Link, custom, fault::Fault};
use crate::outbound::route::Profile;
use mesh_xds::resource::{FilterOverride, HttpFilter, HttpFilterConfig};
use std::{collections::BTreeMap, sync::Arc};

/// What the filters of a mesh share, and keep over changes of the configuration.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    pub(super) faults: ActiveFaults,
}

/// Where a chain belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Making<'a> {
    /// Of the connection manager, in order.
    pub(crate) filters: &'a [HttpFilter],
    /// `typed_per_filter_config` of each level, the most specific first.
    pub(crate) levels: [Option<&'a BTreeMap<Arc<str>, FilterOverride>>; 4],
    pub(crate) profile: Profile,
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
    fn filter(&self, filter: &HttpFilter, making: Making<'_>) -> Option<Arc<dyn Filter>> {
        let mut levels = making.levels.into_iter().flatten().filter_map(|level| level.get(&filter.name));
        let specific = levels.next();
        if specific.map_or(filter.disabled, |specific| specific.disabled) {
            return None;
        }
        let config = match specific.and_then(|specific| specific.config.as_ref()) {
            Some(config) if same_type(config, &filter.config) => config,
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
        match config {
            HttpFilterConfig::Fault(config) => {
                (!config.is_inert()).then(|| Arc::new(Fault::compile(config, making.profile, self.faults.clone())) as _)
            }
            HttpFilterConfig::Custom(config) => custom::made(config),
            _ => None,
        }
    }
}

fn same_type(a: &HttpFilterConfig, b: &HttpFilterConfig) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}
