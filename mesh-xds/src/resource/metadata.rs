//! Facts about a request that are not part of it, and their matchers: dynamic metadata and filter state.

use super::{CidrRange, StringMatcher};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// A value as JSON has it (`google.protobuf.Value`).
pub use serde_json::Value;

/// `envoy.type.matcher.v3.MetadataMatcher` over the dynamic metadata of a request, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct MetadataMatcher {
    /// Whose metadata: a namespace such as `envoy.filters.http.jwt_authn`, in Envoy the filter that set it.
    pub filter: Arc<str>,
    /// Keys of objects within objects; not empty.
    pub path: Vec<String>,
    /// What is asked of the value there.
    pub value: ValueMatcher,
    /// The result is inverted, that of absent metadata too.
    pub invert: bool,
}

/// `envoy.type.matcher.v3.ValueMatcher`. A value of another kind, or none at all, does not match.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ValueMatcher {
    /// Null.
    Null,
    /// A number in the half-open range.
    DoubleRange(f64, f64),
    /// This number.
    Double(f64),
    /// A string.
    String(StringMatcher),
    /// This truth value.
    Bool(bool),
    /// There is a value; `false` never matches, as in Envoy.
    Present(bool),
    /// A list with an element that matches.
    List(Box<Self>),
    /// One of these.
    OneOf(Vec<Self>),
}

/// `envoy.type.matcher.v3.FilterStateMatcher` over objects that are strings. One that is absent does not match.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterStateMatcher {
    /// Name of the object.
    pub key: Arc<str>,
    /// What is asked of it.
    pub value: FilterStateMatch,
}

/// What is asked of an object of the filter state.
#[derive(Clone, Debug, PartialEq)]
pub enum FilterStateMatch {
    /// It is a string that matches.
    String(StringMatcher),
    /// It is an IP address, with a port or without, in one of these ranges (`AddressMatcher`). What is no address does not match.
    Address {
        /// Any of them.
        ranges: Vec<CidrRange>,
        /// Addresses in none of them instead.
        invert: bool,
    },
}

impl MetadataMatcher {
    /// Whether the metadata of a request match. `of` gives the value of a namespace. No allocation.
    pub fn matches<'v>(&self, of: impl FnOnce(&str) -> Option<&'v Value>) -> bool {
        let found = self.path.iter().try_fold(of(&self.filter), |value, key| Some(value?.get(key.as_str())));
        self.value.matches(found.flatten()) != self.invert
    }
}

impl ValueMatcher {
    /// Whether a value, or none, matches. No allocation.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        match (self, value) {
            (Self::OneOf(any), value) => any.iter().any(|one| one.matches(value)),
            (_, None) => false,
            (Self::Null, Some(value)) => value.is_null(),
            (Self::DoubleRange(start, end), Some(value)) => {
                value.as_f64().is_some_and(|number| (*start..*end).contains(&number))
            }
            #[allow(clippy::float_cmp, reason = "Envoy compares exactly")]
            (Self::Double(wanted), Some(value)) => value.as_f64() == Some(*wanted),
            (Self::String(matcher), Some(value)) => value.as_str().is_some_and(|text| matcher.matches(text)),
            (Self::Bool(wanted), Some(value)) => value.as_bool() == Some(*wanted),
            (Self::Present(wanted), Some(_)) => *wanted,
            (Self::List(element), Some(Value::Array(list))) => list.iter().any(|value| element.matches(Some(value))),
            (Self::List(_), Some(_)) => false,
        }
    }
}

impl FilterStateMatcher {
    /// Whether an object, or none, matches. No allocation.
    pub fn matches(&self, object: Option<&str>) -> bool {
        match (&self.value, object) {
            (_, None) => false,
            (FilterStateMatch::String(matcher), Some(text)) => matcher.matches(text),
            (FilterStateMatch::Address { ranges, invert }, Some(text)) => {
                let address = text.parse::<IpAddr>().or_else(|_| text.parse::<SocketAddr>().map(|socket| socket.ip()));
                address.is_ok_and(|address| ranges.iter().any(|range| range.contains(address)) != *invert)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metadata_match_as_in_envoy() {
        let claims = json!({"payload": {"iss": "a", "groups": ["x", "y"], "n": 3, "ok": true, "none": null}});
        let matches = |path: &[&str], value: ValueMatcher| {
            let path = path.iter().map(|key| (*key).to_owned()).collect();
            let matcher = MetadataMatcher { filter: "jwt".into(), path, value, invert: false };
            let of = |name: &str| (name == "jwt").then_some(&claims);
            let inverted = MetadataMatcher { invert: true, ..matcher.clone() };
            assert_ne!(matcher.matches(of), inverted.matches(of));
            matcher.matches(of)
        };
        let text = |text: &str| ValueMatcher::String(StringMatcher::exact(text));
        assert!(matches(&["payload", "iss"], text("a")) && !matches(&["payload", "iss"], text("b")));
        assert!(matches(&["payload", "groups"], ValueMatcher::List(Box::new(text("y")))));
        assert!(!matches(&["payload", "iss"], ValueMatcher::List(Box::new(text("a")))), "a string is no list");
        assert!(matches(&["payload", "n"], ValueMatcher::Double(3.0)));
        assert!(matches(&["payload", "n"], ValueMatcher::DoubleRange(3.0, 4.0)));
        assert!(!matches(&["payload", "n"], ValueMatcher::DoubleRange(1.0, 3.0)));
        assert!(matches(&["payload", "ok"], ValueMatcher::Bool(true)));
        assert!(matches(&["payload", "none"], ValueMatcher::Null));
        assert!(matches(&["payload", "n"], ValueMatcher::Present(true)));
        for absent in [ValueMatcher::Null, ValueMatcher::Present(true), ValueMatcher::Present(false), text("")] {
            assert!(!matches(&["payload", "absent"], absent));
        }
        assert!(matches(&["payload", "iss"], ValueMatcher::OneOf(vec![text("b"), text("a")])));
    }

    #[test]
    fn addresses_in_the_filter_state_match_with_a_port_or_without() {
        let range = |text: &str, bits| CidrRange::new(text.parse().unwrap(), bits).unwrap();
        let ranges = vec![range("10.0.0.0", 8), range("2001:db8::", 32)];
        let of = |invert| FilterStateMatcher {
            key: "k".into(),
            value: FilterStateMatch::Address { ranges: ranges.clone(), invert },
        };
        for (object, within) in [
            ("10.1.2.3", Some(true)),
            ("10.1.2.3:80", Some(true)),
            ("::ffff:10.1.2.3", Some(true)),
            ("[2001:db8::1]:80", Some(true)),
            ("11.1.2.3", Some(false)),
            ("2001:db9::1", Some(false)),
            ("ten", None),
            ("", None),
        ] {
            assert_eq!(of(false).matches(Some(object)), within == Some(true), "{object}");
            assert_eq!(of(true).matches(Some(object)), within == Some(false), "{object}");
        }
        assert!(!of(false).matches(None) && !of(true).matches(None));
    }
}
