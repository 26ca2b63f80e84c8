//! LDS (gRFC A27, A31, A33, A39, A41).

use super::{super::filter::TypedStruct, *};
use crate::resource::{FaultAbort, FractionalPercent, HttpFilterConfig, Listener, RouteSource};
use envoy_types::pb::envoy::{
    config::{
        core::v3::{HttpProtocolOptions, TypedExtensionConfig},
        listener::v3::{ApiListener, Listener as Proto},
        route::v3::RouteConfiguration,
    },
    extensions::filters::{
        common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier},
        http::{
            fault::v3::{FaultAbort as ProtoAbort, HttpFault, fault_abort::ErrorType},
            router::v3::Router,
        },
        network::http_connection_manager::v3::{
            HttpConnectionManager, HttpFilter, Rds, ScopedRoutes, http_connection_manager::RouteSpecifier,
            http_filter::ConfigType,
        },
    },
    r#type::v3::FractionalPercent as ProtoFraction,
};

fn filter(name: &str, config: Any) -> HttpFilter {
    HttpFilter { name: name.into(), config_type: Some(ConfigType::TypedConfig(config)), ..HttpFilter::default() }
}

fn optional(name: &str, config: Any) -> HttpFilter {
    HttpFilter { is_optional: true, ..filter(name, config) }
}

fn router() -> HttpFilter {
    filter("router", any(&Router::default()))
}

fn manager() -> HttpConnectionManager {
    HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: Some(ads()),
            route_config_name: "routes".into(),
        })),
        http_filters: vec![router()],
        ..HttpConnectionManager::default()
    }
}

fn listener(http: &HttpConnectionManager) -> Proto {
    Proto {
        name: "greeter".into(),
        api_listener: Some(ApiListener { api_listener: Some(any(http)) }),
        ..Proto::default()
    }
}

fn accepted(http: &HttpConnectionManager) -> (Listener, Vec<Note>) {
    match decode(ResourceType::Listener, &listener(http)).unwrap() {
        (Resource::Listener(listener), notes) => (Listener::clone(&listener), notes),
        (other, _) => panic!("{other:?}"),
    }
}

#[test]
fn bad_listeners_are_rejected() {
    rejects(
        ResourceType::Listener,
        &listener(&manager()),
        &[
            ("name", "empty", |l| l.name.clear()),
            ("api_listener", "missing", |l| l.api_listener = None),
            ("api_listener", "expected envoy.extensions.filters.network.http_connection_manager", |l| {
                l.api_listener = Some(ApiListener { api_listener: Some(unknown("x.Y")) });
            }),
        ],
    );
}

#[test]
fn bad_connection_managers_are_rejected() {
    type Case = (&'static str, &'static str, fn(&mut HttpConnectionManager));
    let cases: &[Case] = &[
        ("api_listener.xff_num_trusted_hops", "zero", |h| h.xff_num_trusted_hops = 1),
        ("api_listener.original_ip_detection_extensions", "empty", |h| {
            h.original_ip_detection_extensions = vec![TypedExtensionConfig::default()];
        }),
        ("api_listener", "neither rds nor route_config", |h| h.route_specifier = None),
        ("api_listener.scoped_routes", "not supported", |h| {
            h.route_specifier = Some(RouteSpecifier::ScopedRoutes(ScopedRoutes::default()));
        }),
        ("api_listener.rds.config_source", "ads or self", |h| {
            h.route_specifier =
                Some(RouteSpecifier::Rds(Rds { config_source: Some(not_ads()), route_config_name: "routes".into() }));
        }),
        ("api_listener.rds.config_source", "missing", |h| {
            h.route_specifier =
                Some(RouteSpecifier::Rds(Rds { config_source: None, route_config_name: "routes".into() }));
        }),
        ("api_listener.rds.route_config_name", "empty", |h| {
            h.route_specifier =
                Some(RouteSpecifier::Rds(Rds { config_source: Some(ads()), route_config_name: String::new() }));
        }),
        ("api_listener.common_http_protocol_options.max_stream_duration", "negative", |h| {
            h.common_http_protocol_options =
                Some(HttpProtocolOptions { max_stream_duration: seconds(-1), ..HttpProtocolOptions::default() });
        }),
        ("api_listener.http_filters", "router", |h| h.http_filters.clear()),
        ("api_listener.http_filters", "\"fault\" is last", |h| {
            h.http_filters = vec![filter("fault", any(&HttpFault::default()))];
        }),
        ("api_listener.http_filters[1]", "behind the router", |h| {
            h.http_filters = vec![router(), filter("fault", any(&HttpFault::default()))];
        }),
        ("api_listener.http_filters[1].name", "twice", |h| {
            h.http_filters = vec![filter("router", any(&HttpFault::default())), router()];
        }),
        ("api_listener.http_filters[0].name", "empty", |h| h.http_filters[0].name.clear()),
        ("api_listener.http_filters[0].typed_config", "unknown filter \"x.Y\" and not optional", |h| {
            h.http_filters.insert(0, filter("x", unknown("x.Y")));
        }),
        ("api_listener.http_filters[0].typed_config", "has no config", |h| {
            h.http_filters.insert(0, HttpFilter { name: "x".into(), ..HttpFilter::default() });
        }),
        ("api_listener.http_filters", "is empty", |h| {
            h.http_filters = vec![optional("x", unknown("x.Y"))];
        }),
        ("api_listener.http_filters[0].typed_config.delay", "neither", |h| {
            let fault = HttpFault { delay: Some(FaultDelay::default()), ..HttpFault::default() };
            h.http_filters.insert(0, filter("fault", any(&fault)));
        }),
        ("api_listener.http_filters[0].typed_config.abort.percentage", "denominator", |h| {
            let abort = ProtoAbort {
                percentage: Some(ProtoFraction { numerator: 1, denominator: 9 }),
                error_type: Some(ErrorType::HttpStatus(503)),
                ..ProtoAbort::default()
            };
            h.http_filters.insert(0, filter("fault", any(&HttpFault { abort: Some(abort), ..HttpFault::default() })));
        }),
        ("api_listener.route_config.virtual_hosts[0].domains", "empty", |h| {
            let host = envoy_types::pb::envoy::config::route::v3::VirtualHost::default();
            let config = RouteConfiguration { virtual_hosts: vec![host], ..RouteConfiguration::default() };
            h.route_specifier = Some(RouteSpecifier::RouteConfig(config));
        }),
    ];
    for (path, reason, change) in cases {
        let mut http = manager();
        change(&mut http);
        let error = decode(ResourceType::Listener, &listener(&http))
            .err()
            .unwrap_or_else(|| panic!("{path}: {reason}: was accepted"));
        assert_eq!(&error.path, path, "{error}");
        assert!(error.reason.contains(reason), "{error} does not say \"{reason}\"");
    }
}

#[test]
fn a_good_listener_keeps_what_counts() {
    let mut http = manager();
    http.common_http_protocol_options =
        Some(HttpProtocolOptions { max_stream_duration: seconds(7), ..HttpProtocolOptions::default() });
    let (listener, notes) = accepted(&http);
    assert_eq!(&*listener.name, "greeter");
    assert_eq!(listener.http.routes, RouteSource::Rds("routes".into()));
    assert_eq!(listener.http.max_stream_duration, Some(Duration::from_secs(7)));
    assert_eq!(listener.http.http_filters.len(), 1);
    assert_eq!(notes, []);
}

#[test]
fn optional_unknown_filters_are_dropped_with_a_note() {
    let mut http = manager();
    http.http_filters.insert(0, optional("x", unknown("x.Y")));
    let (listener, notes) = accepted(&http);
    assert_eq!(listener.http.http_filters.len(), 1);
    assert_eq!(note_paths(&notes), ["api_listener.http_filters[0].typed_config"]);
    assert!(notes[0].reason.contains("x.Y"));
}

#[test]
fn a_router_in_a_typed_struct_is_a_router() {
    for name in ["xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct"] {
        let typed = TypedStruct { type_url: Router::type_url(), value: None };
        let config = Any { type_url: format!("type.googleapis.com/{name}"), value: typed.encode_to_vec() };
        let mut http = manager();
        http.http_filters = vec![filter("router", config)];
        assert_eq!(accepted(&http).0.http.http_filters[0].config, HttpFilterConfig::Router);
    }
}

#[test]
fn faults_are_read_as_configured() {
    let percent = |numerator, denominator| Some(ProtoFraction { numerator, denominator });
    let fault = HttpFault {
        delay: Some(FaultDelay {
            percentage: percent(50, 0),
            fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(ProtoDuration { seconds: 0, nanos: 5_000_000 })),
        }),
        abort: Some(ProtoAbort {
            percentage: percent(1, 1),
            error_type: Some(ErrorType::GrpcStatus(42)),
            ..ProtoAbort::default()
        }),
        max_active_faults: uint(0),
        ..HttpFault::default()
    };
    let mut http = manager();
    http.http_filters.insert(0, filter("fault", any(&fault)));
    let (listener, _) = accepted(&http);
    let HttpFilterConfig::Fault(fault) = &listener.http.http_filters[0].config else { panic!() };
    let delay = fault.delay.as_ref().unwrap();
    assert_eq!((delay.fixed, delay.percentage), (Some(Duration::from_millis(5)), FractionalPercent(500_000)));
    assert_eq!(fault.abort, Some(FaultAbort::Grpc { code: 2, percentage: FractionalPercent(100) }));
    assert_eq!(fault.max_active_faults, Some(0));
}

#[test]
fn http_statuses_out_of_range_abort_nothing() {
    for (status, kept) in [(199, false), (200, true), (599, true), (600, false)] {
        let abort = ProtoAbort { error_type: Some(ErrorType::HttpStatus(status)), ..ProtoAbort::default() };
        let mut http = manager();
        http.http_filters.insert(0, filter("fault", any(&HttpFault { abort: Some(abort), ..HttpFault::default() })));
        let (listener, notes) = accepted(&http);
        let HttpFilterConfig::Fault(fault) = &listener.http.http_filters[0].config else { panic!() };
        assert_eq!((fault.abort.is_some(), notes.is_empty()), (kept, kept), "{status}");
    }
}
