//! One connection against a peer that misbehaves, over an in-memory stream.

use super::*;
use futures::future::BoxFuture;
use std::{sync::Mutex, time::Duration};
use tokio::{
    io::{DuplexStream, duplex},
    time::Instant,
};

/// Hands out one stream.
#[derive(Debug)]
struct Once(Mutex<Option<DuplexStream>>);

impl Connect for Once {
    fn connect(&self, _: &ServerConfig) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let stream = self.0.lock().unwrap().take();
        Box::pin(async move {
            match stream {
                Some(stream) => Ok(Box::new(stream) as BoxedIo),
                None => std::future::pending().await,
            }
        })
    }
}

fn pair() -> (Arc<Once>, DuplexStream) {
    let (near, far) = duplex(1 << 16);
    (Arc::new(Once(Mutex::new(Some(near)))), far)
}

fn server() -> ServerConfig {
    ServerConfig::insecure("cp:1").unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_noticed_by_keepalive() {
    let (connect, _silent) = pair();
    let timing = Timing::default();
    let mut connection =
        dial(connect, server(), timing.clone(), Service::Aggregated).await.unwrap_or_else(|error| panic!("{error}"));
    connection.send(DiscoveryRequest::default());
    let start = Instant::now();
    let ended = connection.next().await.expect_err("nobody answers");
    assert!(start.elapsed() <= timing.keepalive_interval + timing.keepalive_timeout + Duration::from_secs(1));
    assert!(ended.contains("keep-alive"), "{ended}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_does_not_come_is_given_up() {
    let connect = Arc::new(Once(Mutex::new(None)));
    let ended = dial(connect, server(), Timing::default(), Service::Aggregated).await.err().expect("times out");
    assert_eq!(ended, "no connection within 20s");
}

#[tokio::test]
async fn a_token_is_read_anew_and_never_sent_in_the_clear() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut server = server();
    server.call_creds = vec![CallCreds::JwtTokenFile(file.path().into())];
    std::fs::write(file.path(), "first\n").unwrap();
    assert_eq!(bearer_token(&server).await.unwrap(), None, "plaintext");
    server.channel_creds = ChannelCreds::Tls(crate::bootstrap::TlsCreds {
        ca_certificate_file: None,
        spiffe_trust_bundle_map_file: None,
        certificate_file: None,
        private_key_file: None,
        refresh_interval: Duration::from_secs(600),
    });
    assert_eq!(bearer_token(&server).await.unwrap().unwrap(), "Bearer first");
    std::fs::write(file.path(), "second").unwrap();
    assert_eq!(bearer_token(&server).await.unwrap().unwrap(), "Bearer second");
    drop(file);
    assert!(bearer_token(&server).await.unwrap_err().contains("jwt_token_file"));
}
