//! `DestinationRule`: subsets and traffic policies.

use super::{Node, export_to, full_host, locality};
use crate::{
    input::fields::Fields,
    model::{
        Algorithm, ConnectionPool, ConsistentHash, HashKey, HashTable, LoadBalancer, Object, OutlierDetection, Policy,
        RetryBudget, Subset, TcpKeepalive, Tls, TlsMode, TrafficPolicy, Warmup,
    },
    problem::Report,
};
use std::collections::BTreeMap;

pub(super) fn read(object: Object, spec: &Node, report: &Report) -> Option<Policy> {
    spec.fields(report, "DestinationRule.spec", |f| {
        let host = f.required_string("host", "DestinationRule.spec").map(|h| full_host(h, &object.namespace));
        let traffic = f.nested("trafficPolicy", traffic_policy).unwrap_or_default();
        let subsets = f.list("subsets").iter().filter_map(|node| subset(node, report)).collect();
        f.not_honoured(&["workloadSelector"]);
        export_to(f);
        Some(Policy { object, host: host?, traffic, subsets })
    })?
}

fn subset(node: &Node, report: &Report) -> Option<Subset> {
    node.fields(report, "a subset", |f| {
        let name = f.required_string("name", "the subset");
        let labels = f.string_map("labels");
        let traffic = f.nested("trafficPolicy", traffic_policy).unwrap_or_default();
        Some(Subset { name: name?, labels, traffic })
    })?
}

fn traffic_policy(f: &Fields<'_>) -> TrafficPolicy {
    f.not_honoured(&["tunnel", "proxyProtocol"]);
    let mut ports = BTreeMap::new();
    for node in f.list("portLevelSettings") {
        let setting = node.fields(f.report, "an item of portLevelSettings", |p| {
            let number = p.nested("port", |port| port.port("number")).flatten();
            if p.get("port").is_none() {
                p.missing("port", "the item of portLevelSettings");
            }
            let policy = settings(p);
            Some((number?, policy))
        });
        if let Some(Some((number, policy))) = setting
            && ports.insert(number.value, policy).is_some()
        {
            f.report.error(&number.at, format!("portLevelSettings has port {} twice", number.value));
        }
    }
    TrafficPolicy { ports, ..settings(f) }
}

/// What both a traffic policy and an item of `portLevelSettings` have.
fn settings(f: &Fields<'_>) -> TrafficPolicy {
    TrafficPolicy {
        load_balancer: f.nested("loadBalancer", load_balancer),
        connection_pool: f.nested("connectionPool", connection_pool),
        outlier_detection: f.nested("outlierDetection", outlier_detection),
        tls: f.nested("tls", tls).flatten(),
        retry_budget: f.nested("retryBudget", |r| RetryBudget {
            percent: r.percentage("percent").unwrap_or(20.0),
            min_concurrency: r.int("minRetryConcurrency").unwrap_or(3),
        }),
        ports: BTreeMap::new(),
    }
}

fn load_balancer(f: &Fields<'_>) -> LoadBalancer {
    let short = f.positive_duration("warmupDurationSecs").map(|duration| (duration, None, None));
    let warmup = f.nested("warmup", |w| {
        let (aggression, minimum) = (w.number("aggression"), w.percentage("minimumPercent"));
        w.positive_duration("duration").map(|duration| (duration, aggression, minimum))
    });
    let warmup = warmup.flatten().or(short);
    LoadBalancer {
        algorithm: f.nested("consistentHash", consistent_hash).map(Algorithm::Hash).or_else(|| simple(f)),
        warmup: warmup.map(|(duration, aggression, minimum_percent)| Warmup { duration, aggression, minimum_percent }),
        locality: f.nested("localityLbSetting", locality::setting),
    }
}

fn simple(f: &Fields<'_>) -> Option<Algorithm> {
    let simple = f.string("simple")?;
    match simple.value.as_str() {
        // The generator for gRPC clients leaves the policy alone, which is round robin.
        "UNSPECIFIED" => None,
        "ROUND_ROBIN" => Some(Algorithm::RoundRobin),
        "LEAST_REQUEST" | "LEAST_CONN" => Some(Algorithm::LeastRequest),
        "RANDOM" => Some(Algorithm::Random),
        "PASSTHROUGH" => {
            f.report.error(&simple.at, "PASSTHROUGH is not supported: a proxyless client dials no address of its own");
            None
        }
        other => {
            f.report.error(&simple.at, format!("unknown load balancer `{other}`"));
            None
        }
    }
}

fn consistent_hash(f: &Fields<'_>) -> ConsistentHash {
    // Requests begin in the client: they came by no connection.
    f.not_honoured(&["useSourceIp"]);
    let cookie = f.nested("httpCookie", |c| {
        c.not_honoured(&["attributes"]);
        let name = c.required_string("name", "httpCookie")?.value;
        Some(HashKey::Cookie { name, path: c.text("path").unwrap_or_default(), ttl: c.duration("ttl") })
    });
    let (header, parameter) = (f.text("httpHeaderName"), f.text("httpQueryParameterName"));
    let minimum = f.int("minimumRingSize");
    let ring = f.nested("ringHash", |r| r.int("minimumRingSize")).flatten();
    let maglev = f.nested("maglev", |m| HashTable::Maglev(m.int("tableSize")));
    ConsistentHash {
        key: header.map(HashKey::Header).or(cookie.flatten()).or_else(|| parameter.map(HashKey::QueryParameter)),
        table: maglev.unwrap_or(HashTable::Ring(ring.or(minimum))),
    }
}

fn connection_pool(f: &Fields<'_>) -> ConnectionPool {
    let mut pool = ConnectionPool::default();
    f.nested("tcp", |t| {
        pool.max_connections = t.int("maxConnections");
        pool.connect_timeout = t.positive_duration("connectTimeout");
        pool.max_connection_duration = t.positive_duration("maxConnectionDuration");
        pool.tcp_keepalive = t.nested("tcpKeepalive", |k| TcpKeepalive {
            probes: k.int("probes"),
            time: k.positive_duration("time"),
            interval: k.positive_duration("interval"),
        });
        t.not_honoured(&["idleTimeout"]);
    });
    f.nested("http", |h| {
        pool.max_pending_requests = h.int("http1MaxPendingRequests");
        pool.max_requests = h.int("http2MaxRequests");
        pool.max_requests_per_connection = h.int("maxRequestsPerConnection");
        pool.max_retries = h.int("maxRetries");
        pool.idle_timeout = h.duration("idleTimeout");
        pool.max_concurrent_streams = h.int("maxConcurrentStreams");
        if let Some(policy) = h.string("h2UpgradePolicy") {
            match policy.value.as_str() {
                "UPGRADE" => pool.upgrade_to_http2 = true,
                "DEFAULT" | "DO_NOT_UPGRADE" => {}
                other => h.report.error(&policy.at, format!("unknown h2UpgradePolicy `{other}`")),
            }
        }
        h.not_honoured(&["useClientProtocol"]);
    });
    pool
}

fn outlier_detection(f: &Fields<'_>) -> OutlierDetection {
    if let Some((key, _)) = f.entry("consecutiveErrors") {
        f.report.warning(&key.at, "`consecutiveErrors` is not honoured: use consecutive5xxErrors");
    }
    OutlierDetection {
        consecutive_5xx: f.int("consecutive5xxErrors"),
        consecutive_gateway: f.int("consecutiveGatewayErrors"),
        consecutive_local: f.int("consecutiveLocalOriginFailures"),
        split_local: f.bool("splitExternalLocalOriginErrors").unwrap_or(false),
        interval: f.positive_duration("interval"),
        base_ejection_time: f.positive_duration("baseEjectionTime"),
        max_ejection_percent: f.percent("maxEjectionPercent"),
        min_health_percent: f.percent("minHealthPercent"),
    }
}

fn tls(f: &Fields<'_>) -> Option<Tls> {
    f.not_honoured(&["credentialName", "caCrl"]);
    let certificate = f.text("clientCertificate").filter(|s| !s.is_empty());
    let key = f.text("privateKey").filter(|s| !s.is_empty());
    let ca = f.text("caCertificates").filter(|s| !s.is_empty());
    let sni = f.text("sni").filter(|s| !s.is_empty());
    let subject_alt_names = f.strings("subjectAltNames").into_iter().map(|s| s.value).collect();
    let insecure_skip_verify = f.bool("insecureSkipVerify").unwrap_or(false);
    let mode = f.string("mode");
    let kind = match mode.as_ref().map_or("DISABLE", |m| m.value.as_str()) {
        "DISABLE" => TlsMode::Disable,
        "SIMPLE" => TlsMode::Simple { ca },
        "ISTIO_MUTUAL" => {
            if certificate.is_some() || key.is_some() || ca.is_some() {
                f.report.error(f.at, "tls.mode ISTIO_MUTUAL takes no clientCertificate, privateKey or caCertificates");
            }
            TlsMode::Mesh
        }
        "MUTUAL" => match (certificate, key) {
            (Some(certificate), Some(key)) => TlsMode::Mutual { certificate, key, ca },
            _ => {
                f.report.error(f.at, "tls.mode MUTUAL needs clientCertificate and privateKey");
                return None;
            }
        },
        other => {
            let at = mode.as_ref().map_or(f.at, |m| &m.at);
            f.report.error(at, format!("unknown tls.mode `{other}`: known are DISABLE, SIMPLE, MUTUAL, ISTIO_MUTUAL"));
            return None;
        }
    };
    Some(Tls { mode: kind, sni, subject_alt_names, insecure_skip_verify })
}
