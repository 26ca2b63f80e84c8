//! What becomes of keys when those who serve them misbehave.

use super::*;

/// The first fetch panics.
struct Careless(Server);

impl FetchKeys for Careless {
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, crate::BoxError>> + Send>> {
        assert!(self.0.fetches.fetch_add(1, Ordering::SeqCst) > 0, "on purpose");
        self.0.fetch()
    }
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_panics_is_a_failed_one() {
    let signer = Signer::new("k", "ES256");
    let server = Server { sets: vec![Ok(set(&[&signer]))], fetches: Arc::default() };
    let authentication = fetched_by(Arc::new(Careless(server)));
    let token = signer.sign(&claims());
    for _ in 0..2 {
        let mut head = bearer(&token);
        let fetched = tokio::time::timeout(Duration::from_secs(3600), authentication.fetched(&mut head)).await;
        assert!(fetched.expect("nobody waits for what is over").is_err());
    }
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(authentication.fetched(&mut bearer(&token)).await.is_ok(), "it is tried again");
}

#[tokio::test(start_paused = true)]
async fn a_set_without_a_usable_key_replaces_nothing() {
    let signer = Signer::new("k", "ES256");
    let unknown = json!({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}).to_string();
    for useless in [r#"{"keys": []}"#.to_owned(), unknown] {
        let (authentication, fetches) = remote(vec![Ok(set(&[&signer])), Ok(useless)]);
        let token = signer.sign(&claims());
        assert!(authentication.fetched(&mut bearer(&token)).await.is_ok());
        tokio::time::advance(Duration::from_secs(596)).await;
        assert!(passed(&authentication, &mut bearer(&token)).is_some());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(fetches.load(Ordering::SeqCst), 2);
        assert!(passed(&authentication, &mut bearer(&token)).is_some(), "the good ones stay until they are too old");
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_gone_or_broken_leaves_the_last_good_keys() {
    let (old, new) = (Signer::new("old", "ES256"), Signer::new("new", "ES256"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("jwks.json");
    std::fs::write(&path, set(&[&old])).unwrap();
    let authentication = compile(&config(provider(JwksSource::File(path.to_str().unwrap().into())), needed()));
    let (before, after) = (old.sign(&claims()), new.sign(&claims()));
    assert!(passed(&authentication, &mut bearer(&before)).is_some());
    std::fs::remove_file(&path).unwrap();
    for broken in [None, Some(r#"{"keys": [{"kty""#), Some(r#"{"keys": []}"#)] {
        if let Some(text) = broken {
            std::fs::write(&path, text).unwrap();
        }
        for _ in 0..3 {
            tokio::time::advance(Duration::from_secs(11)).await;
            assert!(authentication.fetched(&mut bearer(&before)).await.is_ok(), "{broken:?}");
        }
    }
    std::fs::write(&path, set(&[&new])).unwrap();
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(authentication.fetched(&mut bearer(&after)).await.is_ok(), "what is good again is taken, and waited for");
    assert!(authentication.fetched(&mut bearer(&before)).await.is_err(), "and what is gone is gone");
}

#[test]
fn a_set_with_more_keys_than_anybody_has_is_refused_as_a_whole() {
    let jwk = Signer::new("k", "ES256").jwk();
    let set = |count: usize| json!({"keys": vec![jwk.clone(); count]}).to_string();
    assert!(KeySet::parse(set(256).as_bytes()).is_ok());
    assert!(KeySet::parse(set(257).as_bytes()).unwrap_err().contains("more than 256"));
}

#[tokio::test(start_paused = true)]
async fn good_keys_outlive_failing_fetches_for_a_while_and_no_longer() {
    let (old, new) = (Signer::new("old", "ES256"), Signer::new("new", "ES256"));
    let mut sets = vec![Ok(set(&[&old]))];
    sets.extend(std::iter::repeat_n(Err("down".to_owned()), 100_000));
    let (authentication, fetches) = remote(sets);
    let token = old.sign(&json!({"iss": "https://issuer", "exp": now() + 100_000}));
    assert!(authentication.fetched(&mut bearer(&token)).await.is_ok());
    // Fresh for ten minutes, and an hour more.
    for minutes in 1..70 {
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(authentication.fetched(&mut bearer(&token)).await.is_ok(), "after {minutes} min");
    }
    assert!(fetches.load(Ordering::SeqCst) > 10, "it is tried again and again");
    // It does not wait for what fails already.
    assert!(passed(&authentication, &mut bearer(&token)).is_some());
    let stranger = new.sign(&claims());
    assert!(authentication.fetched(&mut bearer(&stranger)).await.is_err());
    tokio::time::advance(Duration::from_secs(61)).await;
    let refused = authentication.fetched(&mut bearer(&token)).await.unwrap_err();
    assert_eq!(refused.respond(false, true).body(), "Jwks remote fetch is failed");
}

fn spiffe(bundles: &mesh_tls::JwtBundles) -> Authentication {
    let provider = crate::inbound::JwtProvider::spiffe(bundles.clone(), "shop");
    let (filter, mut fetches) = crate::inbound::JwtAuthentication::from(provider).filter("jwt");
    let mesh_xds::resource::HttpFilterConfig::Jwt(config) = filter.config else { panic!() };
    let fetch = fetches.pop().unwrap().1;
    compile_with(&config, &move |_| Some(fetch.clone()))
}

fn bundles(of: &[(&str, &[&Signer])], into: &mesh_tls::JwtBundles) {
    let sets: Vec<_> = of.iter().map(|(domain, signers)| (domain.parse().unwrap(), set(signers))).collect();
    into.replace(sets.iter().map(|(domain, set): &(mesh_tls::TrustDomain, String)| (domain.clone(), set.as_bytes())))
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_key_of_a_trust_domain_verifies_its_own_tokens_and_counts_no_more_when_it_is_gone() {
    let (ours, theirs, next) = (Signer::new("1", "ES256"), Signer::new("1", "ES256"), Signer::new("2", "ES384"));
    let held = mesh_tls::JwtBundles::new("test");
    let authentication = spiffe(&held);
    let svid = |signer: &Signer, sub: &str| signer.sign(&json!({"sub": sub, "aud": ["shop"], "exp": now() + 600}));
    let answer = async |token: &str| match authentication.fetched(&mut bearer(token)).await {
        Ok(claims) => claims.unwrap().subject().unwrap().to_owned(),
        Err(reply) => String::from_utf8(reply.respond(false, true).body().to_vec()).unwrap(),
    };
    let cart = "spiffe://ours.example/cart";
    assert_eq!(answer(&svid(&ours, cart)).await, "Jwks remote fetch is failed", "there are no keys yet");
    bundles(&[("ours.example", &[&ours]), ("theirs.example", &[&theirs])], &held);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(answer(&svid(&ours, cart)).await, cart);
    assert_eq!(answer(&svid(&theirs, "spiffe://theirs.example/cart")).await, "spiffe://theirs.example/cart");
    // Nobody speaks for another trust domain.
    assert_eq!(answer(&svid(&theirs, cart)).await, "Jwt verification fails");
    assert!(answer(&svid(&ours, "spiffe://third.example/cart")).await.contains("doesn't have key"));
    for sub in ["", "cart", "spiffe://ours.example", "https://ours.example/cart"] {
        assert_eq!(answer(&svid(&ours, sub)).await, "Jwt subject is not allowed", "{sub:?}");
    }
    let claims = [
        (json!({"sub": cart, "aud": ["other"], "exp": now() + 600}), "Audiences in Jwt are not allowed"),
        (json!({"sub": cart, "exp": now() + 600}), "Audiences in Jwt are not allowed"),
        (json!({"sub": cart, "aud": ["shop"]}), "Jwt has no expiration"),
        (json!({"sub": cart, "aud": ["shop"], "exp": now() - 600}), "Jwt is expired"),
    ];
    for (claims, why) in claims {
        assert_eq!(answer(&ours.sign(&claims)).await, why, "{claims}");
    }
    // A key that is replaced counts at once, and the old one no more.
    bundles(&[("ours.example", &[&next])], &held);
    assert_eq!(answer(&svid(&next, cart)).await, cart);
    assert!(answer(&svid(&ours, cart)).await.contains("doesn't have key"));
    assert!(answer(&svid(&theirs, "spiffe://theirs.example/cart")).await.contains("doesn't have key"));
    // However long nothing new comes.
    held.replace([("ours.example".parse().unwrap(), &b"?"[..])]).unwrap_err();
    tokio::time::advance(Duration::from_secs(100_000)).await;
    assert_eq!(answer(&svid(&next, cart)).await, cart);
}
