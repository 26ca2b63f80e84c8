//! The head of a request: completed once, kept for further attempts.

use http::{
    HeaderName, HeaderValue, Method, Request, Uri, header,
    request::Parts,
    uri::{Authority, Scheme},
};
use smallvec::SmallVec;

/// The head of a request, kept for further attempts. Cheaper than a clone of a header map: no table of hashes, no allocation.
pub(super) struct SavedHead {
    method: Method,
    uri: Uri,
    headers: SmallVec<[(HeaderName, HeaderValue); 4]>,
}

impl SavedHead {
    pub(super) fn of(head: &Parts) -> Self {
        let headers = head.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        Self { method: head.method.clone(), uri: head.uri.clone(), headers }
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
