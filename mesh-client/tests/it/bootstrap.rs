//! Bootstraps and targets that cannot be used: the error names the source and the field.

use crate::support::{GUARD, TARGET, assert_says, greeter, hello, plain_mesh, service};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use std::{path::Path, process::Command};

const CHILD: &str = "MESH_TEST_CHILD";
const FILE: &str = "GRPC_XDS_BOOTSTRAP";
const CONFIG: &str = "GRPC_XDS_BOOTSTRAP_CONFIG";

fn json(server: &str) -> String {
    format!(r#"{{"xds_servers": [{{"server_uri": "{server}", "channel_creds": [{{"type": "insecure"}}]}}]}}"#)
}

/// What `Mesh::from_env` says in a process with these variables.
fn from_env(file: Option<&Path>, config: Option<&str>) -> String {
    child("the_environment_names_the_bootstrap", file, config)
}

/// What this test says in a process with these variables. The environment belongs to the whole process, so the test starts itself
/// again.
fn child(test: &str, file: Option<&Path>, config: Option<&str>) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("bootstrap::{test}"), "--nocapture"]);
    child.env_remove(FILE).env_remove(CONFIG).env(CHILD, "1");
    if let Some(file) = file {
        child.env(FILE, file);
    }
    if let Some(config) = config {
        child.env(CONFIG, config);
    }
    let output = child.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let said = text.lines().find_map(|line| line.split_once("from_env: ")).map(|(_, said)| said.to_owned());
    said.unwrap_or_else(|| panic!("the child said nothing:\n{text}"))
}

/// The child: says what it got.
fn say() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let said = runtime.block_on(async {
        match Mesh::from_env().await {
            Ok(mesh) => format!("{mesh:?}"),
            Err(error) => error.to_string(),
        }
    });
    eprintln!("from_env: {said}");
}

#[test]
fn the_environment_names_the_bootstrap() {
    if std::env::var_os(CHILD).is_some() {
        return say();
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    assert_says(&from_env(None, None), &["no xDS bootstrap", FILE, CONFIG]);
    assert_says(&from_env(None, Some("")), &[CONFIG, "is empty"]);
    assert_says(&from_env(None, Some("  ")), &[CONFIG, "is empty"]);
    assert_says(&from_env(None, Some("{oops")), &[CONFIG, "not valid JSON", "line 1 column 2"]);
    assert_says(&from_env(None, Some(&json("config:1"))), &["config:1"]);

    let good = file("good.json", &json("file:1"));
    assert_says(&from_env(Some(&good), Some(&json("config:1"))), &["file:1"]);
    let missing = dir.path().join("missing.json");
    assert_says(
        &from_env(Some(&missing), Some(&json("config:1"))),
        &["missing.json", FILE, "cannot be read", "No such file"],
    );
    assert_says(&from_env(Some(&file("empty.json", "")), None), &["empty.json", FILE, "is empty"]);
    let wrong = file("wrong.json", r#"{"xds_servers": [{"server_uri": 7}]}"#);
    assert_says(&from_env(Some(&wrong), None), &["wrong.json", FILE, "xds_servers[0].server_uri"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_is_all_that_a_call_needs() {
    if std::env::var_os(CHILD).is_some() {
        let channel = Mesh::from_env().await.unwrap().channel(TARGET).unwrap();
        let reply = tokio::time::timeout(GUARD, hello(&channel)).await.expect("hangs").unwrap();
        return eprintln!("from_env: {}", reply.backend);
    }
    let (one, two) = (greeter("one").await, greeter("two").await);
    let serve = async |addr| ControlPlane::builder().yaml(service(&[("v1", addr)])).start().await.unwrap();
    let (by_file, by_config) = (serve(one.addr()).await, serve(two.addr()).await);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bootstrap.json");
    std::fs::write(&file, by_file.bootstrap()).unwrap();
    let config = by_config.bootstrap();
    let said = tokio::task::spawn_blocking(move || {
        let child = |file, config| child("the_environment_is_all_that_a_call_needs", file, config);
        [child(None, Some(&config)), child(Some(&file), None), child(Some(&file), Some(&config))]
    });
    assert_eq!(said.await.unwrap(), ["two", "one", "one"], "the file wins");
}

#[tokio::test]
async fn a_wrong_field_is_named_by_its_path() {
    let cases = [
        ("", "is empty"),
        ("[]", "$: "),
        ("{}", "xds_servers"),
        (r#"{"xds_servers": []}"#, "xds_servers"),
        (r#"{"xds_servers": [{"channel_creds": []}]}"#, "xds_servers[0].server_uri"),
        (
            r#"{"xds_servers": [{"server_uri": "a:1", "channel_creds": [{"type": "magic"}]}]}"#,
            "xds_servers[0].channel_creds",
        ),
        (r#"{"xds_servers": [{"server_uri": "a:1", "channel_creds": [{"type": "insecure"}]}], "node": 5}"#, "node"),
    ];
    for (json, path) in cases {
        let error = Mesh::builder().bootstrap_json(json).unwrap_err().to_string();
        assert_says(&error, &["xDS bootstrap JSON", path]);
    }
}

#[tokio::test]
async fn a_target_that_cannot_be_opened_says_why() {
    let mesh = plain_mesh().await;
    let cases = [
        ("carrier-pigeon:///greeter", "unknown scheme `carrier-pigeon`; known are xds, host, dns, ipv4 and ipv6"),
        ("greeter", "has no scheme"),
        ("dns:///greeter", "has no port"),
        ("ipv4:here:1", "`here:1` is not ADDRESS:PORT"),
        ("xds:///greeter", "the mesh has no control plane: set GRPC_XDS_BOOTSTRAP"),
    ];
    for (target, reason) in cases {
        let error = mesh.channel(target).unwrap_err().to_string();
        assert_says(&error, &[target, reason]);
    }
    let mesh = Mesh::builder().bootstrap_json(&json("localhost:1")).unwrap().build().await.unwrap();
    let error = mesh.channel("xds://elsewhere/greeter").unwrap_err().to_string();
    assert_says(&error, &["xds://elsewhere/greeter", "authority", "elsewhere"]);
}
