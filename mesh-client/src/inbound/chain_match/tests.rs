//! The table of gRFC A36, and a naive model that looks keys up as Envoy's nested maps do.

use super::*;
use proptest::prelude::*;
use std::sync::Arc;

fn facts(remote: &str, local: &str) -> Facts {
    Facts { remote: remote.parse().unwrap(), local: local.parse().unwrap(), spoken: Spoken::default() }
}

fn range(text: &str) -> CidrRange {
    let (address, bits) = text.split_once('/').unwrap();
    CidrRange::new(address.parse().unwrap(), bits.parse().unwrap()).unwrap()
}

fn chosen(matchers: &[FilterChainMatch], facts: &Facts) -> Option<usize> {
    choose(&matchers.iter().collect::<Vec<_>>(), facts)
}

fn names(texts: &[&str]) -> Vec<ServerName> {
    let name = |text: &&str| match text.strip_prefix('*') {
        Some(suffix) => ServerName::Below(suffix.into()),
        None => ServerName::Exact((*text).into()),
    };
    texts.iter().map(name).collect()
}

#[test]
fn the_most_specific_destination_comes_first_and_there_is_no_way_back() {
    let to = |ranges: &[&str], ports: &[u16]| FilterChainMatch {
        prefix_ranges: ranges.iter().map(|text| range(text)).collect(),
        source_ports: ports.to_vec(),
        ..FilterChainMatch::default()
    };
    let chains = [to(&[], &[]), to(&["10.0.0.0/8"], &[]), to(&["10.1.0.0/16", "192.168.0.0/16"], &[7])];
    assert_eq!(chosen(&chains, &facts("1.1.1.1:7", "10.1.2.3:80")), Some(2));
    assert_eq!(
        chosen(&chains, &facts("1.1.1.1:8", "10.1.2.3:80")),
        None,
        "the longest range decides, though its port fails"
    );
    assert_eq!(chosen(&chains, &facts("1.1.1.1:8", "10.2.2.3:80")), Some(1));
    assert_eq!(chosen(&chains, &facts("1.1.1.1:8", "[::ffff:10.2.2.3]:80")), Some(1));
    assert_eq!(chosen(&chains, &facts("1.1.1.1:8", "[fd00::1]:80")), Some(0));
}

#[test]
fn sources_are_told_apart() {
    let of = |source_type, ranges: &[&str]| FilterChainMatch {
        source_type,
        source_prefix_ranges: ranges.iter().map(|text| range(text)).collect(),
        ..FilterChainMatch::default()
    };
    let chains = [
        of(SourceType::SameIpOrLoopback, &[]),
        of(SourceType::External, &["10.0.0.0/8"]),
        of(SourceType::External, &[]),
    ];
    for (remote, local, expected) in [
        ("127.0.0.1:1", "127.0.0.1:80", Some(0)),
        ("10.9.9.9:1", "10.9.9.9:80", Some(0)),
        ("10.9.9.9:1", "10.9.9.8:80", Some(1)),
        ("11.9.9.9:1", "10.9.9.8:80", Some(2)),
    ] {
        assert_eq!(chosen(&chains, &facts(remote, local)), expected, "{remote} to {local}");
    }
    assert_eq!(chosen(&chains[..2], &facts("11.9.9.9:1", "10.9.9.8:80")), None);
}

#[test]
fn what_istio_says_of_permissive_servers_is_honoured() {
    let tls = |protocols: &[&str]| FilterChainMatch {
        transport: Some(TransportProtocol::Tls),
        application_protocols: protocols.iter().map(|protocol| Arc::from(*protocol)).collect(),
        ..FilterChainMatch::default()
    };
    let raw = FilterChainMatch { transport: Some(TransportProtocol::RawBuffer), ..FilterChainMatch::default() };
    let chains = [tls(&["istio-http/1.1", "istio-h2"]), tls(&[]), raw];
    let spoken = |transport, protocols: &[&str]| Facts {
        spoken: Spoken {
            transport: Some(transport),
            server_name: None,
            protocols: protocols.iter().map(|protocol| (*protocol).to_owned()).collect(),
        },
        ..facts("1.1.1.1:1", "2.2.2.2:2")
    };
    assert_eq!(chosen(&chains, &spoken(TransportProtocol::Tls, &["istio-h2", "h2"])), Some(0));
    assert_eq!(chosen(&chains, &spoken(TransportProtocol::Tls, &["h2"])), Some(1));
    assert_eq!(chosen(&chains, &spoken(TransportProtocol::RawBuffer, &["h2c"])), Some(2));
    assert_eq!(Need::of(&chains), Need::Hello);
    assert_eq!(Need::of(&chains[1..]), Need::Transport);
    assert_eq!(Need::of(&[FilterChainMatch::default()]), Need::Addresses);
}

#[test]
fn exact_names_win_over_suffixes_and_longer_suffixes_over_shorter() {
    let named = |texts: &[&str]| FilterChainMatch { server_names: names(texts), ..FilterChainMatch::default() };
    let chains = [named(&["*.com"]), named(&["*.b.com"]), named(&["a.b.com", "x.org"]), named(&[])];
    for (sent, expected) in [
        (Some("a.b.com"), Some(2)),
        (Some("c.b.com"), Some(1)),
        (Some("b.com"), Some(0)),
        (Some("x.org"), Some(2)),
        (Some("y.org"), Some(3)),
        (None, Some(3)),
    ] {
        let mut facts = facts("1.1.1.1:1", "2.2.2.2:2");
        facts.spoken.server_name = sent.map(str::to_owned);
        assert_eq!(chosen(&chains, &facts), expected, "{sent:?}");
    }
}

/// The keys of one step for a connection, best first. A chain has a key by listing it, or has none and takes `None`.
fn model(matchers: &[FilterChainMatch], facts: &Facts) -> Option<usize> {
    type Test = Box<dyn Fn(&FilterChainMatch) -> bool>;
    let mut left: Vec<usize> = (0..matchers.len()).collect();
    let mut step = |tests: Vec<Test>| {
        let found = tests.iter().find(|test| left.iter().any(|index| test(&matchers[*index])));
        match found {
            Some(test) => left.retain(|index| test(&matchers[*index])),
            None => left.clear(),
        }
        left.clone()
    };
    let ranges = |address: IpAddr, of: fn(&FilterChainMatch) -> &Vec<CidrRange>| -> Vec<Test> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let mut tests: Vec<Test> = Vec::new();
        for bits in (0..=bits).rev() {
            let key = CidrRange::new(address, bits).unwrap();
            tests.push(Box::new(move |m| of(m).contains(&key)));
        }
        tests.push(Box::new(move |m| of(m).is_empty()));
        tests
    };
    let (port, from) = (facts.local.port(), facts.remote.port());
    step(vec![Box::new(move |m| m.destination_port == Some(port)), Box::new(|m| m.destination_port.is_none())]);
    step(ranges(facts.local.ip(), |m| &m.prefix_ranges));
    let mut tests: Vec<Test> = Vec::new();
    if let Some(sent) = facts.spoken.server_name.clone() {
        let exact = ServerName::Exact(sent.as_str().into());
        tests.push(Box::new(move |m| m.server_names.contains(&exact)));
        for (at, _) in sent.match_indices('.') {
            let key = ServerName::Below(sent[at..].into());
            tests.push(Box::new(move |m| m.server_names.contains(&key)));
        }
    }
    tests.push(Box::new(|m| m.server_names.is_empty()));
    step(tests);
    let transport = facts.spoken.transport;
    step(vec![
        Box::new(move |m| m.transport.is_some() && m.transport == transport),
        Box::new(|m| m.transport.is_none()),
    ]);
    let mut tests: Vec<Test> = Vec::new();
    for protocol in facts.spoken.protocols.clone() {
        tests.push(Box::new(move |m| m.application_protocols.iter().any(|listed| **listed == *protocol)));
    }
    tests.push(Box::new(|m| m.application_protocols.is_empty()));
    step(tests);
    let local = facts.remote.ip().is_loopback() || facts.remote.ip() == facts.local.ip();
    let wanted = if local { SourceType::SameIpOrLoopback } else { SourceType::External };
    step(vec![Box::new(move |m| m.source_type == wanted), Box::new(|m| m.source_type == SourceType::Any)]);
    step(ranges(facts.remote.ip(), |m| &m.source_prefix_ranges));
    step(vec![Box::new(move |m| m.source_ports.contains(&from)), Box::new(|m| m.source_ports.is_empty())])
        .first()
        .copied()
}

fn ips() -> impl Strategy<Value = IpAddr> {
    prop::sample::select(vec!["10.0.0.1", "10.0.0.2", "10.1.0.1", "127.0.0.1", "fd00::1"])
        .prop_map(|text| text.parse().unwrap())
}

fn ranges() -> impl Strategy<Value = Vec<CidrRange>> {
    let range = (ips(), prop::sample::select(vec![0u32, 8, 16, 31, 32]));
    prop::collection::vec(range.prop_map(|(ip, bits)| CidrRange::new(ip, bits).unwrap()), 0..3)
}

fn matchers() -> impl Strategy<Value = FilterChainMatch> {
    let name = prop::sample::select(vec!["a.b.com", "*.b.com", "*.com", "x.org"]);
    let transport = prop::option::of(prop::sample::select(vec![TransportProtocol::Tls, TransportProtocol::RawBuffer]));
    let protocol = prop::sample::select(vec!["h2", "istio", "http/1.1"]);
    let source = prop::sample::select(vec![SourceType::Any, SourceType::SameIpOrLoopback, SourceType::External]);
    (
        prop::option::weighted(0.2, 80..82u16),
        ranges(),
        prop::collection::vec(name, 0..2),
        transport,
        prop::collection::vec(protocol, 0..3),
        source,
        ranges(),
        prop::collection::vec(1..3u16, 0..2),
    )
        .prop_map(|(port, to, sni, transport, protocols, source_type, from, ports)| FilterChainMatch {
            destination_port: port,
            prefix_ranges: to,
            server_names: names(&sni),
            transport,
            application_protocols: protocols.into_iter().map(Arc::from).collect(),
            source_type,
            source_prefix_ranges: from,
            source_ports: ports,
        })
}

fn connections() -> impl Strategy<Value = Facts> {
    let name = prop::option::of(prop::sample::select(vec!["a.b.com", "c.b.com", "z.com", "x.org", "other"]));
    let protocols = prop::collection::vec(prop::sample::select(vec!["h2", "istio", "http/1.1", "x"]), 0..3);
    let transport = prop::option::of(prop::sample::select(vec![TransportProtocol::Tls, TransportProtocol::RawBuffer]));
    ((ips(), 1..4u16), (ips(), 80..83u16), name, protocols, transport).prop_map(
        |(remote, local, name, alpn, transport)| Facts {
            remote: remote.into(),
            local: local.into(),
            spoken: Spoken {
                transport,
                server_name: name.map(str::to_owned),
                protocols: alpn.into_iter().map(str::to_owned).collect(),
            },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn chains_are_chosen_as_nested_maps_would(
        chains in prop::collection::vec(matchers(), 0..6),
        connection in connections(),
    ) {
        prop_assert_eq!(chosen(&chains, &connection), model(&chains, &connection));
    }
}
