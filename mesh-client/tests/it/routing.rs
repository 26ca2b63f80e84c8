//! Where requests go: headers, paths, regular expressions, fractions, weights, priorities and policies.

use crate::support::{
    CLUSTER, TARGET, World, assert_says, assignment, echo::Way, greeter, mesh_on, routes, rule, service, to, until,
};
use envoy_types::{
    pb::envoy::{
        config::{
            core::v3::{HealthStatus, RuntimeFractionalPercent},
            route::v3::RouteConfiguration,
        },
        r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
    },
    util::pack_any,
};
use examples::{backend::Backend, greeter::HelloRequest};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use prost::Message;
use std::collections::BTreeMap;

/// Three greeters with a subset each, and these routes.
async fn three(http: &str) -> (World, [Backend; 3]) {
    let backends = [greeter("v1").await, greeter("v2").await, greeter("v3").await];
    let endpoints = [("v1", backends[0].addr()), ("v2", backends[1].addr()), ("v3", backends[2].addr())];
    let yaml = service(&endpoints) + &routes(http) + &rule("{}", &["v1", "v2", "v3"]);
    (World::new(&yaml).await, backends)
}

/// Each has a connection.
async fn all_connected(world: &World, way: Way, backends: &[Backend]) {
    until("all are connected", async || {
        way.hello(&world.mesh).await.unwrap();
        backends.iter().all(|backend| backend.connections() > 0)
    })
    .await;
}

fn within(count: u32, low: u32, high: u32) {
    assert!((low..=high).contains(&count), "{count} is not in {low}..={high}");
}

#[tokio::test]
async fn headers_choose_the_route() {
    let route = |headers: &str, subset: &str| {
        format!("{{match: [{{headers: {{{headers}}}}}], route: [{{destination: {}}}]}}", to(subset))
    };
    let http = format!(
        "[{}, {}, {}, {}, {{route: [{{destination: {}}}]}}]",
        route("x-exact: {exact: \"yes\"}", "v2"),
        route("x-prefix: {prefix: \"can\"}", "v3"),
        route("x-regex: {regex: \"[a-c]+[0-9]\"}", "v2"),
        route("x-there: {}", "v3"),
        to("v1")
    );
    let (world, _backends) = three(&http).await;
    let cases = [
        ("x-exact", "yes", "v2"),
        ("x-exact", "yes!", "v1"),
        ("x-prefix", "canary", "v3"),
        ("x-prefix", "a-can", "v1"),
        ("x-regex", "abc7", "v2"),
        ("x-regex", "abc77", "v1"),
        ("x-regex", "-abc7", "v1"),
        ("x-there", "", "v3"),
        ("x-other", "1", "v1"),
    ];
    for (name, value, expected) in cases {
        for way in Way::BOTH {
            for _ in 0..3 {
                let reply =
                    way.hello_with(&world.mesh, |r| drop(r.metadata_mut().insert(name, value.parse().unwrap()))).await;
                assert_eq!(reply.unwrap().backend, expected, "{name}: {value}, {way:?}");
            }
        }
    }
}

#[tokio::test]
async fn paths_choose_the_route_and_a_request_without_a_route_says_so() {
    let http = format!(
        "[{{match: [{{uri: {{exact: /helloworld.Greeter/SayHello}}}}], route: [{{destination: {}}}]}}, {{match: [{{uri: \
         {{regex: \"/helloworld[.]Greeter/Say.*s\"}}}}], route: [{{destination: {}}}]}}]",
        to("v1"),
        to("v2")
    );
    let (world, _backends) = three(&http).await;
    for way in Way::BOTH {
        let mut client = way.client(&world.mesh);
        let request = || HelloRequest { name: "x".to_owned(), count: 1 };
        assert_eq!(client.say_hello(request()).await.unwrap().into_inner().backend, "v1");
        let mut replies = client.say_hellos(request()).await.unwrap().into_inner();
        assert_eq!(replies.message().await.unwrap().unwrap().backend, "v2");
        let status = client.chat(futures::stream::empty()).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert_says(
            status.message(),
            &[TARGET, "none of the 2 routes of virtual host", "matches POST /helloworld.Greeter/Chat"],
        );
    }
}

#[tokio::test]
async fn weights_split_and_a_fraction_is_drawn_for_each_request() {
    let http = format!(
        "[{{route: [{{destination: {}, weight: 75}}, {{destination: {}, weight: 25}}, {{destination: {}, weight: 0}}]}}]",
        to("v1"),
        to("v2"),
        to("v3")
    );
    let (world, _backends) = three(&http).await;
    for way in Way::BOTH {
        let seen = way.calls(&world.mesh, 800).await;
        // Six standard deviations.
        within(seen["v1"], 600 - 74, 600 + 74);
        assert_eq!(seen.len(), 2, "{seen:?}");
    }

    let name = CLUSTER.to_owned();
    let served = world.cp.cache().resources().get(ResourceType::RouteConfiguration, &name).unwrap().clone();
    let mut routes = RouteConfiguration::decode(&*served.value).unwrap();
    let list = &mut routes.virtual_hosts[0].routes;
    let only = |cluster: &str| {
        use envoy_types::pb::envoy::config::route::v3::{
            Route, RouteAction, RouteMatch, route, route_action, route_match,
        };
        Route {
            r#match: Some(RouteMatch {
                path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
                ..RouteMatch::default()
            }),
            action: Some(route::Action::Route(RouteAction {
                cluster_specifier: Some(route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
                ..RouteAction::default()
            })),
            ..Route::default()
        }
    };
    let mut half = only(&CLUSTER.replace("||", "|v3|"));
    half.r#match.as_mut().unwrap().runtime_fraction = Some(RuntimeFractionalPercent {
        default_value: Some(FractionalPercent { numerator: 50, denominator: DenominatorType::Hundred.into() }),
        ..RuntimeFractionalPercent::default()
    });
    *list = vec![half, only(&CLUSTER.replace("||", "|v1|"))];
    world.cp.cache().update(ResourceType::RouteConfiguration, name, pack_any(routes));
    for way in Way::BOTH {
        until("the fraction is in force", async || way.calls(&world.mesh, 1).await.contains_key("v3")).await;
        let seen = way.calls(&world.mesh, 400).await;
        within(seen["v3"], 200 - 60, 200 + 60);
        assert_eq!(seen["v3"] + seen["v1"], 400, "{seen:?}");
    }
}

#[tokio::test]
async fn a_lower_priority_takes_over_while_the_higher_cannot_be_reached() {
    let (mut near, far) = (greeter("near").await, greeter("far").await);
    let yaml = service(&[("near", near.addr()), ("far", far.addr())]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let priorities = assignment(&[&[near.addr()], &[far.addr()]], HealthStatus::Healthy);
    cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(priorities));
    for way in Way::BOTH {
        let mesh = mesh_on(&cp).await;
        let all_at =
            async |name: &str, calls| way.calls(&mesh, calls as usize).await == [(name.to_owned(), calls)].into();
        assert!(all_at("near", 20).await);
        near.kill().await;
        until("the lower priority serves", async || all_at("far", 1).await).await;
        assert!(all_at("far", 20).await);
        near.restart().await.unwrap();
        until("the higher priority serves again", async || all_at("near", 1).await).await;
        assert!(all_at("near", 20).await);
    }
}

#[tokio::test]
async fn random_spreads_over_all() {
    let backends = [greeter("a").await, greeter("b").await, greeter("c").await];
    let endpoints = [("a", backends[0].addr()), ("b", backends[1].addr()), ("c", backends[2].addr())];
    let world = World::new(&(service(&endpoints) + &rule("{loadBalancer: {simple: RANDOM}}", &[]))).await;
    for way in Way::BOTH {
        all_connected(&world, way, &backends).await;
        let (mut seen, mut repeats, mut last) = (BTreeMap::<String, u32>::new(), 0, String::new());
        for _ in 0..600 {
            let backend = way.hello(&world.mesh).await.unwrap().backend;
            repeats += u32::from(last == backend);
            *seen.entry(backend.clone()).or_default() += 1;
            last = backend;
        }
        // Six standard deviations. In rotation none would come twice in a row.
        seen.values().for_each(|count| within(*count, 200 - 70, 200 + 70));
        within(repeats, 200 - 70, 200 + 70);
    }
}

#[tokio::test]
async fn least_request_avoids_the_busy_endpoint() {
    let backends = [greeter("busy").await, greeter("free").await];
    let endpoints = [("busy", backends[0].addr()), ("free", backends[1].addr())];
    let world = World::new(&(service(&endpoints) + &rule("{loadBalancer: {simple: LEAST_REQUEST}}", &[]))).await;
    for way in Way::BOTH {
        all_connected(&world, way, &backends).await;
        // A stream that is not read stays in flight.
        let held = loop {
            let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
            let mut stream = way.client(&world.mesh).say_hellos(request).await.unwrap().into_inner();
            if stream.message().await.unwrap().unwrap().backend == "busy" {
                break stream;
            }
        };
        let seen = way.calls(&world.mesh, 400).await;
        // It is chosen only when both of two draws (with replacement, gRFC A48) fall on it: a quarter; six standard deviations.
        within(seen["busy"], 100 - 52, 100 + 52);
        drop(held);
        until("it was told", async || world.channel.load().is_idle()).await;
    }
}

#[tokio::test]
async fn weights_of_endpoints_count() {
    let backends = [greeter("heavy").await, greeter("light").await];
    let yaml = service(&[("heavy", backends[0].addr()), ("light", backends[1].addr())])
        .replace("version: heavy}", "version: heavy}, weight: 3")
        .replace("version: light}", "version: light}, weight: 1");
    let world = World::new(&yaml).await;
    for way in Way::BOTH {
        all_connected(&world, way, &backends).await;
        let seen = way.calls(&world.mesh, 400).await;
        within(seen["heavy"], 270, 330);
    }
}
