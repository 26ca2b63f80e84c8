//! The program as its users run it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead as _, BufReader, Lines},
    path::Path,
    process::{Child, ChildStdout, Command, Output, Stdio},
};

const SERVICE: &str = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter}
spec:
  hosts: [greeter]
  resolution: STATIC
  ports: [{number: 50051, name: grpc, protocol: GRPC}]
  endpoints: [{address: 127.0.0.1, ports: {grpc: 6001}, serviceAccount: greeter}]
";

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mesh-control"))
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = program().args(args).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap())
}

/// A running `serve`, killed when the test ends before it does.
struct Serve {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Serve {
    fn start(args: &[&str]) -> Self {
        Self::start_at(&std::env::temp_dir(), args)
    }

    fn start_at(home: &Path, args: &[&str]) -> Self {
        let mut child = program().env("HOME", home).arg("serve").args(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next line of the output, which must begin like this.
    #[track_caller]
    fn line(&mut self, beginning: &str) -> String {
        let line = self.lines.next().expect("the program goes on").unwrap();
        assert!(line.starts_with(beginning), "{line}");
        line
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn lint_exits_with_1_on_errors_and_names_their_places() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let good = file("good.yaml", SERVICE);
    assert_eq!(run(&["lint", &good]), (Some(0), "1 files, 0 errors, 0 warnings\n".to_owned()));
    let bad = file("bad.yaml", "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g}\n");
    let (code, output) = run(&["lint", &good, &bad]);
    let known = "known are ServiceEntry, VirtualService, DestinationRule";
    assert_eq!(output, format!("{bad}:2:7: unknown kind `Gateway`: {known}\n2 files, 1 errors, 0 warnings\n"));
    assert_eq!(code, Some(1));
    let (code, output) = run(&["lint", "no-such-file.yaml"]);
    assert!(code == Some(1) && output.starts_with("cannot read: no-such-file.yaml: "), "{output}");
}

#[test]
fn bootstrap_prints_what_our_client_accepts() {
    let args = ["--server", "127.0.0.1:1", "--identity-dir", "id", "--node-id", "n", "--workload", "prod/shop"];
    let (code, output) = run(&[&["bootstrap"], &args[..]].concat());
    assert_eq!(code, Some(0));
    mesh_xds::Bootstrap::from_json(&output).unwrap();
    let json: serde_json::Value = serde_json::from_str(&output).unwrap();
    assert_eq!(json["node"]["id"], "n");
    let metadata = &json["node"]["metadata"];
    assert_eq!((&metadata["NAMESPACE"], &metadata["SERVICE_ACCOUNT"]), (&"prod".into(), &"shop".into()));
    let key = json["certificate_providers"]["default"]["config"]["private_key_file"].as_str().unwrap();
    assert!(Path::new(key).is_absolute() && key.ends_with("id/key.pem"), "{key}");
}

#[test]
fn help_of_every_command_has_examples() {
    for args in [&["--help"][..], &["serve", "--help"], &["bootstrap", "--help"], &["lint", "--help"]] {
        let (code, output) = run(args);
        assert!(code == Some(0) && output.contains("Examples:\n  mesh-control "), "{output}");
    }
}

#[cfg(unix)]
#[test]
fn serve_tells_what_it_does_and_ends_on_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let (config, ca) = (dir.path().join("mesh"), dir.path().join("ca"));
    std::fs::create_dir(&config).unwrap();
    let file = config.join("services.yaml");
    std::fs::write(&file, SERVICE).unwrap();
    let (config, ca) = (config.display().to_string(), ca.display().to_string());
    let mut serve =
        Serve::start(&["--config", &config, "--listen", "127.0.0.1:0", "--ca", &ca, "--identity", "default/more"]);
    serve.line("listening on 127.0.0.1:");
    for identity in ["client", "default", "greeter", "more"] {
        serve.line(&format!("identity of default/{identity} in {ca}/ns/default/sa/{identity}"));
    }
    let serving = "1 ServiceEntries, 0 VirtualServices, 0 DestinationRules; certificates by request on 127.0.0.1:";
    serve.line(&format!("serving {config}: {serving}"));

    std::fs::write(&file, SERVICE.replace("hosts:", "host:")).unwrap();
    serve.line(&format!("{}:5:3: ServiceEntry has no hosts", file.display()));
    serve.line(&format!("{}:5:3: unknown field `host` in ServiceEntry.spec: did you mean `hosts`?", file.display()));
    serve.line("not applied: the configuration before it stays");
    std::fs::write(&file, SERVICE.replace("6001", "6002")).unwrap();
    serve.line("applied as version 2");

    let kill = Command::new("kill").args(["-TERM", &serve.child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    serve.line("stopping");
    assert!(serve.child.wait().unwrap().success());
}

#[cfg(unix)]
#[test]
fn a_strict_mesh_has_an_authority_of_its_own() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("mesh.yaml");
    std::fs::write(&config, SERVICE).unwrap();
    let config = config.display().to_string();
    let args = ["--config", &config, "--listen", "127.0.0.1:0", "--mtls", "strict", "--certificate-lifetime", "60"];
    let mut serve = Serve::start_at(home.path(), &args);
    serve.line("listening on 127.0.0.1:");
    let ca = home.path().join(".mesh-ca");
    serve.line(&format!("identity of default/client in {}/ns/default/sa/client", ca.display()));
    assert!(ca.join("ns/default/sa/greeter/api.sock").exists());
    assert!(!serve.lines.next().unwrap().unwrap().is_empty());
}
