//! What becomes of every call, as callers and backends see it: nothing here is what the client says of itself.

use crate::plan::Budget;
use http::{HeaderMap, HeaderName};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};
use tokio::time::Instant;

/// The number of a call, on each of its attempts.
pub(crate) const CALL: HeaderName = HeaderName::from_static("x-call");

/// What is counted of all calls of a run.
#[derive(Debug)]
pub(crate) struct Ledger {
    budget: Budget,
    /// Retries that one call may make.
    most: u32,
    pub(crate) begun: u32,
    pub(crate) active: u32,
    /// The most that were active at once.
    pub(crate) peak: u32,
    pub(crate) failed: u32,
    /// Attempts that reached a backend after another one of the same call.
    pub(crate) retries: u32,
    /// Attempts that a backend has answered well.
    well: u32,
    since: Instant,
    /// What should not have been.
    pub(crate) wrong: Vec<String>,
    /// Of each call under way, what the attempts that reached a backend say of how many went before them.
    arrived: HashMap<u32, Vec<u32>>,
    /// Calls whose last attempt that reached a backend is a retry, and has no answer yet.
    retrying: HashSet<u32>,
}

/// A call under way.
pub(crate) struct Call {
    ledger: Arc<Mutex<Ledger>>,
    pub(crate) number: u32,
}

/// An attempt that a backend has not answered yet: the number of its call, and which of those that reached a backend it is.
pub(crate) struct Attempt(Option<(Arc<Mutex<Ledger>>, u32, u32)>);

impl Ledger {
    pub(crate) fn new(budget: Budget, most: u32) -> Arc<Mutex<Self>> {
        let (arrived, retrying) = (HashMap::new(), HashSet::new());
        let counts = Self {
            budget,
            most,
            begun: 0,
            active: 0,
            peak: 0,
            failed: 0,
            retries: 0,
            well: 0,
            since: Instant::now(),
            wrong: Vec::new(),
            arrived,
            retrying,
        };
        Arc::new(Mutex::new(counts))
    }

    /// A caller calls.
    pub(crate) fn begin(this: &Arc<Mutex<Self>>) -> Call {
        let mut ledger = this.lock().unwrap();
        ledger.begun += 1;
        ledger.active += 1;
        ledger.peak = ledger.peak.max(ledger.active);
        let number = ledger.begun;
        ledger.arrived.insert(number, Vec::new());
        Call { ledger: this.clone(), number }
    }

    /// An attempt has reached a backend. `retried`: its route has a retry policy.
    pub(crate) fn arrived(this: &Arc<Mutex<Self>>, headers: &HeaderMap, retried: bool) -> Attempt {
        let Some(number) = read(headers, CALL.as_str()) else { return Attempt(None) };
        let mut ledger = this.lock().unwrap();
        // Of a call that was given up while it was on its way, nothing is known any more.
        let Some(arrived) = ledger.arrived.get_mut(&number) else { return Attempt(None) };
        let before = u32::try_from(arrived.len()).unwrap();
        let said = said(headers);
        arrived.push(said);
        // One that was held up on its way may come after those that followed it, but no two are the same one.
        let alike = arrived.iter().filter(|other| **other <= said).count();
        if alike > said as usize + 1 {
            ledger
                .wrong
                .push(format!("an attempt says that {said} went before it, and {alike} have come that say no more"));
        }
        if before > if retried { ledger.most } else { 0 } {
            ledger.wrong.push(format!("{before} retries of one call"));
        }
        if before > 0 {
            ledger.retries += 1;
            ledger.retrying.insert(number);
            ledger.check();
        }
        Attempt(Some((this.clone(), number, before + 1)))
    }

    /// A retry has come. Each call that waits for the answer to one has its leave; and what was given leave by now, in all, is at least
    /// what has come.
    fn check(&mut self) {
        let retrying = u32::try_from(self.retrying.len()).unwrap();
        if let Some(limit) = self.budget.at_once(self.peak)
            && retrying > limit
        {
            let line = format!("{retrying} retries at once, and the budget allows {limit} of {} calls", self.peak);
            self.wrong.push(line);
        }
        let elapsed = self.since.elapsed();
        if let Some(limit) = self.budget.in_all(self.begun, self.well, elapsed)
            && f64::from(self.retries) > limit
        {
            let Self { retries, begun, well, .. } = self;
            let line = format!(
                "{retries} retries within {elapsed:?}, and the budget allows {limit} of {begun} calls, {well} answered well"
            );
            self.wrong.push(line);
        }
    }
}

impl Attempt {
    /// The backend answers: well, or not.
    pub(crate) fn answered(self, well: bool) {
        if let Some((ledger, ..)) = &self.0 {
            ledger.lock().unwrap().well += u32::from(well);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut ledger = self.ledger.lock().unwrap();
        ledger.active -= 1;
        ledger.arrived.remove(&self.number);
        ledger.retrying.remove(&self.number);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let Some((ledger, number, arrival)) = &self.0 else { return };
        let mut ledger = ledger.lock().unwrap();
        // Unless another one of the same call has come meanwhile.
        if ledger.arrived.get(number).is_some_and(|arrived| arrived.len() == *arrival as usize) {
            ledger.retrying.remove(number);
        }
    }
}

fn read(headers: &HeaderMap, name: &str) -> Option<u32> {
    headers.get(name).and_then(|value| value.to_str().ok()?.parse().ok())
}

/// How many attempts went before this one, as its profile says it.
fn said(headers: &HeaderMap) -> u32 {
    let count = || read(headers, "x-envoy-attempt-count").map(|count| count.saturating_sub(1));
    read(headers, "grpc-previous-rpc-attempts").or_else(count).unwrap_or(0)
}
