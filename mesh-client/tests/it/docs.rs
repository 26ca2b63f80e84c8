//! The documents stay true.

use std::path::Path;

#[test]
fn docs_features_name_real_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let features = std::fs::read_to_string(root.join("docs/features.md")).unwrap();
    let names: Vec<_> = features.split('`').filter_map(|code| code.split_once(".rs::")).collect();
    assert!(names.len() > 40, "only {} tests are named", names.len());
    for (file, test) in names {
        let path = root.join(format!("{file}.rs"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(text.contains(&format!("fn {test}(")), "{file}.rs has no test {test}");
    }
}

/// The names of the fields of a message, as its `Debug` output has them.
fn fields(message: &impl std::fmt::Debug) -> Vec<String> {
    let text = format!("{message:#?}");
    let top =
        text.lines().filter_map(|line| line.strip_prefix("    ").filter(|line| !line.starts_with([' ', ']', '}'])));
    top.filter_map(|line| Some(line.split_once(": ")?.0.to_owned())).collect()
}

#[test]
fn docs_fields_name_every_field() {
    use envoy_types::pb::envoy::{
        config::{
            cluster::v3::{CircuitBreakers, Cluster, OutlierDetection, circuit_breakers::Thresholds},
            core::v3::{Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions},
            route::v3::{RetryPolicy, RouteAction, RouteMatch},
        },
        extensions::upstreams::http::v3::HttpProtocolOptions as Upstream,
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let document = std::fs::read_to_string(root.join("docs/fields.md")).unwrap();
    // Alternatives, each of which has a row, and what Envoy has deprecated and hidden.
    let beside = [
        "cluster_specifier",
        "host_rewrite_specifier",
        "path_specifier",
        "cluster_discovery_type",
        "lb_config",
        "upstream_protocol_options",
        "internal_redirect_action",
        "max_internal_redirects",
        "use_balsa_parser",
    ];
    let messages = [
        ("RouteAction", fields(&RouteAction::default())),
        ("RouteMatch", fields(&RouteMatch::default())),
        ("RetryPolicy", fields(&RetryPolicy::default())),
        ("Cluster", fields(&Cluster::default())),
        ("OutlierDetection", fields(&OutlierDetection::default())),
        ("CircuitBreakers", fields(&CircuitBreakers::default())),
        ("CircuitBreakers", fields(&Thresholds::default())),
        ("HttpProtocolOptions", fields(&Upstream::default())),
        ("HttpProtocolOptions", fields(&HttpProtocolOptions::default())),
        ("HttpProtocolOptions", fields(&Http1ProtocolOptions::default())),
        ("HttpProtocolOptions", fields(&Http2ProtocolOptions::default())),
    ];
    for (section, fields) in messages {
        assert!(fields.len() >= 2, "{section}: {fields:?}");
        let (_, rest) = document.split_once(&format!("\n## {section}\n")).expect("it has a section");
        let text = rest.split("\n## ").next().expect("the section itself");
        let named: Vec<_> = text.split('`').skip(1).step_by(2).collect();
        for field in fields.iter().filter(|field| !beside.contains(&field.as_str())) {
            let is = |name: &&str| match name.strip_suffix('*') {
                Some(start) => field.starts_with(start),
                None => name.split('.').next() == Some(field),
            };
            assert!(named.iter().any(is), "docs/fields.md says nothing of {section}.{field}");
        }
    }
}
