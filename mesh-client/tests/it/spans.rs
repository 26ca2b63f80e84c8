//! Spans of calls and attempts, and the ids that go out with them.

use crate::support::{
    TARGET,
    echo::{Echo, Way, get},
    edit, greeter, mesh_on, routes, service, to,
};
use envoy_types::{
    pb::envoy::{
        config::listener::v3::Listener,
        extensions::filters::network::http_connection_manager::v3::{HttpConnectionManager, http_connection_manager},
        r#type::v3::Percent,
    },
    util::pack_any,
};
use mesh_client::{Mesh, trace};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use opentelemetry::trace::{SpanId, SpanKind, Status, TracerProvider as _};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use prost::Message;
use std::{
    collections::HashMap,
    fmt::{self, Debug},
    sync::{Arc, Mutex},
};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span,
    subscriber::DefaultGuard,
};
use tracing_subscriber::{Layer, Registry, layer::Context, layer::SubscriberExt};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// OpenTelemetry on this thread: what it exports.
fn open_telemetry() -> (InMemorySpanExporter, SdkTracerProvider, DefaultGuard) {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    let guard = tracing::subscriber::set_default(Registry::default().with(layer));
    (exporter, provider, guard)
}

async fn mesh(cp: &ControlPlane) -> Mesh {
    Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().spans(true).build().await.unwrap()
}

#[track_caller]
fn named<'a>(spans: &'a [SpanData], name: &str) -> Vec<&'a SpanData> {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert!(!found.is_empty(), "no {name} among {:?}", spans.iter().map(|span| &span.name).collect::<Vec<_>>());
    found
}

fn attribute(span: &SpanData, key: &str) -> String {
    span.attributes.iter().find(|pair| pair.key.as_str() == key).map(|pair| pair.value.to_string()).unwrap_or_default()
}

fn ids(traceparent: &str) -> (String, String) {
    let mut parts = traceparent.split('-').skip(1).map(str::to_owned);
    (parts.next().unwrap(), parts.next().unwrap())
}

#[tokio::test]
async fn open_telemetry_exports_calls_and_attempts_and_backends_see_the_attempts() {
    for way in Way::BOTH {
        let backend = greeter("one").await;
        let retries = routes(&format!(
            "[{{name: r, route: [{{destination: {}}}], retries: {{attempts: 2, retryOn: unavailable}}}}]",
            to("")
        ));
        let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())]) + &retries).start().await.unwrap();
        let mesh = mesh(&cp).await;
        let _channel = mesh.channel(TARGET).unwrap();
        let (exporter, _provider, _guard) = open_telemetry();

        // In the span of a handler, whose own caller is known too: the span is nearer.
        backend.state().fail_next(1);
        let handler = tracing::info_span!("handler");
        let incoming = http::HeaderMap::from_iter([("traceparent".parse().unwrap(), PARENT.parse().unwrap())]);
        let context = trace::TraceContext::extract(&incoming).unwrap();
        tracing::Instrument::instrument(trace::scope(context, async { way.hello(&mesh).await }), handler)
            .await
            .unwrap();
        let spans = exporter.get_finished_spans().unwrap();
        let [handler] = named(&spans, "handler")[..] else { panic!("one handler") };
        let [call] = named(&spans, "Sent.helloworld.Greeter.SayHello")[..] else { panic!("one call") };
        let attempts = named(&spans, "Attempt.helloworld.Greeter.SayHello");
        let [first, second] = attempts[..] else { panic!("{} attempts", attempts.len()) };
        assert_eq!(call.parent_span_id, handler.span_context.span_id());
        assert_eq!((&call.span_kind, &call.status), (&SpanKind::Client, &Status::Ok));
        assert_eq!((attribute(call, "mesh.attempts"), attribute(call, "mesh.route")), ("2".to_owned(), "r".to_owned()));
        for (attempt, previous) in [(first, "0"), (second, "1")] {
            assert_eq!(attempt.parent_span_id, call.span_context.span_id());
            assert_eq!(attempt.span_context.trace_id(), handler.span_context.trace_id());
            assert_eq!(attribute(attempt, "previous-rpc-attempts"), previous);
            assert_eq!(attribute(attempt, "transparent-retry"), "false");
        }
        assert!(matches!(first.status, Status::Error { .. }), "{:?}", first.status);
        assert_eq!(second.status, Status::Ok);
        let events = |span: &SpanData| span.events.iter().map(|event| event.name.to_string()).collect::<Vec<_>>();
        assert!(events(first).contains(&"Delayed LB pick complete".to_owned()), "{:?}", events(first));
        assert_eq!(events(second), ["Outbound message", "Inbound message"]);

        // No span around it: the caller that is known is the parent, far away.
        exporter.reset();
        let context = trace::TraceContext::extract(&incoming).unwrap();
        trace::scope(context, async { way.hello(&mesh).await }).await.unwrap();
        let spans = exporter.get_finished_spans().unwrap();
        let [call] = named(&spans, "Sent.helloworld.Greeter.SayHello")[..] else { panic!("one call") };
        assert_eq!(call.span_context.trace_id().to_string(), TRACE);
        assert_eq!((call.parent_span_id, call.parent_span_is_remote), (SpanId::from(0xb7ad_6b71_6920_3331), true));
    }
}

#[tokio::test]
async fn http_backends_see_the_span_of_the_attempt() {
    let backend = Echo::start("v1").await;
    let cp = crate::filters::plane(&crate::filters::anything(), &backend).await;
    let mesh = mesh(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    let (exporter, _provider, _guard) = open_telemetry();
    for way in [Way::Channel, Way::Layer] {
        exporter.reset();
        let request = get("/a?b=c").header("traceparent", PARENT).header("tracestate", "v=1").header("baggage", "k=v");
        way.send(&mesh, request, "").await.unwrap();
        let spans = exporter.get_finished_spans().unwrap();
        let spans = named(&spans, "GET");
        let [attempt, call] = spans[..] else { panic!("{} spans", spans.len()) };
        assert_eq!((attempt.span_kind.clone(), call.span_kind.clone()), (SpanKind::Client, SpanKind::Internal));
        assert_eq!(attempt.parent_span_id, call.span_context.span_id());
        assert_eq!(call.parent_span_id, SpanId::from(0xb7ad_6b71_6920_3331));
        for span in [attempt, call] {
            assert_eq!(attribute(span, "http.response.status_code"), "200");
            assert_eq!(attribute(span, "http.request.method"), "GET");
        }
        let seen = backend.last();
        let (trace, span) = ids(&seen.header("traceparent"));
        assert_eq!((trace.as_str(), span), (TRACE, attempt.span_context.span_id().to_string()));
        assert_eq!((seen.header("tracestate"), seen.header("baggage")), ("v=1".to_owned(), "k=v".to_owned()));
    }
}

/// Fields of spans, by their ids, as any subscriber sees them.
#[derive(Clone, Default)]
struct Fields(Arc<Mutex<HashMap<u64, HashMap<String, String>>>>);

struct Reader<'a>(&'a mut HashMap<String, String>);

impl Visit for Reader<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").trim_matches('"').to_owned());
    }
}

impl<S: Subscriber> Layer<S> for Fields {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, _: Context<'_, S>) {
        if attributes.metadata().target() == "mesh::call" {
            attributes.record(&mut Reader(self.0.lock().unwrap().entry(id.into_u64()).or_default()));
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        if let Some(fields) = self.0.lock().unwrap().get_mut(&id.into_u64()) {
            values.record(&mut Reader(fields));
        }
    }
}

impl Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.lock().unwrap().fmt(f)
    }
}

#[tokio::test]
async fn any_subscriber_sees_the_ids_that_go_out_and_without_one_none_are_made() {
    let backend = Echo::start("v1").await;
    let cp = crate::filters::plane(&crate::filters::anything(), &backend).await;
    let mesh = mesh(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        way.send(&mesh, get("/").header("traceparent", PARENT), "").await.unwrap();
        let sent = backend.last().header("traceparent");
        assert_eq!(sent, PARENT, "{way:?}: nobody records a span that could be missing");
    }

    let fields = Fields::default();
    let _guard = tracing::subscriber::set_default(Registry::default().with(fields.clone()));
    for way in Way::BOTH {
        fields.0.lock().unwrap().clear();
        way.send(&mesh, get("/").header("traceparent", PARENT), "").await.unwrap();
        let (trace, span) = ids(&backend.last().header("traceparent"));
        let all = fields.0.lock().unwrap();
        assert_eq!(all.len(), 2, "{way:?}: a call and an attempt: {all:?}");
        let find = |id: &str| all.values().find(|fields| fields.get("span_id").is_some_and(|own| own == id));
        let attempt = find(&span).unwrap_or_else(|| panic!("{way:?}: {span} is not among {all:?}"));
        let call = find(&attempt["parent_id"]).unwrap_or_else(|| panic!("{attempt:?} has no parent among {all:?}"));
        assert_eq!((call["parent_id"].as_str(), call["trace_id"].as_str()), ("b7ad6b7169203331", TRACE));
        assert_eq!((trace.as_str(), call["otel.name"].as_str()), (TRACE, "GET"));
    }
}

#[tokio::test]
async fn the_listener_says_how_many_new_traces_are_recorded() {
    for way in Way::BOTH {
        let backend = Echo::start("v1").await;
        let cp = crate::filters::plane(&crate::filters::anything(), &backend).await;
        let name = &TARGET["xds:///".len()..];
        edit::<Listener>(&cp, ResourceType::Listener, name, |listener| {
            let api = listener.api_listener.as_mut().and_then(|api| api.api_listener.as_mut()).unwrap();
            let mut manager = HttpConnectionManager::decode(&*api.value).unwrap();
            manager.tracing = Some(http_connection_manager::Tracing {
                random_sampling: Some(Percent { value: 0.0 }),
                ..http_connection_manager::Tracing::default()
            });
            *api = pack_any(manager);
        });
        let says = async |builder: mesh_client::MeshBuilder, request: http::request::Builder| {
            let mesh = builder.bootstrap_json(&cp.bootstrap()).unwrap().build().await.unwrap();
            let _channel = mesh.channel(TARGET).unwrap();
            way.send(&mesh, request, "").await.unwrap();
            backend.last().header("traceparent").rsplit_once('-').unwrap().1.to_owned()
        };
        assert_eq!(says(Mesh::builder(), get("/")).await, "00");
        assert_eq!(
            says(Mesh::builder(), get("/").header("x-client-trace-id", "1")).await,
            "01",
            "the caller asks for it"
        );
        assert_eq!(says(Mesh::builder(), get("/").header("traceparent", PARENT)).await, "01", "it was decided before");
        let own = trace::Propagation::default().sampling(1.0);
        assert_eq!(says(Mesh::builder().trace(own), get("/")).await, "01");
    }
}

#[tokio::test]
async fn istios_telemetry_says_how_many_new_traces_are_recorded() {
    let backend = Echo::start("v1").await;
    let cp = ControlPlane::builder().start().await.unwrap();
    let telemetry = |tracing: &str| {
        let spec = format!("{{tracing: [{{{tracing}}}]}}");
        let head = "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: t, namespace: istio-system}";
        service(&[("v1", backend.addr())]) + &format!("---\n{head}\nspec: {spec}\n")
    };
    for way in Way::BOTH {
        for (said, flag) in [
            ("randomSamplingPercentage: 0", "00"),
            ("randomSamplingPercentage: 100", "01"),
            ("randomSamplingPercentage: 100, disableSpanReporting: true", "00"),
        ] {
            cp.apply(&telemetry(said)).await.unwrap();
            let mesh = mesh_on(&cp).await;
            let _channel = mesh.channel(TARGET).unwrap();
            for _ in 0..10 {
                assert_eq!(way.backend(&mesh, get("/")).await, "v1");
                let parent = backend.last().header("traceparent");
                assert_eq!(parent.rsplit_once('-').unwrap().1, flag, "{said}, {way:?}");
            }
            // What was decided before stands.
            way.send(&mesh, get("/").header("traceparent", PARENT), "").await.unwrap();
            assert_eq!(backend.last().header("traceparent").rsplit_once('-').unwrap().1, "01");
        }
    }
}
