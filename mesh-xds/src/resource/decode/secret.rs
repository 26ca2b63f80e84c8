//! SDS validation: `Secret`, what names one, and where the bytes of certificates come from.

use super::{Decoder, Invalid, Valid, type_name};
use crate::bootstrap::{GrpcService, ServerConfig};
use crate::resource::{
    Credential, DataSource, RootSource, SdsOrigin, SdsRef, Secret, SecretKind, TlsCertificate, TrustedCa,
};
use envoy_types::pb::envoy::{
    config::core::v3::{
        ApiConfigSource, ConfigSource, DataSource as ProtoSource, TypedExtensionConfig,
        config_source::ConfigSourceSpecifier, data_source::Specifier, grpc_service::TargetSpecifier,
    },
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, SdsSecretConfig, Secret as Proto, SpiffeCertValidatorConfig,
        TlsCertificate as ProtoCertificate, secret::Type,
        spiffe_cert_validator_config::TrustDomain as SpiffeTrustDomain,
    },
};
use std::sync::Arc;

/// SPIFFE ID §2.1.
const MAX_TRUST_DOMAIN: usize = 255;
const SPIFFE_VALIDATOR: &str = "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

/// Whether it is the validator that we have.
pub(super) fn is_spiffe_validator(custom: &TypedExtensionConfig) -> bool {
    custom.typed_config.as_ref().is_some_and(|config| type_name(&config.type_url) == SPIFFE_VALIDATOR)
}

/// Istio's names of secrets that are files: `file-cert:CERTIFICATE~KEY` and `file-root:ROOTS`.
const FILE_CERT: &str = "file-cert:";
const FILE_ROOT: &str = "file-root:";

impl Secret {
    /// Decodes and validates a serialized `envoy.extensions.transport_sockets.tls.v3.Secret`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        let proto: Proto = cx.message(bytes)?;
        if proto.name.is_empty() {
            return Err(cx.invalid_at("name", "must not be empty"));
        }
        let kind = match proto.r#type {
            Some(Type::TlsCertificate(certificate)) => {
                let certificate = cx.at("tls_certificate", |cx| cx.tls_certificate(certificate))?;
                SecretKind::Certificate(Arc::new(certificate))
            }
            Some(Type::ValidationContext(context)) => cx.at("validation_context", |cx| {
                cx.unverifiable(&context)?;
                let names =
                    !context.match_subject_alt_names.is_empty() || !context.match_typed_subject_alt_names.is_empty();
                if names {
                    let reason = "belong in the default_validation_context of those who use the secret";
                    return Err(cx.invalid_at("match_subject_alt_names", reason));
                }
                cx.trusted_ca(context).map(|ca| SecretKind::Trust(Arc::new(ca)))
            })?,
            Some(Type::SessionTicketKeys(_)) => {
                return Err(cx.invalid_at("session_ticket_keys", "not supported: sessions are never resumed"));
            }
            Some(Type::GenericSecret(_)) => return Err(cx.invalid_at("generic_secret", "not supported")),
            None => return Err(cx.invalid("has neither tls_certificate nor validation_context")),
        };
        Ok(Self { name: proto.name.into(), kind })
    }
}

impl Decoder<'_> {
    /// Our certificate, by the name of a secret.
    pub(super) fn own_secret(&mut self, proto: SdsSecretConfig) -> Valid<Credential<TlsCertificate>> {
        let SdsSecretConfig { name, sds_config } = proto;
        if let Some(files) = name.strip_prefix(FILE_CERT) {
            let Some((chain, key)) = files.split_once('~').filter(|(a, b)| !a.is_empty() && !b.is_empty()) else {
                return Err(self.invalid_at("name", format!("\"{name}\" is not {FILE_CERT}CERTIFICATE~KEY")));
            };
            let (chain, key) = (DataSource::File(chain.into()), DataSource::File(key.into()));
            return Ok(Credential::Inline(Arc::new(TlsCertificate { chain, key })));
        }
        self.secret_by_name(name, sds_config.as_ref()).map(Credential::Sds)
    }

    /// Whom to trust, by the name of a secret.
    pub(super) fn trust_secret(&mut self, proto: SdsSecretConfig) -> Valid<Credential<TrustedCa>> {
        let SdsSecretConfig { name, sds_config } = proto;
        match name.strip_prefix(FILE_ROOT) {
            Some("") => Err(self.invalid_at("name", format!("\"{name}\" names no file"))),
            Some(file) => {
                let ca = TrustedCa { ca: RootSource::All(DataSource::File(file.into())), crl: None };
                Ok(Credential::Inline(Arc::new(ca)))
            }
            None => self.secret_by_name(name, sds_config.as_ref()).map(Credential::Sds),
        }
    }

    fn secret_by_name(&mut self, name: String, source: Option<&ConfigSource>) -> Valid<SdsRef> {
        if name.is_empty() {
            return Err(self.invalid_at("name", "must not be empty"));
        }
        let specifier = source.and_then(|source| source.config_source_specifier.as_ref());
        let server = match specifier {
            Some(ConfigSourceSpecifier::ApiConfigSource(api)) => self.sds_server(api),
            _ => None,
        };
        let origin = match (specifier, server) {
            (Some(ConfigSourceSpecifier::Ads(_) | ConfigSourceSpecifier::Self_(_)), _) => SdsOrigin::Ads,
            (_, Some(server)) => SdsOrigin::Server(Arc::new(server)),
            // The other servers are Envoy's: what Istio's agent gives it there has names of its own.
            _ if matches!(name.as_str(), "default" | "ROOTCA" | "ALL") => SdsOrigin::Workload,
            _ => {
                let reason = format!(
                    "must be ads, self, or google_grpc with a target of the bootstrap's allowed_grpc_services for \"{name}\": \
                     other servers have only default, ROOTCA and ALL"
                );
                return Err(self.invalid_at("sds_config", reason));
            }
        };
        Ok(SdsRef { name: name.into(), origin })
    }

    /// A server that the bootstrap allows, with the credentials that it says (gRFC A102): never those of the resource.
    fn sds_server(&self, api: &ApiConfigSource) -> Option<ServerConfig> {
        let targets = api.grpc_services.iter().filter_map(|service| match &service.target_specifier {
            Some(TargetSpecifier::GoogleGrpc(google)) => Some(google.target_uri.as_str()),
            _ => None,
        });
        let services = self.services?;
        targets.into_iter().find_map(|target| {
            let GrpcService { channel_creds, call_creds } = services.get(target)?.clone();
            Some(ServerConfig { channel_creds, call_creds, ..ServerConfig::insecure(target).ok()? })
        })
    }

    pub(super) fn tls_certificate(&mut self, proto: ProtoCertificate) -> Valid<TlsCertificate> {
        self.refused(&[
            ("pkcs12", proto.pkcs12.is_some()),
            ("private_key_provider", proto.private_key_provider.is_some()),
            ("password", proto.password.is_some()),
            ("tls_params", proto.tls_params.is_some()),
        ])?;
        self.ignored(&[
            ("ocsp_staple", proto.ocsp_staple.is_some()),
            ("signed_certificate_timestamp", !proto.signed_certificate_timestamp.is_empty()),
        ]);
        Ok(TlsCertificate {
            chain: self.data_source("certificate_chain", proto.certificate_chain)?,
            key: self.data_source("private_key", proto.private_key)?,
        })
    }

    /// Roots, and the revocation lists beside them. The SPIFFE validator wins over `trusted_ca`, as in Envoy.
    pub(super) fn trusted_ca(&mut self, proto: CertificateValidationContext) -> Valid<TrustedCa> {
        let CertificateValidationContext { trusted_ca, crl, custom_validator_config, .. } = proto;
        let ca = match custom_validator_config.and_then(|custom| custom.typed_config) {
            Some(config) => self.at("custom_validator_config", |cx| {
                let config = cx.any(&config)?;
                cx.spiffe_roots(config)
            })?,
            None => RootSource::All(self.data_source("trusted_ca", trusted_ca)?),
        };
        let crl = crl.map(|crl| self.data_source("crl", Some(crl))).transpose()?;
        Ok(TrustedCa { ca, crl })
    }

    /// The roots of each trust domain: SPIRE's secret `ALL`.
    fn spiffe_roots(&mut self, proto: SpiffeCertValidatorConfig) -> Valid<RootSource> {
        let SpiffeCertValidatorConfig { trust_domains, trust_bundles } = proto;
        if trust_bundles.is_some() {
            return self.data_source("trust_bundles", trust_bundles).map(RootSource::BundleMap);
        }
        if trust_domains.is_empty() {
            return Err(self.invalid_at("trust_domains", "is empty, and there are no trust_bundles"));
        }
        let mut domains: Vec<(Arc<str>, DataSource)> = Vec::with_capacity(trust_domains.len());
        for (index, domain) in trust_domains.into_iter().enumerate() {
            let known = self.at_index("trust_domains", index, |cx| {
                let SpiffeTrustDomain { name, trust_bundle, workload_trust_domain } = domain;
                let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
                if name.is_empty() || name.len() > MAX_TRUST_DOMAIN || !name.chars().all(allowed) {
                    return Err(cx.invalid_at("name", format!("\"{name}\" is not a trust domain")));
                }
                if !workload_trust_domain.is_empty() {
                    return Err(cx.invalid_at("workload_trust_domain", "not supported"));
                }
                if domains.iter().any(|(known, _)| **known == *name) {
                    return Err(cx.invalid_at("name", format!("\"{name}\" comes twice")));
                }
                Ok((name.into(), cx.data_source("trust_bundle", trust_bundle)?))
            })?;
            domains.push(known);
        }
        Ok(RootSource::ByDomain(domains))
    }

    fn data_source(&mut self, field: &'static str, proto: Option<ProtoSource>) -> Valid<DataSource> {
        match proto.and_then(|proto| proto.specifier) {
            Some(Specifier::Filename(name)) if !name.is_empty() => Ok(DataSource::File(name.into())),
            Some(Specifier::InlineBytes(bytes)) if !bytes.is_empty() => Ok(DataSource::Bytes(bytes.into())),
            Some(Specifier::InlineString(text)) if !text.is_empty() => Ok(DataSource::Bytes(text.into())),
            Some(Specifier::EnvironmentVariable(_)) => {
                Err(self.invalid_at(field, "environment_variable is not supported: use filename or inline_bytes"))
            }
            _ => Err(self.invalid_at(field, "is missing or empty")),
        }
    }
}
