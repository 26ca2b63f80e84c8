//! gRPC's C-core as a client, by the script `ccore/client.py`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::process::Command;

use crate::{Outcome, folder, peer};

/// How long one run of the client may take, over all its calls.
const RUN: Duration = Duration::from_secs(120);

/// Makes `requests` greeter calls one after another to `target`, with these headers on each.
///
/// # Errors
/// The client is missing, failed, or did not end in time. A call that fails is not an error here but part of the outcome.
pub async fn call(target: &str, bootstrap: &str, requests: u32, headers: &[(&str, &str)]) -> Result<Outcome> {
    let mut command = Command::new(peer("venv/bin/python3")?);
    command
        .arg(folder().join("ccore/client.py"))
        .args([target, "--requests", &requests.to_string()])
        .args(headers.iter().map(|(name, value)| format!("--header={name}={value}")))
        .env("GRPC_XDS_BOOTSTRAP_CONFIG", bootstrap)
        .env_remove("GRPC_XDS_BOOTSTRAP")
        .kill_on_drop(true);
    let ended = tokio::time::timeout(RUN, command.output()).await.context("the C-core client did not end")??;
    let said = String::from_utf8_lossy(&ended.stderr);
    anyhow::ensure!(ended.status.success(), "the C-core client ended with {}:\n{said}", ended.status);
    let printed: Value =
        serde_json::from_slice(&ended.stdout).with_context(|| format!("the client printed:\n{said}"))?;
    Ok(Outcome {
        backends: counts(&printed["backends"]),
        codes: counts(&printed["codes"]),
        details: counts(&printed["details"]),
    })
}

fn counts(printed: &Value) -> BTreeMap<String, u64> {
    let counts = printed.as_object().into_iter().flatten();
    counts.map(|(name, count)| (name.clone(), count.as_u64().unwrap_or_default())).collect()
}
