//! A service that panics when the `tower` contract is broken, and answers from a script.

use crate::transport::BoxError;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
};
use tower_service::Service;

/// What the service answers, call by call, and what it saw.
#[derive(Clone, Default)]
pub(crate) struct Script(Arc<Inner>);

#[derive(Default)]
struct Inner {
    answers: Mutex<VecDeque<Answer>>,
    seen: Mutex<Vec<(HeaderMap, Bytes)>>,
    calls: AtomicUsize,
    /// Every `poll_ready` is answered Pending this many times first.
    pending_first: AtomicUsize,
}

enum Answer {
    Response(Response<Full<Bytes>>),
    Error(BoxError),
    /// Never answers.
    Silence,
    /// Answers without reading the body.
    Early(Response<Full<Bytes>>),
}

/// Ready is per instance and used up by a call; a clone starts unready. `call` before Ready panics.
pub(crate) struct Strict {
    script: Script,
    ready: bool,
    pending: usize,
}

impl Script {
    pub(crate) fn push(&self, response: Response<Full<Bytes>>) -> &Self {
        self.0.answers.lock().unwrap().push_back(Answer::Response(response));
        self
    }

    pub(crate) fn push_early(&self, response: Response<Full<Bytes>>) -> &Self {
        self.0.answers.lock().unwrap().push_back(Answer::Early(response));
        self
    }

    pub(crate) fn push_status(&self, status: u16) -> &Self {
        self.push(Response::builder().status(status).body(Full::default()).unwrap())
    }

    pub(crate) fn push_error(&self, error: impl Into<BoxError>) -> &Self {
        self.0.answers.lock().unwrap().push_back(Answer::Error(error.into()));
        self
    }

    pub(crate) fn push_silence(&self) -> &Self {
        self.0.answers.lock().unwrap().push_back(Answer::Silence);
        self
    }

    pub(crate) fn pending_first(&self, times: usize) {
        self.0.pending_first.store(times, SeqCst);
    }

    pub(crate) fn calls(&self) -> usize {
        self.0.calls.load(SeqCst)
    }

    /// Headers and body of the calls that were read to the end.
    pub(crate) fn seen(&self) -> Vec<(HeaderMap, Bytes)> {
        self.0.seen.lock().unwrap().clone()
    }
}

impl Strict {
    pub(crate) fn new(script: &Script) -> Self {
        Self { script: script.clone(), ready: false, pending: 0 }
    }
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        Self::new(&self.script)
    }
}

impl<B> Service<Request<B>> for Strict
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Full<Bytes>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if !self.ready && self.pending < self.script.0.pending_first.load(SeqCst) {
            self.pending += 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.ready = true;
        self.pending = 0;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "called before it was polled ready");
        self.script.0.calls.fetch_add(1, SeqCst);
        let answer = self.script.0.answers.lock().unwrap().pop_front();
        let script = self.script.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            if let Some(Answer::Early(response)) = answer {
                return Ok(response);
            }
            let body = body.collect().await.map_err(Into::into)?.to_bytes();
            script.0.seen.lock().unwrap().push((parts.headers, body));
            match answer {
                Some(Answer::Response(response) | Answer::Early(response)) => Ok(response),
                Some(Answer::Error(error)) => Err(error),
                Some(Answer::Silence) => std::future::pending().await,
                None => Ok(Response::new(Full::from("done"))),
            }
        })
    }
}
