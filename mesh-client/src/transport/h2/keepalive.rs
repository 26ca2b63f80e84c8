//! PINGs that notice a silent peer (gRFC A8).

use super::{Shared, outbox::Link, server::Conn};
use crate::transport::{Keepalive, Kind, io::Activity};
use std::{future::poll_fn, sync::Arc, time::Duration};
use tokio::time::{sleep, timeout};

/// The shortest [`Keepalive::interval`].
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// How the watch over a connection ended.
enum Verdict {
    /// The peer did not answer.
    Silent,
    /// The connection ended by itself, for a reason of its own.
    Gone,
}

/// Runs until the connection is closed, by the peer's silence or otherwise.
pub(super) async fn run(shared: Arc<Shared>, config: Keepalive) {
    tokio::select! {
        () = shared.closed() => {}
        verdict = watch_client(&shared, config) => match verdict {
            Verdict::Silent => shared.abort(Kind::KeepaliveTimeout),
            Verdict::Gone => {}
        }
    }
}

/// The same for a server.
pub(super) async fn of_server(conn: Arc<Conn>, config: Keepalive) {
    if let Verdict::Silent = watch(&conn.link, &conn.activity, || conn.link.serving() > 0, || 0, config).await {
        conn.abort();
    }
}

async fn watch_client(shared: &Shared, config: Keepalive) -> Verdict {
    let engine = &shared.h2().engine;
    let load = || shared.load.snapshot();
    watch(&engine.link, &engine.activity, || load().in_flight() > 0, || load().started(), config).await
}

/// `begun`: how many streams were begun on our side, wrapping.
async fn watch(
    link: &Link,
    activity: &Activity,
    busy: impl Fn() -> bool,
    begun: impl Fn() -> u32,
    config: Keepalive,
) -> Verdict {
    let step = config.interval.max(MIN_INTERVAL) / 2;
    let repeat_steps = config.repeat.as_nanos().div_ceil(step.as_nanos());
    let (mut seen, mut quiet, mut pinged) = (activity.reads(), 0, false);
    let mut known = begun();
    loop {
        sleep(step + config.jitter.mul_f64(fastrand::f64()) / 2).await;
        let reads = activity.reads();
        if reads != seen || (!config.while_idle && !busy()) {
            (seen, quiet, pinged) = (reads, 0, false);
            continue;
        }
        quiet += 1;
        // That the peer was there before says nothing of requests that were sent since.
        let now = begun();
        (known, pinged) = (now, pinged && now == known);
        if quiet < if pinged { repeat_steps.max(2) } else { 2 } {
            continue;
        }
        let Some(ping) = link.ping() else { return Verdict::Gone };
        // Anything that arrives proves life; only then is the PONG waited for on.
        loop {
            match timeout(config.timeout, poll_fn(|cx| link.poll_pong(ping, cx))).await {
                Ok(()) => break,
                Err(_) if activity.reads() != seen => seen = activity.reads(),
                Err(_) => return Verdict::Silent,
            }
        }
        (seen, quiet, pinged) = (activity.reads(), 0, true);
    }
}
