//! PINGs that notice a silent peer (gRFC A8).

use super::Shared;
use crate::transport::{Keepalive, Kind};
use h2::{Ping, PingPong};
use std::{future::poll_fn, sync::Arc};
use tokio::time::{sleep, timeout};

/// Runs until the connection is closed, by the peer's silence or otherwise.
pub(super) async fn run(shared: Arc<Shared>, pings: PingPong, config: Keepalive) {
    tokio::select! {
        () = shared.closed() => {}
        () = watch(&shared, pings, config) => shared.abort(Kind::KeepaliveTimeout),
    }
}

/// Returns when the peer did not answer, or the connection is gone.
async fn watch(shared: &Shared, mut pings: PingPong, config: Keepalive) {
    let activity = &shared.h2().engine.activity;
    let step = config.interval / 2;
    let repeat_steps = config.repeat.as_nanos().div_ceil(step.as_nanos().max(1));
    let (mut seen, mut quiet, mut pinged) = (activity.reads(), 0, false);
    loop {
        sleep(step).await;
        let reads = activity.reads();
        if reads != seen || (!config.while_idle && shared.load.snapshot().in_flight() == 0) {
            (seen, quiet, pinged) = (reads, 0, false);
            continue;
        }
        quiet += 1;
        if quiet < if pinged { repeat_steps.max(2) } else { 2 } {
            continue;
        }
        if pings.send_ping(Ping::opaque()).is_err() {
            return;
        }
        // Anything that arrives proves life; only then is the PONG waited for on.
        loop {
            match timeout(config.timeout, poll_fn(|cx| pings.poll_pong(cx))).await {
                Ok(Ok(_)) => break,
                Ok(Err(_)) => return,
                Err(_) if activity.reads() != seen => seen = activity.reads(),
                Err(_) => return,
            }
        }
        (seen, quiet, pinged) = (activity.reads(), 0, true);
    }
}
