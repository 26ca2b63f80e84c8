//! The commands of `mesh-control`.
#![allow(clippy::print_stdout, reason = "the output of a command line program")]

use crate::{
    ControlPlane, Event,
    bootstrap::{Bootstrap, DEFAULT_NODE_ID},
    input,
    model::MtlsMode,
    problem::{Problem, Severity},
};
use anyhow::Context as _;
use clap::{Parser, Subcommand};
use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

/// The mini control plane of mesh: serves Istio YAML as xDS to proxyless gRPC clients and to Envoy.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version, about, long_about = None)]
#[command(after_help = "Examples:
  mesh-control serve --config examples/mesh
  mesh-control serve --config examples/mesh --listen 127.0.0.1:15010 --ca /tmp/mesh-ca
  mesh-control bootstrap --server 127.0.0.1:15010 > bootstrap.json
  mesh-control lint examples/mesh/*.yaml")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Serve),
    Bootstrap(Print),
    Lint(Lint),
}

/// Serve a folder or file of Istio YAML (networking and security) over ADS, and follow its changes.
///
/// A change that has errors is not applied: what is wrong is printed as file:line:column, and the last good configuration
/// stays. Ends on Ctrl-C or SIGTERM.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mesh-control serve --config examples/mesh
  mesh-control serve --config mesh.yaml --listen 127.0.0.1:0
  mesh-control serve --config examples/mesh --ca /tmp/mesh-ca --identity prod/checkout --identity prod/cart
  mesh-control serve --config examples/mesh --mtls strict --certificate-lifetime 60

With --ca, certificates are kept in DIR/ns/NAMESPACE/sa/ACCOUNT/{cert.pem,key.pem,ca.pem,token} for default/client, for every service
account that an endpoint names, for `default` of its namespace, and for each --identity; they are renewed at half of their
lifetime. Beside them api.sock serves the SPIFFE Workload API and SDS. Whoever can open the folder has the identity.")]
struct Serve {
    /// Folder (its *.yaml and *.yml) or file to serve and watch.
    #[arg(long, short, value_name = "DIR|FILE")]
    config: PathBuf,
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15010", env = "MESH_CONTROL_LISTEN")]
    listen: SocketAddr,
    /// Run a development CA in this folder; created when it does not exist.
    #[arg(long, value_name = "DIR")]
    ca: Option<PathBuf>,
    /// Write no keys: workloads get theirs by sockets and signing requests.
    #[arg(long, requires = "ca")]
    ca_in_memory: bool,
    /// Address on which the CA serves Istio's CA API and ADS over TLS; port 0 takes a free one. Istio's own is 15012.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    ca_listen: SocketAddr,
    /// Serve keys of workloads over ADS as well (SDS): whoever can connect gets any of them.
    #[arg(long, requires = "ca")]
    secrets_over_ads: bool,
    /// Which connections servers take where no PeerAuthentication says it. `strict` runs a CA in ~/.mesh-ca unless --ca says where.
    #[arg(long, value_name = "MODE", default_value = "permissive")]
    mtls: Mtls,
    /// Trust domain of the SPIFFE ids.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: String,
    /// Also issue for this service account; may be repeated. `default/client` is always issued.
    #[arg(long, value_name = "NAMESPACE/ACCOUNT", value_parser = parse_identity)]
    identity: Vec<(String, String)>,
    /// How long certificates last, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(2..))]
    certificate_lifetime: u64,
}

/// Print a gRPC bootstrap (JSON) for a client of the control plane, as gRPC C-core, Go, Java and mesh-client read it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mesh-control bootstrap > bootstrap.json && export GRPC_XDS_BOOTSTRAP=$PWD/bootstrap.json
  export GRPC_XDS_BOOTSTRAP_CONFIG=\"$(mesh-control bootstrap --server 127.0.0.1:15010)\"
  mesh-control bootstrap --identity-dir /tmp/mesh-ca/ns/default/sa/client")]
struct Print {
    /// HOST:PORT of the control plane.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:15010")]
    server: String,
    /// Name of the client, as the control plane sees it.
    #[arg(long, value_name = "ID", default_value = DEFAULT_NODE_ID)]
    node_id: String,
    /// Folder with cert.pem, key.pem and ca.pem (see `serve --ca`): makes mTLS possible.
    #[arg(long, value_name = "DIR")]
    identity_dir: Option<PathBuf>,
    /// Service account that the client says it runs under: tells servers on a shared port apart.
    #[arg(long, value_name = "NAMESPACE/ACCOUNT", value_parser = parse_identity)]
    workload: Option<(String, String)>,
}

/// Check Istio YAML: errors and warnings as file:line:column. All the files are read as one configuration.
///
/// Exits with 1 when there are errors; warnings do not count.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mesh-control lint examples/mesh
  mesh-control lint services.yaml routes.yaml")]
struct Lint {
    /// Files and folders.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// What servers take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mtls {
    /// Mutual TLS only.
    Strict,
    /// Mutual TLS and plaintext.
    Permissive,
    /// Plaintext only.
    Disable,
}

impl From<Mtls> for MtlsMode {
    fn from(mode: Mtls) -> Self {
        match mode {
            Mtls::Strict => Self::Strict,
            Mtls::Permissive => Self::Permissive,
            Mtls::Disable => Self::Disable,
        }
    }
}

/// Where the CA is kept when nobody says where.
fn own_folder() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    Ok(PathBuf::from(home.context("--mtls strict needs --ca DIR: there is no HOME")?).join(".mesh-ca"))
}

/// The identity that every control plane issues, for a client at hand.
const CLIENT: (&str, &str) = ("default", "client");

/// Runs the program: parses the arguments, and tells what goes wrong on standard error.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "error".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match cli.command {
        Command::Serve(args) => args.run(),
        Command::Bootstrap(args) => args.run(),
        Command::Lint(args) => args.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

impl Serve {
    fn run(self) -> anyhow::Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(self.serve())?;
        Ok(ExitCode::SUCCESS)
    }

    async fn serve(self) -> anyhow::Result<()> {
        let stop = stop_signal()?;
        let mut builder = ControlPlane::builder()
            .path(&self.config)
            .listen(self.listen)
            .trust_domain(self.trust_domain)
            .ca_listen(self.ca_listen)
            .secrets_over_ads(self.secrets_over_ads)
            .mtls(self.mtls.into())
            .certificate_lifetime(Duration::from_secs(self.certificate_lifetime));
        let ca = match (self.ca, self.mtls) {
            (None, Mtls::Strict) => Some(own_folder()?),
            (ca, _) => ca,
        };
        if let Some(dir) = ca {
            builder = if self.ca_in_memory { builder.ca_in_memory(dir) } else { builder.ca(dir) };
        }
        builder = builder.identity(CLIENT.0, CLIENT.1);
        for (namespace, account) in self.identity {
            if (namespace.as_str(), account.as_str()) != CLIENT {
                builder = builder.identity(namespace, account);
            }
        }
        let control_plane = builder.start().await?;
        let mut events = control_plane.events();
        println!("listening on {}", control_plane.addr());
        if let Some(ca) = control_plane.ca() {
            for (namespace, account) in ca.identities() {
                println!("identity of {namespace}/{account} in {}", ca.identity_dir(&namespace, &account).display());
            }
        }
        let config = control_plane.config();
        let model = &config.model;
        let counts = (model.services.len(), model.routings.len(), model.policies.len());
        let authority = control_plane.ca_addr().map(|addr| format!("; certificates by request on {addr}"));
        println!(
            "serving {}: {} ServiceEntries, {} VirtualServices, {} DestinationRules{}",
            self.config.display(),
            counts.0,
            counts.1,
            counts.2,
            authority.unwrap_or_default()
        );
        let security = &model.security;
        let counts = (security.peers.len(), security.authorizations.len(), security.requests.len());
        if counts != (0, 0, 0) {
            println!(
                "securing: {} PeerAuthentications, {} AuthorizationPolicies, {} RequestAuthentications",
                counts.0, counts.1, counts.2
            );
        }
        print_problems(&config.warnings);
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                event = events.next() => match event {
                    Some(event) => print_event(event),
                    None => break,
                }
            }
        }
        println!("stopping");
        control_plane.shutdown().await;
        Ok(())
    }
}

impl Print {
    fn run(self) -> anyhow::Result<ExitCode> {
        // Clients read the files from their own working directory.
        let identity_dir = self.identity_dir.map(std::path::absolute).transpose().context("--identity-dir")?;
        println!("{}", Bootstrap { server: self.server, node_id: self.node_id, identity_dir, workload: self.workload });
        Ok(ExitCode::SUCCESS)
    }
}

impl Lint {
    fn run(self) -> anyhow::Result<ExitCode> {
        let sources = input::sources(&self.files).context("cannot read")?;
        let (_, problems) = input::check(&sources);
        print_problems(&problems);
        let errors = problems.iter().filter(|p| p.severity == Severity::Error).count();
        println!("{} files, {errors} errors, {} warnings", sources.len(), problems.len() - errors);
        Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn print_event(event: Event) {
    match event {
        Event::Applied { version, warnings } => {
            println!("applied as version {version}");
            print_problems(&warnings);
        }
        Event::Rejected { reason, .. } => {
            println!("{reason}");
            println!("not applied: the configuration before it stays");
        }
        Event::Nack(nack) => {
            let who = if nack.node_id.is_empty() { "a client" } else { &nack.node_id };
            println!("{who} refused version {} of {}: {}", nack.version, nack.resource_type, nack.detail);
        }
    }
}

fn print_problems(problems: &[Problem]) {
    for problem in problems {
        println!("{problem}");
    }
}

fn parse_identity(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, account)) if !namespace.is_empty() && !account.is_empty() && !account.contains('/') => {
            Ok((namespace.to_owned(), account.to_owned()))
        }
        _ => Err("expected NAMESPACE/ACCOUNT".to_owned()),
    }
}

/// Completes on Ctrl-C or SIGTERM. The handlers are in place when this returns.
#[cfg(unix)]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
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
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn identities_are_namespace_and_account() {
        assert_eq!(parse_identity("a/b"), Ok(("a".into(), "b".into())));
        for bad in ["a", "/b", "a/", "a/b/c"] {
            assert!(parse_identity(bad).is_err(), "{bad}");
        }
    }
}
