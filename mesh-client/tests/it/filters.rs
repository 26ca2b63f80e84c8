//! Filters of routes: rules of gRFC A39, and filters of one's own.

use crate::support::{
    CLUSTER, GUARD, TARGET, World, assert_says,
    echo::{Echo, Way, get, joined},
    edit, greeter, mesh_on, routes, rule, service, to, until,
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::{
            listener::v3::Listener,
            route::v3::{FilterConfig, RouteConfiguration, route, route_action::ClusterSpecifier},
        },
        extensions::filters::{
            common::fault::v3::{
                FaultDelay, FaultRateLimit,
                fault_delay::FaultDelaySecifier,
                fault_rate_limit::{FixedLimit, LimitType},
            },
            http::fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
            network::http_connection_manager::v3::{HttpConnectionManager, HttpFilter, http_filter::ConfigType},
        },
        r#type::v3::FractionalPercent,
    },
    google::protobuf::{Any, Duration as ProtoDuration, Struct, UInt32Value, Value, value::Kind},
};
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body_util::BodyExt;
use mesh_client::{
    BoxError, Explain, Mesh,
    filter::{
        Filter, FilterFactory, FilterPayload, FilterRequest, FilterResponse, Outcome, Reply, Step, Verdict, Watch,
        filter,
    },
};
use mesh_control::ControlPlane;
use mesh_xds::{server::ResourceType, source::Policy};
use prost::{Message, Name};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::Instant;

/// The greeter's listener.
const LISTENER: &str = "greeter.default.svc.cluster.local:50051";

pub(crate) fn packed<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

/// Puts a filter before the router.
pub(crate) fn add_filter(cp: &ControlPlane, name: &str, config: Any, optional: bool) {
    edit::<Listener>(cp, ResourceType::Listener, LISTENER, |listener| {
        let api = listener.api_listener.as_mut().unwrap().api_listener.as_mut().unwrap();
        let mut http = HttpConnectionManager::decode(&*api.value).unwrap();
        http.http_filters.retain(|filter| filter.name != name);
        let config_type = Some(ConfigType::TypedConfig(config));
        let filter = HttpFilter { name: name.to_owned(), config_type, is_optional: optional, ..HttpFilter::default() };
        http.http_filters.insert(http.http_filters.len() - 1, filter);
        api.value = http.encode_to_vec();
    });
}

/// Changes the greeter's routes.
pub(crate) fn edit_routes(cp: &ControlPlane, change: impl FnOnce(&mut RouteConfiguration)) {
    edit(cp, ResourceType::RouteConfiguration, CLUSTER, change);
}

/// A control plane with one backend and these routes.
pub(crate) async fn plane(http: &str, backend: &Echo) -> ControlPlane {
    let yaml = service(&[("v1", backend.addr())]) + &routes(http) + &rule("{}", &["v1"]);
    ControlPlane::builder().yaml(yaml).start().await.unwrap()
}

/// One route for everything.
pub(crate) fn anything() -> String {
    format!("[{{name: all, route: [{{destination: {}}}]}}]", to("v1"))
}

/// What the control plane is told of a resource that is refused.
pub(crate) async fn refused(mesh: &Mesh, kind: &str) -> String {
    let mut said = String::new();
    until("the resource is refused", async || {
        let status = mesh.status().unwrap();
        let found = status.resources.iter().find(|r| r.type_url.ends_with(kind)).and_then(|r| r.error_state.clone());
        said = found.map(|error| error.details.to_string()).unwrap_or_default();
        !said.is_empty()
    })
    .await;
    said
}

/// A filter that does everything a filter can.
struct Stamp {
    text: String,
    log: Arc<Mutex<Vec<String>>>,
}

struct StampFactory(Arc<Mutex<Vec<String>>>);

struct StampWatch(Arc<Mutex<Vec<String>>>);

impl FilterFactory for StampFactory {
    fn create(&self, config: &FilterPayload) -> Result<Arc<dyn Filter>, BoxError> {
        let text = match config {
            FilterPayload::Message(bytes) => String::decode(&**bytes)?,
            FilterPayload::Json(object) => object.get("text").and_then(|t| t.as_str()).unwrap_or_default().to_owned(),
        };
        if text.is_empty() {
            return Err("text: must not be empty".into());
        }
        Ok(Arc::new(Stamp { text, log: self.0.clone() }))
    }
}

impl Filter for Stamp {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        assert_eq!((request.target(), request.route()), (TARGET, "all"));
        assert_eq!(request.cluster(), CLUSTER.replace("||", "|v1|"));
        request.head_mut().headers.append("x-stamp", self.text.parse().unwrap());
        match request.head().uri.path() {
            "/closed" => Step::Now(Verdict::Answer(
                Reply::new(StatusCode::FORBIDDEN, "closed").header("x-why".parse().unwrap(), "stamp".parse().unwrap()),
            )),
            "/wait" => Step::Later(Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                request.head_mut().headers.append("x-waited", HeaderValue::from_static("1"));
                Verdict::Pass
            })),
            "/stuck" => Step::Later(Box::pin(std::future::pending())),
            _ => Step::Now(Verdict::Watch(Box::new(StampWatch(self.log.clone())))),
        }
    }

    fn describe(&self) -> std::borrow::Cow<'_, str> {
        format!("stamps {}", self.text).into()
    }
}

impl Watch for StampWatch {
    fn response(&mut self, response: &mut FilterResponse<'_>) {
        let by = response.endpoint().map(|endpoint| endpoint.to_string()).unwrap_or_default();
        response.head_mut().headers.insert("x-by", by.parse().unwrap());
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        trailers.insert("x-late", HeaderValue::from_static("1"));
    }

    fn end(&mut self, outcome: &Outcome) {
        self.0.lock().unwrap().push(format!("{:?} {} {:?}", outcome.ended, outcome.status, outcome.grpc_status));
    }
}

/// Of type `example.Stamp`: a text.
fn stamp(text: &str) -> Any {
    Any { type_url: "type.googleapis.com/example.Stamp".into(), value: text.to_owned().encode_to_vec() }
}

#[derive(Clone, PartialEq, prost::Message)]
struct TypedStruct {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Struct>,
}

fn typed_struct(text: &str) -> Any {
    let value = Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let typed = TypedStruct {
        type_url: "type.googleapis.com/example.Stamp".into(),
        value: Some(Struct { fields: HashMap::from([("text".to_owned(), value)]) }),
    };
    Any { type_url: "type.googleapis.com/xds.type.v3.TypedStruct".into(), value: typed.encode_to_vec() }
}

async fn stamping(cp: &ControlPlane) -> (Mesh, Arc<Mutex<Vec<String>>>) {
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap();
    let mesh = builder.filter("type.googleapis.com/example.Stamp", StampFactory(log.clone())).build().await.unwrap();
    (mesh, log)
}

#[tokio::test]
async fn a_filter_of_ones_own_changes_answers_waits_and_watches() {
    let backend = Echo::start("v1").await;
    for config in [stamp("ink"), typed_struct("ink")] {
        let cp = plane(&anything(), &backend).await;
        add_filter(&cp, "stamp", config, false);
        let (mesh, log) = stamping(&cp).await;
        for way in Way::BOTH {
            let response = way.send(&mesh, get("/x"), "").await.unwrap();
            assert_eq!(backend.last().header("x-stamp"), "ink");
            assert_eq!(joined(response.headers(), "x-by"), backend.addr().to_string());
            assert_eq!(log.lock().unwrap().pop().unwrap(), "Complete 200 None");

            let seen = backend.seen().len();
            let response = way.send(&mesh, get("/closed"), "").await.unwrap();
            assert_eq!((response.status(), &response.body()[..]), (StatusCode::FORBIDDEN, &b"closed"[..]));
            assert_eq!((joined(response.headers(), "x-why").as_str(), backend.seen().len()), ("stamp", seen));

            way.send(&mesh, get("/wait"), "").await.unwrap();
            assert_eq!(backend.last().header("x-waited"), "1");
        }
        let request = get("/x").body(()).unwrap().into_parts().0;
        assert_says(&mesh.explain(&request).to_string(), &["filters", "`stamp`: stamps ink"]);
    }
}

#[tokio::test]
async fn a_filter_of_ones_own_sees_how_calls_end() {
    for way in Way::BOTH {
        let backend = greeter("v1").await;
        let yaml = service(&[("v1", backend.addr())]) + &routes(&anything()) + &rule("{}", &["v1"]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        add_filter(&cp, "stamp", stamp("ink"), false);
        let (mesh, log) = stamping(&cp).await;
        let mut client = way.client(&mesh);
        let request = || examples::greeter::HelloRequest { name: "all".to_owned(), count: 2 };
        let mut stream = client.say_hellos(request()).await.unwrap().into_inner();
        while stream.message().await.unwrap().is_some() {}
        let trailers = stream.trailers().await.unwrap().unwrap();
        assert_eq!(trailers.get("x-late").unwrap(), "1");
        assert_eq!(log.lock().unwrap().pop().unwrap(), "Complete 200 Some(0)");

        backend.state().set_unavailable(true);
        way.hello(&mesh).await.unwrap_err();
        assert_eq!(log.lock().unwrap().pop().unwrap(), "Complete 200 Some(14)");
        backend.state().set_unavailable(false);

        let request = || examples::greeter::HelloRequest { name: "all".to_owned(), count: u32::MAX };
        let mut stream = client.say_hellos(request()).await.unwrap().into_inner();
        stream.message().await.unwrap();
        drop(stream);
        assert_eq!(log.lock().unwrap().pop().unwrap(), "Cancelled 200 None");

        let mut request = get("/stuck").header("content-type", "application/grpc").header("grpc-timeout", "50m");
        let explain = Explain::default();
        request.extensions_mut().unwrap().insert(explain.clone());
        let error = way.send(&mesh, request, "").await.unwrap_err();
        assert_says(&error.to_string(), &["deadline of 50ms exceeded in filter `stamp`", "grpc-timeout"]);
    }
}

#[tokio::test]
async fn the_most_specific_override_counts_and_may_switch_a_filter_off() {
    for way in Way::BOTH {
        let backend = Echo::start("v1").await;
        let cp = plane(&anything(), &backend).await;
        let switch = |disabled, config| packed(&FilterConfig { config, is_optional: false, disabled });
        add_filter(&cp, "stamp", stamp("chain"), false);
        let (mesh, _) = stamping(&cp).await;
        let stamps = async |expected: &str| {
            until(expected, async || {
                way.send(&mesh, get("/x"), "").await.unwrap();
                backend.last().header("x-stamp") == expected
            })
            .await;
        };
        stamps("chain").await;
        edit_routes(&cp, |r| drop(r.typed_per_filter_config.insert("stamp".into(), stamp("routes"))));
        stamps("routes").await;
        edit_routes(&cp, |r| {
            drop(r.virtual_hosts[0].typed_per_filter_config.insert("stamp".into(), typed_struct("host")));
        });
        stamps("host").await;
        edit_routes(&cp, |r| {
            let overrides = &mut r.virtual_hosts[0].routes[0].typed_per_filter_config;
            overrides.insert("stamp".into(), switch(true, None));
        });
        stamps("").await;
        edit_routes(&cp, |r| {
            let Some(route::Action::Route(action)) = &mut r.virtual_hosts[0].routes[0].action else { panic!() };
            let name = CLUSTER.replace("||", "|v1|");
            let mut cluster = envoy_types::pb::envoy::config::route::v3::weighted_cluster::ClusterWeight {
                name,
                weight: Some(UInt32Value { value: 1 }),
                ..Default::default()
            };
            cluster.typed_per_filter_config.insert("stamp".into(), switch(false, Some(stamp("cluster"))));
            let weighted = envoy_types::pb::envoy::config::route::v3::WeightedCluster {
                clusters: vec![cluster],
                ..Default::default()
            };
            action.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(weighted));
        });
        stamps("cluster").await;
    }
}

#[tokio::test]
async fn bad_and_unknown_filters_are_refused_by_their_path() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let (mesh, _) = stamping(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    Way::Channel.send(&mesh, get("/x"), "").await.unwrap();
    let unknown = Any { type_url: "type.googleapis.com/example.Unknown".into(), value: Vec::new() };
    add_filter(&cp, "other", unknown.clone(), true);
    add_filter(&cp, "stamp", stamp(""), false);
    let said = refused(&mesh, "Listener").await;
    assert_says(&said, &["api_listener.http_filters[2].typed_config: text: must not be empty"]);
    add_filter(&cp, "stamp", stamp("ink"), false);
    until("the good config is in force", async || {
        Way::Channel.send(&mesh, get("/x"), "").await.unwrap();
        backend.last().header("x-stamp") == "ink"
    })
    .await;
    // A mesh that does not know the type refuses the listener.
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    let said = refused(&mesh, "Listener").await;
    assert_says(&said, &["http_filters[2].typed_config", "unknown filter", "example.Stamp", "not optional"]);
    drop(channel);
    edit_routes(&cp, |r| drop(r.virtual_hosts[0].typed_per_filter_config.insert("other".into(), unknown)));
    let (mesh, _) = stamping(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    let said = refused(&mesh, "RouteConfiguration").await;
    assert_says(&said, &[r#"virtual_hosts[0].typed_per_filter_config["other"]"#, "unknown filter"]);
    drop(channel);
}

#[tokio::test]
async fn targets_without_a_control_plane_have_filters_from_code() {
    struct Hello;
    impl Filter for Hello {
        fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
            request.head_mut().headers.insert("x-hello", HeaderValue::from_static("code"));
            Step::Now(Verdict::Pass)
        }
    }
    let backend = Echo::start("v1").await;
    let policy = Policy { filters: vec![filter("hello", Arc::new(Hello))], ..Policy::default() };
    let mesh = Mesh::builder().policy(policy).build().await.unwrap();
    let request = http::Request::get("http://h/x").body(http_body_util::Full::<Bytes>::default()).unwrap();
    let channel = mesh.fixed_channel(&[backend.addr()]).unwrap();
    let response = tower::ServiceExt::oneshot(channel, request).await.unwrap();
    response.into_body().collect().await.unwrap();
    assert_eq!(backend.last().header("x-hello"), "code");
}

fn all() -> Option<FractionalPercent> {
    Some(FractionalPercent { numerator: 100, denominator: 0 })
}

#[tokio::test]
async fn faults_come_from_the_chain_and_slow_responses_down() {
    let backend = Echo::start("eight.by").await;
    let cp = plane(&anything(), &backend).await;
    let fixed = FixedLimit { limit_kbps: 0 };
    let limit = FaultRateLimit { percentage: all(), limit_type: Some(LimitType::FixedLimit(fixed)) };
    let mut fault = HttpFault { response_rate_limit: Some(limit), ..HttpFault::default() };
    add_filter(&cp, "fault", packed(&fault), false);
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    let said = refused(&mesh, "Listener").await;
    assert_says(
        &said,
        &["http_filters[1].typed_config.response_rate_limit.fixed_limit.limit_kbps: must be at least 1"],
    );
    // 8 of 1024 bytes per second; the first comes at once, and no more than a share of the rate.
    let delay = FaultDelay {
        percentage: all(),
        fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(ProtoDuration { seconds: 0, nanos: 1_000_000 })),
    };
    fault.delay = Some(delay);
    fault.response_rate_limit.as_mut().unwrap().limit_type = Some(LimitType::FixedLimit(FixedLimit { limit_kbps: 1 }));
    add_filter(&cp, "fault", packed(&fault), false);
    channel.ready(GUARD).await.unwrap();
    for way in Way::BOTH {
        let explain = Explain::default();
        let mut request = get("/x");
        request.extensions_mut().unwrap().insert(explain.clone());
        assert_eq!(&way.send(&mesh, request, "").await.unwrap().body()[..], b"eight.by");
        assert_says(&explain.to_string(), &["delayed by 1ms", "limited to 1024 bytes per second"]);
    }
    let abort = FaultAbort { percentage: all(), error_type: Some(ErrorType::HttpStatus(418)), ..FaultAbort::default() };
    let fault = HttpFault { abort: Some(abort), ..HttpFault::default() };
    add_filter(&cp, "fault", packed(&fault), false);
    for way in Way::BOTH {
        until("it aborts", async || way.send(&mesh, get("/x"), "").await.unwrap().status() == 418).await;
    }
}

#[tokio::test]
async fn a_slow_response_takes_its_time_and_keeps_to_the_deadline() {
    for way in Way::BOTH {
        let backend = greeter("v1").await;
        let yaml = service(&[("v1", backend.addr())]) + &routes(&anything()) + &rule("{}", &["v1"]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let limit =
            FaultRateLimit { percentage: all(), limit_type: Some(LimitType::FixedLimit(FixedLimit { limit_kbps: 1 })) };
        let fault = HttpFault { response_rate_limit: Some(limit), ..HttpFault::default() };
        add_filter(&cp, "fault", packed(&fault), false);
        let world = World::on(cp).await;
        let mut client = way.client(&world.mesh);
        let started = Instant::now();
        let name = "x".repeat(256);
        client.say_hello(examples::greeter::HelloRequest { name, count: 0 }).await.unwrap();
        assert!(started.elapsed() >= Duration::from_millis(180), "256 bytes in {:?}", started.elapsed());
        let mut request = tonic::Request::new(examples::greeter::HelloRequest { name: "x".repeat(100_000), count: 0 });
        request.set_timeout(Duration::from_millis(300));
        let status = client.say_hello(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status}");
        until("nothing is left", async || world.channel.load().is_idle()).await;
    }
}
