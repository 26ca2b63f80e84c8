//! How requests are routed: what a route matches, and what it does.

use super::Object;
use crate::problem::{At, Located};
use std::{collections::BTreeMap, time::Duration};

/// The routes of one or more hosts.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The document.
    pub object: Object,
    /// Fully qualified, lower-case; may start with `*`.
    pub hosts: Vec<Located<String>>,
    /// First match wins.
    pub routes: Vec<Route>,
}

/// One route.
#[derive(Clone, Debug)]
pub struct Route {
    /// Where it was read.
    pub at: At,
    /// For explain; may be empty.
    pub name: String,
    /// Any of these; empty matches all.
    pub matches: Vec<RouteMatch>,
    /// What is done.
    pub action: Action,
    /// The answer given instead, or the time added.
    pub fault: Option<Fault>,
    /// Header edits.
    pub headers: HeaderEdits,
}

/// All parts must match.
#[derive(Clone, Debug, Default)]
pub struct RouteMatch {
    /// For explain; may be empty.
    pub name: String,
    /// The path.
    pub uri: Option<StringMatch>,
    /// The path is compared without regard to case.
    pub ignore_uri_case: bool,
    /// Header name (or pseudo-header) to what it must be; `None`: it must be there.
    pub headers: BTreeMap<String, Option<StringMatch>>,
    /// The same, inverted.
    pub without_headers: BTreeMap<String, Option<StringMatch>>,
    /// Query parameter to what it must be; `None`: it must be there.
    pub query: BTreeMap<String, Option<StringMatch>>,
    /// Only for this port of the host.
    pub port: Option<u16>,
}

/// A comparison of a whole string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// The whole matches (RE2).
    Regex(String),
}

/// What a route does.
#[derive(Clone, Debug)]
pub enum Action {
    /// Forward to one of the destinations.
    Forward(Box<Forward>),
    /// Answer with a redirect.
    Redirect(Redirect),
    /// Answer at once.
    Direct(Direct),
}

/// Forwarding.
#[derive(Clone, Debug, Default)]
pub struct Forward {
    /// At least one, drawn by weight.
    pub destinations: Vec<Destination>,
    /// Of the whole call; `None` or zero: no limit.
    pub timeout: Option<Duration>,
    /// `None`: the default policy.
    pub retries: Option<Retries>,
    /// Copies of requests, whose answers are thrown away.
    pub mirrors: Vec<Mirror>,
    /// Path and authority edits.
    pub rewrite: Option<Rewrite>,
}

/// Where to.
#[derive(Clone, Debug)]
pub struct Destination {
    /// Fully qualified host, and its place.
    pub host: Located<String>,
    /// A subset that a policy of the host defines.
    pub subset: Option<Located<String>>,
    /// `None`: the host's only port, or the port of the request.
    pub port: Option<Located<u16>>,
    /// Share of the sum of the weights.
    pub weight: u32,
    /// Header edits for this destination.
    pub headers: HeaderEdits,
}

/// Retries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retries {
    /// After the first attempt; 0: never.
    pub attempts: u32,
    /// Of each attempt.
    pub per_try_timeout: Option<Duration>,
    /// Envoy and gRPC conditions, and HTTP statuses, by comma; empty: the default.
    pub on: String,
    /// Base of the exponential backoff.
    pub backoff: Option<Duration>,
    /// Retries may go to other priorities than the first attempt.
    pub remote_localities: bool,
    /// A retry avoids the hosts tried before.
    pub ignore_previous_hosts: bool,
}

/// Fault injection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fault {
    /// Time added, and the percentage of requests (0..=100).
    pub delay: Option<(Duration, f64)>,
    /// Answer given, and the percentage of requests (0..=100).
    pub abort: Option<(Abort, f64)>,
}

/// The answer of an injected fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// An HTTP status.
    Http(u16),
    /// A gRPC status code.
    Grpc(u32),
}

/// A copy of requests.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Where to.
    pub destination: Destination,
    /// 0..=100.
    pub percentage: f64,
}

/// Path and authority edits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Replaces the matched prefix or path.
    pub uri: Option<String>,
    /// Replaces the matches of the expression (RE2) by the substitution.
    pub uri_regex: Option<(String, String)>,
    /// Replaces the authority.
    pub authority: Option<String>,
}

/// A redirect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirect {
    /// New path.
    pub uri: Option<String>,
    /// New authority.
    pub authority: Option<String>,
    /// New port.
    pub port: Option<u16>,
    /// New scheme.
    pub scheme: Option<String>,
    /// 301, 302, 303, 307 or 308.
    pub code: u16,
}

/// An answer given at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Direct {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// Header edits of requests and responses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// On the way out.
    pub request: HeaderOps,
    /// On the way back.
    pub response: HeaderOps,
}

/// Header edits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderOps {
    /// Replaced.
    pub set: BTreeMap<String, String>,
    /// Appended.
    pub add: BTreeMap<String, String>,
    /// Taken out.
    pub remove: Vec<String>,
}

impl RouteMatch {
    /// Whether every request matches.
    pub fn takes_all(&self) -> bool {
        let any_path = self.uri.as_ref().is_none_or(|uri| *uri == StringMatch::Prefix("/".to_owned()));
        any_path
            && self.headers.is_empty()
            && self.without_headers.is_empty()
            && self.query.is_empty()
            && self.port.is_none()
    }
}
