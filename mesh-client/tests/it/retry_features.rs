//! What a retry policy can say beside its conditions: headers, hosts, priorities, back-off, counts, budgets, hooks.

use crate::{
    aggregates::{aggregate, leaf_with},
    support::{
        CLUSTER, H2Server, Served, TARGET, Then, assignment,
        echo::{Way, get, joined},
        edit, routes, service, to,
    },
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{Cluster, cluster::LbPolicy},
                core::v3::{HealthStatus, Metadata},
                endpoint::v3::ClusterLoadAssignment,
                route::v3::{
                    HeaderMatcher, RetryPolicy, RouteConfiguration, VirtualHost,
                    header_matcher::HeaderMatchSpecifier,
                    retry_policy::{
                        RateLimitedRetryBackOff, ResetHeader, ResetHeaderFormat, RetryHostPredicate, RetryPriority,
                        retry_host_predicate, retry_priority,
                    },
                    route,
                },
            },
            extensions::retry::{
                host::{
                    omit_canary_hosts::v3::OmitCanaryHostsPredicate, omit_host_metadata::v3::OmitHostMetadataConfig,
                },
                priority::previous_priorities::v3::PreviousPrioritiesConfig,
            },
        },
        google::protobuf::{Any, Duration as ProtoDuration, Struct, Value, value::Kind},
    },
    util::pack_any,
};
use http::{HeaderMap, Response};
use mesh_client::{
    Mesh, MeshBuilder, Profile,
    retry::{HookOutcome, HookVerdict, RetryBudget},
};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tonic::Code;

/// A control plane with one route whose retry policy, and what surrounds it, were edited so.
async fn control_plane(
    endpoints: &[SocketAddr],
    conditions: &str,
    change: impl FnOnce(&mut RetryPolicy, &mut Around),
) -> ControlPlane {
    let retries = format!("{{attempts: 2, retryOn: \"{conditions}\", backoff: 1ms}}");
    let http = format!("[{{route: [{{destination: {}}}], retries: {retries}}}]", to(""));
    let endpoints: Vec<_> = endpoints.iter().map(|addr| ("one", *addr)).collect();
    let cp = ControlPlane::builder().yaml(service(&endpoints) + &routes(&http)).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let mut around = Around::default();
        let host = &mut config.virtual_hosts[0];
        let Some(route::Action::Route(action)) = &mut host.routes[0].action else { panic!() };
        change(action.retry_policy.as_mut().unwrap(), &mut around);
        if let Some(edit) = around.host {
            edit(host);
        }
    });
    cp
}

/// What surrounds the retry policy.
#[derive(Default)]
struct Around {
    host: Option<fn(&mut VirtualHost)>,
}

fn builder(cp: &ControlPlane, profile: Profile) -> MeshBuilder {
    Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(profile)
}

async fn envoy(cp: &ControlPlane) -> Mesh {
    builder(cp, Profile::Envoy).build().await.unwrap()
}

/// The heads of all requests so far.
type Seen = Arc<Mutex<Vec<HeaderMap>>>;

/// A server that keeps the heads of its requests; `answer` gets the number of each.
async fn server(answer: impl Fn(usize, Served) + Send + Sync + 'static) -> (H2Server, Seen) {
    let seen = Seen::default();
    let log = seen.clone();
    let server = H2Server::start(move |served| {
        let number = {
            let mut log = log.lock().unwrap();
            log.push(served.request.headers().clone());
            log.len() - 1
        };
        answer(number, served);
        Then::GoOn
    })
    .await;
    (server, seen)
}

/// A response without a body, with these headers.
fn respond(mut served: Served, status: u16, headers: &[(&'static str, &'static str)]) {
    let mut head = Response::builder().status(status);
    for (name, value) in headers {
        head = head.header(*name, *value);
    }
    served.respond.send_response(head.body(()).unwrap(), true).unwrap();
}

fn present(name: &str) -> HeaderMatcher {
    HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
        ..HeaderMatcher::default()
    }
}

#[tokio::test]
async fn headers_of_responses_and_requests_decide_too() {
    let (server, seen) = server(|number, served| match number % 2 {
        0 => respond(served, 200, &[("x-again", "1")]),
        _ => respond(served, 200, &[]),
    })
    .await;
    let cp = control_plane(&[server.addr()], "retriable-headers", |policy, _| {
        policy.retriable_headers = vec![present("x-again")];
        policy.retriable_request_headers = vec![present("x-idempotent")];
    })
    .await;
    let mesh = envoy(&cp).await;
    for way in Way::BOTH {
        seen.lock().unwrap().clear();
        let response = way.send(&mesh, get("/").header("x-idempotent", "1"), "").await.unwrap();
        assert_eq!((joined(response.headers(), "x-again").as_str(), seen.lock().unwrap().len()), ("", 2), "{way:?}");
        let response = way.send(&mesh, get("/"), "").await.unwrap();
        assert_eq!((joined(response.headers(), "x-again").as_str(), seen.lock().unwrap().len()), ("1", 3), "{way:?}");
    }
}

#[tokio::test]
async fn the_server_says_when_a_rate_limit_ends() {
    for way in Way::BOTH {
        let (server, seen) = server(|number, served| match number {
            0 => respond(served, 503, &[("x-reset", "never"), ("retry-after", "1")]),
            _ => respond(served, 200, &[]),
        })
        .await;
        let cp = control_plane(&[server.addr()], "5xx", |policy, _| {
            let hour = Some(ProtoDuration { seconds: 3600, nanos: 0 });
            policy.retry_back_off.as_mut().unwrap().base_interval = hour;
            let header =
                |name: &str, format: ResetHeaderFormat| ResetHeader { name: name.into(), format: format.into() };
            policy.rate_limited_retry_back_off = Some(RateLimitedRetryBackOff {
                reset_headers: vec![
                    header("x-reset", ResetHeaderFormat::UnixTimestamp),
                    header("Retry-After", ResetHeaderFormat::Seconds),
                ],
                max_interval: None,
            });
        })
        .await;
        let begun = tokio::time::Instant::now();
        assert_eq!(way.send(&envoy(&cp).await, get("/"), "").await.unwrap().status(), 200);
        assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
        assert_eq!(seen.lock().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn what_a_rate_limit_refused_is_retried_only_where_the_policy_says_so() {
    for way in Way::BOTH {
        for (conditions, attempts) in [("5xx", 1), ("envoy-ratelimited", 3), ("5xx,envoy-ratelimited", 3)] {
            let (server, seen) = server(|_, served| respond(served, 503, &[("x-envoy-ratelimited", "true")])).await;
            let cp = control_plane(&[server.addr()], conditions, |_, _| {}).await;
            assert_eq!(way.send(&envoy(&cp).await, get("/"), "").await.unwrap().status(), 503);
            assert_eq!(seen.lock().unwrap().len(), attempts, "{conditions}");
        }
    }
}

#[tokio::test]
async fn both_sides_are_told_how_often_a_request_was_tried() {
    let (server, seen) = server(|number, served| respond(served, if number % 2 == 0 { 503 } else { 200 }, &[])).await;
    let cp = control_plane(&[server.addr()], "5xx", |_, around| {
        around.host = Some(|host| {
            assert!(host.include_request_attempt_count, "as Istio does");
            host.include_attempt_count_in_response = true;
        });
    })
    .await;
    let mesh = envoy(&cp).await;
    for way in Way::BOTH {
        seen.lock().unwrap().clear();
        let response = way.send(&mesh, get("/"), "").await.unwrap();
        assert_eq!(joined(response.headers(), "x-envoy-attempt-count"), "2");
        let counts: Vec<_> = seen.lock().unwrap().iter().map(|head| joined(head, "x-envoy-attempt-count")).collect();
        assert_eq!(counts, ["1", "2"], "{way:?}");
    }
}

#[tokio::test]
async fn every_attempt_has_a_span_id_of_its_own_where_child_spans_are_on() {
    for way in Way::BOTH {
        const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let (server, seen) = server(|number, served| respond(served, if number == 0 { 503 } else { 200 }, &[])).await;
        let cp = control_plane(&[server.addr()], "5xx", |_, _| {}).await;
        let propagation = mesh_client::trace::Propagation::default().child_spans(true);
        let mesh = builder(&cp, Profile::Envoy).trace(propagation).build().await.unwrap();
        way.send(&mesh, get("/").header("traceparent", PARENT), "").await.unwrap();
        let parents: Vec<_> = seen.lock().unwrap().iter().map(|head| joined(head, "traceparent")).collect();
        let [first, second] = &parents[..] else { panic!("{parents:?}") };
        assert!(first.starts_with(&PARENT[..36]) && second.starts_with(&PARENT[..36]), "{parents:?}");
        assert!(first != PARENT && second != PARENT && first != second, "{parents:?}");
    }
}

#[tokio::test]
async fn a_retry_after_a_timeout_says_so() {
    for way in Way::BOTH {
        let held = Mutex::new(Vec::new());
        let (server, seen) = server(move |number, served| match number {
            0 => held.lock().unwrap().push(served),
            _ => respond(served, 200, &[]),
        })
        .await;
        let cp = control_plane(&[server.addr()], "reset", |policy, around| {
            policy.per_try_timeout = Some(ProtoDuration { seconds: 0, nanos: 100_000_000 });
            around.host = Some(|host| host.include_is_timeout_retry_header = true);
        })
        .await;
        assert_eq!(way.send(&envoy(&cp).await, get("/"), "").await.unwrap().status(), 200);
        let said: Vec<_> = seen.lock().unwrap().iter().map(|head| joined(head, "x-envoy-is-timeout-retry")).collect();
        assert_eq!(said, ["", "true"], "{way:?}");
    }
}

#[tokio::test]
async fn grpc_tells_the_server_of_previous_attempts() {
    for way in Way::BOTH {
        let (server, seen) = server(|number, served| match number {
            0 | 1 => served.fail(14, &[]),
            _ => served.ok(),
        })
        .await;
        let cp = control_plane(&[server.addr()], "unavailable", |_, _| {}).await;
        let mesh = builder(&cp, Profile::Grpc).build().await.unwrap();
        way.hello(&mesh).await.unwrap();
        let said: Vec<_> = seen.lock().unwrap().iter().map(|head| joined(head, "grpc-previous-rpc-attempts")).collect();
        assert_eq!(said, ["", "1", "2"], "{way:?}");
    }
}

#[tokio::test]
async fn trailers_right_behind_the_head_are_retried_and_a_message_commits() {
    let trailers = |mut served: Served, message: bool| {
        let mut body = if message {
            served.begin()
        } else {
            let head = Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            served.respond.send_response(head, false).unwrap()
        };
        body.send_trailers([("grpc-status".parse().unwrap(), "14".parse().unwrap())].into_iter().collect()).unwrap();
    };
    for (message, way) in [false, true].into_iter().flat_map(|message| Way::BOTH.map(|way| (message, way))) {
        let (server, seen) = server(move |number, served| match number {
            0 => trailers(served, message),
            _ => served.ok(),
        })
        .await;
        let cp = control_plane(&[server.addr()], "unavailable", |_, _| {}).await;
        let mesh = builder(&cp, Profile::Grpc).build().await.unwrap();
        let code = way.hello(&mesh).await.map_or_else(|status| status.code(), |_| Code::Ok);
        let attempts = seen.lock().unwrap().len();
        assert_eq!((code, attempts), if message { (Code::Unavailable, 1) } else { (Code::Ok, 2) }, "{way:?}");
    }
}

/// Serves this status, with its name as `x-backend`.
async fn named(name: &'static str, status: u16) -> (H2Server, Seen) {
    server(move |_, served| respond(served, status, &[("x-backend", name)])).await
}

/// Retries stay away from the endpoint whose `envoy.lb` metadata is this, by this predicate; first attempts do not.
async fn retries_omit(metadata: &[(&str, Kind)], predicate: Any) {
    let (bad, omitted, good) = (named("bad", 503).await, named("omitted", 200).await, named("good", 200).await);
    let addrs = [bad.0.addr(), omitted.0.addr(), good.0.addr()];
    let cp = control_plane(&addrs, "5xx", |policy, _| {
        let config_type = Some(retry_host_predicate::ConfigType::TypedConfig(predicate));
        policy.retry_host_predicate.push(RetryHostPredicate { name: "omit".into(), config_type });
    })
    .await;
    edit::<ClusterLoadAssignment>(&cp, ResourceType::ClusterLoadAssignment, CLUSTER, |assignment| {
        for endpoint in assignment.endpoints.iter_mut().flat_map(|locality| &mut locality.lb_endpoints) {
            if format!("{endpoint:?}").contains(&format!("PortValue({})", addrs[1].port())) {
                endpoint.metadata = Some(lb(metadata));
            }
        }
    });
    // Taken in turn, each call that begins at the bad one would have the next begin there too.
    edit::<Cluster>(&cp, ResourceType::Cluster, CLUSTER, |cluster| cluster.lb_policy = LbPolicy::Random.into());
    let mesh = envoy(&cp).await;
    for call in 0..60 {
        assert_eq!(Way::BOTH[call % 2].send(&mesh, get("/"), "").await.unwrap().status(), 200);
    }
    let counts = |seen: &Seen, count: &str| {
        seen.lock().unwrap().iter().filter(|head| joined(head, "x-envoy-attempt-count") == count).count()
    };
    assert!(counts(&omitted.1, "1") > 5, "first attempts go anywhere");
    assert_eq!(counts(&omitted.1, "2"), 0);
    assert_eq!(counts(&good.1, "2"), bad.1.lock().unwrap().len());
}

/// `filter_metadata["envoy.lb"]`
fn lb(entries: &[(&str, Kind)]) -> Metadata {
    let value = |(key, kind): &(&str, Kind)| ((*key).to_owned(), Value { kind: Some(kind.clone()) });
    let fields = Struct { fields: entries.iter().map(value).collect() };
    Metadata { filter_metadata: [("envoy.lb".to_owned(), fields)].into(), ..Metadata::default() }
}

#[tokio::test]
async fn retries_stay_away_from_canaries() {
    retries_omit(&[("canary", Kind::BoolValue(true))], pack_any(OmitCanaryHostsPredicate {})).await;
}

#[tokio::test]
async fn retries_stay_away_from_hosts_with_the_metadata_they_are_told() {
    let [stage, rack] = [("stage", "old"), ("rack", "7")].map(|(key, text)| (key, Kind::StringValue(text.to_owned())));
    let omit = OmitHostMetadataConfig { metadata_match: Some(lb(std::slice::from_ref(&stage))) };
    retries_omit(&[stage, rack], pack_any(omit)).await;
}

#[tokio::test]
async fn retries_leave_the_priorities_that_failed() {
    let (first, second, lower) = (named("first", 503).await, named("second", 503).await, named("lower", 200).await);
    let addrs = [first.0.addr(), second.0.addr(), lower.0.addr()];
    for frequency in [0, 1, 2] {
        let cp = control_plane(&addrs, "5xx", |policy, _| {
            policy.retry_host_predicate.clear();
            if frequency > 0 {
                let any = pack_any(PreviousPrioritiesConfig { update_frequency: frequency });
                let config_type = Some(retry_priority::ConfigType::TypedConfig(any));
                policy.retry_priority = Some(RetryPriority { name: "previous".into(), config_type });
            }
        })
        .await;
        edit::<ClusterLoadAssignment>(&cp, ResourceType::ClusterLoadAssignment, CLUSTER, |current| {
            *current = assignment(&[&addrs[..2], &addrs[2..]], HealthStatus::Unknown);
        });
        let mesh = envoy(&cp).await;
        let expected = match frequency {
            0 => (503, 3),
            1 => (200, 1),
            _ => (200, 2),
        };
        for way in Way::BOTH {
            let before: usize = [&first, &second].iter().map(|server| server.1.lock().unwrap().len()).sum();
            let status = way.send(&mesh, get("/"), "").await.unwrap().status().as_u16();
            let after: usize = [&first, &second].iter().map(|server| server.1.lock().unwrap().len()).sum();
            assert_eq!((status, after - before), expected, "every {frequency}, {way:?}");
        }
    }
}

/// Retries leave the priorities of all attempts before behind.
fn leave_each(policy: &mut RetryPolicy) {
    policy.retry_host_predicate.clear();
    let config_type =
        Some(retry_priority::ConfigType::TypedConfig(pack_any(PreviousPrioritiesConfig { update_frequency: 1 })));
    policy.retry_priority = Some(RetryPriority { name: "previous".into(), config_type });
}

#[tokio::test]
async fn retries_share_what_is_left_of_the_priorities_by_their_health() {
    let (bad, half, rest) = (named("bad", 503).await, named("half", 200).await, named("rest", 200).await);
    let addrs = [bad.0.addr(), half.0.addr(), rest.0.addr()];
    let cp = control_plane(&addrs, "5xx", |policy, _| leave_each(policy)).await;
    edit::<ClusterLoadAssignment>(&cp, ResourceType::ClusterLoadAssignment, CLUSTER, |current| {
        // Nothing is ever sent to the second endpoint of the second priority: it is unhealthy.
        *current =
            assignment(&[&addrs[..1], &[addrs[1], "127.0.0.1:9".parse().unwrap()], &addrs[2..]], HealthStatus::Unknown);
        current.endpoints[1].lb_endpoints[1].health_status = HealthStatus::Unhealthy.into();
    });
    let mesh = envoy(&cp).await;
    for call in 0..100 {
        assert_eq!(Way::BOTH[call % 2].send(&mesh, get("/"), "").await.unwrap().status(), 200);
    }
    let [bad, half, rest] = [&bad, &half, &rest].map(|server| server.1.lock().unwrap().len());
    // Half of the endpoints times 1.4 cover 70 %; what they do not cover goes to the third priority.
    assert_eq!((bad, half + rest), (100, 100));
    assert!((50..=88).contains(&half), "{half} and {rest}");
}

#[tokio::test]
async fn retries_leave_the_clusters_of_an_aggregate_that_failed() {
    let (bad, good) = (named("bad", 503).await, named("good", 200).await);
    let cp = control_plane(&[bad.0.addr()], "5xx", |policy, _| leave_each(policy)).await;
    let served = cp.cache().resources().get(ResourceType::Cluster, CLUSTER).unwrap().clone();
    let served: Cluster = prost::Message::decode(&*served.value).unwrap();
    for (name, server) in [("first", &bad), ("second", &good)] {
        leaf_with(&cp, name, assignment(&[&[server.0.addr()]], HealthStatus::Healthy), |cluster| {
            cluster.typed_extension_protocol_options = served.typed_extension_protocol_options.clone();
        });
    }
    aggregate(&cp, CLUSTER, &["first", "second"]);
    let mesh = envoy(&cp).await;
    for way in Way::BOTH {
        let response = way.send(&mesh, get("/"), "").await.unwrap();
        assert_eq!((response.status().as_u16(), &*joined(response.headers(), "x-backend")), (200, "good"));
    }
    assert_eq!(bad.1.lock().unwrap().len(), 2, "each call began with the first");
}

#[tokio::test]
async fn the_application_decides_by_its_own_hook() {
    let (server, seen) = server(|number, served| match number {
        0 => respond(served, 404, &[("x-try", "again")]),
        1 => respond(served, 200, &[]),
        _ => respond(served, 503, &[]),
    })
    .await;
    let cp = control_plane(&[server.addr()], "5xx", |_, _| {}).await;
    let hook = |outcome: &HookOutcome<'_>| match outcome.response {
        Some((_, headers)) if headers.contains_key("x-try") => HookVerdict::Retry,
        Some((status, _)) if status == 503 => HookVerdict::Return,
        _ => HookVerdict::Default,
    };
    let mesh = builder(&cp, Profile::Envoy).retry_hook(hook).build().await.unwrap();
    assert_eq!(Way::Channel.send(&mesh, get("/"), "").await.unwrap().status(), 200);
    assert_eq!(seen.lock().unwrap().len(), 2);
    assert_eq!(Way::Layer.send(&mesh, get("/"), "").await.unwrap().status(), 503);
    assert_eq!(seen.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn budgets_of_linkerd_and_of_grpc_hold_for_each_cluster() {
    let cases = [
        // Four tokens: nothing is retried at two. The first call fails twice, all later ones once.
        (RetryBudget::throttle(4, 0.0), 10, 11),
        // Three retries in hand for as long as the test takes, and none for the calls.
        (RetryBudget::ratio(0.0, 1, Duration::from_secs(3)), 2, 5),
        // One more for every second call.
        (RetryBudget::ratio(0.5, 0, Duration::from_secs(300)), 10, 15),
    ];
    for (budget, calls, attempts) in cases {
        let (server, seen) = server(|_, served| served.fail(14, &[])).await;
        let cp = control_plane(&[server.addr()], "unavailable", |_, _| {}).await;
        let said = format!("{budget:?}");
        let mesh = builder(&cp, Profile::Grpc).retry_budget(budget).build().await.unwrap();
        let _channel = mesh.channel(TARGET).unwrap();
        for call in 0..calls {
            let status = Way::BOTH[call % 2].hello(&mesh).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
        }
        assert_eq!(seen.lock().unwrap().len(), attempts, "{said}");
    }
}
