//! The bad certificates, the rules that they break, and what is said about them.

use super::forge::*;
use crate::support::*;
use mesh_tls::{MemorySource, PeerCheck, RevocationPolicy, SanKind, SanMatcher, Source, TrustBundle, TrustRoots};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, KeyPair,
    KeyUsagePurpose, NameConstraints, SanType, date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;

const MALLORY: &str = "spiffe://td/mallory";
const OID_SAN: &[u64] = &[2, 5, 29, 17];
const OID_NAME_CONSTRAINTS: &[u64] = &[2, 5, 29, 30];

/// What is presented, whether it fits together or not.
pub(super) struct Case {
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// PKCS#8.
    pub(super) key: Vec<u8>,
}

/// What the verifying side asks.
#[derive(Clone)]
pub(super) struct Rules {
    pub(super) roots: Arc<TrustRoots>,
    pub(super) check: PeerCheck,
    pub(super) san_matchers: Vec<SanMatcher>,
}

impl Rules {
    pub(super) fn source(&self) -> Arc<dyn Source> {
        Arc::new(MemorySource::new("rules", None, Some(self.roots.clone())))
    }
}

impl From<Pair> for Case {
    fn from(pair: Pair) -> Self {
        let (chain, key) = pair.der();
        Self { chain: chain.into_iter().map(Into::into).collect(), key }
    }
}

impl Case {
    fn then(mut self, certificate: &CertificateDer<'static>) -> Self {
        self.chain.push(certificate.clone());
        self
    }
}

fn rules(ca: &Ca) -> Rules {
    Rules { roots: ca.roots(), check: PeerCheck::Spiffe, san_matchers: vec![] }
}

pub(super) fn good() -> (Case, Rules) {
    let ca = Ca::new("root");
    let below = ca.intermediate("below", |_| {});
    (Case::from(below.svid(MALLORY)).then(below.der()), rules(&ca))
}

type Bad = (String, Case, Rules, &'static str);

/// Collects the cases of one authority.
struct Collection {
    ca: Ca,
    all: Vec<Bad>,
}

impl Collection {
    fn add(&mut self, name: &str, case: impl Into<Case>, reason: &'static str) {
        self.with(name, case, |_| {}, reason);
    }

    fn with(&mut self, name: &str, case: impl Into<Case>, edit: impl FnOnce(&mut Rules), reason: &'static str) {
        let mut rules = rules(&self.ca);
        edit(&mut rules);
        self.all.push((name.to_owned(), case.into(), rules, reason));
    }

    /// A certificate of Mallory's with one thing changed.
    fn issue(&self, edit: impl FnOnce(&mut CertificateParams)) -> Pair {
        self.ca.issue(|params| {
            params.subject_alt_names.push(uri(MALLORY));
            edit(params);
        })
    }

    /// Mallory's certificate below an intermediate with one thing changed.
    fn below(&self, edit: impl FnOnce(&mut CertificateParams)) -> Case {
        let below = self.ca.intermediate("below", edit);
        Case::from(below.svid(MALLORY)).then(below.der())
    }

    /// Mallory's certificate, taken apart and signed by the authority again.
    fn forged(&self, algorithm: Option<&[u8]>, edit: impl FnOnce(&mut Vec<Vec<u8>>)) -> Case {
        let mut case = Case::from(self.ca.svid(MALLORY));
        case.chain[0] = forge(&case.chain[0], self.ca.key(), algorithm, edit);
        case
    }
}

pub(super) fn bad() -> Vec<Bad> {
    let mut all = Collection { ca: Ca::new("root"), all: vec![] };
    validity_and_usage(&mut all);
    chains(&mut all);
    revocation(&mut all);
    names(&mut all);
    spiffe_ids(&mut all);
    constraints(&mut all);
    forms(&mut all);
    all.all
}

fn validity_and_usage(all: &mut Collection) {
    let pair = all.issue(|p| p.not_after = date_time_ymd(2020, 5, 1));
    all.add("expired", pair, "td/mallory was refused: it expired at 2020-05-01T00:00:00Z");
    let pair = all.issue(|p| p.not_before = date_time_ymd(2090, 1, 1));
    all.add("not yet valid", pair, "it is not valid before 2090-01-01T00:00:00Z");
    let case = all.below(|p| p.not_after = date_time_ymd(2020, 5, 1));
    all.add("expired intermediate", case, "a certificate in its chain expired at 2020-05-01");
    let case = all.below(|p| p.not_before = date_time_ymd(2090, 1, 1));
    all.add("intermediate not yet valid", case, "a certificate in its chain is not valid before 2090-01-01");
    let pair = all.issue(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]);
    all.add("wrong usage", pair, "its extended key usage does not include");
    let case = all.below(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::EmailProtection]);
    all.add("wrong usage of an intermediate", case, "its extended key usage does not include");
    let pair = all.issue(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    all.add("an authority as a workload", pair, "it is a signing certificate, not a leaf");
    let pair = all.issue(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign));
    all.add("a workload that may sign", pair, "it is a signing certificate, not a leaf");
    let pair = all.issue(|p| p.key_usages.push(KeyUsagePurpose::CrlSign));
    all.add("a workload that may revoke", pair, "it is a signing certificate, not a leaf");
}

fn chains(all: &mut Collection) {
    const UNTRUSTED: &str = "is not signed by a certificate authority that we trust";
    all.add("another authority", Ca::new("other").svid(MALLORY), UNTRUSTED);
    all.add("an authority of the same name", Ca::new("root").svid(MALLORY), UNTRUSTED);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.subject_alt_names.push(uri(MALLORY));
    let chain = params.self_signed(&key).unwrap().pem();
    all.add("self-signed", Pair { chain, key: key.serialize_pem() }, UNTRUSTED);
    let mut case = all.below(|_| {});
    case.chain.truncate(1);
    all.add("missing intermediate", case, UNTRUSTED);
    let mut case = all.below(|_| {});
    case.chain.reverse();
    all.add("wrong order", case, "exactly one URI SAN with a SPIFFE id, it has none");
    const NO_AUTHORITY: &str = "a certificate in its chain is not an authority's";
    let case = all.below(|p| p.is_ca = IsCa::ExplicitNoCa);
    all.add("an authority without the bit", case, NO_AUTHORITY);
    let case = all.below(|p| p.is_ca = IsCa::NoCa);
    all.add("an authority without basic constraints", case, NO_AUTHORITY);
    let case = all.below(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    all.add("an authority that may not sign", case, NO_AUTHORITY);
    let leaf = all.ca.intermediate("leaf", |p| {
        p.is_ca = IsCa::NoCa;
        p.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        p.subject_alt_names.push(uri("spiffe://td/innocent"));
    });
    let case = Case::from(leaf.svid(MALLORY)).then(leaf.der());
    all.add("a leaf signed by a leaf", case, NO_AUTHORITY);
    let last = all.ca.intermediate("last", |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let more = last.intermediate("more", |_| {});
    let case = Case::from(more.svid(MALLORY)).then(more.der()).then(last.der());
    all.add("path length exceeded", case, "has more authorities below it than it may");
    let mut case = Case::from(all.ca.svid(MALLORY));
    case.key = Case::from(all.ca.svid(MALLORY)).key;
    all.add("the key of another certificate", case, "did not prove to have its private key");
    // trust domains
    let other = Ca::new("other");
    let map = |ours: &Ca, other: &Ca| {
        let bundle = |ca: &Ca| TrustBundle::from_pem(ca.pem().as_bytes()).unwrap();
        let domains = [("td".parse().unwrap(), bundle(ours)), ("far".parse().unwrap(), bundle(other))];
        Arc::new(TrustRoots::by_trust_domain(domains))
    };
    let roots = map(&all.ca, &other);
    let far = all.ca.svid("spiffe://far/mallory");
    all.with("other domain", far, |r| r.roots = roots.clone(), "that we trust for trust domain far");
    let unknown = all.ca.svid("spiffe://unknown/mallory");
    let reason = "its trust domain unknown is not one of those that we trust ([far, td])";
    all.with("unknown domain", unknown, |r| r.roots = roots.clone(), reason);
    let dns = all.ca.issue(|p| p.subject_alt_names.push(dns("a.td")));
    let edit = |r: &mut Rules| (r.roots, r.check) = (roots, PeerCheck::Chain);
    all.with("no id where roots go by domain", dns, edit, "exactly one URI SAN with a SPIFFE id, it has none");
}

fn revocation(all: &mut Collection) {
    let lists = |ca: &Ca, lists: &[Vec<u8>], policy| {
        let roots = TrustRoots::from_pem(ca.pem().as_bytes()).unwrap();
        Arc::new(roots.with_crls(lists.iter().map(Vec::as_slice), policy).unwrap())
    };
    let lax = RevocationPolicy::default();
    let leaf = all.ca.svid(MALLORY);
    let roots = lists(&all.ca, &[all.ca.crl(&[&leaf])], lax);
    all.with("revoked", leaf.clone(), |r| r.roots = roots, "td/mallory was refused: it was revoked");
    let old = all.ca.crl_until(&[&leaf], date_time_ymd(2020, 6, 1));
    let roots = lists(&all.ca, std::slice::from_ref(&old), lax);
    all.with("revoked by an old list", leaf, |r| r.roots = roots, "td/mallory was refused: it was revoked");
    let below = all.ca.intermediate("below", |_| {});
    let revoked = Pair { chain: below.pem(), key: String::new() };
    let roots = lists(&all.ca, &[all.ca.crl(&[&revoked])], lax);
    let case = Case::from(below.svid(MALLORY)).then(below.der());
    all.with("revoked intermediate", case, |r| r.roots = roots, "a certificate in its chain was revoked");
    let strict = RevocationPolicy { refuse_unlisted_authorities: true, refuse_expired_lists: true };
    let roots = lists(&all.ca, &[Ca::new("other").crl(&[])], strict);
    let leaf = all.ca.svid(MALLORY);
    let reason = "an authority in its chain has no revocation list";
    all.with("no list", leaf.clone(), |r| r.roots = roots, reason);
    let roots = lists(&all.ca, &[old], strict);
    let reason = "the revocation list of an authority in its chain is too old";
    all.with("old list", leaf.clone(), |r| r.roots = roots, reason);
    let roots = lists(&all.ca, &[Ca::new("root").crl(&[])], lax);
    all.with("a list signed by another", leaf, |r| r.roots = roots, "chain is not signed by it");
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

fn names(all: &mut Collection) {
    const NOT_ONE: &str = "exactly one URI SAN with a SPIFFE id, it has";
    let pair = all.issue(|p| p.subject_alt_names.push(uri("spiffe://td/admin")));
    all.add("two URI SANs", pair, "it has [spiffe://td/mallory, spiffe://td/admin]");
    let pair = all.issue(|p| p.subject_alt_names.push(uri(MALLORY)));
    all.add("the same URI twice", pair, NOT_ONE);
    let pair = all.issue(|p| p.subject_alt_names.push(uri("https://td/")));
    all.add("a second URI that is no id", pair, NOT_ONE);
    for (name, san) in [
        ("no SAN", None),
        ("DNS only", Some(dns("mallory.td"))),
        ("a DNS name that looks like an id", Some(dns(MALLORY))),
        ("IP only", Some(SanType::IpAddress([10, 0, 0, 1].into()))),
        ("e-mail only", Some(SanType::Rfc822Name(MALLORY.try_into().unwrap()))),
    ] {
        let pair = all.ca.issue(|p| p.subject_alt_names.extend(san));
        all.add(name, pair, "exactly one URI SAN with a SPIFFE id, it has none");
    }
    let many = |n: usize| (0..n).map(|i| uri(&format!("spiffe://td/{i}")));
    let pair = all.issue(|p| p.subject_alt_names.extend(many(1000)));
    all.add("1001 URI SANs", pair, "and 993 more]");
    let pair = all.issue(|p| p.subject_alt_names.extend((0..6000).map(|i| dns(&format!("mallory-{i}.td")))));
    all.add("a SAN list of more than 64 KiB", pair, "HandshakePayloadTooLarge");
    let exact = |name: &str| SanMatcher::Exact(name.into());
    for (name, presented, wanted) in [
        ("a wildcard for two labels", "*.td.example", "a.b.td.example"),
        ("a wildcard for no label", "*.td.example", "td.example"),
        ("a wildcard within a label", "a*.td.example", "ab.td.example"),
        ("a wildcard for a top-level domain", "*.example", "td.example"),
        ("two wildcards", "*.*.example", "a.td.example"),
        ("nothing but a wildcard", "*", "a"),
    ] {
        let pair = all.ca.issue(|p| p.subject_alt_names.push(dns(presented)));
        let edit = |r: &mut Rules| (r.check, r.san_matchers) = (PeerCheck::Chain, vec![exact(wanted)]);
        all.with(name, pair, edit, "no subject alternative name matches: wanted");
    }
    let prefix =
        || SanMatcher::Matches { description: "prefix td".into(), matches: Arc::new(|s| s.starts_with("td.example")) };
    let pair = all.ca.issue(|p| p.subject_alt_names.push(dns("td.example\0.mallory.example")));
    let edit = |r: &mut Rules| (r.check, r.san_matchers) = (PeerCheck::Chain, vec![prefix()]);
    all.with("NUL in a DNS name", pair, edit, "it is malformed");
    let pair = all.ca.svid("spiffe://td/admin\0/mallory");
    all.add("NUL in a URI", pair, "it is malformed");
    let edit = |r: &mut Rules| r.san_matchers = vec![exact("spiffe://td/admin")];
    let pair = all.ca.svid(MALLORY);
    all.with("another workload", pair, edit, "wanted spiffe://td/admin, offered URI:spiffe://td/mallory");
    let pair = all.issue(|p| p.subject_alt_names.push(dns("spiffe://td/admin")));
    let edit = |r: &mut Rules| r.san_matchers = vec![SanMatcher::typed(SanKind::Uri, exact("spiffe://td/admin"))];
    all.with("the right name of the wrong kind", pair, edit, "wanted URI:spiffe://td/admin, offered");
    let pair = all.issue(|p| p.subject_alt_names.push(dns("10.0.0.1")));
    let edit = |r: &mut Rules| r.san_matchers = vec![SanMatcher::typed(SanKind::Ip, exact("10.0.0.1"))];
    all.with("an address as a DNS name", pair, edit, "wanted IP:10.0.0.1, offered");
}

fn spiffe_ids(all: &mut Collection) {
    let long = format!("spiffe://td/{}", "a".repeat(2048));
    for (id, reason) in [
        ("spiffe://td/a?admin", "has '?' in its path"),
        ("spiffe://td/a#admin", "has '#' in its path"),
        ("spiffe://td:80/a", "has ':' in its trust domain"),
        ("spiffe://admin@td/a", "has '@' in its trust domain"),
        ("spiffe://TD/a", "has 'T' in its trust domain"),
        ("spiffe://t%64/a", "has '%' in its trust domain"),
        ("spiffe://td/%61", "has '%' in its path"),
        ("SPIFFE://td/a", "does not begin with spiffe://"),
        ("https://td/a", "does not begin with spiffe://"),
        ("spiffe:///a", "has no trust domain"),
        ("spiffe://td", "has no path: it names a trust domain, not a workload"),
        ("spiffe://td/", "has an empty path segment"),
        ("spiffe://td//a", "has an empty path segment"),
        ("spiffe://td/a/../admin", "has a relative path segment"),
        (long.as_str(), "is 2060 bytes long, the limit is 2048"),
    ] {
        let pair = all.ca.svid(id);
        all.add(id.get(..60).unwrap_or(id), pair, reason);
    }
}

fn constraints(all: &mut Collection) {
    const FORBIDDEN: &str = "name constraints of an authority in its chain do not allow its names";
    let constrained = |all: &Collection, permitted, excluded, sans: Vec<SanType>| {
        let below = all.ca.intermediate("below", |p| {
            p.name_constraints = Some(NameConstraints { permitted_subtrees: permitted, excluded_subtrees: excluded });
        });
        let pair = below.issue(|p| {
            p.subject_alt_names.push(uri(MALLORY));
            p.subject_alt_names.extend(sans);
        });
        Case::from(pair).then(below.der())
    };
    let name = |text: &str| GeneralSubtree::DnsName(text.into());
    let case = constrained(all, vec![name("good.example")], vec![], vec![dns("bad.example")]);
    all.add("a DNS name that is not permitted", case, FORBIDDEN);
    let case = constrained(all, vec![], vec![name("bad.example")], vec![dns("a.bad.example")]);
    all.add("a DNS name that is excluded", case, FORBIDDEN);
    let case = constrained(all, vec![name("good.example")], vec![], vec![dns("notgood.example")]);
    all.add("a DNS name that only ends like a permitted one", case, FORBIDDEN);
    let net = GeneralSubtree::IpAddress(rcgen::CidrSubnet::V4([10, 0, 0, 0], [255, 0, 0, 0]));
    let case = constrained(all, vec![net], vec![], vec![SanType::IpAddress([11, 0, 0, 1].into())]);
    all.add("an address that is not permitted", case, FORBIDDEN);
    for (name, tag) in [("URIs that are permitted", 0xa0), ("URIs that are excluded", 0xa1)] {
        let subtree = tlv(SEQUENCE, &tlv(0x86, b"td"));
        let content = tlv(SEQUENCE, &tlv(tag, &subtree));
        let mut extension = CustomExtension::from_oid_content(OID_NAME_CONSTRAINTS, content);
        extension.set_criticality(true);
        let case = all.below(|p| p.custom_extensions.push(extension));
        all.add(name, case, FORBIDDEN);
    }
}

fn forms(all: &mut Collection) {
    let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
    unknown.set_criticality(true);
    let pair = all.issue(|p| p.custom_extensions.push(unknown.clone()));
    all.add("a critical extension that nobody knows", pair, "a critical extension that is not understood");
    let case = all.below(|p| p.custom_extensions.push(unknown));
    all.add("the same in an intermediate", case, "a critical extension that is not understood");
    let case = all.forged(None, |inner| {
        let at = inner.iter().position(|part| part[0] == EXTENSIONS).unwrap();
        let mut extensions = parts(content(content(&inner[at])));
        let again = extensions.iter().find(|e| e.windows(3).any(|w| w == [0x55, 0x1d, 0x11])).unwrap().clone();
        extensions.push(again);
        inner[at] = tlv(EXTENSIONS, &tlv(SEQUENCE, &extensions.concat()));
    });
    all.add("an extension twice", case, "has an extension twice, or one that is malformed");
    let case = all.forged(None, |inner| inner.retain(|part| ![VERSION, EXTENSIONS].contains(&part[0])));
    all.add("version 1", case, "is not an X.509 certificate of version 3");
    let case = all.forged(Some(ECDSA_SHA1), |inner| named(inner, ECDSA_SHA1));
    all.add("a signature with SHA-1", case, "too weak or not supported");
    let case = all.forged(Some(ECDSA_SHA1), |_| {});
    all.add("two signature algorithms", case, "names two signature algorithms");
    let case = all.forged(None, |inner| with_key(inner, weak_rsa_key()));
    all.add("a weak key of another kind", case, "did not prove to have its private key");
    // an authority with a weak key
    let below = all.ca.intermediate("below", |_| {});
    let weak = forge(below.der(), all.ca.key(), None, |inner| with_key(inner, weak_rsa_key()));
    let mut case = Case::from(below.svid(MALLORY)).then(&weak);
    case.chain[0] = forge(&case.chain[0], below.key(), Some(RSA_SHA256), |inner| named(inner, RSA_SHA256));
    all.add("an authority with a weak key", case, "is not signed by a certificate authority that we trust");
    let cut = |all: &Collection, edit: fn(&mut Vec<u8>)| {
        let mut case = Case::from(all.ca.svid(MALLORY));
        let mut der = case.chain[0].to_vec();
        edit(&mut der);
        case.chain[0] = der.into();
        case
    };
    let case = cut(all, |der| der.truncate(der.len() - 10));
    all.add("cut off", case, "it is malformed");
    let case = cut(all, |der| der.push(0));
    all.add("something after its end", case, "it is malformed");
    let case = cut(all, |der| *der = b"not a certificate".to_vec());
    all.add("no certificate at all", case, "it is malformed");
    for (name, names) in [
        ("an address of five bytes", vec![tlv(0x86, MALLORY.as_bytes()), tlv(0x87, &[1, 2, 3, 4, 5])]),
        ("letters that are not ASCII", vec![tlv(0x86, "spiffe://td/m\u{e4}llory".as_bytes())]),
        ("a name that runs over its end", vec![vec![0x86, 100, b's']]),
    ] {
        let san = CustomExtension::from_oid_content(OID_SAN, tlv(SEQUENCE, &names.concat()));
        let pair = all.ca.issue(|p| p.custom_extensions.push(san));
        all.add(name, pair, "it is malformed");
    }
}
