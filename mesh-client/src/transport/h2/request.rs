//! The server's side of a header block: what a client asks (RFC 9113 section 8.3.1), and which streams it has opened.

use super::{
    floods::Floods,
    frame,
    hpack::{Field, Name},
    stream::{Breach, Stream},
};
use crate::transport::{ServerConfig, head::is_of_connection};
use h2::Reason;
use http::{
    HeaderMap, HeaderValue, Method, Request, Uri, Version, header, request,
    uri::{self, Authority, PathAndQuery, Scheme},
};
use std::{collections::VecDeque, sync::Arc};
use tokio::time::Instant;

/// Streams that are remembered for having been ended by us.
const CUTS: usize = 128;
/// Headers that room is made for ahead, at most.
const MAX_GUESS: usize = 64;

/// What a server knows of the streams of one connection.
pub(super) struct Requests {
    /// Those that arrived and were not handed on yet.
    pub(super) accepted: Vec<Accepted>,
    /// Bytes of their headers.
    pub(super) accepted_bytes: u32,
    /// The highest stream that the client opened.
    pub(super) last: u32,
    /// We are going away: streams above this one are not taken.
    pub(super) stop: Option<u32>,
    /// How many requests may be served at the same time.
    pub(super) limit: u32,
    /// Bytes of the headers of all that are served.
    pub(super) header_bytes: u64,
    /// Headers of one request.
    fields: u32,
    /// The window of each stream.
    pub(super) window: u32,
    pub(super) floods: Floods,
    /// What was sent when the last PING arrived: one for each of our own frames is not too many.
    pub(super) pinged_at: u32,
    /// The last streams that we ended before the client did: frames of theirs may have crossed that.
    cut: VecDeque<u32>,
    /// There were more of them.
    forgot: bool,
    recent: Recent,
}

/// A request whose head arrived.
pub(super) struct Accepted {
    pub(super) head: request::Parts,
    pub(super) stream: Arc<Stream>,
    /// It has no body.
    pub(super) ended: bool,
    /// Bytes of its headers.
    pub(super) header_bytes: u32,
}

/// What the last request said: most say it again.
#[derive(Default)]
struct Recent {
    authority: Option<Authority>,
    path: Option<PathAndQuery>,
    fields: usize,
}

/// A header block as it is read.
pub(super) struct Asked {
    method: Option<Method>,
    scheme: Option<Scheme>,
    authority: Option<HeaderValue>,
    path: Option<HeaderValue>,
    map: HeaderMap,
    /// The `cookie` fields, once there are several.
    cookies: Option<Vec<u8>>,
    pub(super) length: Option<u64>,
    pub(super) room: usize,
    fields: u32,
    pub(super) too_large: bool,
    breach: Option<&'static str>,
}

impl Requests {
    pub(super) fn new(config: &ServerConfig, now: Instant) -> Self {
        let limit = config.max_concurrent_streams;
        Self {
            accepted: Vec::new(),
            accepted_bytes: 0,
            last: 0,
            stop: None,
            limit,
            header_bytes: config.max_header_bytes.into(),
            fields: config.max_headers,
            window: config.stream_window.min(frame::MAX),
            floods: Floods::new(limit, now),
            pinged_at: 0,
            cut: VecDeque::new(),
            forgot: false,
            recent: Recent::default(),
        }
    }

    /// We ended a stream.
    pub(super) fn cut(&mut self, id: u32) {
        if self.cut.len() == CUTS {
            self.cut.pop_front();
            self.forgot = true;
        }
        self.cut.push_back(id);
    }

    /// Whether we did, as far as is remembered.
    pub(super) fn was_cut(&self, id: u32) -> bool {
        self.forgot || self.cut.contains(&id)
    }

    /// Begins a header block of at most so many bytes.
    pub(super) fn begin(&self, room: usize) -> Asked {
        Asked {
            method: None,
            scheme: None,
            authority: None,
            path: None,
            map: HeaderMap::with_capacity(self.recent.fields.min(MAX_GUESS)),
            cookies: None,
            length: None,
            room,
            fields: self.fields,
            too_large: false,
            breach: None,
        }
    }

    /// The head that was asked.
    pub(super) fn head(&mut self, mut asked: Asked, ended: bool) -> Result<request::Parts, Breach> {
        const BAD: Reason = Reason::PROTOCOL_ERROR;
        if let Some(what) = asked.breach {
            return Err((BAD, what));
        }
        if ended && asked.length.is_some_and(|length| length != 0) {
            return Err((BAD, "a content-length without content"));
        }
        asked.join_cookies().map_err(|what| (BAD, what))?;
        let method = asked.method.ok_or((BAD, "a request without a method"))?;
        let uri = self.recent.uri(&method, asked.scheme, asked.authority, asked.path, &asked.map);
        let uri = uri.map_err(|what| (BAD, what))?;
        self.recent.fields = asked.map.len();
        let mut head = Request::new(()).into_parts().0;
        head.method = method;
        head.uri = uri;
        head.version = Version::HTTP_2;
        head.headers = asked.map;
        Ok(head)
    }
}

impl Recent {
    fn uri(
        &mut self,
        method: &Method,
        scheme: Option<Scheme>,
        authority: Option<HeaderValue>,
        path: Option<HeaderValue>,
        headers: &HeaderMap,
    ) -> Result<Uri, &'static str> {
        let mut parts = uri::Parts::default();
        let host = crate::headers::find(headers, &header::HOST);
        if authority.as_ref().or(host).is_some_and(|name| name.as_bytes().contains(&b'@')) {
            return Err("an authority with a user");
        }
        if let Some(value) = authority {
            // Two names for one request: who decides by one and who serves by the other must not differ.
            if host.is_some_and(|host| *host != value) {
                return Err("an authority and another host");
            }
            parts.authority =
                Some(recall(&mut self.authority, &value, Authority::as_str, "an authority that is none")?);
        }
        if *method == Method::CONNECT {
            if scheme.is_some() || path.is_some() || parts.authority.is_none() {
                return Err("CONNECT with a scheme or path, or without an authority");
            }
            return Uri::from_parts(parts).map_err(|_| "an authority that is none");
        }
        let path = path.ok_or("a request without a path")?;
        if path.as_bytes().first() != Some(&b'/') && !(path == "*" && *method == Method::OPTIONS) {
            return Err("a path that does not begin with a slash");
        }
        parts.path_and_query = Some(recall(&mut self.path, &path, PathAndQuery::as_str, "a path that is none")?);
        let scheme = scheme.ok_or("a request without a scheme")?;
        // Without an authority a URI has no scheme.
        parts.scheme = parts.authority.is_some().then_some(scheme);
        Uri::from_parts(parts).map_err(|_| "a request that has no URI")
    }
}

/// What `value` means; what was asked for last is known. A copy: the value would hold on to all that was read with it.
fn recall<T>(
    last: &mut Option<T>,
    value: &HeaderValue,
    text: fn(&T) -> &str,
    wrong: &'static str,
) -> Result<T, &'static str>
where
    T: Clone + for<'a> TryFrom<&'a [u8]>,
{
    if let Some(known) = last
        && text(known).as_bytes() == value.as_bytes()
    {
        return Ok(known.clone());
    }
    let meaning = T::try_from(value.as_bytes()).map_err(|_| wrong)?;
    *last = Some(meaning.clone());
    Ok(meaning)
}

impl Asked {
    pub(super) fn add(&mut self, field: Field) {
        if self.breach.is_none()
            && let Err(what) = self.try_add(field)
        {
            self.breach = Some(what);
        }
    }

    fn try_add(&mut self, field: Field) -> Result<(), &'static str> {
        match self.room.checked_sub(field.size) {
            Some(room) => self.room = room,
            None => self.too_large = true,
        }
        if self.too_large {
            return Ok(());
        }
        let value = field.value.ok_or("a header value with bytes that it may not have")?;
        if let [b' ' | b'\t', ..] | [.., b' ' | b'\t'] = value.as_bytes() {
            // RFC 9113 section 8.2.1.
            return Err("a header value with space around it");
        }
        let pseudo = match field.name {
            Name::Header(name) => {
                return match self.fields.checked_sub(1) {
                    Some(fields) => {
                        self.fields = fields;
                        self.header(name, value)
                    }
                    None => {
                        self.too_large = true;
                        Ok(())
                    }
                };
            }
            Name::Method => {
                let method = Method::from_bytes(value.as_bytes()).map_err(|_| "a method that is none")?;
                self.method.replace(method).is_some()
            }
            Name::Scheme => {
                let scheme = match value.as_bytes() {
                    b"http" => Scheme::HTTP,
                    b"https" => Scheme::HTTPS,
                    other => Scheme::try_from(other).map_err(|_| "a scheme that is none")?,
                };
                self.scheme.replace(scheme).is_some()
            }
            Name::Authority => self.authority.replace(value).is_some(),
            Name::Path => self.path.replace(value).is_some(),
            Name::Status | Name::Pseudo => return Err("a pseudo header that requests do not have"),
            Name::Invalid => return Err("a header name that HTTP/2 does not allow"),
        };
        if pseudo || !self.map.is_empty() {
            return Err("a pseudo header twice, or behind headers");
        }
        Ok(())
    }

    fn header(&mut self, name: http::HeaderName, value: HeaderValue) -> Result<(), &'static str> {
        if is_of_connection(&name, &value) {
            return Err("a header of the connection");
        }
        if name == header::CONTENT_LENGTH {
            super::reader::content_length(&mut self.length, &value)?;
        } else if name == header::HOST && self.map.contains_key(&name) {
            return Err("two hosts");
        } else if name == header::COOKIE
            && let Some(first) = self.map.get(&name)
        {
            // RFC 9113 section 8.2.3.
            let cookies = self.cookies.get_or_insert_with(|| first.as_bytes().to_vec());
            cookies.extend_from_slice(b"; ");
            cookies.extend_from_slice(value.as_bytes());
            return Ok(());
        }
        self.map.try_append(name, value).map_err(|_| "more headers than are taken")?;
        Ok(())
    }

    fn join_cookies(&mut self) -> Result<(), &'static str> {
        let Some(cookies) = self.cookies.take() else { return Ok(()) };
        let cookies = HeaderValue::try_from(cookies).map_err(|_| "cookies that are none")?;
        self.map.insert(header::COOKIE, cookies);
        Ok(())
    }
}
