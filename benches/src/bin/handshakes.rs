//! Measures full mutual TLS handshakes per second: ours beside bare tokio-rustls, in one run.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use benches::report::median;
use clap::Parser;
use mesh_tls::{Acceptor, ClientSettings, ClientTls, FileSource, FileSourceConfig, ServerSettings, default_provider};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Measure handshakes of both sides in one thread, over a pipe in memory: TLS 1.3, ECDSA P-256, both certificates verified,
/// nothing resumed. Ours checks SPIFFE ids too. Its certificates come from files, which are removed before it begins: a handshake
/// reads none.
#[derive(Debug, Parser)]
#[command(name = "handshakes", version)]
struct Options {
    /// Rounds; in each, both have their turn.
    #[arg(long, value_name = "N", default_value_t = 21)]
    rounds: usize,
    /// Time of a turn, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.25)]
    seconds: f64,
    /// Exit with status 1 when ours makes less than 0.97 of the handshakes of the other. Without it the status is 0.
    #[arg(long)]
    check: bool,
}

/// Share of bare tokio-rustls' handshakes that ours must make.
const LEAST: f64 = 0.97;
/// Bytes that fit into the pipe.
const PIPE: usize = 64 * 1024;

struct Pair {
    chain: String,
    key: String,
}

fn issue(ca: &CertifiedIssuer<'_, KeyPair>, id: &str) -> Result<Pair> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
    params.subject_alt_names.push(SanType::URI(id.try_into()?));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(Pair { chain: params.signed_by(&key, ca)?.pem(), key: key.serialize_pem() })
}

fn ours(ca: &str, near: &Pair, far: &Pair) -> Result<(ClientTls, Acceptor)> {
    let dir = tempfile::tempdir()?;
    let source = |name: &str, pair: &Pair| -> Result<_> {
        let path = |kind: &str| dir.path().join(format!("{name}.{kind}"));
        std::fs::write(path("cert"), &pair.chain)?;
        std::fs::write(path("key"), &pair.key)?;
        std::fs::write(path("ca"), ca)?;
        let config = FileSourceConfig {
            certificate_file: Some(path("cert")),
            private_key_file: Some(path("key")),
            ca_certificate_file: Some(path("ca")),
            ..FileSourceConfig::new(name, default_provider())
        };
        Ok(Arc::new(FileSource::new(config, &tokio::runtime::Handle::current())?))
    };
    let client = ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(source("near", near)?) };
    let client = ClientTls::new(client, default_provider())?;
    let server = Acceptor::new(ServerSettings::mtls(source("far", far)?), default_provider())?;
    dir.close()?;
    Ok((client, server))
}

fn bare(ca: &str, near: &Pair, far: &Pair) -> Result<(TlsConnector, TlsAcceptor)> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes())?)?;
    let roots = Arc::new(roots);
    let parts = |pair: &Pair| -> Result<_> {
        let chain = CertificateDer::pem_slice_iter(pair.chain.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        Ok((chain, PrivateKeyDer::from_pem_slice(pair.key.as_bytes())?))
    };
    let (chain, key) = parts(near)?;
    let mut client = ClientConfig::builder_with_provider(default_provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain, key)?;
    client.resumption = Resumption::disabled();
    client.alpn_protocols = vec![b"h2".to_vec()];
    let (chain, key) = parts(far)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots, default_provider()).build()?;
    let mut server = ServerConfig::builder_with_provider(default_provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)?;
    server.send_tls13_tickets = 0;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((TlsConnector::from(Arc::new(client)), TlsAcceptor::from(Arc::new(server))))
}

/// One byte from the server to the client: by then each has verified the other.
async fn confirm(
    mut near: impl tokio::io::AsyncRead + Unpin,
    mut far: impl tokio::io::AsyncWrite + Unpin,
) -> Result<()> {
    far.write_all(b"!").await?;
    far.flush().await?;
    near.read_u8().await?;
    Ok(())
}

/// Handshakes per second within `turn`.
async fn rate(turn: Duration, mut handshake: impl AsyncFnMut() -> Result<()>) -> Result<f64> {
    let (begun, mut count) = (Instant::now(), 0_u32);
    while begun.elapsed() < turn {
        handshake().await?;
        count += 1;
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if options.rounds == 0 || !(0.01..=60.0).contains(&options.seconds) {
        bail!("--rounds is at least 1, and --seconds between 0.01 and 60");
    }
    let turn = Duration::from_secs_f64(options.seconds);
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let (near, far) = (issue(&ca, "spiffe://td/near")?, issue(&ca, "spiffe://td/far")?);
    let (client, server) = ours(&ca.pem(), &near, &far)?;
    let (connector, acceptor) = bare(&ca.pem(), &near, &far)?;
    let mut by_ours = async || {
        let (near, far) = tokio::io::duplex(PIPE);
        let (near, far) = tokio::try_join!(client.connect(near, Some("localhost")), server.accept(far))?;
        confirm(near.0, far).await
    };
    let mut by_bare = async || {
        let (near, far) = tokio::io::duplex(PIPE);
        let name = ServerName::try_from("localhost")?;
        let (near, far) = tokio::try_join!(connector.connect(name, near), acceptor.accept(far))?;
        confirm(near, far).await
    };
    let (mut rates, mut ratios) = ((Vec::new(), Vec::new()), Vec::new());
    for round in 0..=options.rounds {
        // each goes first every other time; the first round warms up
        let (a, b) = if round % 2 == 0 {
            let a = rate(turn, &mut by_ours).await?;
            (a, rate(turn, &mut by_bare).await?)
        } else {
            let b = rate(turn, &mut by_bare).await?;
            (rate(turn, &mut by_ours).await?, b)
        };
        if round > 0 {
            rates.0.push(a);
            rates.1.push(b);
            ratios.push(a / b);
        }
    }
    let ratio = median(ratios);
    let mut out = std::io::stdout().lock();
    writeln!(out, "handshakes/s   mesh-tls {:.0}   bare tokio-rustls {:.0}", median(rates.0), median(rates.1))?;
    writeln!(out, "median of the ratios of {} rounds: {ratio:.3} (target {LEAST})", options.rounds)?;
    Ok(if options.check && ratio < LEAST { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
