//! Header edits: what is added, overwritten and removed on requests and responses, at each level of a route configuration.

use super::Format;
use http::HeaderName;

/// The edits of one level.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderEdits {
    /// `request_headers_to_add`, `request_headers_to_remove`.
    pub request: HeaderOps,
    /// `response_headers_to_add`, `response_headers_to_remove`.
    pub response: HeaderOps,
}

/// Edits of one head: first what is removed, then what is added.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderOps {
    /// All values of these.
    pub remove: Vec<HeaderName>,
    /// In order.
    pub add: Vec<HeaderAdd>,
}

/// `HeaderValueOption`.
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderAdd {
    /// Neither a pseudo-header nor `host`.
    pub name: HeaderName,
    /// The value.
    pub value: Format,
    /// What becomes of values that are there.
    pub action: AppendAction,
    /// A value that comes out empty is added too.
    pub keep_empty: bool,
}

/// `HeaderAppendAction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AppendAction {
    /// Added beside what is there.
    #[default]
    Append,
    /// Added only where the header is absent.
    AddIfAbsent,
    /// Replaces what is there.
    Overwrite,
    /// Replaces what is there; not added where the header is absent.
    OverwriteIfExists,
}

impl HeaderOps {
    /// Nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

impl HeaderEdits {
    /// Nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.request.is_empty() && self.response.is_empty()
    }
}
