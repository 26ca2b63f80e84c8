//! What routes and filters of a server do besides letting in: they answer, change heads, hold bodies back.

use crate::{
    inbound_serve::{http2, post, text},
    inbound_xds::{Pair, chain_with},
    support::{
        GUARD,
        inbound::{Echo, Seen},
    },
};
use bytes::Bytes;
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    DataSource, HeaderValue, HeaderValueOption, data_source::Specifier,
                    header_value_option::HeaderAppendAction,
                },
                route::v3::{
                    DirectResponseAction, NonForwardingAction, RedirectAction, Route, RouteAction, RouteConfiguration,
                    RouteMatch, VirtualHost,
                    redirect_action::PathRewriteSpecifier,
                    route::Action,
                    route_action::{ClusterSpecifier, MaxStreamDuration},
                    route_match::PathSpecifier,
                },
            },
            extensions::filters::{
                common::fault::v3::{FaultRateLimit, fault_rate_limit},
                http::{buffer::v3::Buffer, fault::v3::HttpFault},
                network::http_connection_manager::v3::{
                    HttpFilter, http_connection_manager::RouteSpecifier, http_filter::ConfigType,
                },
            },
            r#type::v3::FractionalPercent,
        },
        google::protobuf::{Any, Duration as ProtoDuration, UInt32Value},
    },
    util::pack_any,
};
use http::{Response, StatusCode};
use http_body_util::Full;
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};

fn set(name: &str, value: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue { key: name.into(), value: value.into(), ..HeaderValue::default() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..HeaderValueOption::default()
    }
}

fn route(path: &str, action: Action) -> Route {
    Route {
        name: format!("route {path}"),
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix(path.into())), ..RouteMatch::default() }),
        action: Some(action),
        ..Route::default()
    }
}

fn serve(path: &str) -> Route {
    route(path, Action::NonForwardingAction(NonForwardingAction {}))
}

/// An echo server with these filters and routes, and a client of it.
async fn server(filters: &[(&str, Any)], routes: Vec<Route>) -> (Pair, crate::inbound_serve::Sender<Full<Bytes>>) {
    let pair = Pair::serving(|inbound| async move { inbound.serve(Echo(Arc::<Seen>::default())).await.unwrap() }).await;
    let host = VirtualHost {
        domains: vec!["*".into()],
        routes,
        response_headers_to_add: vec![set("x-host", "added")],
        ..VirtualHost::default()
    };
    let chain = chain_with("all", "", None, |manager| {
        let configuration = RouteConfiguration { virtual_hosts: vec![host], ..RouteConfiguration::default() };
        manager.route_specifier = Some(RouteSpecifier::RouteConfig(configuration));
        for (name, config) in filters {
            let config_type = Some(ConfigType::TypedConfig(config.clone()));
            manager.http_filters.insert(0, HttpFilter { name: (*name).into(), config_type, ..HttpFilter::default() });
        }
    });
    pair.serve(pair.listener(vec![chain]));
    timeout(GUARD, pair.inbound.ready()).await.unwrap();
    let client = http2(pair.inbound.local_addr()).await;
    (pair, client)
}

fn says<'a, B>(response: &'a Response<B>, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn routes_of_a_server_answer_redirect_and_change_heads() {
    let text_of = |text: &str| {
        Some(DataSource { specifier: Some(Specifier::InlineString(text.into())), ..DataSource::default() })
    };
    let direct =
        DirectResponseAction { status: 418, body: text_of("short and stout"), ..DirectResponseAction::default() };
    let redirect = RedirectAction {
        path_rewrite_specifier: Some(PathRewriteSpecifier::PathRedirect("/new".into())),
        ..RedirectAction::default()
    };
    let mut changed = serve("/");
    changed.response_headers_to_add = vec![set("x-route", "%ROUTE_NAME%"), set("x-asked", "%REQ(x-added)%")];
    changed.response_headers_to_remove = vec!["x-method".into()];
    changed.request_headers_to_add = vec![set("x-added", "here")];
    let routes =
        vec![route("/tea", Action::DirectResponse(direct)), route("/old", Action::Redirect(redirect)), changed];
    let (_pair, mut client) = server(&[], routes).await;

    let answer = client.send_request(post("/tea", "")).await.unwrap();
    assert_eq!((answer.status().as_u16(), says(&answer, "x-host"), says(&answer, "x-path")), (418, "added", ""));
    assert_eq!(text(answer).await, "short and stout");
    let answer = client.send_request(post("/old?a=b", "")).await.unwrap();
    assert_eq!((answer.status().as_u16(), says(&answer, "location")), (301, "http://x.test/new?a=b"));
    let answer = client.send_request(post("/echo", "this")).await.unwrap();
    let said = ["x-host", "x-route", "x-asked", "x-method", "x-path"].map(|name| says(&answer, name).to_owned());
    assert_eq!(said, ["added", "route /", "here", "", "/echo"]);
    assert_eq!(text(answer).await, "this");
}

#[tokio::test]
async fn requests_are_buffered_up_to_a_limit_before_they_are_served() {
    let buffer = pack_any(Buffer { max_request_bytes: Some(UInt32Value { value: 10 }) });
    let (_pair, mut client) = server(&[("buffer", buffer)], vec![serve("/")]).await;
    let answer = client.send_request(post("/", "ten bytes!")).await.unwrap();
    assert_eq!((answer.status(), text(answer).await.as_str()), (StatusCode::OK, "ten bytes!"));
    let answer = client.send_request(post("/", "eleven byte")).await.unwrap();
    assert_eq!((answer.status(), says(&answer, "x-path")), (StatusCode::PAYLOAD_TOO_LARGE, ""));
}

#[tokio::test]
async fn requests_take_no_longer_than_their_route_lets_them() {
    let limited = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster("inbound|80||".into())),
        max_stream_duration: Some(MaxStreamDuration {
            max_stream_duration: Some(ProtoDuration { seconds: 0, nanos: 50_000_000 }),
            ..MaxStreamDuration::default()
        }),
        ..RouteAction::default()
    };
    let (_pair, mut client) = server(&[], vec![route("/", Action::Route(limited))]).await;
    let answer = timeout(GUARD, client.send_request(post("/hang", ""))).await.expect("it ends").unwrap();
    assert_eq!((answer.status(), says(&answer, "x-host")), (StatusCode::GATEWAY_TIMEOUT, ""), "it is our own");
    assert_eq!(client.send_request(post("/deaf", "")).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn a_fault_filter_lets_answers_through_at_its_rate() {
    const RATE: usize = 4 << 10;
    let limit = FaultRateLimit {
        percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
        limit_type: Some(fault_rate_limit::LimitType::FixedLimit(fault_rate_limit::FixedLimit { limit_kbps: 4 })),
    };
    let fault = pack_any(HttpFault { response_rate_limit: Some(limit), ..HttpFault::default() });
    let (_pair, mut client) = server(&[("fault", fault)], vec![serve("/")]).await;
    let begin = Instant::now();
    let body = "x".repeat(RATE / 2);
    let answer = client.send_request(post("/", body.clone())).await.unwrap();
    assert_eq!(text(answer).await, body);
    assert!(begin.elapsed() > Duration::from_millis(300), "half a second's worth: {:?}", begin.elapsed());
}
