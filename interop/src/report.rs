//! The table that `interop/run` prints: one row for each claim that a test has seen to hold.

use std::io::Write;

/// Adds a row: who serves whom, what was claimed, what was seen. Does nothing unless `MESH_INTEROP_REPORT` names the
/// file that collects them.
///
/// # Panics
/// The file cannot be written, for then the table would lack a row.
pub fn row(path: &str, claim: &str, seen: &str) {
    let Some(file) = std::env::var_os("MESH_INTEROP_REPORT") else { return };
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).expect("open the report");
    file.write_all(format!("{path}\t{claim}\t{seen}\n").as_bytes()).expect("write the report");
}
