//! What is known of a request beside it: where it came from, who sent it, metadata and filter state. Routes match by it, and it is hashed.

use crate::{
    hashing::{hash_by, maglev, policy, ring, world as hashed},
    matching::{exact, string, to, under, world},
    support::{
        ANY, World,
        echo::{Way, get},
    },
};
use envoy_types::pb::{
    envoy::{
        config::route::v3::{
            RouteMatch,
            route_action::hash_policy::{ConnectionProperties, FilterState, PolicySpecifier},
            route_match::TlsContextMatchOptions,
        },
        r#type::{
            matcher::v3::{
                AddressMatcher, DoubleMatcher, FilterStateMatcher, ListMatcher, MetadataMatcher, OrMatcher,
                ValueMatcher, double_matcher, filter_state_matcher, list_matcher,
                metadata_matcher::{PathSegment, path_segment::Segment},
                string_matcher,
                value_matcher::{self, NullMatch},
            },
            v3::DoubleRange,
        },
    },
    google::protobuf::{BoolValue, UInt32Value},
    xds::core::v3::CidrRange,
};
use futures::StreamExt;
use http::request::Builder;
use mesh_client::{Downstream, Explain, Inbound, Value};
use mesh_control::ControlPlane;
use mesh_tls::{ClientSettings, ClientTls, FileSource, FileSourceConfig, Mode, PeerIdentity};
use serde_json::json;
use std::{collections::BTreeSet, sync::Arc};
use tokio::net::TcpStream;

/// Who the server at the end of a connection with mutual TLS knows its caller as.
async fn caller() -> PeerIdentity {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::builder().ca(dir.path().join("ca")).identity("default", "client").start().await.unwrap();
    let identity = cp.ca().unwrap().ensure("default", "client").unwrap();
    let acceptor = examples::server::acceptor(&identity, Mode::Strict).unwrap();
    let provider = mesh_tls::default_provider();
    let config = FileSourceConfig {
        certificate_file: Some(identity.join("cert.pem")),
        private_key_file: Some(identity.join("key.pem")),
        ca_certificate_file: Some(identity.join("ca.pem")),
        ..FileSourceConfig::new("client", Arc::clone(&provider))
    };
    let source = Arc::new(FileSource::new(config, &tokio::runtime::Handle::current()).unwrap());
    let client = ClientTls::new(ClientSettings::mtls(source), provider).unwrap();
    let (near, far) = tokio::io::duplex(1 << 16);
    let (connected, accepted) = tokio::join!(client.connect(near, None), acceptor.accept(far));
    connected.unwrap();
    accepted.unwrap().peer().expect("mutual TLS").clone()
}

fn with<T: Clone + Send + Sync + 'static>(mut request: Builder, extension: T) -> Builder {
    request.extensions_mut().unwrap().insert(extension);
    request
}

/// A request with this metadata in `example.auth`.
fn metadata(value: Value) -> Builder {
    with(get("/"), Downstream::new().with_metadata("example.auth", value))
}

/// Which backend takes each of these requests, over both ways.
async fn check(found: RouteMatch, requests: Vec<(Builder, &str)>) {
    let (world, _backends) = world(vec![to("yes", found.clone()), to("no", under(""))]).await;
    for (request, expected) in requests {
        for way in Way::BOTH {
            let extensions = request.extensions_ref().unwrap().clone();
            let mut copy = get("/");
            *copy.extensions_mut().unwrap() = extensions;
            assert_eq!(way.backend(&world.mesh, copy).await, expected, "{found:?}, {request:?}, {way:?}");
        }
    }
}

#[tokio::test]
async fn routes_match_by_the_callers_certificate() {
    let peer = caller().await;
    assert_eq!(peer.spiffe_id().unwrap().to_string(), "spiffe://cluster.local/ns/default/sa/client");
    let flag = |value: Option<bool>| value.map(|value| BoolValue { value });
    for (presented, validated, plain, mutual) in [
        (Some(true), None, "no", "yes"),
        (Some(false), None, "yes", "no"),
        (None, Some(true), "no", "yes"),
        (None, Some(false), "yes", "no"),
        (Some(true), Some(true), "no", "yes"),
        (Some(true), Some(false), "no", "no"),
        (None, None, "yes", "yes"),
    ] {
        let options = TlsContextMatchOptions { presented: flag(presented), validated: flag(validated) };
        let found = RouteMatch { tls_context: Some(options), ..under("/") };
        check(found, vec![(get("/"), plain), (with(get("/"), peer.clone()), mutual)]).await;
    }
}

#[tokio::test]
async fn routes_match_by_metadata_of_every_kind() {
    use value_matcher::MatchPattern as Kind;
    let value = |kind| ValueMatcher { match_pattern: Some(kind) };
    let double = |pattern| Kind::DoubleMatch(DoubleMatcher { match_pattern: Some(pattern) });
    let text = |text: &str| Kind::StringMatch(string(string_matcher::MatchPattern::Prefix(text.into())));
    let list = |kind| {
        let one_of = list_matcher::MatchPattern::OneOf(Box::new(value(kind)));
        Kind::ListMatch(Box::new(ListMatcher { match_pattern: Some(one_of) }))
    };
    let range = DoubleRange { start: 1.0, end: 2.0 };
    let either = OrMatcher { value_matchers: vec![value(text("a")), value(Kind::BoolMatch(true))] };
    let cases: [(Kind, Vec<Value>, Vec<Value>); 9] = [
        (Kind::NullMatch(NullMatch {}), vec![Value::Null], vec![false.into()]),
        (Kind::BoolMatch(true), vec![true.into()], vec![false.into(), "true".into()]),
        (text("a"), vec!["a".into(), "ab".into()], vec!["b".into(), 1.0.into()]),
        (double(double_matcher::MatchPattern::Exact(1.5)), vec![1.5.into()], vec![1.0.into(), "1.5".into()]),
        (double(double_matcher::MatchPattern::Range(range)), vec![1.0.into(), 1.9.into()], vec![2.0.into()]),
        (Kind::PresentMatch(true), vec![Value::Null, "x".into()], vec![]),
        (Kind::PresentMatch(false), vec![], vec!["x".into()]),
        (list(text("a")), vec![vec!["b", "a"].into()], vec![vec!["b"].into(), "a".into()]),
        (Kind::OrMatch(either), vec!["a".into(), true.into()], vec!["b".into(), Value::Null]),
    ];
    let key = |key: &str| PathSegment { segment: Some(Segment::Key(key.into())) };
    let nested = |value: Value| metadata(json!({"user": {"tier": value}}));
    for (kind, takes, leaves) in cases {
        for invert in [false, true] {
            let matcher = MetadataMatcher {
                filter: "example.auth".into(),
                path: vec![key("user"), key("tier")],
                value: Some(value(kind.clone())),
                invert,
            };
            let found = RouteMatch { dynamic_metadata: vec![matcher], ..under("/") };
            let (hit, miss) = if invert { ("no", "yes") } else { ("yes", "no") };
            let takes = takes.iter().map(|value| (nested(value.clone()), hit));
            let missing = [
                get("/"),
                metadata(json!({"user": "x"})),
                with(get("/"), Downstream::new().with_metadata("other", json!({"user": null}))),
            ];
            let leaves = leaves.iter().map(|value| nested(value.clone())).chain(missing);
            check(found, takes.chain(leaves.map(|request| (request, miss))).collect()).await;
        }
    }
}

#[tokio::test]
async fn routes_match_by_filter_state_and_explain_says_why_not() {
    let matcher = Some(filter_state_matcher::Matcher::StringMatch(exact("blue")));
    let found = RouteMatch { filter_state: vec![FilterStateMatcher { key: "tenant".into(), matcher }], ..under("/") };
    let tenant = |tenant: &str| with(get("/"), Downstream::new().with_filter_state("tenant", tenant));
    check(found.clone(), vec![(tenant("blue"), "yes"), (tenant("red"), "no"), (get("/"), "no")]).await;

    let (world, _backends) = world(vec![to("yes", found), to("no", under(""))]).await;
    let explain = Explain::default();
    assert_eq!(Way::Layer.backend(&world.mesh, with(tenant("red"), explain.clone())).await, "no");
    let said = explain.to_string();
    assert!(said.contains("filter state \"tenant\" is absent or not equal to \"blue\""), "{said}");
}

#[tokio::test]
async fn routes_match_by_addresses_in_the_filter_state() {
    let range = |prefix: &str, length: u32| CidrRange {
        address_prefix: prefix.into(),
        prefix_len: Some(UInt32Value { value: length }),
    };
    let found = |invert_match| {
        let ranges = vec![range("10.0.0.0", 8), range("2001:db8::", 32)];
        let matcher = Some(filter_state_matcher::Matcher::AddressMatch(AddressMatcher { ranges, invert_match }));
        RouteMatch { filter_state: vec![FilterStateMatcher { key: "peer".into(), matcher }], ..under("/") }
    };
    let from = |peer: &str| with(get("/"), Downstream::new().with_filter_state("peer", peer));
    let (within, outside) = (["10.1.2.3", "10.1.2.3:4711", "[2001:db8::7]:80"], ["11.1.2.3", "2001:db9::7"]);
    for (invert, hit, miss) in [(false, "yes", "no"), (true, "no", "yes")] {
        let hits = within.map(|peer| (from(peer), hit)).into_iter();
        let misses = outside.map(|peer| (from(peer), miss)).into_iter();
        // What is no address is neither inside nor outside.
        let never = [(from("nobody"), "no"), (get("/"), "no")];
        check(found(invert), hits.chain(misses).chain(never).collect()).await;
    }

    let (world, _backends) = world(vec![to("yes", found(false)), to("no", under(""))]).await;
    let explain = Explain::default();
    assert_eq!(Way::Channel.backend(&world.mesh, with(from("11.1.2.3"), explain.clone())).await, "no");
    let said = explain.to_string();
    assert!(
        said.contains("filter state \"peer\" is absent, no address, or not in [10.0.0.0/8, 2001:db8::/32]"),
        "{said}"
    );
}

/// The backends that so many requests go to.
async fn spread(world: &World, way: Way, requests: impl Iterator<Item = Builder>) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for request in requests {
        seen.insert(way.backend(&world.mesh, request).await);
    }
    seen
}

#[tokio::test]
async fn the_source_of_a_request_is_hashed() {
    let source = policy(PolicySpecifier::ConnectionProperties(ConnectionProperties { source_ip: true }));
    let (world, _backends) = hashed(vec![source], ring).await;
    let from = |ip: u8, port: u16| {
        let source = ([10, 0, 0, ip], port).into();
        with(get("/"), Downstream::new().with_source(source))
    };
    for way in Way::BOTH {
        for ip in 1..5 {
            let home = spread(&world, way, (1..10).map(|port| from(ip, port))).await;
            assert_eq!(home.len(), 1, "the port does not count: {home:?}");
        }
        assert_eq!(spread(&world, way, (1..60).map(|ip| from(ip, 1))).await.len(), 5);
        // As our own server knows it of the connection, unless it is told otherwise.
        let inbound = Inbound::builder().bind(ANY).await.unwrap();
        let (_client, accepted) =
            tokio::join!(TcpStream::connect(inbound.local_addr()), inbound.incoming().into_future());
        let connection = accepted.0.unwrap().unwrap().info().clone();
        let local = || with(get("/"), connection.clone());
        let told = with(get("/"), Downstream::new().with_source(([127, 0, 0, 1], 1).into()));
        let home = spread(&world, way, (0..20).map(|_| local())).await;
        assert_eq!(spread(&world, way, [told].into_iter()).await, home);
        assert_eq!(home.len(), 1);
        // Without a source there is no hash: any endpoint.
        assert!(spread(&world, way, (0..60).map(|_| get("/"))).await.len() > 1);
    }
}

#[tokio::test]
async fn filter_state_is_hashed() {
    let state = policy(PolicySpecifier::FilterState(FilterState { key: "example.tenant".into() }));
    let (world, _backends) = hashed(vec![], maglev).await;
    hash_by(&world.cp, vec![state]);
    let tenant = |n: u32| with(get("/"), Downstream::new().with_filter_state("example.tenant", format!("t{n}")));
    crate::support::until("the policy is there", async || {
        spread(&world, Way::Channel, (0..20).map(|_| tenant(1))).await.len() == 1
    })
    .await;
    for way in Way::BOTH {
        assert_eq!(spread(&world, way, (0..20).map(|_| tenant(7))).await.len(), 1);
        assert_eq!(spread(&world, way, (0..60).map(tenant)).await.len(), 5);
        assert!(spread(&world, way, (0..60).map(|_| get("/"))).await.len() > 1);
    }
}
