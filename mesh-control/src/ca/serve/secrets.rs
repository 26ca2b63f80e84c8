//! SDS of one workload, as Istio's agent serves it: `default` is its certificate with the key, `ROOTCA` the roots;
//! and as SPIRE's does: `ALL` the roots of each trust domain, of which there is one.

use super::workload::Workload;
use envoy_types::{
    pb::{
        envoy::{
            config::core::v3::{DataSource, TypedExtensionConfig, data_source::Specifier},
            extensions::transport_sockets::tls::v3::{
                CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret::Type,
                spiffe_cert_validator_config::TrustDomain,
            },
            service::{
                discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse},
                secret::v3::secret_discovery_service_server::SecretDiscoveryService,
            },
        },
        google::protobuf::Any,
    },
    util::pack_any,
};
use futures::stream::{self, BoxStream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

pub(super) const CERTIFICATE: &str = "default";
pub(super) const ROOTS: &str = "ROOTCA";
const ALL: &str = "ALL";

/// Answers for one workload.
#[derive(Debug)]
pub(super) struct Secrets {
    workload: Workload,
}

/// A stream between two responses.
struct State {
    workload: Workload,
    requests: Streaming<DiscoveryRequest>,
    news: tokio::sync::watch::Receiver<u64>,
    /// What is subscribed; `None` before the first request.
    names: Option<Vec<String>>,
    /// What was sent last.
    sent: Vec<Any>,
    count: u64,
}

impl Secrets {
    pub(super) fn new(workload: Workload) -> Self {
        Self { workload }
    }
}

impl Workload {
    pub(super) fn secret(&self, name: &str) -> Option<Any> {
        let inline = |pem: &str| {
            let specifier = Specifier::InlineBytes(pem.as_bytes().to_vec());
            Some(DataSource { specifier: Some(specifier), ..DataSource::default() })
        };
        let content = match name {
            CERTIFICATE => {
                let svid = self.ca.current(&self.namespace, &self.account)?;
                Type::TlsCertificate(TlsCertificate {
                    certificate_chain: inline(&svid.certificate_pem),
                    private_key: inline(&svid.key_pem),
                    ..TlsCertificate::default()
                })
            }
            ROOTS => Type::ValidationContext(CertificateValidationContext {
                trusted_ca: inline(&self.ca.root_pem()),
                ..CertificateValidationContext::default()
            }),
            ALL => {
                let domain = TrustDomain {
                    name: self.ca.trust_domain().to_owned(),
                    trust_bundle: inline(&self.ca.root_pem()),
                    ..TrustDomain::default()
                };
                let config = SpiffeCertValidatorConfig { trust_domains: vec![domain], trust_bundles: None };
                let custom = TypedExtensionConfig {
                    name: "envoy.tls.cert_validator.spiffe".to_owned(),
                    typed_config: Some(pack_any(config)),
                };
                Type::ValidationContext(CertificateValidationContext {
                    custom_validator_config: Some(custom),
                    ..CertificateValidationContext::default()
                })
            }
            _ => return None,
        };
        Some(pack_any(Secret { name: name.to_owned(), r#type: Some(content) }))
    }

    fn secrets(&self, names: &[String]) -> Vec<Any> {
        names.iter().filter_map(|name| self.secret(name)).collect()
    }
}

/// A secret without content: nobody's.
pub(super) fn empty(name: &str) -> Any {
    pack_any(Secret { name: name.to_owned(), r#type: None })
}

fn response(resources: Vec<Any>, count: u64) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: count.to_string(),
        nonce: count.to_string(),
        type_url: pack_any(Secret::default()).type_url,
        resources,
        ..DiscoveryResponse::default()
    }
}

impl State {
    async fn next(&mut self) -> Option<DiscoveryResponse> {
        loop {
            self.news.mark_unchanged();
            if let Some(names) = &self.names {
                let secrets = self.workload.secrets(names);
                if secrets != self.sent {
                    self.sent.clone_from(&secrets);
                    self.count += 1;
                    return Some(response(secrets, self.count));
                }
            }
            tokio::select! {
                // The workload holds the sender.
                changed = self.news.changed() => changed.ok()?,
                request = self.requests.message() => {
                    let request = request.ok()??;
                    if let Some(error) = &request.error_detail {
                        tracing::warn!(node = request.node.as_ref().map(|n| n.id.as_str()), reason = error.message, "secret refused");
                    }
                    if self.names.as_ref() != Some(&request.resource_names) {
                        self.names = Some(request.resource_names);
                    }
                }
            }
        }
    }
}

#[tonic::async_trait]
impl SecretDiscoveryService for Secrets {
    type StreamSecretsStream = BoxStream<'static, Result<DiscoveryResponse, Status>>;
    type DeltaSecretsStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let state = State {
            news: self.workload.ca.news(),
            workload: self.workload.clone(),
            requests: request.into_inner(),
            names: None,
            sent: Vec::new(),
            count: 0,
        };
        let responses = stream::unfold(state, |mut state| async move { Some((Ok(state.next().await?), state)) });
        Ok(Response::new(responses.boxed()))
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let secrets = self.workload.secrets(&request.into_inner().resource_names);
        Ok(Response::new(response(secrets, 1)))
    }

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("this control plane speaks the state-of-the-world form of SDS"))
    }
}
