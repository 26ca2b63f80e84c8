//! Golden tests: what each form of a document becomes. `cargo insta review` shows what a change does.

use super::*;
use crate::input::{Source, load};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3 as core,
            endpoint::v3::ClusterLoadAssignment,
            listener::v3::Listener,
            route::v3::{RouteConfiguration, route::Action},
        },
        extensions::{
            filters::{
                http::{
                    fault::v3::HttpFault, jwt_authn::v3::JwtAuthentication, rbac::v3::Rbac as HttpRbac,
                    router::v3::Router,
                },
                network::http_connection_manager::v3::HttpConnectionManager,
            },
            path::r#match::uri_template::v3::UriTemplateMatchConfig,
            retry::{
                host::previous_hosts::v3::PreviousHostsPredicate,
                priority::previous_priorities::v3::PreviousPrioritiesConfig,
            },
            transport_sockets::{
                raw_buffer::v3::RawBuffer,
                tls::v3::{DownstreamTlsContext, UpstreamTlsContext},
            },
            upstreams::http::v3::HttpProtocolOptions,
        },
    },
    google::protobuf::{Any, Struct, Value, value::Kind},
};
use mesh_xds::server::ResourceType;
use prost::{Message, Name};
use std::fmt::{Debug, Write as _};

/// The message in an `Any`, without the fields that are at their default.
fn show(any: &Any) -> String {
    fn try_as<M: Message + Name + Default + Debug>(any: &Any) -> Option<String> {
        (any.type_url == M::type_url()).then(|| format!("{:#?}", M::decode(any.value.as_slice()).unwrap()))
    }
    let text = try_as::<Listener>(any)
        .or_else(|| try_as::<RouteConfiguration>(any))
        .or_else(|| try_as::<Cluster>(any))
        .or_else(|| try_as::<ClusterLoadAssignment>(any))
        .or_else(|| try_as::<HttpConnectionManager>(any))
        .or_else(|| try_as::<HttpFault>(any))
        .or_else(|| try_as::<Router>(any))
        .or_else(|| try_as::<PreviousHostsPredicate>(any))
        .or_else(|| try_as::<PreviousPrioritiesConfig>(any))
        .or_else(|| try_as::<UpstreamTlsContext>(any))
        .or_else(|| try_as::<DownstreamTlsContext>(any))
        .or_else(|| try_as::<RawBuffer>(any))
        .or_else(|| try_as::<HttpRbac>(any))
        .or_else(|| try_as::<JwtAuthentication>(any))
        .or_else(|| try_as::<UriTemplateMatchConfig>(any))
        .or_else(|| try_as::<HttpProtocolOptions>(any))
        .unwrap_or_else(|| panic!("what is {}?", any.type_url));
    without_defaults(&with_inner(&text))
}

/// Replaces every `Any` in the text of a message by what it holds.
fn with_inner(text: &str) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(head) = line.strip_suffix("Any {") else {
            writeln!(out, "{line}").unwrap();
            continue;
        };
        let type_url =
            lines.next().unwrap().trim().trim_start_matches("type_url: \"").trim_end_matches("\",").to_owned();
        let mut value = Vec::new();
        if lines.next().unwrap().trim() == "value: [" {
            let bytes = lines.by_ref().map(|l| l.trim().trim_end_matches(',').to_owned()).take_while(|l| l != "]");
            value.extend(bytes.map(|b| b.parse::<u8>().unwrap()));
        }
        let close = lines.next().unwrap();
        let indent = " ".repeat(line.len() - line.trim_start().len());
        let inner = show(&Any { type_url, value }).trim_end().replace('\n', &format!("\n{indent}"));
        writeln!(out, "{head}{inner}{}", if close.ends_with(',') { "," } else { "" }).unwrap();
    }
    out
}

fn without_defaults(text: &str) -> String {
    let is_default = |line: &&str| {
        let value = line.trim().split_once(": ").map(|(_, v)| v);
        matches!(value, Some("None," | "\"\"," | "[]," | "{}," | "0," | "false," | "0.0,"))
    };
    text.lines().filter(|line| !is_default(line)).fold(String::new(), |all, line| all + line + "\n")
}

/// Rewrites the text of a message so that what fits stands on one line, and what holds one thing alone stands on the line of that.
fn folded(text: &str) -> String {
    const WIDTH: usize = 120;
    /// What stands between `lines[0]` and the line that closes it; all of them lines of their own.
    fn fold(lines: &[&str]) -> Vec<String> {
        let indent = |line: &str| line.len() - line.trim_start().len();
        let mut out = Vec::new();
        let mut rest = lines;
        while let [head, after @ ..] = rest {
            let opens = head.ends_with(['{', '[', '(']);
            let Some(end) = after.iter().position(|line| indent(line) == indent(head)).filter(|_| opens) else {
                out.push(head.trim().to_owned());
                rest = after;
                continue;
            };
            let (mut inner, head, close) = (fold(&after[..end]), head.trim(), after[end].trim());
            let single = inner.iter().skip(1).all(|line| line.starts_with([' ', '}', ']', ')']));
            let joined = inner.join(" ");
            if head.len() + joined.len() + close.len() <= WIDTH {
                out.push(format!("{head}{}{close}", joined.trim_end_matches(',')));
            } else if single {
                let last = inner.len() - 1;
                inner[last] = format!("{}{close}", inner[last].trim_end_matches(','));
                inner[0] = format!("{head}{}", inner[0]);
                out.extend(inner);
            } else {
                out.push(head.to_owned());
                out.extend(inner.into_iter().map(|line| format!("  {line}")));
                out.push(close.to_owned());
            }
            rest = &after[end + 1..];
        }
        out
    }
    fold(&text.lines().collect::<Vec<_>>()).join("\n")
}

fn translated(yaml: &str) -> ResourceSet {
    let loaded = load(&[Source::inline(yaml)]).unwrap_or_else(|rejected| panic!("{rejected}"));
    translate(&loaded.model, &Options::default())
}

fn all(yaml: &str, types: &[ResourceType]) -> String {
    let set = translated(yaml);
    let mut out = String::new();
    for &t in types {
        for (name, any) in set.iter(t).filter(|(name, _)| !name.starts_with(SERVER_LISTENER_PREFIX)) {
            write!(out, "--- {t} {name}\n{}", show(any)).unwrap();
        }
    }
    out
}

fn one(yaml: &str, t: ResourceType, name: &str) -> String {
    show(translated(yaml).get(t, name).unwrap_or_else(|| panic!("no {t} {name}")))
}

const SERVICE: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter, namespace: prod}
spec:
  hosts: [greeter.example]
  resolution: STATIC
  ports: [{number: 80, name: web, protocol: HTTP, targetPort: 8080}]
  endpoints:
  - {address: 10.0.0.1, labels: {version: v1}, locality: r1/z1, weight: 3, serviceAccount: one}
  - {address: 10.0.0.2, ports: {web: 81}, labels: {version: v2}, locality: r1/z1/s1, serviceAccount: two}
  - {address: \"::1\", labels: {version: v2}, locality: r1/z1}
";
const CLUSTER: &str = "outbound|80||greeter.example";

fn with_rule(spec: &str) -> String {
    object("DestinationRule", &format!("host: greeter.example\n{spec}"))
}

fn with_routes(spec: &str) -> String {
    object("VirtualService", &format!("hosts: [greeter.example]\nhttp:\n{spec}"))
}

fn object(kind: &str, spec: &str) -> String {
    let spec = spec.lines().fold(String::new(), |all, line| all + "  " + line + "\n");
    format!(
        "{SERVICE}---\napiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: x, namespace: prod}}\nspec:\n{spec}"
    )
}

#[test]
fn istio_sample() {
    let yaml = include_str!("../../testdata/greeter.yaml");
    insta::assert_snapshot!("sample_routes", all(yaml, &[ResourceType::RouteConfiguration]));
    insta::assert_snapshot!("sample_clusters", all(yaml, &[ResourceType::Cluster]));
    insta::assert_snapshot!("sample_endpoints", all(yaml, &[ResourceType::ClusterLoadAssignment]));
    let listener = "greeter.default.svc.cluster.local:50051";
    insta::assert_snapshot!("sample_listener", one(yaml, ResourceType::Listener, listener));
}

#[test]
fn service_alone_gets_istios_default_route() {
    insta::assert_snapshot!(all(
        SERVICE,
        &[
            ResourceType::Listener,
            ResourceType::RouteConfiguration,
            ResourceType::Cluster,
            ResourceType::ClusterLoadAssignment
        ]
    ));
}

#[test]
fn cluster_services_answer_to_their_short_names() {
    let names = |yaml: &str| {
        let set = translated(yaml);
        let names = set.iter(ResourceType::Listener).map(|(name, _)| name.to_owned());
        names.filter(|name| !name.starts_with(SERVER_LISTENER_PREFIX)).collect::<Vec<_>>()
    };
    let full = "greeter.default.svc.cluster.local";
    let yaml = SERVICE.replace("greeter.example", full);
    assert_eq!(
        names(&yaml),
        ["greeter.default.svc.cluster.local:80", "greeter.default.svc:80", "greeter.default:80", "greeter:80"]
    );
    let yaml = SERVICE.replace("greeter.example", "greeter");
    assert_eq!(names(&yaml), ["greeter.prod.svc.cluster.local:80", "greeter.prod.svc:80", "greeter.prod:80"]);
    assert_eq!(names(SERVICE), ["greeter.example:80"]);
}

#[test]
fn every_kind_of_match() {
    let yaml = with_routes(
        "- name: paths
  match:
  - {name: exact, uri: {exact: /a}, ignoreUriCase: true}
  - {name: prefix, uri: {prefix: /b}}
  - {name: regex, uri: {regex: \"/c[0-9]+\"}}
  route: [{destination: {host: greeter.example}}]
- match:
  - headers: {X-Exact: {exact: a}, x-prefix: {prefix: b}, x-regex: {regex: \"c.*\"}, x-there: {}}
    withoutHeaders: {x-not: {exact: d}, x-absent: {}}
    method: {exact: GET}
    authority: {prefix: greeter}
    scheme: {exact: http}
    queryParams: {q: {exact: \"1\"}, p: {}}
  - {port: 81}
  route: [{destination: {host: greeter.example}}]
",
    );
    insta::assert_snapshot!(one(&yaml, ResourceType::RouteConfiguration, CLUSTER));
}

#[test]
fn every_kind_of_route_action() {
    let yaml = with_routes(
        "- match: [{uri: {prefix: /old}}]
  rewrite: {uri: /new, authority: other.example}
  mirrors: [{destination: {host: greeter.example}, percentage: {value: 0.5}}]
  headers: {request: {set: {x-a: a}, add: {x-b: b}, remove: [x-c]}, response: {add: {x-d: d}}}
  route: [{destination: {host: greeter.example, port: {number: 80}}}]
- match: [{uri: {prefix: /split}}]
  rewrite: {uriRegexRewrite: {match: \"^/split/(.*)\", rewrite: \"/\\\\1\"}}
  timeout: 1.5s
  route:
  - {destination: {host: greeter.example}, weight: 75, headers: {request: {set: {x-part: one, Host: part.example}}}}
  - {destination: {host: greeter.example}, weight: 25}
  - {destination: {host: greeter.example}, weight: 0}
- match: [{uri: {prefix: /away}}]
  redirect: {uri: /there, authority: there.example, port: 8443, scheme: https, redirectCode: 308}
- match: [{uri: {prefix: /teapot}}]
  directResponse: {status: 418, body: {string: short and stout}}
- match: [{uri: {prefix: /slow}}]
  fault: {delay: {fixedDelay: 5s, percentage: {value: 0.1}}, abort: {httpStatus: 503, percentage: {value: 50}}}
  route: [{destination: {host: greeter.example}}]
",
    );
    insta::assert_snapshot!(one(&yaml, ResourceType::RouteConfiguration, CLUSTER));
}

#[test]
fn retries_said_default_and_off() {
    let yaml = with_routes(
        "- match: [{uri: {prefix: /off}}]
  retries: {attempts: 0}
  route: [{destination: {host: greeter.example}}]
- match: [{uri: {prefix: /all}}]
  retries: {attempts: 4, perTryTimeout: 250ms, retryOn: \"5xx, 429,reset,503\", backoff: 10ms, retryRemoteLocalities: true, retryIgnorePreviousHosts: false}
  route: [{destination: {host: greeter.example}}]
- match: [{uri: {prefix: /some}}]
  retries: {attempts: 1}
  route: [{destination: {host: greeter.example}}]
- route: [{destination: {host: greeter.example}}]
",
    );
    insta::assert_snapshot!(one(&yaml, ResourceType::RouteConfiguration, CLUSTER));
}

#[test]
fn everything_of_a_traffic_policy() {
    let yaml = with_rule(
        "trafficPolicy:
  loadBalancer: {simple: LEAST_REQUEST}
  connectionPool:
    tcp: {maxConnections: 10, connectTimeout: 250ms, maxConnectionDuration: 1h, tcpKeepalive: {probes: 3, time: 60s, interval: 5s}}
    http: {http1MaxPendingRequests: 1, http2MaxRequests: 2, maxRequestsPerConnection: 3, maxRetries: 4, idleTimeout: 30s, maxConcurrentStreams: 5, h2UpgradePolicy: UPGRADE}
  retryBudget: {percent: 25, minRetryConcurrency: 7}
  outlierDetection: {consecutive5xxErrors: 3, consecutiveGatewayErrors: 0, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 4, interval: 1s, baseEjectionTime: 2s, maxEjectionPercent: 50, minHealthPercent: 10}
",
    );
    insta::assert_snapshot!(one(&yaml, ResourceType::Cluster, CLUSTER));
}

#[test]
fn every_load_balancer() {
    let with = |load_balancer: &str| {
        let yaml = with_rule(&format!("trafficPolicy: {{loadBalancer: {load_balancer}}}\n"));
        let set = translated(&yaml);
        let any = |kind| set.get(kind, CLUSTER).unwrap().clone();
        let cluster = Cluster::decode(any(ResourceType::Cluster).value.as_slice()).unwrap();
        let routes = RouteConfiguration::decode(any(ResourceType::RouteConfiguration).value.as_slice()).unwrap();
        let action = routes.virtual_hosts[0].routes[0].action.clone().unwrap();
        let Action::Route(action) = action else { panic!("{action:?}") };
        let config = format!("{:#?}\n{:#?}\n{:#?}", cluster.lb_policy(), cluster.lb_config, action.hash_policy);
        format!("{load_balancer}\n{}", without_defaults(&config))
    };
    let forms = [
        "{simple: ROUND_ROBIN, warmup: {duration: 30s, aggression: 1.5, minimumPercent: 5}}",
        "{simple: LEAST_REQUEST, warmupDurationSecs: 10s}",
        "{simple: RANDOM}",
        "{consistentHash: {httpHeaderName: x-user}}",
        "{consistentHash: {httpQueryParameterName: user, ringHash: {minimumRingSize: 2048}}}",
        "{consistentHash: {httpCookie: {name: sid, path: /shop, ttl: 60s}, maglev: {tableSize: 1009}}}",
        "{consistentHash: {httpCookie: {name: sid, ttl: 0s}, minimumRingSize: 512}}",
    ];
    insta::assert_snapshot!(forms.map(with).join("\n"));
}

#[test]
fn subset_and_port_settings_override() {
    let yaml = with_rule(
        "trafficPolicy:
  loadBalancer: {simple: RANDOM}
  connectionPool: {tcp: {connectTimeout: 1s}}
subsets:
- {name: inherits, labels: {version: v1}}
- {name: overrides, labels: {version: v2}, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 9}}}}
- name: by-port
  labels: {version: v2}
  trafficPolicy: {loadBalancer: {simple: LEAST_CONN}, portLevelSettings: [{port: {number: 80}, outlierDetection: {}}]}
",
    );
    insta::assert_snapshot!(all(&yaml, &[ResourceType::Cluster, ResourceType::ClusterLoadAssignment]));
}

#[test]
fn services_that_are_resolved_by_dns() {
    let entry = |resolution: &str, endpoints: &str| {
        format!(
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: greeter}}
spec:
  hosts: [greeter.example]
  resolution: {resolution}
  ports: [{{number: 80, name: web, protocol: HTTP, targetPort: 8080}}]
  endpoints: {endpoints}
"
        )
    };
    let two = "[{address: a.example, locality: r1/z1, weight: 3}, {address: 10.0.0.2, ports: {web: 81}, locality: r2}]";
    let types = [ResourceType::Cluster, ResourceType::ClusterLoadAssignment];
    let forms = [("DNS", two), ("DNS", "[]"), ("DNS_ROUND_ROBIN", "[{address: a.example}]")];
    let shown =
        forms.map(|(resolution, endpoints)| format!("{resolution}\n{}", all(&entry(resolution, endpoints), &types)));
    insta::assert_snapshot!(shown.join("\n"));
    let refused = |yaml: &str| load(&[Source::inline(yaml)]).unwrap_err().to_string();
    assert!(refused(&entry("DNS_ROUND_ROBIN", two)).contains("has one endpoint at most"));
    assert!(refused(&entry("DNS", "[{address: \"a b\"}]")).contains("no IP address and no DNS name"));
}

/// The endpoints that a client is sent, by priority, locality and weight.
fn near(yaml: &str, region: &str, zone: &str, labels: &[(&str, &str)]) -> String {
    let locality = Some(core::Locality { region: region.into(), zone: zone.into(), ..core::Locality::default() });
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let fields = labels.iter().map(|(key, value)| ((*key).to_owned(), text(value))).collect();
    let labels = Value { kind: Some(Kind::StructValue(Struct { fields })) };
    let metadata = Some(Struct { fields: [("LABELS".to_owned(), labels)].into() });
    let node = core::Node { locality, metadata, ..core::Node::default() };
    let set = translated(yaml);
    let assignment = match set.get_for(&node, ResourceType::ClusterLoadAssignment, CLUSTER) {
        Some(any) => ClusterLoadAssignment::decode(any.value.as_slice()).unwrap(),
        None => {
            let any = set.get_for(&node, ResourceType::Cluster, CLUSTER).unwrap();
            Cluster::decode(any.value.as_slice()).unwrap().load_assignment.unwrap()
        }
    };
    let mut lines: Vec<String> = (assignment.endpoints.iter())
        .map(|part| {
            let locality = part.locality.clone().unwrap_or_default();
            let weight = part.load_balancing_weight.map_or(0, |weight| weight.value);
            let (priority, count) = (part.priority, part.lb_endpoints.len());
            format!("{priority}: {}/{} weight {weight}, {count} endpoints", locality.region, locality.zone)
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

const REGIONS: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter, namespace: prod}
spec:
  hosts: [greeter.example]
  resolution: STATIC
  ports: [{number: 80, name: web, protocol: HTTP}]
  endpoints:
  - {address: 10.0.0.1, locality: r1/z1, labels: {version: v1}}
  - {address: 10.0.0.2, locality: r1/z1, labels: {version: v2}}
  - {address: 10.0.0.3, locality: r1/z2, labels: {version: v1}}
  - {address: 10.0.0.4, locality: r2/z1, labels: {version: v1}}
  - {address: 10.0.0.5, locality: r3/z1, labels: {version: v2}}
";

fn ruled(load_balancer: &str, outliers: bool) -> String {
    let outliers = if outliers { ", outlierDetection: {}" } else { "" };
    format!(
        "{REGIONS}---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: x, namespace: prod}}\n\
         spec: {{host: greeter.example, trafficPolicy: {{loadBalancer: {{{load_balancer}}}{outliers}}}}}\n"
    )
}

#[test]
fn endpoints_near_the_client_come_first() {
    let plain = ruled("", true);
    let cases = [
        ("near, by default", near(&plain, "r1", "z1", &[])),
        ("elsewhere", near(&plain, "r9", "z9", &[])),
        ("no outlier detection", near(&ruled("", false), "r1", "z1", &[])),
        ("off", near(&ruled("localityLbSetting: {enabled: false}", true), "r1", "z1", &[])),
        ("the next region", near(&ruled("localityLbSetting: {failover: [{from: r1, to: r3}]}", true), "r1", "z2", &[])),
        (
            "shares",
            near(
                &ruled(
                    "localityLbSetting: {distribute: [{from: r1/z1/*, to: {r1/z1: 70, \"r1/*\": 20, r2: 10}}]}",
                    false,
                ),
                "r1",
                "z1",
                &[],
            ),
        ),
        (
            "no share of another's",
            near(&ruled("localityLbSetting: {distribute: [{from: r2, to: {r1: 100}}]}", true), "r1", "z1", &[]),
        ),
        (
            "labels",
            near(
                &ruled("localityLbSetting: {failoverPriority: [version, topology.kubernetes.io/region]}", true),
                "r1",
                "z1",
                &[("version", "v2")],
            ),
        ),
        (
            "labels, with a value, and a region",
            near(
                &ruled("localityLbSetting: {failoverPriority: [version=v1], failover: [{from: r1, to: r3}]}", true),
                "r1",
                "z1",
                &[("any", "label")],
            ),
        ),
        ("no labels", near(&ruled("localityLbSetting: {failoverPriority: [version]}", true), "r1", "z1", &[])),
    ];
    insta::assert_snapshot!(cases.map(|(what, found)| format!("{what}\n{found}")).join("\n\n"));
    let untouched = near(&ruled("", false), "r1", "z1", &[]);
    // Names of a DNS cluster stand in the cluster itself.
    let dns = plain.replace("resolution: STATIC", "resolution: DNS");
    assert_eq!(near(&dns, "r1", "z1", &[]), near(&plain, "r1", "z1", &[]));
    let operator = |setting: &str| {
        format!(
            "{plain}---\napiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nmetadata: {{name: i}}\nspec: {{profile: demo, meshConfig: {{accessLogFile: /dev/stdout, localityLbSetting: {setting}}}}}\n"
        )
    };
    assert_eq!(near(&operator("{enabled: false}"), "r1", "z1", &[]), untouched);
    let shared = operator("{distribute: [{from: \"*\", to: {r3: 100}}]}");
    assert!(near(&shared, "r1", "z1", &[]).contains("r3/z1 weight 100, 1 endpoints"));
    let loaded = load(&[Source::inline(operator("{}"))]).unwrap();
    let warnings: Vec<_> = loaded.warnings.iter().map(|warning| warning.reason.clone()).collect();
    assert_eq!(warnings, ["`profile` is not honoured", "`accessLogFile` is not honoured"]);
}

#[test]
fn bad_locality_settings_are_refused() {
    let refused = |setting: &str| {
        let yaml = ruled(&format!("localityLbSetting: {{{setting}}}"), true);
        load(&[Source::inline(yaml)]).unwrap_err().to_string()
    };
    for (setting, reason) in [
        ("distribute: [{from: a, to: {b: 60, c: 30}}]", "add up to 90, not 100"),
        ("distribute: [{from: a, to: {b: 100, c: 0}}]", "1 to 100 percent, not 0"),
        ("distribute: [{from: a, to: {b: 100}}, {from: a, to: {c: 100}}]", "has a `from` twice"),
        ("distribute: [{from: a, to: {b: 100}}], failover: [{from: a, to: b}]", "neither failover nor"),
        ("failover: [{from: a, to: a}]", "to itself"),
        ("failover: [{from: a/b, to: c}]", "is not a region"),
        ("failover: [{from: a}]", "has no to"),
    ] {
        let said = refused(setting);
        assert!(said.contains(reason), "{setting}: {said}");
    }
}

#[test]
fn every_tls_mode() {
    let socket = |spec: &str| {
        let yaml = with_rule(&format!("trafficPolicy: {{tls: {spec}}}\nsubsets: [{{name: s, trafficPolicy: {{}}}}]\n"));
        let text = one(&yaml, ResourceType::Cluster, "outbound|80|s|greeter.example");
        match text.find("    transport_socket: ") {
            Some(start) => {
                text[start..].lines().take_while(|l| *l != "    ),").fold(String::new(), |a, l| a + l + "\n")
            }
            None => "plaintext\n".to_owned(),
        }
    };
    let modes = [
        "{mode: DISABLE}",
        "{mode: ISTIO_MUTUAL}",
        "{mode: ISTIO_MUTUAL, sni: s.example, subjectAltNames: [spiffe://a/b]}",
        "{mode: SIMPLE, sni: s.example}",
        "{mode: SIMPLE, caCertificates: /ca.pem, insecureSkipVerify: true}",
        "{mode: MUTUAL, clientCertificate: /c.pem, privateKey: /k.pem, caCertificates: /ca.pem}",
    ];
    insta::assert_snapshot!(modes.map(|mode| format!("{mode}\n{}", socket(mode))).join("\n"));
}

#[test]
fn wildcard_rules_apply_to_the_hosts_they_cover_and_the_most_specific_wins() {
    let rule = |name: &str, host: &str, timeout: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}}}\nspec: {{host: \"{host}\", trafficPolicy: {{connectionPool: {{tcp: {{connectTimeout: {timeout}}}}}}}}}\n"
        )
    };
    let timeout = |yaml: &str| {
        let any = translated(yaml).get(ResourceType::Cluster, CLUSTER).unwrap().clone();
        Cluster::decode(any.value.as_slice()).unwrap().connect_timeout.map(|t| t.seconds)
    };
    let star = format!("{SERVICE}{}", rule("a", "*.example", "1s"));
    assert_eq!(timeout(&star), Some(1));
    let both = format!("{star}{}{}", rule("b", "greeter.example", "2s"), rule("c", "*", "3s"));
    assert_eq!(timeout(&both), Some(2));
}

#[test]
fn the_same_model_yields_the_same_bytes() {
    let yaml = include_str!("../../testdata/greeter.yaml");
    assert_eq!(translated(yaml), translated(yaml));
}

fn telemetry(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: t, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

/// The shares of traces, of clients by header, at random and in all, that a client of this namespace and version is told.
fn sampling(yaml: &str, namespace: &str, version: &str) -> Option<[f64; 3]> {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let labels = Kind::StructValue(Struct { fields: [("version".to_owned(), text(version))].into() });
    let fields = [("NAMESPACE".to_owned(), text(namespace)), ("LABELS".to_owned(), Value { kind: Some(labels) })];
    let node = core::Node { metadata: Some(Struct { fields: fields.into() }), ..core::Node::default() };
    let set = translated(yaml);
    let any = set.get_for(&node, ResourceType::Listener, "greeter.example:80").unwrap();
    let api = Listener::decode(&*any.value).unwrap().api_listener.unwrap().api_listener.unwrap();
    let tracing = HttpConnectionManager::decode(&*api.value).unwrap().tracing?;
    let share = |percent: Option<envoy_types::pb::envoy::r#type::v3::Percent>| percent.unwrap().value;
    Some([share(tracing.client_sampling), share(tracing.random_sampling), share(tracing.overall_sampling)])
}

#[test]
fn telemetry_says_how_much_is_traced() {
    let yaml = SERVICE.to_owned() + &telemetry("istio-system", "{tracing: [{randomSamplingPercentage: 12.5}]}");
    insta::assert_snapshot!(one(&yaml, ResourceType::Listener, "greeter.example:80"));
    assert_eq!(sampling(SERVICE, "any", ""), None);
    assert_eq!(sampling(&yaml, "any", ""), Some([100.0, 12.5, 100.0]));

    let server = "{tracing: [{match: {mode: SERVER}, randomSamplingPercentage: 1}]}";
    assert_eq!(sampling(&(SERVICE.to_owned() + &telemetry("istio-system", server)), "any", ""), None);

    // Of the mesh, of a namespace, of some workloads: what is more specific wins, and the rest stays.
    let yaml = yaml
        + &telemetry("shop", "{tracing: [{match: {mode: CLIENT}, randomSamplingPercentage: 50}]}")
        + &telemetry("shop", "{selector: {matchLabels: {version: v2}}, tracing: [{disableSpanReporting: true}]}")
            .replace("name: t", "name: v2");
    assert_eq!(sampling(&yaml, "other", "v2"), Some([100.0, 12.5, 100.0]));
    assert_eq!(sampling(&yaml, "shop", "v1"), Some([100.0, 50.0, 100.0]));
    assert_eq!(sampling(&yaml, "shop", "v2"), Some([0.0, 0.0, 0.0]));
}

mod inbound;
