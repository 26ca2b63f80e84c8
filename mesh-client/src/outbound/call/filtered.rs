//! The road of a call that filters see.

use super::{
    chosen::{Asking, Chosen, refused},
    edit, general,
};
use crate::{
    Error,
    body::MeshBody,
    error::{BoxError, Kind},
    outbound::filter::{Buffered, Chain, Ended, FilterRequest, FilterResponse, Found, Outcome, Place, Reply, Watching},
    outbound::{
        route::{Clusters, RouteAction},
        timeout::parse_grpc_timeout,
    },
    telemetry::{access_log::ResponseFlags as Flag, metrics, watch::Judged},
};
use bytes::Bytes;
use http::{Method, Response, request::Parts};
use http_body::Body;
use mesh_xds::resource::SessionHost;
use std::sync::Arc;

/// A call whose cluster is drawn, through its filters and on.
pub(super) async fn call<B>(
    chain: Arc<Chain>,
    mut chosen: Chosen,
    mut head: Parts,
    body: B,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let (started, grpc) = (chosen.started, chosen.grpc);
    let mut watching = Watching::new(started);
    let mut name = chosen.choice().name.clone();
    let asked = request(&chain, &chosen, &mut head, &mut watching).await;
    if let Ok(asked) = &asked {
        chosen.flags |= asked.flags;
    }
    let answered = match asked {
        Ok(Asked { reply: Some(reply), .. }) => return Ok(answer(reply, &chosen, &head, watching)),
        Ok(Asked { buffer: None, host, .. }) => {
            name = chosen.stick(host.as_ref());
            forward(chosen, head, body, host).await
        }
        Ok(Asked { buffer: Some(limit), host, .. }) => match buffered(&chosen, &head, body, limit).await {
            Ok(Some(body)) => {
                name = chosen.stick(host.as_ref());
                forward(chosen, head, body, host).await
            }
            Ok(None) => return Ok(answer(Buffered::too_large(), &chosen, &head, watching)),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    match answered {
        Ok(response) if watching.is_empty() => Ok(response),
        Ok(response) => {
            let (mut head, body) = response.into_parts();
            watching.response(&mut FilterResponse {
                head: &mut head,
                endpoint: body.endpoint(),
                cluster: &name,
                local: false,
            });
            Ok(Response::from_parts(head, body.watched(watching)))
        }
        Err(error) => {
            watching.end(&Outcome::of_error(&error, grpc, started.elapsed()));
            Err(error)
        }
    }
}

/// A call that its route answers, unless a filter does before. What the filters change of the request counts.
pub(super) async fn asking(asking: Asking, mut head: Parts) -> Result<Response<MeshBody>, Error> {
    let Asking { routing, route, started, grpc, explain, watch } = asking;
    let table = routing.table.as_deref().expect("the route was found in it, and it never changes");
    let entry = table.entry(route);
    let RouteAction::Answer(answer) = &entry.action else { unreachable!("only a route that answers is asked") };
    let mut watching = Watching::new(started);
    let limit = if grpc { head.headers.get("grpc-timeout").and_then(parse_grpc_timeout) } else { None };
    let deadline = limit.and_then(|limit| started.checked_add(limit));
    let place = Place {
        target: &routing.facts.label,
        route: &entry.name,
        cluster: "",
        grpc,
        split: false,
        deadline,
        explain: explain.clone(),
    };
    let counted = |(status, code, flag): (u16, Option<u32>, Flag)| {
        let outcome = metrics::Outcome { status, grpc: code, flag };
        routing.facts.unserved.record(outcome, started.elapsed());
        if let Some(watch) = &watch {
            watch.judged(&Judged::early(outcome));
        }
    };
    let mut request = FilterRequest::new(&mut head, place);
    let reply = match (&answer.filters, deadline) {
        (None, _) => None,
        (Some(chain), None) => chain.request(&mut request, &mut watching).await,
        (Some(chain), Some(at)) => {
            let asked = tokio::time::timeout_at(at, chain.request(&mut request, &mut watching)).await;
            asked.map_err(|_| {
                let filter = chain.name(request.found.position);
                let limit = limit.unwrap_or_default();
                let flags = request.found.flags | Flag::UPSTREAM_REQUEST_TIMEOUT;
                counted((504, grpc.then_some(4), flags));
                let message = format!("deadline of {limit:?} exceeded in filter `{filter}` (grpc-timeout)");
                refused(&routing, Kind::Timeout, message, Some(entry), None)
            })?
        }
    };
    let flags = request.found.flags;
    let response = match reply {
        Some(reply) => {
            let (status, code, flag) = reply.outcome(grpc);
            counted((status, grpc.then_some(code), flag | flags));
            reply.respond(grpc, head.method != Method::HEAD).map(MeshBody::local)
        }
        None => {
            let (status, code) = answer.outcome(grpc);
            counted((status, code, flags));
            edit::answer(answer, entry, &head, grpc, explain.as_ref())
        }
    };
    let (mut head, body) = response.into_parts();
    watching.response(&mut FilterResponse { head: &mut head, endpoint: None, cluster: "", local: true });
    watching.ended(Ended::Answered);
    Ok(Response::from_parts(head, body))
}

/// The rest of a call that its filters let pass. Boxed: beside the filters' own futures it would make this one large.
async fn forward<B>(
    chosen: Chosen,
    mut head: Parts,
    body: B,
    host: Option<SessionHost>,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let mut call = chosen.admit(&mut head)?;
    if let Some(host) = host {
        call.stick_to(host.address);
    }
    Box::pin(general::admitted(call, head, body)).await
}

/// Runs the request through the filters, under the call's deadline.
async fn request(chain: &Chain, chosen: &Chosen, head: &mut Parts, watching: &mut Watching) -> Result<Asked, Error> {
    let deadline = chosen.deadline.as_ref();
    let place = Place {
        target: &chosen.routing.facts.label,
        route: &chosen.entry().name,
        cluster: &chosen.choice().name,
        grpc: chosen.grpc,
        split: matches!(chosen.forward().clusters, Clusters::Weighted { .. } | Clusters::Split { .. }),
        deadline: deadline.map(|deadline| deadline.at),
        explain: chosen.explain.clone(),
    };
    let mut request = FilterRequest::new(head, place);
    let Some(deadline) = deadline else {
        let reply = chain.request(&mut request, watching).await;
        return Ok(Asked::of(reply, request.found));
    };
    match tokio::time::timeout_at(deadline.at, chain.request(&mut request, watching)).await {
        Ok(reply) => Ok(Asked::of(reply, request.found)),
        Err(_) => {
            let filter = chain.name(request.found.position);
            let waits = request.found.waits.as_ref().map(|what| format!(", in {what}")).unwrap_or_default();
            let message =
                format!("deadline of {:?} exceeded in filter `{filter}`{waits} ({})", deadline.limit, deadline.source);
            chosen.count(504, 4, request.found.flags | Flag::UPSTREAM_REQUEST_TIMEOUT);
            Err(refused(&chosen.routing, Kind::Timeout, message, Some(chosen.entry()), None))
        }
    }
}

/// What the filters say of a request.
struct Asked {
    reply: Option<Reply>,
    /// Its body is read whole first, up to so many bytes.
    buffer: Option<u64>,
    /// The endpoint of the caller's session.
    host: Option<SessionHost>,
    /// What was done to it.
    flags: Flag,
}

impl Asked {
    fn of(reply: Option<Reply>, found: Found) -> Self {
        Self { reply, buffer: found.buffer, host: found.host, flags: found.flags }
    }
}

/// The body of a request, whole; `None`: it is too large.
async fn buffered<B>(chosen: &Chosen, head: &Parts, body: B, limit: u64) -> Result<Option<Buffered>, Error>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    let read = Buffered::read(body, &head.headers, limit);
    let read = match &chosen.deadline {
        None => read.await,
        Some(deadline) => match tokio::time::timeout_at(deadline.at, read).await {
            Ok(read) => read,
            Err(_) => {
                let message = format!(
                    "deadline of {:?} exceeded while the request body was buffered ({})",
                    deadline.limit, deadline.source
                );
                chosen.count(504, 4, Flag::UPSTREAM_REQUEST_TIMEOUT);
                return Err(refused(&chosen.routing, Kind::Timeout, message, Some(chosen.entry()), None));
            }
        },
    };
    read.map_err(|error| {
        chosen.count(400, 13, Flag::NONE);
        chosen.refused(Kind::RequestBody, "the request was not sent whole".into(), error)
    })
}

/// The answer of a filter, through those before it.
fn answer(reply: Reply, chosen: &Chosen, head: &Parts, mut watching: Watching) -> Response<MeshBody> {
    let (status, code, flag) = reply.outcome(chosen.grpc);
    chosen.count(status, code, flag);
    let (mut head, body) = reply.respond(chosen.grpc, head.method != Method::HEAD).into_parts();
    watching.response(&mut FilterResponse { head: &mut head, endpoint: None, cluster: "", local: true });
    watching.ended(Ended::Answered);
    Response::from_parts(head, MeshBody::local(body))
}
