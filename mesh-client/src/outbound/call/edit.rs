//! What the route changes on the way out and back, and what it answers itself.

use super::{Call, chosen::Chosen};
use crate::{
    Error,
    body::MeshBody,
    error::Kind,
    outbound::{
        resolve::UpstreamRef,
        route::{Answer, Asked, Edits, Facts, RequestHead, RouteEntry},
    },
    telemetry::explain::Explain,
};
use http::{Response, Version, request::Parts};
use std::time::SystemTime;

/// What the edits of the response have to know of the request.
pub(super) struct Edited {
    version: Version,
    start: SystemTime,
    asked: Option<Asked>,
}

/// The answer of a route that does not forward.
pub(super) fn answer(
    answer: &Answer,
    route: &RouteEntry<UpstreamRef>,
    head: &Parts,
    grpc: bool,
    explain: Option<&Explain>,
) -> Response<MeshBody> {
    let request = RequestHead::new(&head.method, &head.uri, &head.headers);
    if let Some(explain) = explain {
        explain.add("action", answer.describe(&request));
    }
    let facts = Facts {
        request: None,
        response: None,
        version: head.version,
        endpoint: None,
        cluster: "",
        route: &route.name,
        start: SystemTime::now(),
    };
    answer.respond(&facts, &request, grpc).map(MeshBody::local)
}

/// Edits the request, once for all attempts.
///
/// # Errors
/// A rewrite comes to something that cannot be sent.
pub(super) fn request(edits: &Edits, chosen: &Chosen, head: &mut Parts) -> Result<Box<Edited>, Error> {
    let (start, version) = (SystemTime::now(), head.version);
    let facts = Facts {
        request: None,
        response: None,
        version,
        endpoint: None,
        cluster: &chosen.choice().name,
        route: &chosen.entry().name,
        start,
    };
    let before = chosen.explain.as_ref().map(|_| head.uri.clone());
    let asked = edits.request(head, &facts).map_err(|error| {
        chosen.refused(Kind::InvalidRequest, "the route's edits cannot be made".into(), Box::new(error))
    })?;
    if let (Some(explain), Some(before)) = (&chosen.explain, before) {
        if before != head.uri {
            explain.add("rewrite", format!("{before} to {}", head.uri));
        }
        explain.add("edits", edits.to_string());
    }
    Ok(Box::new(Edited { version, start, asked }))
}

impl Call {
    /// Edits the head of the response, where the route has edits.
    pub(super) fn edit_response<B>(&self, response: &mut Response<B>) {
        let (Some(edits), Some(edited)) = (&self.chosen.choice().edits, &self.edited) else { return };
        let facts = Facts {
            request: None,
            response: None,
            version: edited.version,
            endpoint: self.endpoint,
            cluster: &self.chosen.choice().name,
            route: &self.chosen.entry().name,
            start: edited.start,
        };
        let status = response.status();
        edits.response(status, response.headers_mut(), edited.asked.as_ref(), &facts);
    }
}
