//! Where retries go: away from the hosts and priorities that failed, and from those they are told to omit.

use super::{Endpoint, Link, LiveCluster, Pick};
use crate::outbound::pick::{Candidate, PickInput, Standing};
use mesh_xds::resource::{LbPolicy, MetadataValue, OmitHosts};
use std::sync::Arc;

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
        let usable: Vec<_> = self.writer().set.usable().cloned().collect();
        exclude.extend(usable.iter().filter(|endpoint| endpoint.is_omitted(avoid.omit)).cloned());
        let elsewhere = if self.is_parted() { None } else { avoid.elsewhere(&usable, &exclude, rng) };
        match elsewhere {
            Some(endpoint) if endpoint.admits() => Pick::Endpoint(endpoint),
            _ => self.pick(input, &exclude, rng),
        }
    }

    /// Not every endpoint is for every request of this client: only the balancer knows which are.
    fn is_parted(&self) -> bool {
        let cluster = &self.view.load().cluster;
        cluster.lb.subsets.is_some() || matches!(cluster.lb_policy, LbPolicy::RandomSubsetting { .. })
    }
}

impl<L: Link> Avoid<'_, L> {
    /// One of the highest priority that is not to be left, at random: the cluster's policy balances only the priorities in force.
    fn elsewhere(
        &self,
        usable: &[Arc<Endpoint<L>>],
        exclude: &[Arc<Endpoint<L>>],
        rng: &mut fastrand::Rng,
    ) -> Option<Arc<Endpoint<L>>> {
        // Those since the last multiple of `leave_priorities` do not count yet.
        let rest = self.tried.len().checked_rem(self.leave_priorities as usize)?;
        let left: Vec<_> = self.tried[..self.tried.len() - rest].iter().map(|e| e.placement().priority).collect();
        if left.is_empty() {
            return None;
        }
        let good = |endpoint: &&Arc<Endpoint<L>>| {
            !left.contains(&endpoint.placement().priority)
                && endpoint.standing(false) != Standing::Unavailable
                && !exclude.iter().any(|other| Arc::ptr_eq(other, endpoint))
        };
        let good: Vec<_> = usable.iter().filter(good).collect();
        let first = good.iter().map(|endpoint| endpoint.placement().priority).min()?;
        let good: Vec<_> = good.into_iter().filter(|endpoint| endpoint.placement().priority == first).collect();
        Some(good[rng.usize(..good.len())].clone())
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
