use super::*;
use mesh_xds::resource::{FailureAccrual, HealthStatus, OutlierDetection};
use tokio::time::{Instant, advance, sleep};

fn outliers(config: OutlierDetection) -> Cluster {
    Cluster { outlier_detection: Some(Arc::new(config)), ..cluster() }
}

fn config() -> OutlierDetection {
    OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() }
}

fn accrual() -> FailureAccrual {
    FailureAccrual {
        max_failures: 3,
        min_pause: Duration::from_secs(2),
        max_pause: Duration::from_secs(60),
        jitter: 0.0,
    }
}

fn answer(endpoint: &Arc<Endpoint<FakeLink>>, outcome: Outcome, times: usize) {
    for _ in 0..times {
        endpoint.start().record(outcome);
    }
}

fn ejected(bed: &Bed) -> Vec<u16> {
    let ejected = bed.endpoints().into_iter().filter(|e| e.is_ejected());
    ejected.map(|e| e.address().port()).collect()
}

#[tokio::test(start_paused = true)]
async fn five_failures_in_a_row_eject_at_once_and_for_the_base_time() {
    let mut bed = Bed::new(outliers(config()), assignment(3));
    answer(&bed.endpoint(2), Outcome::ServerError, 4);
    assert_eq!(bed.picked(), [1, 2, 3]);
    answer(&bed.endpoint(2), Outcome::ServerError, 1);
    assert_eq!(bed.picked(), [1, 3], "before any task has run");
    let status = bed.cluster.status(Instant::now());
    assert_eq!(status.endpoints[1].ejected_for, Some(Duration::from_secs(30)));

    sleep(Duration::from_millis(29_990)).await;
    assert_eq!(bed.picked(), [1, 3]);
    sleep(Duration::from_millis(20)).await;
    assert_eq!(bed.picked(), [1, 2, 3]);
    assert_eq!(bed.cluster.status(Instant::now()).endpoints[1].ejected_for, None);
}

#[tokio::test(start_paused = true)]
async fn an_ejection_between_two_sweeps_ends_on_time() {
    let bed = Bed::new(
        outliers(OutlierDetection {
            interval: Duration::from_secs(3600),
            base_ejection_time: Duration::from_millis(1500),
            ..config()
        }),
        assignment(2),
    );
    settle().await;
    sleep(Duration::from_secs(7)).await;
    answer(&bed.endpoint(1), Outcome::LocalOrigin, 5);
    sleep(Duration::from_millis(1490)).await;
    assert_eq!(ejected(&bed), [1]);
    sleep(Duration::from_millis(20)).await;
    assert_eq!(ejected(&bed), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn the_second_ejection_lasts_twice_as_long() {
    let bed = Bed::new(outliers(config()), assignment(2));
    answer(&bed.endpoint(1), Outcome::ServerError, 5);
    sleep(Duration::from_millis(30_010)).await;
    assert_eq!(ejected(&bed), [0; 0]);
    answer(&bed.endpoint(1), Outcome::ServerError, 5);
    sleep(Duration::from_millis(59_000)).await;
    assert_eq!(ejected(&bed), [1]);
    sleep(Duration::from_millis(1_010)).await;
    assert_eq!(ejected(&bed), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_success_ends_the_row_and_each_request_counts_once() {
    let bed = Bed::new(outliers(config()), assignment(2));
    let endpoint = bed.endpoint(1);
    for _ in 0..10 {
        answer(&endpoint, Outcome::ServerError, 4);
        answer(&endpoint, Outcome::Success, 1);
    }
    let mut request = endpoint.start();
    for _ in 0..10 {
        request.record(Outcome::ServerError);
    }
    drop(endpoint.start());
    assert_eq!(ejected(&bed), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn gateway_failures_eject_when_they_are_enforced() {
    let row = OutlierDetection {
        consecutive_5xx: None,
        consecutive_gateway_failure: Some(3),
        enforcing_consecutive_gateway_failure: 100,
        ..config()
    };
    let bed = Bed::new(outliers(row.clone()), assignment(4));
    answer(&bed.endpoint(1), Outcome::ServerError, 50);
    answer(&bed.endpoint(2), Outcome::GatewayFailure, 3);
    answer(&bed.endpoint(3), Outcome::LocalOrigin, 3);
    assert_eq!(ejected(&bed), [2, 3]);

    let spared = OutlierDetection { enforcing_consecutive_gateway_failure: 0, ..row };
    let bed = Bed::new(outliers(spared), assignment(2));
    answer(&bed.endpoint(1), Outcome::GatewayFailure, 50);
    assert_eq!(ejected(&bed), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn no_more_than_the_maximum_share_is_ejected() {
    let mut bed = Bed::new(outliers(OutlierDetection { max_ejection_percent: 10, ..config() }), assignment(20));
    for endpoint in bed.endpoints() {
        answer(&endpoint, Outcome::ServerError, 5);
    }
    assert_eq!(ejected(&bed), [1, 2]);
    assert_eq!(bed.picked().len(), 18);
    // An ejected endpoint that leaves makes room.
    bed.update(priorities([vec![locality("a", 1, 2..=20)]]));
    answer(&bed.endpoint(7), Outcome::ServerError, 5);
    assert_eq!(ejected(&bed), [2, 7]);
}

#[tokio::test(start_paused = true)]
async fn when_all_are_ejected_all_are_used() {
    let mut bed = Bed::new(outliers(config()), assignment(3));
    for endpoint in bed.endpoints() {
        answer(&endpoint, Outcome::ServerError, 5);
    }
    assert_eq!(ejected(&bed), [1, 2, 3]);
    assert_eq!(bed.picked(), [1, 2, 3]);
    assert!(bed.cluster.status(Instant::now()).panic);
    sleep(Duration::from_secs(31)).await;
    assert_eq!(bed.picked(), [1, 2, 3]);
    assert!(!bed.cluster.status(Instant::now()).panic);
}

#[tokio::test(start_paused = true)]
async fn success_rate_is_judged_at_the_end_of_each_interval() {
    let bed = Bed::new(outliers(OutlierDetection { consecutive_5xx: None, ..config() }), assignment(5));
    settle().await;
    let run = || {
        for endpoint in bed.endpoints() {
            let failures = if endpoint.address().port() == 3 { 50 } else { 0 };
            answer(&endpoint, Outcome::Success, 100 - failures);
            answer(&endpoint, Outcome::ServerError, failures);
        }
    };
    run();
    assert_eq!(ejected(&bed), [0; 0]);
    advance(Duration::from_millis(10_001)).await;
    settle().await;
    assert_eq!(ejected(&bed), [3]);
}

#[tokio::test(start_paused = true)]
async fn detection_follows_its_configuration() {
    let bed = Bed::new(cluster(), assignment(2));
    let endpoints = bed.cluster.view.load().assignment.clone();
    answer(&bed.endpoint(1), Outcome::ServerError, 50);
    assert_eq!(ejected(&bed), [0; 0], "off");

    bed.cluster.update(Arc::new(outliers(config())), endpoints.clone());
    answer(&bed.endpoint(1), Outcome::ServerError, 5);
    assert_eq!(ejected(&bed), [1]);

    let short = OutlierDetection { base_ejection_time: Duration::from_secs(2), ..config() };
    bed.cluster.update(Arc::new(outliers(short)), endpoints.clone());
    sleep(Duration::from_millis(2_010)).await;
    assert_eq!(ejected(&bed), [0; 0], "a shorter time holds for what is ejected already");

    answer(&bed.endpoint(1), Outcome::ServerError, 5);
    assert_eq!(ejected(&bed), [1]);
    bed.cluster.update(Arc::new(cluster()), endpoints);
    assert_eq!(ejected(&bed), [0; 0], "off again");
}

#[tokio::test(start_paused = true)]
async fn an_ejection_outlives_updates_and_new_links_but_not_the_endpoint() {
    let mut bed = Bed::new(outliers(config()), assignment(3));
    let gone = bed.endpoint(1);
    answer(&gone, Outcome::ServerError, 5);
    bed.update(priorities([vec![locality("b", 3, [3, 1, 4])]]));
    assert_eq!(ejected(&bed), [1]);

    let endpoints = bed.cluster.view.load().assignment.clone();
    let config = Cluster { connect_timeout: Duration::from_secs(9), ..outliers(config()) };
    bed.cluster.update(Arc::new(config), endpoints);
    assert_eq!(ejected(&bed), [1]);
    assert_eq!(bed.picked(), [3, 4]);

    bed.update(priorities([vec![locality("b", 3, [3, 4])]]));
    bed.update(priorities([vec![locality("b", 3, [1, 3, 4])]]));
    assert_eq!(bed.picked(), [1, 3, 4]);
    answer(&gone, Outcome::ServerError, 50);
    assert_eq!(bed.picked(), [1, 3, 4], "what is left of the old one cannot harm the new one");
}

#[test]
fn statuses_are_counted_as_envoy_counts_them() {
    use http::StatusCode;
    use tonic::Code;
    for (status, outcome) in
        [(200, Outcome::Success), (404, Outcome::Success), (429, Outcome::Success), (500, Outcome::ServerError)]
    {
        assert_eq!(Outcome::of_http(StatusCode::from_u16(status).unwrap()), outcome);
    }
    for status in [502, 503, 504] {
        assert_eq!(Outcome::of_http(StatusCode::from_u16(status).unwrap()), Outcome::GatewayFailure);
    }
    for code in [Code::Ok, Code::NotFound, Code::InvalidArgument, Code::ResourceExhausted, Code::Cancelled] {
        assert_eq!(Outcome::of_grpc(code), Outcome::Success);
    }
    for code in [Code::Unknown, Code::Internal, Code::DataLoss, Code::Unimplemented] {
        assert_eq!(Outcome::of_grpc(code), Outcome::ServerError);
    }
    for code in [Code::Unavailable, Code::DeadlineExceeded] {
        assert_eq!(Outcome::of_grpc(code), Outcome::GatewayFailure);
    }
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_on_probation_takes_one_request_whose_end_decides() {
    let mut bed = Bed::new(outliers(OutlierDetection::accrual(accrual())), assignment(2));
    answer(&bed.endpoint(1), Outcome::LocalOrigin, 3);
    assert_eq!((ejected(&bed), bed.picked()), (vec![1], vec![2]));
    sleep(Duration::from_millis(2_010)).await;
    assert_eq!(ejected(&bed), [0; 0]);

    // Of many requests at once one is let through.
    let probe = |bed: &mut Bed| {
        let mut in_flight: Vec<InFlight<FakeLink>> = (0..100)
            .map(|_| match bed.pick() {
                Pick::Endpoint(endpoint) => InFlight::of(endpoint),
                other => panic!("{other:?}"),
            })
            .collect();
        let probe = in_flight.iter().position(|request| request.endpoint().address().port() == 1);
        let probe = in_flight.swap_remove(probe.expect("it is probed"));
        assert!(in_flight.iter().all(|request| request.endpoint().address().port() == 2), "one at a time");
        probe
    };
    // One that is given up decides nothing.
    drop(probe(&mut bed));
    probe(&mut bed).record(Outcome::ServerError);
    assert_eq!((ejected(&bed), bed.picked()), (vec![1], vec![2]), "one failure is enough");
    sleep(Duration::from_millis(3_990)).await;
    assert_eq!(ejected(&bed), [1], "twice as long");
    sleep(Duration::from_millis(20)).await;
    probe(&mut bed).record(Outcome::Success);
    settle().await;
    assert_eq!(bed.picked(), [1, 2]);
    assert!(!bed.endpoint(1).is_on_probation());
    answer(&bed.endpoint(1), Outcome::ServerError, 2);
    assert_eq!(ejected(&bed), [0; 0], "it starts clean");
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_is_given_up_after_a_rebuild_is_followed_by_another() {
    let mut bed = Bed::new(outliers(OutlierDetection::accrual(accrual())), assignment(2));
    answer(&bed.endpoint(1), Outcome::LocalOrigin, 3);
    sleep(Duration::from_millis(2_010)).await;
    for _ in 0..3 {
        let probe = claimed(&mut bed);
        bed.cluster.rebuild();
        drop(InFlight::of(probe));
        settle().await;
    }
    InFlight::of(claimed(&mut bed)).record(Outcome::Success);
    settle().await;
    assert_eq!(bed.picked(), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn only_the_probe_decides() {
    let mut bed = Bed::new(outliers(OutlierDetection::accrual(accrual())), assignment(2));
    let mut earlier: Vec<_> = (0..8).map(|_| bed.endpoint(1).start()).collect();
    let mut end = |outcome, times| earlier.drain(..times).for_each(|mut request| request.record(outcome));
    answer(&bed.endpoint(1), Outcome::LocalOrigin, 3);
    sleep(Duration::from_millis(2_010)).await;
    end(Outcome::Success, 1);
    end(Outcome::ServerError, 3);
    assert!(bed.endpoint(1).is_on_probation());
    let mut probe = InFlight::of(claimed(&mut bed));
    end(Outcome::Success, 1);
    end(Outcome::ServerError, 3);
    assert!(bed.endpoint(1).is_on_probation());
    probe.record(Outcome::Success);
    assert!(!bed.endpoint(1).is_on_probation() && ejected(&bed).is_empty());
}

/// Endpoint 1, picked for its probe.
fn claimed(bed: &mut Bed) -> Arc<Endpoint<FakeLink>> {
    let picks = (0..100).map(|_| bed.pick());
    let mut endpoints =
        picks.filter_map(|pick| if let Pick::Endpoint(endpoint) = pick { Some(endpoint) } else { None });
    endpoints.find(|endpoint| endpoint.address().port() == 1).expect("it is probed")
}

#[tokio::test(start_paused = true)]
async fn a_degraded_endpoint_that_is_ejected_returns_and_counts() {
    let mut some = assignment(2);
    some.priorities[0][0].endpoints[0].health = HealthStatus::Degraded;
    let bed = Bed::new(outliers(OutlierDetection { max_ejection_percent: 50, ..config() }), some);
    answer(&bed.endpoint(1), Outcome::ServerError, 5);
    assert_eq!(ejected(&bed), [1]);
    answer(&bed.endpoint(2), Outcome::ServerError, 5);
    assert_eq!(ejected(&bed), [1], "half of them are");
    sleep(Duration::from_millis(30_010)).await;
    assert_eq!(ejected(&bed), [0; 0]);
}
