//! One request on the server's side: the service's future, then the body of its answer.

use super::{
    fault::Fault,
    outbox::Tail,
    server::Conn,
    stream::{Standing, Stream},
    upload::Progress,
};
use crate::{
    headers,
    transport::{BoxError, RequestBody, overdue},
};
use bytes::Bytes;
use h2::Reason;
use http::{Request, Response, StatusCode, header::CONTENT_LENGTH, response};
use http_body::Body;
use pin_project::pin_project;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tower_service::Service;

/// A request that is served. Dropped before its end, it resets the stream.
#[pin_project]
pub(super) struct Exchange<S, B>
where
    S: Service<Request<RequestBody>>,
{
    #[pin]
    stage: Stage<S, B>,
    served: Served,
    /// The answer has no body, whatever it says: to HEAD.
    bodiless: bool,
}

#[pin_project(project = StageProjection)]
enum Stage<S, B>
where
    S: Service<Request<RequestBody>>,
{
    Waiting {
        service: S,
        request: Option<Request<RequestBody>>,
    },
    Calling(#[pin] S::Future),
    Sending {
        #[pin]
        body: B,
        /// Until it is queued.
        head: Option<response::Parts>,
        progress: Progress,
    },
    /// Its client did not go on.
    Over,
}

/// Counts as one of the requests in progress while it lives.
pub(super) struct Served {
    conn: Arc<Conn>,
    stream: Arc<Stream>,
    header_bytes: u32,
    /// The answer is complete, or nobody waits for it.
    done: bool,
}

impl<S, B> Exchange<S, B>
where
    S: Service<Request<RequestBody>>,
{
    /// The service was ready and was called.
    pub(super) fn called(served: Served, bodiless: bool, future: S::Future) -> Self {
        Self { stage: Stage::Calling(future), served, bodiless }
    }

    /// The service has to get ready.
    pub(super) fn waiting(served: Served, bodiless: bool, service: S, request: Request<RequestBody>) -> Self {
        Self { stage: Stage::Waiting { service, request: Some(request) }, served, bodiless }
    }
}

impl<S, B> Future for Exchange<S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.as_mut().advance(cx).is_ready() {
            return Poll::Ready(());
        }
        match self.served.standing(cx) {
            Standing::Open => return Poll::Pending,
            // Only while the client wants it.
            Standing::Sent => {}
            Standing::Overdue => {
                if !self.served.stream.is_answering() {
                    // Whoever decides about requests answers.
                    if overdue::tell(|| self.as_mut().advance(cx)).is_ready() {
                        return Poll::Ready(());
                    }
                    if self.served.stream.is_answering() {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
                self.served.conn.link.reset(&self.served.stream, Reason::CANCEL, Fault::Cancelled);
                overdue::tell(|| self.as_mut().project().stage.set(Stage::Over));
            }
        }
        self.project().served.done = true;
        Poll::Ready(())
    }
}

impl<S, B> Exchange<S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// Goes on as far as it can.
    fn advance(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            match this.stage.as_mut().project() {
                StageProjection::Waiting { service, request } => match service.poll_ready(cx) {
                    Poll::Pending => break Poll::Pending,
                    Poll::Ready(Err(error)) => break this.served.failed(error.into()),
                    Poll::Ready(Ok(())) => {
                        let future = service.call(request.take().expect("called once"));
                        this.stage.set(Stage::Calling(future));
                    }
                },
                StageProjection::Calling(future) => match future.poll(cx) {
                    Poll::Pending => break Poll::Pending,
                    Poll::Ready(Err(error)) => break this.served.failed(error.into()),
                    Poll::Ready(Ok(response)) => {
                        let (head, body) = response.into_parts();
                        let progress = Progress::of(Arc::clone(&this.served.stream));
                        this.stage.set(Stage::Sending { body, head: Some(head), progress });
                    }
                },
                StageProjection::Sending { mut body, head, progress } => {
                    if let Some(mut head) = head.take() {
                        let Ok(empty) = settle(&mut head, &*body, *this.bodiless) else {
                            break this.served.failed("an interim status as an answer".into());
                        };
                        if empty {
                            this.served.respond(&head, None, Tail::End);
                            break Poll::Ready(());
                        }
                        progress.look_ahead(&mut body, cx);
                        let (chunk, tail) = progress.parts();
                        if this.served.respond(&head, chunk, tail) {
                            break Poll::Ready(());
                        }
                        progress.begun();
                    }
                    break match ready_or(progress.poll(&mut body, &this.served.conn.link, cx)) {
                        None => Poll::Pending,
                        Some(result) => {
                            this.served.sent(result);
                            Poll::Ready(())
                        }
                    };
                }
                StageProjection::Over => break Poll::Ready(()),
            }
        }
    }
}

fn ready_or<T>(poll: Poll<T>) -> Option<T> {
    match poll {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

impl Served {
    pub(super) fn new(conn: &Arc<Conn>, stream: Arc<Stream>, header_bytes: u32) -> Self {
        conn.link.serves(header_bytes);
        Self { conn: Arc::clone(conn), stream, header_bytes, done: false }
    }

    fn standing(&self, cx: &Context<'_>) -> Standing {
        self.stream.lock().poll_standing(cx.waker())
    }

    /// True: the answer is complete.
    fn respond(&mut self, head: &response::Parts, chunk: Option<&mut Bytes>, tail: Tail<'_>) -> bool {
        self.done = self.conn.link.respond(&self.stream, head, chunk, tail);
        self.done
    }

    /// The body of the answer ended.
    fn sent(&mut self, result: Result<(), BoxError>) {
        self.done = true;
        match result {
            // What the client has not sent yet nobody waits for (RFC 9113 section 8.1).
            Ok(()) => self.conn.link.reset(&self.stream, Reason::NO_ERROR, Fault::Cancelled),
            Err(error) => tracing::debug!(%error, "the body of an answer failed"),
        }
    }

    fn failed(&mut self, error: BoxError) -> Poll<()> {
        tracing::debug!(%error, "the service failed");
        self.done = true;
        self.conn.link.reset(&self.stream, Reason::INTERNAL_ERROR, Fault::Cancelled);
        Poll::Ready(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if !self.done {
            // The service panicked, or its runtime ends.
            self.conn.link.reset(&self.stream, Reason::INTERNAL_ERROR, Fault::Cancelled);
        }
        self.conn.served(self.header_bytes);
    }
}

/// Completes the head of an answer. `Ok(true)`: nothing follows it.
fn settle<B: Body>(head: &mut response::Parts, body: &B, bodiless: bool) -> Result<bool, ()> {
    if head.status.is_informational() {
        return Err(());
    }
    if matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        if head.status == StatusCode::NO_CONTENT {
            head.headers.remove(CONTENT_LENGTH);
        }
        return Ok(true);
    }
    let ended = body.is_end_stream();
    if let Some(length) = body.size_hint().exact()
        && !(bodiless && length == 0)
        && headers::find(&head.headers, &CONTENT_LENGTH).is_none()
    {
        head.headers.insert(CONTENT_LENGTH, headers::decimal(length));
    }
    Ok(ended || bodiless)
}
