//! Targets without a control plane.

use crate::support::{GUARD, greeter, hello, hello_with, plain_mesh};
use examples::greeter::{HelloRequest, greeter_client::GreeterClient};
use futures::StreamExt;
use mesh_client::Explain;
use std::{collections::BTreeMap, time::Duration};

#[tokio::test]
async fn a_fixed_list_is_called_in_turn() {
    let backends = [greeter("a").await, greeter("b").await, greeter("c").await];
    let addresses: Vec<_> = backends.iter().map(|b| b.addr()).collect();
    let channel = plain_mesh().await.fixed_channel(&addresses).unwrap();
    let mut seen = BTreeMap::<String, u32>::new();
    for _ in 0..30 {
        *seen.entry(hello(&channel).await.unwrap().backend).or_default() += 1;
    }
    assert_eq!(seen.into_values().collect::<Vec<_>>(), [10, 10, 10]);
}

#[tokio::test]
async fn a_dns_target_is_resolved_and_serves() {
    let backend = greeter("one").await;
    let target = format!("dns:///localhost:{}", backend.addr().port());
    let channel = plain_mesh().await.channel(&target).unwrap();
    channel.ready(GUARD).await.unwrap();
    assert_eq!(hello(&channel).await.unwrap().backend, "one");
}

#[tokio::test]
async fn an_ipv4_target_serves_unary_and_streaming_calls() {
    let backend = greeter("one").await;
    let channel = plain_mesh().await.channel(&format!("ipv4:{}", backend.addr())).unwrap();
    assert_eq!(hello(&channel).await.unwrap().message, "Hello test");

    let mut client = GreeterClient::new(channel);
    let stream = client.say_hellos(HelloRequest { name: "all".into(), count: 100 }).await.unwrap().into_inner();
    assert_eq!(stream.filter(|r| std::future::ready(r.is_ok())).count().await, 100);

    let messages = (0..50).map(|n| HelloRequest { name: n.to_string(), count: 0 });
    let chat = client.chat(futures::stream::iter(messages)).await.unwrap().into_inner();
    let answers: Vec<_> = chat.map(|r| r.unwrap().message).collect().await;
    assert_eq!((answers.len(), answers[49].as_str()), (50, "Hello 49"));
    assert_eq!(backend.state().in_flight(), 0);
}

#[tokio::test]
async fn the_deadline_of_the_caller_holds_and_the_error_says_which() {
    let backend = greeter("slow").await;
    backend.state().set_delay(Duration::from_secs(3600));
    let channel = plain_mesh().await.fixed_channel(&[backend.addr()]).unwrap();
    let status = hello_with(&channel, |r| r.set_timeout(Duration::from_millis(50))).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
    let text = status.message();
    assert!(text.contains("deadline of 50ms exceeded") && text.contains("grpc-timeout"), "{text}");
    assert!(text.contains(&backend.addr().to_string()), "{text}");
}

#[tokio::test]
async fn a_target_nobody_listens_on_fails_at_once_with_the_cause() {
    let mut backend = greeter("gone").await;
    backend.kill().await;
    let channel = plain_mesh().await.fixed_channel(&[backend.addr()]).unwrap();
    let status = hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert!(status.message().contains("refused") && status.message().contains(&backend.addr().to_string()), "{status}");
}

#[tokio::test]
async fn explain_tells_the_decisions_of_a_call() {
    let backend = greeter("one").await;
    let channel = plain_mesh().await.fixed_channel(&[backend.addr()]).unwrap();
    let explain = Explain::default();
    let reply = hello_with(&channel, |r| drop(r.extensions_mut().insert(explain.clone()))).await.unwrap();
    let trail = explain.explanation();
    for subject in ["target", "config", "listener", "virtual host", "route", "cluster", "attempt", "trace"] {
        assert!(trail.get(subject).is_some(), "no {subject} in\n{trail}");
    }
    assert!(trail.get("attempt").unwrap().contains(&backend.addr().to_string()), "{trail}");
    assert!(reply.traceparent.contains(trail.get("trace").unwrap()), "{} {trail}", reply.traceparent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_calls_never_get_stuck() {
    let backend = greeter("one").await;
    let mesh = plain_mesh().await;
    for n in 0..3000 {
        let channel = mesh.fixed_channel(&[backend.addr()]).unwrap();
        let reply = hello_with(&channel, |r| r.set_timeout(GUARD)).await;
        assert!(reply.is_ok(), "call {n}: {reply:?}");
    }
}
