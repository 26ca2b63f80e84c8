//! Clusters from code: how endpoints are chosen, given up and connected to, for both ways and without a control plane.

use crate::{
    hedging::{Answer, server},
    support::{
        assert_says,
        code::Local,
        echo::{Echo, Way, get},
        http_backend, nobody, until,
    },
};
use http::request::Builder;
use mesh_client::{
    Downstream, Error, Mesh,
    policy::{
        CircuitBreakers, Cluster, ClusterLoadAssignment, CookieHash, Endpoint, HashPolicy, HashSource, HealthStatus,
        HttpProtocol, LbPolicy, LbSettings, Locality, LocalityId, Maglev, MetadataValue, OutlierDetection, Policy,
        RegexRewrite, RingHash, RoutingPriority, SubsetConfig, SubsetFallback, SubsetSelector, Thresholds,
        WeightedRoundRobin, route,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

async fn echoes() -> [Echo; 3] {
    [Echo::start("a").await, Echo::start("b").await, Echo::start("c").await]
}

/// The host's own cluster over these endpoints, changed; HTTP/1.1.
async fn local(backends: &[Echo], change: impl FnOnce(&mut Cluster)) -> Local {
    let mut cluster = Cluster { http_protocol: Some(HttpProtocol::Http1), ..Cluster::of("own", []) };
    change(&mut cluster);
    let addresses: Vec<_> = backends.iter().map(Echo::addr).collect();
    Local::new(&addresses, Policy::default().with_target(cluster)).await
}

/// One cluster with this assignment, which takes everything.
async fn assigned(priorities: Vec<Vec<Locality>>, change: impl FnOnce(&mut Cluster)) -> Local {
    let assignment = ClusterLoadAssignment { priorities, ..ClusterLoadAssignment::default() };
    let mut cluster =
        Cluster { http_protocol: Some(HttpProtocol::Http1), ..Cluster::fixed("all", Arc::new(assignment)) };
    change(&mut cluster);
    let policy = Policy::default().with_cluster(cluster).with_route(route::any().to("all"));
    Local::new(&["127.0.0.1:1".parse().unwrap()], policy).await
}

fn locality(zone: &str, weight: u32, endpoints: Vec<Endpoint>) -> Locality {
    let id = LocalityId { zone: zone.into(), ..LocalityId::default() };
    Locality { id: Arc::new(id), weight, endpoints }
}

fn named(seen: &BTreeMap<String, usize>) -> String {
    seen.keys().cloned().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn every_policy_chooses() {
    let backends = echoes().await;
    let policies = [
        (LbPolicy::RoundRobin, 3),
        (LbPolicy::Random, 3),
        (LbPolicy::least_request(2), 3),
        (LbPolicy::LeastRequest { choice_count: 2, bias: None, full_scan: true }, 3),
        (LbPolicy::WeightedRoundRobin(Arc::new(WeightedRoundRobin::default())), 3),
        (LbPolicy::PickFirst { shuffle: true }, 1),
        (LbPolicy::RandomSubsetting { subset_size: 2, child: Arc::new(LbPolicy::RoundRobin) }, 2),
        // Nothing of the requests is hashed: any endpoint.
        (LbPolicy::Maglev(Maglev::default()), 3),
        (LbPolicy::RingHash(RingHash::default()), 3),
    ];
    for (policy, used) in policies {
        let local = local(&backends, |cluster| cluster.lb_policy = policy.clone()).await;
        for way in Way::BOTH {
            let seen = way.spread(&local.mesh, 60).await;
            assert_eq!(seen.len(), used, "{policy:?}, {way:?}: {seen:?}");
            if policy == LbPolicy::RoundRobin {
                assert!(seen.values().all(|count| *count == 20), "{seen:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_policy_that_cannot_be_is_refused_with_its_field() {
    let wrong = || {
        let mut cluster = Cluster::of("canary", ["127.0.0.1:1".parse().unwrap()]);
        cluster.lb_policy = LbPolicy::Maglev(Maglev { table_size: 1000, ..Maglev::default() });
        Policy::default().with_cluster(cluster)
    };
    let place = "clusters[canary].lb_policy.table_size: 1000 is not a prime";
    let error = Mesh::builder().policy(wrong()).build().await.unwrap_err();
    assert_says(&error.to_string(), &["policy", place]);
    let error = Mesh::builder().host("shop.example", "ipv4:127.0.0.1:1", wrong()).unwrap_err();
    assert_says(&error.to_string(), &["ipv4:127.0.0.1:1", place]);
}

#[tokio::test]
async fn times_without_an_end_are_for_ever() {
    let backends = echoes().await;
    let local = local(&backends, |cluster| {
        cluster.connect_timeout = Duration::MAX;
        cluster.idle_timeout = Duration::MAX;
        cluster.connections.max_duration = Some(Duration::MAX);
        cluster.outlier_detection = Some(Arc::new(OutlierDetection {
            interval: Duration::MAX,
            base_ejection_time: Duration::MAX,
            max_ejection_time: Duration::MAX,
            consecutive_5xx: Some(1),
            ..OutlierDetection::default()
        }));
    })
    .await;
    for way in Way::BOTH {
        assert_eq!(way.spread(&local.mesh, 30).await.len(), 3, "{way:?}");
    }
}

#[tokio::test]
async fn everything_that_can_be_hashed_is() {
    let backends = echoes().await;
    let with = |facts: Downstream| get("/x").extension(facts);
    let cookie = CookieHash { name: "who".into(), ttl: None, path: "".into(), attributes: vec![] };
    type Ask = Box<dyn Fn(usize) -> Builder>;
    let rewrite = Some(RegexRewrite::new("^user-", "").unwrap());
    let sources: Vec<(HashSource, Ask)> = vec![
        (HashSource::Header { name: "x-user".into(), rewrite: None }, Box::new(|n| get("/x").header("x-user", n))),
        (
            HashSource::Header { name: "x-user".into(), rewrite },
            Box::new(|n| get("/x").header("x-user", format!("user-{n}"))),
        ),
        (HashSource::Cookie(cookie), Box::new(|n| get("/x").header("cookie", format!("who=u{n}")))),
        (HashSource::QueryParameter("user".into()), Box::new(|n| get(&format!("/x?user={n}")))),
        (
            HashSource::SourceIp,
            Box::new(move |n| with(Downstream::new().with_source(([10, 0, 0, u8::try_from(n).unwrap()], 1).into()))),
        ),
        (
            HashSource::FilterState("tenant".into()),
            Box::new(move |n| with(Downstream::new().with_filter_state("tenant", n.to_string()))),
        ),
    ];
    for (source, ask) in sources {
        let said = format!("{source:?}");
        let cluster = Cluster { lb_policy: LbPolicy::Maglev(Maglev::default()), ..Cluster::of("own", []) };
        let policy = Policy { hash: vec![HashPolicy { source, terminal: true }], ..Policy::default() };
        let addresses: Vec<_> = backends.iter().map(Echo::addr).collect();
        let local = Local::new(&addresses, policy.with_target(cluster)).await;
        let mut homes = BTreeSet::new();
        for n in 0..30 {
            let [one, other] = Way::BOTH.map(|way| way.backend(&local.mesh, ask(n)));
            let (home, other) = (one.await, other.await);
            assert_eq!(home, other, "{said}: whichever way it comes");
            homes.insert(home);
        }
        assert_eq!(homes.len(), 3, "{said}: {homes:?}");
    }
}

#[tokio::test]
async fn priorities_localities_weights_and_health_count() {
    let backends = echoes().await;
    let [a, b, c] = [0, 1, 2].map(|i| Endpoint::new(backends[i].addr()));
    let refusing = nobody();
    let dead = Endpoint::new(refusing.addr());
    let ill = |endpoint: &Endpoint| Endpoint { health: HealthStatus::Unhealthy, ..endpoint.clone() };
    let heavy = Endpoint { weight: 4, ..a.clone() };
    // One priority after the other; the endpoint of the first cannot be reached, or is ill.
    for first in [dead, ill(&a)] {
        let priorities = vec![vec![locality("z", 1, vec![first])], vec![locality("z", 1, vec![b.clone()])]];
        let local = assigned(priorities, |_| {}).await;
        for way in Way::BOTH {
            until("the next priority serves", async || named(&way.spread(&local.mesh, 10).await) == "b").await;
        }
    }
    // Localities by weight, and endpoints by weight.
    for localities in [
        vec![locality("near", 4, vec![a.clone()]), locality("far", 1, vec![b.clone()])],
        vec![locality("one", 1, vec![heavy, b])],
    ] {
        let local = assigned(vec![localities], |_| {}).await;
        for way in Way::BOTH {
            let seen = way.spread(&local.mesh, 200).await;
            assert!((130..=190).contains(&seen["a"]) && seen.len() == 2, "{way:?}: {seen:?}");
        }
    }
    // Subsets by metadata.
    let labelled = |endpoint: Endpoint, version: &str| {
        let version = BTreeMap::from([("version".to_owned(), MetadataValue::String(version.into()))]);
        Endpoint { metadata: Some(Arc::new([("envoy.lb".to_owned(), version)].into())), ..endpoint }
    };
    let subsets = SubsetConfig {
        fallback: SubsetFallback::None,
        default_subset: BTreeMap::new(),
        selectors: vec![SubsetSelector { keys: vec!["version".into()], single_host: false, fallback: None }],
        panic_mode_any: false,
    };
    let endpoints = vec![labelled(a, "v1"), labelled(c, "v2")];
    let assignment = ClusterLoadAssignment::of("all", endpoints);
    let lb = LbSettings { subsets: Some(Arc::new(subsets)), ..LbSettings::default() };
    let cluster = Cluster { lb, ..Cluster::fixed("all", Arc::new(assignment)) };
    let version = |version: &str| MetadataValue::String(version.into());
    let policy = Policy::default()
        .with_cluster(cluster)
        .with_route(route::exact("/v2").to("all").endpoints_with("version", version("v2")))
        .with_route(route::exact("/v3").to("all").endpoints_with("version", version("v3")))
        .with_route(route::any().to("all").endpoints_with("version", version("v1")));
    let local = Local::new(&["127.0.0.1:1".parse().unwrap()], policy).await;
    for way in Way::BOTH {
        for (path, expected) in [("/x", "a"), ("/v2", "c")] {
            for _ in 0..6 {
                assert_eq!(way.backend(&local.mesh, get(path)).await, expected, "{way:?}");
            }
        }
        assert_says(&way.backend(&local.mesh, get("/v3")).await, &["version=v3"]);
    }
}

#[tokio::test]
async fn failing_endpoints_are_ejected() {
    for way in Way::BOTH {
        let (bad, asked) = server(&[Answer::Now(503)]).await;
        let (good, _) = server(&[Answer::Now(200)]).await;
        let detection = OutlierDetection {
            consecutive_5xx: Some(2),
            base_ejection_time: Duration::from_secs(3000),
            max_ejection_percent: 100,
            ..OutlierDetection::default()
        };
        let cluster = Cluster { outlier_detection: Some(Arc::new(detection)), ..Cluster::of("own", []) };
        let policy = Policy::default().with_target(cluster);
        let local = Local::new(&[bad.addr(), good.addr()], policy).await;
        for _ in 0..30 {
            let _ = way.send(&local.mesh, get("/x"), "").await;
        }
        assert_eq!(asked.seen.load(SeqCst), 2, "{way:?}: it is ejected after the second failure");
    }
}

#[tokio::test]
async fn breakers_limit_each_priority() {
    let backends = echoes().await;
    let none = Thresholds { max_requests: 0, ..Thresholds::default() };
    let breakers = CircuitBreakers { default: none, ..CircuitBreakers::default() };
    let cluster = Cluster { circuit_breakers: breakers, ..Cluster::of("limited", [backends[0].addr()]) };
    let policy = Policy::default()
        .with_cluster(cluster)
        .with_route(route::exact("/high").to("limited").priority(RoutingPriority::High))
        .with_route(route::any().to("limited"));
    let local = Local::new(&[backends[1].addr()], policy).await;
    for way in Way::BOTH {
        let error = way.send(&local.mesh, get("/x"), "").await.unwrap_err();
        let error = error.downcast_ref::<Error>().expect("the mesh's own");
        assert!(error.is_overloaded(), "{error}");
        assert_says(&error.to_string(), &["max_requests limit of 0 reached"]);
        assert_eq!(error.to_response().headers()["x-envoy-overloaded"], "true");
        assert_eq!(way.backend(&local.mesh, get("/high")).await, "a", "{way:?}");
    }
}

#[tokio::test]
async fn connections_live_as_the_cluster_says() {
    for way in Way::BOTH {
        let backend = http_backend("one").await;
        let cluster = Cluster {
            http_protocol: Some(HttpProtocol::Http1),
            max_requests_per_connection: Some(1),
            ..Cluster::of("own", [])
        };
        let local = Local::new(&[backend.addr()], Policy::default().with_target(cluster)).await;
        for _ in 0..5 {
            assert_eq!(way.send(&local.mesh, get("/x"), "").await.unwrap().status(), 200);
        }
        assert_eq!(backend.state().calls(), 5);
        until("one connection for each is gone", async || local.channel.load().connections == 0).await;

        let idle = Duration::from_millis(50);
        let cluster =
            Cluster { http_protocol: Some(HttpProtocol::Http1), idle_timeout: idle, ..Cluster::of("own", []) };
        let local = Local::new(&[backend.addr()], Policy::default().with_target(cluster)).await;
        assert_eq!(way.send(&local.mesh, get("/x"), "").await.unwrap().status(), 200);
        until("it was idle for too long", async || local.channel.load().connections == 0).await;
    }
}
