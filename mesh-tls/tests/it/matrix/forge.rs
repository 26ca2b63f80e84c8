//! Certificates that no tool makes: parts of a good one exchanged, and signed again.

use rcgen::{KeyPair, SigningKey};
use rustls_pki_types::CertificateDer;

pub(super) const SEQUENCE: u8 = 0x30;
/// `[0]`, the version, and `[3]`, the extensions, of a certificate's inner part.
pub(super) const VERSION: u8 = 0xa0;
pub(super) const EXTENSIONS: u8 = 0xa3;
/// Algorithm identifiers: ECDSA with SHA-1, with SHA-256, and RSA with SHA-256.
pub(super) const ECDSA_SHA1: &[u8] = &[0x30, 9, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1];
pub(super) const RSA_SHA256: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 0x0b, 5, 0];
const ECDSA_SHA256: &[u8] = &[0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
const RSA: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];

/// One DER value.
pub(super) fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap();
    let header = match length {
        0..=0x7f => vec![tag, length.to_be_bytes()[1]],
        0x80..=0xff => vec![tag, 0x81, length.to_be_bytes()[1]],
        _ => [&[tag, 0x82][..], &length.to_be_bytes()].concat(),
    };
    [&header, content].concat()
}

/// The values that follow each other, each with its tag and length.
pub(super) fn parts(mut der: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    while !der.is_empty() {
        let (header, length) = match der[1] {
            n @ 0..=0x7f => (2, usize::from(n)),
            0x81 => (3, usize::from(der[2])),
            0x82 => (4, usize::from(der[2]) << 8 | usize::from(der[3])),
            other => panic!("a length of {other:#x}"),
        };
        parts.push(der[..header + length].to_vec());
        der = &der[header + length..];
    }
    parts
}

/// What is inside a value.
pub(super) fn content(der: &[u8]) -> &[u8] {
    match der[1] {
        0..=0x7f => &der[2..],
        0x81 => &der[3..],
        _ => &der[4..],
    }
}

/// Edits the parts of the inner certificate, and signs it; the outer part names `algorithm`, or that of the signature.
pub(super) fn forge(
    certificate: &[u8],
    issuer: &KeyPair,
    algorithm: Option<&[u8]>,
    edit: impl FnOnce(&mut Vec<Vec<u8>>),
) -> CertificateDer<'static> {
    let mut inner = parts(content(&parts(content(certificate))[0]));
    edit(&mut inner);
    let inner = tlv(SEQUENCE, &inner.concat());
    let signature = [&[0][..], &issuer.sign(&inner).unwrap()].concat();
    let outer = [inner, algorithm.unwrap_or(ECDSA_SHA256).to_vec(), tlv(3, &signature)];
    tlv(SEQUENCE, &outer.concat()).into()
}

/// Exchanges the signature algorithm of the inner certificate.
pub(super) fn named(inner: &mut [Vec<u8>], algorithm: &[u8]) {
    let at = inner.iter().position(|part| part == ECDSA_SHA256).unwrap();
    inner[at] = algorithm.to_vec();
}

/// A public key of RSA with 1024 bits.
pub(super) fn weak_rsa_key() -> Vec<u8> {
    let modulus = tlv(2, &[&[0, 0xc3][..], &[0x5a; 126], &[0x0d]].concat());
    let key = tlv(SEQUENCE, &[modulus, tlv(2, &[1, 0, 1])].concat());
    tlv(SEQUENCE, &[RSA.to_vec(), tlv(3, &[&[0][..], &key].concat())].concat())
}

/// The inner parts from the back: extensions, then the public key.
pub(super) fn with_key(inner: &mut [Vec<u8>], key: Vec<u8>) {
    let at = inner.iter().position(|part| part[0] == EXTENSIONS).unwrap() - 1;
    inner[at] = key;
}
