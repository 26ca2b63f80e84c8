//! What of a request the matchers look at.

use super::Profile;
use http::{Extensions, HeaderMap, HeaderName, Method, Uri, header, request::Parts};
use smallvec::SmallVec;

/// The head of a request, borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestHead<'a> {
    /// `:method`
    pub(crate) method: &'a Method,
    /// The path and query come from here.
    pub(crate) uri: &'a Uri,
    /// `:authority`: the URI's, the `host` header's or the target's, as the caller decides.
    pub(crate) authority: &'a str,
    /// All headers.
    pub(crate) headers: &'a HeaderMap,
    /// What is known of it beside; read only by what asks for it.
    pub(crate) extensions: Option<&'a Extensions>,
}

/// A header's value as the matchers see it. Multiple values are joined with `,` (gRFC A28, as in Envoy).
pub(super) enum Value<'a> {
    Absent,
    One(&'a [u8]),
    Joined(SmallVec<[u8; 128]>),
}

/// The name in a header matcher, resolved when the table is compiled.
#[derive(Clone, Debug)]
pub(super) enum Name {
    Method,
    Path,
    Authority,
    Scheme,
    Header(HeaderName),
    /// `content-type` of a gRPC call is there even when the map has none.
    GrpcContentType,
    /// Not something this profile shows to matchers, or not a legal name at all.
    Never,
}

impl<'a> RequestHead<'a> {
    /// A head whose authority is that of the URI, else the `host` header, else empty.
    pub(crate) fn new(method: &'a Method, uri: &'a Uri, headers: &'a HeaderMap) -> Self {
        let authority = match uri.authority() {
            Some(a) => a.as_str(),
            None => headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default(),
        };
        Self { method, uri, authority, headers, extensions: None }
    }

    /// With what is known of it beside.
    pub(crate) fn of(head: &'a Parts) -> Self {
        Self { extensions: Some(&head.extensions), ..Self::new(&head.method, &head.uri, &head.headers) }
    }

    /// The path without the query.
    pub(crate) fn path(&self) -> &'a str {
        self.uri.path()
    }

    /// The query without its `?`.
    pub(crate) fn query(&self) -> Option<&'a str> {
        self.uri.query()
    }

    /// `:scheme`
    pub(crate) fn scheme(&self) -> &'a str {
        self.uri.scheme_str().unwrap_or("http")
    }

    /// The first value of a header; that of `host` is the authority.
    pub(crate) fn first(&self, name: &HeaderName) -> Option<&'a str> {
        if name == header::HOST {
            return Some(self.authority);
        }
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub(super) fn value(&self, name: &Name) -> Value<'a> {
        match name {
            Name::Method => Value::One(self.method.as_str().as_bytes()),
            Name::Path => Value::One(self.uri.path_and_query().map_or("/", |p| p.as_str()).as_bytes()),
            Name::Authority => Value::One(self.authority.as_bytes()),
            Name::Scheme => Value::One(self.scheme().as_bytes()),
            Name::Header(name) => self.header(name),
            Name::GrpcContentType => match self.header(&header::CONTENT_TYPE) {
                Value::Absent => Value::One(b"application/grpc"),
                value => value,
            },
            Name::Never => Value::Absent,
        }
    }

    /// Each value of a header by itself; none of what is no header.
    pub(super) fn values(&self, name: &Name) -> impl Iterator<Item = &'a [u8]> {
        let name = if let Name::Header(name) = name { Some(name) } else { None };
        let headers = self.headers;
        name.into_iter().flat_map(move |name| headers.get_all(name)).map(http::HeaderValue::as_bytes)
    }

    fn header(&self, name: &HeaderName) -> Value<'a> {
        let mut values = self.headers.get_all(name).iter();
        let Some(first) = values.next() else { return Value::Absent };
        let Some(second) = values.next() else { return Value::One(first.as_bytes()) };
        let mut joined = SmallVec::from_slice(first.as_bytes());
        for value in std::iter::once(second).chain(values) {
            joined.push(b',');
            joined.extend_from_slice(value.as_bytes());
        }
        Value::Joined(joined)
    }
}

impl Name {
    /// gRPC shows matchers the application's metadata and `content-type`: transport headers (`te`, `grpc-*`) and binary
    /// metadata are absent (gRFC A28, A41). Envoy shows everything.
    pub(super) fn compile(name: &str, profile: Profile) -> Self {
        match name {
            ":method" => return Self::Method,
            ":path" => return Self::Path,
            ":authority" | "host" => return Self::Authority,
            ":scheme" => return Self::Scheme,
            _ => {}
        }
        if profile == Profile::Grpc {
            if name == "content-type" {
                return Self::GrpcContentType;
            }
            if name == "te" || name.starts_with("grpc-") || name.ends_with("-bin") {
                return Self::Never;
            }
        }
        HeaderName::from_bytes(name.as_bytes()).map_or(Self::Never, Self::Header)
    }
}

impl Value<'_> {
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Absent => None,
            Self::One(value) => Some(value),
            Self::Joined(value) => Some(value),
        }
    }
}
