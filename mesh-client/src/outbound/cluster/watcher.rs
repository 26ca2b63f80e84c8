//! The task that builds a new picker after links have changed state or endpoints were ejected.

use super::{Link, LiveCluster};
use crate::{
    outbound::{
        connect::{AT_ONCE, Demand, Foresight},
        pick::{Candidate, Standing},
    },
    task::Task,
    time::after,
};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    time::Instant,
};

/// A set of more endpoints than this is rebuilt at most every [`SETTLE`].
const LARGE: usize = 256;
const SETTLE: Duration = Duration::from_millis(10);

/// Picks step over what is unavailable meanwhile, so nothing waits for this task; but an endpoint that recovers gets its
/// share again only then.
pub(super) fn watch<L: Link>(
    runtime: &Handle,
    cluster: Weak<LiveCluster<L>>,
    connector: &L::Connector,
    stale: &Arc<Notify>,
) -> Task {
    let links = L::changes(connector);
    let foresight = L::foresight(connector);
    Task::on(runtime, run(cluster, links, stale.clone(), foresight))
}

impl<L: Link> LiveCluster<L> {
    /// Makes connections for requests that are to be expected (Envoy's `maybePreconnect`): to endpoints without one first, in the order
    /// of the assignment.
    fn foresee(&self, ratio: f64) {
        let writer = self.writer();
        for _ in 0..AT_ONCE {
            let demand: Demand = writer.set.usable().map(|endpoint| endpoint.demand()).sum();
            if !demand.exceeds(ratio) {
                return;
            }
            let able = writer.set.usable().filter(|endpoint| endpoint.standing(false) != Standing::Unavailable);
            let next = able.min_by_key(|endpoint| {
                let Demand { waiting, active, room } = endpoint.demand();
                waiting + active + room
            });
            let Some(next) = next else { return };
            next.link().foresee();
        }
    }
}

async fn run<L: Link>(
    cluster: Weak<LiveCluster<L>>,
    mut links: watch::Receiver<u64>,
    stale: Arc<Notify>,
    foresight: Option<Foresight>,
) {
    let (mut size, mut again) = (0, None);
    loop {
        // Only while weights change as time goes by. A point in time: what else happens meanwhile does not put it off.
        let aged = async {
            match again {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let foreseen = async {
            match &foresight {
                Some(Foresight { ratio, due }) => {
                    due.notified().await;
                    *ratio
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ratio = foreseen => {
                let Some(cluster) = cluster.upgrade() else { return };
                cluster.foresee(ratio);
                continue;
            }
            changed = links.changed() => if changed.is_err() { return },
            () = stale.notified() => {}
            () = aged => {}
        }
        if size > LARGE {
            tokio::time::sleep(SETTLE).await;
        }
        // Before the states are read: what changes from here on is seen again.
        links.mark_unchanged();
        let Some(cluster) = cluster.upgrade() else { return };
        let period;
        (size, period) = cluster.rebuild();
        again = period.map(|period| after(Instant::now(), period));
    }
}
