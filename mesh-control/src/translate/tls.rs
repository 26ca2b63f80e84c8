//! The transport sockets of clusters and of servers.

use super::{Options, Target, cluster, inbound};
use crate::model::{Subset, Tls, TlsMode, Workload};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::cluster::TransportSocketMatch,
                core::v3::{
                    DataSource, Metadata, TransportSocket, data_source::Specifier, transport_socket::ConfigType,
                },
            },
            extensions::transport_sockets::{
                raw_buffer::v3::RawBuffer,
                tls::v3::{
                    CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext,
                    DownstreamTlsContext, SubjectAltNameMatcher, TlsCertificate, UpstreamTlsContext,
                    certificate_validation_context::SystemRootCerts, common_tls_context::ValidationContextType,
                    subject_alt_name_matcher::SanType,
                },
            },
            r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
        },
        google::protobuf::{Any, BoolValue, Struct, Value, value::Kind},
    },
    util::pack_any,
};
use std::collections::BTreeSet;

/// Bootstrap instance and names that Istio's agent, and `mesh-control bootstrap`, write.
pub(crate) const PROVIDER: &str = "default";
const IDENTITY: &str = "default";
const ROOTS: &str = "ROOTCA";

/// Where endpoints say what `transport_socket_matches` asks.
const MATCHED: &str = "envoy.transport_socket_match";

/// Which endpoints of a cluster are spoken to with mutual TLS although no DestinationRule says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Auto {
    /// None: or a DestinationRule says what is spoken.
    None,
    /// Those whose metadata say so.
    Some,
    /// All.
    All,
}

impl Target<'_> {
    pub(super) fn speaks_mtls(&self, workload: &Workload, options: &Options) -> bool {
        inbound::speaks_mtls(self, workload, options)
    }
}

/// Istio's automatic mutual TLS.
pub(super) fn auto(target: &Target<'_>, subset: Option<&Subset>, options: &Options) -> Auto {
    if cluster::effective(target.policy, target.port.number.value, subset).tls.is_some() {
        return Auto::None;
    }
    let workloads: Vec<_> = target.by_locality(subset).into_values().flatten().collect();
    match workloads.iter().filter(|w| target.speaks_mtls(w, options)).count() {
        0 => Auto::None,
        all if all == workloads.len() => Auto::All,
        _ => Auto::Some,
    }
}

/// The transport sockets of a cluster of which no DestinationRule says what is spoken.
pub(super) fn by_endpoints(
    target: &Target<'_>,
    subset: Option<&Subset>,
    http2: bool,
    options: &Options,
) -> (Option<TransportSocket>, Vec<TransportSocketMatch>) {
    let mutual = || {
        let mesh = Tls { mode: TlsMode::Mesh, sni: None, subject_alt_names: Vec::new(), insecure_skip_verify: false };
        transport_socket(&mesh, target, subset, http2, options)
    };
    match auto(target, subset, options) {
        Auto::None => (None, Vec::new()),
        // gRPC's clients know no matches.
        Auto::All => (mutual(), Vec::new()),
        Auto::Some => {
            let one = |name: &str, matches, socket| TransportSocketMatch {
                name: name.to_owned(),
                r#match: Some(matches),
                transport_socket: socket,
            };
            let plain = socket("envoy.transport_sockets.raw_buffer", pack_any(RawBuffer {}));
            let matches = vec![
                one("tlsMode-istio", tls_mode(), mutual()),
                one("tlsMode-disabled", Struct::default(), Some(plain)),
            ];
            (None, matches)
        }
    }
}

/// Of an endpoint that is spoken to with mutual TLS.
pub(super) fn endpoint_metadata() -> Metadata {
    Metadata { filter_metadata: [(MATCHED.to_owned(), tls_mode())].into(), ..Metadata::default() }
}

fn tls_mode() -> Struct {
    let istio = Value { kind: Some(Kind::StringValue("istio".to_owned())) };
    Struct { fields: [("tlsMode".to_owned(), istio)].into() }
}

/// The transport socket of a server that takes mutual TLS: any caller of the trusted domains that has a SPIFFE id, of whom authorization decides.
/// gRPC's servers do not know the typed list, and take any caller of the roots.
pub(super) fn downstream() -> TransportSocket {
    let spiffe =
        StringMatcher { match_pattern: Some(MatchPattern::Prefix("spiffe://".to_owned())), ignore_case: false };
    let validation = CertificateValidationContext {
        ca_certificate_provider_instance: Some(provider(ROOTS)),
        match_typed_subject_alt_names: vec![SubjectAltNameMatcher {
            san_type: SanType::Uri.into(),
            matcher: Some(spiffe),
            ..SubjectAltNameMatcher::default()
        }],
        ..CertificateValidationContext::default()
    };
    let common = CommonTlsContext {
        alpn_protocols: vec!["h2".to_owned(), "http/1.1".to_owned()],
        tls_certificate_provider_instance: Some(provider(IDENTITY)),
        validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
        ..CommonTlsContext::default()
    };
    let context = DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(BoolValue { value: true }),
        ..DownstreamTlsContext::default()
    };
    socket("envoy.transport_sockets.tls", pack_any(context))
}

fn socket(name: &str, config: Any) -> TransportSocket {
    TransportSocket { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)) }
}

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
    let mut names: Vec<_> = names.into_iter().map(exact).collect();
    let mut by_sni = false;
    if tls.mode != TlsMode::Mesh && !tls.insecure_skip_verify && names.is_empty() {
        // Of all whom the authority knows it is to be this one, as Istio verifies it. The list is for clients that do not know of the flag.
        if sni.is_empty() && is_name(target.host) {
            target.host.clone_into(&mut sni);
        }
        by_sni = !sni.is_empty();
        names = vec![if by_sni { exact(sni.clone()) } else { any_of(target.host) }];
    }
    // gRPC clients read this list and not its typed successor.
    #[allow(deprecated, reason = "gRFC A29 names this field")]
    {
        validation.match_subject_alt_names = names;
    }
    if !tls.insecure_skip_verify || tls.mode == TlsMode::Mesh {
        common.validation_context_type = Some(ValidationContextType::ValidationContext(validation));
    }
    let context = UpstreamTlsContext {
        common_tls_context: Some(common),
        sni,
        auto_sni_san_validation: by_sni,
        ..UpstreamTlsContext::default()
    };
    Some(socket("envoy.transport_sockets.tls", pack_any(context)))
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

/// Whether it can be sent as SNI.
fn is_name(host: &str) -> bool {
    !host.contains('*') && host.parse::<std::net::IpAddr>().is_err()
}

/// What certificates for these hosts show: an address, or any name below that of a wildcard.
fn any_of(host: &str) -> StringMatcher {
    match host.strip_prefix('*') {
        Some(end) if !end.is_empty() => {
            StringMatcher { match_pattern: Some(MatchPattern::Suffix(end.to_owned())), ignore_case: true }
        }
        _ => exact(host.to_owned()),
    }
}
