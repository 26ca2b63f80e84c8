//! What is wrong with an input, and where.

use std::{cell::RefCell, fmt, sync::Arc};

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct At {
    /// As it was named, or `<yaml>` for text that is in no file.
    pub file: Arc<str>,
    /// From 1.
    pub line: u64,
    /// From 1, in characters.
    pub column: u64,
}

/// Whether a problem stops the configuration from being applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The set of documents is rejected as a whole.
    Error,
    /// Applied, but probably not what was meant.
    Warning,
}

/// One finding. Shown as `file:line:column: reason`, warnings as `file:line:column: warning: reason`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// Where.
    pub at: At,
    /// How bad.
    pub severity: Severity,
    /// What, in words.
    pub reason: String,
}

/// An input was rejected: every error of every file, in order of place. Shown one a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Rejected {
    /// At least one; errors only.
    pub errors: Vec<Problem>,
}

/// A value and its place.
#[derive(Clone, Debug)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where it was read.
    pub at: At,
}

/// Findings collected while an input is read and checked.
#[derive(Debug, Default)]
pub(crate) struct Report {
    problems: RefCell<Vec<Problem>>,
}

impl Report {
    pub(crate) fn error(&self, at: &At, reason: impl Into<String>) {
        self.push(at, Severity::Error, reason.into());
    }

    pub(crate) fn warning(&self, at: &At, reason: impl Into<String>) {
        self.push(at, Severity::Warning, reason.into());
    }

    /// How many errors there are.
    pub(crate) fn errors(&self) -> usize {
        self.problems.borrow().iter().filter(|p| p.severity == Severity::Error).count()
    }

    fn push(&self, at: &At, severity: Severity, reason: String) {
        self.problems.borrow_mut().push(Problem { at: at.clone(), severity, reason });
    }

    /// All findings in order of place, each once.
    pub(crate) fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort();
        problems.dedup();
        problems
    }
}

impl<T> Located<T> {
    pub(crate) fn map<U>(self, f: impl FnOnce(T) -> U) -> Located<U> {
        Located { value: f(self.value), at: self.at }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.severity {
            Severity::Error => write!(f, "{}: {}", self.at, self.reason),
            Severity::Warning => write!(f, "{}: warning: {}", self.at, self.reason),
        }
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.errors.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}
