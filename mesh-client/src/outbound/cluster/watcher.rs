//! The task that builds a new picker after links have changed state or endpoints were ejected.

use super::{Link, LiveCluster};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::AbortHandle,
};

/// Picks step over what is unavailable meanwhile, so nothing waits for this task; but an endpoint that recovers gets its
/// share again only then. Stops when this is dropped.
pub(super) struct Watcher(AbortHandle);

/// A set of more endpoints than this is rebuilt at most every [`SETTLE`].
const LARGE: usize = 256;
const SETTLE: Duration = Duration::from_millis(10);

impl Watcher {
    pub(super) fn start<L: Link>(
        runtime: &Handle,
        cluster: Weak<LiveCluster<L>>,
        connector: &L::Connector,
        stale: &Arc<Notify>,
    ) -> Self {
        let links = L::changes(connector);
        Self(runtime.spawn(run(cluster, links, stale.clone())).abort_handle())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn run<L: Link>(cluster: Weak<LiveCluster<L>>, mut links: watch::Receiver<u64>, stale: Arc<Notify>) {
    let (mut size, mut again) = (0, None);
    loop {
        // Only while weights change as time goes by.
        let aged = async {
            match again {
                Some(period) => tokio::time::sleep(period).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
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
        (size, again) = cluster.rebuild();
    }
}
