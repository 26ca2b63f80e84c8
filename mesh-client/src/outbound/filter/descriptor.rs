//! The descriptors that a request has by the rate limits of its route (`envoy.config.route.v3.RateLimit`).

use super::FilterRequest;
use crate::inbound::ConnectionInfo;
use crate::outbound::route::{HeaderMatchers, Profile, RequestHead, parameter, query_matches};
use mesh_xds::{
    resource::{CidrRange, HeaderField, QueryParameterMatcher, RateLimit, RateLimitAction, VirtualHostLimits},
    rls::Descriptor,
};
use std::sync::Arc;

/// What the route, its virtual host and its filters say of limits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits<'a> {
    pub(crate) route: &'a [RateLimit],
    pub(crate) virtual_host: &'a [RateLimit],
    /// `include_vh_rate_limits`
    pub(crate) include: bool,
}

/// The limits in force, compiled.
#[derive(Debug)]
pub(super) struct Descriptors(Box<[Limit]>);

#[derive(Debug)]
struct Limit {
    actions: Box<[Action]>,
    hits: Option<u64>,
}

#[derive(Debug)]
enum Action {
    Plain(RateLimitAction),
    Headers { key: Arc<str>, value: Arc<str>, expect: bool, headers: HeaderMatchers },
    Parameters { key: Arc<str>, value: Arc<str>, expect: bool, parameters: Box<[QueryParameterMatcher]> },
}

impl Descriptors {
    /// Those of this stage: a filter's own, or those of the route, of its virtual host, or both (Envoy).
    pub(super) fn compile(
        own: &[RateLimit],
        limits: Limits<'_>,
        option: VirtualHostLimits,
        stage: u32,
        profile: Profile,
    ) -> Self {
        let (route, host): (&[RateLimit], &[RateLimit]) = match option {
            _ if !own.is_empty() => (own, &[]),
            _ if limits.include => (limits.route, limits.virtual_host),
            VirtualHostLimits::Include => (limits.route, limits.virtual_host),
            VirtualHostLimits::Override if limits.route.is_empty() => (&[], limits.virtual_host),
            VirtualHostLimits::Override | VirtualHostLimits::Ignore => (limits.route, &[]),
        };
        // Stages are of limits that several filters share.
        let counts = |limit: &&RateLimit| !own.is_empty() || limit.stage == stage;
        let compile = |limit: &RateLimit| {
            let actions = limit.actions.iter().map(|action| Action::compile(action, profile)).collect();
            Limit { actions, hits: limit.hits_addend }
        };
        Self(route.iter().chain(host).filter(counts).map(compile).collect())
    }

    pub(super) fn none() -> Self {
        Self(Box::default())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of a request; a limit of which one action has nothing to say makes none.
    pub(super) fn of(&self, request: &FilterRequest<'_>) -> Vec<Descriptor> {
        let head = request.head();
        let connection = head.extensions.get::<ConnectionInfo>();
        let head = RequestHead::new(&head.method, &head.uri, &head.headers);
        let descriptor = |limit: &Limit| {
            let mut entries = Vec::with_capacity(limit.actions.len());
            for action in &limit.actions {
                entries.extend(action.entry(&head, request.cluster(), connection)?);
            }
            (!entries.is_empty()).then_some(Descriptor { entries, hits: limit.hits })
        };
        self.0.iter().filter_map(descriptor).collect()
    }
}

impl Action {
    fn compile(action: &RateLimitAction, profile: Profile) -> Self {
        match action {
            RateLimitAction::HeaderValueMatch { key, value, expect, headers } => Self::Headers {
                key: key.clone(),
                value: value.clone(),
                expect: *expect,
                headers: HeaderMatchers::compile(headers, profile),
            },
            RateLimitAction::QueryParameterValueMatch { key, value, expect, parameters } => Self::Parameters {
                key: key.clone(),
                value: value.clone(),
                expect: *expect,
                parameters: parameters.as_slice().into(),
            },
            action => Self::Plain(action.clone()),
        }
    }

    /// Outer `None`: no descriptor; inner: no entry.
    #[allow(clippy::option_option, reason = "the two are different: see above")]
    fn entry(
        &self,
        head: &RequestHead<'_>,
        cluster: &str,
        connection: Option<&ConnectionInfo>,
    ) -> Option<Option<(Arc<str>, Arc<str>)>> {
        let asked = |value: Option<&str>, key: &Arc<str>, skip: bool| match value.filter(|value| !value.is_empty()) {
            Some(value) => Some(Some((key.clone(), value.into()))),
            None => skip.then_some(None),
        };
        let entry = |key: &Arc<str>, value: &Arc<str>| Some(Some((key.clone(), value.clone())));
        match self {
            Self::Headers { key, value, expect, headers } if headers.matches(head) == *expect => entry(key, value),
            Self::Parameters { key, value, expect, parameters }
                if parameters.iter().all(|parameter| query_matches(parameter, head.query())) == *expect =>
            {
                entry(key, value)
            }
            Self::Headers { .. } | Self::Parameters { .. } => None,
            Self::Plain(action) => match action {
                RateLimitAction::DestinationCluster => Some(Some(("destination_cluster".into(), cluster.into()))),
                RateLimitAction::GenericKey { key, value } => entry(key, value),
                RateLimitAction::RequestHeader { header, key, skip_if_absent } => {
                    let value = match header {
                        HeaderField::Method => Some(head.method.as_str()),
                        HeaderField::Path => head.uri.path_and_query().map(|path| path.as_str()),
                        HeaderField::Authority => Some(head.authority),
                        HeaderField::Scheme => Some(head.scheme()),
                        HeaderField::Name(name) => head.first(name),
                    };
                    asked(value, key, *skip_if_absent)
                }
                RateLimitAction::QueryParameter { name, key, skip_if_absent } => {
                    asked(head.query().and_then(|query| parameter(query, name)), key, *skip_if_absent)
                }
                RateLimitAction::RemoteAddress => {
                    let ip = connection?.remote_addr().ip().to_canonical();
                    Some(Some(("remote_address".into(), ip.to_string().into())))
                }
                RateLimitAction::MaskedRemoteAddress { v4, v6 } => {
                    let ip = connection?.remote_addr().ip().to_canonical();
                    let block = CidrRange::new(ip, u32::from(if ip.is_ipv4() { *v4 } else { *v6 })).ok()?;
                    Some(Some(("masked_remote_address".into(), block.to_string().into())))
                }
                RateLimitAction::PeerPrincipal { key } => {
                    let id = connection?.peer().and_then(|peer| peer.spiffe_id());
                    Some(Some((key.clone(), id.map_or("none", |id| id.as_str()).into())))
                }
                _ => None,
            },
        }
    }
}
