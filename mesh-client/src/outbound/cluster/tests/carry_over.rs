use super::*;
use mesh_xds::resource::{CircuitBreakers, HealthCheck, HealthStatus, Thresholds};
use std::collections::BTreeSet;

#[tokio::test]
async fn an_endpoint_that_stays_keeps_its_link_and_only_what_changed_is_touched() {
    let bed = Bed::of(5);
    let before = bed.endpoints();
    bed.update(priorities([vec![locality("a", 1, [1, 2, 9, 4, 5])]]));
    let after = bed.endpoints();
    for i in [0, 1, 3, 4] {
        assert!(Arc::ptr_eq(&before[i], &after[i]), "endpoint {i}");
    }
    assert_eq!(bed.opened().len(), 6);
    let drained: Vec<_> = bed.opened().iter().filter(|l| l.drained.load(SeqCst)).map(|l| l.address.port()).collect();
    assert_eq!(drained, [3]);
}

#[tokio::test]
async fn an_endpoint_keeps_its_link_when_it_moves_to_another_locality_and_priority() {
    let bed = Bed::new(cluster(), priorities([vec![locality("a", 1, [1, 2])], vec![locality("b", 1, [3])]]));
    let moved = bed.endpoint(2);
    bed.update(priorities([vec![locality("c", 1, [3]), locality("a", 1, [1])], vec![locality("b", 1, [2])]]));
    assert!(Arc::ptr_eq(&moved, &bed.endpoint(2)));
    assert_eq!((&*moved.placement().locality.zone, moved.placement().priority), ("b", 1));
    assert_eq!((&*bed.endpoint(3).placement().locality.zone, bed.endpoint(3).placement().priority), ("c", 0));
    assert_eq!(bed.opened().len(), 3);
}

#[tokio::test]
async fn a_link_is_made_by_the_first_request_and_none_outlives_its_endpoint() {
    let bed = Bed::of(2);
    let config = bed.cluster.writer().cluster.clone();
    bed.cluster.update(config.clone(), Arc::new(assignment(4)));
    let late = bed.endpoint(4);
    assert!(late.opened().is_none() && bed.endpoint(1).opened().is_some());
    bed.cluster.update(config, Arc::new(assignment(3)));
    assert!(late.link().drained.load(SeqCst), "a request that was picked for it before it left");
    assert!(!bed.link(3).drained.load(SeqCst));
}

/// Any sequence of assignments, against a model that knows addresses only.
#[tokio::test]
async fn links_follow_their_addresses_through_any_changes() {
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..50 {
        let bed = Bed::of(3);
        let mut model: BTreeMap<u16, Arc<FakeLink>> = (1..=3).map(|port| (port, bed.link(port))).collect();
        for _ in 0..20 {
            let mut ports: Vec<u16> = (1..=12).filter(|_| rng.bool()).collect();
            if rng.u8(0..3) == 0 {
                rng.shuffle(&mut ports);
            }
            let mut rest = &ports[..];
            let mut cut = |rng: &mut fastrand::Rng| {
                let (taken, left) = rest.split_at(rng.usize(..=rest.len()));
                rest = left;
                taken.to_vec()
            };
            let (a, b, c) = (cut(&mut rng), cut(&mut rng), cut(&mut rng));
            let mut first = vec![locality("a", 1, a.clone()), locality("b", 2, b.clone())];
            if rng.bool() {
                first.reverse();
            }
            let next = priorities([first, vec![locality("a", 1, c.clone())]]);
            bed.update(next.clone());

            let wanted: BTreeSet<u16> = a.into_iter().chain(b).chain(c).collect();
            for (port, link) in &model {
                assert_eq!(link.drained.load(SeqCst), !wanted.contains(port), "port {port}");
            }
            model.retain(|port, _| wanted.contains(port));
            let said = next.priorities.iter().flatten().flat_map(|l| &l.endpoints).map(|e| e.address.port());
            let live: Vec<u16> = bed.endpoints().iter().map(|e| e.address().port()).collect();
            assert_eq!(live, said.collect::<Vec<_>>());
            for port in wanted {
                let link = bed.link(port);
                assert!(!link.drained.load(SeqCst));
                assert!(Arc::ptr_eq(model.entry(port).or_insert_with(|| link.clone()), &link), "port {port}");
            }
        }
    }
}

#[tokio::test]
async fn the_same_arcs_change_nothing() {
    let bed = Bed::of(3);
    let view = bed.cluster.view.load_full();
    bed.cluster.update(view.cluster.clone(), view.assignment.clone());
    assert!(Arc::ptr_eq(&view, &bed.cluster.view.load_full()));
}

#[tokio::test]
async fn a_new_weight_is_used_on_the_old_link() {
    let mut bed = Bed::of(2);
    let mut next = assignment(2);
    next.priorities[0][0].endpoints[1].weight = 3;
    bed.update(next);
    assert_eq!(bed.opened().len(), 2);
    assert_eq!(bed.endpoint(2).placement().weight, 3);
    let light = bed.picks(400)[&1];
    assert!((98..=102).contains(&light), "{light} of 400 for a weight of 1 in 4");
}

#[tokio::test]
async fn an_endpoint_marked_as_draining_or_unhealthy_gets_no_requests_and_keeps_those_it_has() {
    for health in [HealthStatus::Draining, HealthStatus::Unhealthy, HealthStatus::Timeout, HealthStatus::Degraded] {
        let mut bed = Bed::of(2);
        let mut next = assignment(2);
        next.priorities[0][0].endpoints[0].health = health;
        bed.update(next);
        assert_eq!(bed.picked(), [2], "{health:?}");
        assert!(!bed.link(1).drained.load(SeqCst));
        bed.update(assignment(2));
        assert_eq!(bed.picked(), [1, 2]);
        assert_eq!(bed.opened().len(), 2);
    }
}

#[tokio::test]
async fn a_change_of_the_transport_makes_new_links_and_a_change_of_limits_does_not() {
    let mut bed = Bed::of(2);
    let endpoints = bed.cluster.view.load().assignment.clone();
    let default = Thresholds { max_requests: 1, ..Thresholds::default() };
    let limits = CircuitBreakers { default, ..CircuitBreakers::default() };
    bed.cluster.update(Arc::new(Cluster { circuit_breakers: limits, ..cluster() }), endpoints.clone());
    assert_eq!(bed.opened().len(), 2);
    bed.cluster.begin_request(RoutingPriority::Default).unwrap();
    assert_eq!(bed.cluster.begin_request(RoutingPriority::Default).unwrap_err().limit, 1);

    bed.cluster.update(Arc::new(Cluster { connect_timeout: Duration::from_secs(1), ..cluster() }), endpoints);
    let links = bed.opened();
    assert_eq!(links.iter().map(|l| l.drained.load(SeqCst)).collect::<Vec<_>>(), [true, true, false, false]);
    assert_eq!(bed.picked(), [1, 2]);
    assert_eq!(bed.cluster.breaker().total(Resource::Requests), 1, "what is in flight stays counted");
    bed.cluster.end_request(RoutingPriority::Default);
    assert_eq!(bed.cluster.breaker().total(Resource::Requests), 0);

    // The new connector's links are watched as the old one's were.
    links[2].set(Connectivity::TransientFailure);
    assert_eq!(bed.picked(), [2]);
    settle().await;
    links[2].set(Connectivity::Ready);
    settle().await;
    assert_eq!(bed.picked(), [1, 2]);
}

#[tokio::test]
async fn a_dropped_cluster_drains_its_links_and_ends_its_tasks() {
    let Bed { cluster, connectors, .. } =
        Bed::new(Cluster { outlier_detection: Some(Arc::default()), ..cluster() }, assignment(2));
    settle().await;
    assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), 2);
    let links = connectors.lock().unwrap()[0].opened.lock().unwrap().clone();
    let weak = Arc::downgrade(&cluster);
    drop(cluster);
    assert!(weak.upgrade().is_none());
    assert!(links.iter().all(|link| link.drained.load(SeqCst)));
    settle().await;
    assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_was_kept_for_its_health_goes_with_the_health_checks() {
    let checked = Cluster { health_check: Some(Arc::new(HealthCheck::http("/"))), ..cluster() };
    let bed = Bed::new(checked, assignment(2));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let link = bed.link(2);
    bed.update(assignment(1));
    assert_eq!(bed.endpoints().len(), 2, "it passes its checks");
    let wanted = bed.cluster.writer().wanted.clone();
    bed.cluster.update(Arc::new(cluster()), wanted);
    assert_eq!(bed.endpoints().len(), 1);
    assert!(link.drained.load(SeqCst));
}
