//! Reading a JSON object field by field: what is not asked for is an error, and every error names its place.

use serde_json::{Map, Value};
use std::{fmt, time::Duration};

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    path: String,
    what: String,
}

/// An object whose fields are taken out one by one.
#[derive(Debug)]
pub(super) struct Fields {
    path: String,
    left: Map<String, Value>,
}

impl Wrong {
    pub(super) fn new(path: impl Into<String>, what: impl fmt::Display) -> Self {
        Self { path: path.into(), what: what.to_string() }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn expected(path: String, wanted: &str, value: &Value) -> Wrong {
    Wrong::new(path, format!("must be {wanted}, and is {}", kind(value)))
}

impl Fields {
    /// The object at this place.
    pub(super) fn of(path: impl Into<String>, value: Value) -> Result<Self, Wrong> {
        let path = path.into();
        match value {
            Value::Object(left) => Ok(Self { path, left }),
            other => Err(expected(path, "an object", &other)),
        }
    }

    /// The place of a field.
    pub(super) fn at(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub(super) fn wrong(&self, name: &str, what: impl fmt::Display) -> Wrong {
        Wrong::new(self.at(name), what)
    }

    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.left.remove(name)
    }

    fn read<T>(
        &mut self,
        name: &str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Wrong> {
        let Some(value) = self.value(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| expected(self.at(name), wanted, &value))
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Wrong> {
        self.read(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn needed(&mut self, name: &str) -> Result<String, Wrong> {
        self.string(name)?.ok_or_else(|| self.wrong(name, "is missing"))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Wrong> {
        Ok(self.read(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// Strings with their places; none where the field is missing.
    pub(super) fn strings(&mut self, name: &str) -> Result<Vec<(String, String)>, Wrong> {
        self.each(name, |path, value| match value {
            Value::String(text) => Ok((path, text)),
            other => Err(expected(path, "a string", &other)),
        })
    }

    pub(super) fn objects(&mut self, name: &str) -> Result<Vec<Self>, Wrong> {
        self.each(name, Self::of)
    }

    pub(super) fn each<T>(
        &mut self,
        name: &str,
        mut read: impl FnMut(String, Value) -> Result<T, Wrong>,
    ) -> Result<Vec<T>, Wrong> {
        let path = self.at(name);
        match self.value(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => {
                values.into_iter().enumerate().map(|(at, value)| read(format!("{path}[{at}]"), value)).collect()
            }
            Some(other) => Err(expected(path, "a list", &other)),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Self>, Wrong> {
        let path = self.at(name);
        self.value(name).map(|value| Self::of(path, value)).transpose()
    }

    /// A whole number that fits.
    pub(super) fn number<T: TryFrom<u64>>(&mut self, name: &str) -> Result<Option<T>, Wrong> {
        let number = self.read(name, "a whole number", Value::as_u64)?;
        number.map(|number| T::try_from(number).map_err(|_| self.wrong(name, "is too large"))).transpose()
    }

    /// Such as `"250ms"`, `"10s"`, `"5m"`, `"1h"`.
    pub(super) fn duration(&mut self, name: &str) -> Result<Option<Duration>, Wrong> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        let read = duration(&text);
        read.map(Some).ok_or_else(|| self.wrong(name, "must be a whole number with ms, s, m or h, such as \"10s\""))
    }

    /// One of these words.
    pub(super) fn choice<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, Wrong> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                Err(self.wrong(name, format!("must be one of {}, and is \"{text}\"", words.join(", "))))
            }
        }
    }

    /// What is left, whatever it is called.
    pub(super) fn rest(&mut self) -> Vec<String> {
        self.left.keys().cloned().collect()
    }

    /// All was asked for.
    pub(super) fn end(self) -> Result<(), Wrong> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => Err(self.wrong(name, "is not known")),
        }
    }
}

fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(millis).map(Duration::from_millis)
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.what) } else { write!(f, "{}: {}", self.path, self.what) }
    }
}
