//! Policies on our own transport, over HTTP/1.1 and HTTP/2: all that a request is asked together, the header of certificates, and keys of tokens
//! from wherever they come.

use crate::{
    mtls::control_plane,
    support::{
        ANY, GUARD, TARGET,
        inbound::Serving,
        mesh_on, plain_mesh,
        policies::{Authority, Issuer, Tokens, ask, client, get, plain, secured, serve, with, with_token},
        rule, service, until,
    },
};
use bytes::Bytes;
use examples::server::acceptor;
use http::{HeaderName, Request, Response, Uri, Version};
use http_body_util::Full;
use mesh_client::{
    BoxError, Inbound,
    inbound::{
        ClientCertDetails, FetchKeys, ForwardClientCert, ForwardedClient, JwtAuthentication, JwtProvider, PathTemplate,
        RateLimit, Rbac, RequestBody, Rule,
    },
};
use mesh_tls::{ClientSettings, Mode, ServerSettings, default_provider};
use mesh_xds::resource::JwtClaimToHeader;
use rcgen::SanType;
use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];
const ISSUER: &str = "https://issuer";
const XFCC: &str = "x-forwarded-client-cert";

/// The hops that the handler saw.
fn hops(body: &str) -> Vec<ForwardedClient> {
    ForwardedClient::parse(body.split_once("xfcc=").unwrap().1).unwrap()
}

#[tokio::test]
async fn all_that_a_request_is_asked_holds_over_both_versions() {
    for version in VERSIONS {
        let (authority, tokens) = (Authority::new(), Tokens::new());
        let subject = JwtClaimToHeader { header: HeaderName::from_static("x-sub"), path: vec!["sub".to_owned()] };
        let provider = JwtProvider::inline(ISSUER, tokens.jwks()).optional();
        let provider = provider.configure(|config| config.claim_to_headers.push(subject));
        let template = PathTemplate::new("/orders/{id}/items").unwrap();
        let rules = Rbac::allow()
            .rule("shop", Rule::new().namespace("shop").path_template(template))
            .rule("anna", Rule::new().token(ISSUER, "anna").path("/mine"));
        let details = ClientCertDetails { uri: true, ..ClientCertDetails::default() };
        let builder = Inbound::builder().tls(authority.server()).jwt(provider).authorize(rules);
        let serving = serve(builder.forward_client_cert(ForwardClientCert::SanitizeSet, details)).await;
        let cart = authority.client_of(version, "shop", "cart");
        let web = authority.client_of(version, "web", "front");
        let forged = |request| with(with(request, XFCC, b"URI=spiffe://evil"), "x-sub", b"admin");

        let (status, body, _) = ask(version, serving.addr, Some(&cart), forged(get("/orders/7/items?x=1"))).await;
        assert_eq!(status, 200, "{version:?}: {body}");
        let seen = hops(&body);
        assert_eq!((seen.len(), &seen[0].uri[..]), (1, &["spiffe://cluster.local/ns/shop/sa/cart".to_owned()][..]));
        assert!(body.contains("x-sub=- "), "only we say who it is: {body}");
        for (client, path) in [(&cart, "/orders/7"), (&web, "/orders/7/items"), (&cart, "/mine")] {
            let (status, body, _) = ask(version, serving.addr, Some(client), get(path)).await;
            assert_eq!((status, body.as_str()), (403, "RBAC: access denied"), "{version:?} {path}");
        }
        let anna = forged(with_token("/mine", &tokens.of(ISSUER, "anna")));
        let (status, body, _) = ask(version, serving.addr, None, anna).await;
        assert_eq!(status, 200, "{version:?}: {body}");
        assert!(body.contains("x-sub=anna subject=anna") && body.ends_with("xfcc=-"), "{body}");
        let berta = with_token("/mine", &tokens.of(ISSUER, "berta"));
        assert_eq!(ask(version, serving.addr, None, berta).await.0, 403);
        let stranger = with_token("/mine", &Tokens::new().of(ISSUER, "anna"));
        let (status, body, _) = ask(version, serving.addr, Some(&cart), stranger).await;
        assert_eq!((status, body.as_str()), (401, "Jwt verification fails"), "{version:?}");

        let limited = serve(Inbound::builder().rate_limit(RateLimit::total(2, Duration::from_secs(3600)))).await;
        for expected in [200, 200, 429] {
            assert_eq!(ask(version, limited.addr, None, get("/")).await.0, expected, "{version:?}");
        }
    }
}

#[tokio::test]
async fn what_came_hides_nothing_of_what_we_say_of_the_client() {
    let authority = Authority::new();
    let details = ClientCertDetails { uri: true, ..ClientCertDetails::default() };
    let builder = Inbound::builder().tls(authority.server());
    let serving = serve(builder.forward_client_cert(ForwardClientCert::AppendForward, details)).await;
    let cart = authority.client("shop", "cart");
    let many = "By=a,".repeat(64);
    for (came, kept) in [
        (&b"URI=spiffe://before"[..], 1),
        (b"Subject=\"a,b\";URI=x,URI=y", 2),
        (b"x=\"", 0),
        (b"Subject=\"x\\\"", 0),
        (b"URI=spiffe://evil\xff", 0),
        (b"evil", 0),
        (many.as_bytes(), 0),
        (b"", 0),
    ] {
        let (status, body, _) = secured(serving.addr, &cart, with(get("/"), XFCC, came)).await;
        let (seen, came) = (hops(&body), String::from_utf8_lossy(came));
        assert_eq!((status, seen.len()), (200, kept + 1), "{came}: {body}");
        assert_eq!(seen[kept].uri, ["spiffe://cluster.local/ns/shop/sa/cart"], "{came}");
    }
}

#[tokio::test]
async fn a_subject_that_is_no_text_and_a_chain_are_told_on() {
    let issuer = Issuer::new();
    let uri = |id: &str| vec![SanType::URI(id.try_into().unwrap())];
    let settings = ServerSettings {
        alpn: vec![b"h2".to_vec()],
        ..ServerSettings::mtls(issuer.source("server", uri("https://server.test/")))
    };
    let details = ClientCertDetails { subject: true, chain: true, uri: true, ..ClientCertDetails::default() };
    let builder = Inbound::builder().tls(ServerSettings { check: mesh_tls::PeerCheck::Chain, ..settings });
    let serving = serve(builder.forward_client_cert(ForwardClientCert::AppendForward, details)).await;
    let settings = ClientSettings::mtls(issuer.source("a\n, CN=admin", uri("spiffe://td/x")));
    let odd = client(Version::HTTP_2, ClientSettings { check: mesh_tls::PeerCheck::Chain, ..settings });
    let (_, body, _) = secured(serving.addr, &odd, with(get("/"), XFCC, b"URI=spiffe://evil")).await;
    let seen = hops(&body);
    let own = seen.last().unwrap();
    assert_eq!((seen.len(), own.uri[0].as_str()), (2, "spiffe://td/x"));
    assert_eq!(own.subject.as_deref(), Some("CN=a\\0A\\, CN=admin"));
    assert_eq!(own.by, ["https://server.test/"], "whatever URI it is");
    assert_eq!(own.chain.as_ref().unwrap().matches("BEGIN%20CERTIFICATE").count(), 2, "the leaf and who signed it");
}

/// Serves a set of keys.
async fn jwks(tokens: &Tokens) -> Serving {
    let set = tokens.jwks();
    let answer = move |_: Request<RequestBody>| {
        let set = set.clone();
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(set)))) }
    };
    Serving::of(Inbound::builder().bind(ANY).await.unwrap(), tower::service_fn(answer))
}

async fn status_of(provider: JwtProvider, token: &str) -> (u16, String) {
    let serving = serve(Inbound::builder().jwt(provider)).await;
    let (status, body, _) = plain(serving.addr, with_token("/", token)).await;
    (status, body)
}

#[tokio::test]
async fn keys_are_fetched_over_the_mesh_and_never_in_the_clear_what_is_to_be_encrypted() {
    let tokens = Tokens::new();
    let (token, keys) = (tokens.of(ISSUER, "anna"), jwks(&tokens).await);
    let channel = plain_mesh().await.fixed_channel(&[keys.addr]).unwrap();
    let fetched = |uri: &'static str| JwtProvider::fetched(ISSUER, channel.clone(), Uri::from_static(uri));
    assert_eq!(status_of(fetched("http://issuer.test/keys"), &token).await.0, 200);
    let refused = status_of(fetched("https://issuer.test/keys"), &token).await;
    assert_eq!(refused, (401, "Jwks remote fetch is failed".to_owned()));

    // Over mutual TLS.
    let (cp, _dir) = control_plane().await;
    let acceptor = acceptor(&cp.ca().unwrap().ensure("default", "greeter").unwrap(), Mode::Strict).unwrap();
    let set = tokens.jwks();
    let answer = move |_: Request<RequestBody>| {
        let set = set.clone();
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(set)))) }
    };
    let inbound = Inbound::builder().acceptor(acceptor).bind(ANY).await.unwrap();
    let keys = Serving::of(inbound, tower::service_fn(answer));
    // Whoever is of the mesh could answer, unless it is said who does.
    for (names, expected) in [("[spiffe://cluster.local/ns/default/sa/greeter]", 200), ("[]", 401)] {
        let tls = rule(&format!("{{tls: {{mode: ISTIO_MUTUAL, subjectAltNames: {names}}}}}"), &[]);
        cp.apply(&(service(&[("one", keys.addr)]) + &tls)).await.unwrap();
        let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
        let provider = JwtProvider::fetched(ISSUER, channel, Uri::from_static("https://greeter.default.svc/keys"));
        assert_eq!(status_of(provider, &token).await.0, expected, "{names}");
    }
}

#[tokio::test]
async fn a_scheme_in_any_case_is_a_token() {
    let tokens = Tokens::new();
    let good = tokens.of(ISSUER, "anna");
    let bad = Tokens::new().of(ISSUER, "anna");
    let serving = serve(Inbound::builder().jwt(JwtProvider::inline(ISSUER, tokens.jwks()).optional())).await;
    for version in VERSIONS {
        for scheme in ["Bearer ", "bearer ", "BEARER ", "bEaReR  ", "bearer\t"] {
            let sent = |token: &str| with(get("/"), "authorization", format!("{scheme}{token}").as_bytes());
            let (status, body, _) = ask(version, serving.addr, None, sent(&good)).await;
            assert_eq!(status, 200, "{version:?} {scheme:?}: {body}");
            assert!(body.contains("subject=anna"), "{scheme:?}: {body}");
            assert_eq!(ask(version, serving.addr, None, sent(&bad)).await.0, 401, "{version:?} {scheme:?}");
        }
        let other = with(get("/"), "authorization", b"Basic YTpi");
        assert_eq!(ask(version, serving.addr, None, other).await.0, 200, "no token at all");
    }
}

/// Panics once.
struct Careless {
    set: String,
    warned: AtomicBool,
}

impl FetchKeys for Careless {
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>> {
        assert!(self.warned.swap(true, Ordering::SeqCst), "as it was told");
        let set = self.set.clone();
        Box::pin(async move { Ok(set.into()) })
    }
}

#[tokio::test]
async fn a_fetcher_of_the_applications_own_may_panic_and_is_asked_again() {
    let tokens = Tokens::new();
    let fetch = Arc::new(Careless { set: tokens.jwks(), warned: AtomicBool::new(false) });
    let serving = serve(Inbound::builder().jwt(JwtProvider::fetched_by(ISSUER, fetch))).await;
    let token = tokens.of(ISSUER, "anna");
    let asked = async || plain(serving.addr, with_token("/", &token)).await.0;
    assert_eq!(tokio::time::timeout(GUARD, asked()).await.expect("an answer"), 401);
    until("it is asked again", async || asked().await == 200).await;
}

#[tokio::test]
async fn keys_in_a_file_are_read_again_for_a_key_that_is_new() {
    let (old, new) = (Tokens::named("old"), Tokens::named("new"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("jwks.json");
    std::fs::write(&path, old.jwks()).unwrap();
    let serving = serve(Inbound::builder().jwt(JwtProvider::file(ISSUER, path.to_str().unwrap()))).await;
    let asked = async |tokens: &Tokens| plain(serving.addr, with_token("/", &tokens.of(ISSUER, "anna"))).await.0;
    assert_eq!(asked(&old).await, 200);
    std::fs::write(&path, new.jwks()).unwrap();
    assert_eq!((asked(&new).await, asked(&old).await), (200, 401));
}

#[tokio::test]
async fn one_of_several_issuers_is_enough_or_none() {
    let (staff, customers) = (Tokens::new(), Tokens::new());
    let any = || {
        JwtAuthentication::any_of([
            JwtProvider::inline("https://staff", staff.jwks()),
            JwtProvider::inline("https://customers", customers.jwks()),
        ])
    };
    let needed = serve(Inbound::builder().jwt(any())).await;
    let optional = serve(Inbound::builder().jwt(any().optional())).await;
    let (good, better) = (staff.of("https://staff", "a"), customers.of("https://customers", "b"));
    let mixed = staff.of("https://customers", "b");
    for addr in [needed.addr, optional.addr] {
        assert_eq!(plain(addr, with_token("/", &good)).await.0, 200);
        let (status, body, _) = plain(addr, with_token("/", &better)).await;
        assert_eq!(status, 200, "{body}");
        assert!(body.contains("subject=b"), "{body}");
        assert_eq!(plain(addr, with_token("/", &mixed)).await.0, 401, "signed by the other");
    }
    assert_eq!((plain(needed.addr, get("/")).await.0, plain(optional.addr, get("/")).await.0), (401, 200));
}

#[tokio::test]
async fn tokens_are_verified_by_the_crypto_provider_that_is_given() {
    let tokens = Tokens::new();
    let mut none = (*default_provider()).clone();
    none.signature_verification_algorithms.all = &[];
    let provider = || JwtProvider::inline(ISSUER, tokens.jwks());
    let token = tokens.of(ISSUER, "anna");
    let serving = serve(Inbound::builder().crypto_provider(Arc::new(none)).jwt(provider())).await;
    let (status, body, _) = plain(serving.addr, with_token("/", &token)).await;
    assert_eq!((status, body.as_str()), (401, "Jwt header [alg] is not supported"));
    assert_eq!(status_of(provider(), &token).await.0, 200);
}

#[tokio::test]
async fn the_access_log_says_why_a_request_was_refused() {
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let logged = log.clone();
    let builder = Inbound::builder()
        .authorize(Rbac::deny().rule("no secrets", Rule::new().path("/secret")))
        .jwt(JwtProvider::inline(ISSUER, Tokens::new().jwks()).optional())
        .authorize(Rbac::allow().rule("open", Rule::new().path("/open")))
        .access_log(move |record| {
            let details = record.to_json()["response_code_details"].as_str().unwrap().to_owned();
            assert!(record.to_string().contains(&details), "{record}");
            logged.lock().unwrap().push(details);
        });
    let serving = serve(builder).await;
    for request in [get("/secret"), get("/other"), with_token("/open", "x"), get("/open")] {
        plain(serving.addr, request).await;
    }
    until("all are logged", async || log.lock().unwrap().len() == 4).await;
    let form =
        "jwt_authn_access_denied{Jwt_is_not_in_the_form_of_Header.Payload.Signature_with_two_dots_and_3_sections}";
    assert_eq!(
        *log.lock().unwrap(),
        [
            "rbac_access_denied_matched_policy[no_secrets]",
            "rbac_access_denied_matched_policy[none]",
            form,
            "via_upstream",
        ]
    );
}
