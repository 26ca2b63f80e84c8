//! `UpstreamTlsContext` (gRFC A29, A82): certificates only from provider instances of the bootstrap.

use super::{Decoder, Valid, type_name};
use crate::{
    bootstrap::CertificateProvider,
    resource::{CertificateProviderRef, TransportSocket, UpstreamTls},
};
use envoy_types::pb::envoy::{
    config::core::v3::{TransportSocket as Proto, transport_socket::ConfigType},
    extensions::transport_sockets::tls::v3::{
        CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext, UpstreamTlsContext,
        common_tls_context::{CertificateProviderInstance, ValidationContextType},
    },
};
use std::sync::Arc;

const RAW_BUFFER: &str = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";
const UPSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
/// gRFC A101.
const MAX_SNI: usize = 255;

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

    fn upstream_tls(&mut self, proto: UpstreamTlsContext) -> Valid<UpstreamTls> {
        if proto.sni.len() > MAX_SNI {
            return Err(self.invalid_at("sni", format!("is longer than {MAX_SNI} bytes")));
        }
        self.ignored(&[
            ("auto_host_sni", proto.auto_host_sni),
            ("auto_sni_san_validation", proto.auto_sni_san_validation),
            ("allow_renegotiation", proto.allow_renegotiation),
        ]);
        let Some(common) = proto.common_tls_context else {
            return Err(self.invalid_at("common_tls_context", "is missing"));
        };
        let mut tls = self.at("common_tls_context", |cx| cx.common_tls(common))?;
        tls.sni = Some(proto.sni).filter(|sni| !sni.is_empty());
        Ok(tls)
    }

    fn common_tls(&mut self, proto: CommonTlsContext) -> Valid<UpstreamTls> {
        self.refused(&[
            ("tls_params", proto.tls_params.is_some()),
            ("custom_handshaker", proto.custom_handshaker.is_some()),
            ("custom_tls_certificate_selector", proto.custom_tls_certificate_selector.is_some()),
            ("tls_certificates", !proto.tls_certificates.is_empty()),
            ("tls_certificate_sds_secret_configs", !proto.tls_certificate_sds_secret_configs.is_empty()),
            ("tls_certificate_certificate_provider", proto.tls_certificate_certificate_provider.is_some()),
        ])?;
        let identity = match (
            proto.tls_certificate_provider_instance,
            // What istiod still sends to gRPC clients.
            proto.tls_certificate_certificate_provider_instance,
        ) {
            (Some(instance), _) => Some(self.instance("tls_certificate_provider_instance", instance)?),
            (None, Some(instance)) => {
                Some(self.instance("tls_certificate_certificate_provider_instance", current(instance))?)
            }
            (None, None) => None,
        };
        let (field, context, fallback) = match proto.validation_context_type {
            Some(ValidationContextType::ValidationContext(context)) => ("validation_context", Some(context), None),
            Some(ValidationContextType::CombinedValidationContext(combined)) => {
                if combined.validation_context_sds_secret_config.is_some()
                    && combined.validation_context_certificate_provider_instance.is_none()
                    && combined
                        .default_validation_context
                        .as_ref()
                        .is_none_or(|context| context.ca_certificate_provider_instance.is_none())
                {
                    return Err(self.invalid_at(
                        "combined_validation_context.validation_context_sds_secret_config",
                        "not supported: use a certificate provider instance",
                    ));
                }
                (
                    "combined_validation_context.default_validation_context",
                    combined.default_validation_context,
                    combined.validation_context_certificate_provider_instance.map(current),
                )
            }
            Some(ValidationContextType::ValidationContextSdsSecretConfig(_)) => {
                return Err(self.invalid_at(
                    "validation_context_sds_secret_config",
                    "not supported: use a certificate provider instance",
                ));
            }
            Some(ValidationContextType::ValidationContextCertificateProviderInstance(instance)) => {
                ("validation_context_certificate_provider_instance", None, Some(current(instance)))
            }
            Some(ValidationContextType::ValidationContextCertificateProvider(_)) => {
                return Err(self.invalid_at("validation_context_certificate_provider", "not supported"));
            }
            None => return Err(self.invalid_at("validation_context", "is missing: a client must verify the server")),
        };
        let (ca, san_matchers) = self.at(field, |cx| cx.validation(context.unwrap_or_default(), fallback))?;
        Ok(UpstreamTls { ca, identity, san_matchers, sni: None, alpn: proto.alpn_protocols })
    }

    fn validation(
        &mut self,
        proto: CertificateValidationContext,
        fallback: Option<CertificateProviderPluginInstance>,
    ) -> Valid<(Option<CertificateProviderRef>, Vec<crate::resource::StringMatcher>)> {
        self.refused(&[
            ("verify_certificate_spki", !proto.verify_certificate_spki.is_empty()),
            ("verify_certificate_hash", !proto.verify_certificate_hash.is_empty()),
            (
                "require_signed_certificate_timestamp",
                proto.require_signed_certificate_timestamp.is_some_and(|value| value.value),
            ),
            ("crl", proto.crl.is_some()),
            ("custom_validator_config", proto.custom_validator_config.is_some()),
        ])?;
        self.ignored(&[
            ("allow_expired_certificate", proto.allow_expired_certificate),
            ("trust_chain_verification", proto.trust_chain_verification != 0),
        ]);
        let ca = match (proto.ca_certificate_provider_instance, fallback, proto.system_root_certs) {
            (Some(instance), _, _) => Some(self.instance("ca_certificate_provider_instance", instance)?),
            (None, Some(instance), _) => Some(self.instance("ca_certificate_provider_instance", instance)?),
            (None, None, Some(_)) => None,
            (None, None, None) => {
                return Err(self.invalid_at(
                    "ca_certificate_provider_instance",
                    "is missing, and so is system_root_certs: a client must verify the server",
                ));
            }
        };
        let mut matchers = Vec::new();
        for (index, matcher) in proto.match_subject_alt_names.into_iter().enumerate() {
            matchers.push(self.at_index("match_subject_alt_names", index, |cx| cx.string_matcher(matcher))?);
        }
        for (index, typed) in proto.match_typed_subject_alt_names.into_iter().enumerate() {
            matchers.push(self.at_index("match_typed_subject_alt_names", index, |cx| match typed.matcher {
                Some(matcher) => cx.string_matcher(matcher),
                None => Err(cx.invalid_at("matcher", "is missing")),
            })?);
        }
        Ok((ca, matchers))
    }

    /// The instance must be in the bootstrap, with a plugin we have.
    fn instance(
        &mut self,
        field: &'static str,
        proto: CertificateProviderPluginInstance,
    ) -> Valid<CertificateProviderRef> {
        match self.providers.get(&proto.instance_name) {
            Some(CertificateProvider::FileWatcher(_)) => {
                Ok(CertificateProviderRef { instance: proto.instance_name, certificate: proto.certificate_name })
            }
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

    fn refused(&mut self, fields: &[(&'static str, bool)]) -> Valid<()> {
        match fields.iter().find(|(_, set)| *set) {
            Some((field, _)) => Err(self.invalid_at(field, "not supported (gRFC A29)")),
            None => Ok(()),
        }
    }
}

fn current(old: CertificateProviderInstance) -> CertificateProviderPluginInstance {
    CertificateProviderPluginInstance { instance_name: old.instance_name, certificate_name: old.certificate_name }
}
