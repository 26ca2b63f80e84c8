//! The road of a call that waits: for the first configuration, for a filter, for a connection, between two attempts.

use super::{
    Call,
    attempts::{Attempt, Resend},
    chosen::{Chosen, Routed},
    filtered,
    finish::Finished,
};
use crate::{
    Error,
    body::MeshBody,
    channel::Core,
    error::{BoxError, Kind},
    outbound::{
        retry::{Outcome, Outgoing},
        timeout::is_grpc,
    },
    telemetry::explain::Explain,
};
use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};
use tokio::time::Instant;

/// A whole call.
pub(super) async fn call<B>(
    core: Arc<Core>,
    mut head: Parts,
    body: B,
    started: Instant,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let explain = head.extensions.get::<Explain>().cloned();
    if let Some(explain) = &explain {
        explain.add("target", &*core.facts.label);
    }
    let routing = match core.routing() {
        Some(routing) => routing,
        None => core.configured(is_grpc(&head.headers), &head.headers, started).await?,
    };
    match Chosen::of(routing, &mut head, started, explain)? {
        Routed::Forward(forwarded) => chosen(forwarded, head, body).await,
        Routed::Answered(response) => Ok(response),
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
    begin(chosen.admit(&mut head)?, head, body).await
}

/// The rest of a call that was admitted.
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
    let result = {
        let mut attempts = pin!(call.attempts(&resend, ended, request));
        match &deadline {
            None => Ok(attempts.await),
            Some(deadline) => tokio::time::timeout_at(deadline.at, attempts.as_mut()).await.map_err(|_| deadline),
        }
    };
    match result.unwrap_or_else(|deadline| Err(call.timed_out(deadline))) {
        Ok(mut response) => {
            call.answered(&mut response);
            let (head, body) = response.into_parts();
            Ok(Response::from_parts(head, MeshBody::live(body, Box::new(call))))
        }
        Err(error) => {
            call.finish(if error.is_timeout() { Finished::TimedOut } else { Finished::Cut });
            Err(error)
        }
    }
}
