//! The local rate limit filter.

use crate::{
    filters::{add_filter, anything, edit_routes, packed, plane, refused},
    support::{
        TARGET, assert_says,
        echo::{Echo, Way, get, joined},
        hello, mesh_on, until,
    },
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{HeaderValue, HeaderValueOption, RuntimeFractionalPercent},
            route::v3::{
                RateLimit,
                rate_limit::{
                    Action,
                    action::{ActionSpecifier, GenericKey, RequestHeaders},
                },
                route,
            },
        },
        extensions::{
            common::ratelimit::v3::{LocalRateLimitDescriptor, rate_limit_descriptor::Entry},
            filters::http::local_ratelimit::v3::LocalRateLimit,
        },
        r#type::v3::{FractionalPercent, HttpStatus, TokenBucket},
    },
    google::protobuf::{BoolValue, Duration as ProtoDuration, UInt32Value},
};
use http::StatusCode;
use mesh_client::Explain;
use tonic::Code;

pub(crate) fn share(percent: u32) -> Option<RuntimeFractionalPercent> {
    let default_value = Some(FractionalPercent { numerator: percent, denominator: 0 });
    Some(RuntimeFractionalPercent { default_value, ..RuntimeFractionalPercent::default() })
}

/// This many tokens, and no more for an hour.
fn bucket(max_tokens: u32) -> Option<TokenBucket> {
    Some(TokenBucket {
        max_tokens,
        tokens_per_fill: Some(UInt32Value { value: 1 }),
        fill_interval: Some(ProtoDuration { seconds: 3600, nanos: 0 }),
    })
}

fn header(key: &str, value: &str) -> HeaderValueOption {
    let header = Some(HeaderValue { key: key.into(), value: value.into(), ..HeaderValue::default() });
    HeaderValueOption { header, ..HeaderValueOption::default() }
}

pub(crate) fn limit(tokens: u32) -> LocalRateLimit {
    LocalRateLimit {
        stat_prefix: "test".into(),
        token_bucket: bucket(tokens),
        filter_enabled: share(100),
        filter_enforced: share(100),
        ..LocalRateLimit::default()
    }
}

pub(crate) fn action(specifier: ActionSpecifier) -> Action {
    Action { action_specifier: Some(specifier) }
}

/// One descriptor: `plan` from a header, after a fixed key.
pub(crate) fn by_plan() -> RateLimit {
    let fixed = GenericKey { descriptor_value: "api".into(), ..GenericKey::default() };
    let plan = RequestHeaders { header_name: "x-plan".into(), descriptor_key: "plan".into(), skip_if_absent: false };
    RateLimit {
        actions: vec![action(ActionSpecifier::GenericKey(fixed)), action(ActionSpecifier::RequestHeaders(plan))],
        ..RateLimit::default()
    }
}

#[tokio::test]
async fn requests_over_the_local_limit_are_refused() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let config = LocalRateLimit {
        status: Some(HttpStatus { code: 420 }),
        response_headers_to_add: vec![header("x-why", "limit of %REQ(:path)%")],
        enable_x_ratelimit_headers: 1,
        ..limit(2)
    };
    add_filter(&cp, "limit", packed(&config), false);
    let mesh = mesh_on(&cp).await;
    // The channel and the layer share the listener, and so its bucket.
    let (channel, _layer) = (mesh.channel(TARGET).unwrap(), mesh.layer());
    channel.ready(crate::support::GUARD).await.unwrap();
    let ok = Way::Channel.send(&mesh, get("/a"), "").await.unwrap();
    assert_eq!(ok.status(), StatusCode::OK);
    assert_eq!(joined(ok.headers(), "x-ratelimit-limit"), "2");
    assert_eq!(joined(ok.headers(), "x-ratelimit-remaining"), "1");
    assert_eq!(Way::Channel.send(&mesh, get("/a"), "").await.unwrap().status(), StatusCode::OK);
    let explain = Explain::default();
    let mut request = get("/a");
    request.extensions_mut().unwrap().insert(explain.clone());
    let over = Way::Channel.send(&mesh, request, "").await.unwrap();
    assert_eq!((over.status().as_u16(), &over.body()[..]), (420, &b"local_rate_limited"[..]));
    assert_eq!(joined(over.headers(), "x-envoy-ratelimited"), "true");
    assert_eq!(joined(over.headers(), "x-why"), "limit of /a");
    assert_eq!(joined(over.headers(), "x-ratelimit-remaining"), "0");
    assert!(joined(over.headers(), "x-ratelimit-reset").parse::<u64>().unwrap() > 3000);
    assert_says(&explain.to_string(), &["`limit` answered with gRPC status 14 / HTTP 420"]);
    let status = hello(&channel).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "local_rate_limited"));
    assert_eq!(backend.seen().len(), 2);

    // What is counted outlives a change of something else, and not a change of the limit.
    edit_routes(&cp, |r| r.virtual_hosts[0].routes[0].name = "other".into());
    let name = || mesh.explain(&get("/").body(()).unwrap().into_parts().0).to_string();
    until("the change is in force", async || name().contains("`other`")).await;
    assert_eq!(Way::Channel.send(&mesh, get("/a"), "").await.unwrap().status().as_u16(), 420);
    let config = LocalRateLimit { rate_limited_as_resource_exhausted: true, ..limit(1) };
    add_filter(&cp, "limit", packed(&config), false);
    until("the change is in force", async || {
        hello(&channel).await.is_err_and(|status| status.code() == Code::ResourceExhausted)
    })
    .await;
    let over = Way::Channel.send(&mesh, get("/a"), "").await.unwrap();
    assert_eq!(over.status(), StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn a_limit_that_is_not_enforced_marks_requests_and_one_not_enabled_does_nothing() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let marks = vec![header("x-over", "yes")];
    let config =
        LocalRateLimit { filter_enforced: share(0), request_headers_to_add_when_not_enforced: marks, ..limit(1) };
    add_filter(&cp, "limit", packed(&config), false);
    let mesh = mesh_on(&cp).await;
    let _held = mesh.layer();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(crate::support::GUARD).await.unwrap();
    for expected in ["", "yes", "yes"] {
        Way::Channel.send(&mesh, get("/"), "").await.unwrap();
        assert_eq!(backend.last().header("x-over"), expected);
    }
    let cp = plane(&anything(), &backend).await;
    add_filter(&cp, "limit", packed(&LocalRateLimit { filter_enabled: None, ..limit(1) }), false);
    let mesh = mesh_on(&cp).await;
    for _ in 0..3 {
        assert_eq!(Way::Layer.send(&mesh, get("/"), "").await.unwrap().status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn descriptors_have_buckets_of_their_own() {
    for way in Way::BOTH {
        let backend = Echo::start("v1").await;
        let cp = plane(&anything(), &backend).await;
        let entry = |key: &str, value: &str| Entry { key: key.into(), value: value.into() };
        let descriptor = |plan: &str, tokens| LocalRateLimitDescriptor {
            entries: vec![entry("generic_key", "api"), entry("plan", plan)],
            token_bucket: bucket(tokens),
            shadow_mode: false,
        };
        let config = LocalRateLimit {
            descriptors: vec![descriptor("gold", 3), descriptor("", 1)],
            always_consume_default_token_bucket: Some(BoolValue { value: false }),
            ..limit(2)
        };
        edit_routes(&cp, |r| {
            let Some(route::Action::Route(action)) = &mut r.virtual_hosts[0].routes[0].action else { panic!() };
            action.rate_limits = vec![by_plan()];
            r.virtual_hosts[0].routes[0].typed_per_filter_config.insert("limit".into(), packed(&config));
        });
        add_filter(
            &cp,
            "limit",
            packed(&LocalRateLimit { stat_prefix: "off".into(), ..LocalRateLimit::default() }),
            false,
        );
        let mesh = mesh_on(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        channel.ready(crate::support::GUARD).await.unwrap();
        let passed = async |plan: Option<&str>| {
            let mut passed = 0;
            for _ in 0..6 {
                let request = plan.map_or_else(|| get("/"), |plan| get("/").header("x-plan", plan));
                passed += u32::from(way.send(&mesh, request, "").await.unwrap().status() == StatusCode::OK);
            }
            passed
        };
        assert_eq!(passed(Some("gold")).await, 3);
        assert_eq!(passed(Some("a")).await, 1);
        assert_eq!(passed(Some("b")).await, 1, "each value has its own");
        assert_eq!(passed(None).await, 2, "no descriptor: the general one");
    }
}

#[tokio::test]
async fn bad_limits_are_refused_by_their_path() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    let mut config = limit(1);
    config.token_bucket.as_mut().unwrap().fill_interval = Some(ProtoDuration { seconds: 0, nanos: 49_000_000 });
    add_filter(&cp, "limit", packed(&config), false);
    let said = refused(&mesh, "Listener").await;
    assert_says(&said, &["http_filters[1].typed_config.token_bucket.fill_interval", "less than 50 ms"]);
    let config = LocalRateLimit { token_bucket: None, ..limit(1) };
    edit_routes(&cp, |r| drop(r.virtual_hosts[0].typed_per_filter_config.insert("limit".into(), packed(&config))));
    add_filter(&cp, "limit", packed(&config), false);
    let said = refused(&mesh, "RouteConfiguration").await;
    assert_says(&said, &[r#"typed_per_filter_config["limit"].token_bucket: is missing"#]);
    edit_routes(&cp, |r| {
        r.virtual_hosts[0].typed_per_filter_config.clear();
        r.virtual_hosts[0].rate_limits = vec![RateLimit { stage: Some(UInt32Value { value: 11 }), ..by_plan() }];
    });
    until("the stage is refused", async || {
        refused(&mesh, "RouteConfiguration")
            .await
            .contains("virtual_hosts[0].rate_limits[0].stage: 11 is not in 0..=10")
    })
    .await;
}
