use super::*;

const SERVICE: &str = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter}
spec:
  hosts: [greeter]
  resolution: STATIC
  ports: [{number: 50051, name: grpc, protocol: GRPC}]
  endpoints: [{address: 127.0.0.1, ports: {grpc: 6001}, labels: {version: v1}}]
";

fn source(name: &str, text: &str) -> Source {
    Source { name: name.into(), text: text.to_owned() }
}

/// Every finding on `text` beside a good `a.yaml`.
fn findings(text: &str) -> Vec<String> {
    let (_, problems) = check(&[source("a.yaml", SERVICE), source("b.yaml", text)]);
    problems.iter().map(ToString::to_string).collect()
}

fn virtual_service(spec: &str) -> String {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v}}\nspec:\n{spec}")
}

fn destination_rule(spec: &str) -> String {
    virtual_service(spec).replace("VirtualService", "DestinationRule")
}

#[track_caller]
fn assert_findings(text: &str, expected: &[&str]) {
    assert_eq!(findings(text), expected, "\n{text}");
}

#[test]
fn a_good_configuration_has_no_findings() {
    assert_findings("", &[]);
    assert_findings("# only a comment\n---\n---\n", &[]);
}

#[test]
fn unknown_field_is_named_at_its_key() {
    let text = virtual_service("hosts: [greeter]\nhttp:\n- route: [{destination: {host: greeter}, wieght: 3}]\n");
    assert_findings(
        &text,
        &["b.yaml:7:44: unknown field `wieght` in a destination of the route: did you mean `weight`?"],
    );
    let text =
        virtual_service("hosts: [greeter]\nhttp:\n- {route: [{destination: {host: greeter}}], frobnicate: {}}\n");
    let found = findings(&text);
    assert!(found[0].starts_with("b.yaml:7:47: unknown field `frobnicate` in an HTTP route: known are "), "{found:?}");
}

#[test]
fn wrong_type_is_named_at_its_value() {
    let text = virtual_service("hosts: greeter\nhttp:\n- {route: [{destination: {host: 7}}], timeout: 5}\n");
    assert_findings(
        &text,
        &[
            "b.yaml:5:10: hosts is a list, not a string",
            "b.yaml:7:35: host is a string, not a number: put it in quotes",
            "b.yaml:7:50: timeout is a string, not a number: put it in quotes",
        ],
    );
    assert_findings(
        &destination_rule("host: greeter\ntrafficPolicy:\n  connectionPool: {http: {http2MaxRequests: many}}\n"),
        &["b.yaml:7:47: http2MaxRequests is an integer, not a string"],
    );
    assert_findings(
        &destination_rule("host: greeter\ntrafficPolicy: [1]\n"),
        &["b.yaml:6:18: trafficPolicy is a map, not a list"],
    );
}

#[test]
fn duplicate_key_is_named_at_the_second() {
    let text = destination_rule("host: greeter\nsubsets: []\nhost: other\n");
    assert_findings(&text, &["b.yaml:7:3: duplicate key `host`"]);
}

#[test]
fn two_documents_for_one_object_are_refused() {
    let text = SERVICE.replace("[greeter]", "[another]");
    assert_findings(&text, &["b.yaml:3:18: ServiceEntry default/greeter is already defined at a.yaml:3:18"]);
    let elsewhere = text.replace("{name: greeter}", "{name: greeter, namespace: prod}");
    assert_findings(&elsewhere, &[]);
}

#[test]
fn unknown_kind_and_version_are_refused() {
    assert_findings(
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {}\n",
        &["b.yaml:2:7: unknown kind `Gateway`: known are ServiceEntry, VirtualService, DestinationRule"],
    );
    let found = findings("kind: Service\napiVersion: v1\nmetadata: {name: g}\n");
    assert!(
        found[0].starts_with("b.yaml:2:13: unknown apiVersion `v1`: known are networking.istio.io/v1"),
        "{found:?}"
    );
    assert_findings(
        "metadata: {name: x}\n",
        &["b.yaml:1:1: the document has no apiVersion", "b.yaml:1:1: the document has no kind"],
    );
}

#[test]
fn a_syntax_error_has_its_place() {
    let found = findings("a: 1\n b: 2\n");
    assert_eq!(found, ["b.yaml:2:3: mapping values are not allowed in this context"]);
}

#[test]
fn every_error_of_every_file_is_reported() {
    let bad_host = virtual_service("hosts: [nobody]\nhttp:\n- route: [{destination: {host: greeter, subset: v9}}]\n");
    let unreadable = SERVICE.replace("hosts: [greeter]", "hosts: greeter");
    let (_, problems) = check(&[source("a.yaml", &unreadable), source("b.yaml", &bad_host)]);
    let places: Vec<_> = problems.iter().map(|p| p.at.to_string()).collect();
    assert_eq!(places, ["a.yaml:5:10", "b.yaml:7:51"], "what may be in an object that cannot be read is not missing");
    let sources = [
        source("a.yaml", &SERVICE.replace("127.0.0.1", "localhost")),
        source("b.yaml", &bad_host),
        source("c.yaml", "kind: [\n"),
    ];
    let Err(rejected) = load(&sources) else { panic!("accepted") };
    let places: Vec<_> = rejected.errors.iter().map(|e| e.at.to_string()).collect();
    assert_eq!(places, ["a.yaml:8:25", "c.yaml:1:7"], "references are checked once everything can be read");
    let Err(rejected) = load(&sources[..2]) else { panic!("accepted") };
    let lines = rejected.to_string();
    assert_eq!(
        lines.lines().collect::<Vec<_>>(),
        [
            "a.yaml:8:25: `localhost` is not an IP address: names are resolved where the resolution is DNS",
            "b.yaml:5:11: no ServiceEntry has the host nobody.default.svc.cluster.local",
            "b.yaml:7:51: no DestinationRule for greeter.default.svc.cluster.local has a subset `v9`",
        ]
    );
}

#[test]
fn regular_expressions_are_compiled() {
    let text = virtual_service(
        "hosts: [greeter]\nhttp:\n- match: [{uri: {regex: \"/a(\"}}]\n  route: [{destination: {host: greeter}}]\n",
    );
    assert_findings(&text, &["b.yaml:7:27: bad regular expression `/a(`: unclosed group"]);
}

#[test]
fn weights_are_checked_as_istio_does() {
    let weights = |a: &str, b: &str| {
        virtual_service(&format!(
            "hosts: [greeter]\nhttp:\n- route:\n  - {{destination: {{host: greeter}}, weight: {a}}}\n  - {{destination: {{host: greeter, port: {{number: 50051}}}}, weight: {b}}}\n"
        ))
    };
    assert_findings(&weights("90", "10"), &[]);
    assert_findings(&weights("0", "0"), &["b.yaml:7:5: the weights of the destinations add up to 0"]);
    assert_findings(
        &weights("-1", "101"),
        &[
            "b.yaml:7:5: warning: the weights of the destinations add up to 101, not 100: taken as shares of 101",
            "b.yaml:8:46: weight -1 is out of range",
        ],
    );
    let found = findings(&weights("1", "1"));
    assert_eq!(
        found,
        ["b.yaml:7:5: warning: the weights of the destinations add up to 2, not 100: taken as shares of 2"]
    );
}

#[test]
fn a_port_that_the_host_does_not_have_is_refused() {
    let text =
        virtual_service("hosts: [greeter]\nhttp:\n- route: [{destination: {host: greeter, port: {number: 1}}}]\n");
    assert_findings(&text, &["b.yaml:7:58: host greeter.default.svc.cluster.local has no port 1"]);
}

#[test]
fn what_is_not_honoured_is_said() {
    let text = destination_rule("host: greeter\nexportTo: [\".\"]\ntrafficPolicy:\n  tunnel: {targetHost: x}\n");
    assert_findings(
        &text,
        &["b.yaml:6:3: warning: `exportTo` is not honoured", "b.yaml:8:5: warning: `tunnel` is not honoured"],
    );
    let text = virtual_service(
        "hosts: [greeter]\nhttp:\n- match: [{sourceLabels: {app: a}}]\n  route: [{destination: {host: greeter}}]\n- route: [{destination: {host: greeter}}]\n- route: [{destination: {host: greeter}}]\n",
    );
    let found = findings(&text);
    assert!(found[0].starts_with("b.yaml:7:13: warning: the match is left out"), "{found:?}");
    assert_eq!(found[1], "b.yaml:10:5: warning: never reached: the route at b.yaml:9:5 matches every request");
}

#[test]
fn subsets_are_unique_and_select_something() {
    let text = destination_rule(
        "host: greeter\nsubsets:\n- {name: v1, labels: {version: v1}}\n- {name: v1}\n- {name: v7, labels: {version: v7}}\n",
    );
    assert_findings(
        &text,
        &[
            "b.yaml:8:12: subset v1 is already defined at b.yaml:7:12",
            "b.yaml:9:12: warning: subset v7 selects no endpoint",
        ],
    );
}

#[test]
fn one_host_has_one_virtual_service_and_one_port_once() {
    let one = virtual_service("hosts: [greeter]\nhttp: [{route: [{destination: {host: greeter}}]}]\n");
    let two = one.replace("name: v}", "name: w}");
    assert_findings(
        &format!("{one}---\n{two}"),
        &["b.yaml:12:11: host greeter.default.svc.cluster.local already has a VirtualService, at b.yaml:5:11"],
    );
    let again = SERVICE.replace("name: greeter}", "name: again}");
    assert_findings(
        &again,
        &["b.yaml:7:20: port 50051 of host greeter.default.svc.cluster.local is already defined at a.yaml:5:11"],
    );
}

#[test]
fn same_address_twice_is_refused() {
    let text = SERVICE
        .replace("greeter", "twice")
        .replace("endpoints: [", "endpoints: [{address: 127.0.0.1, ports: {grpc: 6001}}, ");
    assert_findings(&text, &["b.yaml:8:68: 127.0.0.1:6001 serves port 50051 already, at b.yaml:8:25"]);
}

#[test]
fn values_out_of_range_are_refused() {
    let text = destination_rule(
        "host: greeter\ntrafficPolicy:\n  outlierDetection: {maxEjectionPercent: 101, interval: 0s}\n  tls: {mode: STRICT}\n  loadBalancer: {simple: FASTEST}\n",
    );
    assert_findings(
        &text,
        &[
            "b.yaml:7:44: maxEjectionPercent is a percentage, 0 to 100, not 101",
            "b.yaml:7:59: interval must be longer than zero",
            "b.yaml:8:17: unknown tls.mode `STRICT`: known are DISABLE, SIMPLE, MUTUAL, ISTIO_MUTUAL",
            "b.yaml:9:28: unknown load balancer `FASTEST`",
        ],
    );
    let text = virtual_service(
        "hosts: [greeter]\nhttp:\n- route: [{destination: {host: greeter}}]\n  fault: {abort: {percentage: {value: 100}, grpcStatus: SOMETIMES}}\n  retries: {attempts: 2, retryOn: \"5xx,sometimes\"}\n",
    );
    assert_findings(
        &text,
        &["b.yaml:8:59: unknown gRPC status `SOMETIMES`", "b.yaml:9:37: retryOn: unknown condition `sometimes`"],
    );
}

#[test]
fn what_mesh_client_would_ignore_or_refuse_is_said_at_its_place() {
    let text = virtual_service(
        "hosts: [greeter]\nhttp:\n- match: [{uri: {prefix: /a}}, {uri: {prefix: /b}}]\n  rewrite: {uriRegexRewrite: {match: x, rewrite: y}}\n  mirrors: [{destination: {host: greeter}}]\n  route: [{destination: {host: greeter}}]\n- headers: {request: {set: {x: \"%NOPE%\"}}}\n  redirect: {uri: /there}\n",
    );
    assert_findings(
        &text,
        &[
            "b.yaml:11:5: warning: mesh-client: request_headers_to_add[0].header.value: \"%NOPE%\": unknown operator %NOPE%: the RouteConfiguration is refused",
        ],
    );
    let text = destination_rule(
        "host: greeter\nsubsets:\n- {name: v1}\n- {name: v2, trafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true}}}\n",
    );
    let found = findings(&text);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("b.yaml:8:12: warning: mesh-client: transport_socket."), "{found:?}");
    assert!(found[0].ends_with("a client must verify the server: the Cluster is refused"), "{found:?}");
}

#[test]
fn istios_own_sample_is_read() {
    let text = include_str!("../../testdata/greeter.yaml");
    let (model, problems) = check(&[source("greeter.yaml", text)]);
    assert_eq!(problems, []);
    assert_eq!((model.services.len(), model.routings.len(), model.policies.len()), (1, 1, 1));
}

#[test]
fn what_of_telemetry_a_client_is_not_told_is_said() {
    let text = "apiVersion: telemetry.istio.io/v1alpha1
kind: Telemetry
metadata: {name: t}
spec:
  tracing:
  - providers: [{name: jaeger}]
    randomSamplingPercentage: 10
  - {match: {mode: SERVER}, randomSamplingPercentage: 20}
  accessLogging: [{disabled: true}]
  metrics: [{overrides: [{disabled: true}]}]
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: u}
spec: {tracing: [{disableSpanReporting: false}]}
";
    assert_findings(
        text,
        &[
            "b.yaml:6:5: warning: `providers` is not honoured",
            "b.yaml:8:20: warning: `mode: SERVER` is not honoured: sampling is decided by clients",
            "b.yaml:9:3: warning: `accessLogging` is not honoured",
            "b.yaml:10:3: warning: `metrics` is not honoured",
            "b.yaml:14:18: warning: Telemetry default/u has no effect: the one at b.yaml:3:18 is for the same clients",
        ],
    );
    assert_findings(
        "apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: t}
spec: {tracing: [{match: {mode: CLIENTS}, randomSamplingPercentage: 101}]}
",
        &[
            "b.yaml:4:33: unknown mode `CLIENTS`: known are CLIENT, SERVER, CLIENT_AND_SERVER",
            "b.yaml:4:69: randomSamplingPercentage is a percentage, 0 to 100, not 101",
        ],
    );
}

mod security;
