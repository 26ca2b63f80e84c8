//! What a route changes on requests and responses: headers at four levels, the path, the authority.

use super::{
    head::RequestHead,
    render::{Facts, Text, render},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, request::Parts, uri::PathAndQuery};
use mesh_xds::resource::{AppendAction, HeaderOps, HostRewrite, PathRewrite};
use std::{borrow::Cow, fmt, sync::Arc};

const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The edits of one cluster of a route. Nearly always absent.
#[derive(Debug, Default)]
pub(crate) struct Edits {
    /// Levels in the order they are made.
    pub(super) request: Box<[Arc<Ops>]>,
    /// Levels in the order they are made.
    pub(super) response: Box<[Arc<Ops>]>,
    pub(super) path: Option<(PathRewrite, Option<usize>)>,
    pub(super) host: Option<HostRewrite>,
    /// The authority becomes the name of the endpoint, once that is known.
    pub(crate) auto_host: bool,
    /// The authority before a rewrite is appended to `x-forwarded-host`.
    pub(super) forwarded_host: bool,
}

/// The header edits of one level.
#[derive(Debug)]
pub(crate) struct Ops {
    remove: Box<[HeaderName]>,
    add: Box<[Add]>,
}

#[derive(Debug)]
struct Add {
    name: HeaderName,
    value: Text,
    action: AppendAction,
    keep_empty: bool,
}

/// The head of the request as it was sent, for edits of the response that read it.
#[derive(Debug)]
pub(crate) struct Asked {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

/// A rewrite came to something that is no URI.
#[derive(Debug, thiserror::Error)]
#[error("the route rewrites the {what} to {value:?}, which cannot be sent")]
pub(crate) struct BadRewrite {
    what: &'static str,
    value: String,
}

impl Ops {
    pub(crate) fn compile(ops: &HeaderOps) -> Self {
        let add = ops.add.iter().map(|add| Add {
            name: add.name.clone(),
            value: Text::compile(&add.value),
            action: add.action,
            keep_empty: add.keep_empty,
        });
        Self { remove: ops.remove.as_slice().into(), add: add.collect() }
    }

    /// Whether a value is made of the request.
    pub(crate) fn reads_request(&self) -> bool {
        self.add.iter().any(|add| add.value.reads_request())
    }

    /// Envoy's order: removals, then overwrites, then additions; values are made of what the removals left.
    pub(crate) fn apply(&self, headers: &mut HeaderMap, facts: impl Fn(&HeaderMap, &Text) -> Option<HeaderValue>) {
        for name in &self.remove {
            headers.remove(name);
        }
        let mut made: Vec<(&Add, HeaderValue)> = Vec::with_capacity(self.add.len());
        for add in &self.add {
            let wanted = match add.action {
                AppendAction::Append | AppendAction::Overwrite => true,
                AppendAction::AddIfAbsent => !headers.contains_key(&add.name),
                AppendAction::OverwriteIfExists => headers.contains_key(&add.name),
            };
            if let Some(value) =
                facts(headers, &add.value).filter(|value| wanted && (add.keep_empty || !value.is_empty()))
            {
                made.push((add, value));
            }
        }
        let replaces = |add: &Add| matches!(add.action, AppendAction::Overwrite | AppendAction::OverwriteIfExists);
        for (add, value) in made.iter().filter(|(add, _)| replaces(add)) {
            headers.insert(add.name.clone(), value.clone());
        }
        for (add, value) in made.into_iter().filter(|(add, _)| !replaces(add)) {
            headers.append(add.name.clone(), value);
        }
    }
}

impl Edits {
    /// Nothing is changed.
    pub(super) fn is_empty(&self) -> bool {
        self.request.is_empty()
            && self.response.is_empty()
            && self.path.is_none()
            && self.host.is_none()
            && !self.auto_host
    }

    /// Makes the request's edits: headers, then authority, then path (Envoy's router). Gives what the edits of the response need.
    ///
    /// # Errors
    /// A rewrite comes to no URI.
    pub(crate) fn request(&self, head: &mut Parts, facts: &Facts<'_>) -> Result<Option<Asked>, BadRewrite> {
        let Parts { method, uri, headers, .. } = head;
        for level in &self.request {
            level.apply(headers, |headers, text| {
                text.value(&Facts { request: Some(RequestHead::new(method, uri, headers)), ..*facts })
            });
        }
        self.rewrite_host(head, facts)?;
        self.rewrite_path(head, facts)?;
        let reads = self.response.iter().any(|level| level.reads_request());
        Ok(reads.then(|| Asked::of(head)))
    }

    /// Makes the response's edits.
    pub(crate) fn response(
        &self,
        status: StatusCode,
        headers: &mut HeaderMap,
        asked: Option<&Asked>,
        facts: &Facts<'_>,
    ) {
        let request = asked.map(Asked::head);
        apply_response(&self.response, status, headers, &Facts { request, ..*facts });
    }

    fn rewrite_host(&self, head: &mut Parts, facts: &Facts<'_>) -> Result<(), BadRewrite> {
        let before = RequestHead::new(&head.method, &head.uri, &head.headers);
        let host: Cow<'_, str> = match &self.host {
            None => return Ok(()),
            Some(HostRewrite::Literal(host)) => Cow::Borrowed(host),
            Some(HostRewrite::Header(name)) => Cow::Owned(before.first(name).unwrap_or_default().to_owned()),
            Some(HostRewrite::PathRegex(rewrite)) => Cow::Owned(rewrite.apply(before.path()).into_owned()),
            Some(HostRewrite::Format(format)) => {
                let made = render(format, &Facts { request: Some(before), ..*facts });
                Cow::Owned(String::from_utf8_lossy(&made).into_owned())
            }
            Some(HostRewrite::Endpoint { .. }) => return Ok(()),
        };
        if host.is_empty() {
            return Ok(());
        }
        let Parts { uri, headers, .. } = head;
        self.set_host(uri, headers, &host).map_err(|()| BadRewrite { what: "authority", value: host.into_owned() })
    }

    /// Gives a request for an endpoint the endpoint's name (`auto_host_rewrite`). A name that is no authority is left out.
    pub(crate) fn to_endpoint(&self, uri: &mut Uri, headers: &mut HeaderMap, hostname: &str) {
        if self.auto_host && !hostname.is_empty() {
            let _ = self.set_host(uri, headers, hostname);
        }
    }

    fn set_host(&self, uri: &mut Uri, headers: &mut HeaderMap, host: &str) -> Result<(), ()> {
        let own = RequestHead::new(&Method::GET, uri, headers).authority.to_owned();
        set_authority(uri, headers, host)?;
        if self.forwarded_host
            && let Ok(value) = HeaderValue::from_str(&own)
            && headers.get_all(&FORWARDED_HOST).iter().next_back() != Some(&value)
        {
            headers.append(FORWARDED_HOST, value);
        }
        Ok(())
    }

    fn rewrite_path(&self, head: &mut Parts, facts: &Facts<'_>) -> Result<(), BadRewrite> {
        let Some((rewrite, matched)) = &self.path else { return Ok(()) };
        let before = RequestHead::new(&head.method, &head.uri, &head.headers);
        let path = rewrite_path(rewrite, *matched, &before, facts);
        let original = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let path = match head.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        if path == original {
            return Ok(());
        }
        let original = HeaderValue::from_str(original);
        set_path(&mut head.uri, &path).map_err(|()| BadRewrite { what: "path", value: path })?;
        if let Ok(original) = original {
            head.headers.insert(ORIGINAL_PATH, original);
        }
        Ok(())
    }
}

impl Asked {
    pub(crate) fn of(head: &Parts) -> Self {
        Self { method: head.method.clone(), uri: head.uri.clone(), headers: head.headers.clone() }
    }

    pub(crate) fn head(&self) -> RequestHead<'_> {
        RequestHead::new(&self.method, &self.uri, &self.headers)
    }
}

impl fmt::Display for Edits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |levels: &[Arc<Ops>]| {
            let all = levels.iter().flat_map(|level| {
                let removed = level.remove.iter().map(|name| format!("-{name}"));
                removed.chain(level.add.iter().map(|add| format!("+{}", add.name)))
            });
            all.collect::<Vec<_>>().join(" ")
        };
        write!(f, "request [{}], response [{}]", names(&self.request), names(&self.response))?;
        f.write_str(if self.auto_host { ", the endpoint's name as authority" } else { "" })
    }
}

/// Makes the edits of these levels on a response.
pub(super) fn apply_response(levels: &[Arc<Ops>], status: StatusCode, headers: &mut HeaderMap, facts: &Facts<'_>) {
    for level in levels {
        level.apply(headers, |headers, text| text.value(&Facts { response: Some((status, headers)), ..*facts }));
    }
}

/// The path after a rewrite, without the query.
fn rewrite_path(rewrite: &PathRewrite, matched: Option<usize>, head: &RequestHead<'_>, facts: &Facts<'_>) -> String {
    let path = head.path();
    match rewrite {
        PathRewrite::Prefix(by) => replace_prefix(path, matched, by),
        PathRewrite::Regex(rewrite) => rewrite.apply(path).into_owned(),
        PathRewrite::Template(template, rewrite) => template.rewrite(path, rewrite).unwrap_or_else(|| path.to_owned()),
        PathRewrite::Whole(format) => {
            let made = render(format, &Facts { request: Some(*head), ..*facts });
            if made.is_empty() { path.to_owned() } else { String::from_utf8_lossy(&made).into_owned() }
        }
    }
}

/// `path` with its first `matched` bytes, or all of it, replaced.
pub(super) fn replace_prefix(path: &str, matched: Option<usize>, by: &str) -> String {
    let rest = matched.and_then(|length| path.get(length..)).unwrap_or_default();
    format!("{by}{rest}")
}

/// The authority of the URI, and no `host` beside it.
pub(crate) fn set_authority(uri: &mut Uri, headers: &mut HeaderMap, host: &str) -> Result<(), ()> {
    let authority = host.parse().map_err(drop)?;
    let mut parts = std::mem::take(uri).into_parts();
    parts.authority = Some(authority);
    parts.scheme.get_or_insert(http::uri::Scheme::HTTP);
    parts.path_and_query.get_or_insert_with(|| PathAndQuery::from_static("/"));
    *uri = Uri::from_parts(parts).map_err(drop)?;
    headers.remove(header::HOST);
    Ok(())
}

pub(crate) fn set_path(uri: &mut Uri, path: &str) -> Result<(), ()> {
    let slash = if path.starts_with('/') { "" } else { "/" };
    let path: PathAndQuery = format!("{slash}{path}").parse().map_err(drop)?;
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(path);
    *uri = Uri::from_parts(parts).map_err(drop)?;
    Ok(())
}
