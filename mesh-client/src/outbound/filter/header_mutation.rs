//! Header mutation: headers, query and trailers changed in the order they are listed (Envoy's `header_mutation` filter).

use super::{Filter, FilterRequest, FilterResponse, Step, Verdict, Watch, plain_facts};
use crate::outbound::route::{Asked, Facts, Ops, RequestHead, Text, set_path};
use http::{HeaderMap, StatusCode, Version, request::Parts};
use mesh_xds::resource::{AppendAction, HeaderMutation, HeaderMutationConfig, HeaderOps, QueryMutation, StringMatcher};
use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::SystemTime};

/// The mutations of all levels, in the order they are made.
#[derive(Debug)]
pub(crate) struct Mutation {
    request: Box<[One]>,
    query: Box<[Query]>,
    back: Arc<Back>,
}

/// What is changed on the way back.
#[derive(Debug)]
struct Back {
    response: Box<[One]>,
    trailers: Box<[One]>,
    reads_request: bool,
}

#[derive(Debug)]
enum One {
    Ops(Ops),
    RemoveMatching(StringMatcher),
}

#[derive(Debug)]
enum Query {
    Remove(String),
    Add { name: String, value: Text, action: AppendAction },
}

/// What the way back has to know of the way there.
struct Changing {
    back: Arc<Back>,
    asked: Option<Asked>,
    version: Version,
    endpoint: Option<SocketAddr>,
    status: StatusCode,
    cluster: String,
    route: String,
    start: SystemTime,
}

impl Mutation {
    /// The filter's own config first, then those of routes in this order.
    pub(super) fn compile(configs: &[&HeaderMutationConfig]) -> Self {
        let all = |side: fn(&HeaderMutationConfig) -> &[HeaderMutation]| -> Box<[One]> {
            configs.iter().flat_map(|config| side(config)).map(One::compile).collect()
        };
        let (response, trailers) = (all(|config| &config.response), all(|config| &config.response_trailers));
        let reads_request =
            response.iter().chain(&trailers).any(|one| matches!(one, One::Ops(ops) if ops.reads_request()));
        Self {
            request: all(|config| &config.request),
            query: configs.iter().flat_map(|config| &config.query).map(Query::compile).collect(),
            back: Arc::new(Back { response, trailers, reads_request }),
        }
    }

    fn change_query(&self, head: &mut Parts, facts: &Facts<'_>) {
        let Parts { method, uri, headers, .. } = head;
        let mut params: Vec<Cow<'_, str>> = match uri.query() {
            Some(query) if !query.is_empty() => query.split('&').map(|pair| Cow::Owned(pair.to_owned())).collect(),
            _ => Vec::new(),
        };
        let facts = Facts { request: Some(RequestHead::new(method, uri, headers)), ..*facts };
        for query in &self.query {
            query.apply(&mut params, &facts);
        }
        let path =
            if params.is_empty() { uri.path().to_owned() } else { format!("{}?{}", uri.path(), params.join("&")) };
        // A path that cannot be sent stays as it was: names and values are encoded, so this does not happen.
        let mut changed = uri.clone();
        if set_path(&mut changed, &path).is_ok() {
            *uri = changed;
        }
    }
}

impl One {
    fn compile(mutation: &HeaderMutation) -> Self {
        match mutation {
            HeaderMutation::Remove(name) => {
                Self::Ops(Ops::compile(&HeaderOps { remove: vec![name.clone()], ..HeaderOps::default() }))
            }
            HeaderMutation::Add(add) => {
                Self::Ops(Ops::compile(&HeaderOps { add: vec![add.clone()], ..HeaderOps::default() }))
            }
            HeaderMutation::RemoveMatching(matcher) => Self::RemoveMatching(matcher.clone()),
        }
    }

    fn apply(&self, headers: &mut HeaderMap, facts: impl Fn(&HeaderMap, &Text) -> Option<http::HeaderValue>) {
        match self {
            Self::Ops(ops) => ops.apply(headers, facts),
            Self::RemoveMatching(matcher) => {
                let gone: Vec<_> = headers.keys().filter(|name| matcher.matches(name.as_str())).cloned().collect();
                for name in gone.into_iter().filter(|name| *name != http::header::HOST) {
                    headers.remove(name);
                }
            }
        }
    }
}

impl Query {
    fn compile(mutation: &QueryMutation) -> Self {
        match mutation {
            QueryMutation::Remove(name) => Self::Remove(encoded(name.as_bytes())),
            QueryMutation::Add { name, value, action } => {
                Self::Add { name: encoded(name.as_bytes()), value: Text::compile(value), action: *action }
            }
        }
    }

    fn apply(&self, params: &mut Vec<Cow<'_, str>>, facts: &Facts<'_>) {
        let is = |pair: &str, name: &str| pair.split_once('=').map_or(pair, |(key, _)| key) == name;
        match self {
            Self::Remove(name) => params.retain(|pair| !is(pair, name)),
            Self::Add { name, value, action } => {
                let there = params.iter().any(|pair| is(pair, name));
                match action {
                    AppendAction::Append | AppendAction::Overwrite => {}
                    AppendAction::AddIfAbsent if !there => {}
                    AppendAction::OverwriteIfExists if there => {}
                    _ => return,
                }
                if matches!(action, AppendAction::Overwrite | AppendAction::OverwriteIfExists) {
                    params.retain(|pair| !is(pair, name));
                }
                let value = value.value(facts).map(|value| encoded(value.as_bytes())).unwrap_or_default();
                params.push(format!("{name}={value}").into());
            }
        }
    }
}

/// Percent-encoded but for the unreserved characters (RFC 3986 §2.3).
fn encoded(text: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for &byte in text {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

impl Filter for Mutation {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        let facts = plain_facts(request);
        let head = request.head_mut();
        {
            let Parts { method, uri, headers, .. } = &mut *head;
            for one in &self.request {
                one.apply(headers, |headers, text| {
                    text.value(&Facts { request: Some(RequestHead::new(method, uri, headers)), ..facts })
                });
            }
        }
        if !self.query.is_empty() {
            self.change_query(head, &facts);
        }
        if self.back.response.is_empty() && self.back.trailers.is_empty() {
            return Step::Now(Verdict::Pass);
        }
        let asked = self.back.reads_request.then(|| Asked::of(head));
        Step::Now(Verdict::Watch(Box::new(Changing {
            back: self.back.clone(),
            asked,
            version: facts.version,
            endpoint: None,
            status: StatusCode::OK,
            cluster: facts.cluster.to_owned(),
            route: facts.route.to_owned(),
            start: facts.start,
        })))
    }

    fn describe(&self) -> Cow<'_, str> {
        let (request, response) = (self.request.len() + self.query.len(), self.back.response.len());
        format!("header mutation: {request} on the request, {response} on the response").into()
    }
}

impl Changing {
    fn change(&self, what: &[One], headers: &mut HeaderMap) {
        let facts = Facts {
            request: self.asked.as_ref().map(Asked::head),
            response: None,
            version: self.version,
            endpoint: self.endpoint,
            cluster: &self.cluster,
            route: &self.route,
            start: self.start,
        };
        for one in what {
            one.apply(headers, |headers, text| text.value(&Facts { response: Some((self.status, headers)), ..facts }));
        }
    }
}

impl Watch for Changing {
    fn response(&mut self, response: &mut FilterResponse<'_>) {
        (self.endpoint, self.status) = (response.endpoint(), response.head().status);
        self.change(&self.back.response, &mut response.head_mut().headers);
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        self.change(&self.back.trailers, trailers);
    }
}
