//! Filters from code: each that routes of a control plane can have, for both ways.

use crate::{
    filters_service::Rls,
    hedging::{Answer, server},
    support::{
        H2Server,
        code::{Local, fixed},
        echo::{Echo, Way, get, joined},
        until,
    },
};
use http::HeaderName;
use mesh_client::{
    Profile,
    filter::{
        AdaptiveConcurrencyConfig, AdmissionControlConfig, BufferConfig, GlobalRateLimitConfig, HeaderMutation,
        HeaderMutationConfig, HttpFilter, HttpFilterConfig, LocalDescriptor, LocalRateLimitConfig, SessionState,
        StatefulSessionConfig, TokenBucket,
    },
    policy::{
        AppendAction, Cluster, FilterOverride, Format, HeaderAdd, HttpProtocol, Policy, RateLimit, RateLimitAction,
        route,
    },
};
use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

fn with(config: HttpFilterConfig) -> Policy {
    Policy::default().with_filter(HttpFilter::new("filter", config))
}

async fn local(addr: std::net::SocketAddr, policy: Policy) -> Local {
    Local::with(&fixed(&[addr]), policy, |mesh| mesh.profile(Profile::Envoy)).await
}

fn tokens(max_tokens: u32) -> TokenBucket {
    TokenBucket { max_tokens, tokens_per_fill: 1, fill_interval: Duration::from_secs(3600) }
}

fn plan() -> RateLimit {
    let header = mesh_client::filter::HeaderField::Name(HeaderName::from_static("x-plan"));
    let action = RateLimitAction::RequestHeader { header, key: "plan".into(), skip_if_absent: false };
    RateLimit { actions: vec![action], ..RateLimit::default() }
}

/// The statuses of so many requests.
async fn statuses(way: Way, local: &Local, count: usize, plan: &str) -> Vec<u16> {
    let mut statuses = Vec::new();
    for _ in 0..count {
        let response = way.send(&local.mesh, get("/x").header("x-plan", plan), "").await.unwrap();
        statuses.push(response.status().as_u16());
    }
    statuses
}

#[tokio::test]
async fn headers_are_changed_and_bodies_bounded() {
    let backend = Echo::start("a").await;
    let add = |text: &str| {
        let name = HeaderName::from_static("x-code");
        HeaderMutation::Add(HeaderAdd {
            name,
            value: Format::parse(text).unwrap(),
            action: AppendAction::Overwrite,
            keep_empty: false,
        })
    };
    let mutation = HeaderMutationConfig {
        request: vec![add("%REQ(:path)%"), HeaderMutation::Remove(HeaderName::from_static("x-plan"))],
        response: vec![add("seen")],
        ..HeaderMutationConfig::default()
    };
    let buffer = HttpFilterConfig::Buffer(BufferConfig { max_request_bytes: Some(4) });
    let policy = with(HttpFilterConfig::HeaderMutation(Arc::new(mutation)))
        .with_filter(HttpFilter { disabled: true, ..HttpFilter::new("buffer", buffer) })
        .with_route(
            route::exact("/small").to_target().filter("buffer", FilterOverride { disabled: false, config: None }),
        );
    let local = local(backend.addr(), policy).await;
    for way in Way::BOTH {
        let response = way.send(&local.mesh, get("/x").header("x-plan", "1"), "five!").await.unwrap();
        let seen = backend.last();
        assert_eq!((seen.header("x-code").as_str(), seen.header("x-plan").as_str()), ("/x", ""), "{way:?}");
        assert_eq!((joined(response.headers(), "x-code").as_str(), &seen.body[..]), ("seen", &b"five!"[..]));
        for (body, status) in [("four", 200), ("five!", 413)] {
            let response = way.send(&local.mesh, get("/small").method("POST"), body).await.unwrap();
            assert_eq!(response.status(), status, "{way:?}");
        }
    }
}

#[tokio::test]
async fn rates_are_limited_here_and_by_a_service() {
    let backend = Echo::start("a").await;
    for way in Way::BOTH {
        let limit = LocalRateLimitConfig::of(tokens(2));
        let local = local(backend.addr(), with(HttpFilterConfig::LocalRateLimit(Arc::new(limit)))).await;
        assert_eq!(statuses(way, &local, 4, "any").await, [200, 200, 429, 429], "{way:?}");

        // Descriptors of a route have buckets of their own.
        let gold = LocalDescriptor { entries: vec![("plan".into(), "gold".into())], bucket: tokens(3), shadow: false };
        let limit = LocalRateLimitConfig {
            descriptors: vec![gold],
            always_consume_default: false,
            ..LocalRateLimitConfig::of(tokens(1))
        };
        let policy = with(HttpFilterConfig::LocalRateLimit(Arc::new(limit)))
            .with_route(route::any().to_target().rate_limits([plan()]));
        let local = self::local(backend.addr(), policy).await;
        assert_eq!(statuses(way, &local, 4, "gold").await, [200, 200, 200, 429], "{way:?}");
        assert_eq!(statuses(way, &local, 2, "none").await, [200, 429], "{way:?}");

        let (rls, addr, _task) = Rls::start(1).await;
        let limit = GlobalRateLimitConfig { timeout: None, ..GlobalRateLimitConfig::of("shop", "rls") };
        let service = Cluster { http_protocol: Some(HttpProtocol::Http2), ..Cluster::of("rls", [addr]) };
        let policy = with(HttpFilterConfig::GlobalRateLimit(Arc::new(limit)))
            .with_cluster(service)
            .with_route(route::any().to_target().rate_limits([plan()]));
        let local = self::local(backend.addr(), policy).await;
        assert_eq!(statuses(way, &local, 2, "a").await, [200, 429], "{way:?}");
        assert_eq!(statuses(way, &local, 1, "b").await, [200], "{way:?}");
        let asked = rls.asked.lock().unwrap();
        assert_eq!((asked.len(), asked[0].domain.as_str()), (3, "shop"));
        assert_eq!(asked[0].descriptors[0].entries[0].value, "a");
    }
}

#[tokio::test]
async fn two_hosts_may_call_their_services_alike() {
    let backend = Echo::start("a").await;
    let (one, first, _one) = Rls::start(9).await;
    let (two, second, _two) = Rls::start(9).await;
    let policy = |addr| {
        let limit = GlobalRateLimitConfig { timeout: None, ..GlobalRateLimitConfig::of("shop", "rls") };
        with(HttpFilterConfig::GlobalRateLimit(Arc::new(limit)))
            .with_cluster(Cluster { http_protocol: Some(HttpProtocol::Http2), ..Cluster::of("rls", [addr]) })
            .with_route(route::any().to_target().rate_limits([plan()]))
    };
    let local = Local::with(&fixed(&[backend.addr()]), policy(first), |mesh| {
        mesh.host("other.example", &fixed(&[backend.addr()]), policy(second)).unwrap()
    })
    .await;
    assert_eq!(statuses(Way::Channel, &local, 2, "a").await, [200, 200]);
    let other = local.mesh.channel("host:///other.example").unwrap();
    let request = http::Request::get("http://other.example/").header("x-plan", "b");
    let request = request.body(http_body_util::Full::<bytes::Bytes>::default()).unwrap();
    assert_eq!(tower::ServiceExt::oneshot(other, request).await.unwrap().status(), 200);
    assert_eq!([&one, &two].map(|rls| rls.asked.lock().unwrap().len()), [2, 1]);
}

#[tokio::test]
async fn overload_is_refused() {
    for way in Way::BOTH {
        let (failing, asked) = server(&[Answer::Now(503)]).await;
        let config = HttpFilterConfig::AdmissionControl(Arc::new(AdmissionControlConfig::default()));
        let http2 = Cluster { http_protocol: Some(HttpProtocol::Http2), ..Cluster::of("own", []) };
        let local = local(failing.addr(), with(config).with_target(http2.clone())).await;
        assert_eq!(statuses(way, &local, 200, "any").await, [503; 200]);
        let asked = asked.seen.load(SeqCst);
        assert!((20..150).contains(&asked), "{way:?}: {asked} of 200 came to the backend");

        let (holding, held) = H2Server::holding(u32::MAX).await;
        let one = AdaptiveConcurrencyConfig {
            max_concurrency: 1,
            min_concurrency: 1,
            min_concurrency_limit: 1,
            ..AdaptiveConcurrencyConfig::default()
        };
        let config = HttpFilterConfig::AdaptiveConcurrency(Arc::new(one));
        let local = self::local(holding.addr(), with(config).with_target(http2)).await;
        let first = way.spawn(&local.mesh, get("/x"), tonic::body::Body::empty());
        until("one is in flight", async || held.lock().unwrap().len() == 1).await;
        assert_eq!(statuses(way, &local, 2, "any").await, [503, 503], "{way:?}");
        held.lock().unwrap().remove(0).status(200);
        assert_eq!(first.await.unwrap().unwrap(), 200);
    }
}

#[tokio::test]
async fn sessions_stay_at_their_endpoint() {
    let backends = [Echo::start("a").await, Echo::start("b").await, Echo::start("c").await];
    let cookie = SessionState::Cookie { name: "stick".into(), ttl: None, path: "/".into(), attributes: vec![] };
    let header = SessionState::Header(HeaderName::from_static("x-session"));
    for (state, given, back) in [(cookie, "set-cookie", "cookie"), (header, "x-session", "x-session")] {
        let config = HttpFilterConfig::StatefulSession(Arc::new(StatefulSessionConfig { state: Some(state) }));
        let addresses = backends.each_ref().map(Echo::addr);
        let local = Local::new(&addresses, with(config)).await;
        for way in Way::BOTH {
            let first = way.send(&local.mesh, get("/x"), "").await.unwrap();
            let value = joined(first.headers(), given).split(';').next().unwrap().to_owned();
            for _ in 0..6 {
                let again = way.send(&local.mesh, get("/x").header(back, &value), "").await.unwrap();
                assert_eq!(again.headers()["x-backend"], first.headers()["x-backend"], "{given}, {way:?}");
            }
        }
    }
}
