//! What is printed: a progress line while a step works, then a small table, and what did not hold.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

/// Prints steps and remembers which claims failed.
#[derive(Debug)]
pub struct Report {
    step: usize,
    claims: usize,
    failed: Vec<String>,
    terminal: bool,
    /// A progress line is on the screen.
    open: bool,
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

#[allow(clippy::print_stdout, reason = "the program's output")]
impl Report {
    /// Nothing claimed yet.
    #[must_use]
    pub fn new() -> Self {
        Self { step: 0, claims: 0, failed: Vec::new(), terminal: std::io::stdout().is_terminal(), open: false }
    }

    /// Begins the next step.
    pub fn step(&mut self, title: &str) {
        self.clear();
        self.step += 1;
        println!("\n{:>2}. {title}", self.step);
    }

    /// Replaces the progress line; on no terminal nothing is printed.
    pub fn progress(&mut self, text: impl Display) {
        if self.terminal {
            print!("\r\x1b[K    … {text}");
            let _ = std::io::stdout().flush();
            self.open = true;
        }
    }

    /// A table: each row is a name and what was seen.
    pub fn table(&mut self, rows: &[(&str, String)]) {
        self.clear();
        let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in rows {
            println!("      {name:<width$}  {value}");
        }
    }

    /// Text, indented.
    pub fn text(&mut self, text: impl Display) {
        self.clear();
        for line in text.to_string().lines() {
            println!("      {line}");
        }
    }

    /// What must hold.
    pub fn claim(&mut self, holds: bool, claim: impl Display) {
        self.clear();
        self.claims += 1;
        println!("    {} {claim}", if holds { "✓" } else { "✗ DOES NOT HOLD:" });
        if !holds {
            self.failed.push(format!("step {}: {claim}", self.step));
        }
    }

    /// The last lines, and the exit code.
    pub fn finish(&mut self) -> ExitCode {
        self.clear();
        if self.failed.is_empty() {
            println!("\nAll {} claims hold.", self.claims);
            return ExitCode::SUCCESS;
        }
        println!("\n{} of {} claims do not hold:", self.failed.len(), self.claims);
        for claim in &self.failed {
            println!("  {claim}");
        }
        ExitCode::FAILURE
    }

    /// A step could not be done.
    pub fn abort(&mut self, error: &anyhow::Error) {
        self.clear();
        println!("\n✗ step {} could not be done: {error:#}", self.step);
        let _ = self.finish();
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.open) {
            print!("\r\x1b[K");
        }
    }
}
