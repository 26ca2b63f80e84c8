use super::*;
use crate::outbound::testing::{Script, Strict};
use bytes::Bytes;
use http::{HeaderName, Request};
use http_body_util::Full;
use proptest::prelude::*;
use tower::{Layer, ServiceExt};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in pairs {
        map.append(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
    }
    map
}

fn pairs(headers: &HeaderMap) -> Vec<String> {
    let mut pairs: Vec<_> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
    pairs.sort();
    pairs
}

/// Numbers 1, 2, 3...
fn counter() -> impl FnMut() -> u64 {
    let mut n = 0;
    move || {
        n += 1;
        n
    }
}

fn extract(pairs: &[(&'static str, &str)]) -> Option<TraceContext> {
    TraceContext::extract_with(&headers(pairs), &mut counter())
}

/// What an outgoing request without headers of its own carries, given the incoming headers.
fn forwarded(pairs_in: &[(&'static str, &str)]) -> Vec<String> {
    let mut out = HeaderMap::new();
    extract(pairs_in).expect("valid").inject(&mut out);
    pairs(&out)
}

#[test]
fn w3c_is_forwarded_as_it_came() {
    let context = extract(&[("traceparent", PARENT)]).unwrap();
    assert_eq!((context.trace_id().to_string(), context.is_sampled()), (TRACE.to_owned(), true));
    assert_eq!(context.span_id(), 0xb7ad_6b71_6920_3331);
    assert_eq!(forwarded(&[("traceparent", PARENT)]), [format!("traceparent: {PARENT}")]);
    let unsampled = PARENT.replace("-01", "-00");
    assert_eq!(forwarded(&[("traceparent", &unsampled)]), [format!("traceparent: {unsampled}")]);
}

#[test]
fn the_vendor_state_goes_along_in_its_order() {
    let with_state = [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2,c=3")];
    assert_eq!(forwarded(&with_state), [format!("traceparent: {PARENT}"), "tracestate: a=1,b=2,c=3".into()]);
}

#[test]
fn malformed_w3c_is_no_context() {
    let bad = [
        "",
        "00",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0g",
        "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.extra",
    ];
    for value in bad {
        assert_eq!(extract(&[("traceparent", value)]), None, "{value}");
    }
    assert_eq!(extract(&[("traceparent", PARENT), ("traceparent", PARENT)]), None, "twice");
}

#[test]
fn a_later_version_is_read_as_far_as_it_is_known() {
    let later = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03-what-comes";
    assert_eq!(forwarded(&[("traceparent", later)]), [format!("traceparent: {PARENT}")]);
}

#[test]
fn b3_is_forwarded_in_the_form_it_came() {
    for single in [
        "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
        "8448eb211c80319c-b7ad6b7169203331-0",
        "8448eb211c80319c-b7ad6b7169203331-d",
        "8448eb211c80319c-b7ad6b7169203331",
    ] {
        assert_eq!(forwarded(&[("b3", single)]), [format!("b3: {single}")]);
    }
    let with_parent = "8448eb211c80319c-b7ad6b7169203331-1-05e3ac9a4f6e3b90";
    assert_eq!(forwarded(&[("b3", with_parent)]), ["b3: 8448eb211c80319c-b7ad6b7169203331-1"]);
    let ids = [("x-b3-traceid", TRACE), ("x-b3-spanid", "b7ad6b7169203331")];
    let ids_out = ["x-b3-spanid: b7ad6b7169203331".to_owned(), format!("x-b3-traceid: {TRACE}")];
    assert_eq!(forwarded(&ids), ids_out);
    let sampled = [ids[0], ids[1], ("x-b3-sampled", "true")];
    assert_eq!(forwarded(&sampled), ["x-b3-sampled: 1".into(), ids_out[0].clone(), ids_out[1].clone()]);
    let debug = [ids[0], ids[1], ("x-b3-flags", "1")];
    assert_eq!(forwarded(&debug), ["x-b3-flags: 1".into(), ids_out[0].clone(), ids_out[1].clone()]);
    assert!(extract(&debug).unwrap().is_sampled());
}

#[test]
fn b3_that_only_decides_about_recording_begins_a_trace() {
    assert_eq!(forwarded(&[("b3", "0")]), ["b3: 00000000000000010000000000000002-0000000000000003-0"]);
    let multi = forwarded(&[("x-b3-sampled", "0")]);
    assert_eq!(multi[0], "x-b3-sampled: 0");
    assert_eq!(multi.len(), 3);
}

#[test]
fn malformed_b3_is_no_context() {
    for value in [
        "",
        "x",
        "1-2-1",
        "8448eb211c80319c",
        "8448eb211c80319c-b7ad6b7169203331-x",
        "8448eb211c80319c-0000000000000000-1",
    ] {
        assert_eq!(extract(&[("b3", value)]), None, "{value}");
    }
    assert_eq!(extract(&[("x-b3-traceid", TRACE)]), None, "no span");
    assert_eq!(extract(&[]), None);
}

#[test]
fn all_forms_that_came_are_written_and_w3c_decides() {
    let both = [("traceparent", PARENT), ("b3", "8448eb211c80319c-05e3ac9a4f6e3b90-0")];
    assert_eq!(forwarded(&both), [format!("b3: {TRACE}-b7ad6b7169203331-1"), format!("traceparent: {PARENT}")]);
}

#[test]
fn headers_of_the_request_itself_are_kept() {
    let mut extensions = Extensions::new();
    extensions.insert(extract(&[("b3", "8448eb211c80319c-b7ad6b7169203331-1")]).unwrap());
    for own in [[("traceparent", PARENT)], [("b3", "0")], [("traceparent", "broken")]] {
        let mut out = headers(&own);
        Propagation::default().apply_with(&mut out, &extensions, None, &mut counter());
        assert_eq!(out, headers(&own));
    }
    let trace = Propagation::default().apply(&mut headers(&[("traceparent", PARENT)]), &extensions, None);
    assert_eq!(trace.unwrap().to_string(), TRACE);
}

#[tokio::test]
async fn the_extension_wins_over_the_scope_and_the_scope_over_a_new_trace() {
    let apply = |extensions: &Extensions| {
        let mut out = HeaderMap::new();
        let trace = Propagation::default().apply_with(&mut out, extensions, None, &mut counter()).unwrap();
        (trace.to_string(), pairs(&out))
    };
    let context = extract(&[("traceparent", PARENT)]).unwrap();
    let mut extensions = Extensions::new();
    extensions.insert(extract(&[("b3", "8448eb211c80319c-b7ad6b7169203331-1")]).unwrap());
    scope(context.clone(), async {
        assert_eq!(current(), Some(context.clone()));
        assert_eq!(apply(&Extensions::new()), (TRACE.to_owned(), vec![format!("traceparent: {PARENT}")]));
        assert_eq!(apply(&extensions).1, ["b3: 8448eb211c80319c-b7ad6b7169203331-1"]);
    })
    .await;
    assert_eq!(current(), None);
    assert_eq!(apply(&Extensions::new()).1, ["traceparent: 00-00000000000000010000000000000002-0000000000000003-01"]);
}

#[test]
fn a_new_trace_is_started_and_recorded_as_told() {
    let none = Extensions::new();
    let started = |propagation: Propagation, draw: u64| {
        let mut out = HeaderMap::new();
        propagation.apply_with(&mut out, &none, None, &mut || draw);
        pairs(&out).pop()
    };
    assert_eq!(started(Propagation::default().start(false), 1), None);
    let half = Propagation::default().sampling(0.5);
    assert!(started(half, 1 << 62).unwrap().ends_with("-01"));
    assert!(started(half, 3 << 62).unwrap().ends_with("-00"));
    assert!(started(Propagation::default().sampling(0.0), 0).unwrap().ends_with("-00"));
    assert_eq!(started(Propagation::default(), 0).unwrap().matches('1').count(), 3, "ids are never zero, and sampled");
}

#[test]
fn child_spans_keep_the_trace_and_change_the_span() {
    let propagation = Propagation::default().child_spans(true);
    let mut out = headers(&[("traceparent", PARENT), ("tracestate", "a=1")]);
    propagation.apply_with(&mut out, &Extensions::new(), None, &mut counter());
    assert_eq!(pairs(&out), [format!("traceparent: 00-{TRACE}-0000000000000001-01"), "tracestate: a=1".into()]);
}

#[tokio::test]
async fn a_handler_continues_its_callers_trace_through_both_layers() {
    let backend = Script::default();
    let client = TracePropagationLayer::new().layer(Strict::new(&backend));
    let server = ScopeLayer::new().layer(tower::service_fn(move |request: Request<()>| {
        let client = client.clone();
        async move {
            assert!(request.extensions().get::<TraceContext>().is_some());
            tokio::task::yield_now().await;
            client.oneshot(Request::new(Full::<Bytes>::default())).await
        }
    }));
    let incoming = Request::builder().header("traceparent", PARENT).body(()).unwrap();
    server.oneshot(incoming).await.unwrap();
    assert_eq!(backend.seen()[0].0["traceparent"], PARENT);
}

#[tokio::test]
async fn without_a_caller_the_client_begins_a_trace() {
    let backend = Script::default();
    let client = TracePropagationLayer::new().layer(Strict::new(&backend));
    client.oneshot(Request::new(Full::<Bytes>::default())).await.unwrap();
    assert!(TraceContext::extract(&backend.seen()[0].0).unwrap().is_sampled());
}

proptest! {
    #[test]
    fn no_header_panics_and_what_is_read_is_written_back_the_same(
        name in prop_oneof![Just("traceparent"), Just("b3"), Just("x-b3-traceid")],
        value in "[0-9a-f-]{0,60}|00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]|[0-9a-f]{32}-[0-9a-f]{16}-[01d]",
    ) {
        let incoming = [(name, value.as_str()), ("x-b3-spanid", "b7ad6b7169203331")];
        if let Some(context) = extract(&incoming) {
            let mut out = HeaderMap::new();
            context.inject(&mut out);
            let again = TraceContext::extract_with(&out, &mut counter()).unwrap();
            prop_assert_eq!(again.trace_id(), context.trace_id());
            prop_assert_eq!(again.span_id(), context.span_id());
            prop_assert_eq!(again.is_sampled(), context.is_sampled());
        }
    }
}

#[test]
fn baggage_goes_along_and_never_over_what_is_there() {
    let incoming = headers(&[("traceparent", PARENT), ("baggage", "user=1"), ("baggage", "tier=2")]);
    let context = TraceContext::received(&incoming).unwrap();
    assert_eq!(context.baggage().unwrap(), "user=1,tier=2");
    let mut extensions = Extensions::new();
    extensions.insert(context);
    let mut out = HeaderMap::new();
    Propagation::default().apply(&mut out, &extensions, None);
    assert_eq!(out["baggage"], "user=1,tier=2");
    let mut own = headers(&[("baggage", "mine=1")]);
    Propagation::default().apply(&mut own, &extensions, None);
    assert_eq!((own["baggage"].to_str().unwrap(), own.contains_key("traceparent")), ("mine=1", true));
    let alone = TraceContext::received(&headers(&[("baggage", "user=1")])).unwrap();
    assert_eq!(alone.baggage().unwrap(), "user=1");
    assert!(TraceContext::received(&HeaderMap::new()).is_none());
}

#[test]
fn the_control_planes_shares_are_drawn_unless_the_program_has_its_own() {
    let tracing = Tracing { client: 1.0, random: 0.25, overall: 1.0 };
    let samples = |propagation: Propagation, headers: &HeaderMap, tracing: &Tracing, percent: u64| {
        propagation.samples(headers, Some(tracing), &mut || u64::MAX / 100 * percent)
    };
    let (none, wanted) = (HeaderMap::new(), headers(&[("x-client-trace-id", "1")]));
    assert!(samples(Propagation::default(), &none, &tracing, 24));
    assert!(!samples(Propagation::default(), &none, &tracing, 26));
    assert!(samples(Propagation::default(), &wanted, &tracing, 26), "the caller asked for it");
    assert!(
        !samples(Propagation::default(), &wanted, &Tracing { overall: 0.5, ..tracing }, 60),
        "and that is too much"
    );
    assert!(samples(Propagation::default().sampling(1.0), &none, &tracing, 90));
}
