//! What rules from code mean, on our own transport: nothing that is said of a caller gets lost, and nothing gets around a denial.

use crate::support::{
    ANY, GUARD,
    policies::{Authority, Issuer, client, exchange, get, plain, secured, serve, with},
};
use bytes::Bytes;
use http::{Request, Uri, Version};
use http_body_util::Empty;
use mesh_client::{
    Inbound,
    inbound::{JwtProvider, PathTemplate, RateLimit, Rbac, Rule},
};
use mesh_tls::{ClientSettings, PeerCheck, ServerSettings};
use rcgen::SanType;
use std::net::SocketAddr;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

#[tokio::test]
async fn what_is_said_of_a_caller_in_different_ways_has_to_hold_all() {
    for (rule, shop, web) in [
        (Rule::new().authenticated().namespace("shop"), 200, 403),
        (Rule::new().spiffe_id("spiffe://cluster.local/*").namespace("shop"), 200, 403),
        (Rule::new().spiffe_id("*/sa/cart").namespace("shop"), 200, 403),
        (Rule::new().namespace("shop").namespace("web"), 200, 200),
        (Rule::new().spiffe_id("*/ns/shop/sa/cart").spiffe_id("*/ns/web/sa/cart"), 200, 200),
        (Rule::new().spiffe_id("spiffe://elsewhere/*").namespace("shop"), 403, 403),
    ] {
        let authority = Authority::new();
        let told = format!("{rule:?}");
        let builder = Inbound::builder().tls(authority.server()).authorize(Rbac::allow().rule("one", rule));
        let serving = serve(builder).await;
        let (cart, other) = (authority.client("shop", "cart"), authority.client("web", "cart"));
        assert_eq!(secured(serving.addr, &cart, get("/")).await.0, shop, "{told}");
        assert_eq!(secured(serving.addr, &other, get("/")).await.0, web, "{told}");
    }
}

#[tokio::test]
async fn a_subject_or_a_dns_name_is_no_identity() {
    let issuer = Issuer::new();
    let dns = |name: &str| vec![SanType::DnsName(name.try_into().unwrap())];
    let settings = ServerSettings {
        check: PeerCheck::Chain,
        alpn: vec![b"h2".to_vec()],
        ..ServerSettings::mtls(issuer.source("server", dns("server.test")))
    };
    let rules =
        Rbac::allow().rule("admin", Rule::new().spiffe_id("*/sa/admin")).rule("dns", Rule::new().spiffe_id("a.b"));
    let serving = serve(Inbound::builder().tls(settings).authorize(rules)).await;
    let settings = ClientSettings::mtls(issuer.source("x/sa/admin", dns("a.b")));
    let forger = client(Version::HTTP_2, ClientSettings { check: PeerCheck::Chain, ..settings });
    assert_eq!(secured(serving.addr, &forger, get("/")).await.0, 403);
}

/// The status of a request that is written by hand.
async fn raw(addr: SocketAddr, request: &[u8]) -> u16 {
    let answer = async {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        socket.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // Who refuses bytes may close with a reset.
        let _ = socket.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).split(' ').nth(1).map_or(400, |status| status.parse().unwrap())
    };
    tokio::time::timeout(GUARD, answer).await.unwrap()
}

#[tokio::test]
async fn no_byte_in_a_path_gets_around_a_denial_by_template() {
    let admin = Rule::new().path_template(PathTemplate::new("/admin/{id}").unwrap());
    let below = Rule::new().path_template(PathTemplate::new("/below/**").unwrap());
    let serving = serve(Inbound::builder().authorize(Rbac::deny().rule("admin", admin).rule("below", below))).await;
    assert_eq!(plain(serving.addr, get("/other/7")).await.0, 200);
    let bytes = (0x21..=0xff_u8).filter(|byte| *byte != b'/').map(|byte| vec![byte]);
    let mut refused_by_rule = 0;
    for bytes in bytes.chain(["\u{e4}", "\u{4e2d}", "\u{1f600}"].map(|text| text.as_bytes().to_vec())) {
        for prefix in ["/admin/7", "/admin/", "/below/x/"] {
            let path = [prefix.as_bytes(), &bytes].concat();
            let head = [b"GET ", &path[..], b" HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n"].concat();
            let status = raw(serving.addr, &head).await;
            // What is nothing but "/admin/" is another path.
            let bare = prefix == "/admin/" && matches!(bytes[..], [b'?' | b'#']);
            assert!(bare || matches!(status, 400 | 403), "{status}: HTTP/1.1 {:?}", String::from_utf8_lossy(&path));
            let Ok(uri) = Uri::from_maybe_shared(Bytes::from([&b"http://shop.test"[..], &path].concat())) else {
                continue;
            };
            let request = Request::get(uri).body(Empty::new()).unwrap();
            let stream = TcpStream::connect(serving.addr).await.unwrap();
            let status = exchange(Version::HTTP_2, stream, request).await.0;
            assert!(bare || status == 403, "{status}: HTTP/2 {:?}", String::from_utf8_lossy(&path));
            refused_by_rule += usize::from(status == 403);
        }
    }
    assert!(refused_by_rule > 200, "{refused_by_rule}");
}

#[tokio::test]
async fn a_policy_that_cannot_mean_what_it_says_is_no_inbound_side() {
    let second = std::time::Duration::from_secs(1);
    let (issuer, set) = ("https://issuer", r#"{"keys": []}"#);
    let claims = || Rbac::deny().rule("x", Rule::new().claim("role", "guest"));
    for (builder, said) in [
        (Inbound::builder().jwt(JwtProvider::inline(issuer, "{")), "https://issuer"),
        (Inbound::builder().jwt(JwtProvider::file(issuer, "/nowhere/jwks.json")), "/nowhere/jwks.json"),
        (Inbound::builder().authorize(Rbac::deny().rule("x", Rule::new().header("x foo", "1"))), "`x foo`"),
        (Inbound::builder().authorize(claims()).jwt(JwtProvider::inline(issuer, set)), "no `jwt` is given before"),
        (
            Inbound::builder().authorize(Rbac::allow().rule("x", Rule::new().token("*", "*"))),
            "no `jwt` is given before",
        ),
        (Inbound::builder().rate_limit(RateLimit::total(0, second)), "0 requests"),
        (Inbound::builder().rate_limit(RateLimit::per_identity(1, second).burst(0)), "0 at once"),
    ] {
        let error = builder.bind(ANY).await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let after = Inbound::builder().jwt(JwtProvider::inline(issuer, set)).authorize(claims());
    after.bind(ANY).await.unwrap();
}

#[tokio::test]
async fn normalised_paths_cannot_be_written_in_another_way() {
    let deny = || Rbac::deny().rule("admin", Rule::new().path("/admin*"));
    let as_it_came = serve(Inbound::builder().authorize(deny())).await;
    let normal = serve(Inbound::builder().authorize(deny()).normalize_paths()).await;
    for path in ["/%61dmin", "//admin/x", "/x/../admin", "/./admin", "/x/%2e%2e/admin"] {
        assert_eq!(plain(as_it_came.addr, get(path)).await.0, 200, "{path}: byte by byte");
        assert_eq!(plain(normal.addr, get(path)).await.0, 403, "{path}");
    }
    assert_eq!(plain(normal.addr, get("/x%2f..%2fadmin")).await.0, 400);
    let (status, body, _) = plain(normal.addr, with(get("/a//b/./c?d=//"), "x-sub", b"-")).await;
    assert_eq!(status, 200);
    assert!(body.contains("/a/b/c?d=//"), "the application sees the same: {body}");
}

#[tokio::test]
async fn a_denial_by_header_or_host_is_not_passed_by_saying_it_twice_or_with_a_port() {
    let deny = Rbac::deny()
        .rule("role", Rule::new().header("x-role", "admin"))
        .rule("prefix", Rule::new().header("x-path", "/secret*"))
        .rule("host", Rule::new().host("admin.test"))
        .rule("below", Rule::new().host("*.inner.test"))
        .rule("port", Rule::new().host("port.test:81"));
    let denied = serve(Inbound::builder().authorize(deny)).await;
    let allow =
        Rbac::allow().rule("role", Rule::new().header("x-role", "admin")).rule("all", Rule::new().path("/open"));
    let allowed = serve(Inbound::builder().authorize(allow)).await;
    let to = |host: &str| Request::get(format!("http://{host}/")).body(Empty::new()).unwrap();
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let status = async |addr, request: Request<Empty<Bytes>>| {
            exchange(version, TcpStream::connect(addr).await.unwrap(), request).await.0
        };
        for values in [&["admin"][..], &["admin", "y"], &["y", "admin"], &["y", "z", "admin"]] {
            let request = values.iter().fold(get("/"), |request, value| with(request, "x-role", value.as_bytes()));
            assert_eq!(status(denied.addr, request).await, 403, "{version:?} {values:?}");
        }
        let twice = || with(with(get("/"), "x-role", b"admin"), "x-role", b"y");
        assert_eq!(status(allowed.addr, with(get("/"), "x-role", b"admin")).await, 200);
        assert_eq!(status(allowed.addr, twice()).await, 403, "{version:?}: who says more than is allowed");
        let paths = with(with(get("/"), "x-path", b"/open"), "x-path", b"/secret/a");
        assert_eq!(status(denied.addr, paths).await, 403, "{version:?}");
        assert_eq!(status(denied.addr, with(get("/"), "x-role", b"y")).await, 200);
        for (host, expected) in [
            ("admin.test", 403),
            ("ADMIN.test", 403),
            ("admin.test:80", 403),
            ("admin.test:8443", 403),
            ("admin.test.", 403),
            ("admin.test.:80", 403),
            ("xadmin.test", 200),
            ("admin.test.other", 200),
            ("a.inner.test", 403),
            ("a.inner.test:9", 403),
            ("inner.test", 200),
            ("port.test:81", 403),
            ("port.test:82", 200),
        ] {
            assert_eq!(status(denied.addr, to(host)).await, expected, "{version:?} {host}");
        }
    }
}

#[tokio::test]
async fn a_namespace_of_another_trust_domain_is_told_apart_where_that_is_said() {
    let issuer = Issuer::new();
    let id = |id: &str| vec![SanType::URI(id.try_into().unwrap())];
    let settings = || ServerSettings {
        alpn: vec![b"h2".to_vec()],
        ..ServerSettings::mtls(issuer.source("server", id("spiffe://ours/ns/ops/sa/server")))
    };
    let any =
        serve(Inbound::builder().tls(settings()).authorize(Rbac::allow().rule("x", Rule::new().namespace("ops"))));
    let ours = Rule::new().trust_domain("ours").namespace("ops");
    let ours = serve(Inbound::builder().tls(settings()).authorize(Rbac::allow().rule("x", ours)));
    let (any, ours) = (any.await, ours.await);
    for (caller, of_any, of_ours) in [
        ("spiffe://ours/ns/ops/sa/a", 200, 200),
        ("spiffe://theirs/ns/ops/sa/a", 200, 403),
        ("spiffe://ours.evil/ns/ops/sa/a", 200, 403),
        ("spiffe://ours/ns/web/sa/a", 403, 403),
    ] {
        let client = client(Version::HTTP_2, ClientSettings::mtls(issuer.source("client", id(caller))));
        assert_eq!(secured(any.addr, &client, get("/")).await.0, of_any, "{caller}");
        assert_eq!(secured(ours.addr, &client, get("/")).await.0, of_ours, "{caller}");
    }
}
