//! Copies of requests (Envoy's `request_mirror_policies`): sent once the request's body is complete, without waiting for anything, and
//! their responses are thrown away.
//!
//! A copy shares the bytes of the body. What is held for copies is bounded: [`Settings::max_replay_bytes`](super::Settings) for each
//! request, [`MAX_HELD`] for each mirrored cluster, and as many copies are in flight as its circuit breaker lets in. What is
//! over a bound is not mirrored; the request itself never notices.

use super::{
    Call, general,
    head::SavedHead,
    tap::{Copied, Frames},
};
use crate::{
    outbound::{
        resolve::UpstreamRef,
        route::{RequestHead, set_authority},
        timeout::{Deadline, Source},
        upstream::Upstream,
    },
    telemetry::trace,
};
use http::{HeaderMap, request::Parts};
use http_body_util::BodyExt;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::time::Instant;

/// Bytes held for the copies to one cluster.
const MAX_HELD: usize = 16 << 20;

/// What a copy may take where the request has no deadline.
const LIMIT: Duration = Duration::from_secs(15);

/// The copies of one request that were drawn. Dropped, they are not sent.
pub(super) struct Copies {
    head: Parts,
    copies: Vec<Copy>,
    body: Frames,
    cap: usize,
}

struct Copy {
    call: Call,
    /// The authority, where it is another.
    authority: Option<String>,
    sampled: Option<bool>,
    held: Held,
}

/// A share of the bytes held for a cluster.
struct Held {
    upstream: Arc<Upstream>,
    bytes: usize,
}

impl Copies {
    /// Draws who gets a copy of the request of `call`, whose edited head this is.
    pub(super) fn draw(call: &Call, head: &Parts) -> Option<Self> {
        let chosen = &call.chosen;
        let request = RequestHead::of(head);
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        let mut copies = Vec::new();
        for mirror in &chosen.forward().mirrors {
            let Some((name, cluster)) = mirror.draw(&request, &mut rng) else { continue };
            let authority = mirror.authority(request.authority);
            let said = match cluster {
                UpstreamRef::Live(upstream) => {
                    let call = chosen.copy(*upstream);
                    let held = Held { upstream: call.upstream().clone(), bytes: 0 };
                    let said =
                        format!("a copy goes to `{name}`, as {}", authority.as_deref().unwrap_or(request.authority));
                    copies.push(Copy { call, authority, sampled: mirror.sampled, held });
                    said
                }
                UpstreamRef::Failed(cause) => format!("no copy goes to `{name}`: {cause}"),
            };
            if let Some(explain) = &chosen.explain {
                explain.add("mirror", said);
            }
        }
        let cap = chosen.routing.facts.settings.max_replay_bytes;
        let head = || SavedHead::of(head).restore(()).into_parts().0;
        (!copies.is_empty()).then(|| Self { head: head(), copies, body: Frames::default(), cap })
    }

    /// Takes one more piece of the body. False: it is too much, there will be no copy.
    pub(super) fn data(&mut self, data: &bytes::Bytes) -> bool {
        if data.is_empty() {
            return true;
        }
        if self.body.is_full() || self.body.len() + data.len() > self.cap {
            return false;
        }
        self.copies.retain_mut(|copy| copy.held.grow(data.len()));
        self.body.push(data.clone());
        !self.copies.is_empty()
    }

    /// The body is complete: the copies are sent.
    pub(super) fn send(self, trailers: Option<HeaderMap>) {
        let Self { head, copies, body, .. } = self;
        for copy in copies {
            let head = SavedHead::of(&head).restore(()).into_parts().0;
            tokio::spawn(copy.send(head, Copied::new(body.clone(), trailers.clone())));
        }
    }
}

impl Copy {
    async fn send(self, mut head: Parts, body: Copied) {
        let Self { mut call, authority, sampled, held } = self;
        if let Some(authority) = authority {
            // The request's own was an authority; with a suffix it still is.
            let _ = set_authority(&mut head.uri, &mut head.headers, &authority);
        }
        if let Some(sampled) = sampled {
            trace::resample(&mut head.headers, sampled);
        }
        if !call.enter_copy() {
            return;
        }
        // Nobody asks how it ends; the numbers of its cluster say.
        if let Ok(response) = general::begin(call, head, body).await {
            let mut body = response.into_body();
            while let Some(Ok(_)) = body.frame().await {}
        }
        drop(held);
    }
}

impl Held {
    fn grow(&mut self, bytes: usize) -> bool {
        let grown = |held: usize| held.checked_add(bytes).filter(|held| *held <= MAX_HELD);
        let grew = self.upstream.mirrored.fetch_update(Relaxed, Relaxed, grown).is_ok();
        if grew {
            self.bytes += bytes;
        }
        grew
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.upstream.mirrored.fetch_sub(self.bytes, Relaxed);
    }
}

impl Call {
    /// Lets a copy into its cluster. False: its breaker is open, or its overload policy drops it.
    fn enter_copy(&mut self) -> bool {
        let live = &self.leaf().live;
        let dropped = live.drop_overload(&mut fastrand::Rng::new()).is_some();
        let enters = !dropped && live.begin_request(self.priority).is_ok();
        self.admitted = enters;
        // What did not enter is not counted.
        self.recorded = !enters;
        let now = Instant::now();
        self.chosen.started = now;
        // The request's limits, from now.
        let (limit, source) = match &self.chosen.deadline {
            Some(deadline) => (deadline.limit, deadline.source),
            None => (LIMIT, Source::Mirror),
        };
        self.chosen.deadline = now.checked_add(limit).map(|at| Deadline { at, limit, source });
        enters
    }
}
