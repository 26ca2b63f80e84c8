//! What the calls through one retry or hedge layer share: the policy, the budget, and the count of those in flight.

use super::{DEFAULT_REPLAY_CAP, Outcome, Permit, Policy, RetryBudget};
use crate::transport::BoxError;
use http::Response;
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) policy: Arc<Policy>,
    pub(super) budget: Option<Arc<RetryBudget>>,
    pub(super) replay_cap: usize,
    /// Calls in flight.
    pub(super) active: AtomicU32,
}

impl Shared {
    /// Without a budget.
    pub(super) fn new(policy: Policy) -> Arc<Self> {
        let (policy, active) = (Arc::new(policy), AtomicU32::new(0));
        Arc::new(Self { policy, budget: None, replay_cap: DEFAULT_REPLAY_CAP, active })
    }

    /// A copy, changed, with a count of its own.
    pub(super) fn changed(&self, change: impl FnOnce(&mut Self)) -> Arc<Self> {
        let Self { policy, budget, replay_cap, .. } = self;
        let (policy, budget, active) = (policy.clone(), budget.clone(), AtomicU32::new(0));
        let mut changed = Self { policy, budget, replay_cap: *replay_cap, active };
        change(&mut changed);
        Arc::new(changed)
    }

    /// A call begins.
    pub(super) fn begin(&self) {
        self.active.fetch_add(1, Ordering::AcqRel);
        if let Some(budget) = &self.budget {
            budget.call_begins();
        }
    }

    /// A call is over.
    pub(super) fn end(&self) {
        self.active.fetch_sub(1, Ordering::AcqRel);
    }

    /// Leave for one more attempt; always given without a budget.
    pub(super) fn permit(&self) -> Option<Option<Permit>> {
        match &self.budget {
            None => Some(None),
            Some(budget) => budget.try_acquire(self.active.load(Ordering::Acquire)).map(Some),
        }
    }

    /// Reads what attempt `number` ended in, tells the budget, and asks the application's hook, whose word comes second.
    pub(super) fn judge<R>(
        &self,
        result: &Result<Response<R>, BoxError>,
        grpc: bool,
        number: u32,
    ) -> (Outcome, Option<bool>) {
        let policy = &*self.policy;
        let outcome = match result {
            Ok(response) => {
                Outcome::of_response(response.status(), response.headers(), grpc).read_by(policy, response.headers())
            }
            Err(error) => Outcome::of_error(&**error),
        };
        if let Some(budget) = &self.budget {
            budget.attempt_ended(policy.blames(&outcome));
        }
        let asked = policy.hook().and_then(|hook| {
            let head = result.as_ref().ok().map(|response| (response.status(), response.headers()));
            let error = result.as_ref().err().map(|error| &**error as &(dyn std::error::Error + 'static));
            outcome.ask(hook, number, head, error)
        });
        (outcome, asked)
    }
}
