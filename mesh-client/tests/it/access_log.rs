//! The access log: one record for each request, whatever becomes of it.

use crate::{
    filters::plane,
    support::{
        ANY, CLUSTER, TARGET, assert_says,
        echo::{Echo, Way, get},
        greeter, hello_with, nobody, routes, rule, service, to, until,
    },
};
use examples::backend::{Backend, Options};
use mesh_client::{
    Mesh,
    access_log::{AccessLog, ResponseFlags},
};
use mesh_control::ControlPlane;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<AccessLog>>>);

impl Log {
    /// A mesh that logs here.
    async fn mesh(&self, cp: &ControlPlane) -> Mesh {
        let log = self.clone();
        let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap();
        builder.access_log(move |record| log.0.lock().unwrap().push(record.clone())).build().await.unwrap()
    }

    /// The one record that there is.
    #[track_caller]
    fn only(&self) -> AccessLog {
        let mut all = std::mem::take(&mut *self.0.lock().unwrap());
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }
}

async fn control_plane(yaml: String) -> ControlPlane {
    ControlPlane::builder().yaml(yaml).start().await.unwrap()
}

/// The only record of one greeting, and its flags.
async fn greeting(way: Way, yaml: String) -> (AccessLog, String) {
    let (cp, log) = (control_plane(yaml).await, Log::default());
    let _ = way.hello(&log.mesh(&cp).await).await;
    let record = log.only();
    let flags = record.flags.to_string();
    (record, flags)
}

#[tokio::test]
async fn a_call_is_told_with_all_that_is_known_of_it() {
    for way in Way::BOTH {
        let backend = greeter("one").await;
        let cp = control_plane(
            service(&[("one", backend.addr())])
                + &routes(&format!("[{{name: r, route: [{{destination: {}}}]}}]", to(""))),
        )
        .await;
        let log = Log::default();
        let mesh = log.mesh(&cp).await;
        way.hello_with(&mesh, |request| {
            request.metadata_mut().insert("x-request-id", "id-1".parse().unwrap());
        })
        .await
        .unwrap();
        let record = log.only();
        assert_eq!((record.method.as_str(), record.path()), ("POST", "/helloworld.Greeter/SayHello"));
        assert_eq!((record.status, record.grpc_status, record.flags), (200, Some(0), ResponseFlags::NONE));
        assert_eq!((record.endpoint, record.attempts), (Some(backend.addr()), 1));
        assert_eq!((record.cluster.as_deref(), record.route.as_deref()), (Some(CLUSTER), Some("r")));
        assert_eq!((record.request_messages, record.response_messages), (1, 1));
        assert_eq!(record.request_bytes, 11, "five bytes before a message of a tag, a length and four letters");
        assert!(record.response_bytes > 5 && record.trace_id.is_some() && record.error.is_none());
        assert!(record.response_duration.is_some_and(|head| head <= record.duration));
        assert_says(
            &record.to_string(),
            &[
                "\"POST /helloworld.Greeter/SayHello HTTP/2\" 200 - via_upstream",
                "\"id-1\"",
                CLUSTER,
                &backend.addr().to_string(),
            ],
        );
    }
}

#[tokio::test]
async fn requests_over_the_layer_are_told_with_their_bytes() {
    let backend = Echo::start("v1").await;
    let (cp, log) = (plane(&crate::filters::anything(), &backend).await, Log::default());
    let mesh = log.mesh(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        let answer = way.send(&mesh, get("/a?b=c"), "twelve bytes").await.unwrap();
        let record = log.only();
        assert_eq!((record.status, record.grpc_status, record.path()), (200, None, "/a?b=c"));
        assert_eq!((record.request_bytes, record.response_bytes), (12, answer.body().len() as u64));
        assert_eq!((record.flags, record.endpoint.is_some()), (ResponseFlags::NONE, true));
    }
}

#[tokio::test]
async fn flags_are_those_of_envoy() {
    for way in Way::BOTH {
        let backend = greeter("one").await;
        let greeter = &service(&[("one", backend.addr())]);
        let with =
            |fields: &str| greeter.clone() + &routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("")));

        let (record, flags) = greeting(way, with("match: [{uri: {prefix: /nothing}}]")).await;
        assert_eq!((flags.as_str(), record.route, record.attempts), ("NR", None, 0));

        let both = "fault: {delay: {fixedDelay: 0.01s, percentage: {value: 100}}, abort: {grpcStatus: ABORTED, percentage: {value: 100}}}";
        let (record, flags) = greeting(way, with(both)).await;
        assert_eq!((flags.as_str(), record.grpc_status, record.endpoint), ("DI,FI", Some(10), None));

        let (record, flags) =
            greeting(way, with("fault: {delay: {fixedDelay: 0.01s, percentage: {value: 100}}}")).await;
        assert_eq!((flags.as_str(), record.grpc_status, record.endpoint), ("DI", Some(0), Some(backend.addr())));

        let (record, flags) = greeting(way, service(&[])).await;
        assert_eq!((flags.as_str(), record.grpc_status), ("UH", Some(14)));

        let refusing = nobody();
        let (record, flags) = greeting(way, service(&[("one", refusing.addr())])).await;
        assert_eq!((flags.as_str(), record.status), ("UF,URX", 503));
        assert_says(&record.error.unwrap_or_default(), &["refused"]);

        let limits = "{connectionPool: {http: {http2MaxRequests: 0}}}";
        let (_, flags) = greeting(way, greeter.clone() + &rule(limits, &["one"])).await;
        assert_eq!(flags, "UO");

        let failing = Backend::start("failing", ANY, Options { fail_rate: 1.0, ..Options::default() }).await.unwrap();
        let retries = "retries: {attempts: 2, retryOn: unavailable}";
        let (record, flags) = greeting(
            way,
            service(&[("one", failing.addr())])
                + &routes(&format!("[{{route: [{{destination: {}}}], {retries}}}]", to(""))),
        )
        .await;
        assert_eq!((flags.as_str(), record.attempts, record.grpc_status), ("URX", 3, Some(14)));
    }
}

#[tokio::test]
async fn a_caller_who_gives_up_is_told_of_once() {
    for way in Way::BOTH {
        let slow = Backend::start("slow", ANY, Options { delay: Duration::from_secs(3600), ..Options::default() })
            .await
            .unwrap();
        let (cp, log) = (control_plane(service(&[("one", slow.addr())])).await, Log::default());
        let mesh = log.mesh(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        channel.ready(crate::support::GUARD).await.unwrap();
        let call = tokio::spawn({
            let mesh = mesh.clone();
            async move { way.hello(&mesh).await }
        });
        until("the call is in flight", async || slow.state().in_flight() == 1).await;
        call.abort();
        until("it was told", async || !log.0.lock().unwrap().is_empty()).await;
        let record = log.only();
        assert_eq!((record.flags.to_string().as_str(), record.status, record.grpc_status), ("DC", 0, Some(1)));

        let call = hello_with(&channel, |request| request.set_timeout(Duration::from_millis(50))).await;
        call.unwrap_err();
        let record = log.only();
        assert_eq!((record.flags.to_string().as_str(), record.grpc_status), ("UT", Some(4)));
        assert_says(&record.error.unwrap_or_default(), &["deadline of 50ms"]);
    }
}
