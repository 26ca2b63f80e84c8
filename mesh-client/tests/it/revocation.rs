//! Revoked certificates are refused, on either side, whichever way the revocation list comes.

use crate::{
    inbound_xds::{Pair, chain, mutual},
    mtls::{config, control_plane, mutual_greeter},
    sds::{by_name, client_files, data, over_ads, serve_secret, socket},
    support::{CLUSTER, TARGET, assert_says, edit_cluster, hello, mesh_on, prompt_hello, until},
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, TlsCertificate,
    common_tls_context::ValidationContextType, secret::Type,
};
use mesh_tls::Mode;
use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::path::Path;

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/greeter";

/// The serial number of a certificate: the first integer after its version (RFC 5280 section 4.1).
fn serial(file: &Path) -> SerialNumber {
    let der = CertificateDer::from_pem_file(file).unwrap();
    let version = [0xa0, 3, 2, 1, 2, 2];
    let at = der.windows(version.len()).position(|bytes| bytes == version).expect("a certificate of version 3");
    let (length, rest) = der[at + version.len()..].split_first().unwrap();
    SerialNumber::from_slice(&rest[..usize::from(*length)])
}

/// A revocation list of the authority in this folder, PEM.
fn list(ca: &Path, revoked: &[&Path]) -> String {
    let key = KeyPair::from_pem(&std::fs::read_to_string(ca.join("ca-key.pem")).unwrap()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&std::fs::read_to_string(ca.join("ca.pem")).unwrap(), key).unwrap();
    let revoked_certs = revoked.iter().map(|certificate| RevokedCertParams {
        serial_number: serial(certificate),
        revocation_time: date_time_ymd(2020, 1, 1),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2020, 1, 1),
        next_update: date_time_ymd(2090, 1, 1),
        crl_number: 1.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer).unwrap().pem().unwrap()
}

/// Whom to trust: the authority in this folder, less what this list says; as text, or by the names of files.
fn trust(ca: &Path, list: &str, by_file: bool) -> CertificateValidationContext {
    let file = ca.join("list.pem");
    std::fs::write(&file, list).unwrap();
    CertificateValidationContext {
        trusted_ca: data(&ca.join("ca.pem"), by_file),
        crl: data(&file, by_file),
        ..CertificateValidationContext::default()
    }
}

#[tokio::test]
async fn clients_refuse_revoked_servers_by_secret_and_by_file() {
    let (cp, dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket = Some(socket(by_name("own", "roots", over_ads))));
    let (ca, own) = (dir.path().join("ca"), client_files(&dir));
    let certificate = TlsCertificate {
        certificate_chain: data(&own.join("cert.pem"), false),
        private_key: data(&own.join("key.pem"), false),
        ..TlsCertificate::default()
    };
    serve_secret(&cp, "own", Type::TlsCertificate(certificate));
    let server = ca.join("ns/default/sa/greeter/cert.pem");
    for by_file in [false, true] {
        let harmless = list(&ca, &[&own.join("cert.pem")]);
        serve_secret(&cp, "roots", Type::ValidationContext(trust(&ca, &harmless, by_file)));
        let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
        assert_eq!(hello(&channel).await.unwrap().peer, CLIENT, "by file: {by_file}; somebody else is revoked");
        let revoked = list(&ca, &[&server]);
        serve_secret(&cp, "roots", Type::ValidationContext(trust(&ca, &revoked, by_file)));
        let (calls, channel) = (backend.state().calls(), mesh_on(&cp).await.channel(TARGET).unwrap());
        let status = prompt_hello(&channel).await.unwrap_err();
        assert_says(status.message(), &[CLUSTER, "the server's certificate", SERVER, "was revoked by its authority"]);
        assert_eq!(backend.state().calls(), calls);
    }
}

#[tokio::test]
async fn servers_refuse_revoked_clients_by_secret_and_by_file() {
    let pair = Pair::new().await;
    let ca = pair.cp.ca().unwrap().dir().to_owned();
    let client = ca.join("ns/default/sa/client/cert.pem");
    let channel = pair.channel("{tls: {mode: ISTIO_MUTUAL}}").await;
    drop(channel);
    for (secret, by_file) in [(true, false), (false, false), (false, true)] {
        // As a secret of the control plane, or in the listener itself.
        let serve = |revoked: &[&Path]| {
            let context = trust(&ca, &list(&ca, revoked), by_file);
            let validation = if secret {
                serve_secret(&pair.cp, "clients", Type::ValidationContext(context));
                let named = SdsSecretConfig { name: "clients".to_owned(), sds_config: over_ads() };
                ValidationContextType::ValidationContextSdsSecretConfig(named)
            } else {
                ValidationContextType::ValidationContext(context)
            };
            let whole = mutual("default");
            let common =
                CommonTlsContext { validation_context_type: Some(validation), ..whole.common_tls_context.unwrap() };
            let tls = DownstreamTlsContext { common_tls_context: Some(common), ..mutual("default") };
            pair.serve(pair.listener(vec![chain("mutual", "", Some(tls))]));
        };
        serve(&[]);
        until("nobody is revoked", async || {
            let channel = mesh_on(&pair.cp).await.channel(TARGET).unwrap();
            prompt_hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)
        })
        .await;
        serve(&[&client]);
        let mut said = String::new();
        until("the client is refused", async || {
            let channel = mesh_on(&pair.cp).await.channel(TARGET).unwrap();
            match prompt_hello(&channel).await {
                Ok(_) => false,
                Err(status) => {
                    said = status.message().to_owned();
                    true
                }
            }
        })
        .await;
        assert_says(&said, &[CLUSTER, "the server refused our certificate", CLIENT, "revoked"]);
    }
}
