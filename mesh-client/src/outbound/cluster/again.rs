//! Where retries go: away from the hosts and priorities that failed, and from those they are told to omit.

use super::{Endpoint, Link, LiveCluster, Pick};
use crate::outbound::pick::{PickInput, Picker, left_behind};
use mesh_xds::resource::{MetadataValue, OmitHosts};
use smallvec::SmallVec;
use std::sync::{Arc, PoisonError};

/// What a retry stays away from, while there is anything else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avoid<'a, L: Link> {
    /// The endpoints tried before, in order.
    pub(crate) tried: &'a [Arc<Endpoint<L>>],
    /// They themselves (Envoy's `previous_hosts`).
    pub(crate) previous_hosts: bool,
    /// Others (Envoy's `omit_canary_hosts`, `omit_host_metadata`).
    pub(crate) omit: &'a [OmitHosts],
    /// Their priorities, each time so many were tried (Envoy's `previous_priorities`); 0 is never.
    pub(crate) leave_priorities: u32,
}

impl<L: Link> LiveCluster<L> {
    /// Chooses an endpoint for a retry. The rarer wishes cost a look at all endpoints.
    pub(crate) fn pick_again(&self, input: &PickInput<'_>, avoid: &Avoid<'_, L>, rng: &mut fastrand::Rng) -> Pick<L> {
        let tried = if avoid.previous_hosts { avoid.tried } else { &[] };
        if avoid.omit.is_empty() && avoid.leave_priorities == 0 {
            return self.pick(input, tried, rng);
        }
        let mut exclude = tried.to_vec();
        if !avoid.omit.is_empty() {
            let writer = self.writer();
            let omitted = writer.set.usable().filter(|endpoint| endpoint.is_omitted(avoid.omit));
            exclude.extend(omitted.cloned());
        }
        let picked = self.elsewhere(avoid).and_then(|picker| {
            let tried = |endpoint: &Arc<Endpoint<L>>| exclude.iter().any(|other| Arc::ptr_eq(other, endpoint));
            picker.pick(input, tried, rng).cloned()
        });
        match picked {
            Some(endpoint) if endpoint.admits() => Pick::Endpoint(endpoint),
            _ => self.pick(input, &exclude, rng),
        }
    }

    /// The picker of the priorities that were not tried; `None`: all are as good.
    fn elsewhere(&self, avoid: &Avoid<'_, L>) -> Option<Arc<Picker<Endpoint<L>>>> {
        let every = avoid.leave_priorities as usize;
        if every == 0 || avoid.tried.len() < every {
            return None;
        }
        let view = self.view.load();
        // Only the balancer knows which endpoints a subset has.
        if view.cluster.lb.subsets.is_some() {
            return None;
        }
        let left = left_behind(&avoid.priorities_in(self), every, &self.counts());
        if !left.contains(&true) {
            return None;
        }
        let mut known = view.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, picker)) = known.iter().find(|(of, _)| *of == left) {
            return picker.clone();
        }
        let picker = self.writer().cut.picker_without(&left, &self.turn).map(Arc::new);
        known.push((left, picker.clone()));
        picker
    }
}

impl<L: Link> Avoid<'_, L> {
    /// The priorities of the attempts that went to this cluster, in order.
    pub(crate) fn priorities_in(&self, cluster: &LiveCluster<L>) -> SmallVec<[usize; 4]> {
        let own = self.tried.iter().filter(|endpoint| endpoint.is_of(cluster));
        own.map(|endpoint| endpoint.placement().priority as usize).collect()
    }
}

impl<L: Link> Endpoint<L> {
    fn is_omitted(&self, omit: &[OmitHosts]) -> bool {
        let placement = self.placement();
        let Some(fields) = placement.metadata.as_ref().and_then(|metadata| metadata.get("envoy.lb")) else {
            return false;
        };
        omit.iter().any(|omit| match omit {
            OmitHosts::Canary => fields.get("canary") == Some(&MetadataValue::Bool(true)),
            OmitHosts::Metadata(wanted) => {
                !wanted.is_empty() && wanted.iter().all(|(key, value)| fields.get(key) == Some(value))
            }
        })
    }
}
