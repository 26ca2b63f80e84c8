//! Buffer, admission control and adaptive concurrency; filters as layers.

use crate::{
    filters::{add_filter, anything, edit_routes, packed, plane, refused},
    support::{
        GUARD, HOUR, TARGET, assert_says,
        echo::{Echo, Way, get},
        greeter, hello, hello_with, http_backend, mesh_on, routes, rule, service, to, until,
    },
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::core::v3::RuntimePercent,
        extensions::filters::http::{
            adaptive_concurrency::v3::{
                AdaptiveConcurrency, GradientControllerConfig,
                adaptive_concurrency::ConcurrencyControllerConfig,
                gradient_controller_config::{ConcurrencyLimitCalculationParams, MinimumRttCalculationParams},
            },
            admission_control::v3::{
                AdmissionControl,
                admission_control::{EvaluationCriteria, SuccessCriteria, success_criteria::GrpcCriteria},
            },
            buffer::v3::{Buffer, BufferPerRoute, buffer_per_route::Override},
        },
        r#type::v3::Percent,
    },
    google::protobuf::{Duration as ProtoDuration, UInt32Value},
};
use futures::{StreamExt, stream};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use mesh_client::filter::{
    Denominator, FaultConfig, FaultDelay, FaultLayer, FaultRateLimit, FractionalPercent, RateLimitLayer,
};
use mesh_control::ControlPlane;
use std::{convert::Infallible, time::Duration};
use tokio::time::Instant;
use tonic::Code;
use tower::{Service, ServiceBuilder, ServiceExt};

fn buffer(max: u32) -> Buffer {
    Buffer { max_request_bytes: Some(UInt32Value { value: max }) }
}

#[tokio::test]
async fn bodies_above_the_buffer_are_refused_and_others_sent_whole() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    add_filter(&cp, "buffer", packed(&buffer(1000)), false);
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        let chunks = |count: usize| {
            let chunk = || Ok::<_, Infallible>(http_body::Frame::data(Bytes::from_static(&[0; 100])));
            StreamBody::new(stream::iter((0..count).map(move |_| chunk())))
        };
        let response = way.send_body(&mesh, get("/"), chunks(10)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let seen = backend.seen().len();
        let response = way.send_body(&mesh, get("/"), chunks(11)).await.unwrap();
        assert_eq!((response.status().as_u16(), &response.body()[..]), (413, &b"Payload Too Large"[..]), "{way:?}");
        let response = way.send(&mesh, get("/"), include_str!("filters_overload.rs")).await.unwrap();
        assert_eq!((response.status().as_u16(), backend.seen().len()), (413, seen));
    }
    let status = hello_with(&channel, |r| r.get_mut().name = "x".repeat(2000)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);

    let off = BufferPerRoute { r#override: Some(Override::Disabled(true)) };
    edit_routes(&cp, |r| drop(r.virtual_hosts[0].typed_per_filter_config.insert("buffer".into(), packed(&off))));
    until("the route has no limit", async || {
        let large = include_str!("filters_overload.rs");
        Way::Channel.send(&mesh, get("/"), large).await.unwrap().status() == StatusCode::OK
    })
    .await;
    add_filter(&cp, "buffer", packed(&buffer(0)), false);
    assert_says(
        &refused(&mesh, "Listener").await,
        &["http_filters[1].typed_config.max_request_bytes: must be greater than zero"],
    );
}

fn admission(threshold: f64) -> AdmissionControl {
    let percent = |value| Some(RuntimePercent { default_value: Some(Percent { value }), ..RuntimePercent::default() });
    let grpc_criteria = Some(GrpcCriteria { grpc_success_status: vec![0] });
    AdmissionControl {
        sr_threshold: percent(threshold),
        max_rejection_probability: percent(100.0),
        evaluation_criteria: Some(EvaluationCriteria::SuccessCriteria(SuccessCriteria {
            grpc_criteria,
            http_criteria: None,
        })),
        ..AdmissionControl::default()
    }
}

#[tokio::test]
async fn calls_are_refused_by_chance_while_too_few_succeed() {
    for way in Way::BOTH {
        let backend = greeter("v1").await;
        let route = format!("[{{name: all, route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("v1"));
        let yaml = service(&[("v1", backend.addr())]) + &routes(&route) + &rule("{}", &["v1"]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        add_filter(&cp, "admission", packed(&admission(90.0)), false);
        let mesh = mesh_on(&cp).await;
        let _channel = mesh.channel(TARGET).unwrap();
        for _ in 0..50 {
            way.hello(&mesh).await.unwrap();
        }
        backend.state().set_unavailable(true);
        let mut refused = 0;
        for _ in 0..400 {
            let status = way.hello(&mesh).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            refused += u32::from(status.message() == "denied by admission control");
        }
        assert!((50..400).contains(&refused), "{refused} of 400");
        assert!(backend.state().failed() < 350, "{} reached the backend", backend.state().failed());
        let explain = mesh.explain(&get("/").body(()).unwrap().into_parts().0).to_string();
        assert_says(&explain, &["admission control: 50 of "]);

        let said = {
            add_filter(&cp, "admission", packed(&admission(0.5)), false);
            super::filters::refused(&mesh, "Listener").await
        };
        assert_says(&said, &["http_filters[1].typed_config.sr_threshold", "less than 1 percent"]);
    }
}

fn concurrency() -> AdaptiveConcurrency {
    let gradient = GradientControllerConfig {
        sample_aggregate_percentile: None,
        concurrency_limit_params: Some(ConcurrencyLimitCalculationParams {
            concurrency_update_interval: Some(ProtoDuration { seconds: 0, nanos: 20_000_000 }),
            ..ConcurrencyLimitCalculationParams::default()
        }),
        min_rtt_calc_params: Some(MinimumRttCalculationParams {
            interval: Some(ProtoDuration { seconds: 3600, nanos: 0 }),
            request_count: Some(UInt32Value { value: 5 }),
            ..MinimumRttCalculationParams::default()
        }),
    };
    AdaptiveConcurrency {
        concurrency_controller_config: Some(ConcurrencyControllerConfig::GradientControllerConfig(gradient)),
        ..AdaptiveConcurrency::default()
    }
}

#[tokio::test]
async fn as_many_calls_at_once_as_the_latency_allows() {
    let backend = greeter("v1").await;
    let yaml = service(&[("v1", backend.addr())]) + &routes(&anything()) + &rule("{}", &["v1"]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    add_filter(&cp, "concurrency", packed(&concurrency()), false);
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    // While the least latency is measured, three at once.
    backend.state().set_delay(HOUR);
    let slow: Vec<_> = (0..3)
        .map(|_| {
            let channel = channel.clone();
            tokio::spawn(async move { hello_with(&channel, |r| r.set_timeout(HOUR)).await })
        })
        .collect();
    until("three are in flight", async || backend.state().in_flight() == 3).await;
    let status = hello(&channel).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "reached concurrency limit"));
    let over = Way::Layer.send(&mesh, get("/"), "").await.unwrap();
    assert_eq!((over.status(), &over.body()[..]), (StatusCode::SERVICE_UNAVAILABLE, &b"reached concurrency limit"[..]));
    slow.iter().for_each(tokio::task::JoinHandle::abort);
    until("their places are free", async || {
        let explain = mesh.explain(&get("/").body(()).unwrap().into_parts().0).to_string();
        explain.contains("0 of 3 calls at once")
    })
    .await;
    backend.state().set_delay(Duration::ZERO);
    let limit = || {
        let text = mesh.explain(&get("/").body(()).unwrap().into_parts().0).to_string();
        let rest = text.split("adaptive concurrency: ").nth(1).unwrap().to_owned();
        rest.split_whitespace().nth(2).unwrap().parse::<u32>().unwrap()
    };
    until("the limit grows", async || {
        stream::iter(0..20).for_each_concurrent(3, |_| async { drop(hello(&channel).await) }).await;
        limit() > 6
    })
    .await;

    let mut bad = concurrency();
    let Some(ConcurrencyControllerConfig::GradientControllerConfig(gradient)) = &mut bad.concurrency_controller_config
    else {
        panic!()
    };
    gradient.min_rtt_calc_params.as_mut().unwrap().jitter = Some(Percent { value: 101.0 });
    add_filter(&cp, "concurrency", packed(&bad), false);
    assert_says(
        &refused(&mesh, "Listener").await,
        &["typed_config.gradient_controller_config.min_rtt_calc_params.jitter", "101 is not in 0..=100"],
    );
}

#[tokio::test]
async fn filters_are_layers_around_any_client() {
    let backend = http_backend("plain").await;
    let uri = format!("http://{}/x", backend.addr());
    let hyper = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let limit = RateLimitLayer::new(1, Duration::from_secs(3600)).burst(2);
    let percentage = FractionalPercent::HUNDRED;
    let fault = FaultConfig {
        delay: Some(FaultDelay {
            fixed: Some(Duration::from_millis(20)),
            percentage,
            denominator: Denominator::Hundred,
        }),
        // "hello from plain at /x\n" takes more than one share of 63 bytes in a second.
        response_rate_limit: Some(FaultRateLimit { kbps: Some(1), percentage, denominator: Denominator::Hundred }),
        ..FaultConfig::default()
    };
    let mut client = ServiceBuilder::new().layer(limit).layer(FaultLayer::new(&fault)).service(hyper);
    let started = Instant::now();
    for expected in [200, 200, 429] {
        let request = Request::get(&uri).body(Full::default()).unwrap();
        let response = client.ready().await.unwrap().call(request).await.unwrap();
        assert_eq!(response.status(), expected);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = if expected == 200 { &b"hello from plain at /x\n"[..] } else { b"local_rate_limited" };
        assert_eq!(&body[..], text);
    }
    assert!(started.elapsed() >= Duration::from_millis(40));
    assert_eq!(backend.state().calls(), 2);
}
