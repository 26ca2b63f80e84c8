//! `Telemetry`: of its `tracing`, what a client does.

use super::{Fields, Node, Report};
use crate::{
    model::{Object, Telemetry, Tracing},
    problem::Located,
};

pub(super) fn read(object: Object, spec: &Node, report: &Report) -> Option<Telemetry> {
    spec.fields(report, "Telemetry.spec", |f| {
        let selector = f.nested("selector", |selector| selector.string_map("matchLabels")).unwrap_or_default();
        let mut told = Tracing::default();
        for node in f.list("tracing") {
            node.fields(report, "an item of tracing", |item| tracing(item, &mut told));
        }
        // Access logs and what is measured are the program's own choice.
        f.not_honoured(&["accessLogging", "metrics", "targetRef", "targetRefs"]);
        Telemetry { object, selector, tracing: told }
    })
}

/// Of several items that are for clients, the later ones count.
fn tracing(f: &Fields<'_>, told: &mut Tracing) {
    f.not_honoured(&["providers", "customTags", "useRequestIdForTraceSampling", "enableIstioTags"]);
    let mode = f.nested("match", mode).flatten();
    let (random, disabled) = (f.percentage("randomSamplingPercentage"), f.bool("disableSpanReporting"));
    if mode == Some(Mode::Server) {
        return;
    }
    told.random = random.or(told.random);
    told.disabled = disabled.or(told.disabled);
}

/// Whose spans are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Client,
    Server,
}

fn mode(f: &Fields<'_>) -> Option<Mode> {
    let Located { value, at } = f.string("mode")?;
    match value.as_str() {
        "CLIENT" | "CLIENT_AND_SERVER" => Some(Mode::Client),
        "SERVER" => {
            f.report.warning(&at, "`mode: SERVER` is not honoured: sampling is decided by clients");
            Some(Mode::Server)
        }
        other => {
            let known = "CLIENT, SERVER, CLIENT_AND_SERVER";
            f.report.error(&at, format!("unknown mode `{other}`: known are {known}"));
            None
        }
    }
}
