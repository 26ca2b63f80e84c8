//! The road of a call that waits: for the first configuration, for a filter, for a connection, between two attempts.

use super::{
    Answer, Call,
    attempts::{Attempt, Resend},
    chosen::{Chosen, Routed},
    filtered,
    finish::Finished,
    mirror::Copies,
    tap::Tapped,
};
use crate::{
    Error,
    body::MeshBody,
    channel::Core,
    error::{BoxError, Kind},
    outbound::{
        retry::{Outcome, Outgoing, Policy},
        timeout::{Deadline, Idle, StoodStill, is_grpc},
    },
    telemetry::{access_log::ResponseFlags as Flag, explain::Explain, watch::Watch},
};
use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};
use tokio::time::Instant;

/// What ended a call before it was answered.
enum Over {
    Deadline(Deadline),
    Idle(StoodStill),
}

/// A whole call.
pub(super) async fn call<B>(
    core: Arc<Core>,
    head: Parts,
    body: B,
    started: Instant,
    watch: Option<Arc<Watch>>,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let explain = head.extensions.get::<Explain>().cloned();
    let explain = explain.or_else(|| core.facts.settings.explain_errors.then(Explain::default));
    let result = routed(core, head, body, started, explain.clone(), watch).await;
    if let (Some(explain), Err(error)) = (&explain, &result) {
        explain.add("error", error.reason());
        error.explained_by(explain);
    }
    result
}

async fn routed<B>(
    core: Arc<Core>,
    mut head: Parts,
    body: B,
    started: Instant,
    explain: Option<Explain>,
    watch: Option<Arc<Watch>>,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    if let Some(explain) = &explain {
        explain.add("target", &*core.facts.label);
    }
    let routing = match core.routing() {
        Some(routing) => routing,
        None => {
            let routing = core.configured(is_grpc(&head.headers), &head.headers, started).await?;
            if let Some(watch) = &watch {
                watch.resolved();
            }
            routing
        }
    };
    match Chosen::of(routing, &mut head, started, explain, watch)? {
        Routed::Forward(forwarded) => chosen(forwarded, head, body).await,
        Routed::Answered(response) => Ok(response),
        Routed::Asking(asking) => filtered::asking(asking, head).await,
    }
}

/// The rest of a call whose cluster is drawn.
pub(super) async fn chosen<B>(chosen: Chosen, mut head: Parts, body: B) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    if let Some(chain) = chosen.choice().filters.clone() {
        return filtered::call(chain, chosen, head, body).await;
    }
    admitted(chosen.admit(&mut head)?, head, body).await
}

/// The rest of a call that was let in: who watches its request is found.
pub(super) async fn admitted<B>(mut call: Call, head: Parts, body: B) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let forward = call.chosen.forward();
    let per_try = forward.retry.as_deref().and_then(Policy::per_try_idle_timeout);
    call.idle = Idle::new(forward.idle, per_try, Instant::now()).map(Arc::new);
    let copies = Copies::draw(&call, &head);
    if call.idle.is_none() && copies.is_none() {
        return begin(call, head, body).await;
    }
    let body = Tapped::new(body, call.idle.clone(), copies);
    tapped(call, head, body).await
}

/// The rest of a call whose request is watched. Not generic: compiled once.
fn tapped(call: Call, head: Parts, body: Tapped) -> Answer {
    Box::pin(begin(call, head, body))
}

/// The rest of a call, from its first attempt.
pub(super) async fn begin<B>(mut call: Call, head: Parts, body: B) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let cap = call.chosen.routing.facts.settings.max_replay_bytes;
    let mut request = Some((head, body));
    let begun = poll_fn(|cx| {
        let (head, body) = request.take().expect("polled once: it is ready at once");
        Poll::Ready(Resend::begin(head, body, cap, cx))
    });
    match begun.await {
        Ok((resend, request)) => resume(call, resend, None, Some(request)).await,
        Err(error) => {
            let error = call.error(Kind::RequestBody, "the request was not sent whole".into(), Some(error));
            call.flag = Flag::LOCAL_RESET;
            call.finish(Finished::Cut);
            Err(error)
        }
    }
}

/// The rest of a call: after an attempt that `ended`, or with the first `request`.
pub(super) async fn resume<B>(
    mut call: Call,
    resend: Resend<B>,
    ended: Option<(Attempt, Outcome)>,
    request: Option<Request<Outgoing<B>>>,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let deadline = call.chosen.deadline;
    let idle = call.idle.clone();
    let result = {
        let mut attempts = pin!(call.attempts(&resend, ended, request));
        let mut standing = idle.as_deref().and_then(|idle| Some((idle.of_stream()?, idle)));
        let answered = poll_fn(|cx| match (attempts.as_mut().poll(cx), &mut standing) {
            (Poll::Ready(response), _) => Poll::Ready(Ok(response)),
            (Poll::Pending, Some((timer, idle))) => timer.poll(idle, cx).map(|still| Err(Over::Idle(still))),
            (Poll::Pending, None) => Poll::Pending,
        });
        match deadline {
            None => answered.await,
            Some(deadline) => {
                tokio::time::timeout_at(deadline.at, answered).await.unwrap_or(Err(Over::Deadline(deadline)))
            }
        }
    };
    let result = result.unwrap_or_else(|over| {
        Err(match over {
            Over::Deadline(deadline) => call.timed_out(&deadline),
            Over::Idle(still) => call.stood_still(still),
        })
    });
    match result {
        Ok(mut response) => {
            call.answered(&mut response);
            let (head, body) = response.into_parts();
            let body = MeshBody::live(body, Box::new(call));
            let body = if let Some(idle) = idle { body.ending_idle(idle) } else { body };
            Ok(Response::from_parts(head, body))
        }
        Err(error) => {
            call.finish(Finished::by(&error));
            Err(error)
        }
    }
}
