//! The transport socket of a cluster.

use super::{Options, Target};
use crate::model::{Subset, Tls, TlsMode};
use envoy_types::{
    pb::envoy::{
        config::core::v3::{DataSource, TransportSocket, data_source::Specifier, transport_socket::ConfigType},
        extensions::transport_sockets::tls::v3::{
            CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext, TlsCertificate,
            UpstreamTlsContext, certificate_validation_context::SystemRootCerts,
            common_tls_context::ValidationContextType,
        },
        r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
    },
    util::pack_any,
};
use std::collections::BTreeSet;

/// Bootstrap instance and names that Istio's agent, and `mesh-control bootstrap`, write.
pub(crate) const PROVIDER: &str = "default";
const IDENTITY: &str = "default";
const ROOTS: &str = "ROOTCA";

/// `None` is plaintext.
pub(super) fn transport_socket(
    tls: &Tls,
    target: &Target<'_>,
    subset: Option<&Subset>,
    http2: bool,
    options: &Options,
) -> Option<TransportSocket> {
    let mut common = CommonTlsContext {
        alpn_protocols: vec![if http2 { "h2" } else { "http/1.1" }.to_owned()],
        ..CommonTlsContext::default()
    };
    let mut validation = CertificateValidationContext::default();
    let mut sni = tls.sni.clone().unwrap_or_default();
    let mut names = tls.subject_alt_names.clone();
    if names.is_empty() {
        names.clone_from(&target.service.subject_alt_names);
    }
    match &tls.mode {
        TlsMode::Disable => return None,
        TlsMode::Mesh => {
            common.tls_certificate_provider_instance = Some(provider(IDENTITY));
            validation.ca_certificate_provider_instance = Some(provider(ROOTS));
            if names.is_empty() {
                names = identities(target, options);
            }
            if sni.is_empty() {
                let subset = subset.map_or("", |s| &s.name.value);
                sni = format!("outbound_.{}_.{subset}_.{}", target.port.number.value, target.host);
            }
        }
        TlsMode::Simple { ca } => roots(&mut validation, ca.as_deref()),
        TlsMode::Mutual { certificate, key, ca } => {
            roots(&mut validation, ca.as_deref());
            common.tls_certificates = vec![TlsCertificate {
                certificate_chain: Some(file(certificate)),
                private_key: Some(file(key)),
                ..TlsCertificate::default()
            }];
        }
    }
    // gRPC clients read this list and not its typed successor.
    #[allow(deprecated, reason = "gRFC A29 names this field")]
    {
        validation.match_subject_alt_names = names.into_iter().map(exact).collect();
    }
    if !tls.insecure_skip_verify || tls.mode == TlsMode::Mesh {
        common.validation_context_type = Some(ValidationContextType::ValidationContext(validation));
    }
    let context = UpstreamTlsContext { common_tls_context: Some(common), sni, ..UpstreamTlsContext::default() };
    Some(TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(ConfigType::TypedConfig(pack_any(context))),
    })
}

/// The SPIFFE ids of the service accounts that the endpoints run under.
fn identities(target: &Target<'_>, options: &Options) -> Vec<String> {
    let namespace = &target.service.object.namespace;
    let accounts: BTreeSet<_> = target.service.endpoints.iter().filter_map(|w| w.service_account.as_deref()).collect();
    accounts.into_iter().map(|sa| crate::ca::spiffe_id(&options.trust_domain, namespace, sa)).collect()
}

fn roots(validation: &mut CertificateValidationContext, ca: Option<&str>) {
    match ca {
        Some(path) => validation.trusted_ca = Some(file(path)),
        None => validation.system_root_certs = Some(SystemRootCerts {}),
    }
}

fn provider(certificate_name: &str) -> CertificateProviderPluginInstance {
    CertificateProviderPluginInstance {
        instance_name: PROVIDER.to_owned(),
        certificate_name: certificate_name.to_owned(),
    }
}

fn file(path: &str) -> DataSource {
    DataSource { specifier: Some(Specifier::Filename(path.to_owned())), ..DataSource::default() }
}

fn exact(name: String) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(name)), ignore_case: false }
}
