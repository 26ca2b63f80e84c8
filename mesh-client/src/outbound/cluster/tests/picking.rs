use super::*;
use mesh_xds::resource::{DropOverload, FractionalPercent, HealthStatus, LbPolicy, OutlierDetection};

fn failure(pick: Pick<FakeLink>) -> String {
    match pick {
        Pick::Fail(cause) => status::in_words(&*cause),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn unconnected_endpoints_share_evenly() {
    let mut bed = Bed::of(3);
    assert_eq!(bed.picks(300), BTreeMap::from([(1, 100), (2, 100), (3, 100)]));
}

#[tokio::test]
async fn an_endpoint_that_fails_gets_nothing_from_then_on_and_its_share_again_when_it_recovers() {
    let mut bed = Bed::of(3);
    bed.link(2).set(Connectivity::TransientFailure);
    assert_eq!(bed.picked(), [1, 3], "before any task has run");
    settle().await;
    assert_eq!(bed.picked(), [1, 3]);
    bed.link(2).set(Connectivity::Ready);
    settle().await;
    assert_eq!(bed.picks(300), BTreeMap::from([(1, 100), (2, 100), (3, 100)]));
}

#[tokio::test(start_paused = true)]
async fn a_large_set_is_rebuilt_once_for_many_changes() {
    let mut bed = Bed::of(1000);
    settle().await;
    for port in 1..=999 {
        bed.link(port).set(Connectivity::TransientFailure);
    }
    assert_eq!(bed.picked(), [1000]);
    settle().await;
    for port in 1..=999 {
        bed.link(port).set(Connectivity::Ready);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bed.picks(1000).len(), 1000);
}

#[tokio::test]
async fn the_next_priority_takes_over_at_once_and_gives_back() {
    let mut bed = Bed::new(cluster(), priorities([vec![locality("a", 1, [1])], vec![locality("b", 1, [2])]]));
    assert_eq!(bed.picked(), [1]);
    bed.link(1).set(Connectivity::TransientFailure);
    assert_eq!(bed.picked(), [2], "without waiting for any task");
    settle().await;
    bed.link(1).set(Connectivity::Ready);
    settle().await;
    assert_eq!(bed.picked(), [1]);
}

#[tokio::test]
async fn when_all_fail_the_pick_fails_at_once_with_address_and_cause() {
    let mut bed = Bed::of(2);
    bed.link(1).set(Connectivity::TransientFailure);
    bed.link(2).set(Connectivity::TransientFailure);
    let said = failure(bed.pick());
    assert_eq!(
        said,
        "cluster backend: none of its 2 endpoints can be reached; 127.0.0.1:1 is one of them: connection refused"
    );
    settle().await;
    assert_eq!(failure(bed.pick()), said);
}

#[tokio::test]
async fn picks_go_on_when_an_endpoint_recovers() {
    let mut bed = Bed::of(1);
    bed.link(1).set(Connectivity::TransientFailure);
    settle().await;
    failure(bed.pick());
    bed.link(1).set(Connectivity::Ready);
    settle().await;
    assert_eq!(bed.picked(), [1]);
}

#[tokio::test]
async fn a_cluster_without_endpoints_says_so() {
    let mut bed = Bed::new(cluster(), ClusterLoadAssignment::default());
    assert_eq!(failure(bed.pick()), "cluster backend has no endpoints");
    let mut sick = assignment(2);
    sick.priorities[0][0].endpoints.iter_mut().for_each(|e| e.health = HealthStatus::Unhealthy);
    bed.update(sick);
    assert_eq!(failure(bed.pick()), "cluster backend: none of its 2 endpoints is healthy");
    bed.update(assignment(2));
    assert_eq!(bed.picked(), [1, 2]);
    bed.update(ClusterLoadAssignment::default());
    assert_eq!(failure(bed.pick()), "cluster backend has no endpoints");
}

#[tokio::test]
async fn a_retry_goes_to_another_endpoint_while_there_is_one() {
    let mut bed = Bed::of(3);
    let tried = [bed.endpoint(1), bed.endpoint(3)];
    for _ in 0..50 {
        match bed.cluster.pick(&plain(), &tried, &mut bed.rng) {
            Pick::Endpoint(endpoint) => assert_eq!(endpoint.address().port(), 2),
            other => panic!("{other:?}"),
        }
    }
    bed.link(2).set(Connectivity::TransientFailure);
    assert!(matches!(bed.cluster.pick(&plain(), &tried, &mut bed.rng), Pick::Endpoint(_)));
}

#[tokio::test]
async fn categories_drop_their_share_of_what_the_ones_before_let_through() {
    let mut drops = assignment(1);
    let category = |category: &str, percent: u32| DropOverload {
        category: category.into(),
        percentage: FractionalPercent(percent * 10_000),
    };
    drops.drops = vec![category("first", 60), category("second", 50), category("never", 0)];
    let mut bed = Bed::new(cluster(), drops.clone());
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    for _ in 0..20_000 {
        let dropped = bed.cluster.drop_overload(&mut bed.rng);
        let key = dropped.map_or_else(|| "picked".into(), |category| category.to_string());
        *counts.entry(key).or_default() += 1.0;
    }
    for (key, share) in [("first", 0.6), ("second", 0.2), ("picked", 0.2)] {
        let sigma = (20_000.0 * share * (1.0_f64 - share)).sqrt();
        assert!((counts[key] - 20_000.0 * share).abs() < 4.0 * sigma, "{key} in {counts:?}");
    }
    assert!(!counts.contains_key("never"));
    drops.drops = vec![category("all", 100)];
    bed.update(drops);
    assert!((0..1000).all(|_| bed.cluster.drop_overload(&mut bed.rng).as_deref() == Some("all")));
}

#[tokio::test]
async fn requests_count_against_their_endpoint_until_their_guard_is_dropped() {
    let bed = Bed::of(1);
    let endpoint = bed.endpoint(1);
    let guards: Vec<_> = (0..3).map(|_| endpoint.start()).collect();
    assert_eq!(bed.cluster.status(Instant::now()).endpoints[0].in_flight, 3);
    drop(guards);
    assert_eq!(endpoint.in_flight(), 0);
}

#[tokio::test]
async fn the_status_says_what_matters_in_words() {
    let mut next = priorities([vec![locality("z", 1, [1])], vec![locality("z", 1, [2])]]);
    next.priorities[1][0].endpoints[0].weight = 7;
    let bed = Bed::new(cluster(), next);
    bed.link(1).set(Connectivity::TransientFailure);
    settle().await;
    bed.cluster.begin_request(RoutingPriority::Default).unwrap();
    let _in_flight = bed.endpoint(2).start();
    let status = bed.cluster.status(Instant::now());
    assert_eq!(
        status.to_string(),
        "priority 1, max_connections 0 of 1024, max_pending_requests 0 of 1024, max_requests 1 of 1024, 0 retries in flight"
    );
    assert_eq!(
        status.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "127.0.0.1:1 TransientFailure, 0 in flight, in /z/, last error: connection refused",
            "127.0.0.1:2 Idle, 1 in flight, priority 1, in /z/, weight 7"
        ]
    );
}

/// Requests, updates, failures, recoveries and ejections at once. Afterwards nothing is left counted, and all endpoints
/// that can be used are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_everything_changes_at_once() {
    let detection = OutlierDetection {
        max_ejection_percent: 50,
        interval: Duration::from_millis(1),
        base_ejection_time: Duration::from_millis(1),
        max_ejection_time: Duration::from_millis(1),
        ..OutlierDetection::default()
    };
    let config = Arc::new(Cluster { outlier_detection: Some(Arc::new(detection)), ..cluster() });
    let mut bed = Bed::new((*config).clone(), assignment(8));
    let live = &bed.cluster;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3)
            .map(|seed| {
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed);
                    for _ in 0..20_000 {
                        let Pick::Endpoint(endpoint) = live.pick(&plain(), &[], &mut rng) else { continue };
                        let mut request = endpoint.start();
                        live.begin_request(RoutingPriority::Default).expect("far from the limit");
                        let failed = endpoint.address().port() <= 4 && rng.u8(0..4) > 0;
                        request.record(if failed { Outcome::GatewayFailure } else { Outcome::Success });
                        live.end_request(RoutingPriority::Default);
                    }
                })
            })
            .collect();
        let (done, config, opened) = (&done, &config, || bed.opened());
        scope.spawn(move || {
            let mut rng = fastrand::Rng::with_seed(99);
            while !done.load(SeqCst) {
                let ports = (1..=8).filter(|_| rng.u8(0..8) > 0);
                live.update(config.clone(), Arc::new(priorities([vec![locality("a", 1, ports)]])));
            }
        });
        scope.spawn(move || {
            let mut rng = fastrand::Rng::with_seed(98);
            while !done.load(SeqCst) {
                if let Some(link) = rng.choice(opened()) {
                    link.set(*rng.choice(&STATES).expect("not empty"));
                }
            }
        });
        for caller in callers {
            caller.join().expect("caller");
        }
        done.store(true, SeqCst);
    });
    bed.update(assignment(8));
    let links = bed.opened();
    links.iter().for_each(|link| link.set(Connectivity::Ready));
    assert_eq!(bed.cluster.breaker().total(Resource::Requests), 0);
    assert!(bed.endpoints().iter().all(|endpoint| endpoint.in_flight() == 0));
    let back = async {
        while bed.picked().len() < 8 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), back).await.expect("all are used again");
    let live: Vec<SocketAddr> = bed.endpoints().iter().map(|endpoint| endpoint.address()).collect();
    let kept = links.iter().filter(|link| !link.drained.load(SeqCst)).map(|link| link.address);
    assert_eq!(kept.collect::<std::collections::BTreeSet<_>>(), live.into_iter().collect());
}

#[tokio::test(start_paused = true)]
async fn a_new_endpoint_gets_its_share_little_by_little() {
    let slow = resource::SlowStart { window: Duration::from_secs(100), aggression: 1.0, min_weight: 10.0 };
    let lb = resource::LbSettings { slow_start: Some(slow), ..Default::default() };
    let mut bed = Bed::new(Cluster { lb, ..cluster() }, assignment(2));
    tokio::time::sleep(Duration::from_secs(101)).await;
    bed.update(assignment(3));
    for (later, share) in [(0, 0.1), (20, 0.2), (30, 0.5), (70, 1.0)] {
        tokio::time::sleep(Duration::from_secs(later)).await;
        bed.update(assignment(3));
        settle().await;
        let new = bed.picks(2100)[&3];
        let expected = 2100.0 * share / (2.0 + share);
        assert!((new as f64 - expected).abs() < 30.0, "{new} after {later} s more, not {expected}");
    }
}

#[tokio::test]
async fn a_session_keeps_its_endpoint_while_it_may() {
    let mut bed = Bed::of(3);
    let stick = |bed: &mut Bed, port: u16, exclude: &[Arc<Endpoint<FakeLink>>]| {
        let input = PickInput { override_host: Some(address(port)), ..plain() };
        let picks = (0..20).map(|_| match bed.cluster.pick(&input, exclude, &mut bed.rng) {
            Pick::Endpoint(endpoint) => endpoint.address().port(),
            Pick::Fail(cause) => panic!("{cause}"),
        });
        picks.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(stick(&mut bed, 2, &[]), [2].into());
    let second = bed.endpoint(2);
    assert_eq!(stick(&mut bed, 2, &[second]), [2].into(), "a retry goes to the same one (gRFC A55)");
    assert_eq!(stick(&mut bed, 9, &[]), [1, 2, 3].into(), "one that is not there is as none");
    bed.link(2).set(Connectivity::TransientFailure);
    assert!(!stick(&mut bed, 2, &[]).contains(&2), "nor is one that cannot be reached");
    bed.link(2).set(Connectivity::Ready);

    // What is draining is kept for sessions where the cluster says so.
    let mut draining = assignment(3);
    draining.priorities[0][0].endpoints[1].health = HealthStatus::Draining;
    bed.update(draining.clone());
    assert!(!stick(&mut bed, 2, &[]).contains(&2), "UNKNOWN and HEALTHY are what is allowed at first");
    let statuses = resource::HealthStatuses::USABLE.and(HealthStatus::Draining);
    let lb = resource::LbSettings { override_host_statuses: statuses, ..Default::default() };
    bed.cluster.update(Arc::new(Cluster { lb, ..cluster() }), Arc::new(draining));
    assert_eq!(stick(&mut bed, 2, &[]), [2].into());
    assert!(!bed.picked().contains(&2), "others do not go there");
}

#[tokio::test]
async fn leaving_priorities_keeps_to_the_random_subset() {
    let child = Arc::new(LbPolicy::Random);
    for (policy, expected) in [(LbPolicy::Random, 3), (LbPolicy::RandomSubsetting { subset_size: 1, child }, 1)] {
        let endpoints = priorities([vec![locality("a", 1, [1])], vec![locality("b", 1, [2, 3, 4])]]);
        let mut bed = Bed::new(Cluster { lb_policy: policy, ..cluster() }, endpoints);
        let tried = [bed.endpoint(1)];
        let avoid = Avoid { tried: &tried, previous_hosts: false, omit: &[], leave_priorities: 1 };
        let again = |bed: &mut Bed| match bed.cluster.pick_again(&plain(), &avoid, &mut bed.rng) {
            Pick::Endpoint(endpoint) => endpoint.address().port(),
            other => panic!("{other:?}"),
        };
        let ports: std::collections::BTreeSet<_> = (0..200).map(|_| again(&mut bed)).collect();
        assert!(!ports.contains(&1) && ports.len() == expected, "{ports:?}");
    }
}
