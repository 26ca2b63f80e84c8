//! Steps 5 to 8: what goes wrong, and what callers see of it, which is nothing.

use std::time::Duration;

use mesh_control::ControlPlane;

use crate::routing::{until_split, weights};
use crate::traffic::{Traffic, burst};
use crate::world::{PATIENCE, World};
use examples::report::Report;

/// How often something awaited is looked at.
const GLANCE: Duration = Duration::from_millis(50);

pub(crate) async fn failing_backend(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.step("v1-a starts to answer UNAVAILABLE, and heals");
    let state = world.greeters[0].state().clone();
    let mut traffic = Traffic::start(&world.greeter, 8, None);

    state.set_unavailable(true);
    let ejected = wait(report, &traffic, || ejected(world)).await;
    let failures = state.failed();
    let calls = state.calls();
    let healed_at = traffic.tally();
    state.set_unavailable(false);
    let came_back = wait(report, &traffic, || state.calls() > calls + 100).await;

    let tally = traffic.stop().await;
    report.table(&[
        ("UNAVAILABLE answers", format!("{failures}, hidden by retries ({} calls answered after one)", tally.retried)),
        ("calls until it was ejected", format!("{}", healed_at.answered())),
        ("callers", tally.to_string()),
    ]);
    report.claim(failures > 0 && tally.failed == 0, "its failures were hidden from callers: 0 failed calls");
    report.claim(ejected, "outlier detection ejected it");
    report.claim(came_back, "it came back after it healed");
    Ok(())
}

/// Whether outlier detection holds v1-a out, as the mesh itself explains it.
fn ejected(world: &World) -> bool {
    let uri = "http://greeter.default.svc.cluster.local:50051/helloworld.Greeter/SayHello";
    let Ok(request) = http::Request::post(uri).header("content-type", "application/grpc").body(()) else {
        return false;
    };
    let trail = world.mesh.explain(&request.into_parts().0).to_string();
    let address = world.greeters[0].addr().to_string();
    trail.lines().any(|line| line.contains(&address) && line.contains("ejected"))
}

pub(crate) async fn killed_backend(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.step("v1-b is killed with calls in flight, and started again");
    let state = world.greeters[1].state().clone();
    state.set_delay(Duration::from_millis(20));
    let mut traffic = Traffic::start(&world.greeter, 16, None);
    wait(report, &traffic, || state.in_flight() > 0).await;
    let in_flight = state.in_flight();
    world.greeters[1].kill().await;
    let before = traffic.tally().answered();
    wait(report, &traffic, || traffic.tally().answered() > before + 500).await;
    state.set_delay(Duration::ZERO);
    world.greeters[1].restart().await?;
    let calls = state.calls();
    let came_back = wait(report, &traffic, || state.calls() > calls + 100).await;
    let tally = traffic.stop().await;
    report.table(&[("in flight when killed", in_flight.to_string()), ("callers", tally.to_string())]);
    report.claim(in_flight > 0 && tally.failed == 0, "0 failed calls");
    report.claim(came_back, "it gets traffic again");
    Ok(())
}

pub(crate) async fn broken_yaml(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.step("A broken YAML is written");
    let good = std::fs::read_to_string(world.mesh_dir().join("routes.yaml"))?;
    let outcome = world.edit_and_wait("routes.yaml", |text| text.replacen("weight: 50", "wieght: 50", 1)).await?;
    let reason = outcome.err().unwrap_or_default();
    let (percent, tally) = until_split(world, report, 50.0).await;
    report.text(&reason);
    report.claim(
        reason.contains("routes.yaml:") && reason.contains("wieght"),
        "the control plane says file, line and reason",
    );
    report.claim((45.5..=54.5).contains(&percent) && tally.failed == 0, "the configuration before it keeps serving");
    let mended = world.edit_and_wait("routes.yaml", |_| good).await?;
    report.claim(mended.is_ok(), "the mended file is taken again");
    Ok(())
}

pub(crate) async fn control_plane_outage(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.step("The control plane is killed, the YAML edited meanwhile, and it comes back");
    world.stop_control().await;
    let during = burst(&world.greeter, 500, 16, None).await;
    world.edit("routes.yaml", |text| weights(&text, 20, 80))?;
    let mut traffic = Traffic::start(&world.greeter, 8, None);
    world.start_control().await?;
    let (percent, tally) = until_split(world, report, 80.0).await;
    let after = traffic.stop().await;
    let clients = world.control().map(ControlPlane::connections)?;
    report.table(&[
        ("without it", during.to_string()),
        ("after", format!("{percent:.1} % to v2, {clients} client connected")),
    ]);
    report.claim(during.failed == 0 && during.answered() == 500, "calls go on without it");
    report.claim((75.5..=84.5).contains(&percent), "the edit made meanwhile arrives");
    report.claim(tally.failed + after.failed == 0, "0 failed calls");
    Ok(())
}

/// Whether it comes true within [`PATIENCE`].
pub(crate) async fn wait(report: &mut Report, traffic: &Traffic, mut holds: impl FnMut() -> bool) -> bool {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        if tokio::time::Instant::now() > end {
            return false;
        }
        report.progress(traffic.tally());
        tokio::time::sleep(GLANCE).await;
    }
    true
}
