//! How long an endpoint is held out, and how often a healthy or a sick one is checked: on paused time, to the millisecond.

use crate::support::{
    CLUSTER, GUARD, TARGET,
    echo::{Way, get},
    edit_cluster,
    memory::{Host, Memory},
    routes, service, to,
};
use envoy_types::pb::{
    envoy::config::{
        cluster::v3::{Cluster, OutlierDetection},
        core::v3::{
            HealthCheck,
            health_check::{HealthChecker, HttpHealthCheck},
        },
    },
    google::protobuf::{Duration as ProtoDuration, UInt32Value},
};
use mesh_client::{Mesh, MeshChannel};
use mesh_control::ControlPlane;
use std::{
    fmt::{self, Debug},
    sync::{Arc, Mutex},
    time::Duration,
};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Registry,
    layer::{Context, Layer, SubscriberExt},
};

fn seconds(seconds: i64) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds, nanos: 0 })
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

/// A mesh whose greeter is these hosts, without retries, its cluster edited so, and what keeps it alive.
async fn mesh_of(
    net: &Memory,
    hosts: &[&Host],
    change: impl FnOnce(&mut Cluster),
) -> (Mesh, (ControlPlane, MeshChannel)) {
    let endpoints: Vec<_> = hosts.iter().map(|host| ("v1", host.addr())).collect();
    let once = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let cp = ControlPlane::builder().yaml(service(&endpoints) + &once).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, change);
    let mesh = net.mesh(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    (mesh, (cp, channel))
}

/// An endpoint that fails beside one that does not, and a mesh over both with what keeps it alive.
struct Pair {
    bad: Host,
    good: Host,
    mesh: Mesh,
    _kept: (ControlPlane, MeshChannel),
}

impl Pair {
    async fn new(change: impl FnOnce(&mut Cluster)) -> Self {
        let net = Memory::new();
        let (bad, good) = (net.host("bad"), net.host("good"));
        bad.set_status(503);
        let (mesh, kept) = mesh_of(&net, &[&bad, &good], change).await;
        Self { bad, good, mesh, _kept: kept }
    }

    /// One failure ejects, for ten seconds at first.
    async fn ejecting(detection: OutlierDetection) -> Self {
        let detection = OutlierDetection {
            consecutive_5xx: number(1),
            base_ejection_time: seconds(10),
            max_ejection_percent: number(100),
            ..detection
        };
        Self::new(|cluster| cluster.outlier_detection = Some(detection)).await
    }
}

/// A request each 100 ms, for so long.
async fn traffic(way: Way, mesh: &Mesh, seconds: usize) {
    for _ in 0..10 * seconds {
        way.backend(mesh, get("/x")).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Seconds, in tenths.
fn told(gaps: &[Duration]) -> Vec<f64> {
    gaps.iter().map(|gap| (gap.as_secs_f64() * 10.0).round() / 10.0).collect()
}

#[tokio::test(start_paused = true)]
async fn an_ejection_lasts_longer_each_time_up_to_the_longest_and_a_clean_spell_is_forgiven() {
    for way in Way::BOTH {
        let detection =
            OutlierDetection { interval: seconds(5), max_ejection_time: seconds(25), ..OutlierDetection::default() };
        let Pair { bad, mesh, .. } = &Pair::ejecting(detection).await;
        traffic(way, mesh, 90).await;
        let gaps = bad.gaps("/x");
        // It is asked within two requests of its return, and fails again.
        for (gap, expected) in gaps.iter().zip([10.0, 20.0, 25.0, 25.0]) {
            assert!((expected..expected + 0.35).contains(&gap.as_secs_f64()), "{way:?}: {:?}", told(&gaps));
        }
        assert_eq!(gaps.len(), 4, "{:?}", told(&gaps));
        // Each interval without an ejection takes one multiple off.
        bad.set_status(200);
        traffic(way, mesh, 60).await;
        let before = bad.seen("/x").len();
        bad.set_status(503);
        traffic(way, mesh, 15).await;
        let gaps = bad.gaps("/x").split_off(before);
        assert!((10.0..10.35).contains(&gaps[0].as_secs_f64()), "{way:?}: {:?}", told(&gaps));
    }
}

#[tokio::test(start_paused = true)]
async fn jitter_makes_every_ejection_another_bit_longer() {
    for way in Way::BOTH {
        let detection = OutlierDetection {
            interval: seconds(3000),
            max_ejection_time: seconds(10),
            max_ejection_time_jitter: seconds(4),
            ..OutlierDetection::default()
        };
        let Pair { bad, mesh, .. } = &Pair::ejecting(detection).await;
        traffic(way, mesh, 300).await;
        let gaps = told(&bad.gaps("/x"));
        assert!(gaps.len() >= 20 && gaps.iter().all(|gap| (10.0..14.4).contains(gap)), "{way:?}: {gaps:?}");
        // Of twenty draws hardly ever none is in the first quarter, or in the last.
        assert!(gaps.iter().any(|gap| *gap < 11.4) && gaps.iter().any(|gap| *gap > 13.0), "{way:?}: {gaps:?}");
    }
}

/// Asks `/healthz` every ten seconds.
fn check() -> HealthCheck {
    HealthCheck {
        timeout: seconds(1),
        interval: seconds(10),
        no_traffic_interval: seconds(60),
        unhealthy_threshold: number(1),
        healthy_threshold: number(2),
        health_checker: Some(HealthChecker::HttpHealthCheck(HttpHealthCheck {
            path: "/healthz".into(),
            ..HttpHealthCheck::default()
        })),
        ..HealthCheck::default()
    }
}

#[tokio::test(start_paused = true)]
async fn checks_are_rare_until_there_is_traffic() {
    for way in Way::BOTH {
        let check = HealthCheck { unhealthy_interval: seconds(5), no_traffic_healthy_interval: seconds(90), ..check() };
        let Pair { bad, good, mesh, .. } = &Pair::new(|cluster| cluster.health_checks = vec![check]).await;
        tokio::time::sleep(Duration::from_secs(365)).await;
        let gaps = [good, bad].map(|host| told(&host.gaps("/healthz")));
        assert_eq!(gaps, [vec![90.0; 4], vec![60.0; 6]]);
        // The first request makes it matter: from the next check on.
        assert_eq!(way.backend(mesh, get("/x")).await, "good");
        tokio::time::sleep(Duration::from_secs(195)).await;
        let gaps = [(good, 5), (bad, 7)].map(|(host, before)| told(&host.gaps("/healthz")[before..]));
        assert!(gaps[0].len() >= 9 && gaps[0].iter().all(|gap| *gap == 10.0), "{way:?}: {gaps:?}");
        assert!(gaps[1].len() >= 20 && gaps[1].iter().all(|gap| *gap == 5.0), "{way:?}: {gaps:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn checks_of_many_endpoints_are_spread_by_jitter() {
    let net = Memory::new();
    let hosts: Vec<_> = (0..20).map(|_| net.host("any")).collect();
    let check = HealthCheck {
        initial_jitter: seconds(8),
        interval_jitter: seconds(2),
        interval_jitter_percent: 50,
        no_traffic_interval: seconds(10),
        ..check()
    };
    let begun = tokio::time::Instant::now();
    let hosts: Vec<_> = hosts.iter().collect();
    let (_mesh, _kept) = mesh_of(&net, &hosts, |cluster| cluster.health_checks = vec![check]).await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    let spread = |times: &[f64], from: f64, to: f64| {
        let third = (to - from) / 3.0;
        assert!(times.iter().all(|time| (from..to + 0.2).contains(time)), "{times:?}");
        assert!(times.iter().any(|time| *time < from + third), "{times:?}");
        assert!(times.iter().any(|time| *time > to - third), "{times:?}");
    };
    let firsts: Vec<_> = hosts.iter().map(|host| host.seen("/healthz")[0] - begun).collect();
    spread(&told(&firsts), 0.0, 8.0);
    let gaps: Vec<_> = hosts.iter().flat_map(|host| host.gaps("/healthz")).collect();
    // Two seconds and a half of ten, each from nothing on.
    spread(&told(&gaps), 10.0, 17.0);
}

/// What the mesh says of an endpoint, in order; what is said again and again, once.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

#[derive(Default)]
struct Words {
    message: String,
    reason: String,
    address: bool,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "reason" => self.reason = format!("{value:?}"),
            "address" => self.address = true,
            _ => {}
        }
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut words = Words::default();
        event.record(&mut words);
        let mut log = self.0.lock().unwrap();
        let line = format!("{} {} {}", event.metadata().level(), words.message, words.reason);
        if words.address && words.message.contains("health") && log.last() != Some(&line) {
            log.push(line);
        }
    }
}

impl Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.lock().unwrap().fmt(f)
    }
}

#[tokio::test(start_paused = true)]
async fn checks_are_logged_when_they_change_something_and_each_where_it_is_wanted() {
    let (healthy, unhealthy) = ("INFO endpoint is healthy ", "WARN endpoint is unhealthy \"HTTP 503\"");
    let (passed, failed) = ("INFO health check passed ", "INFO health check failed \"HTTP 503\"");
    let cases = [
        (false, vec![healthy, unhealthy, healthy]),
        (true, vec![healthy, passed, unhealthy, failed, passed, healthy, passed]),
    ];
    for (always, expected) in cases {
        let log = Log::default();
        let _guard = tracing::subscriber::set_default(Registry::default().with(log.clone()));
        let net = Memory::new();
        let host = net.host("any");
        let check = HealthCheck {
            no_traffic_interval: seconds(10),
            always_log_health_check_failures: always,
            always_log_health_check_success: always,
            ..check()
        };
        let (_mesh, _kept) = mesh_of(&net, &[&host], |cluster| cluster.health_checks = vec![check]).await;
        for status in [200, 503, 200] {
            host.set_status(status);
            tokio::time::sleep(Duration::from_secs(45)).await;
        }
        assert_eq!(*log.0.lock().unwrap(), expected, "always: {always}");
    }
}
