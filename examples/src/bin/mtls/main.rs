//! Mutual TLS between services of a mesh, and who may call whom: a control plane with its own authority, two services, and callers.

mod services;
mod world;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use examples::greeter::HelloRequest;
use examples::greeter::greeter_client::GreeterClient;
use examples::report::Report;
use mesh_client::{Explain, Mesh, MeshChannel};
use mesh_tls::{ClientSettings, ClientTls, MemorySource, Roots, TrustRoots};
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Code;
use world::World;

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SHOP: &str = "spiffe://cluster.local/ns/default/sa/shop";
/// Callers at once while certificates change.
const CALLERS: u64 = 8;

/// Shows mutual TLS in a mesh: identities, refusals, and certificates that are replaced under load.
///
/// Exits with 1 when a claim does not hold.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Args {}

#[tokio::main]
async fn main() -> ExitCode {
    let _args = Args::parse();
    let mut report = Report::new();
    match run(&mut report).await {
        Ok(()) => report.finish(),
        Err(error) => {
            report.abort(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(report: &mut Report) -> anyhow::Result<()> {
    let world = World::start().await?;
    identities(&world, report).await?;
    strangers(&world, report).await?;
    authorization(&world, report).await?;
    rotation(&world, report).await?;
    world.shutdown().await;
    Ok(())
}

/// A request that says whom it wants to be told about.
fn hello() -> HelloRequest {
    HelloRequest { name: "mesh".to_owned(), count: 1 }
}

async fn identities(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("A client calls the shop, which calls the greeter: every connection is mutual TLS");
    let explain = Explain::default();
    let mut request = tonic::Request::new(hello());
    request.extensions_mut().insert(explain.clone());
    let reply = GreeterClient::new(world.shop()?).say_hello(request).await?.into_inner();
    let server = explain.explanation().get("peer").unwrap_or("none").to_owned();
    let seen = world.shop_saw();
    report.table(&[
        ("the client sees", server.clone()),
        ("the shop is called by", seen.clone()),
        ("the greeter is called by", reply.peer.clone()),
        ("the answer", reply.message),
    ]);
    report.claim(server.contains(SHOP), format!("the client speaks to {SHOP}"));
    report.claim(seen == CLIENT && reply.peer == SHOP, "each service knows who calls it");
    Ok(())
}

/// Callers without an identity: one that speaks plaintext, and one that shows no certificate.
async fn strangers(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("A third has no identity");
    let addr = world.greeter_addr();
    let plain = Mesh::builder().build().await?.fixed_channel(&[addr])?;
    let mut plain = GreeterClient::new(plain);
    let plain = match tokio::time::timeout(world::PATIENCE, plain.say_hello(hello())).await? {
        Ok(reply) => format!("answered by {}", reply.into_inner().backend),
        Err(status) => format!("{:?}", status.code()),
    };
    let anonymous = anonymous(addr, &world.roots()?).await?;
    report.table(&[("in plaintext", plain.clone()), ("over TLS, without a certificate", anonymous.clone())]);
    report.claim(plain == "Unavailable", "plaintext is refused");
    report.claim(anonymous.contains("certificate"), "who shows no certificate is refused, and told why");
    Ok(())
}

/// What a caller is told that trusts the authority and has no certificate.
async fn anonymous(addr: SocketAddr, roots: &str) -> anyhow::Result<String> {
    let roots = Arc::new(TrustRoots::from_pem(roots.as_bytes())?);
    let source = Arc::new(MemorySource::new("nobody", None, Some(roots)));
    let settings = ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::new(Roots::Source(source)) };
    let tls = ClientTls::new(settings, mesh_tls::default_provider())?;
    let told = match tls.connect(tokio::net::TcpStream::connect(addr).await?, None).await {
        Err(error) => error.to_string(),
        // Under TLS 1.3 the server's verdict on our certificate comes with the first read.
        Ok((mut stream, _)) => match stream.read_u8().await {
            Ok(_) => "answered".to_owned(),
            Err(error) => error.to_string(),
        },
    };
    Ok(told)
}

async fn authorization(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("An AuthorizationPolicy lets the shop call SayHello of the greeter, and nobody else, and nothing else");
    let code = |result: Result<_, tonic::Status>| result.err().map_or(Code::Ok, |status| status.code());
    let allowed = code(GreeterClient::new(world.greeter_for_shop()?).say_hello(hello()).await.map(drop));
    let denied = code(GreeterClient::new(world.greeter_for_shop()?).say_hellos(hello()).await.map(drop));
    let other = code(GreeterClient::new(world.greeter_for_client()?).say_hello(hello()).await.map(drop));
    report.table(&[
        ("the shop, SayHello", format!("{allowed:?}")),
        ("the shop, SayHellos", format!("{denied:?}")),
        ("the client, SayHello", format!("{other:?}")),
    ]);
    report.claim(allowed == Code::Ok, "what is allowed is served");
    report.claim(denied == Code::PermissionDenied, "another path is denied");
    report.claim(other == Code::PermissionDenied, "another caller is denied");
    Ok(())
}

/// What the callers saw.
#[derive(Debug, Default)]
struct Tally {
    answered: u64,
    failed: u64,
    failure: Option<String>,
}

async fn rotation(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let lifetime = world::LIFETIME.as_secs();
    report.step(&format!("Certificates live {lifetime} s, the root is replaced too, and calls go on"));
    let before = world.roots()?;
    world.rotate_root()?;
    let both = world.roots()?;
    let until = Instant::now() + world::LIFETIME + Duration::from_secs(3);
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(calls(world.shop()?, until));
    }
    let mut all = Tally::default();
    while let Some(tally) = callers.join_next().await {
        let tally = tally.context("a caller ended early")?;
        all.answered += tally.answered;
        all.failed += tally.failed;
        all.failure = all.failure.or(tally.failure);
    }
    let (shop, greeter) = (world.certificates_at_shop(), world.certificates_at_greeter());
    report.table(&[
        ("calls", format!("{} answered, {} failed", all.answered, all.failed)),
        ("certificates of the client", format!("{} seen by the shop", shop.len())),
        ("certificates of the shop", format!("{} seen by the greeter", greeter.len())),
    ]);
    if let Some(failure) = all.failure {
        report.text(format!("the first failure: {failure}"));
    }
    report.claim(all.answered > 0 && all.failed == 0, "0 failed calls");
    let several = |seen: &HashSet<Vec<u8>>| seen.len() >= 3;
    report
        .claim(several(&shop) && several(&greeter), "connections were made again with new certificates, on both hops");
    report.claim(
        both.starts_with(&before) && both.len() > before.len() && !world.roots()?.starts_with(&before),
        "the old root and the new one were trusted together, and now the new one signs",
    );
    Ok(())
}

/// One call after the other.
async fn calls(channel: MeshChannel, until: Instant) -> Tally {
    let mut tally = Tally::default();
    let mut client = GreeterClient::new(channel);
    while Instant::now() < until {
        match client.say_hello(hello()).await {
            Ok(_) => tally.answered += 1,
            Err(status) => {
                tally.failed += 1;
                tally.failure.get_or_insert(status.to_string());
            }
        }
    }
    tally
}
