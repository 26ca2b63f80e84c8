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
