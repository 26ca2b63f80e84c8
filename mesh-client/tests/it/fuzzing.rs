//! The fuzz targets on a stable toolchain: the corpora in `fuzz/corpus`, and changes of them.
//!
//! `MESH_FUZZ_SECONDS=60` gives each target that long; `fuzz/` has them for libFuzzer.

use envoy_types::pb::envoy::config::{cluster::v3::Cluster, route::v3::RouteConfiguration};
use examples::greeter::HelloRequest;
use mesh_client::fuzz_api::TARGETS;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use prost::Message;
use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
    time::Duration,
};
use tokio::time::Instant;

/// Of each target, when no time is given.
const EXECUTIONS: u32 = 4_000;

/// The corpus of a target; that of resources is what our own control plane serves.
async fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let files = fs::read_dir(&folder).map(|files| files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect());
    let mut seeds: Vec<Vec<u8>> = files.unwrap_or_default();
    if target == "resources" {
        let yaml = crate::support::service(&[("v1", "127.0.0.1:1".parse().unwrap())])
            + &crate::support::routes(&format!(
                "[{{match: [{{headers: {{x: {{regex: \"a.*\"}}}}}}], route: [{{destination: {}, weight: 3}}], retries: {{attempts: 2}}, fault: \
                 {{abort: {{percentage: {{value: 5}}, httpStatus: 500}}}}}}]",
                crate::support::to("v1")
            ))
            + &crate::support::rule(
                "{outlierDetection: {consecutive5xxErrors: 3}, loadBalancer: {simple: RANDOM}}",
                &["v1"],
            );
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let served = cp.cache().resources();
        let types = [
            ResourceType::Listener,
            ResourceType::RouteConfiguration,
            ResourceType::Cluster,
            ResourceType::ClusterLoadAssignment,
        ];
        for (number, resource_type) in (0u8..).zip(types) {
            seeds.extend(served.iter(resource_type).map(|(_, any)| [&[number][..], &any.value].concat()));
        }
        seeds.push([&[1][..], &RouteConfiguration::default().encode_to_vec()].concat());
        seeds.push([&[2][..], &Cluster::default().encode_to_vec()].concat());
        seeds.push([&[3][..], &HelloRequest::default().encode_to_vec()].concat());
    }
    assert!(!seeds.is_empty(), "{} has no corpus", folder.display());
    seeds
}

/// A change as fuzzers make them.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], rng: &mut fastrand::Rng) {
    for _ in 0..rng.u32(1..5) {
        let at = rng.usize(..=bytes.len());
        let length = rng.usize(..16).min(bytes.len() - at);
        match rng.u32(..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u32(..8),
            1 if at < bytes.len() => bytes[at] = rng.u8(..),
            2 => drop(bytes.drain(at..at + length)),
            3 => bytes.insert(at, rng.u8(..)),
            4 => drop(bytes.splice(at..at, bytes[at..at + length].to_vec())),
            5 => {
                let from = rng.usize(..=other.len());
                let part = other[from..(from + rng.usize(..32)).min(other.len())].to_vec();
                drop(bytes.splice(at..at + length, part));
            }
            _ => drop(bytes.splice(at..at + length, *b"\xff\xff\xff\xff\xff\xff\xff\x7f")),
        }
    }
}

#[tokio::test]
async fn targets_take_any_bytes() {
    let seconds = std::env::var("MESH_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    for (name, target) in TARGETS {
        let seeds = corpus(name).await;
        let rng = &mut fastrand::Rng::with_seed(seconds.unwrap_or(7));
        let (begun, mut executions) = (Instant::now(), 0);
        let go_on = |executions: u32| match seconds {
            Some(seconds) => begun.elapsed() < Duration::from_secs(seconds),
            None => executions < EXECUTIONS,
        };
        let mut play = |bytes: &[u8]| {
            let played = panic::catch_unwind(AssertUnwindSafe(|| target(bytes)));
            assert!(played.is_ok(), "{name} does not take {bytes:?} ({:?})", String::from_utf8_lossy(bytes));
            executions += 1;
            executions
        };
        let mut done = seeds.iter().map(|seed| play(seed)).max().unwrap_or(0);
        while go_on(done) {
            let mut bytes = seeds[rng.usize(..seeds.len())].clone();
            mutate(&mut bytes, &seeds[rng.usize(..seeds.len())], rng);
            done = play(&bytes);
        }
        println!("{name}: {done} executions in {:?}", begun.elapsed());
    }
}
