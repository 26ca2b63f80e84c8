//! The filters of one route of a server, in order (gRFC A39): what a request is asked before it is served.

use super::{
    ConnectionInfo, Exchange,
    authz::{Asked, Authorization},
    jwt::{Authentication, Checked},
    refusals::Refusals,
};
use crate::outbound::{
    filter::{Filter, FilterRequest, Place, Reply, Step, Verdict},
    route::RequestHead,
};
use http::{StatusCode, request};
use std::{fmt, sync::Arc};

/// The filters. Mostly none, or one or two of RBAC.
#[derive(Debug, Default)]
pub(crate) struct Steps(pub(super) Box<[Link]>);

/// One filter.
pub(super) enum Link {
    Authorize(Authorization),
    Authenticate(Authentication),
    /// One that is of clients as well.
    Filter {
        name: Arc<str>,
        filter: Arc<dyn Filter>,
        waits: bool,
    },
    /// What cannot be honoured lets nobody in.
    Refuse(Arc<str>, Arc<Refusals>),
}

/// How far a request came without waiting.
pub(super) enum Ran {
    Passed,
    Answered(Reply),
    /// The link at this position has to wait.
    Waits(usize),
}

impl Steps {
    /// Runs a request through the links from `from` on, up to one that answers or has to wait.
    pub(super) fn run(
        &self,
        from: usize,
        route: &str,
        connection: &ConnectionInfo,
        head: &mut request::Parts,
        exchange: &mut Exchange,
    ) -> Ran {
        for (position, link) in self.0.iter().enumerate().skip(from) {
            let answer = match link {
                Link::Authorize(authorization) => authorize(authorization, connection, head, exchange),
                Link::Refuse(reason, refusals) => Some(refuse(reason, refusals)),
                Link::Authenticate(authentication) => match authentication.check(head) {
                    Checked::Passed(claims) => {
                        exchange.learnt(claims);
                        None
                    }
                    Checked::Refused(reply) => Some(reply),
                    Checked::Fetching => return Ran::Waits(position),
                },
                Link::Filter { waits: true, .. } => return Ran::Waits(position),
                Link::Filter { filter, .. } => {
                    let mut request = FilterRequest::new(head, place(route, exchange));
                    let verdict = match filter.request(&mut request) {
                        Step::Now(verdict) => verdict,
                        Step::Later(_) => return Ran::Waits(position),
                    };
                    let found = request.found;
                    exchange.found(&found);
                    passed(verdict, exchange)
                }
            };
            if let Some(reply) = answer {
                return Ran::Answered(reply);
            }
        }
        Ran::Passed
    }

    /// The same, with all the time it takes.
    pub(super) async fn wait(
        &self,
        mut from: usize,
        route: &str,
        connection: &ConnectionInfo,
        head: &mut request::Parts,
        exchange: &mut Exchange,
    ) -> Option<Reply> {
        loop {
            let answer = match self.0.get(from)? {
                Link::Authenticate(authentication) => match authentication.fetched(head).await {
                    Ok(claims) => {
                        exchange.learnt(claims);
                        None
                    }
                    Err(reply) => Some(reply),
                },
                Link::Filter { filter, .. } => {
                    let mut request = FilterRequest::new(head, place(route, exchange));
                    let verdict = match filter.request(&mut request) {
                        Step::Now(verdict) => verdict,
                        Step::Later(verdict) => verdict.await,
                    };
                    let found = request.found;
                    exchange.found(&found);
                    passed(verdict, exchange)
                }
                Link::Authorize(authorization) => authorize(authorization, connection, head, exchange),
                Link::Refuse(reason, refusals) => Some(refuse(reason, refusals)),
            };
            if answer.is_some() {
                return answer;
            }
            match self.run(from + 1, route, connection, head, exchange) {
                Ran::Passed => return None,
                Ran::Answered(reply) => return Some(reply),
                Ran::Waits(position) => from = position,
            }
        }
    }
}

fn place<'c>(route: &'c str, exchange: &Exchange) -> Place<'c> {
    Place { route, grpc: exchange.is_grpc(), ..Place::default() }
}

fn passed(verdict: Verdict, exchange: &mut Exchange) -> Option<Reply> {
    match verdict {
        Verdict::Pass => None,
        Verdict::Watch(watch) => {
            exchange.watch(watch);
            None
        }
        Verdict::Answer(reply) => Some(reply),
    }
}

fn authorize(
    authorization: &Authorization,
    connection: &ConnectionInfo,
    head: &request::Parts,
    exchange: &Exchange,
) -> Option<Reply> {
    let asked = Asked {
        head: RequestHead::new(&head.method, &head.uri, &head.headers),
        caller: connection.caller(),
        claims: exchange.claims(),
    };
    // Which policy said so is no business of the caller's: the access log has it.
    authorization.check(&asked).err().map(|denied| {
        Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied").grpc_status(7).details(denied.to_string())
    })
}

fn refuse(reason: &str, refusals: &Refusals) -> Reply {
    refusals.request("configuration", &reason);
    Reply::new(StatusCode::FORBIDDEN, "the server's configuration cannot be honoured").grpc_status(14)
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Authorize(authorization) => write!(f, "Authorize({authorization})"),
            Self::Authenticate(_) => f.write_str("Authenticate"),
            Self::Filter { name, .. } => write!(f, "Filter({name})"),
            Self::Refuse(reason, _) => write!(f, "Refuse({reason})"),
        }
    }
}
