//! The table, the targets, and the file of a side-by-side run.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use crate::client::Kind;
use crate::suite::{Cell, Turns};
use crate::worker::Flavor;

/// The medians of one client in one cell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Median {
    /// Calls per second.
    pub rps: f64,
    /// Median latency, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of latency, in microseconds.
    pub p99_us: f64,
    /// CPU time per call, in microseconds.
    pub cpu_us: f64,
    /// Allocations per call.
    pub allocations: Option<f64>,
    /// The median over rounds of this client's rps over the reference's in the same round.
    pub rps_ratio: f64,
    /// The same for CPU time per call.
    pub cpu_ratio: f64,
    /// The same for the median latency.
    pub p50_ratio: f64,
}

/// The medians of a whole run.
pub type Medians = BTreeMap<Cell, BTreeMap<Kind, Median>>;

/// The median of `values`; not a number when there are none.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Takes the medians over rounds. Ratios are taken within a round first, so that noise which hits a whole round cancels.
#[must_use]
pub fn medians(turns: &Turns) -> Medians {
    let mut medians = Medians::new();
    for ((cell, kind), rounds) in turns {
        let reference = turns.get(&(*cell, Kind::Hyper)).map_or(&[][..], Vec::as_slice);
        let of = |value: fn(&crate::load::Measured) -> f64| median(rounds.iter().map(value).collect());
        let ratio = |value: fn(&crate::load::Measured) -> f64| {
            median(rounds.iter().zip(reference).map(|(mine, theirs)| value(mine) / value(theirs)).collect())
        };
        let row = Median {
            rps: of(|turn| turn.rps),
            p50_us: of(|turn| turn.p50_us),
            p99_us: of(|turn| turn.p99_us),
            cpu_us: of(|turn| turn.cpu_us),
            allocations: rounds.iter().find_map(|turn| turn.allocations),
            rps_ratio: ratio(|turn| turn.rps),
            cpu_ratio: ratio(|turn| turn.cpu_us),
            p50_ratio: ratio(|turn| turn.p50_us),
        };
        medians.entry(*cell).or_default().insert(*kind, row);
    }
    medians
}

/// One table over all cells.
#[must_use]
pub fn table(medians: &Medians) -> String {
    let mut text = String::new();
    for (cell, rows) in medians {
        let _ = writeln!(
            text,
            "\n{:<38} {:>9} {:>9} {:>9} {:>10} {:>9}   {:>6} {:>6}",
            cell.to_string(),
            "rps",
            "p50 us",
            "p99 us",
            "CPU us/req",
            "alloc/req",
            "rps x",
            "CPU x"
        );
        for (kind, row) in rows {
            let allocations = row.allocations.map_or_else(|| "-".to_owned(), |count| format!("{count:.1}"));
            let _ = writeln!(
                text,
                "  {:<36} {:>9.0} {:>9.0} {:>9.0} {:>10.1} {:>9}   {:>6.2} {:>6.2}",
                kind.title(),
                row.rps,
                row.p50_us,
                row.p99_us,
                row.cpu_us,
                allocations,
                row.rps_ratio,
                row.cpu_ratio
            );
        }
    }
    text
}

/// A claim of the project that a run can show or refute.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The claim.
    pub claim: String,
    /// What was measured.
    pub measured: f64,
    /// The bound.
    pub bound: f64,
    /// Whether the bound is a lower one.
    pub at_least: bool,
}

impl Target {
    /// Whether the claim holds.
    #[must_use]
    pub fn is_met(&self) -> bool {
        if self.at_least { self.measured >= self.bound } else { self.measured <= self.bound }
    }

    fn at_least(claim: String, measured: f64, bound: f64) -> Self {
        Self { claim, measured, bound, at_least: true }
    }

    fn at_most(claim: String, measured: f64, bound: f64) -> Self {
        Self { claim, measured, bound, at_least: false }
    }
}

/// The targets that the measured cells speak to: 64 bytes, three backends, the multi-threaded runtime.
#[must_use]
pub fn targets(medians: &Medians) -> Vec<Target> {
    let mut targets = Vec::new();
    for (cell, rows) in medians {
        let Some(mesh) = rows.get(&Kind::Mesh) else { continue };
        if cell.flavor != Flavor::MultiThread || cell.backends != 3 || cell.payload != 64 {
            continue;
        }
        let c = cell.concurrency;
        match c {
            1 => {
                targets.push(Target::at_most(format!("c={c}: p50 / bare hyper's"), mesh.p50_ratio, 1.0));
                targets.push(Target::at_most(format!("c={c}: CPU per request / bare hyper's"), mesh.cpu_ratio, 1.0));
            }
            32 | 256 => {
                targets.push(Target::at_least(format!("c={c}: rps / bare hyper's"), mesh.rps_ratio, 1.6));
                targets.push(Target::at_most(format!("c={c}: CPU per request / bare hyper's"), mesh.cpu_ratio, 0.55));
            }
            _ => continue,
        }
        let bare = rows.get(&Kind::Bare).and_then(|bare| bare.allocations);
        if let (Some(mesh), Some(bare)) = (mesh.allocations, bare) {
            // One, and room for those that are not part of a call (timers, buffers that grow).
            let claim = format!("c={c}: allocations per request above the bare transport's");
            targets.push(Target::at_most(claim, mesh - bare, 1.1));
        }
    }
    targets
}

/// One line per target.
#[must_use]
pub fn verdicts(targets: &[Target]) -> String {
    let mut text = String::new();
    for target in targets {
        let verdict = if target.is_met() { "PASS" } else { "FAIL" };
        let sign = if target.at_least { ">=" } else { "<=" };
        let _ =
            writeln!(text, "{verdict}  {:<58} {:>6.2}  ({sign} {:.2})", target.claim, target.measured, target.bound);
    }
    text
}

/// The run as JSON: one object per cell and client.
#[must_use]
pub fn json(medians: &Medians) -> Value {
    let rows = medians.iter().flat_map(|(cell, rows)| {
        rows.iter().map(|(kind, row)| {
            json!({
                "client": kind.name(), "runtime": cell.flavor.name(), "backends": cell.backends,
                "payload": cell.payload, "concurrency": cell.concurrency,
                "rps": row.rps, "p50_us": row.p50_us, "p99_us": row.p99_us, "cpu_us_per_request": row.cpu_us,
                "allocations_per_request": row.allocations,
                "rps_ratio": row.rps_ratio, "cpu_ratio": row.cpu_ratio, "p50_ratio": row.p50_ratio,
            })
        })
    });
    Value::Array(rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn median_row(rps_ratio: f64, allocations: f64) -> Median {
        let allocations = Some(allocations);
        let (rps, p50_us, p99_us, cpu_us) = (1.0, 1.0, 1.0, 1.0);
        Median { rps, p50_us, p99_us, cpu_us, allocations, rps_ratio, cpu_ratio: 0.5, p50_ratio: 1.0 }
    }

    #[test]
    fn targets_are_those_of_the_measured_cells() {
        let cell = Cell { flavor: Flavor::MultiThread, backends: 3, payload: 64, concurrency: 32 };
        let other = Cell { backends: 30, ..cell };
        let rows = BTreeMap::from([(Kind::Bare, median_row(1.9, 10.0)), (Kind::Mesh, median_row(1.3, 11.0))]);
        let targets = targets(&Medians::from([(cell, rows.clone()), (other, rows)]));
        let met: Vec<bool> = targets.iter().map(Target::is_met).collect();
        assert_eq!(met, [false, true, true], "{targets:?}");
        assert!(verdicts(&targets).starts_with("FAIL  c=32: rps"));
    }

    #[test]
    fn median_of_even_and_odd() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).is_nan());
    }
}
