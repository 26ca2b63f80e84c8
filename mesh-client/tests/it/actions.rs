//! What a route does: rewrites, header edits, redirects, answers of its own, a cluster that the request names.

use crate::support::{
    CLUSTER, World, assert_says,
    echo::{Echo, Way, get, joined},
    edit, hello, hello_with, routes, rule, service, to,
};
use envoy_types::pb::{
    envoy::config::{
        core::v3::{HeaderValue, HeaderValueOption},
        route::v3::{
            RouteAction, RouteConfiguration, WeightedCluster, route,
            route_action::{ClusterNotFoundResponseCode, ClusterSpecifier},
            weighted_cluster::ClusterWeight,
        },
    },
    google::protobuf::UInt32Value,
};
use mesh_client::Error;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use tonic::Code;

async fn world(http: &str) -> (World, Echo) {
    let backend = Echo::start("v1").await;
    let yaml = service(&[("v1", backend.addr())]) + &routes(http) + &rule("{}", &["v1"]);
    (World::new(&yaml).await, backend)
}

#[tokio::test]
async fn paths_authorities_and_headers_are_changed_on_the_way() {
    let http = format!(
        "[{{match: [{{uri: {{prefix: /old}}}}], rewrite: {{uri: /new, authority: other.example}}, headers: {{request: \
         {{set: {{x-set: mesh}}, add: {{x-add: \"%REQ(x-set)%-%PROTOCOL%\"}}, remove: [x-gone]}}, response: {{set: \
         {{x-from: \"%UPSTREAM_CLUSTER%\"}}, remove: [server]}}}}, route: [{{destination: {}}}]}}, {{match: [{{uri: \
         {{prefix: /split/}}}}], rewrite: {{uriRegexRewrite: {{match: \"^/split/([a-z]+)/(.*)$\", rewrite: \
         '/\\2/\\1'}}}}, route: [{{destination: {}}}]}}]",
        to("v1"),
        to("v1")
    );
    let (world, backend) = world(&http).await;
    for way in Way::BOTH {
        let request = get("/old/a?b=c").header("x-set", "caller").header("x-gone", "1").header("x-add", "0");
        let response = way.send(&world.mesh, request, "").await.unwrap();
        let seen = backend.last();
        assert_eq!((seen.path(), seen.authority().as_str()), ("/new/a?b=c", "other.example"), "{way:?}");
        assert_eq!((seen.header("x-set").as_str(), seen.header("x-gone").as_str()), ("mesh", ""));
        assert_eq!(seen.header("x-add"), "0,caller-HTTP/1.1", "values are made of what was there before");
        assert_eq!(seen.header("x-envoy-original-path"), "/old/a?b=c");
        assert_eq!(joined(response.headers(), "x-from"), CLUSTER.replace("||", "|v1|"));
        assert_eq!(joined(response.headers(), "server"), "");
        way.send(&world.mesh, get("/split/one/two?q"), "").await.unwrap();
        assert_eq!(backend.last().path(), "/two/one?q");
    }
}

#[tokio::test]
async fn redirects_and_answers_are_given_here() {
    let http = "[{match: [{uri: {exact: /away}}], redirect: {uri: /there, authority: there.example, scheme: https, \
                redirectCode: 308}}, {match: [{uri: {prefix: /}}], directResponse: {status: 403, body: {string: \
                \"not you\"}}, headers: {response: {add: {x-why: policy}}}}]";
    let (world, backend) = world(http).await;
    for way in Way::BOTH {
        let response = way.send(&world.mesh, get("/away?a=b"), "").await.unwrap();
        assert_eq!(response.status(), 308);
        assert_eq!(joined(response.headers(), "location"), "https://there.example/there?a=b");
        let response = way.send(&world.mesh, get("/x"), "").await.unwrap();
        assert_eq!((response.status().as_u16(), &response.body()[..]), (403, &b"not you"[..]));
        assert_eq!(joined(response.headers(), "x-why"), "policy");
    }
    // A gRPC call gets the code that the HTTP status stands for.
    let status = hello(&world.channel).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "not you"));
    assert_says(&world.explain(), &["answered here with 403"]);
    assert_eq!(backend.seen().len(), 0);
}

#[tokio::test]
async fn filters_see_what_a_route_answers_itself() {
    let http = "[{match: [{uri: {exact: /fault}}], directResponse: {status: 200}, fault: {abort: {httpStatus: 418, \
                percentage: {value: 100}}}}, {match: [{uri: {exact: /away}}], redirect: {uri: /there}, fault: {abort: \
                {httpStatus: 429, percentage: {value: 100}}}}, {match: [{uri: {exact: /fine}}], directResponse: {status: \
                200, body: {string: fine}}, fault: {delay: {fixedDelay: 1ms, percentage: {value: 100}}}}, {match: [{uri: \
                {prefix: /}}], directResponse: {status: 403, body: {string: \"not you\"}}, fault: {delay: {fixedDelay: \
                1h, percentage: {value: 100}}}}]";
    let (world, backend) = world(http).await;
    for way in Way::BOTH {
        for (path, status, body) in
            [("/fault", 418, "Fault injected"), ("/away", 429, "Fault injected"), ("/fine", 200, "fine")]
        {
            let response = way.send(&world.mesh, get(path), "").await.unwrap();
            assert_eq!((response.status().as_u16(), &response.body()[..]), (status, body.as_bytes()), "{way:?} {path}");
        }
    }
    // The delay of the answer is bounded by the caller's deadline.
    let call = hello_with(&world.channel, |r| r.set_timeout(std::time::Duration::from_millis(50)));
    let status = call.await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_says(status.message(), &["deadline of 50ms exceeded in filter", "grpc-timeout"]);
    assert_eq!(backend.seen().len(), 0);
}

/// Routes that name the clusters of v1 and v2, and a last one that is changed.
async fn named(endpoints: &[(&str, std::net::SocketAddr)], change: impl FnOnce(&mut RouteAction)) -> World {
    let http = format!(
        "[{{match: [{{uri: {{exact: /a}}}}], route: [{{destination: {}}}]}}, {{match: [{{uri: {{exact: /b}}}}], route: \
         [{{destination: {}}}]}}, {{route: [{{destination: {}}}]}}]",
        to("v1"),
        to("v2"),
        to("v1")
    );
    let yaml = service(endpoints) + &routes(&http) + &rule("{}", &["v1", "v2"]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let Some(route::Action::Route(action)) = &mut config.virtual_hosts[0].routes[2].action else { panic!() };
        change(action);
    });
    World::on(cp).await
}

/// The name of a subset's cluster.
fn subset(name: &str) -> String {
    CLUSTER.replace("||", &format!("|{name}|"))
}

#[tokio::test]
async fn a_header_names_the_cluster_of_a_part_of_the_requests() {
    let backends = [Echo::start("v1").await, Echo::start("v2").await];
    let endpoints = [("v1", backends[0].addr()), ("v2", backends[1].addr())];
    let part = |weight, header: &str, name: String| ClusterWeight {
        name,
        cluster_header: header.into(),
        weight: Some(UInt32Value { value: weight }),
        request_headers_to_add: vec![HeaderValueOption {
            header: Some(HeaderValue { key: "x-part".into(), value: format!("of {weight}"), ..HeaderValue::default() }),
            ..HeaderValueOption::default()
        }],
        ..ClusterWeight::default()
    };
    let clusters = vec![part(60, "", subset("v1")), part(40, "x-cluster", String::new())];
    let world = named(&endpoints, |action| {
        let weighted = WeightedCluster { clusters, ..WeightedCluster::default() };
        action.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(weighted));
    })
    .await;
    for way in Way::BOTH {
        let mut to_v2 = 0;
        for _ in 0..200 {
            let backend = way.backend(&world.mesh, get("/c").header("x-cluster", subset("v2"))).await;
            let (seen, part) =
                if backend == "v1" { (backends[0].last(), "of 60") } else { (backends[1].last(), "of 40") };
            assert_eq!(seen.header("x-part"), part, "the edits are those of the part");
            to_v2 += u32::from(backend == "v2");
        }
        // Five standard deviations of 200.
        assert!((45..=115).contains(&to_v2), "{to_v2} of 200, {way:?}");
        for (request, reason) in [
            (get("/c").header("x-cluster", subset("v3")), "x-cluster names cluster"),
            (get("/c"), "the request has no header x-cluster"),
        ] {
            let mut failed = 0;
            for _ in 0..100 {
                let mut copy = get("/c");
                *copy.headers_mut().unwrap() = request.headers_ref().unwrap().clone();
                match way.send(&world.mesh, copy, "").await {
                    Ok(response) => assert_eq!(joined(response.headers(), "x-backend"), "v1"),
                    Err(error) => {
                        let error = error.downcast::<Error>().unwrap();
                        assert_eq!(error.http_status(), 503);
                        assert_says(&error.to_string(), &[reason]);
                        failed += 1;
                    }
                }
            }
            assert!((15..=65).contains(&failed), "{failed} of 100, {way:?}");
        }
    }
    let request = get("/c").header("x-cluster", subset("v2")).body(()).unwrap().into_parts().0;
    let said = world.mesh.explain(&request).to_string();
    assert_says(&said, &["weight 60 of 100", "weight 40 of 100", "|v2|"]);
    assert!(!said.contains("|v3|"), "{said}");
}

#[tokio::test]
async fn the_route_says_the_status_of_requests_without_a_cluster() {
    let backend = Echo::start("v1").await;
    let endpoints = [("v1", backend.addr())];
    for (said, status, code) in [
        (ClusterNotFoundResponseCode::ServiceUnavailable, 503, Code::Unavailable),
        (ClusterNotFoundResponseCode::NotFound, 404, Code::Unimplemented),
        (ClusterNotFoundResponseCode::InternalServerError, 500, Code::Unknown),
    ] {
        for specifier in
            [ClusterSpecifier::ClusterHeader("x-cluster".into()), ClusterSpecifier::Cluster("nowhere".into())]
        {
            let world = named(&endpoints, |action| {
                action.cluster_specifier = Some(specifier.clone());
                action.cluster_not_found_response_code = said.into();
            })
            .await;
            for way in Way::BOTH {
                let error = way.send(&world.mesh, get("/c"), "").await.unwrap_err().downcast::<Error>().unwrap();
                assert_eq!((error.http_status().as_u16(), error.code()), (status, code), "{specifier:?}, {error}");
                assert!(error.is_unavailable() && error.is_local(), "{error}");
                assert_eq!(error.to_response().status(), status);
            }
            assert_eq!(hello(&world.channel).await.unwrap_err().code(), code, "{specifier:?}");
            let notes: Vec<_> =
                world.mesh.status().unwrap().resources.into_iter().flat_map(|r| r.notes.to_vec()).collect();
            assert!(!notes.iter().any(|note| note.to_string().contains("not_found")), "{notes:?}");
        }
    }
    assert_eq!(backend.seen().len(), 0);
}

#[tokio::test]
async fn a_header_names_the_cluster_among_those_that_are_known() {
    let backends = [Echo::start("v1").await, Echo::start("v2").await];
    let endpoints = [("v1", backends[0].addr()), ("v2", backends[1].addr())];
    let world = named(&endpoints, |action| {
        action.cluster_specifier = Some(ClusterSpecifier::ClusterHeader("x-cluster".into()));
    })
    .await;
    for way in Way::BOTH {
        let named = |name: &str| get("/c").header("x-cluster", subset(name));
        assert_eq!(way.backend(&world.mesh, named("v1")).await, "v1");
        assert_eq!(way.backend(&world.mesh, named("v2")).await, "v2");
        assert_says(&way.backend(&world.mesh, named("v3")).await, &["x-cluster names cluster", "|v3|"]);
        assert_says(&way.backend(&world.mesh, get("/c")).await, &["the request has no header x-cluster"]);
    }
}
