//! The filters of one route, in order, and what of them watches one call.

use super::{Filter, FilterRequest, FilterResponse, Outcome, Reply, Step, Verdict, Watch, hook::Ended};
use crate::outbound::retry::grpc_status;
use http::HeaderMap;
use smallvec::SmallVec;
use std::{fmt, sync::Arc};
use tokio::time::Instant;

/// The filters of one cluster of a route. Never empty.
pub(crate) struct Chain {
    pub(super) links: Box<[Link]>,
}

/// One filter.
#[derive(Clone)]
pub(super) struct Link {
    /// Instance name.
    pub(super) name: Arc<str>,
    pub(super) filter: Arc<dyn Filter>,
}

/// What watches one call, in chain order. Told of the end once: when dropped at the latest.
pub(crate) struct Watching {
    watches: SmallVec<[Box<dyn Watch>; 2]>,
    started: Instant,
    status: u16,
    grpc_status: Option<u32>,
}

impl Chain {
    /// Runs a request through the filters, up to one that answers.
    pub(crate) async fn request(&self, request: &mut FilterRequest<'_>, watching: &mut Watching) -> Option<Reply> {
        for (position, link) in self.links.iter().enumerate() {
            (request.found.position, request.found.waits) = (position, None);
            let verdict = match link.filter.request(request) {
                Step::Now(verdict) => verdict,
                Step::Later(verdict) => verdict.await,
            };
            match verdict {
                Verdict::Pass => {}
                Verdict::Watch(watch) => watching.watches.push(watch),
                Verdict::Answer(reply) => {
                    request.explain("filter", || format!("`{}` {}", link.name, reply.describe()));
                    return Some(reply);
                }
            }
        }
        None
    }

    /// The name of the filter at this position.
    pub(crate) fn name(&self, position: usize) -> &str {
        self.links.get(position).map_or("", |link| &link.name)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, link) in self.links.iter().enumerate() {
            let text = link.filter.describe();
            let comma = if position > 0 { "; " } else { "" };
            if text.is_empty() {
                write!(f, "{comma}`{}`", link.name)?;
            } else {
                write!(f, "{comma}`{}`: {text}", link.name)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({self})")
    }
}

impl Watching {
    pub(crate) fn new(started: Instant) -> Self {
        Self { watches: SmallVec::new(), started, status: 0, grpc_status: None }
    }

    /// One more watches.
    pub(crate) fn push(&mut self, watch: Box<dyn Watch>) {
        self.watches.push(watch);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.watches.is_empty()
    }

    /// The head of the response; last filter first.
    pub(crate) fn response(&mut self, response: &mut FilterResponse<'_>) {
        for watch in self.watches.iter_mut().rev() {
            watch.response(response);
        }
        self.status = response.head.status.as_u16();
        self.grpc_status = grpc_status(&response.head.headers);
    }

    /// How much of the body goes on.
    pub(crate) fn throttle(&mut self, waiting: usize, now: Instant) -> Result<usize, Instant> {
        // One after the other: what one lets pass another may hold back, so the order must not change between two calls.
        self.watches
            .iter_mut()
            .rev()
            .try_fold(waiting, |waiting, watch| Ok(watch.throttle(waiting, now)?.clamp(waiting.min(1), waiting)))
    }

    pub(crate) fn trailers(&mut self, trailers: &mut HeaderMap) {
        for watch in self.watches.iter_mut().rev() {
            watch.trailers(trailers);
        }
        self.grpc_status = grpc_status(trailers).or(self.grpc_status);
    }

    /// The call is over, and nobody watches any more.
    pub(crate) fn end(&mut self, outcome: &Outcome) {
        for mut watch in std::mem::take(&mut self.watches).into_iter().rev() {
            watch.end(outcome);
        }
    }

    /// The same, with the status that was seen.
    pub(crate) fn ended(&mut self, ended: Ended) {
        if self.watches.is_empty() {
            return;
        }
        let took = self.started.elapsed();
        self.end(&Outcome { status: self.status, grpc_status: self.grpc_status, ended, took });
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.ended(Ended::Cancelled);
    }
}
