//! What is counted, under Istio's names.

use crate::{
    filters::{add_filter, anything, packed, plane},
    filters_limits::limit,
    filters_service::{config, limited},
    support::{
        CLUSTER, TARGET,
        echo::{Echo, Way, get},
        greeter, hello, mesh_on, nobody, routes, service, to,
    },
};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// Requests with this response flag and gRPC status, for this cluster.
fn requests(snapshotter: &Snapshotter, wanted: [(&str, &str); 3]) -> u64 {
    let all = snapshotter.snapshot().into_vec().into_iter();
    all.filter_map(|(key, _, _, value)| {
        let has = |(name, value)| key.key().labels().any(|l| l.key() == name && l.value() == value);
        match value {
            DebugValue::Counter(n) if key.key().name() == "istio_requests_total" && wanted.into_iter().all(has) => {
                Some(n)
            }
            _ => None,
        }
    })
    .sum()
}

#[tokio::test]
async fn requests_that_reach_no_endpoint_are_counted_with_their_flag() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let backend = greeter("one").await;
        let greeter = service(&[("one", backend.addr())]);
        let route =
            |fields: &str| greeter.clone() + &routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("")));

        let cp = ControlPlane::builder().yaml(route("match: [{uri: {prefix: /nothing}}]")).start().await.unwrap();
        way.hello(&mesh_on(&cp).await).await.unwrap_err();
        let no_route = [("response_flags", "NR"), ("destination_service", "unknown"), ("response_code", "404")];
        assert_eq!(requests(&snapshotter, no_route), 1);

        let cp = ControlPlane::builder().yaml(route("name: r")).start().await.unwrap();
        cp.cache().remove(ResourceType::Cluster, CLUSTER);
        way.hello(&mesh_on(&cp).await).await.unwrap_err();
        assert_eq!(
            requests(&snapshotter, [("response_flags", "NC"), ("cluster", CLUSTER), ("grpc_response_status", "14")]),
            1
        );

        let abort = "fault: {abort: {grpcStatus: ABORTED, percentage: {value: 100}}}";
        let cp = ControlPlane::builder().yaml(route(abort)).start().await.unwrap();
        way.hello(&mesh_on(&cp).await).await.unwrap_err();
        assert_eq!(
            requests(&snapshotter, [("response_flags", "FI"), ("cluster", CLUSTER), ("grpc_response_status", "10")]),
            1
        );
        assert_eq!(backend.state().calls(), 0);
    }
}

#[tokio::test]
async fn what_a_route_answers_itself_is_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let backend = Echo::start("one").await;
    let http = "[{match: [{uri: {exact: /away}}], redirect: {uri: /there, redirectCode: 308}}, {match: [{uri: {exact: \
                /fault}}], directResponse: {status: 200}, fault: {abort: {httpStatus: 418, percentage: {value: 100}}}}, \
                {match: [{uri: {exact: /slow}}], directResponse: {status: 202}, fault: {delay: {fixedDelay: 1ms, \
                percentage: {value: 100}}}}, {directResponse: {status: 403, body: {string: no}}}]";
    let yaml = service(&[("one", backend.addr())]) + &routes(http);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    for (path, code, flags) in
        [("/away", "308", "-"), ("/fault", "418", "FI"), ("/slow", "202", "DI"), ("/", "403", "-")]
    {
        for way in Way::BOTH {
            for _ in 0..2 {
                way.send(&mesh, get(path), "").await.unwrap();
            }
            let wanted = [("response_code", code), ("response_flags", flags), ("request_protocol", "http")];
            assert_eq!(requests(&snapshotter, wanted), 2, "{path}, {way:?}");
        }
    }
    // To a gRPC call it is a status; there is no service that it came from.
    hello(&channel).await.unwrap_err();
    let wanted = [("grpc_response_status", "7"), ("response_code", "200"), ("destination_service", "unknown")];
    assert_eq!(requests(&snapshotter, wanted), 1);
    assert_eq!(backend.seen().len(), 0);
}

#[tokio::test]
async fn requests_over_a_limit_are_counted_with_their_flag() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let backend = Echo::start("v1").await;
        let cp = plane(&anything(), &backend).await;
        add_filter(&cp, "limit", packed(&limit(1)), false);
        let mesh = mesh_on(&cp).await;
        let _channel = mesh.channel(TARGET).unwrap();
        for _ in 0..3 {
            way.send(&mesh, get("/"), "").await.unwrap();
        }
        let cluster = CLUSTER.replace("||", "|v1|");
        let wanted = [("response_flags", "RL"), ("cluster", cluster.as_str()), ("response_code", "429")];
        assert_eq!(requests(&snapshotter, wanted), 2);

        // Nobody listens where the rate limit service should be.
        let dead = nobody();
        let mut service = config();
        service.failure_mode_deny = true;
        let cp = limited(&backend, dead.addr(), &service).await;
        way.send(&mesh_on(&cp).await, get("/").header("x-plan", "a"), "").await.unwrap();
        let wanted = [("response_flags", "RLSE"), ("cluster", cluster.as_str()), ("response_code", "500")];
        assert_eq!(requests(&snapshotter, wanted), 1);
    }
}
