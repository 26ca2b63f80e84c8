//! Several attempts at the same time: on the limit of an attempt (Envoy), and after a delay (gRFC A6).

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, Served, TARGET, Then, assert_says,
    code::Local,
    echo::{Way, get},
    edit, routes, service, to, until,
};
use envoy_types::pb::envoy::config::route::v3::{HedgePolicy, RouteConfiguration, route};
use http::Response;
use mesh_client::{Explain, Mesh, Profile, retry::RetryBudget};
use mesh_control::ControlPlane;
use mesh_xds::{
    resource::{Hedge, RetryOn, RetryPolicy},
    server::ResourceType,
    source::Policy,
};
use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

/// What becomes of the requests of a server, in their order; of the last one on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// None.
    Hold,
    Now(u16),
    Later(u64),
    /// A gRPC status, with this pushback.
    Fail(i32, Option<&'static str>),
    /// A good gRPC response, after so many milliseconds.
    Ok(u64),
    /// A reset of the stream.
    Reset,
}

/// Requests seen, and those that the client reset.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    pub(crate) seen: Arc<AtomicUsize>,
    pub(crate) reset: Arc<AtomicUsize>,
}

pub(crate) async fn server(answers: &'static [Answer]) -> (H2Server, Counts) {
    let counts = Counts::default();
    let (count, held) = (counts.clone(), Mutex::new(Vec::new()));
    let server = H2Server::start(move |mut served: Served| {
        let number = count.seen.fetch_add(1, SeqCst);
        match answers[number.min(answers.len() - 1)] {
            Answer::Hold => {
                let reset = count.reset.clone();
                held.lock().unwrap().push(tokio::spawn(async move {
                    if poll_fn(|cx| served.respond.poll_reset(cx)).await.is_ok() {
                        reset.fetch_add(1, SeqCst);
                    }
                }));
            }
            Answer::Now(status) => served.status(status),
            Answer::Later(millis) => drop(tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(millis)).await;
                let head = Response::builder().header("x-late", "1").body(()).unwrap();
                // Nobody may wait any more.
                let _ = served.respond.send_response(head, true);
            })),
            Answer::Fail(code, None) => served.fail(code, &[]),
            Answer::Fail(code, Some(pushback)) => served.fail(code, &[("grpc-retry-pushback-ms", pushback)]),
            Answer::Ok(millis) => drop(tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(millis)).await;
                served.ok();
            })),
            Answer::Reset => served.respond.send_reset(h2::Reason::INTERNAL_ERROR),
        }
        Then::GoOn
    })
    .await;
    (server, counts)
}

/// Envoy's rules: attempts of 100 ms, hedged.
async fn on_per_try_timeout(addr: SocketAddr, budget: Option<RetryBudget>) -> (ControlPlane, Mesh) {
    hedged_on_timeout(&service(&[("one", addr)]), budget).await
}

/// The same of any service, with its rules.
pub(crate) async fn hedged_on_timeout(service: &str, budget: Option<RetryBudget>) -> (ControlPlane, Mesh) {
    let retries = "{attempts: 2, perTryTimeout: 100ms, retryOn: \"5xx\", backoff: 1ms}";
    let http = format!("[{{route: [{{destination: {}}}], retries: {retries}}}]", to(""));
    let cp = ControlPlane::builder().yaml(service.to_owned() + &routes(&http)).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let Some(route::Action::Route(action)) = &mut config.virtual_hosts[0].routes[0].action else { panic!() };
        action.hedge_policy = Some(HedgePolicy { hedge_on_per_try_timeout: true, ..HedgePolicy::default() });
    });
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Envoy);
    let mesh = match budget {
        Some(budget) => mesh.retry_budget(budget),
        None => mesh,
    };
    (cp, mesh.build().await.unwrap())
}

async fn all_is_given_back(mesh: &Mesh) {
    let channel = mesh.channel(TARGET).unwrap();
    until("all is given back", async || channel.load().is_idle()).await;
}

#[tokio::test]
async fn the_second_wins_and_the_first_is_cut_off() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Hold, Answer::Now(200)]).await;
        let (_cp, mesh) = on_per_try_timeout(server.addr(), None).await;
        assert_eq!(way.send(&mesh, get("/"), "body").await.unwrap().status(), 200, "{way:?}");
        until("the first is reset", async || counts.reset.load(SeqCst) == 1).await;
        assert_eq!(counts.seen.load(SeqCst), 2);
        all_is_given_back(&mesh).await;
    }
}

#[tokio::test]
async fn the_first_still_wins_when_it_is_sooner() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Later(250), Answer::Hold]).await;
        let (_cp, mesh) = on_per_try_timeout(server.addr(), None).await;
        let response = way.send(&mesh, get("/"), "").await.unwrap();
        assert_eq!(response.headers()["x-late"], "1", "{way:?}");
        until("the others are reset", async || counts.reset.load(SeqCst) == counts.seen.load(SeqCst) - 1).await;
        assert!(counts.seen.load(SeqCst) > 1);
        all_is_given_back(&mesh).await;
    }
}

#[tokio::test]
async fn a_bad_answer_of_one_is_left_to_the_other_and_the_last_is_given() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Later(250), Answer::Now(503), Answer::Now(500)]).await;
        let (_cp, mesh) = on_per_try_timeout(server.addr(), None).await;
        assert_eq!(way.send(&mesh, get("/"), "").await.unwrap().status(), 200, "{way:?}");
        let (failing, seen) = self::server(&[Answer::Now(503)]).await;
        let (_cp, mesh) = on_per_try_timeout(failing.addr(), None).await;
        assert_eq!(way.send(&mesh, get("/"), "").await.unwrap().status(), 503, "{way:?}");
        // Retried one after the other, as without hedging.
        assert_eq!(seen.seen.load(SeqCst), 3);
        assert!(counts.seen.load(SeqCst) >= 2);
    }
}

#[tokio::test]
async fn without_a_budget_there_is_one_attempt() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Later(300), Answer::Now(200)]).await;
        let (_cp, mesh) = on_per_try_timeout(server.addr(), Some(RetryBudget::fixed(0))).await;
        assert_eq!(way.send(&mesh, get("/"), "").await.unwrap().headers()["x-late"], "1", "{way:?}");
        assert_eq!(counts.seen.load(SeqCst), 1);
    }
}

/// gRPC's rules: an attempt after each delay, as many as gRPC makes.
async fn after_a_delay(server: &H2Server, delay: Duration) -> Local {
    let on = RetryOn { grpc_codes: 1 << 14, ..RetryOn::default() };
    let retry = RetryPolicy { on, num_retries: 4, ..RetryPolicy::default() };
    let policy = Policy { hedge: Some(Hedge::After(delay)), ..Policy::default().with_retry(retry) };
    Local::new(&[server.addr()], policy).await
}

#[tokio::test]
async fn attempts_follow_each_other_after_the_delay_of_a6() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Hold, Answer::Hold, Answer::Ok(0)]).await;
        let code = after_a_delay(&server, Duration::from_millis(50)).await;
        way.hello_with(&code.mesh, |request| request.set_timeout(GUARD)).await.unwrap();
        assert_eq!(counts.seen.load(SeqCst), 3, "{way:?}");
        until("the others are reset", async || counts.reset.load(SeqCst) == 2).await;
        assert_eq!(code.channel.load().requests, 0);
    }
}

#[tokio::test]
async fn a_failure_that_is_not_fatal_starts_the_next_at_once_and_a_fatal_one_ends_the_call() {
    for way in Way::BOTH {
        // The next follows without a delay of its own. Another hour would pass otherwise.
        let (server, counts) = server(&[Answer::Fail(14, None), Answer::Ok(0)]).await;
        let code = after_a_delay(&server, HOUR).await;
        let call = way.hello_with(&code.mesh, |request| request.set_timeout(2 * HOUR));
        tokio::time::timeout(GUARD, call).await.expect("waits for the delay").unwrap();
        assert_eq!(counts.seen.load(SeqCst), 2, "{way:?}");

        let (server, counts) = self::server(&[Answer::Hold, Answer::Fail(3, None)]).await;
        let code = after_a_delay(&server, Duration::from_millis(50)).await;
        assert_eq!(way.hello(&code.mesh).await.unwrap_err().code(), tonic::Code::InvalidArgument);
        until("the first is reset", async || counts.reset.load(SeqCst) == 1).await;
        assert_eq!((counts.seen.load(SeqCst), code.channel.load().requests), (2, 0), "{way:?}");
    }
}

#[tokio::test]
async fn a_failure_that_is_not_retried_leaves_the_attempts_beside_it_alone() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Ok(400), Answer::Reset, Answer::Hold]).await;
        let code = after_a_delay(&server, Duration::from_millis(250)).await;
        way.hello_with(&code.mesh, |request| request.set_timeout(GUARD)).await.unwrap();
        assert_eq!((counts.seen.load(SeqCst), code.channel.load().requests), (2, 0), "{way:?}");
        // Alone it is the answer.
        let (server, counts) = self::server(&[Answer::Reset]).await;
        let code = after_a_delay(&server, Duration::from_millis(250)).await;
        let error = way.hello(&code.mesh).await.unwrap_err();
        assert_eq!((error.code(), counts.seen.load(SeqCst)), (tonic::Code::Internal, 1), "{way:?}");
    }
}

#[tokio::test]
async fn a_server_that_asks_for_no_more_attempts_gets_none() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Ok(400), Answer::Fail(14, Some("-1")), Answer::Hold]).await;
        let code = after_a_delay(&server, Duration::from_millis(50)).await;
        // The first is still awaited.
        way.hello(&code.mesh).await.unwrap();
        assert_eq!(counts.seen.load(SeqCst), 2, "{way:?}");
    }
}

#[tokio::test]
async fn a_caller_who_gives_up_ends_all_attempts() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Hold]).await;
        let code = after_a_delay(&server, Duration::from_millis(20)).await;
        let call = way.hello(&code.mesh);
        assert!(tokio::time::timeout(Duration::from_millis(300), call).await.is_err());
        let seen = counts.seen.load(SeqCst);
        assert!(seen >= 3, "{way:?}: {seen}");
        until("all are reset", async || counts.reset.load(SeqCst) == counts.seen.load(SeqCst)).await;
        code.until_idle().await;
    }
}

#[tokio::test]
async fn explain_tells_of_the_attempts_side_by_side() {
    for way in Way::BOTH {
        let (server, _) = server(&[Answer::Hold, Answer::Now(200)]).await;
        let (_cp, mesh) = on_per_try_timeout(server.addr(), None).await;
        let explain = Explain::default();
        way.send(&mesh, get("/").extension(explain.clone()), "").await.unwrap();
        let said = explain.explanation().to_string();
        assert_says(&said, &["attempt 2 starts beside those in flight", "2 at", "HTTP 200"]);
    }
}
