//! DNS targets: literals, refresh by TTL, failures, and a real server.

use super::{lookup::Answer, *};
use crate::{
    resource::DnsRefresh,
    snapshot::{ClusterEntry, TargetState},
};
use futures::future::BoxFuture;
use hickory_resolver::{
    config::NameServerConfig,
    proto::rr::{
        LowerName, Name, RData, Record, RecordType,
        rdata::{A, SOA},
    },
};
use hickory_server::{
    Server,
    store::in_memory::InMemoryZoneHandler,
    zone_handler::{AxfrPolicy, Catalog, ZoneType},
};
use std::{collections::VecDeque, net::Ipv4Addr, str::FromStr, sync::Mutex};
use tokio::time::Instant;

/// Gives scripted answers, and notes when it was asked.
struct Script {
    answers: Mutex<VecDeque<Answer>>,
    asked: Mutex<Vec<Instant>>,
}

impl Lookup for Script {
    fn lookup(&self, _: String, _: LookupFamily) -> BoxFuture<'_, Answer> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(Instant::now());
            let next = self.answers.lock().unwrap().pop_front();
            match next {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    }
}

fn script(answers: impl IntoIterator<Item = Answer>) -> (Arc<Script>, TargetWatch) {
    let script = Arc::new(Script { answers: Mutex::new(answers.into_iter().collect()), asked: Mutex::default() });
    let template = Template::new("greeter:80", &Policy::default());
    let watch = follow(template, "greeter".into(), 80, &DnsOptions::default(), script.clone());
    (script, watch)
}

fn ip(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
}

fn failure() -> ResourceError {
    ResourceError { kind: ResourceErrorKind::Unresolved, message: "DNS lookup failed".into() }
}

fn addresses(state: &TargetState) -> Vec<SocketAddr> {
    let TargetState::Ready(snapshot) = state else { panic!("{state:?}") };
    let ClusterEntry::Ready { endpoints, .. } = snapshot.clusters.values().next().unwrap() else { panic!() };
    endpoints.priorities[0][0].endpoints.iter().map(|endpoint| endpoint.address).collect()
}

#[test]
fn a_target_must_be_host_and_port() {
    for (target, reason) in
        [("greeter", "no port"), ("greeter:x", "not a port"), (":80", "not a host"), ("a/b:80", "not a host")]
    {
        let error = dns(target, target, &Policy::default(), &DnsOptions::default()).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains(target), "{error}");
    }
}

#[test]
fn an_ip_literal_is_ready_at_once_without_a_runtime() {
    for (target, address) in [("127.0.0.1:80", "127.0.0.1:80"), ("[::1]:80", "[::1]:80")] {
        let watch = dns(target, target, &Policy::default(), &DnsOptions::default()).unwrap();
        assert_eq!(addresses(&watch.state()), [address.parse().unwrap()]);
    }
}

#[tokio::test]
async fn localhost_needs_no_dns() {
    let unreachable = ResolverConfig::from_parts(None, Vec::new(), Vec::new());
    let options = DnsOptions { resolver: Some(unreachable), ..DnsOptions::default() };
    let mut watch = dns("t", "localhost:80", &Policy::default(), &options).unwrap();
    watch.changed().await.unwrap();
    assert!(addresses(&watch.state()).contains(&"127.0.0.1:80".parse().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn refresh_follows_the_ttl_between_its_bounds() {
    let answer = |ttl| Ok((vec![ip(1)], Duration::from_secs(ttl)));
    let (script, _watch) = script([answer(0), answer(10), answer(3600)]);
    sleep(Duration::from_secs(60)).await;
    let asked = script.asked.lock().unwrap().clone();
    let gaps: Vec<f64> = asked.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    for (gap, expected) in gaps.iter().zip([1.0, 10.0, 30.0]) {
        assert!((expected..expected * 1.11).contains(gap), "{gap} instead of {expected}");
    }
    assert_eq!(gaps.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn only_a_change_is_published() {
    let answer = |last: &[u8]| Ok((last.iter().copied().map(ip).collect(), Duration::from_secs(1)));
    let (script, mut watch) = script([answer(&[1, 2]), answer(&[2, 1]), answer(&[3])]);
    watch.changed().await.unwrap();
    let TargetState::Ready(first) = watch.state() else { panic!() };
    watch.changed().await.unwrap();
    assert_eq!(addresses(&watch.state()), [SocketAddr::new(ip(3), 80)]);
    assert_eq!(script.asked.lock().unwrap().len(), 3);
    let TargetState::Ready(second) = watch.state() else { panic!() };
    assert!(Arc::ptr_eq(&first.routes, &second.routes));
}

#[tokio::test(start_paused = true)]
async fn a_failure_keeps_the_last_good_addresses() {
    let (script, mut watch) =
        script([Err(failure()), Ok((vec![ip(1)], Duration::from_secs(1))), Err(failure()), Err(failure())]);
    watch.changed().await.unwrap();
    match watch.state() {
        TargetState::Pending { cause: Some(cause) } => assert!(cause.message.contains("DNS lookup failed")),
        other => panic!("{other:?}"),
    }
    watch.changed().await.unwrap();
    assert_eq!(addresses(&watch.state()).len(), 1);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(script.asked.lock().unwrap().len(), 5);
    assert_eq!(addresses(&watch.state()).len(), 1);
}

/// When a name of a DNS cluster is asked for, from the first time.
async fn asked(refresh: DnsRefresh, answers: impl IntoIterator<Item = Answer>) -> Vec<f64> {
    let script = Script { answers: Mutex::new(answers.into_iter().collect()), asked: Mutex::default() };
    let mut left = script.answers.lock().unwrap().len();
    super::refresh("x", LookupFamily::Auto, refresh, &script, |_| {
        left -= 1;
        left > 0
    })
    .await;
    let asked = script.asked.lock().unwrap();
    asked.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_cluster_says_how_often_its_names_are_looked_up() {
    let answer = |ttl| Ok((vec![ip(1)], Duration::from_secs(ttl)));
    let secs = Duration::from_secs;
    let near = |gaps: Vec<f64>, expected: &[f64]| {
        assert_eq!(gaps.len(), expected.len());
        for (gap, expected) in gaps.iter().zip(expected) {
            assert!((gap - expected).abs() < 0.01, "{gaps:?} instead of {expected:?}");
        }
    };
    let plain = DnsRefresh { every: secs(7), ..DnsRefresh::default() };
    near(asked(plain, [answer(3), answer(100), answer(1)]).await, &[7.0, 7.0]);
    let by_ttl = DnsRefresh { respect_ttl: true, min_ttl: secs(4), ..plain };
    near(asked(by_ttl, [answer(3), answer(100), answer(0), answer(1)]).await, &[4.0, 100.0, 7.0]);
    let jitter = asked(DnsRefresh { jitter: secs(2), ..plain }, [answer(1), answer(1), answer(1)]).await;
    assert!(jitter.iter().all(|gap| (7.0..9.01).contains(gap)), "{jitter:?}");
    let failing = DnsRefresh { failure: (secs(10), secs(15)), ..plain };
    let gaps = asked(failing, [Err(failure()), Err(failure()), Err(failure()), answer(1), answer(1)]).await;
    for (gap, expected) in gaps.iter().zip([10.0, 15.0, 15.0, 7.0]) {
        assert!((0.79 * expected..1.21 * expected).contains(gap), "{gaps:?}");
    }
}

#[tokio::test]
async fn a_dropped_watch_stops_asking() {
    let (script, mut watch) = script([Ok((vec![ip(1)], Duration::from_secs(1)))]);
    watch.changed().await.unwrap();
    drop(watch);
    while Arc::strong_count(&script) > 1 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn names_resolve_through_a_real_server_and_follow_it() {
    let origin = Name::from_str("mesh.test.").unwrap();
    let name = Name::from_str("greeter.mesh.test.").unwrap();
    let zone: Arc<InMemoryZoneHandler> =
        Arc::new(InMemoryZoneHandler::empty(origin.clone(), ZoneType::Primary, AxfrPolicy::Deny));
    let soa = SOA::new(origin.clone(), origin.clone(), 1, 60, 60, 60, 1);
    zone.upsert(Record::from_rdata(origin.clone(), 60, RData::SOA(soa)), 1).await;
    let record = |last| Record::from_rdata(name.clone(), 1, RData::A(A::new(10, 0, 0, last)));
    zone.upsert(record(1), 2).await;
    let mut catalog = Catalog::new();
    catalog.upsert(LowerName::new(&origin), vec![zone.clone()]);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let mut server = Server::new(catalog);
    server.register_socket(socket);

    let mut upstream = NameServerConfig::udp(address.ip());
    upstream.connections[0].port = address.port();
    let options = DnsOptions {
        resolver: Some(ResolverConfig::from_parts(None, Vec::new(), vec![upstream])),
        ..DnsOptions::default()
    };
    let mut watch = dns("t", "greeter.mesh.test:443", &Policy::default(), &options).unwrap();
    watch.changed().await.unwrap();
    assert_eq!(addresses(&watch.state()), ["10.0.0.1:443".parse().unwrap()]);
    let mut records = zone.records_mut().await;
    records.retain(|key, _| key.record_type != RecordType::A);
    drop(records);
    zone.upsert(record(2), 3).await;
    watch.changed().await.unwrap();
    assert_eq!(addresses(&watch.state()), ["10.0.0.2:443".parse().unwrap()]);

    let mut missing = dns("t", "nobody.mesh.test:443", &Policy::default(), &options).unwrap();
    missing.changed().await.unwrap();
    match missing.state() {
        TargetState::Pending { cause: Some(cause) } => {
            assert_eq!(cause.kind, ResourceErrorKind::Unresolved);
            assert!(cause.message.contains("nobody.mesh.test"), "{}", cause.message);
        }
        other => panic!("{other:?}"),
    }
}
