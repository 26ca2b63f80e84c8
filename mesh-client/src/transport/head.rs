//! The request head as each protocol wants it: pseudo headers, `host`, hop-by-hop headers, `content-length`.

use super::{Kind, Origin, TransportError};
use crate::headers;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    request::Parts,
    uri::{self, Authority, PathAndQuery, Scheme},
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// The head for HTTP/2: absolute URI, no `host`, no hop-by-hop headers (RFC 9113 section 8.2.2), `content-length` if known.
pub(super) fn http2(mut parts: Parts, length: Option<u64>, origin: &Origin) -> Result<Request<()>, TransportError> {
    if parts.headers.iter().any(|(name, value)| name == HOST || is_of_connection(name, value)) {
        strip_hop_by_hop(&mut parts.headers);
        if let Some(host) = parts.headers.remove(HOST)
            && parts.uri.authority().is_none()
        {
            let authority = Authority::from_maybe_shared(host).map_err(invalid)?;
            set_uri(&mut parts.uri, origin, Some(authority))?;
        }
    }
    let scheme = if origin.tls { &Scheme::HTTPS } else { &Scheme::HTTP };
    if (parts.uri.authority().is_none() || parts.uri.scheme() != Some(scheme)) && parts.method != Method::CONNECT {
        set_uri(&mut parts.uri, origin, None)?;
    }
    set_content_length(&mut parts, length);
    parts.version = Version::HTTP_2;
    Ok(Request::from_parts(parts, ()))
}

/// The head for HTTP/1.1: origin-form URI, `host`, no hop-by-hop headers (RFC 9110 section 7.6.1).
pub(super) fn http1(parts: &mut Parts, origin: &Origin) -> Result<(), TransportError> {
    if parts.headers.keys().any(is_hop_by_hop) {
        strip_hop_by_hop(&mut parts.headers);
        parts.headers.remove(TE);
    }
    if !parts.headers.contains_key(HOST) {
        let authority = parts.uri.authority().unwrap_or(&origin.authority);
        parts.headers.insert(HOST, HeaderValue::try_from(without_user(authority)).map_err(invalid)?);
    }
    if parts.uri.authority().is_some() && parts.method != Method::CONNECT {
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        parts.uri = Uri::from(path);
    }
    parts.version = Version::HTTP_11;
    Ok(())
}

/// As hyper does: only where the length is known, and a zero only where the method expects a body.
fn set_content_length(parts: &mut Parts, length: Option<u64>) {
    let Some(length) = length else { return };
    let expects_body = !matches!(parts.method, Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
    if (length != 0 || expects_body) && headers::find(&parts.headers, &CONTENT_LENGTH).is_none() {
        parts.headers.insert(CONTENT_LENGTH, headers::decimal(length));
    }
}

fn set_uri(uri: &mut Uri, origin: &Origin, authority: Option<Authority>) -> Result<(), TransportError> {
    let mut parts = std::mem::take(uri).into_parts();
    parts.scheme = Some(if origin.tls { Scheme::HTTPS } else { Scheme::HTTP });
    parts.authority = authority.or(parts.authority).or_else(|| Some(origin.authority.clone()));
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
    }
    *uri = Uri::from_parts(parts).map_err(|error: uri::InvalidUriParts| invalid(error))?;
    Ok(())
}

/// Host and port: user information never goes on the wire (RFC 9113 section 8.3.1).
pub(super) fn without_user(authority: &Authority) -> &str {
    authority.as_str().rsplit_once('@').map_or(authority.as_str(), |(_, host)| host)
}

/// A header that HTTP/2 does not have (RFC 9113 section 8.2.2). `te: trailers`, which every gRPC request has, it does.
pub(super) fn is_of_connection(name: &HeaderName, value: &HeaderValue) -> bool {
    is_hop_by_hop(name) && !(name == TE && value == "trailers")
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    name == CONNECTION
        || name == TE
        || name == TRANSFER_ENCODING
        || name == UPGRADE
        || name == KEEP_ALIVE
        || name == PROXY_CONNECTION
}

#[cold]
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::try_from(name.trim()).ok())
        .collect();
    for name in listed {
        // `te: trailers` is not hop-by-hop in HTTP/2, and gRPC lives by it.
        if name != TE {
            headers.remove(name);
        }
    }
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE, KEEP_ALIVE, PROXY_CONNECTION] {
        headers.remove(name);
    }
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
}

fn invalid(error: impl Into<super::BoxError>) -> TransportError {
    TransportError::new(Kind::InvalidRequest).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(tls: bool) -> Origin {
        Origin { authority: Authority::from_static("10.0.0.1:80"), tls, peer: None }
    }

    fn parts(request: http::request::Builder) -> Parts {
        request.body(()).expect("request").into_parts().0
    }

    #[test]
    fn host_becomes_the_authority() {
        let head = http2(parts(Request::get("/a?b=c").header("host", "x.test:1")), None, &origin(false)).expect("head");
        assert_eq!(head.uri(), "http://x.test:1/a?b=c");
        assert!(!head.headers().contains_key(HOST));
    }

    #[test]
    fn the_authority_of_the_uri_wins_and_the_scheme_is_the_connections() {
        let request = Request::get("http://y.test/a").header("host", "x.test");
        let head = http2(parts(request), None, &origin(true)).expect("head");
        assert_eq!(head.uri(), "https://y.test/a");
        assert!(!head.headers().contains_key(HOST));
    }

    #[test]
    fn without_any_authority_the_endpoint_is_named() {
        let head = http2(parts(Request::get("/a")), None, &origin(false)).expect("head");
        assert_eq!(head.uri(), "http://10.0.0.1:80/a");
    }

    #[test]
    fn hop_by_hop_headers_go_and_te_trailers_stays() {
        let request = Request::get("http://x.test/")
            .header("connection", "keep-alive, x-mine, te")
            .header("keep-alive", "1")
            .header("proxy-connection", "close")
            .header("transfer-encoding", "chunked")
            .header("upgrade", "h2c")
            .header("te", "trailers")
            .header("x-mine", "1")
            .header("x-other", "1");
        let head = http2(parts(request), None, &origin(false)).expect("head");
        let mut names: Vec<_> = head.headers().keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["te", "x-other"]);

        let head =
            http2(parts(Request::get("http://x.test/").header("te", "gzip")), None, &origin(false)).expect("head");
        assert!(head.headers().is_empty());
    }

    #[test]
    fn content_length_is_set_where_hyper_sets_it() {
        let length = |request, length| {
            let head = http2(parts(request), length, &origin(false)).expect("head");
            head.headers().get(CONTENT_LENGTH).map(|value| value.to_str().expect("ascii").to_owned())
        };
        assert_eq!(length(Request::post("http://x/"), Some(3)).as_deref(), Some("3"));
        assert_eq!(length(Request::post("http://x/"), Some(0)).as_deref(), Some("0"));
        assert_eq!(length(Request::get("http://x/"), Some(0)), None);
        assert_eq!(length(Request::post("http://x/"), None), None);
        assert_eq!(length(Request::post("http://x/").header("content-length", "9"), Some(3)).as_deref(), Some("9"));
    }

    #[test]
    fn http1_gets_origin_form_and_host() {
        let mut head =
            parts(Request::get("http://u:p@x.test:8080/a?b").header("te", "trailers").header("upgrade", "h2c"));
        http1(&mut head, &origin(false)).expect("head");
        assert_eq!(head.uri, "/a?b");
        assert_eq!(head.headers[HOST], "x.test:8080");
        assert_eq!(head.headers.len(), 1);
    }

    #[test]
    fn http1_keeps_the_callers_host() {
        let mut head = parts(Request::get("http://x.test/").header("host", "virtual.test"));
        http1(&mut head, &origin(false)).expect("head");
        assert_eq!(
            (head.uri.to_string().as_str(), &head.headers[HOST]),
            ("/", &HeaderValue::from_static("virtual.test"))
        );
    }
}
