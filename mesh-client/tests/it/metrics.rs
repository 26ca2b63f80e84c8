//! What is measured beyond what always is: Istio's sizes and workloads, gRPC's instruments; and connections.

use crate::support::{
    CLUSTER, GUARD, HOUR, TARGET,
    code::{Local, fixed, host_target},
    echo::Way,
    edit, edit_cluster, greeter, mesh_on, nobody, routes, rule, service, to, until,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{LoadBalancingPolicy, load_balancing_policy::Policy},
                core::v3::{Metadata, TypedExtensionConfig},
                endpoint::v3::ClusterLoadAssignment,
            },
            extensions::load_balancing_policies::client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin,
        },
        google::protobuf::{Struct, Value, value::Kind},
    },
    util::pack_any,
};
use mesh_client::{
    Mesh, MeshBuilder,
    metrics::{AttemptLabel, Instrument, Metrics},
    policy::Policy as LocalPolicy,
};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use std::{collections::HashSet, time::Duration};

/// What a recorder saw. Looking empties it, so everything is added up here.
struct Seen {
    snapshotter: Snapshotter,
    histograms: Vec<(metrics::Key, Vec<f64>)>,
    numbers: Vec<(metrics::Key, f64)>,
}

impl Seen {
    fn new(recorder: &DebuggingRecorder) -> Self {
        Self { snapshotter: recorder.snapshotter(), histograms: Vec::new(), numbers: Vec::new() }
    }

    fn look(&mut self) {
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let key = key.key().clone();
            match value {
                DebugValue::Counter(n) => self.numbers.push((key, n as f64)),
                DebugValue::Gauge(n) => self.numbers.push((key, n.into_inner())),
                DebugValue::Histogram(values) => {
                    self.histograms.push((key, values.into_iter().map(|value| value.into_inner()).collect()));
                }
            }
        }
    }

    /// The sum of the counters and gauges of this name that have these labels.
    fn sum(&mut self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.look();
        self.numbers.iter().filter(|(key, _)| fits(key, name, labels)).map(|(_, value)| value).sum()
    }

    /// All values of the histograms of this name that have these labels.
    fn values(&mut self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        self.look();
        self.histograms
            .iter()
            .filter(|(key, _)| fits(key, name, labels))
            .flat_map(|(_, values)| values.clone())
            .collect()
    }

    /// Every name that was used.
    fn names(&mut self) -> HashSet<String> {
        self.look();
        let all = self.numbers.iter().map(|(key, _)| key).chain(self.histograms.iter().map(|(key, _)| key));
        all.map(|key| key.name().to_owned()).collect()
    }
}

fn fits(key: &metrics::Key, name: &str, labels: &[(&str, &str)]) -> bool {
    let has = |(name, value): &(&str, &str)| key.labels().any(|label| label.key() == *name && label.value() == *value);
    key.name() == name && labels.iter().all(has)
}

async fn mesh_with(cp: &ControlPlane, metrics: Metrics) -> Mesh {
    Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().metrics(metrics).build().await.unwrap()
}

/// One route to all, with these fields.
fn route(fields: &str) -> String {
    routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("")))
}

#[tokio::test]
async fn sizes_and_workloads_are_told_where_they_are_switched_on() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let mut seen = Seen::new(&recorder);
        let backend = greeter("one").await;
        let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())])).start().await.unwrap();
        edit::<ClusterLoadAssignment>(&cp, ResourceType::ClusterLoadAssignment, CLUSTER, |assignment| {
            let workload = Value { kind: Some(Kind::StringValue("greeter-v1;default;greeter;v1;Kubernetes".into())) };
            let istio = Struct { fields: [("workload".to_owned(), workload)].into() };
            let metadata = Metadata { filter_metadata: [("istio".to_owned(), istio)].into(), ..Metadata::default() };
            assignment.endpoints[0].lb_endpoints[0].metadata = Some(metadata);
        });
        way.hello(&mesh_on(&cp).await).await.unwrap();
        let common = [
            ("reporter", "source"),
            ("request_protocol", "grpc"),
            ("grpc_response_status", "0"),
            ("response_code", "200"),
        ];
        let unknown = [("destination_workload", "unknown"), ("destination_service_name", "greeter"), common[0]];
        assert_eq!(seen.sum("istio_requests_total", &unknown), 1.0);
        assert_eq!(seen.values("istio_request_duration_milliseconds", &common).len(), 1);
        assert!(!seen.names().contains("istio_request_bytes"));

        let metrics = Metrics::default().sizes(true).destination_workloads(true);
        way.hello(&mesh_with(&cp, metrics).await).await.unwrap();
        let known = [
            ("destination_workload", "greeter-v1"),
            ("destination_workload_namespace", "default"),
            ("destination_canonical_service", "greeter"),
            ("destination_canonical_revision", "v1"),
            ("destination_cluster", "Kubernetes"),
            ("destination_service", "greeter.default.svc.cluster.local"),
        ];
        assert_eq!(seen.sum("istio_requests_total", &known), 1.0);
        assert_eq!(seen.values("istio_request_duration_milliseconds", &known).len(), 1);
        assert_eq!(seen.values("istio_request_bytes", &known), [11.0]);
        assert!(seen.values("istio_response_bytes", &known)[0] > 5.0);
        assert_eq!(seen.sum("istio_request_messages_total", &known), 1.0);
        assert_eq!(seen.sum("istio_response_messages_total", &common), 1.0);
    }
}

#[tokio::test]
async fn grpcs_instruments_tell_calls_and_attempts() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let mut seen = Seen::new(&recorder);
        let backend = greeter("one").await;
        let retries = route("retries: {attempts: 3, retryOn: unavailable}");
        let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())]) + &retries).start().await.unwrap();
        let again = [Instrument::CallRetries, Instrument::CallRetryDelay, Instrument::CallHedges];
        let mesh = mesh_with(&cp, Metrics::default().grpc(Instrument::DEFAULTS).grpc(again)).await;
        let _channel = mesh.channel(TARGET).unwrap();
        way.hello(&mesh).await.unwrap();
        backend.state().fail_next(2);
        way.hello(&mesh).await.unwrap();
        let method = [("grpc.method", "helloworld.Greeter/SayHello"), ("grpc.target", TARGET)];
        let with = |status| [method[0], method[1], ("grpc.status", status)];
        assert_eq!(seen.sum("grpc.client.attempt.started", &method), 4.0);
        assert_eq!(seen.values("grpc.client.attempt.duration", &with("OK")).len(), 2);
        assert_eq!(seen.values("grpc.client.attempt.duration", &with("UNAVAILABLE")).len(), 2);
        assert_eq!(
            seen.values("grpc.client.attempt.sent_total_compressed_message_size", &with("OK")),
            [6.0, 6.0],
            "a message of a tag, a length and four letters, without its prefix"
        );
        assert!(
            seen.values("grpc.client.attempt.rcvd_total_compressed_message_size", &with("OK")).iter().all(|n| *n > 6.0)
        );
        assert_eq!(seen.values("grpc.client.call.duration", &with("OK")).len(), 2);
        assert_eq!(seen.values("grpc.client.call.duration", &method).len(), 2, "and no call ended otherwise");
        assert_eq!(seen.values("grpc.client.call.retries", &method), [2.0], "a call without any is not reported");
        assert!(seen.values("grpc.client.call.retry_delay", &method)[0] > 0.0);
        assert!(seen.values("grpc.client.call.hedges", &method).is_empty());
        assert!(!seen.names().contains("grpc.client.call.transparent_retries"), "it is not switched on");

        backend.state().fail_next(4);
        way.hello(&mesh).await.unwrap_err();
        assert_eq!(seen.values("grpc.client.call.duration", &with("UNAVAILABLE")).len(), 1);
        let cluster = [("cluster", CLUSTER)];
        assert_eq!(seen.sum("mesh_request_retries_total", &cluster), 5.0);
        assert_eq!(seen.sum("mesh_request_retry_limit_exceeded_total", &cluster), 1.0);

        backend.state().set_delay(Duration::from_secs(3600));
        let slow = way.hello_with(&mesh, |request| request.set_timeout(Duration::from_millis(20))).await;
        slow.unwrap_err();
        assert_eq!(seen.values("grpc.client.call.duration", &with("DEADLINE_EXCEEDED")).len(), 1);
    }
}

#[tokio::test]
async fn attempts_tell_where_they_went_where_that_is_switched_on() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let mut seen = Seen::new(&recorder);
        let (mut near, far) = (greeter("near").await, greeter("far").await);
        let yaml = service(&[("v1", near.addr()), ("v2", far.addr())])
            .replace("labels: {version: v1}", "locality: r1/z1/s1, labels: {version: v1}")
            .replace("labels: {version: v2}", "locality: r2, labels: {version: v2}");
        let http = format!(
            "[{{match: [{{headers: {{x-far: {{exact: \"1\"}}}}}}], route: [{{destination: {}}}]}}, {{route: [{{destination: \
         {}}}]}}]",
            to("v2"),
            to("v1")
        );
        let yaml = yaml + &routes(&http) + &rule("{}", &["v1", "v2"]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let labels = [AttemptLabel::Locality, AttemptLabel::BackendService];
        let mesh = mesh_with(&cp, Metrics::default().grpc(Instrument::DEFAULTS).attempt_labels(labels)).await;
        let _channel = mesh.channel(TARGET).unwrap();
        way.hello(&mesh).await.unwrap();
        way.hello(&mesh).await.unwrap();
        let far_away = way.hello_with(&mesh, |r| drop(r.metadata_mut().insert("x-far", "1".parse().unwrap())));
        assert_eq!(far_away.await.unwrap().backend, "far");
        let [v1, v2] = ["|v1|", "|v2|"].map(|subset| CLUSTER.replace("||", subset));
        let near_by = [
            ("grpc.lb.locality", "{region=\"r1\", zone=\"z1\", sub_zone=\"s1\"}"),
            ("grpc.lb.backend_service", v1.as_str()),
            ("grpc.status", "OK"),
        ];
        let far_off = [
            ("grpc.lb.locality", "{region=\"r2\", zone=\"\", sub_zone=\"\"}"),
            ("grpc.lb.backend_service", v2.as_str()),
        ];
        let sizes = ["sent", "rcvd"].map(|way| format!("grpc.client.attempt.{way}_total_compressed_message_size"));
        for name in ["grpc.client.attempt.duration", &sizes[0], &sizes[1]] {
            assert_eq!(seen.values(name, &near_by).len(), 2, "{name}");
            assert_eq!(seen.values(name, &far_off).len(), 1, "{name}");
        }
        assert_eq!(seen.values("grpc.client.call.duration", &near_by[2..]).len(), 3, "calls do not have them");
        assert!(seen.values("grpc.client.call.duration", &near_by).is_empty());

        // Nobody is there: an attempt that came to no endpoint.
        near.kill().await;
        let nowhere = [("grpc.lb.locality", ""), ("grpc.lb.backend_service", ""), ("grpc.status", "UNAVAILABLE")];
        until("an attempt came to no endpoint", async || {
            let _ = way.hello(&mesh).await;
            !seen.values("grpc.client.attempt.duration", &nowhere).is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn connections_are_counted_by_what_becomes_of_them() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let mut seen = Seen::new(&recorder);
        let mut backend = greeter("one").await;
        let all = |mesh: MeshBuilder| mesh.metrics(Metrics::default().grpc(Instrument::ALL));
        let Local { mesh, channel: _channel } =
            Local::with(&fixed(&[backend.addr()]), LocalPolicy::default(), all).await;
        way.hello(&mesh).await.unwrap();
        let (target, name) = (host_target(), &TARGET["xds:///".len()..]);
        let cluster = [("cluster", name)];
        let subchannel = [("grpc.target", target.as_str()), ("grpc.lb.backend_service", name)];
        assert_eq!(seen.sum("mesh_connections_opened_total", &cluster), 1.0, "{:?}", seen.names());
        assert_eq!(seen.sum("mesh_connections_active", &cluster), 1.0);
        assert_eq!(seen.sum("grpc.subchannel.connection_attempts_succeeded", &subchannel), 1.0);
        assert_eq!(seen.sum("grpc.subchannel.open_connections", &subchannel), 1.0);
        backend.kill().await;
        until("the connection is gone", async || seen.sum("mesh_connections_active", &cluster) == 0.0).await;
        assert_eq!(seen.sum("mesh_connections_closed_total", &cluster), 1.0);
        assert_eq!(seen.sum("grpc.subchannel.disconnections", &subchannel), 1.0);
        assert_eq!(seen.sum("grpc.subchannel.open_connections", &subchannel), 0.0);

        let refusing = nobody();
        way.hello(&Local::new(&[refusing.addr()], LocalPolicy::default()).await.mesh).await.unwrap_err();
        assert!(seen.sum("mesh_connection_failures_total", &[("stage", "tcp")]) >= 1.0);
        assert_eq!(seen.sum("grpc.subchannel.connection_attempts_failed", &[]), 0.0, "that mesh has them switched off");

        let cp = ControlPlane::builder().yaml(service(&[("one", refusing.addr())])).start().await.unwrap();
        let mesh = mesh_with(&cp, Metrics::default().grpc(Instrument::ALL)).await;
        let channel = mesh.channel(TARGET).unwrap();
        channel.ready(GUARD).await.unwrap();
        way.hello(&mesh).await.unwrap_err();
        let failed = [("grpc.target", TARGET), ("grpc.lb.backend_service", CLUSTER)];
        assert!(seen.sum("grpc.subchannel.connection_attempts_failed", &failed) >= 1.0);
    }
}

#[tokio::test]
async fn resources_and_weights_are_counted_by_what_is_known_of_them() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let mut seen = Seen::new(&recorder);
        let (one, two) = (greeter("one").await, greeter("two").await);
        let yaml = service(&[("one", one.addr()), ("two", two.addr())]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        edit_cluster(&cp, CLUSTER, |cluster| {
            let typed_config = Some(pack_any(ClientSideWeightedRoundRobin::default()));
            let extension = TypedExtensionConfig { name: "wrr".to_owned(), typed_config };
            let policies = vec![Policy { typed_extension_config: Some(extension) }];
            cluster.load_balancing_policy = Some(LoadBalancingPolicy { policies });
        });
        let mesh = mesh_with(&cp, Metrics::default().grpc(Instrument::ALL)).await;
        let channel = mesh.channel(TARGET).unwrap();
        way.hello(&mesh).await.unwrap();
        let target = [("grpc.target", TARGET)];
        assert!(seen.sum("grpc.lb.wrr.rr_fallback", &target) >= 1.0, "nobody reports");
        assert!(seen.sum("grpc.lb.wrr.endpoint_weight_not_yet_usable", &target) >= 2.0);
        assert!(seen.values("grpc.lb.wrr.endpoint_weights", &target).iter().all(|weight| *weight == 0.0));
        assert_eq!(seen.sum("grpc.lb.wrr.endpoint_weight_stale", &target), 0.0);

        let cluster = ("grpc.xds.resource_type", "type.googleapis.com/envoy.config.cluster.v3.Cluster");
        let in_state = |state| [cluster, ("grpc.xds.cache_state", state), ("grpc.xds.authority", "#old")];
        assert_eq!(seen.sum("grpc.xds_client.resources", &in_state("acked")), 1.0);
        assert_eq!(seen.sum("grpc.xds_client.resources", &in_state("requested")), 0.0);
        drop((channel, mesh));
        until("nothing is wanted any more", async || seen.sum("grpc.xds_client.resources", &in_state("acked")) == 0.0)
            .await;
    }
}

#[tokio::test]
async fn retries_against_the_budget_are_told() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let mut seen = Seen::new(&recorder);
        let backend = greeter("one").await;
        // It waits for its back-off until the test ends it.
        let retries = route("retries: {attempts: 1, retryOn: unavailable, backoff: 600s}");
        let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())]) + &retries).start().await.unwrap();
        let mesh = mesh_on(&cp).await;
        let _channel = mesh.channel(TARGET).unwrap();
        let cluster = [("cluster", CLUSTER)];
        way.hello(&mesh).await.unwrap();
        assert_eq!(seen.sum("mesh_retries_active", &cluster), 0.0);
        backend.state().fail_next(1);
        let waiting = mesh.clone();
        let call = tokio::spawn(async move { way.hello_with(&waiting, |request| request.set_timeout(HOUR)).await });
        until("a retry waits", async || seen.sum("mesh_retries_active", &cluster) == 1.0).await;
        call.abort();
        until("it is given back", async || seen.sum("mesh_retries_active", &cluster) == 0.0).await;
    }
}
