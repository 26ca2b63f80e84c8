//! The transport socket of a cluster (gRFC A29, A82).

use super::*;

#[test]
fn tls_comes_from_provider_instances() {
    let tls = upstream(&tls(identity(), validation()));
    assert_eq!(tls.ca.as_ref().unwrap().provider().unwrap().instance, "default");
    assert_eq!(tls.identity.as_ref().unwrap().provider().unwrap().certificate, "cert");
    assert_eq!(tls.sni.as_deref(), Some("sni"));
    assert_eq!(tls.san_matchers[0].matcher.pattern, StringPattern::Exact("spiffe://a/b".into()));
    let raw = with(|c| c.transport_socket = Some(socket(any(&RawBuffer {}))));
    assert_eq!(accepted(&raw).0.transport_socket, TransportSocket::Plaintext);
    assert_eq!(accepted(&with(|_| {})).0.transport_socket, TransportSocket::Fallback);
}

#[test]
fn system_roots_are_used_only_without_an_instance() {
    let both = CertificateValidationContext { system_root_certs: Some(SystemRootCerts {}), ..validation() };
    assert!(upstream(&tls(identity(), both.clone())).ca.is_some());
    let roots = CertificateValidationContext { ca_certificate_provider_instance: None, ..both };
    assert_eq!(upstream(&tls(CommonTlsContext::default(), roots)).ca, None);
}

#[test]
fn what_istiod_sends_to_grpc_clients_is_taken() {
    let old = |name: &str| {
        Some(CertificateProviderInstance { instance_name: "default".into(), certificate_name: name.into() })
    };
    let combined = CombinedCertificateValidationContext {
        default_validation_context: Some(CertificateValidationContext {
            ca_certificate_provider_instance: None,
            ..validation()
        }),
        validation_context_certificate_provider_instance: old("ROOTCA"),
        ..CombinedCertificateValidationContext::default()
    };
    let common = CommonTlsContext {
        tls_certificate_certificate_provider_instance: old("default"),
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        ..CommonTlsContext::default()
    };
    let context = UpstreamTlsContext { common_tls_context: Some(common), ..UpstreamTlsContext::default() };
    let proto = with(|c| {
        c.transport_socket = Some(socket(any(&context)));
        c.lb_policy = ProtoPolicy::LeastRequest as i32;
        c.circuit_breakers = thresholds(|t| t.max_requests = uint(4_294_967_295));
    });
    let tls = upstream(&proto);
    assert_eq!((&*certificate(tls.ca), &*certificate(tls.identity)), ("ROOTCA", "default"));
    assert_eq!(tls.san_matchers.len(), 1);
}

fn certificate<T>(from: Option<Credential<T>>) -> String {
    from.unwrap().provider().unwrap().certificate.clone()
}

#[test]
fn tls_that_we_cannot_honour_is_rejected() {
    type Change = fn(&mut CommonTlsContext, &mut CertificateValidationContext);
    let cases: &[(&str, &str, Change)] = &[
        ("tls_params", "A29", |c, _| c.tls_params = Some(TlsParameters::default())),
        ("custom_handshaker", "A29", |c, _| c.custom_handshaker = Some(TypedExtensionConfig::default())),
        ("tls_certificates[0].certificate_chain", "missing", |c, _| {
            c.tls_certificate_provider_instance = None;
            c.tls_certificates = vec![TlsCertificate::default()];
        }),
        ("tls_certificate_sds_secret_configs[0].name", "empty", |c, _| {
            c.tls_certificate_provider_instance = None;
            c.tls_certificate_sds_secret_configs = vec![Default::default()];
        }),
        ("tls_certificate_sds_secret_configs", "more than one", |c, _| {
            c.tls_certificate_provider_instance = None;
            c.tls_certificate_sds_secret_configs = vec![Default::default(), Default::default()];
        }),
        ("tls_certificate_provider_instance", "\"nope\" is not in the bootstrap's certificate_providers", |c, _| {
            c.tls_certificate_provider_instance = instance("nope");
        }),
        ("tls_certificate_provider_instance", "unknown plugin \"vault\"", |c, _| {
            c.tls_certificate_provider_instance = instance("odd");
        }),
        ("validation_context.ca_certificate_provider_instance", "\"nope\"", |_, v| {
            v.ca_certificate_provider_instance = instance("nope");
        }),
        ("validation_context.ca_certificate_provider_instance", "must verify", |_, v| {
            v.ca_certificate_provider_instance = None;
        }),
        ("validation_context.verify_certificate_spki", "A29", |_, v| v.verify_certificate_spki = vec!["x".into()]),
        ("validation_context.verify_certificate_hash", "A29", |_, v| v.verify_certificate_hash = vec!["x".into()]),
        ("validation_context.require_signed_certificate_timestamp", "A29", |_, v| {
            v.require_signed_certificate_timestamp = Some(BoolValue { value: true });
        }),
        ("validation_context.crl", "A29", |_, v| v.crl = Some(Default::default())),
        ("validation_context.max_verify_depth", "A29", |_, v| v.max_verify_depth = Some(Default::default())),
        ("validation_context.custom_validator_config", "A29", |_, v| {
            v.custom_validator_config = Some(TypedExtensionConfig::default());
        }),
        ("validation_context.match_subject_alt_names[0].contains", "empty", |_, v| {
            v.match_subject_alt_names[0].match_pattern = Some(MatchPattern::Contains(String::new()));
        }),
    ];
    for (path, reason, change) in cases {
        let (mut common, mut context) = (identity(), validation());
        change(&mut common, &mut context);
        let error = decode(ResourceType::Cluster, &tls(common, context))
            .err()
            .unwrap_or_else(|| panic!("{path}: {reason}: was accepted"));
        assert_eq!(error.path, format!("transport_socket.typed_config.common_tls_context.{path}"), "{error}");
        assert!(error.reason.contains(reason), "{error} does not say \"{reason}\"");
    }
}

#[test]
fn a_client_that_verifies_nothing_is_rejected() {
    let bare = UpstreamTlsContext { common_tls_context: Some(identity()), ..UpstreamTlsContext::default() };
    let long = UpstreamTlsContext { sni: "x".repeat(256), ..bare.clone() };
    for (context, path) in [
        (UpstreamTlsContext::default(), "transport_socket.typed_config.common_tls_context"),
        (bare, "transport_socket.typed_config.common_tls_context.validation_context"),
        (long, "transport_socket.typed_config.sni"),
    ] {
        let proto = with(|c| c.transport_socket = Some(socket(any(&context))));
        assert_eq!(decode(ResourceType::Cluster, &proto).unwrap_err().path, path);
    }
}
