//! What a server decides about a request, and what it sees of the answer.

use super::ConnectionInfo;
use crate::outbound::filter::Reply;
use bytes::Bytes;
use http::{request, response};
use http_body::Frame;
use std::pin::Pin;

/// What every request of a filter chain is asked, compiled.
#[derive(Debug, Default)]
pub(crate) struct Policy {}

/// When it is known what becomes of a request.
pub(crate) enum Verdict {
    /// At once.
    Now(Decision),
    /// Later: the head that it was asked with is taken (what is left behind means nothing) and comes back with the decision.
    #[expect(dead_code, reason = "until keys of tokens are fetched")]
    Later(Deciding),
}

/// A decision to come.
pub(crate) type Deciding = Pin<Box<dyn Future<Output = (request::Parts, Decision)> + Send>>;

/// What becomes of a request.
pub(crate) enum Decision {
    /// It is served.
    Pass(Exchange),
    /// It is answered here; `Exchange` sees that answer.
    #[expect(dead_code, reason = "until something is forbidden")]
    Answer(Reply, Exchange),
}

/// One request and its answer, as far as somebody watches them. Dropped when the answer's body ended, or nobody wants it any more.
#[derive(Debug, Default)]
pub(crate) struct Exchange {}

impl Policy {
    /// Decides about a request, and edits its head.
    pub(crate) fn admit(&self, _connection: &ConnectionInfo, _head: &mut request::Parts) -> Verdict {
        Verdict::Now(Decision::Pass(Exchange::none()))
    }
}

impl Exchange {
    /// Nobody watches.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// The head of the answer, before the client has it.
    pub(crate) fn response(&mut self, _head: &mut response::Parts) {}

    /// The next frame of the answer's body, before the client has it.
    pub(crate) fn frame(&mut self, _frame: &mut Frame<Bytes>) {}

    /// The answer is complete: its last frame was handed on. Not called when it fails, or is dropped before.
    pub(crate) fn complete(&mut self) {}
}
