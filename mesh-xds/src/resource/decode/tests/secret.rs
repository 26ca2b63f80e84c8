//! SDS: what secrets may be, and how they are named.

use super::*;
use crate::bootstrap::{ChannelCreds, GrpcService, ServerConfig};
use crate::resource::{DataSource, RootSource, SdsOrigin, SdsRef, SecretKind, TlsCertificate, TrustedCa};
use envoy_types::pb::envoy::{
    config::core::v3::{
        ApiConfigSource, DataSource as ProtoSource, GrpcService as ProtoService, TypedExtensionConfig,
        data_source::Specifier,
        grpc_service::{GoogleGrpc, TargetSpecifier},
    },
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, GenericSecret, SdsSecretConfig, Secret as Proto, SpiffeCertValidatorConfig,
        TlsCertificate as ProtoCertificate, TlsSessionTicketKeys, secret::Type,
        spiffe_cert_validator_config::TrustDomain,
    },
};

pub(super) fn text(text: &str) -> Option<ProtoSource> {
    Some(ProtoSource { specifier: Some(Specifier::InlineString(text.into())), ..ProtoSource::default() })
}

fn file(name: &str) -> Option<ProtoSource> {
    Some(ProtoSource { specifier: Some(Specifier::Filename(name.into())), ..ProtoSource::default() })
}

fn certificate() -> Proto {
    let certificate = ProtoCertificate {
        certificate_chain: text("chain"),
        private_key: Some(ProtoSource {
            specifier: Some(Specifier::InlineBytes(b"super-secret".to_vec())),
            ..ProtoSource::default()
        }),
        ..ProtoCertificate::default()
    };
    Proto { name: "default".into(), r#type: Some(Type::TlsCertificate(certificate)) }
}

fn trust() -> Proto {
    let context =
        CertificateValidationContext { trusted_ca: file("ca.pem"), ..CertificateValidationContext::default() };
    Proto { name: "ROOTCA".into(), r#type: Some(Type::ValidationContext(context)) }
}

fn accepted(proto: &Proto) -> SecretKind {
    match decode(ResourceType::Secret, proto).unwrap().0 {
        Resource::Secret(secret) => secret.kind.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn certificates_and_roots_are_read() {
    let SecretKind::Certificate(own) = accepted(&certificate()) else { panic!() };
    let expected =
        TlsCertificate { chain: DataSource::Bytes("chain".into()), key: DataSource::Bytes("super-secret".into()) };
    assert_eq!(*own, expected);
    let mut with_list = trust();
    if let Some(Type::ValidationContext(context)) = &mut with_list.r#type {
        context.crl = text("list");
    }
    let SecretKind::Trust(roots) = accepted(&with_list) else { panic!() };
    let crl = Some(DataSource::Bytes("list".into()));
    assert_eq!(*roots, TrustedCa { ca: RootSource::All(DataSource::File("ca.pem".into())), crl });
}

#[test]
fn a_private_key_is_not_printed() {
    let shown = format!("{:?}", decode(ResourceType::Secret, &certificate()).unwrap().0);
    assert!(!shown.contains("super-secret") && !shown.contains("115, 117"), "{shown}");
}

#[test]
fn bad_secrets_are_rejected() {
    fn own(proto: &mut Proto) -> &mut ProtoCertificate {
        match &mut proto.r#type {
            Some(Type::TlsCertificate(certificate)) => certificate,
            other => panic!("{other:?}"),
        }
    }
    rejects(
        ResourceType::Secret,
        &certificate(),
        &[
            ("name", "empty", |s| s.name.clear()),
            ("$", "neither", |s| s.r#type = None),
            ("generic_secret", "not supported", |s| s.r#type = Some(Type::GenericSecret(GenericSecret::default()))),
            ("session_ticket_keys", "never resumed", |s| {
                s.r#type = Some(Type::SessionTicketKeys(TlsSessionTicketKeys::default()));
            }),
            ("tls_certificate.private_key", "missing", |s| own(s).private_key = None),
            ("tls_certificate.certificate_chain", "empty", |s| own(s).certificate_chain = text("")),
            ("tls_certificate.certificate_chain", "environment_variable", |s| {
                let specifier = Some(Specifier::EnvironmentVariable("X".into()));
                own(s).certificate_chain = Some(ProtoSource { specifier, ..ProtoSource::default() });
            }),
            ("tls_certificate.password", "not supported", |s| own(s).password = text("x")),
            ("tls_certificate.pkcs12", "not supported", |s| own(s).pkcs12 = text("x")),
        ],
    );
    fn context(proto: &mut Proto) -> &mut CertificateValidationContext {
        match &mut proto.r#type {
            Some(Type::ValidationContext(context)) => context,
            other => panic!("{other:?}"),
        }
    }
    rejects(
        ResourceType::Secret,
        &trust(),
        &[
            ("validation_context.trusted_ca", "missing", |s| context(s).trusted_ca = None),
            ("validation_context.verify_certificate_hash", "A29", |s| {
                context(s).verify_certificate_hash = vec!["x".into()];
            }),
            ("validation_context.match_subject_alt_names", "default_validation_context", |s| {
                context(s).match_subject_alt_names = vec![Default::default()];
            }),
        ],
    );
}

/// SPIRE's secret `ALL`.
fn by_domain(change: impl FnOnce(&mut SpiffeCertValidatorConfig)) -> Proto {
    let domain = |name: &str, roots| TrustDomain { name: name.into(), trust_bundle: roots, ..TrustDomain::default() };
    let mut config = SpiffeCertValidatorConfig {
        trust_domains: vec![domain("a.example", text("A")), domain("b.example", file("b.pem"))],
        trust_bundles: None,
    };
    change(&mut config);
    let typed_config = Some(envoy_types::util::pack_any(config));
    let custom = TypedExtensionConfig { name: "envoy.tls.cert_validator.spiffe".into(), typed_config };
    let context = CertificateValidationContext { custom_validator_config: Some(custom), ..Default::default() };
    Proto { name: "ALL".into(), r#type: Some(Type::ValidationContext(context)) }
}

#[test]
fn roots_of_each_trust_domain_are_read() {
    let roots = |proto: &Proto| match accepted(proto) {
        SecretKind::Trust(roots) => roots.ca.clone(),
        other => panic!("{other:?}"),
    };
    let (a, b) = (DataSource::Bytes("A".into()), DataSource::File("b.pem".into()));
    let both = RootSource::ByDomain(vec![("a.example".into(), a), ("b.example".into(), b)]);
    assert_eq!(roots(&by_domain(|_| ())), both);
    // The map wins (Envoy).
    let map = RootSource::BundleMap(DataSource::File("map.json".into()));
    assert_eq!(roots(&by_domain(|config| config.trust_bundles = file("map.json"))), map);
}

#[test]
fn trust_domains_that_mean_nothing_are_rejected() {
    type Change = fn(&mut SpiffeCertValidatorConfig);
    let cases: [(&str, &str, Change); 6] = [
        ("trust_domains", "empty", |c| c.trust_domains.clear()),
        ("trust_domains[1].name", "twice", |c| c.trust_domains[1].name = "a.example".into()),
        ("trust_domains[0].name", "not a trust domain", |c| c.trust_domains[0].name = "spiffe://a.example".into()),
        ("trust_domains[0].name", "not a trust domain", |c| c.trust_domains[0].name.clear()),
        ("trust_domains[1].trust_bundle", "missing", |c| c.trust_domains[1].trust_bundle = None),
        ("trust_domains[0].workload_trust_domain", "not supported", |c| {
            c.trust_domains[0].workload_trust_domain = "c.example".into();
        }),
    ];
    for (path, reason, change) in cases {
        let error =
            decode(ResourceType::Secret, &by_domain(change)).err().unwrap_or_else(|| panic!("{path} was accepted"));
        assert_eq!(error.path, format!("validation_context.custom_validator_config.{path}"), "{error}");
        assert!(error.reason.contains(reason), "{error}");
    }
}

#[test]
fn a_secret_is_the_control_planes_or_the_workloads_or_a_file() {
    let providers = providers();
    let named = |name: &str, source: Option<ConfigSource>| {
        let config = SdsSecretConfig { name: name.into(), sds_config: source };
        Decoder::new(&providers).own_secret(config)
    };
    let elsewhere = || {
        let specifier = ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource::default());
        Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() })
    };
    let sds = |name: &str, origin| Credential::Sds(SdsRef { name: name.into(), origin });
    assert_eq!(named("x", Some(ads())).unwrap(), sds("x", SdsOrigin::Ads));
    assert_eq!(named("default", Some(ads())).unwrap(), sds("default", SdsOrigin::Ads));
    for name in ["default", "ROOTCA"] {
        assert_eq!(named(name, elsewhere()).unwrap(), sds(name, SdsOrigin::Workload));
        assert_eq!(named(name, None).unwrap(), sds(name, SdsOrigin::Workload));
    }
    assert_eq!(named("x", elsewhere()).unwrap_err().path, "sds_config");
    let services = BTreeMap::from([(
        "unix:/agent".to_owned(),
        GrpcService { channel_creds: ChannelCreds::Insecure, call_creds: Vec::new() },
    )]);
    let at = |target: &str| {
        let google = GoogleGrpc { target_uri: target.into(), ..GoogleGrpc::default() };
        let service =
            ProtoService { target_specifier: Some(TargetSpecifier::GoogleGrpc(google)), ..ProtoService::default() };
        let api = ApiConfigSource { grpc_services: vec![service], ..ApiConfigSource::default() };
        let specifier = ConfigSourceSpecifier::ApiConfigSource(api);
        Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() })
    };
    let at = |name: &str, target: &str| {
        let config = SdsSecretConfig { name: name.into(), sds_config: at(target) };
        Decoder::new(&providers).with_services(&services).own_secret(config)
    };
    let agent = || SdsOrigin::Server(ServerConfig::insecure("unix:/agent").unwrap().into());
    assert_eq!(at("x", "unix:/agent").unwrap(), sds("x", agent()));
    assert_eq!(at("default", "unix:/agent").unwrap(), sds("default", agent()));
    assert_eq!(at("default", "unix:/other").unwrap(), sds("default", SdsOrigin::Workload));
    assert!(at("x", "unix:/other").unwrap_err().reason.contains("allowed_grpc_services"));
    let files = TlsCertificate { chain: DataSource::File("/a".into()), key: DataSource::File("/b".into()) };
    assert_eq!(named("file-cert:/a~/b", elsewhere()).unwrap(), Credential::Inline(files.into()));
    assert_eq!(named("file-cert:/a", elsewhere()).unwrap_err().path, "name");
    let config = SdsSecretConfig { name: "file-root:/c".into(), sds_config: elsewhere() };
    let roots = TrustedCa { ca: RootSource::All(DataSource::File("/c".into())), crl: None };
    assert_eq!(Decoder::new(&providers).trust_secret(config).unwrap(), Credential::Inline(roots.into()));
}
