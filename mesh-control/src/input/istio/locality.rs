//! `localityLbSetting`, of a DestinationRule or of the mesh.

use crate::{
    input::fields::Fields,
    model::{Distribute, Failover, LocalityLb},
};
use std::collections::BTreeSet;

pub(super) fn setting(f: &Fields<'_>) -> LocalityLb {
    let setting = LocalityLb {
        enabled: f.bool("enabled").unwrap_or(true),
        distribute: f
            .list("distribute")
            .iter()
            .filter_map(|n| n.fields(f.report, "an item of distribute", distribute)?)
            .collect(),
        failover: f
            .list("failover")
            .iter()
            .filter_map(|n| n.fields(f.report, "an item of failover", failover)?)
            .collect(),
        failover_priority: f.strings("failoverPriority").into_iter().map(|label| label.value).collect(),
    };
    let fails_over = !setting.failover.is_empty() || !setting.failover_priority.is_empty();
    if fails_over && !setting.distribute.is_empty() {
        f.report.error(f.at, "distribute goes with neither failover nor failoverPriority");
    }
    let froms: BTreeSet<_> = setting.distribute.iter().map(|distribute| &distribute.from).collect();
    if froms.len() < setting.distribute.len() {
        f.report.error(f.at, "distribute has a `from` twice");
    }
    setting
}

fn distribute(f: &Fields<'_>) -> Option<Distribute> {
    let from = f.required_string("from", "an item of distribute");
    let mut to = Vec::new();
    for (key, node) in f.map("to") {
        match node.int::<u32>(f.report, &format!("to.{}", key.name)) {
            Some(weight @ 1..=100) => to.push((key.name.clone(), weight)),
            Some(weight) => f.report.error(&node.at, format!("a share is 1 to 100 percent, not {weight}")),
            None => {}
        }
    }
    let total: u32 = to.iter().map(|(_, weight)| weight).sum();
    if total != 100 {
        f.report.error(f.at, format!("the shares of an item of distribute add up to {total}, not 100"));
    }
    Some(Distribute { from: from?.value, to })
}

fn failover(f: &Fields<'_>) -> Option<Failover> {
    let region = |name| {
        let region = f.required_string(name, "an item of failover")?;
        if region.value.contains(['/', '*']) {
            f.report.error(&region.at, format!("`{}` is not a region", region.value));
        }
        Some(region.value)
    };
    let (from, to) = (region("from"), region("to"));
    if from.is_some() && from == to {
        f.report.error(f.at, "an item of failover leads from a region to itself");
    }
    Some(Failover { from: from?, to: to? })
}
