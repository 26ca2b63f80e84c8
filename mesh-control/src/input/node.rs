//! A YAML document as a tree in which every key and value knows where it stands.

use crate::problem::At;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};
use std::{fmt, sync::Arc};

/// A value and its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) at: At,
}

/// A key and its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) at: At,
}

/// Values as Kubernetes reads them: the untagged scalars of YAML's core schema.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    String(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

impl Value {
    /// For messages: `a string`, `a map`...
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::String(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

/// The documents of one file, in order. A document that cannot be read is an error with its place; reading goes on after
/// it where the parser can.
pub(crate) fn read(file: &Arc<str>, text: &str) -> Vec<Result<Node, (At, String)>> {
    let options = serde_saphyr::options! { strict_booleans: true };
    let mut bytes = text.as_bytes();
    let documents = serde_saphyr::read_with_options::<_, Spanned<Raw>>(&mut bytes, options);
    documents
        .map(|document| match document {
            Ok(raw) => Ok(raw.value.locate(file, raw.referenced)),
            Err(error) => {
                let error = error.without_snippet();
                Err((at(file, error.location()), reason(error)))
            }
        })
        .collect()
}

fn at(file: &Arc<str>, location: Option<Location>) -> At {
    let (line, column) = location.map_or((1, 1), |l| (l.line().max(1), l.column().max(1)));
    At { file: file.clone(), line, column }
}

fn reason(error: &serde_saphyr::Error) -> String {
    if let serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } = error {
        return format!("duplicate key `{key}`");
    }
    // The place is given apart.
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason).to_owned()
}

/// The tree as the deserializer yields it, before the file's name is known.
#[derive(Clone, Debug)]
enum Raw {
    Scalar(Value),
    List(Vec<Spanned<Self>>),
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
}

impl Raw {
    fn locate(self, file: &Arc<str>, location: Location) -> Node {
        let value = match self {
            Self::Scalar(value) => value,
            Self::List(items) => Value::List(items.into_iter().map(|n| n.value.locate(file, n.referenced)).collect()),
            Self::Map(entries) => {
                let entry = |(key, node): (Spanned<String>, Spanned<Self>)| {
                    let key = Key { name: key.value, at: at(file, Some(key.referenced)) };
                    (key, node.value.locate(file, node.referenced))
                };
                Value::Map(entries.into_iter().map(entry).collect())
            }
        };
        Node { value, at: at(file, Some(location)) }
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawVisitor;
        impl<'de> Visitor<'de> for RawVisitor {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }
            fn visit_bool<E>(self, v: bool) -> Result<Raw, E> {
                Ok(Raw::Scalar(Value::Bool(v)))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Raw, E> {
                Ok(Raw::Scalar(Value::Int(v)))
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Raw, E> {
                let v = i64::try_from(v).map_err(|_| E::custom("number too large"))?;
                Ok(Raw::Scalar(Value::Int(v)))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Raw, E> {
                Ok(Raw::Scalar(Value::Float(v)))
            }
            fn visit_str<E>(self, v: &str) -> Result<Raw, E> {
                Ok(Raw::Scalar(Value::String(v.to_owned())))
            }
            fn visit_unit<E>(self) -> Result<Raw, E> {
                Ok(Raw::Scalar(Value::Null))
            }
            fn visit_none<E>(self) -> Result<Raw, E> {
                Ok(Raw::Scalar(Value::Null))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Raw, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Raw::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key()? {
                    entries.push((key, map.next_value()?));
                }
                Ok(Raw::Map(entries))
            }
        }
        deserializer.deserialize_any(RawVisitor)
    }
}
