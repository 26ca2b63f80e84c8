//! An inbound side that does what a file says, and follows it.

use crate::{
    mtls::control_plane,
    support::{
        ANY, GUARD, TARGET, assert_says, hello_with,
        inbound::{Echo, Polite, Seen, Serving},
        mesh_on,
        policies::{Tokens, plain, tell, with_token},
        rule, service, until,
    },
};
use examples::greeter::greeter_server::GreeterServer;
use http::StatusCode;
use mesh_client::{
    Inbound,
    inbound::{JwtProvider, Serving as State},
};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, service::Routes};

const EXAMPLE: &str = include_str!("../../../docs/inbound.json");
const OFTEN: Duration = Duration::from_millis(20);

/// Asks on this connection, by HTTP/1.1.
async fn ask(socket: &mut TcpStream, path: &str) -> StatusCode {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
    socket.read_exact(&mut vec![0; length]).await.unwrap();
    head[9..12].parse().unwrap()
}

#[tokio::test]
async fn the_example_of_the_documentation_is_in_force() {
    let (cp, dir) = control_plane().await;
    let certs = cp.ca().unwrap().ensure("default", "greeter").unwrap();
    let file = dir.path().join("inbound.json");
    std::fs::write(&file, EXAMPLE.replace("certs/", &format!("{}/", certs.display()))).unwrap();
    let inbound = Inbound::builder().file(&file).bind(ANY).await.unwrap();
    assert_eq!(inbound.serving().to_string(), "serving (file 1)");
    let serving = Serving::of(inbound, Routes::new(GreeterServer::new(Polite)));
    cp.apply(&(service(&[("one", serving.addr)]) + &rule("{tls: {mode: ISTIO_MUTUAL}}", &[]))).await.unwrap();
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    until("the caller is let in", async || hello_with(&channel, |_| {}).await.is_ok()).await;
    // Its namespace is taken away.
    std::fs::write(&file, std::fs::read_to_string(&file).unwrap().replace("\"default\", ", "")).unwrap();
    let inbound = Inbound::builder().file(&file).bind(ANY).await.unwrap();
    let strict = Serving::of(inbound, Routes::new(GreeterServer::new(Polite)));
    cp.apply(&(service(&[("one", strict.addr)]) + &rule("{tls: {mode: ISTIO_MUTUAL}}", &[]))).await.unwrap();
    until("the caller is not let in", async || {
        hello_with(&channel, |_| {}).await.is_err_and(|status| status.code() == Code::PermissionDenied)
    })
    .await;
}

/// Bad files that were counted since it was asked last.
fn errors(recorder: &DebuggingRecorder) -> u64 {
    let counted = recorder.snapshotter().snapshot().into_vec();
    let of = |name: &str, value: &DebugValue| match value {
        DebugValue::Counter(count) if name == "mesh_inbound_file_errors_total" => *count,
        _ => 0,
    };
    counted.iter().map(|(key, _, _, value)| of(key.key().name(), value)).sum()
}

#[tokio::test]
async fn limits_of_connections_are_followed_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inbound.json");
    let write = |limits: &str| {
        std::fs::write(dir.path().join("next"), format!(r#"{{"limits": {{{limits}}}}}"#)).unwrap();
        std::fs::rename(dir.path().join("next"), &file).unwrap();
    };
    write(r#""max_connections": 1"#);
    let builder = Inbound::builder().file(&file).file_refresh(OFTEN);
    let serving = Serving::of(builder.bind(ANY).await.unwrap(), Echo(Arc::<Seen>::default()));
    let said = || serving.inbound.serving().to_string();
    let mut first = TcpStream::connect(serving.addr).await.unwrap();
    assert_eq!(ask(&mut first, "/status/200").await, 200);
    // Whether a connection is served.
    let served = async || {
        let mut socket = TcpStream::connect(serving.addr).await.unwrap();
        let _ = socket.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        timeout(GUARD, socket.read_u8()).await.expect("it ends").is_ok()
    };
    assert!(!served().await, "one is open");
    write(r#""max_connections": 2"#);
    until("the change is in force", async || said() == "serving (file 2)").await;
    until("there is room", served).await;
    assert_eq!(ask(&mut first, "/status/200").await, 200, "it stays");
    write(r#""handshake_timeout": "50ms", "max_handshakes": 1"#);
    until("the change is in force", async || said() == "serving (file 3)").await;
    let mut silent = TcpStream::connect(serving.addr).await.unwrap();
    timeout(GUARD, silent.read_to_end(&mut Vec::new())).await.expect("long before ten seconds").unwrap();
    assert_eq!(ask(&mut first, "/status/200").await, 200);
}

#[tokio::test]
async fn changes_are_put_in_force_in_place_and_a_bad_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inbound.json");
    let deny = |path: &str| {
        format!(r#"{{"filters": [{{"authorize": {{"action": "deny", "rules": [{{"paths": ["{path}"]}}]}}}}]}}"#)
    };
    let write = |text: &str| {
        // At once, as those who replace such files do it.
        std::fs::write(dir.path().join("next"), text).unwrap();
        std::fs::rename(dir.path().join("next"), &file).unwrap();
    };
    write(&deny("/status/200"));
    let recorder = DebuggingRecorder::new();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let told = Arc::<Mutex<Vec<String>>>::default();
    let hears = told.clone();
    let tell = move |state: &State| hears.lock().unwrap().push(state.to_string());
    let builder = Inbound::builder().file(&file).file_refresh(OFTEN).on_serving(tell);
    let serving = Serving::of(builder.bind(ANY).await.unwrap(), Echo(Arc::<Seen>::default()));
    let mut socket = TcpStream::connect(serving.addr).await.unwrap();
    assert_eq!(ask(&mut socket, "/status/200").await, 403);
    assert_eq!(ask(&mut socket, "/status/201").await, 201);
    let said = || serving.inbound.serving().to_string();

    write(&deny("/status/201"));
    until("the change is in force", async || said() == "serving (file 2)").await;
    assert_eq!(ask(&mut socket, "/status/200").await, 200, "on the same connection");
    assert_eq!(ask(&mut socket, "/status/201").await, 403);

    write(r#"{"filter": []}"#);
    until("the error is told", async || said().contains("but")).await;
    assert_eq!(errors(&recorder), 1);
    assert_says(&said(), &["file 2", &file.display().to_string(), "filter: is not known"]);
    assert_eq!(ask(&mut socket, "/status/201").await, 403, "what was good stays");
    write(r#"{"tls": {"client_auth": "off", "certificate_file": "/no/where", "private_key_file": "/no/where"}}"#);
    until("so is another one", async || said().contains("/no/where")).await;
    assert_eq!(errors(&recorder), 1, "one more");
    std::fs::remove_file(&file).unwrap();
    until("and that it is gone", async || said().contains("json: No such file")).await;
    assert_eq!(ask(&mut socket, "/status/201").await, 403);

    write("{}");
    until("it is good again", async || said() == "serving (file 3)").await;
    assert_eq!(ask(&mut socket, "/status/201").await, 201);
    let told = told.lock().unwrap();
    assert_eq!(
        (told.first().unwrap().as_str(), told.last().unwrap().as_str()),
        ("serving (file 2)", "serving (file 3)")
    );
    assert_eq!(told.iter().filter(|state| state.contains("but")).count(), 3, "{told:?}");
}

#[tokio::test]
async fn a_bad_file_at_the_start_is_an_error_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inbound.json");
    let error = Inbound::builder().file(&file).bind(ANY).await.unwrap_err();
    assert_says(&error.to_string(), &["inbound.json", "No such file"]);
    std::fs::write(&file, r#"{"limits": {"idle_timeout": 10}}"#).unwrap();
    let error = Inbound::builder().file(&file).bind(ANY).await.unwrap_err();
    assert_says(&error.to_string(), &["inbound.json", "limits.idle_timeout", "a number"]);
}

#[tokio::test]
async fn a_rule_about_tokens_that_nobody_verifies_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inbound.json");
    let tokens = Tokens::new();
    let deny = r#"{"authorize": {"action": "deny", "rules": [{"claims": {"sub": ["guest"]}}]}}"#;
    let jwt = format!(r#"{{"jwt": {{"issuer": "i", "optional": true, "jwks": {}}}}}"#, tokens.jwks());
    let provider = JwtProvider::inline("i", tokens.jwks()).optional();
    let bind = async |filters: &[&str], builder: mesh_client::inbound::InboundBuilder| {
        std::fs::write(&file, format!(r#"{{"filters": [{}]}}"#, filters.join(", "))).unwrap();
        builder.file(&file).bind(ANY).await
    };
    for filters in [&[deny][..], &[deny, &jwt]] {
        let error = bind(filters, Inbound::builder()).await.unwrap_err();
        assert_says(&error.to_string(), &["inbound.json", "filters[0]", "no `jwt` is given before"]);
    }
    for (filters, builder) in
        [(&[jwt.as_str(), deny][..], Inbound::builder()), (&[deny][..], Inbound::builder().jwt(provider))]
    {
        let serving = Serving::of(bind(filters, builder).await.unwrap(), tower::service_fn(tell));
        for (subject, expected) in [("guest", 403), ("anna", 200)] {
            let answer = plain(serving.addr, with_token("/", &tokens.of("i", subject))).await;
            assert_eq!(answer.0, expected, "{subject}: {}", answer.1);
        }
    }
}
