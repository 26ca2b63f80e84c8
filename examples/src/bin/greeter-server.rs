//! Serves the greeter, or plain HTTP, on one address until Ctrl-C or SIGTERM.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use examples::backend::{Backend, HttpBackend, Options, State};
use examples::{logging, server};
use mesh_tls::Mode;

/// A greeter backend: answers SayHello, SayHellos and Chat of helloworld.Greeter with its own name.
///
/// With --http it is a plain HTTP backend instead. Either can fail a share of its calls or answer late, to see what the callers'
/// mesh makes of that. Ends on Ctrl-C or SIGTERM, and says how many calls it answered. RUST_LOG chooses what is logged on standard
/// error; default `warn`.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
EXAMPLE:
    greeter-server --listen 127.0.0.1:6001 --name v1-a
    greeter-server --listen 127.0.0.1:6002 --name v1-b --fail-rate 0.2
    greeter-server --listen 127.0.0.1:6080 --name reviews --http
    greeter-server --listen 127.0.0.1:6003 --name v2-a --tls /tmp/mesh-ca/ns/default/sa/greeter"
)]
struct Args {
    /// Address to listen on; port 0 takes a free port, which is printed
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// Name that the replies carry
    #[arg(long)]
    name: String,
    /// Share of the calls answered with UNAVAILABLE (with --http: 503), from 0 to 1
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    fail_rate: f64,
    /// How long each answer waits, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 0)]
    delay: u64,
    /// Serve plain HTTP (1.1 and 2) instead of gRPC: every path is answered with `hello from NAME at PATH`
    #[arg(long)]
    http: bool,
    /// Folder with cert.pem, key.pem and ca.pem, as `mesh-control serve --ca` writes them: serve mutual TLS. Renewed files are
    /// used at once
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// With --tls: refuse callers that speak no TLS, instead of serving them in plain text
    #[arg(long, requires = "tls")]
    strict: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    logging("warn");
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
    let stop = stop_signal()?;
    let accept = match &args.tls {
        None => server::plain(),
        Some(dir) => {
            let mode = if args.strict { Mode::Strict } else { Mode::Permissive };
            server::tls(server::acceptor(dir, mode).with_context(|| format!("--tls {}", dir.display()))?)
        }
    };
    let options = Options { fail_rate: args.fail_rate, delay: Duration::from_millis(args.delay), accept };
    let started = match args.http {
        false => Backend::start(&args.name, args.listen, options).await.map(Serving::Grpc),
        true => Backend::http(&args.name, args.listen, options).await.map(Serving::Http),
    };
    let serving = started.with_context(|| format!("--listen {}: cannot listen there", args.listen))?;
    println!("greeter {} listens on {}", args.name, serving.addr());
    stop.await;
    let state = serving.state();
    println!("greeter {} answered {} calls, and failed {} of them", args.name, state.calls(), state.failed());
    Ok(())
}

/// What runs until the program ends.
enum Serving {
    Grpc(Backend),
    Http(HttpBackend),
}

impl Serving {
    fn addr(&self) -> SocketAddr {
        match self {
            Self::Grpc(backend) => backend.addr(),
            Self::Http(backend) => backend.addr(),
        }
    }

    fn state(&self) -> &State {
        match self {
            Self::Grpc(backend) => backend.state(),
            Self::Http(backend) => backend.state(),
        }
    }
}

/// Completes on Ctrl-C or SIGTERM. The handlers are in place when this returns.
#[cfg(unix)]
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Completes on Ctrl-C.
#[cfg(not(unix))]
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a number from 0 to 1 is expected".to_owned()),
    }
}
