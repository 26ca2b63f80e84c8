//! `UpstreamTlsContext` and `DownstreamTlsContext` (gRFC A29, A82, A101), and beyond gRPC the certificates of SDS and of the
//! resource itself.

use super::{Decoder, Valid, endpoint::metadata_values, secret::is_spiffe_validator, type_name};
use crate::{
    bootstrap::CertificateProvider,
    resource::{
        CertificateProviderRef, Credential, DownstreamTls, SanKind, SanMatch, TlsCertificate, TransportSocket,
        TransportSocketMatch, TrustedCa, UpstreamTls,
    },
};
use envoy_types::pb::envoy::{
    config::{
        cluster::v3::cluster::TransportSocketMatch as ProtoMatch,
        core::v3::{TransportSocket as Proto, transport_socket::ConfigType},
    },
    extensions::transport_sockets::tls::v3::{
        CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext, DownstreamTlsContext,
        SubjectAltNameMatcher, UpstreamTlsContext,
        common_tls_context::{CertificateProviderInstance, ValidationContextType},
        downstream_tls_context::OcspStaplePolicy,
        subject_alt_name_matcher::SanType,
    },
};
use std::sync::Arc;

const RAW_BUFFER: &str = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";
const UPSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const DOWNSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
/// gRFC A101.
const MAX_SNI: usize = 255;

/// Whose context it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// Whom to trust; `None`: the roots of the system.
type Trusted = Option<Credential<TrustedCa>>;

/// What a cluster's HTTP options say of the name of its servers: Envoy takes the host of each request for it (`auto_sni`,
/// `auto_san_validation`). Here, where connections are the cluster's, it is the host of the service that the cluster's name has (Istio), else
/// the endpoint's hostname, else `sni`; without any of them nobody is believed.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ServerName {
    pub(super) sent: bool,
    pub(super) verified: bool,
}

/// What `CommonTlsContext` comes to.
struct CommonTls {
    identity: Option<Credential<TlsCertificate>>,
    /// `None`: nothing says whom to trust.
    ca: Option<Trusted>,
    san_matchers: Vec<SanMatch>,
    alpn: Vec<String>,
}

/// The parts of a validation context, whichever way it is given.
#[derive(Default)]
struct Context {
    /// Where it stands; empty: nowhere.
    field: &'static str,
    given: Option<CertificateValidationContext>,
    instance: Option<CertificateProviderPluginInstance>,
    secret: Option<Credential<TrustedCa>>,
}

impl ServerName {
    /// The socket of the cluster of this name.
    pub(super) fn of(self, socket: TransportSocket, cluster: &str) -> TransportSocket {
        let TransportSocket::Tls(tls) = &socket else { return socket };
        if self == Self::default() {
            return socket;
        }
        let mut tls = UpstreamTls::clone(tls);
        // Whose name is looked for is told as well.
        match service_host(cluster) {
            Some(host) => (tls.sni, tls.auto_host_sni) = (Some(host.to_owned()), false),
            None => tls.auto_host_sni = true,
        }
        tls.verify_server_name |= self.verified;
        TransportSocket::Tls(Arc::new(tls))
    }
}

/// The host in a name of Istio's: `outbound|PORT|SUBSET|HOST`.
fn service_host(cluster: &str) -> Option<&str> {
    let host = cluster.strip_prefix("outbound|")?.split('|').nth(2)?;
    (!host.is_empty() && !host.contains('*') && host.len() <= MAX_SNI).then_some(host)
}

impl Decoder<'_> {
    pub(super) fn transport_socket(&mut self, proto: Proto) -> Valid<TransportSocket> {
        let Some(ConfigType::TypedConfig(any)) = proto.config_type else {
            return Err(self.invalid_at("typed_config", "is missing"));
        };
        self.at("typed_config", |cx| match type_name(&any.type_url) {
            RAW_BUFFER => Ok(TransportSocket::Plaintext),
            UPSTREAM_TLS => {
                let context: UpstreamTlsContext = cx.message(&any.value)?;
                cx.upstream_tls(context).map(|tls| TransportSocket::Tls(Arc::new(tls)))
            }
            other => Err(cx.invalid(format!("unknown transport socket \"{other}\""))),
        })
    }

    pub(super) fn socket_match(&mut self, proto: ProtoMatch) -> Valid<TransportSocketMatch> {
        let labels = proto.r#match.unwrap_or_default().fields;
        let count = labels.len();
        let wanted = metadata_values(labels);
        if wanted.len() != count {
            return Err(self.invalid_at("match", "only strings, numbers and booleans can be compared"));
        }
        let Some(socket) = proto.transport_socket else {
            return Err(self.invalid_at("transport_socket", "is missing"));
        };
        let socket = self.at("transport_socket", |cx| cx.transport_socket(socket))?;
        Ok(TransportSocketMatch { name: proto.name, wanted, socket })
    }

    /// Of a filter chain. `None`: plaintext.
    pub(super) fn server_socket(&mut self, proto: Proto) -> Valid<Option<Arc<DownstreamTls>>> {
        let Some(ConfigType::TypedConfig(any)) = proto.config_type else {
            return Err(self.invalid_at("typed_config", "is missing"));
        };
        self.at("typed_config", |cx| match type_name(&any.type_url) {
            RAW_BUFFER => Ok(None),
            DOWNSTREAM_TLS => {
                let context: DownstreamTlsContext = cx.message(&any.value)?;
                cx.downstream_tls(context).map(|tls| Some(Arc::new(tls)))
            }
            other => Err(cx.invalid(format!("unknown transport socket \"{other}\""))),
        })
    }

    fn upstream_tls(&mut self, proto: UpstreamTlsContext) -> Valid<UpstreamTls> {
        if proto.sni.len() > MAX_SNI {
            return Err(self.invalid_at("sni", format!("is longer than {MAX_SNI} bytes")));
        }
        self.ignored(&[("allow_renegotiation", proto.allow_renegotiation)]);
        let Some(common) = proto.common_tls_context else {
            return Err(self.invalid_at("common_tls_context", "is missing"));
        };
        let common = self.at("common_tls_context", |cx| cx.common_tls(common, Side::Client))?;
        Ok(UpstreamTls {
            ca: common.ca.unwrap_or_default(),
            identity: common.identity,
            san_matchers: common.san_matchers,
            sni: Some(proto.sni).filter(|sni| !sni.is_empty()),
            auto_host_sni: proto.auto_host_sni,
            auto_sni_san_validation: proto.auto_sni_san_validation,
            verify_server_name: false,
            alpn: common.alpn,
        })
    }

    /// gRFC A29: a server needs a certificate, and roots where clients need one.
    fn downstream_tls(&mut self, proto: DownstreamTlsContext) -> Valid<DownstreamTls> {
        if proto.require_sni.is_some_and(|value| value.value) {
            return Err(self.invalid_at("require_sni", "not supported (gRFC A29)"));
        }
        if proto.ocsp_staple_policy != OcspStaplePolicy::LenientStapling as i32 {
            return Err(self.invalid_at("ocsp_staple_policy", "only LENIENT_STAPLING is supported (gRFC A29)"));
        }
        self.ignored(&[
            ("prefer_client_ciphers", proto.prefer_client_ciphers),
            ("full_scan_certs_on_sni_mismatch", proto.full_scan_certs_on_sni_mismatch.is_some_and(|full| full.value)),
        ]);
        let Some(common) = proto.common_tls_context else {
            return Err(self.invalid_at("common_tls_context", "is missing"));
        };
        let require_client_certificate = proto.require_client_certificate.is_some_and(|value| value.value);
        self.at("common_tls_context", |cx| {
            let CommonTls { identity, ca, san_matchers, alpn } = cx.common_tls(common, Side::Server)?;
            let Some(identity) = identity else {
                return Err(cx.invalid_at(
                    "tls_certificate_provider_instance",
                    "is missing, and so is every other certificate: a server needs one",
                ));
            };
            let ca = match ca {
                None => None,
                Some(Some(ca)) => Some(ca),
                // gRFC A82: not for servers.
                Some(None) => {
                    return Err(cx.invalid_at("validation_context.system_root_certs", "is not for servers (gRFC A82)"));
                }
            };
            if ca.is_none() && require_client_certificate {
                return Err(cx.invalid_at(
                    "validation_context",
                    "is missing, but require_client_certificate is set: nothing says whom to trust",
                ));
            }
            Ok(DownstreamTls { identity, ca, san_matchers, require_client_certificate, alpn })
        })
    }

    fn common_tls(&mut self, mut proto: CommonTlsContext, side: Side) -> Valid<CommonTls> {
        self.refused(&[
            ("tls_params", proto.tls_params.is_some()),
            ("custom_handshaker", proto.custom_handshaker.is_some()),
            ("custom_tls_certificate_selector", proto.custom_tls_certificate_selector.is_some()),
            ("tls_certificate_certificate_provider", proto.tls_certificate_certificate_provider.is_some()),
        ])?;
        self.ignored(&[("key_log", proto.key_log.is_some())]);
        let identity = self.own_certificate(&mut proto)?;
        let Context { field, given, instance, secret } = self.validation_context(proto.validation_context_type)?;
        // A server that names no validation context at all asks for no certificate.
        if field.is_empty() && side == Side::Server {
            return Ok(CommonTls { identity, ca: None, san_matchers: Vec::new(), alpn: proto.alpn_protocols });
        }
        if field.is_empty() {
            return Err(self.invalid_at("validation_context", "is missing: a client must verify the server"));
        }
        let (ca, san_matchers) = self.at(field, |cx| cx.validation(given.unwrap_or_default(), instance, secret))?;
        match (ca, side) {
            (None, Side::Client) => self.at(field, |cx| {
                let reason = "is missing, and so is system_root_certs: a client must verify the server";
                Err(cx.invalid_at("ca_certificate_provider_instance", reason))
            }),
            (None, Side::Server) if !san_matchers.is_empty() => self.at(field, |cx| {
                let reason = "is missing, but there are names to match: nothing says whom to trust";
                Err(cx.invalid_at("ca_certificate_provider_instance", reason))
            }),
            (ca, _) => Ok(CommonTls { identity, ca, san_matchers, alpn: proto.alpn_protocols }),
        }
    }

    /// Provider instances win (as in gRPC), then secrets, then certificates in the resource itself.
    fn own_certificate(&mut self, proto: &mut CommonTlsContext) -> Valid<Option<Credential<TlsCertificate>>> {
        let instance = proto.tls_certificate_provider_instance.take();
        // What istiod still sends to gRPC clients.
        let old = proto.tls_certificate_certificate_provider_instance.take();
        if let Some(instance) = instance {
            return self.instance("tls_certificate_provider_instance", instance).map(Credential::Provider).map(Some);
        }
        if let Some(old) = old {
            let field = "tls_certificate_certificate_provider_instance";
            return self.instance(field, current(old)).map(Credential::Provider).map(Some);
        }
        let secrets = std::mem::take(&mut proto.tls_certificate_sds_secret_configs);
        let certificates = std::mem::take(&mut proto.tls_certificates);
        for (field, count) in
            [("tls_certificate_sds_secret_configs", secrets.len()), ("tls_certificates", certificates.len())]
        {
            if count > 1 {
                return Err(self.invalid_at(field, "more than one certificate is not supported"));
            }
        }
        if let Some(secret) = secrets.into_iter().next() {
            let field = "tls_certificate_sds_secret_configs";
            return self.at_index(field, 0, |cx| cx.own_secret(secret)).map(Some);
        }
        let Some(certificate) = certificates.into_iter().next() else { return Ok(None) };
        let certificate = self.at_index("tls_certificates", 0, |cx| cx.tls_certificate(certificate))?;
        Ok(Some(Credential::Inline(Arc::new(certificate))))
    }

    /// Takes apart the forms in which a validation context is given.
    fn validation_context(&mut self, proto: Option<ValidationContextType>) -> Valid<Context> {
        Ok(match proto {
            None => Context::default(),
            Some(ValidationContextType::ValidationContext(context)) => {
                Context { field: "validation_context", given: Some(context), ..Context::default() }
            }
            Some(ValidationContextType::CombinedValidationContext(combined)) => {
                if combined.validation_context_certificate_provider.is_some() {
                    return Err(self.invalid_at(
                        "combined_validation_context.validation_context_certificate_provider",
                        "not supported",
                    ));
                }
                let secret = combined.validation_context_sds_secret_config;
                Context {
                    field: "combined_validation_context.default_validation_context",
                    given: combined.default_validation_context,
                    instance: combined.validation_context_certificate_provider_instance.map(current),
                    secret: match secret {
                        Some(secret) => {
                            let field = "combined_validation_context.validation_context_sds_secret_config";
                            Some(self.at(field, |cx| cx.trust_secret(secret))?)
                        }
                        None => None,
                    },
                }
            }
            Some(ValidationContextType::ValidationContextSdsSecretConfig(secret)) => {
                let field = "validation_context_sds_secret_config";
                let secret = Some(self.at(field, |cx| cx.trust_secret(secret))?);
                Context { field, secret, ..Context::default() }
            }
            Some(ValidationContextType::ValidationContextCertificateProviderInstance(instance)) => Context {
                field: "validation_context_certificate_provider_instance",
                instance: Some(current(instance)),
                ..Context::default()
            },
            Some(ValidationContextType::ValidationContextCertificateProvider(_)) => {
                return Err(self.invalid_at("validation_context_certificate_provider", "not supported"));
            }
        })
    }

    fn validation(
        &mut self,
        mut proto: CertificateValidationContext,
        fallback: Option<CertificateProviderPluginInstance>,
        secret: Option<Credential<TrustedCa>>,
    ) -> Valid<(Option<Trusted>, Vec<SanMatch>)> {
        self.unverifiable(&proto)?;
        let mut matchers = Vec::new();
        for (index, matcher) in std::mem::take(&mut proto.match_subject_alt_names).into_iter().enumerate() {
            let matcher = self.at_index("match_subject_alt_names", index, |cx| cx.string_matcher(matcher))?;
            matchers.push(SanMatch { kind: None, matcher });
        }
        for (index, typed) in std::mem::take(&mut proto.match_typed_subject_alt_names).into_iter().enumerate() {
            matchers.push(self.at_index("match_typed_subject_alt_names", index, |cx| cx.typed_san(typed))?);
        }
        let field = "ca_certificate_provider_instance";
        let instance = proto.ca_certificate_provider_instance.take().or(fallback);
        let held = proto.trusted_ca.is_some() || proto.custom_validator_config.is_some();
        let ca = match (instance, secret, held, proto.system_root_certs) {
            (Some(instance), _, _, _) => Some(Some(Credential::Provider(self.instance(field, instance)?))),
            (None, Some(secret), _, _) => Some(Some(secret)),
            (None, None, true, _) => {
                let ca = self.trusted_ca(proto)?;
                return Ok((Some(Some(Credential::Inline(Arc::new(ca)))), matchers));
            }
            (None, None, false, Some(_)) => Some(None),
            (None, None, false, None) => None,
        };
        // A list belongs to the roots it stands beside, and there is one place for roots.
        self.refused(&[
            ("crl", proto.crl.is_some()),
            ("custom_validator_config", proto.custom_validator_config.is_some()),
        ])?;
        Ok((ca, matchers))
    }

    /// What we cannot check is refused.
    pub(super) fn unverifiable(&mut self, proto: &CertificateValidationContext) -> Valid<()> {
        self.refused(&[
            ("verify_certificate_spki", !proto.verify_certificate_spki.is_empty()),
            ("verify_certificate_hash", !proto.verify_certificate_hash.is_empty()),
            (
                "require_signed_certificate_timestamp",
                proto.require_signed_certificate_timestamp.is_some_and(|value| value.value),
            ),
            (
                "custom_validator_config",
                proto.custom_validator_config.as_ref().is_some_and(|custom| !is_spiffe_validator(custom)),
            ),
            ("max_verify_depth", proto.max_verify_depth.is_some()),
        ])?;
        self.ignored(&[
            ("allow_expired_certificate", proto.allow_expired_certificate),
            ("trust_chain_verification", proto.trust_chain_verification != 0),
            // All of the chain is looked up: that is stricter.
            ("only_verify_leaf_cert_crl", proto.only_verify_leaf_cert_crl),
        ]);
        Ok(())
    }

    fn typed_san(&mut self, typed: SubjectAltNameMatcher) -> Valid<SanMatch> {
        let kind = match SanType::try_from(typed.san_type) {
            Ok(SanType::Email) => SanKind::Email,
            Ok(SanType::Dns) => SanKind::Dns,
            Ok(SanType::Uri) => SanKind::Uri,
            Ok(SanType::IpAddress) => SanKind::Ip,
            Ok(SanType::OtherName) => return Err(self.invalid_at("san_type", "OTHER_NAME is not supported")),
            Ok(SanType::Unspecified) | Err(_) => return Err(self.invalid_at("san_type", "is missing or unknown")),
        };
        match typed.matcher {
            Some(matcher) => Ok(SanMatch { kind: Some(kind), matcher: self.string_matcher(matcher)? }),
            None => Err(self.invalid_at("matcher", "is missing")),
        }
    }

    /// The instance must be in the bootstrap, with a plugin we have.
    fn instance(
        &mut self,
        field: &'static str,
        proto: CertificateProviderPluginInstance,
    ) -> Valid<CertificateProviderRef> {
        match self.providers.get(&proto.instance_name) {
            Some(
                CertificateProvider::FileWatcher(_) | CertificateProvider::Sds(_) | CertificateProvider::Application,
            ) => Ok(CertificateProviderRef { instance: proto.instance_name, certificate: proto.certificate_name }),
            Some(CertificateProvider::Unknown { plugin }) => Err(self.invalid_at(
                field,
                format!("instance \"{}\" of the bootstrap has the unknown plugin \"{plugin}\"", proto.instance_name),
            )),
            None => {
                let known = self.providers.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                Err(self.invalid_at(
                    field,
                    format!(
                        "instance \"{}\" is not in the bootstrap's certificate_providers [{known}]",
                        proto.instance_name
                    ),
                ))
            }
        }
    }

    pub(super) fn refused(&mut self, fields: &[(&'static str, bool)]) -> Valid<()> {
        match fields.iter().find(|(_, set)| *set) {
            Some((field, _)) => Err(self.invalid_at(field, "not supported (gRFC A29)")),
            None => Ok(()),
        }
    }
}

fn current(old: CertificateProviderInstance) -> CertificateProviderPluginInstance {
    CertificateProviderPluginInstance { instance_name: old.instance_name, certificate_name: old.certificate_name }
}
