//! Header mutation (`envoy.extensions.filters.http.header_mutation.v3`).

use crate::resource::{AppendAction, Format, HeaderAdd, StringMatcher};
use http::HeaderName;

/// `HeaderMutation`, and `HeaderMutationPerRoute` with its part of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderMutationConfig {
    /// On the request, in order.
    pub request: Vec<HeaderMutation>,
    /// On the query of its path, in order, after those.
    pub query: Vec<QueryMutation>,
    /// On the response, in order.
    pub response: Vec<HeaderMutation>,
    /// On its trailers, in order.
    pub response_trailers: Vec<HeaderMutation>,
    /// Of several levels of routes the most specific one comes last (`most_specific_header_mutations_wins`); default: first.
    pub most_specific_wins: bool,
}

/// One mutation.
#[derive(Clone, Debug, PartialEq)]
pub enum HeaderMutation {
    /// All values of this header go.
    Remove(HeaderName),
    /// All headers go whose name matches.
    RemoveMatching(StringMatcher),
    /// A value comes.
    Add(HeaderAdd),
}

/// One mutation of a query.
#[derive(Clone, Debug, PartialEq)]
pub enum QueryMutation {
    /// All parameters of this name go.
    Remove(String),
    /// A parameter comes.
    Add {
        /// Its name.
        name: String,
        /// Its value, before it is encoded.
        value: Format,
        /// What becomes of those that are there.
        action: AppendAction,
    },
}

impl HeaderMutationConfig {
    /// Nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.request.is_empty()
            && self.query.is_empty()
            && self.response.is_empty()
            && self.response_trailers.is_empty()
    }
}
