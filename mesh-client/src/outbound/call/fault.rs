//! Injected faults.

use super::chosen::{Chosen, refused};
use crate::{
    Error,
    body::MeshBody,
    error::Kind,
    outbound::{filter::FaultAbortStatus, route::RequestHead},
    telemetry::metrics::Flag,
};
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use tokio::time::Instant;

/// gRFC A33: every filter delays or aborts by its own draw.
pub(super) async fn inject(chosen: &Chosen, head: &Parts) -> Result<Option<Response<MeshBody>>, Error> {
    let (deadline, explain) = (chosen.deadline.as_ref(), chosen.explain.as_ref());
    for fault in &chosen.choice().faults {
        let plan = {
            let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
            fault.decide(&RequestHead::new(&head.method, &head.uri, &head.headers), &mut rng)
        };
        if let Some(delay) = plan.delay {
            if let Some(explain) = explain {
                explain.add("fault", format!("delayed by {delay:?}"));
            }
            let over = deadline.filter(|d| d.remaining(Instant::now()) <= delay);
            tokio::time::sleep(over.map_or(delay, |d| d.remaining(Instant::now()))).await;
            if let Some(deadline) = over {
                let message = format!(
                    "deadline of {:?} exceeded in an injected delay of {delay:?} ({})",
                    deadline.limit, deadline.source
                );
                chosen.count(504, 4, Flag::Timeout);
                return Err(refused(&chosen.routing, Kind::Timeout, message, Some(chosen.entry()), None));
            }
        }
        if let Some(abort) = plan.abort {
            if let Some(explain) = explain {
                explain.add("fault", format!("aborted with gRPC status {} / HTTP {}", abort.grpc, abort.http));
            }
            let code = u8::try_from(abort.grpc).unwrap_or(2);
            chosen.count(if chosen.grpc { 200 } else { abort.http }, code, Flag::FaultInjected);
            return Ok(Some(abort_response(abort, chosen.grpc)));
        }
    }
    Ok(None)
}

fn abort_response(abort: FaultAbortStatus, grpc: bool) -> Response<MeshBody> {
    if !grpc {
        let mut response = Response::new(MeshBody::local(Bytes::from_static(FaultAbortStatus::MESSAGE.as_bytes())));
        *response.status_mut() = StatusCode::from_u16(abort.http).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        return response;
    }
    let mut response = Response::new(MeshBody::local(Bytes::new()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(abort.grpc));
    if abort.grpc != 0 {
        headers.insert("grpc-message", HeaderValue::from_static(FaultAbortStatus::MESSAGE));
    }
    response
}
