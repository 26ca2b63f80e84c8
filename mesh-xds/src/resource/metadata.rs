//! Facts about a request that are not part of it, and their matchers: dynamic metadata and filter state.

use super::StringMatcher;
use std::{collections::BTreeMap, sync::Arc};

/// A value as JSON has it (`google.protobuf.Value`).
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// A boolean.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string.
    String(String),
    /// An array.
    List(Vec<Self>),
    /// An object.
    Object(BTreeMap<String, Self>),
}

/// `envoy.type.matcher.v3.MetadataMatcher`, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct MetadataMatch {
    /// The namespace: in Envoy the filter that set the metadata.
    pub filter: Arc<str>,
    /// Keys of objects within objects; not empty.
    pub path: Vec<String>,
    /// What is asked of the value there.
    pub value: ValueMatch,
    /// The result is inverted, that of a missing value too.
    pub invert: bool,
}

/// `envoy.type.matcher.v3.ValueMatcher`. A value of another kind, or none at all, does not match.
#[derive(Clone, Debug, PartialEq)]
pub enum ValueMatch {
    /// It is `null`.
    Null,
    /// It is this number.
    Number(f64),
    /// It is a number in `start..end`.
    Range {
        /// First inside.
        start: f64,
        /// First outside.
        end: f64,
    },
    /// It is this boolean.
    Bool(bool),
    /// It is a string that matches.
    String(StringMatcher),
    /// There is a value. `false` never matches (as in Envoy).
    Present(bool),
    /// It is a list with an element that matches (`list_match.one_of`).
    OneOf(Box<Self>),
    /// One of these matches.
    Or(Vec<Self>),
}

/// `envoy.type.matcher.v3.FilterStateMatcher` over objects that are strings. One that is absent does not match.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterStateMatcher {
    /// Name of the object.
    pub key: Arc<str>,
    /// What is asked of it.
    pub value: StringMatcher,
}

impl Value {
    /// An object of these.
    pub fn object<K: Into<String>>(fields: impl IntoIterator<Item = (K, Self)>) -> Self {
        Self::Object(fields.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// What this path of keys leads to.
    pub fn at<K: AsRef<str>>(&self, path: impl IntoIterator<Item = K>) -> Option<&Self> {
        path.into_iter().try_fold(self, |value, key| match value {
            Self::Object(fields) => fields.get(key.as_ref()),
            _ => None,
        })
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Bool(flag)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl<V: Into<Self>> From<Vec<V>> for Value {
    fn from(list: Vec<V>) -> Self {
        Self::List(list.into_iter().map(Into::into).collect())
    }
}

impl MetadataMatch {
    /// Whether it matches what is in its namespace. No allocation.
    pub fn matches(&self, namespace: Option<&Value>) -> bool {
        self.value.matches(namespace.and_then(|value| value.at(&self.path))) != self.invert
    }
}

impl ValueMatch {
    /// Whether it matches; `None`: there is no value. No allocation.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        match (self, value) {
            (Self::Or(any), value) => any.iter().any(|matcher| matcher.matches(value)),
            (Self::Present(wanted), Some(_)) => *wanted,
            (Self::Null, Some(Value::Null)) => true,
            #[allow(clippy::float_cmp, reason = "an exact match is meant")]
            (Self::Number(wanted), Some(Value::Number(number))) => wanted == number,
            (Self::Range { start, end }, Some(Value::Number(number))) => (*start..*end).contains(number),
            (Self::Bool(wanted), Some(Value::Bool(flag))) => wanted == flag,
            (Self::String(matcher), Some(Value::String(text))) => matcher.matches(text),
            (Self::OneOf(matcher), Some(Value::List(list))) => list.iter().any(|value| matcher.matches(Some(value))),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_match_by_their_kind() {
        let text = |text: &str| ValueMatch::String(StringMatcher::exact(text));
        let range = ValueMatch::Range { start: 1.0, end: 2.0 };
        let list = |matcher| ValueMatch::OneOf(Box::new(matcher));
        for (matcher, takes, leaves) in [
            (ValueMatch::Null, vec![Value::Null], vec![Value::Bool(false), Value::from("")]),
            (ValueMatch::Bool(false), vec![false.into()], vec![true.into(), Value::Null]),
            (ValueMatch::Number(1.5), vec![1.5.into()], vec![1.0.into(), "1.5".into()]),
            (range, vec![1.0.into(), 1.9.into()], vec![0.9.into(), 2.0.into(), "1".into()]),
            (text("a"), vec!["a".into()], vec!["b".into(), 1.0.into()]),
            (ValueMatch::Present(true), vec![Value::Null, Value::object::<String>([])], vec![]),
            (ValueMatch::Present(false), vec![], vec![Value::Null]),
            (list(text("a")), vec![vec!["b", "a"].into()], vec![vec!["b"].into(), "a".into()]),
            (ValueMatch::Or(vec![text("a"), ValueMatch::Null]), vec!["a".into(), Value::Null], vec![true.into()]),
        ] {
            assert!(takes.iter().all(|value| matcher.matches(Some(value))), "{matcher:?}");
            assert!(!leaves.iter().any(|value| matcher.matches(Some(value))), "{matcher:?}");
            assert!(!matcher.matches(None), "{matcher:?}: there is no value");
        }
    }

    #[test]
    fn a_path_leads_through_objects_and_inversion_takes_what_is_missing() {
        let value = Value::object([("a", Value::object([("b", "c".into())]))]);
        let matcher = |path: &[&str], invert| MetadataMatch {
            filter: "f".into(),
            path: path.iter().map(|key| (*key).to_owned()).collect(),
            value: ValueMatch::String(StringMatcher::exact("c")),
            invert,
        };
        assert!(matcher(&["a", "b"], false).matches(Some(&value)));
        assert!(!matcher(&["a", "b"], true).matches(Some(&value)));
        for path in [&["a"][..], &["a", "b", "c"], &["b"]] {
            assert!(!matcher(path, false).matches(Some(&value)), "{path:?}");
            assert!(matcher(path, true).matches(Some(&value)), "{path:?}");
        }
        assert!(matcher(&["a"], true).matches(None));
    }
}
