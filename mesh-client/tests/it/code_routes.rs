//! Hosts without a control plane, whose policy is written in code: routes, clusters, rewrites, answers, mirrors.

use crate::support::{
    ANY, assert_says,
    code::{Local, fixed},
    echo::{Echo, Way, get, joined},
    nobody, until,
};
use http::{HeaderName, Request, StatusCode};
use http_body_util::Full;
use mesh_client::{
    BoxError, Downstream, Error, Mesh, Profile,
    filter::{FaultAbort, FaultConfig, FractionalPercent, HttpFilter},
    policy::{
        Cluster, FilterOverride, Format, HashPolicy, HashSource, MetadataMatcher, PathTemplate, Policy, Redirect,
        RedirectPath, RegexRewrite, RetryOn, RetryPolicy, SafeRegex, StringMatcher, ValueMatcher, WeightedCluster,
        route,
    },
};
use mesh_xds::resource::{ConsistentHashing, HashFunction, HttpFilterConfig, LbPolicy, RingHash};
use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};
use tower::{Layer, ServiceExt};

/// The same endpoints, as a fixed list and by a name, each way.
async fn worlds(own: SocketAddr, policy: Policy, profile: Profile) -> Vec<(Local, Way)> {
    let mut worlds = Vec::new();
    for target in [fixed(&[own]), format!("dns:///localhost:{}", own.port())] {
        for way in Way::BOTH {
            worlds.push((Local::with(&target, policy.clone(), |mesh| mesh.profile(profile)).await, way));
        }
    }
    worlds
}

fn header(name: &'static str) -> HeaderName {
    HeaderName::from_static(name)
}

#[tokio::test]
async fn routes_choose_clusters() {
    let [own, canary] = [Echo::start("own").await, Echo::start("canary").await];
    let metadata = MetadataMatcher {
        filter: "auth".into(),
        path: vec!["tier".into()],
        value: ValueMatcher::String(StringMatcher::exact("gold")),
        invert: false,
    };
    let parts = [
        WeightedCluster { header: Some(header("x-cluster")), ..WeightedCluster::new("", 1) },
        WeightedCluster::new(Policy::TARGET, 1),
    ];
    let policy = Policy::default()
        .with_cluster(Cluster::of("canary", [canary.addr()]))
        .with_route(route::exact("/exact").to("canary"))
        .with_route(route::under("/under/").to("canary"))
        .with_route(route::prefix("/Case").ignore_case().to("canary"))
        .with_route(route::regex(SafeRegex::new("/v[0-9]+/.*").unwrap()).to("canary"))
        .with_route(route::template(PathTemplate::new("/users/{id}").unwrap()).to("canary"))
        .with_route(route::grpc_method("shop.Shop", "Buy").to("canary"))
        .with_route(route::any().header("X-Canary", "1").to("canary"))
        .with_route(route::any().has_header("x-any").method(&http::Method::GET).to("canary"))
        .with_route(route::any().query("canary", "yes").to("canary"))
        .with_route(route::any().cookie("who", "me").to("canary"))
        .with_route(route::any().metadata(metadata).to("canary"))
        .with_route(route::prefix("/never").share(0.0).to("canary"))
        .with_route(route::exact("/named").to_named_by(header("x-cluster")))
        .with_route(route::exact("/split").split([(Policy::TARGET, 1), ("canary", 1)]))
        .with_route(route::exact("/parts").split_parts(parts))
        .with_route(route::exact("/nowhere").named("lost").to("nowhere").cluster_not_found(StatusCode::NOT_FOUND));
    for profile in [Profile::Grpc, Profile::Envoy] {
        for (Local { mesh, .. }, way) in &worlds(own.addr(), policy.clone(), profile).await {
            let mut gold = get("/");
            let tier = serde_json::json!({"tier": "gold"});
            gold.extensions_mut().unwrap().insert(Downstream::new().with_metadata("auth", tier));
            for request in [
                get("/exact?q"),
                get("/under"),
                get("/under/x"),
                get("/cASE"),
                get("/v1/x"),
                get("/users/7"),
                get("/shop.Shop/Buy"),
                get("/").header("x-canary", "1"),
                get("/").header("x-any", ""),
                get("/?a=b&canary=yes"),
                get("/").header("cookie", "who=me"),
                gold,
                get("/named").header("x-cluster", "canary"),
            ] {
                let said = format!("{request:?}");
                assert_eq!(way.backend(mesh, request).await, "canary", "{said}");
            }
            for request in [get("/"), get("/exactly"), get("/underneath"), get("/users/7/a"), get("/never")] {
                let said = format!("{request:?}");
                assert_eq!(way.backend(mesh, request).await, "own", "{said}");
            }
            for path in ["/split", "/parts"] {
                let mut seen = BTreeSet::new();
                for _ in 0..60 {
                    seen.insert(way.backend(mesh, get(path).header("x-cluster", "canary")).await);
                }
                assert_eq!(seen, BTreeSet::from(["canary".to_owned(), "own".to_owned()]), "{path}");
            }
            let error = way.send(mesh, get("/nowhere"), "").await.unwrap_err().downcast::<Error>().unwrap();
            assert_eq!(error.http_status(), 404);
            assert_says(&error.to_string(), &["a route names it, and the policy does not have it", "route lost"]);
        }
    }
}

#[tokio::test]
async fn routes_rewrite_edit_answer_and_mirror() {
    let [own, other, shadow] = [Echo::start("own").await, Echo::start("other").await, Echo::start("shadow").await];
    let redirect = Redirect {
        status: 308,
        host: Some("new.example".into()),
        path: Some(RedirectPath::Whole("/new".into())),
        ..Redirect::default()
    };
    let policy = Policy::default()
        .with_cluster(Cluster::of("other", [other.addr()]))
        .with_cluster(Cluster::of("shadow", [shadow.addr()]))
        .with_route(route::exact("/old").redirect(redirect))
        .with_route(route::exact("/ping").respond(StatusCode::IM_A_TEAPOT, "pong"))
        .with_route(
            route::under("/api")
                .to("other")
                .rewrite_prefix("/v2")
                .rewrite_host(&"inner.example".parse().unwrap())
                .set_header(header("x-from"), Format::parse("%REQ(:path)%").unwrap())
                .remove_header(header("x-secret"))
                .set_response_header(header("x-by"), Format::literal("mesh"))
                .remove_response_header(header("server")),
        )
        .with_route(route::prefix("/re/").to_target().rewrite_path(RegexRewrite::new("^/re/(.*)", "/\\1/er").unwrap()))
        .with_route(
            route::template(PathTemplate::new("/users/{id}/{what}").unwrap())
                .to_target()
                .rewrite_template("/{what}/of/{id}")
                .unwrap(),
        )
        .with_route(route::exact("/copied").to_target().mirror("shadow", 100.0));
    for (Local { mesh, .. }, way) in &worlds(own.addr(), policy, Profile::Envoy).await {
        let response = way.send(mesh, get("/old?a=b"), "").await.unwrap();
        assert_eq!(response.status(), 308);
        assert_eq!(joined(response.headers(), "location"), "http://new.example/new?a=b");
        let response = way.send(mesh, get("/ping"), "").await.unwrap();
        assert_eq!((response.status().as_u16(), &response.body()[..]), (418, &b"pong"[..]));

        let response = way.send(mesh, get("/api/x?y").header("x-secret", "1"), "").await.unwrap();
        let seen = other.last();
        assert_eq!((seen.path(), seen.authority().as_str()), ("/v2/x?y", "inner.example"));
        assert_eq!((seen.header("x-from").as_str(), seen.header("x-secret").as_str()), ("/api/x?y", ""));
        assert_eq!(
            (joined(response.headers(), "x-by").as_str(), joined(response.headers(), "server").as_str()),
            ("mesh", "")
        );

        for (path, rewritten) in [("/re/writ", "/writ/er"), ("/users/7/cart", "/cart/of/7")] {
            assert_eq!(way.backend(mesh, get(path)).await, "own");
            assert_eq!(own.last().path(), rewritten);
        }
        let before = shadow.seen().len();
        assert_eq!(way.backend(mesh, get("/copied")).await, "own");
        until("the copy came", async || shadow.seen().len() == before + 1).await;
        assert_eq!(shadow.last().authority(), "greeter.default.svc.cluster.local-shadow:50051");
    }
}

#[tokio::test]
async fn routes_have_limits_retries_hashes_and_filters() {
    let own = Echo::start("own").await;
    let spread = [Echo::start("a").await, Echo::start("b").await, Echo::start("c").await];
    let dead = nobody();
    let abort = FaultConfig {
        abort: Some(FaultAbort::Http { status: 503, percentage: FractionalPercent::HUNDRED }),
        ..FaultConfig::default()
    };
    let fault = HttpFilter { name: "fault".into(), config: HttpFilterConfig::Fault(Arc::new(abort)), disabled: true };
    let ring = LbPolicy::RingHash(RingHash {
        min_size: 1024,
        max_size: 4096,
        function: HashFunction::XxHash,
        hashing: ConsistentHashing { use_hostname: false, balance_factor: None },
        request_header: None,
    });
    let by_user = HashPolicy { source: HashSource::Header { name: "x-user".into(), rewrite: None }, terminal: false };
    let silent = tokio::net::TcpListener::bind(ANY).await.unwrap();
    let retry = RetryPolicy {
        on: RetryOn { http_5xx: true, ..RetryOn::default() },
        per_try_timeout: Some(Duration::from_millis(50)),
        num_retries: 2,
        ..RetryPolicy::default()
    };
    let policy = Policy::default()
        .with_timeout(Duration::from_secs(1))
        .with_filter(fault)
        .with_cluster(Cluster::of("silent", [silent.local_addr().unwrap()]))
        .with_cluster(Cluster { lb_policy: ring, ..Cluster::of("ring", spread.iter().map(Echo::addr)) })
        .with_cluster(Cluster::of("dead", [dead.addr()]))
        .with_cluster(Cluster::dns("named", [&*format!("localhost:{}", own.addr().port())]).unwrap())
        .with_cluster(Cluster::aggregate("both", ["dead", "named"]))
        .with_route(route::exact("/silent").to("silent"))
        .with_route(route::exact("/again").to("silent").timeout(Duration::ZERO).retry(retry))
        .with_route(route::exact("/hashed").to("ring").hash([by_user]))
        .with_route(
            route::exact("/fault").to_target().filter("fault", FilterOverride { disabled: false, config: None }),
        )
        .with_route(route::exact("/named").to("named"))
        .with_route(route::exact("/both").to("both"));
    for (Local { mesh, .. }, way) in &worlds(own.addr(), policy, Profile::Envoy).await {
        let error = way.send(mesh, get("/silent"), "").await.unwrap_err().to_string();
        assert_says(&error, &["deadline of 1s exceeded", "set by the route's timeout"]);
        let error = way.send(mesh, get("/again"), "").await.unwrap_err().to_string();
        assert_says(&error, &["within its limit of 50ms (per_try_timeout)", "attempt 3"]);

        let mut homes = BTreeSet::new();
        for user in 0..30 {
            let request = || get("/hashed").header("x-user", user);
            let home = way.backend(mesh, request()).await;
            assert_eq!(way.backend(mesh, request()).await, home);
            homes.insert(home);
        }
        assert_eq!(homes.len(), 3, "{homes:?}");

        assert_eq!(way.send(mesh, get("/fault"), "").await.unwrap().status(), 503);
        for path in ["/", "/named", "/both"] {
            until(path, async || way.backend(mesh, get(path)).await == "own").await;
        }
    }
}

/// Who answers a plain request, through a layer around a client that says `inner`.
async fn through(mesh: &Mesh, uri: &str) -> String {
    let inner = tower::service_fn(|_: Request<Full<bytes::Bytes>>| async {
        Ok::<_, BoxError>(
            http::Response::builder().header("x-backend", "inner").body(Full::<bytes::Bytes>::default()).unwrap(),
        )
    });
    let request = Request::get(uri).body(Full::default()).unwrap();
    match mesh.layer().layer(inner).oneshot(request).await {
        Ok(response) => joined(response.headers(), "x-backend"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn hosts_have_policies_of_their_own() {
    let [a, b, c] = [Echo::start("a").await, Echo::start("b").await, Echo::start("c").await];
    let target = |of: &Echo| fixed(&[of.addr()]);
    // Each calls another cluster by the same name.
    let policy = |canary: &Echo| {
        Policy::default()
            .with_cluster(Cluster::of("canary", [canary.addr()]))
            .with_route(route::exact("/canary").to("canary"))
    };
    let mesh = Mesh::builder()
        .profile(Profile::Envoy)
        .host("shop.example", &target(&a), policy(&b))
        .and_then(|builder| builder.host("*.example", &target(&b), policy(&c)))
        .and_then(|builder| builder.host("shop.*", &format!("dns:///localhost:{}", c.addr().port()), policy(&a)))
        .and_then(|builder| builder.host("shop.example:8080", &target(&c), policy(&a)))
        .and_then(|builder| builder.host("twice", &target(&a), Policy::default()))
        .and_then(|builder| builder.host("Twice", &target(&b), Policy::default()))
        .unwrap()
        .build()
        .await
        .unwrap();
    for (host, own, canary) in [
        ("shop.example", "a", "b"),
        ("SHOP.example:80", "a", "b"),
        ("shop.example:81", "a", "b"),
        ("shop.example:8080", "c", "a"),
        ("other.example", "b", "c"),
        ("shop.elsewhere", "c", "a"),
        ("twice", "b", "b"),
    ] {
        let channel = mesh.channel(&format!("host:///{host}")).unwrap();
        for (path, expected) in [("/", own), ("/canary", canary)] {
            let uri = format!("http://{host}{path}");
            assert_eq!(through(&mesh, &uri).await, expected, "{uri}");
            let request = Request::get(&uri).body(Full::<bytes::Bytes>::default()).unwrap();
            let response = channel.clone().oneshot(request).await.unwrap();
            assert_eq!(joined(response.headers(), "x-backend"), expected, "{uri}");
            // Both are kept, so that nobody's clusters become another's.
            let explained = mesh.explain(&Request::get(&uri).body(()).unwrap().into_parts().0).to_string();
            assert_says(&explained, &[&format!("host:///{host}")]);
        }
    }
    for unknown in ["http://elsewhere/", "https://shop.example/"] {
        assert_eq!(through(&mesh, unknown).await, "inner");
    }
    let error = mesh.channel("host:///elsewhere").unwrap_err().to_string();
    assert_says(&error, &["host:///elsewhere", "the mesh was not built with such a host"]);
    for (domain, target, reason) in [
        ("a*b", "dns:///a:1", "is for \"a*b\", which is not a domain"),
        ("a", "xds:///a", "has its policy elsewhere"),
        ("a", "host:///a", "has its policy elsewhere"),
        ("a", "dns:///a", "has no port"),
    ] {
        let error = Mesh::builder().host(domain, target, Policy::default()).unwrap_err().to_string();
        assert_says(&error, &[reason]);
    }
}
