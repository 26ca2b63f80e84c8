//! Calls to aggregate clusters: each attempt goes to the leaf that can take it.

use super::{Call, chosen::Chosen};
use crate::{
    Error,
    error::Kind,
    outbound::{
        cluster::{AggregateRules, Avoid, LiveCluster, Pick, choose_leaf, leave_behind},
        connect::Subchannel,
        narrate,
        pick::Part,
        retry::Failure,
    },
    telemetry::access_log::ResponseFlags as Flag,
};
use smallvec::SmallVec;

impl Chosen {
    /// The cluster with endpoints that an attempt to the cluster at this position goes to: itself, or a leaf of the aggregate that it
    /// is.
    #[inline]
    pub(super) fn leaf_of(&self, upstream: usize) -> (usize, Option<Part>) {
        match self.routing.leaves(upstream) {
            [] => (upstream, None),
            _ => self.choose_leaf(upstream, &[], &[]).unwrap_or((upstream, None)),
        }
    }

    #[cold]
    fn choose_leaf(&self, upstream: usize, failed: &[usize], left: &[(usize, usize)]) -> Option<(usize, Option<Part>)> {
        let upstreams = self.routing.upstreams();
        let leaves = self.leaves(upstream).filter(|(leaf, _)| !failed.contains(leaf));
        let (panic_threshold, fail_on_panic) = upstreams[upstream].live.panic_rules();
        let rules = AggregateRules { profile: self.routing.facts.profile, panic_threshold, fail_on_panic };
        choose_leaf(leaves, rules, left, &mut fastrand::Rng::new())
    }

    fn leaves(&self, upstream: usize) -> impl Iterator<Item = (usize, &LiveCluster)> + Clone {
        let upstreams = self.routing.upstreams();
        self.routing.leaves(upstream).iter().map(|leaf| (*leaf, &*upstreams[*leaf].live))
    }
}

impl Call {
    /// Picks an endpoint for an attempt that is not the first to be made, or that could not be made at once.
    ///
    /// # Errors
    /// The breaker of the leaf that it would go to is open.
    #[inline]
    pub(super) fn pick_again(
        &mut self,
        avoid: &Avoid<'_, Subchannel>,
        rng: &mut fastrand::Rng,
    ) -> Result<Pick, (Failure, Error)> {
        if self.chosen.routing.leaves(self.upstream).is_empty() {
            return Ok(self.leaf().live.pick_again(&self.pick_input(), avoid, rng));
        }
        self.pick_among_leaves(avoid, rng)
    }

    #[cold]
    fn pick_among_leaves(
        &mut self,
        avoid: &Avoid<'_, Subchannel>,
        rng: &mut fastrand::Rng,
    ) -> Result<Pick, (Failure, Error)> {
        let mut failed: SmallVec<[usize; 4]> = SmallVec::new();
        let mut cause = None;
        let left = match avoid.leave_priorities {
            0 => SmallVec::new(),
            _ => leave_behind(self.chosen.leaves(self.upstream), avoid),
        };
        loop {
            let kept = self.session_leaf().filter(|leaf| !failed.contains(leaf)).map(|leaf| (leaf, None));
            let next = kept.or_else(|| self.chosen.choose_leaf(self.upstream, &failed, &left));
            let Some((leaf, part)) = next else {
                // What the first said: it is the one that was wanted.
                return Ok(cause.expect("an aggregate has leaves"));
            };
            self.move_to(leaf)?;
            if part.is_some() || self.steering.is_some() {
                self.steering.get_or_insert_default().part = part;
            }
            match self.leaf().live.pick_again(&self.pick_input(), avoid, rng) {
                Pick::Fail(reason) => {
                    failed.push(leaf);
                    cause.get_or_insert(Pick::Fail(reason));
                }
                picked @ Pick::Endpoint(_) => return Ok(picked),
            }
        }
    }

    /// The leaf that has the endpoint that the call's session sticks to.
    fn session_leaf(&self) -> Option<usize> {
        let address = self.steering.as_ref()?.override_host?;
        let routing = &self.chosen.routing;
        let leaves = routing.leaves(self.upstream).iter().copied();
        leaves.into_iter().find(|leaf| routing.upstreams()[*leaf].live.keeps_session(address))
    }

    /// The call counts against the breaker of this leaf from now on.
    fn move_to(&mut self, leaf: usize) -> Result<(), (Failure, Error)> {
        if leaf == self.leaf {
            return Ok(());
        }
        if self.admitted {
            let upstreams = self.chosen.routing.upstreams();
            if let Err(over) = upstreams[leaf].live.begin_request(self.priority) {
                self.flag = Flag::UPSTREAM_OVERFLOW;
                let error = self.error(Kind::Overloaded, "the circuit breaker is open".into(), Some(Box::new(over)));
                return Err((Failure::Overloaded, error));
            }
            upstreams[self.leaf].live.end_request(self.priority);
        }
        self.leaf = leaf;
        if let Some(explain) = &self.chosen.explain {
            explain.extend([narrate::leaf(self.leaf(), &self.chosen.choice().name)]);
        }
        Ok(())
    }
}
