//! What rules from code mean, on our own transport: nothing that is said of a caller gets lost, and nothing gets around a denial.

use crate::support::{
    GUARD,
    policies::{Authority, exchange, get, plain, secured, serve},
};
use bytes::Bytes;
use http::{Request, Uri, Version};
use http_body_util::Empty;
use mesh_client::{
    Inbound,
    inbound::{PathTemplate, Rbac, Rule},
};
use mesh_tls::{
    ClientSettings, ClientTls, Identity, MemorySource, PeerCheck, ServerSettings, TrustRoots, default_provider,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use std::{net::SocketAddr, sync::Arc};
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
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let roots = Arc::new(TrustRoots::from_pem(ca.pem().as_bytes()).unwrap());
    let source = |names: Vec<String>, subject: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, subject);
        let chain = params.signed_by(&key, &ca).unwrap().pem();
        let identity =
            Identity::from_pem(chain.as_bytes(), key.serialize_pem().as_bytes(), &default_provider()).unwrap();
        Arc::new(MemorySource::new("test", Some(identity), Some(roots.clone())))
    };
    let settings = ServerSettings {
        check: PeerCheck::Chain,
        alpn: vec![b"h2".to_vec()],
        ..ServerSettings::mtls(source(vec!["server.test".into()], "server"))
    };
    let rules =
        Rbac::allow().rule("admin", Rule::new().spiffe_id("*/sa/admin")).rule("dns", Rule::new().spiffe_id("a.b"));
    let serving = serve(Inbound::builder().tls(settings).authorize(rules)).await;
    let client = |source| {
        let settings =
            ClientSettings { check: PeerCheck::Chain, alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(source) };
        ClientTls::new(settings, default_provider()).unwrap()
    };
    let forger = client(source(vec!["a.b".into()], "x/sa/admin"));
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
