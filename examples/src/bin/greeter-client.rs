//! Calls the greeter through the mesh and counts who answered.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use examples::greeter::HelloRequest;
use examples::greeter::greeter_client::GreeterClient;
use futures::StreamExt;
use mesh_client::{Explain, Mesh};
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};

/// Calls helloworld.Greeter/SayHello through the mesh, and prints how many answers each backend gave.
///
/// The control plane is named by the gRPC bootstrap that GRPC_XDS_BOOTSTRAP (a file's path, which wins) or
/// GRPC_XDS_BOOTSTRAP_CONFIG (JSON) holds; `mesh-control bootstrap` prints one. Exits with 1 when a call failed.
/// RUST_LOG chooses what is logged on standard error; default `warn`.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
EXAMPLE:
    mesh-control bootstrap > bootstrap.json
    export GRPC_XDS_BOOTSTRAP=$PWD/bootstrap.json
    greeter-client xds:///greeter.default.svc.cluster.local:50051 --requests 1000
    greeter-client xds:///greeter.default.svc.cluster.local:50051 --header x-canary=1 --explain
    greeter-client dns:///localhost:6001"
)]
struct Args {
    /// What to call: xds:///NAME, xds://AUTHORITY/NAME, dns:///HOST:PORT, or ipv4:ADDRESS:PORT,ADDRESS:PORT
    target: String,
    /// How many calls to make
    #[arg(long, value_name = "N", default_value_t = 1)]
    requests: u32,
    /// How many calls are under way at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: u32,
    /// Header to send with each call; may be given again
    #[arg(long = "header", value_name = "KEY=VALUE", value_parser = header)]
    headers: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    /// How long a call may take, in seconds; without it only the route's timeout holds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// Say of the first call how it was served: each decision from the listener to the endpoint
    #[arg(long)]
    explain: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::logging("warn");
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stdout, reason = "the program's output")]
async fn run(args: Args) -> anyhow::Result<()> {
    let timeout = args.timeout.map(Duration::try_from_secs_f64).transpose().context("--timeout")?;
    let mesh = if args.target.starts_with("xds:") { Mesh::from_env().await? } else { Mesh::builder().build().await? };
    let channel = mesh.channel(&args.target)?;
    let explain = args.explain.then(Explain::default);

    let calls = (0..args.requests).map(|call| {
        let mut greeter = GreeterClient::new(channel.clone());
        let mut request = tonic::Request::new(HelloRequest { name: format!("caller {call}"), count: 0 });
        for (name, value) in &args.headers {
            request.metadata_mut().append(name.clone(), value.clone());
        }
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        if let (0, Some(explain)) = (call, &explain) {
            request.extensions_mut().insert(explain.clone());
        }
        async move { greeter.say_hello(request).await }
    });
    let mut calls = futures::stream::iter(calls).buffer_unordered(args.concurrency as usize);

    let mut answers: BTreeMap<String, u32> = BTreeMap::new();
    let mut failures: BTreeMap<String, u32> = BTreeMap::new();
    while let Some(ended) = calls.next().await {
        match ended {
            Ok(reply) => *answers.entry(reply.into_inner().backend).or_default() += 1,
            Err(status) => *failures.entry(format!("{:?}: {}", status.code(), status.message())).or_default() += 1,
        }
    }

    if let Some(explain) = &explain {
        println!("{explain}\n");
    }
    for (backend, count) in &answers {
        println!("{count:>8}  {backend}");
    }
    for (failure, count) in &failures {
        println!("{count:>8}  failed with {failure}");
    }
    anyhow::ensure!(failures.is_empty(), "{} of {} calls failed", failures.values().sum::<u32>(), args.requests);
    Ok(())
}

fn header(text: &str) -> Result<(AsciiMetadataKey, AsciiMetadataValue), String> {
    let (name, value) = text.split_once('=').ok_or("KEY=VALUE is expected")?;
    let name = name.to_ascii_lowercase().parse().map_err(|_| format!("`{name}` is not a header name"))?;
    let value = value.parse().map_err(|_| format!("`{value}` is not a header value"))?;
    Ok((name, value))
}
