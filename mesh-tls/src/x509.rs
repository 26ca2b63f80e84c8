//! The few fields of a certificate that webpki does not tell: subject, issuer, validity, key usage and every subject alternative name.
//!
//! Strict on purpose: a name that cannot be read makes the whole certificate unreadable, so that a hidden second URI
//! cannot slip past the rule of exactly one. Trust is never decided here; the chain is webpki's.

use std::{
    fmt,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

/// What a leaf certificate says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) subject: String,
    pub(crate) issuer: String,
    /// Unix seconds.
    pub(crate) not_before: i64,
    /// Unix seconds.
    pub(crate) not_after: i64,
    pub(crate) uri_sans: Vec<String>,
    pub(crate) dns_sans: Vec<String>,
    pub(crate) ip_sans: Vec<IpAddr>,
    pub(crate) email_sans: Vec<String>,
    /// `keyCertSign` or `cRLSign` is set, which an X.509-SVID leaf must not have (X509-SVID §4.3).
    pub(crate) may_sign: bool,
    /// There is a key usage, and it does not include `keyCertSign`: not an authority (RFC 5280 §4.2.1.3).
    pub(crate) may_not_issue: bool,
}

/// The certificate is not DER of the expected shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

type Parsed<T> = Result<T, Malformed>;

const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const EXTENSIONS: u8 = 0xa3;
const OID_COMMON_NAME: &[u8] = &[0x55, 4, 3];
const OID_ORGANIZATION: &[u8] = &[0x55, 4, 10];
const OID_KEY_USAGE: &[u8] = &[0x55, 0x1d, 15];
const OID_SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 17];

impl Leaf {
    pub(crate) fn parse(der: &[u8]) -> Parsed<Self> {
        let mut outer = Reader(der);
        let mut tbs = Reader(Reader(outer.expect(SEQUENCE)?).expect(SEQUENCE)?);
        if tbs.0.first() == Some(&0xa0) {
            tbs.next()?; // version
        }
        tbs.next()?; // serial number
        tbs.expect(SEQUENCE)?; // signature algorithm
        let issuer = distinguished_name(tbs.expect(SEQUENCE)?)?;
        let mut validity = Reader(tbs.expect(SEQUENCE)?);
        let (not_before, not_after) = (time(validity.next()?)?, time(validity.next()?)?);
        let subject = distinguished_name(tbs.expect(SEQUENCE)?)?;
        tbs.expect(SEQUENCE)?; // public key
        let mut leaf = Self { subject, issuer, not_before, not_after, ..Self::default() };
        while !tbs.0.is_empty() {
            let (tag, value) = tbs.next()?;
            if tag == EXTENSIONS {
                leaf.read_extensions(value)?;
            }
        }
        Ok(leaf)
    }

    fn read_extensions(&mut self, value: &[u8]) -> Parsed<()> {
        let mut extensions = Reader(Reader(value).expect(SEQUENCE)?);
        while !extensions.0.is_empty() {
            let mut extension = Reader(extensions.expect(SEQUENCE)?);
            let oid = extension.expect(OID)?;
            let (mut tag, mut value) = extension.next()?;
            if tag != OCTET_STRING {
                (tag, value) = extension.next()?; // after the critical flag
            }
            if tag != OCTET_STRING {
                return Err(Malformed);
            }
            match oid {
                OID_SUBJECT_ALT_NAME => self.read_names(value)?,
                OID_KEY_USAGE => {
                    // unused-bits count, then bit 5 (keyCertSign) and bit 6 (cRLSign) of the first byte
                    let bits = Reader(value).expect(BIT_STRING)?;
                    let bits = bits.get(1).copied().unwrap_or_default();
                    self.may_sign = bits & 0b0000_0110 != 0;
                    self.may_not_issue = bits & 0b0000_0100 == 0;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn read_names(&mut self, value: &[u8]) -> Parsed<()> {
        let mut names = Reader(Reader(value).expect(SEQUENCE)?);
        while !names.0.is_empty() {
            match names.next()? {
                (0x81, email) => self.email_sans.push(ascii(email)?),
                (0x82, dns) => self.dns_sans.push(ascii(dns)?),
                (0x86, uri) => self.uri_sans.push(ascii(uri)?),
                (0x87, ip) => match (<[u8; 4]>::try_from(ip), <[u8; 16]>::try_from(ip)) {
                    (Ok(v4), _) => self.ip_sans.push(v4.into()),
                    (_, Ok(v6)) => self.ip_sans.push(v6.into()),
                    _ => return Err(Malformed),
                },
                _ => {} // directory names and others: not used
            }
        }
        Ok(())
    }

    /// How messages call this certificate: its SANs, or else its subject.
    pub(crate) fn name(&self) -> String {
        match self.uri_sans.first().or(self.dns_sans.first()) {
            Some(name) => name.clone(),
            None => match self.ip_sans.first() {
                Some(ip) => ip.to_string(),
                None if self.subject.is_empty() => "(no name)".to_owned(),
                None => self.subject.clone(),
            },
        }
    }

    /// Every SAN with its kind, as errors print it.
    pub(crate) fn sans(&self) -> Vec<String> {
        let uris = self.uri_sans.iter().map(|s| format!("URI:{s}"));
        let dns = self.dns_sans.iter().map(|s| format!("DNS:{s}"));
        let ips = self.ip_sans.iter().map(|s| format!("IP:{s}"));
        let emails = self.email_sans.iter().map(|s| format!("email:{s}"));
        uris.chain(dns).chain(ips).chain(emails).collect()
    }
}

/// Reads DER values one after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Tag and contents of the next value.
    fn next(&mut self) -> Parsed<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first().ok_or(Malformed)?;
        let (&first, rest) = rest.split_first().ok_or(Malformed)?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x83 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f)).ok_or(Malformed)?;
                (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
            }
            _ => return Err(Malformed),
        };
        let (value, rest) = rest.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok((tag, value))
    }

    fn expect(&mut self, tag: u8) -> Parsed<&'a [u8]> {
        match self.next()? {
            (found, value) if found == tag => Ok(value),
            _ => Err(Malformed),
        }
    }
}

/// IA5 text without control characters: a NUL in a name is an attack on those who stop reading there.
fn ascii(bytes: &[u8]) -> Parsed<String> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.is_ascii() && !text.contains(|c: char| c.is_ascii_control()) => Ok(text.to_owned()),
        _ => Err(Malformed),
    }
}

/// `CN=a, O=b`: the parts that help a reader; others are left out.
fn distinguished_name(value: &[u8]) -> Parsed<String> {
    let mut sets = Reader(value);
    let mut name = String::new();
    while !sets.0.is_empty() {
        let mut set = Reader(sets.expect(SET)?);
        while !set.0.is_empty() {
            let mut attribute = Reader(set.expect(SEQUENCE)?);
            let label = match attribute.expect(OID)? {
                OID_COMMON_NAME => "CN=",
                OID_ORGANIZATION => "O=",
                _ => continue,
            };
            let (_, text) = attribute.next()?;
            if !name.is_empty() {
                name.push_str(", ");
            }
            name.push_str(label);
            name.push_str(&String::from_utf8_lossy(text));
        }
    }
    Ok(name)
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ` to Unix seconds (RFC 5280 §4.1.2.5).
fn time((tag, text): (u8, &[u8])) -> Parsed<i64> {
    let digits = text.strip_suffix(b"Z").ok_or(Malformed)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return Err(Malformed);
    }
    let number = |from: usize, to: usize| digits[from..to].iter().fold(0, |n, d| n * 10 + i64::from(d - b'0'));
    let (year, at) = match (tag, digits.len()) {
        (UTC_TIME, 12) => (number(0, 2) + if number(0, 2) < 50 { 2000 } else { 1900 }, 2),
        (GENERALIZED_TIME, 14) => (number(0, 4), 4),
        _ => return Err(Malformed),
    };
    let (month, day) = (number(at, at + 2), number(at + 2, at + 4));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return Err(Malformed);
    }
    let seconds = number(at + 4, at + 6) * 3600 + number(at + 6, at + 8) * 60 + number(at + 8, at + 10);
    Ok(days_from_civil(year, month, day) * 86_400 + seconds)
}

/// Days since 1970-01-01 in the Gregorian calendar, counted from March so that leap days come last.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Unix seconds shown as `2026-11-21T09:30:00Z`.
#[derive(Clone, Copy)]
pub(crate) struct Utc(pub(crate) i64);

impl From<SystemTime> for Utc {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Self(i64::try_from(since.as_secs()).unwrap_or(i64::MAX)),
            Err(before) => Self(i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds)),
        }
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days = self.0.div_euclid(86_400) + 719_468;
        let second = self.0.rem_euclid(86_400);
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        let (hour, minute) = (second / 3600, second / 60 % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, KeyUsagePurpose, SanType};

    fn certificate() -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["a.example".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://td/a".try_into().unwrap()));
        params.distinguished_name.push(DnType::CommonName, "it");
        params.not_before = rcgen::date_time_ymd(1999, 12, 31);
        params.not_after = rcgen::date_time_ymd(2060, 2, 29);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn fields_of_a_certificate_are_read() {
        let leaf = Leaf::parse(&certificate()).unwrap();
        assert!(leaf.subject.contains("CN=it"), "{leaf:?}");
        assert_eq!(leaf.uri_sans, ["spiffe://td/a"]);
        assert_eq!(leaf.sans(), ["URI:spiffe://td/a", "DNS:a.example", "IP:10.0.0.1"]);
        assert_eq!(Utc(leaf.not_before).to_string(), "1999-12-31T00:00:00Z");
        assert_eq!(Utc(leaf.not_after).to_string(), "2060-02-29T00:00:00Z");
        assert!(!leaf.may_sign);
    }

    #[test]
    fn signing_usage_is_seen() {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign];
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert!(Leaf::parse(der.der()).unwrap().may_sign);
    }

    proptest! {
        #[test]
        fn dates_round_trip(seconds in -62_135_596_800i64..253_402_300_799) {
            let text = Utc(seconds).to_string();
            let digits: String = text.chars().filter(char::is_ascii_digit).collect();
            prop_assert_eq!(time((GENERALIZED_TIME, format!("{digits}Z").as_bytes())), Ok(seconds));
        }

        #[test]
        fn damaged_certificates_do_not_panic(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let der = certificate();
            let mut damaged = der.clone();
            damaged[at.index(der.len())] = byte;
            let _ = Leaf::parse(&damaged);
            prop_assert_eq!(Leaf::parse(&der[..cut.index(der.len())]), Err(Malformed));
        }
    }
}
