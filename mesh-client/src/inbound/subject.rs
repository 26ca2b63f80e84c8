//! The subject of a certificate as RFC 2253 writes it, which is how Envoy and gRPC compare it.

use std::fmt::Write as _;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
/// UTF-16.
const BMP_STRING: u8 = 0x1e;

/// Of a certificate in DER; `None`: it cannot be read. The last relative name comes first.
pub(super) fn subject(der: &[u8]) -> Option<String> {
    let mut tbs = of(SEQUENCE, of(SEQUENCE, der)?)?;
    if tbs.first() == Some(&0xa0) {
        tbs = value(tbs)?.2;
    }
    // Serial number, algorithm, issuer, validity.
    for _ in 0..4 {
        tbs = value(tbs)?.2;
    }
    let mut names = of(SEQUENCE, tbs)?;
    let mut parts = Vec::new();
    while !names.is_empty() {
        let (tag, set, rest) = value(names)?;
        names = rest;
        if tag != SET {
            return None;
        }
        parts.push(relative(set)?);
    }
    parts.reverse();
    Some(parts.join(","))
}

/// One relative name; several attributes are joined with `+`.
fn relative(mut set: &[u8]) -> Option<String> {
    let mut attributes = Vec::new();
    while !set.is_empty() {
        let (tag, attribute, rest) = value(set)?;
        set = rest;
        if tag != SEQUENCE {
            return None;
        }
        let (tag, oid, rest) = value(attribute)?;
        if tag != OID {
            return None;
        }
        let (tag, bytes, _) = value(rest)?;
        attributes.push(format!("{}={}", name(oid), escaped(&text(tag, bytes))));
    }
    Some(attributes.join("+"))
}

fn name(oid: &[u8]) -> String {
    let known = match oid {
        [0x55, 4, 3] => "CN",
        [0x55, 4, 5] => "serialNumber",
        [0x55, 4, 6] => "C",
        [0x55, 4, 7] => "L",
        [0x55, 4, 8] => "ST",
        [0x55, 4, 9] => "street",
        [0x55, 4, 10] => "O",
        [0x55, 4, 11] => "OU",
        [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1] => "UID",
        [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25] => "DC",
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1] => "emailAddress",
        _ => return dotted(oid),
    };
    known.to_owned()
}

fn dotted(oid: &[u8]) -> String {
    let Some((first, rest)) = oid.split_first() else { return String::new() };
    let mut text = format!("{}.{}", first / 40, first % 40);
    let mut number = 0u64;
    for byte in rest {
        number = number << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            // Writing to a String does not fail.
            let _ = write!(text, ".{number}");
            number = 0;
        }
    }
    text
}

/// A string of ASN.1, by its tag.
fn text(tag: u8, bytes: &[u8]) -> String {
    if tag == BMP_STRING {
        let units = bytes.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
        return char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    }
    // What is not UTF-8 is Latin-1.
    std::str::from_utf8(bytes).map_or_else(|_| bytes.iter().map(|byte| char::from(*byte)).collect(), str::to_owned)
}

/// RFC 2253 §2.4; what is not printable ASCII as hexadecimal pairs, as OpenSSL writes it (`XN_FLAG_RFC2253`), and with it Envoy.
fn escaped(text: &str) -> String {
    let last = text.len().saturating_sub(1);
    text.bytes().enumerate().fold(String::with_capacity(text.len()), |mut out, (at, byte)| {
        let edge = (byte == b' ' && (at == 0 || at == last)) || (byte == b'#' && at == 0);
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => out.extend(['\\', byte.into()]),
            _ if edge => out.extend(['\\', byte.into()]),
            b' '..=b'~' => out.push(byte.into()),
            // Writing to a String does not fail.
            _ => _ = write!(out, "\\{byte:02X}"),
        }
        out
    })
}

/// The contents of the first value, if it has this tag.
fn of(wanted: u8, der: &[u8]) -> Option<&[u8]> {
    let (tag, contents, _) = value(der)?;
    (tag == wanted).then_some(contents)
}

/// Tag, contents, and what follows.
fn value(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(length)?;
    Some((tag, contents, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    fn of_names(names: &[(DnType, &str)]) -> String {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        subject(params.self_signed(&KeyPair::generate().unwrap()).unwrap().der()).unwrap()
    }

    #[test]
    fn names_are_written_as_rfc_2253_has_them() {
        assert_eq!(of_names(&[]), "");
        let names = [(DnType::CountryName, "DE"), (DnType::OrganizationName, "A, B"), (DnType::CommonName, "#x ")];
        assert_eq!(of_names(&names), "CN=\\#x\\ ,O=A\\, B,C=DE");
        assert_eq!(of_names(&[(DnType::CommonName, "a\nb\u{e4}\u{7f}")]), "CN=a\\0Ab\\C3\\A4\\7F");
        assert_eq!(text(BMP_STRING, b"\x00a\x20\xac"), "a\u{20ac}");
        assert_eq!(text(0x14, b"a\xe4"), "a\u{e4}");
        let custom = [(DnType::CustomDnType(vec![1, 2, 840, 113_549, 1]), "v")];
        assert_eq!(of_names(&custom), "1.2.840.113549.1=v");
    }

    #[test]
    fn what_is_no_certificate_has_none() {
        for bytes in [&b""[..], b"0", b"0\x80", b"0\x84\xff\xff\xff\xff", b"0\x030\x01\x02"] {
            assert_eq!(subject(bytes), None, "{bytes:?}");
        }
    }
}
