use super::*;
use crate::outbound::testing::{Script, Strict};
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::Full;
use mesh_xds::resource::Maglev;
use std::{collections::BTreeSet, io};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::ServiceExt;

type Changes = mpsc::UnboundedSender<Result<Change<&'static str, Strict>, io::Error>>;
type Source = Pin<Box<dyn Stream<Item = Result<Change<&'static str, Strict>, io::Error>> + Send>>;

fn source() -> (Changes, Source) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (sender, UnboundedReceiverStream::new(receiver).boxed())
}

fn request() -> Request<Full<Bytes>> {
    Request::new(Full::default())
}

fn scripts<const N: usize>() -> ([Script; N], ServiceList<Strict>) {
    let scripts = std::array::from_fn(|_| Script::default());
    let services = scripts.iter().map(Strict::new).collect::<Vec<_>>();
    (scripts, ServiceList::new(services))
}

#[tokio::test]
async fn every_service_gets_its_turn() {
    let (scripts, services) = scripts::<3>();
    let client = LoadBalanceLayer::round_robin().layer(services);
    for _ in 0..12 {
        client.clone().oneshot(request()).await.unwrap();
    }
    assert_eq!(scripts.map(|script| script.calls()), [4, 4, 4]);
}

#[tokio::test]
async fn a_request_is_load_until_its_body_ended_or_was_dropped() {
    let (scripts, services) = scripts::<2>();
    let client = LoadBalanceLayer::least_request(10).layer(services);
    let held = client.clone().oneshot(request()).await.unwrap();
    let busy = scripts.iter().position(|script| script.calls() == 1).unwrap();
    for _ in 0..20 {
        client.clone().oneshot(request()).await.unwrap();
    }
    // Ten choices between two see both but once in five hundred times.
    assert!(scripts[busy].calls() <= 3, "{}", scripts[busy].calls());
    drop(held);
    for _ in 0..20 {
        client.clone().oneshot(request()).await.unwrap();
    }
    assert!(scripts[busy].calls() >= 5);
}

#[tokio::test]
async fn everybody_waits_for_the_first_service_and_none_is_forgotten() {
    let (changes, source) = source();
    let client = LoadBalanceLayer::random().layer(source);
    let calls: Vec<_> = (0..5).map(|_| tokio::spawn(client.clone().oneshot(request()))).collect();
    tokio::task::yield_now().await;
    // One of those who wait goes away.
    calls[4].abort();
    tokio::task::yield_now().await;
    changes.send(Ok(Change::Insert("a", Strict::new(&Script::default())))).unwrap();
    for call in calls.into_iter().take(4) {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_saw_the_last_service_go_is_woken_by_the_next() {
    let (changes, source) = source();
    let client = LoadBalanceLayer::random().layer(source);
    changes.send(Ok(Change::Insert("a", Strict::new(&Script::default())))).unwrap();
    client.clone().oneshot(request()).await.unwrap();
    changes.send(Ok(Change::Remove("a"))).unwrap();
    let call = tokio::spawn(client.oneshot(request()));
    tokio::task::yield_now().await;
    assert!(!call.is_finished(), "there is none");
    changes.send(Ok(Change::Insert("b", Strict::new(&Script::default())))).unwrap();
    tokio::time::timeout(Duration::from_secs(60), call).await.expect("it is woken").unwrap().unwrap();
}

#[test]
#[should_panic(expected = "table_size: 1000 is not a prime")]
fn a_policy_that_cannot_be_is_none() {
    LoadBalanceLayer::new(LbPolicy::Maglev(Maglev { table_size: 1000, ..Maglev::default() }));
}

#[tokio::test]
async fn services_come_and_go_and_what_fails_is_said() {
    let (changes, source) = source();
    let mut client = LoadBalanceLayer::random().layer(source);
    let [a, b] = [Script::default(), Script::default()];
    changes.send(Ok(Change::Insert("a", Strict::new(&a)))).unwrap();
    changes.send(Ok(Change::Insert("b", Strict::new(&b)))).unwrap();
    changes.send(Ok(Change::Remove("a"))).unwrap();
    for _ in 0..5 {
        client.clone().oneshot(request()).await.unwrap();
    }
    assert_eq!((a.calls(), b.calls()), (0, 5));
    changes.send(Ok(Change::Remove("b"))).unwrap();
    let ready = ServiceExt::<Request<Full<Bytes>>>::ready(&mut client);
    assert!(tokio::time::timeout(Duration::from_millis(20), ready).await.is_err(), "there is none");
    changes.send(Err(io::Error::other("gone"))).unwrap();
    let error = ServiceExt::<Request<Full<Bytes>>>::ready(&mut client).await.unwrap_err();
    assert_eq!(error.to_string(), "gone");
    drop(changes);
    let error = client.oneshot(request()).await.unwrap_err();
    assert!(error.is::<NoServices>(), "{error}");
}

#[tokio::test]
async fn a_hashed_request_goes_to_the_same_service_every_time() {
    let (scripts, services) = scripts::<5>();
    let client = LoadBalanceLayer::new(LbPolicy::Maglev(Maglev::default())).layer(services);
    let mut used = BTreeSet::new();
    for hash in 0..20u64 {
        let before: Vec<_> = scripts.iter().map(Script::calls).collect();
        for _ in 0..3 {
            let mut request = request();
            request.extensions_mut().insert(RequestHash(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            client.clone().oneshot(request).await.unwrap();
        }
        let grown: Vec<_> = (0..5).filter(|i| scripts[*i].calls() > before[*i]).collect();
        assert_eq!(grown.len(), 1, "hash {hash}");
        used.extend(grown);
    }
    assert!(used.len() > 1);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_fails_is_held_out_and_comes_back() {
    let (scripts, services) = scripts::<2>();
    let config = OutlierDetection {
        consecutive_5xx: Some(3),
        max_ejection_percent: 50,
        base_ejection_time: Duration::from_secs(30),
        ..OutlierDetection::default()
    };
    let client = LoadBalanceLayer::round_robin().outlier_detection(config).layer(services);
    for _ in 0..3 {
        scripts[0].push_status(500);
    }
    let call = async || {
        let response = client.clone().oneshot(request()).await.unwrap();
        response.status().as_u16()
    };
    let mut failed = 0;
    for _ in 0..20 {
        failed += usize::from(call().await == 500);
    }
    assert_eq!((failed, scripts[0].calls()), (3, 3), "held out after the third");
    tokio::time::advance(Duration::from_secs(31)).await;
    for _ in 0..4 {
        assert_eq!(call().await, 200);
    }
    assert_eq!(scripts[0].calls(), 5, "it has its turn again");
}

#[tokio::test(start_paused = true)]
async fn fast_failures_are_dear() {
    let calls = Arc::new(AtomicU32::new(0));
    let service = |status: u16| {
        let calls = calls.clone();
        tower::service_fn(move |_: Request<Full<Bytes>>| {
            calls.fetch_add(u32::from(status != 200), Relaxed);
            async move {
                if status == 200 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                let response = Response::builder().status(status).body(Full::<Bytes>::default());
                if status == 0 { Err(BoxError::from("broken")) } else { Ok(response?) }
            }
        })
    };
    for status in [500, 429, 0] {
        calls.store(0, Relaxed);
        let services = ServiceList::new([service(status), service(200)]);
        let client = LoadBalanceLayer::new(LbPolicy::PeakEwma(mesh_xds::resource::PeakEwma::default())).layer(services);
        for _ in 0..20 {
            drop(client.clone().oneshot(request()).await);
        }
        assert!(calls.load(Relaxed) <= 1, "{} of status {status}", calls.load(Relaxed));
    }
}
