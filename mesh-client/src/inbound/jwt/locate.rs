//! Where in a request tokens are.

use crate::outbound::route::{RequestHead, cookies, set_path};
use http::{HeaderName, header, request};
use mesh_xds::resource::JwtProvider;
use std::borrow::Cow;

/// One place to look.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// A header, and what stands before the token.
    Header(HeaderName, Box<str>),
    Parameter(Box<str>),
    Cookie(Box<str>),
}

/// A token, and where it is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Found<'r> {
    pub(super) text: Cow<'r, str>,
    pub(super) at: At,
}

/// Where a token was.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum At {
    Header(HeaderName),
    Parameter(Box<str>),
    /// It stays there, as in Envoy.
    Cookie,
}

impl Place {
    /// Those of a provider.
    pub(super) fn all(config: &JwtProvider) -> Box<[Self]> {
        let JwtProvider { from_headers, from_params, from_cookies, .. } = config;
        if from_headers.is_empty() && from_params.is_empty() && from_cookies.is_empty() {
            return [Self::Header(header::AUTHORIZATION, "Bearer ".into()), Self::Parameter("access_token".into())]
                .into();
        }
        let headers = from_headers.iter().map(|from| Self::Header(from.name.clone(), from.prefix.as_str().into()));
        let params = from_params.iter().map(|name| Self::Parameter(name.as_str().into()));
        let cookies = from_cookies.iter().map(|name| Self::Cookie(name.as_str().into()));
        headers.chain(params).chain(cookies).collect()
    }

    /// Adds the tokens that are here: all of them, as nobody knows which of several the handler will look at.
    pub(super) fn find<'r>(&self, head: &RequestHead<'r>, found: &mut Vec<Found<'r>>) {
        let mut add = |text: Cow<'r, str>, at: At| {
            let one = Found { text, at };
            if !found.contains(&one) {
                found.push(one);
            }
        };
        match self {
            Self::Header(name, prefix) => {
                // What is not text is a bad token, not a missing one.
                let values = head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
                for value in values {
                    let Some(begin) = behind(&value, prefix) else { continue };
                    let text = match value {
                        Cow::Borrowed(value) => value[begin..].trim().into(),
                        Cow::Owned(value) => value[begin..].trim().to_owned().into(),
                    };
                    add(text, At::Header(name.clone()));
                }
            }
            Self::Parameter(name) => {
                let pairs = head.query().into_iter().flat_map(|query| query.split('&')).map(pair);
                for (_, value) in pairs.filter(|(key, _)| is_named(key, name)) {
                    add(decoded(value), At::Parameter(name.clone()));
                }
            }
            Self::Cookie(name) => {
                cookies(head.headers, name).for_each(|value| add(String::from_utf8_lossy(value), At::Cookie));
            }
        }
    }
}

/// Where what stands behind the prefix begins. The names of schemes are of any case (RFC 9110 section 11.1), and a tab is as good as a space:
/// handlers read them so.
fn behind(value: &str, prefix: &str) -> Option<usize> {
    let same = |(a, b): (&u8, &u8)| a.eq_ignore_ascii_case(b) || (*a == b'\t' && *b == b' ');
    let is = |at: &usize| value.as_bytes()[*at..].iter().zip(prefix.as_bytes()).all(same);
    let last = value.len().checked_sub(prefix.len())?;
    (0..=last).find(is).map(|at| at + prefix.len()).filter(|at| value.is_char_boundary(*at))
}

/// A parameter of a query: its name and its value, as they are written.
fn pair(text: &str) -> (&str, &str) {
    text.split_once('=').unwrap_or((text, ""))
}

/// Whether a handler may read this name of a parameter as `name`: it may know of escapes, and of `+` for a space, or not.
fn is_named(key: &str, name: &str) -> bool {
    key == name || decoded(key) == name || (key.contains('+') && decoded(&key.replace('+', " ")) == name)
}

/// Without percent-encoding. What is not UTF-8 then is no token, and has no name.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return text.into();
    }
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|digits| *first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let escaped = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned().into()
}

impl At {
    /// Takes the token out of a request.
    pub(super) fn take_out(&self, head: &mut request::Parts) {
        match self {
            Self::Header(name) => drop(head.headers.remove(name)),
            Self::Cookie => {}
            Self::Parameter(name) => {
                let Some(query) = head.uri.query() else { return };
                let rest: Vec<_> = query.split('&').filter(|text| !is_named(pair(text).0, name)).collect();
                let path = match rest.is_empty() {
                    true => head.uri.path().to_owned(),
                    false => format!("{}?{}", head.uri.path(), rest.join("&")),
                };
                let mut uri = head.uri.clone();
                // What was a path without the parameter is one.
                if set_path(&mut uri, &path).is_ok() {
                    head.uri = uri;
                }
            }
        }
    }
}
