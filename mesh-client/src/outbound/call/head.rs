//! The head of a request: completed once, kept for further attempts.

use crate::outbound::route::RequestHead;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header,
    request::Parts,
    uri::{Authority, Scheme},
};
use smallvec::SmallVec;

/// Headers kept for further attempts. Cheaper than a clone of a header map: no table of hashes, no allocation.
pub(super) type SavedHeaders = SmallVec<[(HeaderName, HeaderValue); 4]>;

/// The head of a request, kept for further attempts.
pub(super) struct SavedHead {
    method: Method,
    uri: Uri,
    headers: SavedHeaders,
}

/// Adds the headers of a request to those kept.
pub(super) fn save(headers: &HeaderMap, saved: &mut SavedHeaders) {
    saved.extend(headers.iter().map(|(name, value)| (name.clone(), value.clone())));
}

/// The head of an attempt. The headers and extensions of `head` are moved there, the rest of it stays for further attempts.
pub(super) fn take(head: &mut Parts) -> Parts {
    let mut attempt = Request::new(());
    *attempt.method_mut() = head.method.clone();
    *attempt.uri_mut() = head.uri.clone();
    *attempt.headers_mut() = std::mem::take(&mut head.headers);
    *attempt.extensions_mut() = std::mem::take(&mut head.extensions);
    attempt.into_parts().0
}

impl SavedHead {
    pub(super) fn of(head: &Parts) -> Self {
        let mut headers = SavedHeaders::new();
        save(&head.headers, &mut headers);
        Self { method: head.method.clone(), uri: head.uri.clone(), headers }
    }

    /// Of a head whose `headers` were saved apart.
    pub(super) fn new(head: Parts, headers: SavedHeaders) -> Self {
        Self { method: head.method, uri: head.uri, headers }
    }

    /// The head as matchers of requests see it.
    pub(super) fn matches(&self, matches: impl FnOnce(&RequestHead<'_>) -> bool) -> bool {
        let headers = self.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        matches(&RequestHead::new(&self.method, &self.uri, &headers))
    }

    pub(super) fn restore<B>(&self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        for (name, value) in &self.headers {
            request.headers_mut().append(name, value.clone());
        }
        request
    }
}

/// Gives the URI the scheme and the authority that it lacks: the application's own authority wins, then a host header, then the target.
///
/// # Errors
/// The parts do not make a URI.
pub(super) fn complete_uri(head: &mut Parts, authority: Option<&Authority>) -> Result<(), http::uri::InvalidUriParts> {
    if head.uri.authority().is_some() && head.uri.scheme().is_some() {
        return Ok(());
    }
    let mut uri = std::mem::take(&mut head.uri).into_parts();
    if uri.authority.is_none() {
        uri.authority =
            head.headers.get(header::HOST).and_then(|h| h.to_str().ok()?.parse().ok()).or_else(|| authority.cloned());
    }
    if uri.authority.is_some() {
        uri.scheme.get_or_insert(Scheme::HTTP);
        uri.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    }
    head.uri = Uri::from_parts(uri)?;
    Ok(())
}
