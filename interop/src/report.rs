//! The table that `interop/run` prints: one row for each claim that a test has seen to hold.

use std::io::Write;

/// Adds a row. Does nothing unless `MESH_INTEROP_REPORT` names the file that collects them.
///
/// # Panics
/// The file cannot be written, for then the table would lack a row.
pub fn row(peer: &str, path: &str, claim: &str, seen: &str) {
    let Some(file) = std::env::var_os("MESH_INTEROP_REPORT") else { return };
    let row = format!("{peer}\t{path}\t{claim}\t{seen}\n");
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).expect("open the report");
    file.write_all(row.as_bytes()).expect("write the report");
}
