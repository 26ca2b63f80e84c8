use super::*;
use http::{HeaderMap, Method, Uri};
use std::time::Duration;

fn header(name: &str) -> HashSource {
    HashSource::Header { name: name.into(), rewrite: None }
}

fn policy(source: HashSource) -> HashPolicy {
    HashPolicy { source, terminal: false }
}

fn hashed(policies: &[HashPolicy], profile: Profile, uri: &str, headers: &[(&'static str, &'static str)]) -> Hashed {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_static(value));
    }
    let uri: Uri = uri.parse().unwrap();
    let head = RequestHead::new(&Method::GET, &uri, &map);
    Hasher::compile(policies, profile).unwrap().hash(&head, 77, || 0xABCD)
}

#[test]
fn headers_are_hashed_as_grpc_and_envoy_do() {
    let one = [policy(header("x-user"))];
    for profile in [Profile::Grpc, Profile::Envoy] {
        let hash = |headers: &[_]| hashed(&one, profile, "/", headers).hash;
        assert_eq!(hash(&[("x-user", "foo")]), Some(xxh64(b"foo")));
        assert_eq!(hash(&[]), None, "nothing to hash");
    }
    let two = [("x-user", "foo"), ("x-user", "bar")];
    assert_eq!(hashed(&one, Profile::Grpc, "/", &two).hash, Some(xxh64(b"foo,bar")));
    let chained = xxh64_seeded(xxh64(b"bar"), b"foo");
    assert_eq!(hashed(&one, Profile::Envoy, "/", &two).hash, Some(chained), "sorted, each seeded with the one before");
    let binary = [policy(header("x-user-bin"))];
    assert_eq!(hashed(&binary, Profile::Grpc, "/", &[("x-user-bin", "AA")]).hash, None, "gRFC A42");
    let path = [policy(header(":path"))];
    assert_eq!(hashed(&path, Profile::Envoy, "/a?b=1", &[]).hash, Some(xxh64(b"/a?b=1")));
}

#[test]
fn a_rewrite_comes_before_the_hash() {
    let rewrite = Some(RegexRewrite::new("^user-([0-9]+)-.*$", "\\1").unwrap());
    let policies = [policy(HashSource::Header { name: "x-user".into(), rewrite })];
    let hash = |value| hashed(&policies, Profile::Grpc, "/", &[("x-user", value)]).hash;
    assert_eq!(hash("user-7-a"), Some(xxh64(b"7")));
    assert_eq!(hash("user-7-a"), hash("user-7-b"));
    assert_eq!(hash("other"), Some(xxh64(b"other")), "what does not match stays");
}

#[test]
fn hashes_are_combined_and_a_terminal_one_ends_it() {
    let (a, b) = (xxh64(b"1"), xxh64(b"2"));
    let headers = [("a", "1"), ("b", "2")];
    let both = [policy(header("a")), policy(header("b"))];
    assert_eq!(hashed(&both, Profile::Grpc, "/", &headers).hash, Some(a.rotate_left(1) ^ b));
    let first = [HashPolicy { source: header("a"), terminal: true }, policy(header("b"))];
    assert_eq!(hashed(&first, Profile::Grpc, "/", &headers).hash, Some(a));
    assert_eq!(hashed(&first, Profile::Grpc, "/", &headers[1..]).hash, Some(b), "terminal only when it gave a hash");
    let channel = [policy(HashSource::ChannelId)];
    assert_eq!(hashed(&channel, Profile::Grpc, "/", &[]).hash, Some(77));
    let query = [policy(HashSource::QueryParameter("user".into()))];
    assert_eq!(hashed(&query, Profile::Envoy, "/x?user=foo&user=bar", &[]).hash, Some(xxh64(b"foo")));
    assert_eq!(hashed(&query, Profile::Envoy, "/x", &[]).hash, None);
}

#[test]
fn a_missing_cookie_is_made_when_it_has_a_lifetime() {
    let cookie = |ttl| {
        let attributes = vec![("SameSite".to_owned(), "Strict".to_owned()), ("Secure".to_owned(), String::new())];
        [policy(HashSource::Cookie(CookieHash { name: "sid".into(), ttl, path: "/shop".into(), attributes }))]
    };
    let sent = [("cookie", "a=b; sid=foo")];
    for ttl in [None, Some(Duration::from_secs(60))] {
        let hashed = hashed(&cookie(ttl), Profile::Envoy, "/", &sent);
        assert_eq!((hashed.hash, hashed.cookies.len()), (Some(xxh64(b"foo")), 0), "it is there");
    }
    assert_eq!(hashed(&cookie(None), Profile::Envoy, "/", &[]).hash, None);
    let made = hashed(&cookie(Some(Duration::from_secs(60))), Profile::Envoy, "/", &[]);
    let expected = "sid=\"000000000000abcd\"; Max-Age=60; Path=/shop; SameSite=Strict; Secure; HttpOnly";
    assert_eq!(made.cookies, [expected]);
    // The caller sends it back as it came.
    let again =
        hashed(&cookie(Some(Duration::from_secs(60))), Profile::Envoy, "/", &[("cookie", "sid=\"000000000000abcd\"")]);
    assert_eq!((again.hash, again.cookies.len()), (made.hash, 0));
    let session = hashed(&cookie(Some(Duration::ZERO)), Profile::Envoy, "/", &[]);
    assert!(!session.cookies[0].to_str().unwrap().contains("Max-Age"), "a lifetime of zero is that of the session");
}
