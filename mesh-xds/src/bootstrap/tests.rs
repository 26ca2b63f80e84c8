//! Bootstrap: what is read, what is refused, and what the error says.

use super::*;
use std::{ffi::OsString, io::Write as _};

const FULL: &str = r#"{
    "xds_servers": [
        {
            "server_uri": "dns:///control.example.com:15010",
            "channel_creds": [
                {"type": "google_default"},
                {"type": "tls", "config": {
                    "ca_certificate_file": "/ca.pem", "certificate_file": "/cert.pem",
                    "private_key_file": "/key.pem", "spiffe_trust_bundle_map_file": "/map.json",
                    "refresh_interval": "30s", "colour": "red"
                }},
                {"type": "insecure"}
            ],
            "call_creds": [
                {"type": "oauth2"},
                {"type": "jwt_token_file", "config": {"jwt_token_file": "/token"}}
            ],
            "server_features": ["xds_v3", "ignore_resource_deletion", "trusted_xds_server", "fail_on_data_errors",
                "resource_timer_is_transient_error", "warp_drive"]
        },
        {"server_uri": "fallback:443", "channel_creds": [{"type": "insecure"}]}
    ],
    "node": {
        "id": "sidecar~10.0.0.1", "cluster": "greeter",
        "locality": {"region": "r", "zone": "z", "sub_zone": "s"},
        "metadata": {"GENERATOR": "grpc", "n": 1}
    },
    "certificate_providers": {
        "default": {"plugin_name": "file_watcher", "config": {
            "certificate_file": "/c", "private_key_file": "/k", "ca_certificate_file": "/ca",
            "spiffe_trust_bundle_map_file": "/bundle", "refresh_interval": "1.5s"
        }},
        "vault": {"plugin_name": "vault", "config": {}}
    },
    "client_default_listener_resource_name_template": "lds/%s",
    "server_listener_resource_name_template": "xdstp://a/envoy.config.listener.v3.Listener/%s",
    "authorities": {
        "a": {
            "client_listener_resource_name_template": "xdstp://a/envoy.config.listener.v3.Listener/client/%s",
            "xds_servers": [{"server_uri": "other:1", "channel_creds": [{"type": "insecure"}]}]
        },
        "b": {}
    },
    "allowed_grpc_services": {"dns:///authz": {"channel_creds": [{"type": "insecure"}]}},
    "colour": "blue"
}"#;

#[test]
fn every_field_is_read() {
    let bootstrap = Bootstrap::from_json(FULL).unwrap();
    let server = &bootstrap.servers[0];
    assert_eq!(server.address, ServerAddress::Tcp { host: "control.example.com".into(), port: 15010 });
    assert_eq!(
        server.channel_creds,
        ChannelCreds::Tls(TlsCreds {
            ca_certificate_file: Some("/ca.pem".into()),
            spiffe_trust_bundle_map_file: Some("/map.json".into()),
            certificate_file: Some("/cert.pem".into()),
            private_key_file: Some("/key.pem".into()),
            refresh_interval: Duration::from_secs(30),
        })
    );
    assert_eq!(server.call_creds, [CallCreds::JwtTokenFile("/token".into())]);
    let features = server.features;
    assert!(features.ignore_resource_deletion && features.trusted_xds_server);
    assert!(features.fail_on_data_errors && features.resource_timer_is_transient_error);
    assert_eq!(bootstrap.servers.len(), 2);
    assert_eq!((bootstrap.node.id.as_str(), bootstrap.node.cluster.as_str()), ("sidecar~10.0.0.1", "greeter"));
    assert_eq!((bootstrap.node.locality.zone.as_str(), bootstrap.node.locality.sub_zone.as_str()), ("z", "s"));
    assert_eq!(bootstrap.node.metadata["GENERATOR"], "grpc");
    assert_eq!(
        bootstrap.certificate_providers["default"],
        CertificateProvider::FileWatcher(FileWatcher {
            certificate_file: Some("/c".into()),
            private_key_file: Some("/k".into()),
            ca_certificate_file: Some("/ca".into()),
            spiffe_trust_bundle_map_file: Some("/bundle".into()),
            refresh_interval: Duration::from_millis(1500),
        })
    );
    assert_eq!(bootstrap.certificate_providers["vault"], CertificateProvider::Unknown { plugin: "vault".into() });
    assert_eq!(&*bootstrap.servers_of(Some("a")).unwrap()[0].uri, "other:1");
    assert_eq!(bootstrap.servers_of(Some("b")).unwrap(), bootstrap.servers);
    assert_eq!(bootstrap.allowed_grpc_services["dns:///authz"].channel_creds, ChannelCreds::Insecure);
}

#[test]
fn what_is_ignored_is_noted_with_its_path() {
    let notes = Bootstrap::from_json(FULL).unwrap().notes().join("\n");
    for part in [
        "colour: unknown field",
        "xds_servers[0].channel_creds[1].config.colour: unknown field, ignored",
        "xds_servers[0].channel_creds[0]: unsupported channel credentials \"google_default\"",
        "xds_servers[0].call_creds[0]: unsupported call credentials \"oauth2\"",
        "xds_servers[0].server_features[5]: unknown feature \"warp_drive\"",
        "certificate_providers[\"vault\"]: unknown plugin \"vault\"",
    ] {
        assert!(notes.contains(part), "{part} is not in:\n{notes}");
    }
}

#[test]
fn an_sds_server_is_a_certificate_provider() {
    let provider = |config: &str| {
        let json = format!(
            r#"{{"xds_servers": [{{"server_uri": "a:1", "channel_creds": [{{"type": "insecure"}}]}}],
                "certificate_providers": {{"a": {{"plugin_name": "sds", "config": {config}}}}}}}"#
        );
        Bootstrap::from_json(&json).unwrap().certificate_providers["a"].clone()
    };
    let server = ServerConfig::insecure("unix:/run/agent.sock").unwrap();
    let (certificate, roots) = (Some("default".to_owned()), Some("ROOTCA".to_owned()));
    assert_eq!(
        provider(r#"{"server_uri": "unix:/run/agent.sock"}"#),
        CertificateProvider::Sds(SdsServer { server, certificate, roots })
    );
    let tls =
        r#"{"server_uri": "agent:9", "channel_creds": [{"type": "tls"}], "certificate_name": "", "root_name": "r"}"#;
    let CertificateProvider::Sds(found) = provider(tls) else { panic!() };
    assert!(matches!(found.server.channel_creds, ChannelCreds::Tls(_)));
    assert_eq!((found.certificate, found.roots.as_deref()), (None, Some("r")));
}

#[test]
fn the_least_bootstrap_has_every_default() {
    let json = r#"{"xds_servers": [{"server_uri": "localhost:1", "channel_creds": [{"type": "insecure"}]}]}"#;
    let bootstrap = Bootstrap::from_json(json).unwrap();
    let built = Bootstrap::builder().server("localhost:1").build().unwrap();
    assert_eq!(bootstrap, built);
    assert_eq!(bootstrap.resource_name(None, "greeter:80").unwrap(), "greeter:80");
    assert_eq!(bootstrap.server_resource_name("0.0.0.0:80"), None);
    assert_eq!(bootstrap.notes(), [] as [String; 0]);
}

#[test]
fn wrong_fields_are_named_by_path() {
    let server = r#""server_uri": "a:1", "channel_creds": [{"type": "insecure"}]"#;
    let with = |rest: &str| format!(r#"{{"xds_servers": [{{{server}}}], {rest}}}"#);
    let one = |server: &str| format!(r#"{{"xds_servers": [{server}]}}"#);
    let cases = [
        ("[]".to_owned(), "$", "expected an object, found an array"),
        ("{}".to_owned(), "xds_servers", "at least one"),
        (r#"{"xds_servers": []}"#.to_owned(), "xds_servers", "at least one"),
        (r#"{"xds_servers": 1}"#.to_owned(), "xds_servers", "expected an array, found a number"),
        (one("1"), "xds_servers[0]", "expected an object"),
        (one(r#"{"channel_creds": [{"type": "insecure"}]}"#), "xds_servers[0].server_uri", "missing"),
        (one(r#"{"server_uri": 1}"#), "xds_servers[0].server_uri", "expected a string"),
        (
            one(r#"{"server_uri": "zk://x", "channel_creds": [{"type": "insecure"}]}"#),
            "xds_servers[0].server_uri",
            "unsupported scheme",
        ),
        (one(r#"{"server_uri": "a:1"}"#), "xds_servers[0].channel_creds", "missing"),
        (one(r#"{"server_uri": "a:1", "channel_creds": []}"#), "xds_servers[0].channel_creds", "missing"),
        (
            one(r#"{"server_uri": "a:1", "channel_creds": [{"type": "alts"}]}"#),
            "xds_servers[0].channel_creds",
            "no supported type (\"insecure\", \"tls\") among [alts]",
        ),
        (one(r#"{"server_uri": "a:1", "channel_creds": [{}]}"#), "xds_servers[0].channel_creds[0].type", "missing"),
        (
            one(r#"{"server_uri": "a:1", "channel_creds": [{"type": "tls", "config": {"certificate_file": "x"}}]}"#),
            "xds_servers[0].channel_creds[0].config",
            "together",
        ),
        (
            one(r#"{"server_uri": "a:1", "channel_creds": [{"type": "tls", "config": {"crl_file": "x"}}]}"#),
            "xds_servers[0].channel_creds[0].config.crl_file",
            "not to be ignored",
        ),
        (
            one(r#"{"server_uri": "a:1", "channel_creds": [{"type": "tls", "config": {"spiffe_bundle_map": "x"}}]}"#),
            "xds_servers[0].channel_creds[0].config.spiffe_bundle_map",
            "whom to trust",
        ),
        (
            one(r#"{"server_uri": "a:1", "channel_creds": [{"type": "tls", "config": {"caCertificateFile": "x"}}]}"#),
            "xds_servers[0].channel_creds[0].config.caCertificateFile",
            "whom to trust",
        ),
        (
            with(
                r#""certificate_providers": {"d": {"plugin_name": "file_watcher",
                    "config": {"ca_certificate_file": "c", "crl_directory": "x"}}}"#,
            ),
            "certificate_providers[\"d\"].config.crl_directory",
            "whom to trust",
        ),
        (
            one(r#"{"server_uri": "a:1", "channel_creds": [{"type": "tls", "config": {"refresh_interval": "5m"}}]}"#),
            "xds_servers[0].channel_creds[0].config.refresh_interval",
            "\"5m\" is not a positive duration",
        ),
        (
            one(&format!(r#"{{{server}, "call_creds": [{{"type": "jwt_token_file"}}]}}"#)),
            "xds_servers[0].call_creds[0].config",
            "missing",
        ),
        (
            one(&format!(r#"{{{server}, "call_creds": [{{"type": "jwt_token_file", "config": {{}}}}]}}"#)),
            "xds_servers[0].call_creds[0].config.jwt_token_file",
            "missing",
        ),
        (with(r#""node": "x""#), "node", "expected an object"),
        (with(r#""node": {"id": 5}"#), "node.id", "expected a string"),
        (with(r#""node": {"locality": {"zone": 1}}"#), "node.locality.zone", "expected a string"),
        (with(r#""certificate_providers": {"d": {}}"#), "certificate_providers[\"d\"].plugin_name", "missing"),
        (
            with(r#""certificate_providers": {"d": {"plugin_name": "file_watcher"}}"#),
            "certificate_providers[\"d\"].config",
            "missing",
        ),
        (
            with(r#""certificate_providers": {"d": {"plugin_name": "file_watcher", "config": {}}}"#),
            "certificate_providers[\"d\"].config",
            "names no",
        ),
        (
            with(
                r#""certificate_providers": {"d": {"plugin_name": "file_watcher", "config": {"private_key_file": "k"}}}"#,
            ),
            "certificate_providers[\"d\"].config",
            "together",
        ),
        (
            with(r#""authorities": {"a": {"client_listener_resource_name_template": "xdstp://b/%s"}}"#),
            "authorities[\"a\"].client_listener_resource_name_template",
            "must start with \"xdstp://a/\"",
        ),
        (
            with(r#""authorities": {"a": {"xds_servers": [{"server_uri": "a:1"}]}}"#),
            "authorities[\"a\"].xds_servers[0].channel_creds",
            "missing",
        ),
        (
            with(r#""certificate_providers": {"a": {"plugin_name": "sds", "config": {}}}"#),
            "certificate_providers[\"a\"].config.server_uri",
            "missing",
        ),
        (
            with(r#""certificate_providers": {"a": {"plugin_name": "sds", "config": {"server_uri": "ftp://a"}}}"#),
            "certificate_providers[\"a\"].config.server_uri",
            "unsupported scheme",
        ),
        (
            with(r#""certificate_providers": {"a": {"plugin_name": "sds", "config": {"server_uri": "agent:9"}}}"#),
            "certificate_providers[\"a\"].config.channel_creds",
            "in the clear to another machine",
        ),
        (
            with(
                r#""certificate_providers": {"a": {"plugin_name": "sds", "config":
                    {"server_uri": "unix:/a", "certificate_name": "", "root_name": ""}}}"#,
            ),
            "certificate_providers[\"a\"].config",
            "names no certificate_name",
        ),
        (with(r#""allowed_grpc_services": {"t": {}}"#), "allowed_grpc_services[\"t\"].channel_creds", "missing"),
    ];
    for (json, path, reason) in cases {
        let error = Bootstrap::from_json(&json).expect_err(&json).to_string();
        assert!(error.contains(&format!("xDS bootstrap JSON: {path}: ")), "{error} does not name {path}");
        assert!(error.contains(reason), "{error} does not say {reason}");
    }
}

#[test]
fn syntax_errors_have_line_and_column() {
    let error = Bootstrap::from_json("{\n  \"xds_servers\": [,]\n}").unwrap_err().to_string();
    assert!(error.contains("line 2 column 19"), "{error}");
}

fn vars(file: Option<&str>, json: Option<&str>) -> Result<Bootstrap, BootstrapError> {
    Bootstrap::from_vars(|name| match name {
        ENV_FILE => file.map(OsString::from),
        ENV_CONFIG => json.map(OsString::from),
        other => panic!("{other} was read"),
    })
}

const LEAST: &str = r#"{"xds_servers": [{"server_uri": "a:1", "channel_creds": [{"type": "insecure"}]}]}"#;

#[test]
fn the_file_wins_over_the_inline_json() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(LEAST.as_bytes()).unwrap();
    let path = file.path().to_str().unwrap();
    assert_eq!(&*vars(Some(path), Some("nonsense")).unwrap().servers[0].uri, "a:1");
    assert_eq!(&*vars(None, Some(LEAST)).unwrap().servers[0].uri, "a:1");
    assert_eq!(&*vars(Some(""), Some(LEAST)).unwrap().servers[0].uri, "a:1");
}

#[test]
fn the_error_says_which_variable_or_file() {
    let missing = vars(None, None).unwrap_err().to_string();
    assert!(missing.contains(ENV_FILE) && missing.contains(ENV_CONFIG), "{missing}");
    let empty = vars(None, Some("")).unwrap_err().to_string();
    assert!(empty.contains("GRPC_XDS_BOOTSTRAP_CONFIG) is empty"), "{empty}");
    let blank = vars(None, Some(" \n")).unwrap_err().to_string();
    assert!(blank.contains("GRPC_XDS_BOOTSTRAP_CONFIG) is empty"), "{blank}");
    let malformed = vars(None, Some("{")).unwrap_err().to_string();
    assert!(malformed.contains("GRPC_XDS_BOOTSTRAP_CONFIG) is not valid JSON"), "{malformed}");
    let unreadable = vars(Some("/does/not/exist.json"), None).unwrap_err().to_string();
    assert!(unreadable.contains("/does/not/exist.json (from GRPC_XDS_BOOTSTRAP) cannot be read"), "{unreadable}");
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"{}").unwrap();
    let wrong = Bootstrap::from_file(file.path()).unwrap_err().to_string();
    assert!(wrong.contains(file.path().to_str().unwrap()) && wrong.contains("xds_servers"), "{wrong}");
}

#[test]
fn server_uris_take_every_usual_form() {
    let tcp = |host: &str, port| Some(ServerAddress::Tcp { host: host.into(), port });
    for (uri, expected) in [
        ("a:1", tcp("a", 1)),
        ("a", tcp("a", 443)),
        ("127.0.0.1:15010", tcp("127.0.0.1", 15010)),
        ("[::1]:5", tcp("::1", 5)),
        ("http://a:1", tcp("a", 1)),
        ("http://a/", tcp("a", 80)),
        ("https://a", tcp("a", 443)),
        ("dns:///a:1", tcp("a", 1)),
        ("dns:a:1", tcp("a", 1)),
        ("unix:///run/xds", Some(ServerAddress::Unix("/run/xds".into()))),
        ("unix:xds.sock", Some(ServerAddress::Unix("xds.sock".into()))),
        ("", None),
        (":1", None),
        ("a:0", None),
        ("a:65536", None),
        ("a:b", None),
        ("http://a/path", None),
        ("zk://a", None),
        ("unix:", None),
        ("a b:1", None),
    ] {
        assert_eq!(ServerAddress::parse(uri).ok(), expected, "{uri}");
    }
    assert_eq!(ServerAddress::parse("[::1]:5").unwrap().to_string(), "[::1]:5");
}

#[test]
fn names_follow_the_templates() {
    let bootstrap = Bootstrap::from_json(FULL).unwrap();
    let name = |authority, target| bootstrap.resource_name(authority, target).unwrap();
    assert_eq!(name(None, "greeter:80"), "lds/greeter:80");
    assert_eq!(name(Some(""), "greeter:80"), "lds/greeter:80");
    assert_eq!(name(Some("a"), "x y%"), "xdstp://a/envoy.config.listener.v3.Listener/client/x%20y%25");
    assert_eq!(name(Some("b"), "greeter:80"), "xdstp://b/envoy.config.listener.v3.Listener/greeter:80");
    assert_eq!(
        bootstrap.server_resource_name("[::1]:80").unwrap(),
        "xdstp://a/envoy.config.listener.v3.Listener/%5B::1%5D:80"
    );
    let error = bootstrap.resource_name(Some("nobody"), "x").unwrap_err().to_string();
    assert!(error.contains("\"nobody\"") && error.contains("[a, b]"), "{error}");
    assert!(bootstrap.servers_of(Some("nobody")).is_err());
}

#[test]
fn the_authority_of_a_resource_is_in_its_xdstp_name() {
    for (name, expected) in [
        ("greeter", None),
        ("xdstp:///x/y", None),
        ("xdstp://a/envoy.config.listener.v3.Listener/x", Some("a")),
        ("http://a/x", None),
    ] {
        assert_eq!(authority_of(name), expected, "{name}");
    }
}

#[test]
fn the_builder_checks_as_strictly_as_the_json() {
    let path = |builder: BootstrapBuilder| builder.build().unwrap_err().to_string();
    assert!(path(Bootstrap::builder()).contains("builder: xds_servers: at least one"));
    assert!(path(Bootstrap::builder().server("a:1").server("a:x")).contains("xds_servers[1].server_uri"));
    let authority = Authority { client_listener_template: Some("xdstp://b/%s".into()), ..Authority::default() };
    assert!(path(Bootstrap::builder().server("a:1").authority("a", authority)).contains("must start with"));
}
