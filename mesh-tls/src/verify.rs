//! Verification of the peer's certificate: chain, usage, validity, SPIFFE id, SAN matchers.

use crate::{
    CryptoProvider, Reason, Refusal, SanKind, SanMatcher, Side, SpiffeId, SpiffeIdError, TrustRoots,
    revocation::Revocation, x509::Leaf,
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};
use webpki::{EndEntityCert, KeyUsage};

/// What is asked of the peer's name, besides the chain and the [`SanMatcher`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PeerCheck {
    /// Nothing: xDS without SPIFFE (gRFC A29: no host name check). A client that shows a SPIFFE id shows no other URI all the same.
    #[default]
    Chain,
    /// Exactly one URI SAN, a SPIFFE id. Always asked when the roots are chosen by trust domain (gRFC A87).
    Spiffe,
    /// The server's certificate is valid for the server name given to `connect`: a DNS name or an IP address. One that shows a SPIFFE id shows no
    /// other URI.
    ServerName,
    /// [`Spiffe`](Self::Spiffe), and if the server's certificate has DNS names or addresses besides its SPIFFE id, it is valid for the server
    /// name given to `connect`: for servers that are known by their trust domain, as most certificates of SPIFFE name no host.
    SpiffeServerName,
}

tokio::task_local! {
    /// The refusal of the handshake that is being polled: rustls can only carry a short error, from which it makes the alert.
    static REFUSAL: Cell<Option<Box<Refusal>>>;
}

/// Runs a handshake and returns what it ended with, and what our verifier had against the peer.
pub(crate) async fn with_refusal<F: Future>(handshake: F) -> (F::Output, Option<Box<Refusal>>) {
    REFUSAL
        .scope(Cell::new(None), async {
            let output = handshake.await;
            (output, REFUSAL.with(Cell::take))
        })
        .await
}

/// Leaves the refusal for [`with_refusal`]; outside of it there is nobody to tell.
fn tell(refusal: Refusal) {
    let _ = REFUSAL.try_with(|slot| slot.set(Some(Box::new(refusal))));
}

/// The rules for one peer, for one generation of roots.
#[derive(Debug)]
pub(crate) struct Verifier {
    /// Whose certificates are verified.
    pub(crate) side: Side,
    pub(crate) roots: Arc<TrustRoots>,
    pub(crate) check: PeerCheck,
    pub(crate) san_matchers: Arc<[SanMatcher]>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    /// Whether a client must present a certificate.
    pub(crate) mandatory: bool,
    /// Whether the server name that we sent replaces the matchers (gRFC A101).
    pub(crate) auto_sni_san: bool,
}

impl Verifier {
    pub(crate) fn new(
        side: Side,
        roots: Arc<TrustRoots>,
        check: PeerCheck,
        san_matchers: Arc<[SanMatcher]>,
        provider: &CryptoProvider,
    ) -> Self {
        let algorithms = provider.signature_verification_algorithms;
        Self { side, roots, check, san_matchers, algorithms, mandatory: true, auto_sni_san: false }
    }

    fn verify(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: Option<&ServerName<'_>>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let Ok(leaf) = Leaf::parse(certificate) else {
            return Err(self.refuse(String::new(), Reason::Malformed));
        };
        self.check(&leaf, certificate, chain, name, now).map_err(|reason| self.refuse(leaf.name(), reason))
    }

    fn check(
        &self,
        leaf: &Leaf,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: Option<&ServerName<'_>>,
        now: UnixTime,
    ) -> Result<(), Reason> {
        let parsed = EndEntityCert::try_from(certificate).map_err(|e| chain_reason(&e, leaf, None, self.side, now))?;
        let spiffe =
            matches!(self.check, PeerCheck::Spiffe | PeerCheck::SpiffeServerName) || self.roots.is_by_trust_domain();
        let id = if spiffe { Some(spiffe_id(leaf)?) } else { None };
        // Whoever has a SPIFFE id has one name: of a client that has several rules could each take another (X509-SVID section 2).
        let one = self.side == Side::Client || self.check == PeerCheck::ServerName;
        if one && leaf.uri_sans.len() > 1 && leaf.uri_sans.iter().any(|uri| is_spiffe(uri)) {
            return Err(Reason::NotOneUri { uris: leaf.uri_sans.clone() });
        }
        let domain = id.as_ref().map(SpiffeId::trust_domain_str);
        let anchors = self.roots.anchors(domain).ok_or_else(|| Reason::UnknownTrustDomain {
            domain: domain.unwrap_or_default().to_owned(),
            known: self.roots.trust_domains().iter().map(ToString::to_string).collect(),
        })?;
        let usage = match self.side {
            Side::Server => KeyUsage::server_auth(),
            Side::Client => KeyUsage::client_auth(),
        };
        let domain = domain.filter(|_| self.roots.is_by_trust_domain());
        let revocation = self.roots.revocation();
        let lists = revocation.map(Revocation::lists).unwrap_or_default();
        let options = revocation.and_then(|revocation| revocation.options(&lists));
        let verified = parsed.verify_for_usage(self.algorithms.all, anchors, chain, now, usage, options, None);
        let verified = verified.and_then(|path| {
            match path.intermediate_certificates().any(|issuer| may_not_issue(&issuer.der())) {
                // webpki does not look at the key usage
                true => Err(webpki::Error::EndEntityUsedAsCa),
                false => Ok(()),
            }
        });
        verified.map_err(|error| match (error, revocation) {
            (webpki::Error::CertRevoked, Some(lists)) => {
                Reason::Revoked { issuer: !lists.names(parsed.issuer(), parsed.serial()) }
            }
            (error, _) => chain_reason(&error, leaf, domain, self.side, now),
        })?;
        let by_name = match self.check {
            PeerCheck::ServerName => true,
            PeerCheck::SpiffeServerName => {
                (!leaf.dns_sans.is_empty() || !leaf.ip_sans.is_empty()) && name.is_some_and(|name| *name != no_name())
            }
            PeerCheck::Chain | PeerCheck::Spiffe => false,
        };
        if let (true, Some(name)) = (by_name, name) {
            parsed
                .verify_is_valid_for_subject_name(name)
                .map_err(|_| Reason::San { wanted: vec![name.to_str().into_owned()], offered: leaf.sans() })?;
        }
        if let (true, Some(name @ ServerName::DnsName(sent))) = (self.auto_sni_san, name) {
            let wanted =
                SanMatcher::Typed { kind: SanKind::Dns, matcher: Box::new(SanMatcher::Exact(sent.as_ref().into())) };
            return match wanted.matches(leaf) {
                true => Ok(()),
                false => Err(Reason::San { wanted: vec![format!("DNS:{}", name.to_str())], offered: leaf.sans() }),
            };
        }
        if self.san_matchers.is_empty() || self.san_matchers.iter().any(|matcher| matcher.matches(leaf)) {
            return Ok(());
        }
        let wanted = self.san_matchers.iter().map(ToString::to_string).collect();
        Err(Reason::San { wanted, offered: leaf.sans() })
    }

    /// Tells the refusal and returns what rustls makes the right alert of.
    fn refuse(&self, certificate: String, reason: Reason) -> Error {
        let alert = match &reason {
            Reason::Expired { .. } => CertificateError::Expired,
            Reason::NotYetValid { .. } => CertificateError::NotValidYet,
            Reason::UnknownCa { .. } | Reason::UnknownTrustDomain { .. } => CertificateError::UnknownIssuer,
            Reason::WrongUsage { .. } => CertificateError::InvalidPurpose,
            Reason::Revoked { .. } => CertificateError::Revoked,
            Reason::RevocationUnknown(_) => CertificateError::UnknownRevocationStatus,
            Reason::San { .. } => CertificateError::ApplicationVerificationFailure,
            _ => CertificateError::BadEncoding,
        };
        let refusal = Refusal { side: self.side, certificate, reason };
        tell(refusal);
        Error::InvalidCertificate(alert)
    }

    /// Says of a signature that does not verify whose it should be.
    fn unproven(&self, certificate: &CertificateDer<'_>, error: Error) -> Error {
        let certificate = Leaf::parse(certificate).map(|leaf| leaf.name()).unwrap_or_default();
        tell(Refusal { side: self.side, certificate, reason: Reason::NoProof });
        error
    }
}

/// What rustls is given for a server without a name: it sends no SNI for an address.
pub(crate) fn no_name() -> ServerName<'static> {
    ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// Whether it is said to be a SPIFFE id, in whatever case.
fn is_spiffe(uri: &str) -> bool {
    uri.get(..9).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe://"))
}

/// A well-formed X.509-SVID leaf (X509-SVID §5.2, gRFC A87).
fn spiffe_id(leaf: &Leaf) -> Result<SpiffeId, Reason> {
    let [uri] = leaf.uri_sans.as_slice() else {
        return Err(Reason::NotOneUri { uris: leaf.uri_sans.clone() });
    };
    if leaf.may_sign {
        return Err(Reason::Signing);
    }
    match uri.parse::<SpiffeId>() {
        Ok(id) if id.path().is_empty() => Err(SpiffeIdError::NoPath),
        parsed => parsed,
    }
    .map_err(|error| Reason::NotSpiffe { uri: uri.clone(), error })
}

/// Whether the key usage of an intermediate certificate forbids what it does.
fn may_not_issue(issuer: &[u8]) -> bool {
    Leaf::parse(issuer).map_or(true, |issuer| issuer.may_not_issue)
}

fn chain_reason(error: &webpki::Error, leaf: &Leaf, domain: Option<&str>, side: Side, now: UnixTime) -> Reason {
    use webpki::Error as E;
    let now = seconds(now);
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) | E::MalformedExtensions => Reason::Malformed,
        E::CertExpired { not_after, .. } => {
            let not_after = seconds(*not_after);
            Reason::Expired { issuer: not_after != leaf.not_after, not_after, now }
        }
        E::CertNotValidYet { not_before, .. } => {
            let not_before = seconds(*not_before);
            Reason::NotYetValid { issuer: not_before != leaf.not_before, not_before, now }
        }
        // a root of the same name with another key is an unknown authority too
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => {
            Reason::UnknownCa { issuer: leaf.issuer.clone(), domain: domain.map(str::to_owned) }
        }
        E::RequiredEkuNotFoundContext(_) => Reason::WrongUsage {
            required: match side {
                Side::Server => "server authentication",
                Side::Client => "client authentication",
            },
        },
        E::CaUsedAsEndEntity => Reason::Signing,
        E::NameConstraintViolation | E::MalformedNameConstraint | E::UnsupportedNameType => {
            Reason::NameConstraints { offered: leaf.sans() }
        }
        E::EndEntityUsedAsCa => Reason::Authority("a certificate in its chain is not an authority's"),
        E::PathLenConstraintViolated => {
            Reason::Authority("an authority in its chain has more authorities below it than it may")
        }
        E::IssuerNotCrlSigner => Reason::Authority("an authority in its chain may not sign its revocation list"),
        E::MaximumPathDepthExceeded => Reason::Authority("its chain is too long"),
        E::UnknownRevocationStatus => Reason::RevocationUnknown("an authority in its chain has no revocation list"),
        E::CrlExpired { .. } => {
            Reason::RevocationUnknown("the revocation list of an authority in its chain is too old")
        }
        E::InvalidCrlSignatureForPublicKey => {
            Reason::RevocationUnknown("the revocation list of an authority in its chain is not signed by it")
        }
        E::UnsupportedSignatureAlgorithmContext(_) | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            Reason::WeakSignature
        }
        E::UnsupportedCertVersion => Reason::Form("is not an X.509 certificate of version 3"),
        E::UnsupportedCriticalExtension => Reason::Form("has a critical extension that is not understood"),
        E::ExtensionValueInvalid => Reason::Form("has an extension twice, or one that is malformed"),
        E::InvalidSerialNumber => Reason::Form("has a serial number that is not valid"),
        E::SignatureAlgorithmMismatch => Reason::Form("names two signature algorithms"),
        other => Reason::Other(format!("{other}")),
    }
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, Some(server_name), now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms).map_err(|error| self.unproven(cert, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms).map_err(|error| self.unproven(cert, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    /// None: clients then send whatever certificate they have, and intermediates stay possible.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, None, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms).map_err(|error| self.unproven(cert, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms).map_err(|error| self.unproven(cert, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
