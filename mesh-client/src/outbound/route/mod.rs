//! Routing: one virtual host, compiled once per config change, asked once per request.

mod answer;
mod compile;
mod edits;
mod hash;
mod head;
mod index;
mod matcher;
mod mirror;
mod params;
mod render;
mod table;

pub(crate) use answer::{Answer, percent_encoded};
pub(crate) use compile::{ServerRoute, of_server};
pub(crate) use edits::{Asked, Edits, Ops, set_authority, set_path};
pub(crate) use hash::{Hasher, hash_of_header};
pub(crate) use head::RequestHead;
pub(crate) use matcher::{HeaderMatchers, Matcher};
pub(crate) use params::{cookie, cookies, parameter, query_matches};
pub(crate) use render::{Facts, Text, iso8601};
pub(crate) use table::{ClusterChoice, Clusters, Forward, RouteAction, RouteEntry, RouteTable, Scope, Trail};

/// Whose rules a call follows where gRPC and Envoy differ although they read the same configuration.
///
/// | | [`Grpc`](Self::Grpc) | [`Envoy`](Self::Envoy) |
/// |---|---|---|
/// | call timeout | `max_stream_duration` and the caller's deadline; `RouteAction.timeout` is ignored (gRFC A31) | `RouteAction.timeout`, 15 s when unset, 0 is none; `max_stream_duration` too. From the start of the request, where Envoy counts from its end: long uploads and streams need a `timeout` of 0 |
/// | `per_try_timeout`, `per_try_idle_timeout` | ignored (gRFC A44) | limit each attempt |
/// | `idle_timeout` of the route, `stream_idle_timeout` of the listener | ignored | a stream on which nothing moves is ended |
/// | `auto_host_rewrite` | from a control plane with `trusted_xds_server`, unless the application set the authority (gRFC A81) | always |
/// | retry conditions | the five gRPC ones; others are ignored (gRFC A44) | all |
/// | attempts | at most 5 (gRFC A6) | `num_retries` + 1 |
/// | back-off jitter | ±20 % (gRFC A6) | uniform in 0..interval (`JitteredExponentialBackOffStrategy`) |
/// | `max_retries` of the cluster | ignored (gRFC A44); `retry_budget` holds | both hold |
/// | header matching | application metadata only, `-bin` is absent, `content-type` defaults to `application/grpc` (gRFC A28) | every header |
/// | query parameters of a match | compared, where gRFC A28 would skip the route: a gRPC request has none, so it does not match either | compared |
/// | redirects, direct responses | answered, as an error of the mapped code to gRPC calls, where gRFC A28 would fail with UNAVAILABLE | the same |
/// | `cluster_not_found_response_code` | heeded, where gRPC always says UNAVAILABLE: gRPC calls get the code that the HTTP status maps to | the same |
/// | a deadline that passes after the head of the response | counts against the endpoint, as the status of the call | says nothing of it |
/// | failure percentage of outlier detection | above the threshold (gRFC A50) | at it or above |
/// | `max_ejection_percent` | one endpoint can always be ejected, unless it is 0 (gRFC A50) | never exceeded, but for `always_eject_one_host` |
/// | hash of a header with several values | of the values joined (gRFC A42) | of the sorted values, chained |
/// | retry of a hashed request | to the endpoint of the hash again, while it can be connected to | with `previous_hosts` to the next one on the ring or in the table |
/// | priorities, panic | the first that has an endpoint to pick (gRFC A56); never in panic, but ejected endpoints before none | as much as its healthy endpoints times `overprovisioning_factor` cover, then the next; `healthy_panic_threshold`, where 0 asks nobody who is ejected or unhealthy |
/// | localities | by their weights; one without gets nothing (gRFC A27) | the same, where Envoy heeds the weights only with `locality_weighted_lb_config`, and then by health |
/// | HTTP/2 connections to one endpoint | at most `per_host_thresholds.max_connections`, 1 when unset, and never above 10 (gRFC A105) | the same, where Envoy has no limit when it is unset |
/// | headers of an attempt | `grpc-previous-rpc-attempts` | `x-envoy-attempt-count`, where the virtual host says so |
/// | `retriable_headers`, `retriable_request_headers`, `rate_limited_retry_back_off`, `x-envoy-ratelimited` | ignored (gRFC A44) | honoured |
/// | retry host predicates and priorities | honoured, where gRFC A44 would ignore them | honoured |
///
/// A cluster that channels and the layer of one mesh share has the priorities, the panic threshold and the outlier detection of whoever
/// used it first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Profile {
    /// As gRPC's own xDS clients: the default of a channel.
    #[default]
    Grpc,
    /// As an Envoy sidecar: the default for plain HTTP.
    Envoy,
}

#[cfg(test)]
mod tests;
