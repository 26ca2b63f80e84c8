//! RDS: one virtual host per target, with a route per match.

use super::{Target, cluster, cluster_name, duration, listener, uint32};
use crate::model::{
    Abort, Action, Destination, Direct, Fault, Forward, HashKey, HeaderEdits, HeaderOps, Mirror, Model, Redirect,
    Retries, Rewrite, Route, RouteMatch, StringMatch,
};
use crate::problem::At;
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    DataSource, HeaderValue, HeaderValueOption, RuntimeFractionalPercent, data_source::Specifier,
                    header_value_option::HeaderAppendAction,
                },
                route::v3::{
                    self as pb, DirectResponseAction, HeaderMatcher, QueryParameterMatcher, RedirectAction,
                    RetryPolicy, RouteAction, RouteConfiguration, VirtualHost, WeightedCluster,
                    header_matcher::HeaderMatchSpecifier,
                    query_parameter_matcher::QueryParameterMatchSpecifier,
                    redirect_action::{self, RedirectResponseCode},
                    retry_policy::{
                        RetryBackOff, RetryHostPredicate, RetryPriority, retry_host_predicate, retry_priority,
                    },
                    route_action::{
                        ClusterSpecifier, HashPolicy, HostRewriteSpecifier, MaxStreamDuration, RequestMirrorPolicy,
                        hash_policy::{Cookie, Header, PolicySpecifier, QueryParameter},
                    },
                    route_match::PathSpecifier,
                    weighted_cluster::{ClusterWeight, cluster_weight},
                },
            },
            extensions::{
                filters::{
                    common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier},
                    http::fault::v3::{FaultAbort, HttpFault, fault_abort},
                },
                retry::{
                    host::previous_hosts::v3::PreviousHostsPredicate,
                    priority::previous_priorities::v3::PreviousPrioritiesConfig,
                },
            },
            r#type::{
                matcher::v3::{RegexMatchAndSubstitute, RegexMatcher, StringMatcher, string_matcher::MatchPattern},
                v3::{FractionalPercent, fractional_percent::DenominatorType},
            },
        },
        google::protobuf::{Any, BoolValue},
    },
    util::pack_any,
};
use std::{collections::BTreeMap, time::Duration};

/// Istio's default for every route.
const DEFAULT_RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
const DEFAULT_RETRIES: u32 = 2;
const HOST_SELECTION_ATTEMPTS: i64 = 5;
const STATUS_CODES: &str = "retriable-status-codes";

/// The routes, and where each was read.
pub(super) fn configuration<'a>(target: &Target<'a>, model: &Model) -> (RouteConfiguration, Vec<&'a At>) {
    let port = target.port.number.value;
    let domains = listener::hosts(target.host).into_iter().flat_map(|host| [format!("{host}:{port}"), host]);
    let mut domains: Vec<_> = domains.collect();
    // The full name first, for the reader.
    domains.sort_by_key(|d| !d.starts_with(target.host));
    let (routes, places) = match target.routing {
        Some(routing) => routes(target, &routing.routes, model).into_iter().unzip(),
        None => (vec![default_route(target)], vec![target.service.object.at()]),
    };
    let host = VirtualHost {
        name: format!("{}:{port}", target.host),
        domains,
        routes,
        include_request_attempt_count: true,
        ..VirtualHost::default()
    };
    let configuration = RouteConfiguration {
        name: cluster_name(port, "", target.host),
        virtual_hosts: vec![host],
        validate_clusters: Some(BoolValue { value: false }),
        ..RouteConfiguration::default()
    };
    (configuration, places)
}

fn default_route(target: &Target<'_>) -> pb::Route {
    let action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(target.cluster_name(None))),
        retry_policy: Some(retry_policy(None)),
        hash_policy: hash_policy(cluster::hash_key(target.policy, target.port.number.value, None))
            .into_iter()
            .collect(),
        ..limits(None)
    };
    pb::Route {
        name: "default".to_owned(),
        r#match: Some(pb::RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..pb::RouteMatch::default()
        }),
        action: Some(pb::route::Action::Route(action)),
        ..pb::Route::default()
    }
}

fn routes<'a>(target: &Target<'_>, routes: &'a [Route], model: &Model) -> Vec<(pb::Route, &'a At)> {
    let any = [RouteMatch::default()];
    let mut translated = Vec::new();
    for route in routes {
        let matches = if route.matches.is_empty() { &any[..] } else { &route.matches };
        for found in matches.iter().filter(|m| m.port.is_none_or(|port| port == target.port.number.value)) {
            translated.push((one_route(target, route, found, model), &route.at));
        }
    }
    translated
}

fn one_route(target: &Target<'_>, route: &Route, found: &RouteMatch, model: &Model) -> pb::Route {
    let name = match (route.name.as_str(), found.name.as_str()) {
        (name, "") => name.to_owned(),
        ("", name) => name.to_owned(),
        (route, found) => format!("{route}.{found}"),
    };
    let action = match &route.action {
        Action::Forward(forward) => {
            let mut action = forward_action(target, forward, model);
            if let Some(authority) = authority(&route.headers) {
                action.host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral(authority));
            }
            pb::route::Action::Route(action)
        }
        Action::Redirect(redirect) => pb::route::Action::Redirect(redirect_action(redirect)),
        Action::Direct(direct) => pb::route::Action::DirectResponse(direct_response(direct)),
    };
    let fault = route.fault.as_ref().map(|fault| (listener::FAULT.to_owned(), fault_config(fault)));
    // One destination needs no weight: its edits are the route's.
    let own = match &route.action {
        Action::Forward(forward) if forward.destinations.len() == 1 => Some(&forward.destinations[0].headers),
        _ => None,
    };
    let edits: Vec<_> = std::iter::once(&route.headers).chain(own).collect();
    pb::Route {
        name,
        r#match: Some(route_match(found)),
        action: Some(action),
        typed_per_filter_config: fault.into_iter().collect(),
        request_headers_to_add: edits.iter().flat_map(|e| to_add(&e.request)).collect(),
        request_headers_to_remove: edits.iter().flat_map(|e| e.request.remove.clone()).collect(),
        response_headers_to_add: edits.iter().flat_map(|e| to_add(&e.response)).collect(),
        response_headers_to_remove: edits.iter().flat_map(|e| e.response.remove.clone()).collect(),
        ..pb::Route::default()
    }
}

fn route_match(found: &RouteMatch) -> pb::RouteMatch {
    let path = match &found.uri {
        None => PathSpecifier::Prefix("/".to_owned()),
        Some(StringMatch::Exact(path)) => PathSpecifier::Path(path.clone()),
        Some(StringMatch::Prefix(prefix)) => PathSpecifier::Prefix(prefix.clone()),
        Some(StringMatch::Regex(regex)) => PathSpecifier::SafeRegex(regex_matcher(regex)),
    };
    let with = found.headers.iter().map(|(name, matcher)| header_matcher(name, matcher.as_ref()));
    let without = found.without_headers.iter().map(|(name, matcher)| HeaderMatcher {
        invert_match: true,
        treat_missing_header_as_empty: matcher.is_some(),
        ..header_matcher(name, matcher.as_ref())
    });
    let query = found.query.iter().map(|(name, matcher)| QueryParameterMatcher {
        name: name.clone(),
        query_parameter_match_specifier: Some(match matcher {
            Some(matcher) => QueryParameterMatchSpecifier::StringMatch(string_matcher(matcher)),
            None => QueryParameterMatchSpecifier::PresentMatch(true),
        }),
    });
    pb::RouteMatch {
        path_specifier: Some(path),
        case_sensitive: found.ignore_uri_case.then_some(BoolValue { value: false }),
        headers: with.chain(without).collect(),
        query_parameters: query.collect(),
        ..pb::RouteMatch::default()
    }
}

fn header_matcher(name: &str, matcher: Option<&StringMatch>) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(match matcher {
            Some(matcher) => HeaderMatchSpecifier::StringMatch(string_matcher(matcher)),
            None => HeaderMatchSpecifier::PresentMatch(true),
        }),
        ..HeaderMatcher::default()
    }
}

fn string_matcher(matcher: &StringMatch) -> StringMatcher {
    let pattern = match matcher {
        StringMatch::Exact(text) => MatchPattern::Exact(text.clone()),
        StringMatch::Prefix(text) => MatchPattern::Prefix(text.clone()),
        StringMatch::Regex(text) => MatchPattern::SafeRegex(regex_matcher(text)),
    };
    StringMatcher { match_pattern: Some(pattern), ignore_case: false }
}

fn regex_matcher(regex: &str) -> RegexMatcher {
    RegexMatcher { regex: regex.to_owned(), ..RegexMatcher::default() }
}

/// Istio: no timeout unless said; gRPC clients read the second form of it.
fn limits(timeout: Option<Duration>) -> RouteAction {
    let timeout = Some(duration(timeout.unwrap_or_default()));
    RouteAction {
        timeout,
        max_stream_duration: Some(MaxStreamDuration { max_stream_duration: timeout, ..MaxStreamDuration::default() }),
        ..RouteAction::default()
    }
}

fn forward_action(target: &Target<'_>, forward: &Forward, model: &Model) -> RouteAction {
    let cluster = match forward.destinations.as_slice() {
        [only] => ClusterSpecifier::Cluster(destination_cluster(target, only, model)),
        several => ClusterSpecifier::WeightedClusters(weighted_clusters(target, several, model)),
    };
    let rewrite = forward.rewrite.clone().unwrap_or_default();
    let retries = forward.retries.as_ref();
    RouteAction {
        cluster_specifier: Some(cluster),
        retry_policy: retries.is_none_or(|r| r.attempts > 0).then(|| retry_policy(retries)),
        hash_policy: forward.destinations.iter().filter_map(|d| destination_hash(target, d, model)).collect(),
        request_mirror_policies: forward.mirrors.iter().map(|m| mirror_policy(target, m, model)).collect(),
        host_rewrite_specifier: host_rewrite(forward, &rewrite),
        regex_rewrite: rewrite.uri_regex.map(|(regex, substitution)| RegexMatchAndSubstitute {
            pattern: Some(regex_matcher(&regex)),
            substitution,
        }),
        prefix_rewrite: rewrite.uri.unwrap_or_default(),
        ..limits(forward.timeout)
    }
}

fn host_rewrite(forward: &Forward, rewrite: &Rewrite) -> Option<HostRewriteSpecifier> {
    let by_destination = match forward.destinations.as_slice() {
        [only] => authority(&only.headers),
        _ => None,
    };
    rewrite.authority.clone().or(by_destination).map(HostRewriteSpecifier::HostRewriteLiteral)
}

fn weighted_clusters(target: &Target<'_>, destinations: &[Destination], model: &Model) -> WeightedCluster {
    let part = |destination: &Destination| ClusterWeight {
        name: destination_cluster(target, destination, model),
        weight: Some(uint32(destination.weight)),
        request_headers_to_add: to_add(&destination.headers.request),
        request_headers_to_remove: destination.headers.request.remove.clone(),
        response_headers_to_add: to_add(&destination.headers.response),
        response_headers_to_remove: destination.headers.response.remove.clone(),
        host_rewrite_specifier: authority(&destination.headers)
            .map(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral),
        ..ClusterWeight::default()
    };
    // Istio leaves out what gets nothing.
    let clusters = destinations.iter().filter(|d| d.weight > 0).map(part).collect();
    WeightedCluster { clusters, ..WeightedCluster::default() }
}

fn destination_hash(target: &Target<'_>, destination: &Destination, model: &Model) -> Option<HashPolicy> {
    let subset = destination.subset.as_ref().map(|subset| subset.value.as_str());
    let policy = model.policy(&destination.host.value);
    hash_policy(cluster::hash_key(policy, destination_port(target, destination, model), subset))
}

fn hash_policy(key: Option<HashKey>) -> Option<HashPolicy> {
    let specifier = match key? {
        HashKey::Header(name) => PolicySpecifier::Header(Header { header_name: name, regex_rewrite: None }),
        HashKey::QueryParameter(name) => PolicySpecifier::QueryParameter(QueryParameter { name }),
        HashKey::Cookie { name, path, ttl } => {
            PolicySpecifier::Cookie(Cookie { name, path, ttl: ttl.map(duration), ..Cookie::default() })
        }
    };
    Some(HashPolicy { terminal: false, policy_specifier: Some(specifier) })
}

fn destination_cluster(target: &Target<'_>, destination: &Destination, model: &Model) -> String {
    let port = destination_port(target, destination, model);
    cluster_name(port, destination.subset.as_ref().map_or("", |s| &s.value), &destination.host.value)
}

/// Istio: the port said, else the host's only one, else the port of the request.
fn destination_port(target: &Target<'_>, destination: &Destination, model: &Model) -> u16 {
    let host = &destination.host.value;
    let only = model.service(host).and_then(|s| match s.ports.as_slice() {
        [only] => Some(only.number.value),
        _ => None,
    });
    let said = destination.port.as_ref().map(|p| p.value);
    said.or(only).unwrap_or(target.port.number.value)
}

fn mirror_policy(target: &Target<'_>, mirror: &Mirror, model: &Model) -> RequestMirrorPolicy {
    RequestMirrorPolicy {
        cluster: destination_cluster(target, &mirror.destination, model),
        runtime_fraction: Some(RuntimeFractionalPercent {
            default_value: Some(fraction(mirror.percentage)),
            ..RuntimeFractionalPercent::default()
        }),
        ..RequestMirrorPolicy::default()
    }
}

fn retry_policy(retries: Option<&Retries>) -> RetryPolicy {
    let (retry_on, codes) = match retries {
        Some(retries) if !retries.on.is_empty() => retry_on(&retries.on),
        _ => (DEFAULT_RETRY_ON.to_owned(), Vec::new()),
    };
    let previous_hosts = RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_host_predicate::ConfigType::TypedConfig(pack_any(PreviousHostsPredicate {}))),
    };
    let previous_priorities = RetryPriority {
        name: "envoy.retry_priorities.previous_priorities".to_owned(),
        config_type: Some(retry_priority::ConfigType::TypedConfig(pack_any(PreviousPrioritiesConfig {
            update_frequency: 2,
        }))),
    };
    let avoid = retries.is_none_or(|r| r.ignore_previous_hosts);
    RetryPolicy {
        retry_on,
        num_retries: Some(uint32(retries.map_or(DEFAULT_RETRIES, |r| r.attempts))),
        per_try_timeout: retries.and_then(|r| r.per_try_timeout).map(duration),
        retriable_status_codes: codes,
        retry_back_off: retries
            .and_then(|r| r.backoff)
            .map(|base| RetryBackOff { base_interval: Some(duration(base)), max_interval: None }),
        retry_host_predicate: if avoid { vec![previous_hosts] } else { Vec::new() },
        host_selection_retry_max_attempts: if avoid { HOST_SELECTION_ATTEMPTS } else { 0 },
        retry_priority: retries.is_some_and(|r| r.remote_localities).then_some(previous_priorities),
        ..RetryPolicy::default()
    }
}

/// Istio's `retryOn` may hold HTTP statuses, which Envoy has in a list of their own.
fn retry_on(text: &str) -> (String, Vec<u32>) {
    let words = text.split(',').map(str::trim).filter(|w| !w.is_empty());
    let (codes, mut words): (Vec<_>, Vec<_>) = words.partition(|w| w.parse::<u32>().is_ok());
    let codes: Vec<u32> = codes.into_iter().filter_map(|c| c.parse().ok()).collect();
    if !codes.is_empty() && !words.contains(&STATUS_CODES) {
        words.push(STATUS_CODES);
    }
    (words.join(","), codes)
}

fn fault_config(fault: &Fault) -> Any {
    let delay = fault.delay.map(|(time, share)| FaultDelay {
        percentage: Some(fraction(share)),
        fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(duration(time))),
    });
    let abort = fault.abort.map(|(answer, share)| FaultAbort {
        percentage: Some(fraction(share)),
        response_body: String::new(),
        error_type: Some(match answer {
            Abort::Http(status) => fault_abort::ErrorType::HttpStatus(status.into()),
            Abort::Grpc(code) => fault_abort::ErrorType::GrpcStatus(code),
        }),
    });
    pack_any(HttpFault { delay, abort, ..HttpFault::default() })
}

fn fraction(percentage: f64) -> FractionalPercent {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=100 was checked")]
    let numerator = (percentage * 10_000.0).round() as u32;
    FractionalPercent { numerator, denominator: DenominatorType::Million.into() }
}

fn redirect_action(redirect: &Redirect) -> RedirectAction {
    let code = match redirect.code {
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::MovedPermanently,
    };
    RedirectAction {
        host_redirect: redirect.authority.clone().unwrap_or_default(),
        port_redirect: redirect.port.unwrap_or(0).into(),
        response_code: code.into(),
        scheme_rewrite_specifier: redirect.scheme.clone().map(redirect_action::SchemeRewriteSpecifier::SchemeRedirect),
        path_rewrite_specifier: redirect.uri.clone().map(redirect_action::PathRewriteSpecifier::PathRedirect),
        ..RedirectAction::default()
    }
}

fn direct_response(direct: &Direct) -> DirectResponseAction {
    let body = DataSource { specifier: Some(Specifier::InlineBytes(direct.body.clone())), ..DataSource::default() };
    DirectResponseAction {
        status: direct.status.into(),
        body: (!direct.body.is_empty()).then_some(body),
        ..DirectResponseAction::default()
    }
}

/// Istio: setting the authority is a rewrite of the host.
fn authority(edits: &HeaderEdits) -> Option<String> {
    edits.request.set.iter().find(|(name, _)| is_authority(name)).map(|(_, value)| value.clone())
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

fn to_add(ops: &HeaderOps) -> Vec<HeaderValueOption> {
    let option = |map: &BTreeMap<String, String>, action: HeaderAppendAction| {
        let edits = map.iter().filter(|(name, _)| !is_authority(name));
        edits
            .map(|(key, value)| HeaderValueOption {
                header: Some(HeaderValue { key: key.clone(), value: value.clone(), ..HeaderValue::default() }),
                append_action: action.into(),
                ..HeaderValueOption::default()
            })
            .collect::<Vec<_>>()
    };
    let mut all = option(&ops.set, HeaderAppendAction::OverwriteIfExistsOrAdd);
    all.extend(option(&ops.add, HeaderAppendAction::AppendIfExistsOrAdd));
    all
}
