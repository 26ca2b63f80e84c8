//! Fields that are understood but not honoured: collected per resource, logged once, shown in status.

use std::fmt;

/// One part of an accepted resource that has no effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Note {
    /// Path of the field in the resource.
    pub path: String,
    /// Why it has no effect.
    pub reason: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}
