//! Rate limits of routes: what descriptors a request has (`envoy.config.route.v3.RateLimit`), and token buckets.

use crate::resource::{HeaderMatcher, QueryParameterMatcher};
use http::HeaderName;
use std::{sync::Arc, time::Duration};

/// `RateLimit`: one descriptor, made of all its actions; none where one of them has nothing to say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RateLimit {
    /// 0..=10: filters look at those of their own stage.
    pub stage: u32,
    /// In order.
    pub actions: Vec<RateLimitAction>,
    /// How many hits a request counts as; `None` is 1.
    pub hits_addend: Option<u64>,
}

/// One action: an entry of a descriptor.
#[derive(Clone, Debug, PartialEq)]
pub enum RateLimitAction {
    /// `destination_cluster` and the cluster's name.
    DestinationCluster,
    /// The value of a header of the request.
    RequestHeader {
        /// The header; `host` is the authority.
        header: HeaderField,
        /// The entry's key.
        key: Arc<str>,
        /// Without the header the entry is left out, and the descriptor still made.
        skip_if_absent: bool,
    },
    /// The value of a query parameter.
    QueryParameter {
        /// Its name.
        name: String,
        /// The entry's key.
        key: Arc<str>,
        /// As of `RequestHeader`.
        skip_if_absent: bool,
    },
    /// Always the same.
    GenericKey {
        /// The entry's key.
        key: Arc<str>,
        /// The entry's value.
        value: Arc<str>,
    },
    /// The entry is there where all these match, or where they do not.
    HeaderValueMatch {
        /// The entry's key.
        key: Arc<str>,
        /// The entry's value.
        value: Arc<str>,
        /// Whether they are to match.
        expect: bool,
        /// All of these.
        headers: Vec<HeaderMatcher>,
    },
    /// The same of query parameters.
    QueryParameterValueMatch {
        /// The entry's key.
        key: Arc<str>,
        /// The entry's value.
        value: Arc<str>,
        /// Whether they are to match.
        expect: bool,
        /// All of these.
        parameters: Vec<QueryParameterMatcher>,
    },
    /// `remote_address` and the address of the client of a server.
    RemoteAddress,
    /// `masked_remote_address` and the block that the address is in.
    MaskedRemoteAddress {
        /// Bits of an IPv4 address.
        v4: u8,
        /// Bits of an IPv6 address.
        v6: u8,
    },
    /// The SPIFFE id of the client of a server, or `none`. Not Envoy's.
    PeerPrincipal {
        /// The entry's key.
        key: Arc<str>,
    },
    /// Needs what a client does not have: never an entry, so that the descriptor is never made.
    Unknowable,
}

/// A header, or what HTTP/2 has as one.
#[derive(Clone, Debug, PartialEq)]
pub enum HeaderField {
    /// `:method`
    Method,
    /// `:path`, with the query.
    Path,
    /// `:authority`, `host`
    Authority,
    /// `:scheme`
    Scheme,
    /// Any other.
    Name(HeaderName),
}

/// Which limits of the virtual host count beside those of the route (`VhRateLimitsOptions`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VirtualHostLimits {
    /// Those of the virtual host where the route has none.
    #[default]
    Override,
    /// Both.
    Include,
    /// Only those of the route.
    Ignore,
}

/// `TokenBucket`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Greater than zero.
    pub max_tokens: u32,
    /// Greater than zero.
    pub tokens_per_fill: u32,
    /// At least 50 ms.
    pub fill_interval: Duration,
}
