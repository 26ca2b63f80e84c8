//! `VirtualService`: hosts and their HTTP routes.

use super::{Node, export_to, full_host, hosts};
use crate::{
    input::{fields::Fields, node::Key},
    model::{
        Abort, Action, Destination, Direct, Fault, Forward, HeaderEdits, HeaderOps, Mirror, Object, Redirect, Retries,
        Rewrite, Route, RouteMatch, Routing, StringMatch,
    },
    problem::{At, Located, Report},
};
use mesh_xds::resource::SafeRegex;
use std::collections::BTreeMap;

/// The gateway name that means "every client in the mesh".
const MESH: &str = "mesh";

pub(super) fn read(object: Object, spec: &Node, report: &Report) -> Option<Routing> {
    let (routing, in_mesh) = spec.fields(report, "VirtualService.spec", |f| {
        let hosts = hosts(f, &object);
        export_to(f);
        f.not_honoured(&["tcp", "tls"]);
        let gateways = f.strings("gateways");
        let in_mesh = gateways.is_empty() || gateways.iter().any(|g| g.value == MESH);
        if !in_mesh && let Some((key, _)) = f.entry("gateways") {
            report.warning(&key.at, "not honoured: these routes are for gateways, and not for `mesh`");
        }
        if f.get("http").is_none_or(Node::is_empty_list) {
            report.warning(object.at(), format!("{object} has no HTTP routes: every call fails"));
        }
        let routes = f.list("http").iter().filter_map(|node| route(node, &object.namespace, report)).collect();
        (Routing { object: object.clone(), hosts, routes }, in_mesh)
    })?;
    in_mesh.then_some(routing)
}

fn route(node: &Node, namespace: &str, report: &Report) -> Option<Route> {
    node.fields(report, "an HTTP route", |f| {
        let name = f.text("name").unwrap_or_default();
        let given = f.list("match");
        let matches: Vec<_> = given.iter().filter_map(|node| route_match(node, report)).collect();
        let headers = f.nested("headers", header_edits).unwrap_or_default();
        let fault = f.nested("fault", fault);
        f.not_honoured(&["corsPolicy"]);
        if let Some((key, _)) = f.entry("delegate") {
            report.error(&key.at, "delegate is not supported");
        }
        let forward = forward(f, namespace);
        let redirect = f.nested("redirect", redirect);
        let direct = f.nested("directResponse", direct);
        let action = match (forward.destinations.is_empty(), redirect, direct) {
            (false, None, None) => Action::Forward(Box::new(forward)),
            (true, Some(redirect), None) => Action::Redirect(redirect),
            (true, None, Some(direct)) => Action::Direct(direct),
            (true, None, None) => {
                // Destinations that could not be read are reported by themselves.
                if f.list("route").is_empty() && f.get("delegate").is_none() {
                    report.error(&node.at, "the route has neither route, redirect nor directResponse");
                }
                return None;
            }
            _ => {
                report.error(&node.at, "the route has more than one of route, redirect and directResponse");
                return None;
            }
        };
        // Every match was for other clients: none is left to match, which is not the same as none given.
        if !given.is_empty() && matches.is_empty() {
            return None;
        }
        Some(Route { at: node.at.clone(), name, matches, action, fault, headers })
    })?
}

fn route_match(node: &Node, report: &Report) -> Option<RouteMatch> {
    let (found, for_us) = node.fields(report, "a match", |f| {
        f.skip(&["statPrefix"]);
        let gateways = f.strings("gateways");
        let elsewhere = !gateways.is_empty() && gateways.iter().all(|g| g.value != MESH);
        let by_source = f.get("sourceLabels").is_some() || f.get("sourceNamespace").is_some();
        if elsewhere || by_source {
            let reason =
                "the match is left out: which client asks (gateways, sourceLabels, sourceNamespace) is not known here";
            report.warning(&node.at, reason);
        }
        let mut headers = string_matches(f, "headers");
        for (field, header) in [("method", ":method"), ("authority", ":authority"), ("scheme", ":scheme")] {
            if let Some(matcher) = f.get(field).and_then(|node| string_match(node, report, field)) {
                headers.insert(header.to_owned(), matcher);
            }
        }
        let found = RouteMatch {
            name: f.text("name").unwrap_or_default(),
            uri: f.get("uri").and_then(|node| string_match(node, report, "uri")).flatten(),
            ignore_uri_case: f.bool("ignoreUriCase").unwrap_or(false),
            headers,
            without_headers: string_matches(f, "withoutHeaders"),
            query: string_matches(f, "queryParams"),
            port: f.port("port").map(|p| p.value),
        };
        (found, !elsewhere && !by_source)
    })?;
    for_us.then_some(found)
}

fn string_matches(f: &Fields<'_>, name: &'static str) -> BTreeMap<String, Option<StringMatch>> {
    let entry = |(key, node): &(Key, Node)| {
        // Headers are compared in lower case; query parameters as they are.
        let name = if name == "queryParams" { key.name.clone() } else { key.name.to_ascii_lowercase() };
        Some((name, string_match(node, f.report, &key.name)?))
    };
    f.map(name).iter().filter_map(entry).collect()
}

/// `Some(None)` is "present": an empty matcher, nothing, or a regex that takes everything.
fn string_match(node: &Node, report: &Report, what: &str) -> Option<Option<StringMatch>> {
    node.fields(report, &format!("the match of {what}"), |f| {
        let exact = f.text("exact").map(StringMatch::Exact);
        let prefix = f.text("prefix").map(StringMatch::Prefix);
        let regex = f.string("regex").inspect(|r| check_regex(r, report)).map(|r| StringMatch::Regex(r.value));
        let given = [exact, prefix, regex].into_iter().flatten().collect::<Vec<_>>();
        if given.len() > 1 {
            report.error(&node.at, format!("the match of {what} has more than one of exact, prefix and regex"));
        }
        given.into_iter().next().filter(|m| !matches!(m, StringMatch::Regex(r) if r == "*" || r == ".*"))
    })
}

fn check_regex(regex: &Located<String>, report: &Report) {
    // Istio reads a lone star as "present".
    if regex.value != "*"
        && let Err(error) = SafeRegex::new(&regex.value)
    {
        // The last line says what; those before draw where, in an expression that is wrapped.
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        report.error(&regex.at, format!("bad regular expression `{}`: {reason}", regex.value));
    }
}

fn forward(f: &Fields<'_>, namespace: &str) -> Forward {
    let report = f.report;
    let destinations: Vec<_> =
        f.list("route").iter().filter_map(|node| weighted_destination(node, namespace, report)).collect();
    let mut mirrors: Vec<_> = f.list("mirrors").iter().filter_map(|node| mirror(node, namespace, report)).collect();
    let old_percentage = f.nested("mirrorPercentage", |p| p.percentage("value")).flatten();
    let older_percentage = f.percentage("mirrorPercent").or_else(|| f.percentage("mirror_percent"));
    if let Some(destination) = f.get("mirror").and_then(|node| destination(node, namespace, report)) {
        mirrors.push(Mirror { destination, percentage: old_percentage.or(older_percentage).unwrap_or(100.0) });
    }
    Forward {
        destinations,
        timeout: f.duration("timeout"),
        retries: f.nested("retries", retries),
        mirrors,
        rewrite: f.nested("rewrite", rewrite),
    }
}

fn weighted_destination(node: &Node, namespace: &str, report: &Report) -> Option<Destination> {
    node.fields(report, "a destination of the route", |f| {
        let found = f.get("destination").and_then(|node| destination(node, namespace, report));
        if f.get("destination").is_none() {
            f.missing("destination", "the item of route");
        }
        let weight = f.int::<i64>("weight").unwrap_or(0);
        let weight = u32::try_from(weight).unwrap_or_else(|_| {
            let at = f.get("weight").map_or(f.at, |node| &node.at);
            report.error(at, format!("weight {weight} is out of range"));
            0
        });
        let headers = f.nested("headers", header_edits).unwrap_or_default();
        Some(Destination { weight, headers, ..found? })
    })?
}

fn destination(node: &Node, namespace: &str, report: &Report) -> Option<Destination> {
    node.fields(report, "a destination", |f| {
        let host = f.required_string("host", "the destination").map(|h| full_host(h, namespace));
        let subset = f.string("subset").filter(|s| !s.value.is_empty());
        let port = f.nested("port", |p| p.port("number")).flatten();
        Some(Destination { host: host?, subset, port, weight: 0, headers: HeaderEdits::default() })
    })?
}

fn mirror(node: &Node, namespace: &str, report: &Report) -> Option<Mirror> {
    node.fields(report, "a mirror", |f| {
        let found = f.get("destination").and_then(|node| destination(node, namespace, report));
        if f.get("destination").is_none() {
            f.missing("destination", "the mirror");
        }
        let percentage = f.nested("percentage", |p| p.percentage("value")).flatten();
        Some(Mirror { destination: found?, percentage: percentage.unwrap_or(100.0) })
    })?
}

fn retries(f: &Fields<'_>) -> Retries {
    let attempts = f.int::<u32>("attempts").unwrap_or(0);
    let on = f.string("retryOn");
    if let Some(on) = &on {
        check_retry_on(on, f.report);
    }
    Retries {
        attempts,
        per_try_timeout: f.duration("perTryTimeout").filter(|t| !t.is_zero()),
        on: on.map(|on| on.value).unwrap_or_default(),
        backoff: f.positive_duration("backoff"),
        remote_localities: f.bool("retryRemoteLocalities").unwrap_or(false),
        ignore_previous_hosts: f.bool("retryIgnorePreviousHosts").unwrap_or(true),
    }
}

fn check_retry_on(on: &Located<String>, report: &Report) {
    const KNOWN: &[&str] = &[
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "envoy-ratelimited",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "http3-post-connect-failure",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
    ];
    for word in on.value.split(',').map(str::trim) {
        let status = word.parse::<u16>().is_ok_and(|n| (100..600).contains(&n));
        if !word.is_empty() && !status && !KNOWN.contains(&word) {
            report.error(&on.at, format!("retryOn: unknown condition `{word}`"));
        }
    }
}

fn fault(f: &Fields<'_>) -> Fault {
    let delay = f.nested("delay", |d| {
        if let Some((key, _)) = d.entry("exponentialDelay") {
            d.report.error(&key.at, "exponentialDelay is not supported");
        }
        let fixed = d.positive_duration("fixedDelay");
        if d.get("fixedDelay").is_none() {
            d.missing("fixedDelay", "the delay");
        }
        let share = share(d, "delayed");
        Some((fixed?, share))
    });
    let abort = f.nested("abort", |a| {
        let http = a.get("httpStatus").and_then(|node| status(node, a.report, 200..600)).map(Abort::Http);
        let grpc = a.string("grpcStatus").and_then(|s| grpc_status(&s, a.report)).map(Abort::Grpc);
        if let Some((key, _)) = a.entry("http2Error") {
            a.report.error(&key.at, "http2Error is not supported");
        }
        let share = share(a, "aborted");
        if a.get("httpStatus").is_some() == a.get("grpcStatus").is_some() {
            a.report.error(a.at, "the abort has one of httpStatus and grpcStatus");
        }
        Some((http.or(grpc)?, share))
    });
    Fault { delay: delay.flatten(), abort: abort.flatten() }
}

/// Istio: "if not specified, no request is delayed" (or aborted).
fn share(f: &Fields<'_>, done: &str) -> f64 {
    let new = f.nested("percentage", |p| p.percentage("value")).flatten();
    let share = new.or_else(|| f.percentage("percent"));
    if f.get("percentage").is_none() && f.get("percent").is_none() {
        f.report.warning(f.at, format!("without a percentage no request is {done}"));
    }
    share.unwrap_or(0.0)
}

fn status(node: &Node, report: &Report, range: std::ops::Range<u16>) -> Option<u16> {
    let status = node.int::<u16>(report, "status")?;
    if !range.contains(&status) {
        report.error(&node.at, format!("{status} is not an HTTP status of {}..={}", range.start, range.end - 1));
        return None;
    }
    Some(status)
}

fn grpc_status(status: &Located<String>, report: &Report) -> Option<u32> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    let numbers = (0..).zip(NAMES);
    let found = numbers.into_iter().find(|(n, name)| status.value == *name || status.value == n.to_string());
    if found.is_none() {
        report.error(&status.at, format!("unknown gRPC status `{}`", status.value));
    }
    found.map(|(n, _)| n)
}

fn rewrite(f: &Fields<'_>) -> Rewrite {
    let non_empty = |s: &String| !s.is_empty();
    let uri_regex = f.nested("uriRegexRewrite", |r| {
        let regex = r.required_string("match", "uriRegexRewrite");
        if let Some(regex) = &regex {
            check_regex(regex, r.report);
        }
        let substitution = r.text("rewrite").unwrap_or_default();
        Some((regex?.value, substitution))
    });
    Rewrite {
        uri: f.text("uri").filter(non_empty),
        uri_regex: uri_regex.flatten(),
        authority: f.text("authority").filter(non_empty),
    }
}

fn redirect(f: &Fields<'_>) -> Redirect {
    let code = f.get("redirectCode").and_then(|node| {
        let code = node.int::<u16>(f.report, "redirectCode")?;
        if ![301, 302, 303, 307, 308].contains(&code) {
            f.report.error(&node.at, format!("redirectCode is 301, 302, 303, 307 or 308, not {code}"));
            return None;
        }
        Some(code)
    });
    f.not_honoured(&["derivePort"]);
    let non_empty = |s: &String| !s.is_empty();
    Redirect {
        uri: f.text("uri").filter(non_empty),
        authority: f.text("authority").filter(non_empty),
        port: f.port("port").map(|p| p.value),
        scheme: f.text("scheme").filter(non_empty),
        code: code.unwrap_or(301),
    }
}

fn direct(f: &Fields<'_>) -> Direct {
    let status = f.get("status").and_then(|node| status(node, f.report, 100..600));
    if f.get("status").is_none() {
        f.missing("status", "directResponse");
    }
    let body = f.nested("body", |b| {
        if let Some((key, _)) = b.entry("bytes") {
            b.report.error(&key.at, "bytes is not supported: use string");
        }
        b.text("string").unwrap_or_default().into_bytes()
    });
    Direct { status: status.unwrap_or(200), body: body.unwrap_or_default() }
}

fn header_edits(f: &Fields<'_>) -> HeaderEdits {
    HeaderEdits {
        request: f.nested("request", header_ops).unwrap_or_default(),
        response: f.nested("response", header_ops).unwrap_or_default(),
    }
}

fn header_ops(f: &Fields<'_>) -> HeaderOps {
    let remove = f.strings("remove");
    for name in f.map("set").iter().chain(f.map("add")).map(|(key, _)| (&key.name, &key.at)) {
        check_header_name(name.0, name.1, f.report);
    }
    for name in &remove {
        check_header_name(&name.value, &name.at, f.report);
    }
    HeaderOps {
        set: f.string_map("set"),
        add: f.string_map("add"),
        remove: remove.into_iter().map(|r| r.value).collect(),
    }
}

fn check_header_name(name: &str, at: &At, report: &Report) {
    let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let bare = name.strip_prefix(':').unwrap_or(name);
    if bare.is_empty() || !bare.chars().all(token) {
        report.error(at, format!("`{name}` is not a header name"));
    }
}
