//! Where in a request tokens are.

use crate::outbound::route::{RequestHead, cookie, parameter, set_path};
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

    pub(super) fn find<'r>(&self, head: &RequestHead<'r>) -> Vec<Found<'r>> {
        match self {
            Self::Header(name, prefix) => {
                // What is not text is a bad token, not a missing one.
                let values = head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
                let at = At::Header(name.clone());
                let token = |value: Cow<'r, str>| {
                    let begin = value.find(&**prefix)? + prefix.len();
                    let text = match value {
                        Cow::Borrowed(value) => value[begin..].trim().into(),
                        Cow::Owned(value) => value[begin..].trim().to_owned().into(),
                    };
                    Some(Found { text, at: at.clone() })
                };
                values.filter_map(token).collect()
            }
            Self::Parameter(name) => {
                let value = head.query().and_then(|query| parameter(query, name));
                value.map(|text| Found { text: text.into(), at: At::Parameter(name.clone()) }).into_iter().collect()
            }
            Self::Cookie(name) => {
                let value = cookie(head.headers, name).map(String::from_utf8_lossy);
                value.map(|text| Found { text, at: At::Cookie }).into_iter().collect()
            }
        }
    }
}

impl At {
    /// Takes the token out of a request.
    pub(super) fn take_out(&self, head: &mut request::Parts) {
        match self {
            Self::Header(name) => drop(head.headers.remove(name)),
            Self::Cookie => {}
            Self::Parameter(name) => {
                let Some(query) = head.uri.query() else { return };
                let keep = |pair: &&str| pair.split_once('=').map_or(*pair, |(key, _)| key) != &**name;
                let rest: Vec<_> = query.split('&').filter(keep).collect();
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
