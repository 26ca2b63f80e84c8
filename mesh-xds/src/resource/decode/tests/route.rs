//! RDS (gRFC A27, A28, A31, A39, A44).

mod actions;

use super::*;
use crate::resource::{
    Action, AttemptCount, ClusterSpecifier, DomainPattern, Forward, FractionalPercent, HeaderMatcherKind, Hedge,
    HttpFilterConfig, MetadataValue, OmitHosts, PathMatcher, ResetFormat, RetryPolicy as Policy, RouteConfiguration,
    StringPattern,
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{Metadata, RuntimeFractionalPercent, TypedExtensionConfig},
            route::v3::{
                ClusterSpecifierPlugin, FilterAction, FilterConfig, HeaderMatcher, HedgePolicy, NonForwardingAction,
                RetryPolicy, Route, RouteAction, RouteConfiguration as Proto, RouteMatch, VirtualHost, WeightedCluster,
                header_matcher::HeaderMatchSpecifier,
                retry_policy::{
                    RateLimitedRetryBackOff, ResetHeader, RetryBackOff, RetryHostPredicate, RetryPriority,
                    retry_host_predicate, retry_priority,
                },
                route::Action as ProtoAction,
                route_action::{ClusterSpecifier as Specifier, MaxStreamDuration},
                route_match::{ConnectMatcher, PathSpecifier},
                weighted_cluster::ClusterWeight,
            },
        },
        extensions::{
            filters::http::fault::v3::HttpFault,
            retry::{
                host::{
                    omit_canary_hosts::v3::OmitCanaryHostsPredicate, omit_host_metadata::v3::OmitHostMetadataConfig,
                },
                priority::previous_priorities::v3::PreviousPrioritiesConfig,
            },
        },
        r#type::{
            matcher::v3::{
                AddressMatcher, FilterStateMatcher, MetadataMatcher, RegexMatcher, StringMatcher, filter_state_matcher,
                string_matcher::MatchPattern,
            },
            v3::{FractionalPercent as ProtoFraction, Int64Range},
        },
    },
    google::protobuf::{BoolValue, Struct, Value, value::Kind},
};

fn good() -> Proto {
    let retry = RetryPolicy { retry_on: "unavailable,5xx".into(), num_retries: uint(2), ..RetryPolicy::default() };
    let route = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".into())),
            headers: vec![HeaderMatcher {
                name: "X-Canary".into(),
                header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
                ..HeaderMatcher::default()
            }],
            ..RouteMatch::default()
        }),
        action: Some(ProtoAction::Route(RouteAction {
            cluster_specifier: Some(Specifier::Cluster("c".into())),
            retry_policy: Some(retry),
            ..RouteAction::default()
        })),
        ..Route::default()
    };
    Proto {
        name: "routes".into(),
        virtual_hosts: vec![VirtualHost {
            name: "host".into(),
            domains: vec!["*".into()],
            routes: vec![route],
            ..VirtualHost::default()
        }],
        ..Proto::default()
    }
}

fn accepted(proto: &Proto) -> (RouteConfiguration, Vec<Note>) {
    match decode(ResourceType::RouteConfiguration, proto).unwrap() {
        (Resource::RouteConfiguration(routes), notes) => (RouteConfiguration::clone(&routes), notes),
        (other, _) => panic!("{other:?}"),
    }
}

fn route(proto: &mut Proto) -> &mut Route {
    &mut proto.virtual_hosts[0].routes[0]
}

fn matches(proto: &mut Proto) -> &mut RouteMatch {
    route(proto).r#match.as_mut().unwrap()
}

fn header(proto: &mut Proto) -> &mut HeaderMatcher {
    &mut matches(proto).headers[0]
}

fn action(proto: &mut Proto) -> &mut RouteAction {
    match route(proto).action.as_mut().unwrap() {
        ProtoAction::Route(action) => action,
        other => panic!("{other:?}"),
    }
}

fn retry(proto: &mut Proto) -> &mut RetryPolicy {
    action(proto).retry_policy.as_mut().unwrap()
}

fn weighted(weights: &[u32]) -> Option<Specifier> {
    let clusters = weights
        .iter()
        .enumerate()
        .map(|(index, weight)| ClusterWeight {
            name: format!("c{index}"),
            weight: uint(*weight),
            ..ClusterWeight::default()
        })
        .collect();
    Some(Specifier::WeightedClusters(WeightedCluster { clusters, ..WeightedCluster::default() }))
}

/// The only route of an accepted configuration.
fn forward(proto: &Proto) -> Forward {
    match &accepted(proto).0.virtual_hosts[0].routes[0].action {
        Action::Forward(forward) => Forward::clone(forward),
        other => panic!("{other:?}"),
    }
}

fn retry_policy(change: impl FnOnce(&mut RetryPolicy)) -> (Policy, Vec<Note>) {
    let mut proto = good();
    change(retry(&mut proto));
    (Policy::clone(forward(&proto).retry_policy.as_deref().unwrap()), accepted(&proto).1)
}

const MATCH: &str = "virtual_hosts[0].routes[0].match";
const HEADER: &str = "virtual_hosts[0].routes[0].match.headers[0]";

#[test]
fn bad_route_configurations_are_rejected() {
    rejects(
        ResourceType::RouteConfiguration,
        &good(),
        &[
            ("name", "empty", |r| r.name.clear()),
            ("virtual_hosts[0].domains", "empty", |r| r.virtual_hosts[0].domains.clear()),
            ("virtual_hosts[0].domains[1]", "\"a*b\"", |r| r.virtual_hosts[0].domains.push("a*b".into())),
            ("virtual_hosts[0].domains[1]", "\"*a*\"", |r| r.virtual_hosts[0].domains.push("*a*".into())),
            ("virtual_hosts[0].domains[1]", "\"\"", |r| r.virtual_hosts[0].domains.push(String::new())),
            ("virtual_hosts[0].routes[0].match", "missing", |r| route(r).r#match = None),
            (MATCH, "no path_specifier", |r| matches(r).path_specifier = None),
            ("virtual_hosts[0].routes[0].match.connect_matcher", "not supported", |r| {
                matches(r).path_specifier = Some(PathSpecifier::ConnectMatcher(ConnectMatcher {}));
            }),
            ("virtual_hosts[0].routes[0].match.safe_regex.regex", "not valid", |r| {
                let regex = RegexMatcher { regex: "(".into(), ..RegexMatcher::default() };
                matches(r).path_specifier = Some(PathSpecifier::SafeRegex(regex));
            }),
            ("virtual_hosts[0].routes[0].match.runtime_fraction.default_value", "denominator", |r| {
                matches(r).runtime_fraction = Some(RuntimeFractionalPercent {
                    default_value: Some(ProtoFraction { numerator: 1, denominator: 7 }),
                    ..RuntimeFractionalPercent::default()
                });
            }),
            (HEADER, "no header_match_specifier", |r| header(r).header_match_specifier = None),
            ("virtual_hosts[0].routes[0].match.headers[0].name", "empty", |r| header(r).name.clear()),
            ("virtual_hosts[0].routes[0].match.headers[0].range_match", "above", |r| {
                header(r).header_match_specifier =
                    Some(HeaderMatchSpecifier::RangeMatch(Int64Range { start: 2, end: 1 }));
            }),
            ("virtual_hosts[0].routes[0].match.headers[0].prefix_match", "empty", |r| {
                header(r).header_match_specifier = Some(HeaderMatchSpecifier::PrefixMatch(String::new()));
            }),
            ("virtual_hosts[0].routes[0].match.headers[0].safe_regex_match.regex", "not valid", |r| {
                let regex = RegexMatcher { regex: "[".into(), ..RegexMatcher::default() };
                header(r).header_match_specifier = Some(HeaderMatchSpecifier::SafeRegexMatch(regex));
            }),
            ("virtual_hosts[0].routes[0].match.headers[0].string_match", "no match pattern", |r| {
                header(r).header_match_specifier = Some(HeaderMatchSpecifier::StringMatch(StringMatcher::default()));
            }),
            ("virtual_hosts[0].routes[0].match.headers[0].string_match.suffix", "empty", |r| {
                let matcher =
                    StringMatcher { match_pattern: Some(MatchPattern::Suffix(String::new())), ignore_case: false };
                header(r).header_match_specifier = Some(HeaderMatchSpecifier::StringMatch(matcher));
            }),
            ("virtual_hosts[0].routes[0].route.cluster", "empty", |r| {
                action(r).cluster_specifier = Some(Specifier::Cluster(String::new()));
            }),
            ("virtual_hosts[0].routes[0].route.weighted_clusters", "zero", |r| {
                action(r).cluster_specifier = weighted(&[0, 0]);
            }),
            ("virtual_hosts[0].routes[0].route.weighted_clusters", "zero", |r| {
                action(r).cluster_specifier = weighted(&[]);
            }),
            ("virtual_hosts[0].routes[0].route.weighted_clusters", "4294967296", |r| {
                action(r).cluster_specifier = weighted(&[u32::MAX, 1]);
            }),
            ("virtual_hosts[0].routes[0].route.weighted_clusters.clusters[0].name", "empty", |r| {
                let clusters = vec![ClusterWeight { weight: uint(1), ..ClusterWeight::default() }];
                action(r).cluster_specifier =
                    Some(Specifier::WeightedClusters(WeightedCluster { clusters, ..WeightedCluster::default() }));
            }),
            ("virtual_hosts[0].routes[0].route.cluster_specifier_plugin", "not declared", |r| {
                action(r).cluster_specifier = Some(Specifier::ClusterSpecifierPlugin("p".into()));
            }),
            ("cluster_specifier_plugins[0]", "unknown plugin \"p\"", |r| {
                let extension = TypedExtensionConfig { name: "p".into(), typed_config: Some(unknown("x.Y")) };
                r.cluster_specifier_plugins =
                    vec![ClusterSpecifierPlugin { extension: Some(extension), is_optional: false }];
            }),
            ("virtual_hosts[0].routes[0].route.timeout", "negative", |r| action(r).timeout = seconds(-1)),
            ("virtual_hosts[0].routes[0].route.max_stream_duration.grpc_timeout_header_max", "negative", |r| {
                action(r).max_stream_duration =
                    Some(MaxStreamDuration { grpc_timeout_header_max: seconds(-1), ..MaxStreamDuration::default() });
            }),
            ("virtual_hosts[0].routes[0].route.retry_policy.num_retries", "at least 1", |r| {
                retry(r).num_retries = uint(0);
            }),
            ("virtual_hosts[0].routes[0].route.retry_policy.retry_back_off.base_interval", "missing", |r| {
                retry(r).retry_back_off = Some(RetryBackOff::default());
            }),
            ("virtual_hosts[0].routes[0].route.retry_policy.retry_back_off.base_interval", "greater than zero", |r| {
                retry(r).retry_back_off = Some(RetryBackOff { base_interval: seconds(0), max_interval: None });
            }),
            ("virtual_hosts[0].routes[0].route.retry_policy.retry_back_off.max_interval", "below", |r| {
                retry(r).retry_back_off = Some(RetryBackOff { base_interval: seconds(2), max_interval: seconds(1) });
            }),
            ("virtual_hosts[0].retry_policy.num_retries", "at least 1", |r| {
                r.virtual_hosts[0].retry_policy = Some(RetryPolicy { num_retries: uint(0), ..RetryPolicy::default() });
            }),
            ("virtual_hosts[0].typed_per_filter_config[\"f\"]", "unknown filter \"x.Y\"", |r| {
                r.virtual_hosts[0].typed_per_filter_config.insert("f".into(), unknown("x.Y"));
            }),
            ("virtual_hosts[0].routes[0].typed_per_filter_config[\"f\"]", "malformed", |r| {
                let bad = Any { type_url: HttpFault::type_url(), value: vec![0xff] };
                route(r).typed_per_filter_config.insert("f".into(), bad);
            }),
        ],
    );
}

#[test]
fn domains_are_lower_cased_patterns() {
    let mut proto = good();
    proto.virtual_hosts[0].domains = ["A.com", "*.B.com", "c.*", "*"].map(str::to_owned).into();
    assert_eq!(
        accepted(&proto).0.virtual_hosts[0].domains,
        [
            DomainPattern::Exact("a.com".into()),
            DomainPattern::Suffix(".b.com".into()),
            DomainPattern::Prefix("c.".into()),
            DomainPattern::Any
        ]
    );
}

#[test]
fn virtual_hosts_match_by_kind_then_length_then_order() {
    let mut proto = good();
    let host = |domains: &[&str]| VirtualHost {
        domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
        ..VirtualHost::default()
    };
    proto.virtual_hosts = vec![
        host(&["*"]),
        host(&["foo.*"]),
        host(&["foo.bar*"]),
        host(&["*.com"]),
        host(&["*.bar.com"]),
        host(&["foo.bar.com"]),
        host(&["foo.bar.com"]),
        host(&["[::1]:80", "with.port:8080"]),
    ];
    let (routes, _) = accepted(&proto);
    for (authority, expected) in [
        ("foo.bar.com", 5),
        ("FOO.Bar.COM", 5),
        ("foo.bar.com:50051", 5),
        ("x.bar.com", 4),
        (".bar.com", 3),
        ("x.com", 3),
        ("foo.bar.net", 2),
        ("foo.x", 1),
        ("foo.", 0),
        ("other", 0),
        ("[::1]:80", 7),
        ("with.port:8080", 7),
        ("with.port:8081", 0),
    ] {
        assert_eq!(routes.virtual_host_for(authority), Some(expected), "{authority}");
    }
    let none = RouteConfiguration { virtual_hosts: routes.virtual_hosts[5..6].to_vec(), ..routes };
    assert_eq!(none.virtual_host_for("else"), None);
    assert_eq!(none.virtual_host_for(""), None);
}

#[test]
fn paths_are_case_sensitive_unless_said_otherwise() {
    let mut proto = good();
    let mut path = |specifier, sensitive: Option<bool>| {
        matches(&mut proto).path_specifier = Some(specifier);
        matches(&mut proto).case_sensitive = sensitive.map(|value| BoolValue { value });
        accepted(&proto).0.virtual_hosts[0].routes[0].matches.path.clone()
    };
    assert_eq!(
        path(PathSpecifier::Prefix("/A".into()), None),
        PathMatcher::Prefix { prefix: "/A".into(), case_sensitive: true }
    );
    assert_eq!(
        path(PathSpecifier::Path("/A".into()), Some(false)),
        PathMatcher::Exact { path: "/a".into(), case_sensitive: false }
    );
    assert_eq!(
        path(PathSpecifier::PathSeparatedPrefix("/A.b".into()), Some(false)),
        PathMatcher::Separated { prefix: "/a.b".into(), case_sensitive: false }
    );
}

#[test]
fn matchers_of_metadata_and_filter_state_are_checked() {
    use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment::Segment};
    use envoy_types::pb::xds::core::v3::CidrRange as ProtoRange;
    let full = || MetadataMatcher {
        filter: "f".into(),
        path: vec![PathSegment { segment: Some(Segment::Key("k".into())) }],
        ..MetadataMatcher::default()
    };
    let metadata: [(&str, MetadataMatcher); 4] = [
        ("filter", MetadataMatcher::default()),
        ("path", MetadataMatcher { path: vec![], ..full() }),
        ("path[0].key", MetadataMatcher { path: vec![PathSegment::default()], ..full() }),
        ("value", full()),
    ];
    for (field, matcher) in metadata {
        let mut proto = good();
        matches(&mut proto).dynamic_metadata = vec![matcher];
        let invalid = decode(ResourceType::RouteConfiguration, &proto).unwrap_err();
        assert_eq!(invalid.path, format!("virtual_hosts[0].routes[0].match.dynamic_metadata[0].{field}"));
    }
    let mut proto = good();
    matches(&mut proto).filter_state = vec![FilterStateMatcher { key: "k".into(), matcher: None }];
    let invalid = decode(ResourceType::RouteConfiguration, &proto).unwrap_err();
    assert_eq!(invalid.path, "virtual_hosts[0].routes[0].match.filter_state[0]");
    let ranges = vec![ProtoRange { address_prefix: "10.0.0".into(), prefix_len: None }];
    let matcher = Some(filter_state_matcher::Matcher::AddressMatch(AddressMatcher { ranges, invert_match: false }));
    matches(&mut proto).filter_state = vec![FilterStateMatcher { key: "k".into(), matcher }];
    let invalid = decode(ResourceType::RouteConfiguration, &proto).unwrap_err();
    let path = "virtual_hosts[0].routes[0].match.filter_state[0].address_match.ranges[0].address_prefix";
    assert_eq!(invalid.path, path);
}

#[test]
fn routes_that_need_more_than_we_match_are_skipped_with_a_note() {
    let mut proto = good();
    action(&mut proto).cluster_specifier = None;
    let (routes, notes) = accepted(&proto);
    assert_eq!((routes.virtual_hosts[0].routes.len(), notes.len()), (0, 1));
}

#[test]
fn an_optional_plugin_skips_its_routes() {
    let mut proto = good();
    let extension = TypedExtensionConfig { name: "p".into(), typed_config: Some(unknown("x.Y")) };
    proto.cluster_specifier_plugins = vec![ClusterSpecifierPlugin { extension: Some(extension), is_optional: true }];
    action(&mut proto).cluster_specifier = Some(Specifier::ClusterSpecifierPlugin("p".into()));
    assert_eq!(accepted(&proto).0.virtual_hosts[0].routes, []);
}

#[test]
fn non_forwarding_routes_match_and_fail() {
    for proto_action in [
        Some(ProtoAction::FilterAction(FilterAction::default())),
        Some(ProtoAction::NonForwardingAction(NonForwardingAction {})),
        None,
    ] {
        let mut proto = good();
        route(&mut proto).action = proto_action;
        let (routes, _) = accepted(&proto);
        let taken = &routes.virtual_hosts[0].routes[0].action;
        assert!(matches!(taken, Action::Unsupported(_) | Action::NonForwarding), "{taken:?}");
    }
}

#[test]
fn weights_of_zero_are_left_out() {
    let mut proto = good();
    action(&mut proto).cluster_specifier = weighted(&[90, 0, 10]);
    let ClusterSpecifier::Weighted(clusters) = forward(&proto).cluster else { panic!() };
    let weights: Vec<_> = clusters.iter().map(|cluster| (&*cluster.name, cluster.weight)).collect();
    assert_eq!(weights, [("c0", 90), ("c2", 10)]);
}

#[test]
fn header_matchers_are_read_as_configured() {
    let mut proto = good();
    let matcher = StringMatcher { match_pattern: Some(MatchPattern::Prefix("AbC".into())), ignore_case: true };
    header(&mut proto).header_match_specifier = Some(HeaderMatchSpecifier::StringMatch(matcher));
    header(&mut proto).invert_match = true;
    let (routes, _) = accepted(&proto);
    let header = &routes.virtual_hosts[0].routes[0].matches.headers[0];
    assert_eq!((header.name.as_str(), header.invert), ("x-canary", true));
    let HeaderMatcherKind::String(matcher) = &header.kind else { panic!() };
    assert_eq!(matcher.pattern, StringPattern::Prefix("abc".into()));
    assert!(matcher.matches("ABCDE") && !matcher.matches("ab"));
}

#[test]
fn fractions_are_scaled_to_parts_per_million() {
    for (numerator, denominator, expected) in
        [(10, 0, 100_000), (10, 1, 1_000), (10, 2, 10), (0, 0, 0), (101, 0, 1_000_000), (u32::MAX, 0, 1_000_000)]
    {
        let mut proto = good();
        matches(&mut proto).runtime_fraction = Some(RuntimeFractionalPercent {
            default_value: Some(ProtoFraction { numerator, denominator }),
            ..RuntimeFractionalPercent::default()
        });
        let (routes, _) = accepted(&proto);
        let fraction = routes.virtual_hosts[0].routes[0].matches.fraction;
        assert_eq!(fraction, Some(FractionalPercent(expected)), "{numerator}/{denominator}");
    }
}

#[test]
fn retry_conditions_are_read_in_every_dialect() {
    let (policy, notes) = retry_policy(|retry| {
        retry.retry_on =
            "Cancelled, deadline-exceeded,internal,resource-exhausted,unavailable,5xx,gateway-error,reset,\
             reset-before-request,connect-failure,refused-stream,retriable-4xx,retriable-status-codes,503,\
             envoy-ratelimited,retriable-headers,http3-post-connect-failure,99"
                .into();
        retry.retriable_status_codes = vec![429, 503, 7000];
    });
    for code in 0..17 {
        assert_eq!(policy.on.grpc(code), [1, 4, 8, 13, 14].contains(&code), "{code}");
    }
    let on = &policy.on;
    assert!(on.http_5xx && on.gateway_error && on.reset && on.reset_before_request);
    assert!(on.connect_failure && on.refused_stream && on.retriable_4xx && on.rate_limited);
    assert_eq!(on.statuses, [429, 503]);
    let path = "virtual_hosts[0].routes[0].route.retry_policy.retry_on";
    let codes = "virtual_hosts[0].routes[0].route.retry_policy.retriable_status_codes";
    assert_eq!(note_paths(&notes), [codes, path, path]);
}

#[test]
fn istios_default_retry_policy_is_taken() {
    let (policy, notes) = retry_policy(|retry| {
        retry.retry_on = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes".into();
        retry.num_retries = uint(2);
        retry.retry_host_predicate = vec![RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".into(),
            ..RetryHostPredicate::default()
        }];
        retry.host_selection_retry_max_attempts = 5;
        retry.retriable_status_codes = vec![503];
    });
    assert_eq!(notes, []);
    assert!(policy.avoid_previous_hosts && policy.on.connect_failure && policy.on.grpc(14));
    assert_eq!((policy.num_retries, policy.on.statuses), (2, vec![503]));
}

#[test]
fn retry_defaults_and_clamps() {
    let (policy, _) = retry_policy(|retry| {
        retry.retry_on.clear();
        retry.num_retries = None;
        retry.per_try_timeout = seconds(0);
    });
    assert_eq!((policy.num_retries, policy.per_try_timeout), (1, None));
    assert_eq!((policy.back_off.base, policy.back_off.max), (Duration::from_millis(25), Duration::from_millis(250)));
    assert_eq!(policy.on, crate::resource::RetryOn::default(), "an empty policy hides the virtual host's");

    let (policy, _) = retry_policy(|retry| {
        let nanos = ProtoDuration { seconds: 0, nanos: 10 };
        retry.retry_back_off = Some(RetryBackOff { base_interval: Some(nanos), max_interval: None });
    });
    assert_eq!((policy.back_off.base, policy.back_off.max), (Duration::from_millis(1), Duration::from_millis(10)));
}

#[test]
fn overrides_are_keyed_by_instance_and_may_be_wrapped() {
    let wrap = |config: FilterConfig| any(&config);
    let mut proto = good();
    let overrides = &mut route(&mut proto).typed_per_filter_config;
    overrides.insert("plain".into(), any(&HttpFault { max_active_faults: uint(3), ..HttpFault::default() }));
    overrides.insert("off".into(), wrap(FilterConfig { disabled: true, ..FilterConfig::default() }));
    overrides.insert("on".into(), wrap(FilterConfig { config: Some(Any::default()), ..FilterConfig::default() }));
    overrides.insert(
        "wrapped".into(),
        wrap(FilterConfig { config: Some(any(&HttpFault::default())), ..FilterConfig::default() }),
    );
    overrides.insert(
        "unknown".into(),
        wrap(FilterConfig { config: Some(unknown("x.Y")), is_optional: true, ..FilterConfig::default() }),
    );
    let (routes, notes) = accepted(&proto);
    let overrides = &routes.virtual_hosts[0].routes[0].filter_overrides;
    assert_eq!(overrides.keys().map(|name| &**name).collect::<Vec<_>>(), ["off", "on", "plain", "wrapped"]);
    let Some(HttpFilterConfig::Fault(fault)) = &overrides["plain"].config else { panic!() };
    assert_eq!(fault.max_active_faults, Some(3));
    assert!(overrides["off"].disabled && overrides["off"].config.is_none());
    assert!(!overrides["on"].disabled && overrides["on"].config.is_none());
    assert_eq!(note_paths(&notes), ["virtual_hosts[0].routes[0].typed_per_filter_config[\"unknown\"].config"]);
}

#[test]
fn an_empty_list_of_virtual_hosts_is_fine() {
    let mut proto = good();
    proto.virtual_hosts.clear();
    assert_eq!(accepted(&proto).0.virtual_host_for("x"), None);
}

#[test]
fn host_predicates_priorities_and_headers_of_a_retry_policy_are_read() {
    let predicate = |name: &str, any: Option<_>| RetryHostPredicate {
        name: name.into(),
        config_type: any.map(retry_host_predicate::ConfigType::TypedConfig),
    };
    let slow = Struct { fields: [("slow".to_owned(), Value { kind: Some(Kind::BoolValue(true)) })].into() };
    let metadata_match = Metadata { filter_metadata: [("envoy.lb".to_owned(), slow)].into(), ..Metadata::default() };
    let omit = OmitHostMetadataConfig { metadata_match: Some(metadata_match) };
    let (policy, notes) = retry_policy(|retry| {
        retry.retry_on = "retriable-headers".into();
        retry.retry_host_predicate = vec![
            predicate("envoy.retry_host_predicates.previous_hosts", None),
            predicate("x", Some(any(&OmitCanaryHostsPredicate {}))),
            predicate("x", Some(any(&omit))),
            predicate("unknown", None),
        ];
        retry.retry_priority = Some(RetryPriority {
            name: "x".into(),
            config_type: Some(retry_priority::ConfigType::TypedConfig(any(&PreviousPrioritiesConfig {
                update_frequency: 2,
            }))),
        });
        let matcher = |name: &str| HeaderMatcher {
            name: name.into(),
            header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
            ..HeaderMatcher::default()
        };
        retry.retriable_headers = vec![matcher("x-again")];
        retry.retriable_request_headers = vec![matcher("x-idempotent")];
        retry.rate_limited_retry_back_off = Some(RateLimitedRetryBackOff {
            reset_headers: vec![
                ResetHeader { name: "Retry-After".into(), format: 0 },
                ResetHeader { name: "x-ratelimit-reset".into(), format: 1 },
            ],
            max_interval: seconds(60),
        });
    });
    assert!(policy.avoid_previous_hosts);
    let slow = [("slow".to_owned(), MetadataValue::Bool(true))].into();
    assert_eq!(policy.omit_hosts, [OmitHosts::Canary, OmitHosts::Metadata(slow)]);
    assert_eq!(policy.leave_priorities, 2);
    assert_eq!((policy.retriable_headers.len(), policy.retriable_request_headers.len()), (1, 1));
    let reset = |name: &str, format| crate::resource::ResetHeader { name: name.parse().unwrap(), format };
    assert_eq!(
        policy.reset_headers,
        [reset("retry-after", ResetFormat::Seconds), reset("x-ratelimit-reset", ResetFormat::UnixTime)]
    );
    assert_eq!(policy.max_reset.as_secs(), 60);
    assert_eq!(note_paths(&notes), ["virtual_hosts[0].routes[0].route.retry_policy.retry_host_predicate"]);
}

#[test]
fn hedging_and_attempt_counts_are_read() {
    let mut proto = good();
    let hedged = |on| Some(HedgePolicy { hedge_on_per_try_timeout: on, ..HedgePolicy::default() });
    assert_eq!(forward(&proto).hedge, None);
    proto.virtual_hosts[0].hedge_policy = hedged(true);
    assert_eq!(forward(&proto).hedge, Some(Hedge::PerTryTimeout));
    action(&mut proto).hedge_policy = hedged(false);
    assert_eq!(forward(&proto).hedge, None);
    proto.virtual_hosts[0].include_request_attempt_count = true;
    proto.virtual_hosts[0].include_attempt_count_in_response = true;
    let (routes, notes) = accepted(&proto);
    let expected = AttemptCount { in_request: true, in_response: true, after_timeout: false };
    assert_eq!((routes.virtual_hosts[0].attempt_count, notes.len()), (expected, 0));
}
