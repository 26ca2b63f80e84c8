//! Step 10: mTLS with SPIFFE identities, switched on by an edit, rotated under load.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mesh_client::{Explain, Mesh};
use mesh_tls::{ClientSettings, ClientTls, MemorySource, Mode, Roots, TrustRoots};
use tokio::io::AsyncReadExt;

use crate::resilience::wait;
use crate::traffic::{Traffic, call};
use crate::world::{GREETER, World};
use examples::report::Report;

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/greeter";
const ROTATIONS: u32 = 3;

pub(crate) async fn mutual_tls(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.step("policies.yaml is edited to tls.mode ISTIO_MUTUAL under load, and certificates are rotated");
    let mut traffic = Traffic::start(&world.greeter, 8, None);
    let mutual =
        |text: String| text.replacen("  trafficPolicy:\n", "  trafficPolicy:\n    tls: {mode: ISTIO_MUTUAL}\n", 1);
    let applied = world.edit_and_wait("policies.yaml", mutual).await?;
    report.claim(applied.is_ok(), "the control plane took the edit");
    let encrypted = |traffic: &Traffic| traffic.tally().by_peer.get(CLIENT).copied().unwrap_or(0);
    let switched = wait(report, &traffic, || encrypted(&traffic) > 500).await;
    // Everyone speaks mTLS now: plaintext is refused from here on.
    world.set_mode(Mode::Strict);

    let explain = Explain::default();
    let mut request = tonic::Request::new(examples::greeter::HelloRequest { name: "who".to_owned(), count: 0 });
    request.extensions_mut().insert(explain.clone());
    let mut greeter = examples::greeter::greeter_client::GreeterClient::new(world.greeter.clone());
    let reply = greeter.say_hello(request).await?.into_inner();
    let server = explain.explanation().get("peer").unwrap_or("none").to_owned();

    for n in 1..=ROTATIONS {
        let connections = |world: &World| world.greeters.iter().map(|g| g.connections()).sum::<u64>();
        let before = connections(world);
        world.control()?.ca().context("the dev CA is off")?.rotate_all()?;
        report.progress(format!("rotation {n}"));
        // The client's files and the greeters' are read every second; new connections show that they were.
        wait(report, &traffic, || connections(world) > before).await;
    }
    let tally = traffic.stop().await;
    report.table(&[
        ("the backend sees", reply.peer.clone()),
        ("the client sees", server.clone()),
        ("callers", tally.to_string()),
    ]);
    report.claim(
        switched && reply.peer == CLIENT && server.contains(SERVER),
        "calls go on, encrypted, and both sides know the other",
    );
    report.claim(tally.failed == 0, format!("0 failed calls through the switch and {ROTATIONS} rotations"));
    refused(world, report).await
}

/// Callers that trust the CA but hold no certificate: one that speaks TLS to a greeter, and one whose mesh has none to show.
async fn refused(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let ca = world.ca_dir().join("ns/default/sa/client/ca.pem");
    let crypto = mesh_tls::default_provider();
    let roots = MemorySource::new("anonymous", None, Some(Arc::new(TrustRoots::from_pem(&std::fs::read(&ca)?)?)));
    let tls = ClientTls::new(ClientSettings::new(Roots::Source(Arc::new(roots))), crypto)?;
    let tcp = tokio::net::TcpStream::connect(world.greeters[0].addr()).await?;
    let by_server = match tls.connect(tcp, None).await {
        Err(error) => error.to_string(),
        // Under TLS 1.3 the server's verdict on our certificate comes with the first read.
        Ok((mut stream, _)) => match stream.read_u8().await {
            Ok(_) => "answered".to_owned(),
            Err(error) => error.to_string(),
        },
    };

    let bootstrap = bootstrap_without_identity(&world.control_addr().to_string(), &ca);
    let mesh = Mesh::builder().bootstrap_json(&bootstrap)?.build().await?;
    let anonymous = mesh.channel(GREETER)?;
    anonymous.ready(Duration::from_secs(5)).await?;
    let by_mesh = match call(&anonymous, None).await {
        Ok(reply) => format!("answered by {}", reply.backend),
        Err(status) => status.message().to_owned(),
    };
    report.text(format!("without a certificate, TLS to a greeter: {by_server}"));
    report.text(format!("without a certificate, through a mesh:   {by_mesh}"));
    let told = |reason: &str| reason.contains("certificate") && !reason.starts_with("answered");
    report.claim(told(&by_server) && told(&by_mesh), "a caller without an identity is refused, and told why");
    Ok(())
}

fn bootstrap_without_identity(server: &str, ca: &Path) -> String {
    let ca = ca.display();
    format!(
        r#"{{"xds_servers":[{{"server_uri":"{server}","channel_creds":[{{"type":"insecure"}}],"server_features":["xds_v3"]}}],
            "node":{{"id":"anonymous"}},
            "certificate_providers":{{"default":{{"plugin_name":"file_watcher",
                "config":{{"ca_certificate_file":"{ca}","refresh_interval":"1s"}}}}}}}}"#
    )
}
