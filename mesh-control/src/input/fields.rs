//! Typed access to a [`Node`]: every finding goes to the report with its place, and reading goes on.

use super::node::{Key, Node, Value};
use crate::problem::{At, Located, Report};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    time::Duration,
};

/// The fields of one map. What was not asked for until [`Node::fields`] returns is unknown.
pub(crate) struct Fields<'a> {
    pub(crate) at: &'a At,
    pub(crate) report: &'a Report,
    entries: &'a [(Key, Node)],
    known: RefCell<Vec<&'static str>>,
    /// What was not asked for is no error.
    open: Cell<bool>,
}

impl Node {
    /// Reads a map with `read`, then reports the fields that `read` did not ask for.
    pub(crate) fn fields<T>(&self, report: &Report, what: &str, read: impl FnOnce(&Fields<'_>) -> T) -> Option<T> {
        let entries = match &self.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            other => {
                report.error(&self.at, format!("{what} is a map, not {}", other.kind()));
                return None;
            }
        };
        let fields = Fields { at: &self.at, report, entries, known: RefCell::default(), open: Cell::new(false) };
        let read = read(&fields);
        fields.report_unknown(what);
        Some(read)
    }

    pub(crate) fn string(&self, report: &Report, what: &str) -> Option<Located<String>> {
        match &self.value {
            Value::String(s) => Some(Located { value: s.clone(), at: self.at.clone() }),
            Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                report.error(&self.at, format!("{what} is a string, not {}: put it in quotes", self.value.kind()));
                None
            }
            other => {
                report.error(&self.at, format!("{what} is a string, not {}", other.kind()));
                None
            }
        }
    }

    pub(crate) fn list(&self, report: &Report, what: &str) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            Value::Null => &[],
            other => {
                report.error(&self.at, format!("{what} is a list, not {}", other.kind()));
                &[]
            }
        }
    }

    pub(crate) fn is_empty_list(&self) -> bool {
        matches!(&self.value, Value::List(items) if items.is_empty())
    }

    fn entries(&self, report: &Report, what: &str) -> &[(Key, Self)] {
        match &self.value {
            Value::Map(entries) => entries,
            Value::Null => &[],
            other => {
                report.error(&self.at, format!("{what} is a map, not {}", other.kind()));
                &[]
            }
        }
    }

    /// An integer within the range of `T`.
    pub(crate) fn int<T: TryFrom<i64>>(&self, report: &Report, what: &str) -> Option<T> {
        let Value::Int(value) = self.value else {
            report.error(&self.at, format!("{what} is an integer, not {}", self.value.kind()));
            return None;
        };
        let fits = T::try_from(value).ok();
        if fits.is_none() {
            report.error(&self.at, format!("{what} is out of range: {value}"));
        }
        fits
    }
}

impl<'a> Fields<'a> {
    /// The value of a field; a null is as good as absent.
    pub(crate) fn get(&self, name: &'static str) -> Option<&'a Node> {
        self.entry(name).map(|(_, node)| node)
    }

    /// The same with its key.
    pub(crate) fn entry(&self, name: &'static str) -> Option<(&'a Key, &'a Node)> {
        self.known.borrow_mut().push(name);
        let entry = self.entries.iter().find(|(key, _)| key.name == name)?;
        (entry.1.value != Value::Null).then_some((&entry.0, &entry.1))
    }

    /// Fields that mean nothing to a mesh, such as what Kubernetes adds to every object.
    pub(crate) fn skip(&self, names: &[&'static str]) {
        self.known.borrow_mut().extend(names);
    }

    /// Fields that are understood and have no effect here.
    pub(crate) fn not_honoured(&self, names: &[&'static str]) {
        for name in names {
            if let Some((key, _)) = self.entry(name) {
                self.report.warning(&key.at, format!("`{name}` is not honoured"));
            }
        }
    }

    /// All other fields of this map are understood and have no effect here.
    pub(crate) fn rest_not_honoured(&self) {
        for (key, _) in self.entries.iter().filter(|(key, _)| !self.known.borrow().contains(&key.name.as_str())) {
            self.report.warning(&key.at, format!("`{}` is not honoured", key.name));
        }
        self.open.set(true);
    }

    pub(crate) fn string(&self, name: &'static str) -> Option<Located<String>> {
        self.get(name)?.string(self.report, name)
    }

    /// A string without its place.
    pub(crate) fn text(&self, name: &'static str) -> Option<String> {
        self.string(name).map(|s| s.value)
    }

    pub(crate) fn required_string(&self, name: &'static str, of: &str) -> Option<Located<String>> {
        let Some(node) = self.get(name) else {
            self.missing(name, of);
            return None;
        };
        let string = node.string(self.report, name)?;
        if string.value.is_empty() {
            self.report.error(&string.at, format!("{name} of {of} is empty"));
            return None;
        }
        Some(string)
    }

    pub(crate) fn missing(&self, name: &str, of: &str) {
        self.report.error(self.at, format!("{of} has no {name}"));
    }

    pub(crate) fn bool(&self, name: &'static str) -> Option<bool> {
        let node = self.get(name)?;
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        self.report.error(&node.at, format!("{name} is a boolean, not {}", node.value.kind()));
        None
    }

    pub(crate) fn int<T: TryFrom<i64>>(&self, name: &'static str) -> Option<T> {
        self.get(name)?.int(self.report, name)
    }

    /// A port number, 1..=65535.
    pub(crate) fn port(&self, name: &'static str) -> Option<Located<u16>> {
        let node = self.get(name)?;
        let value: u16 = node.int(self.report, name)?;
        if value == 0 {
            self.report.error(&node.at, format!("{name} is out of range: 0"));
            return None;
        }
        Some(Located { value, at: node.at.clone() })
    }

    /// 0..=100.
    pub(crate) fn percent(&self, name: &'static str) -> Option<u32> {
        let node = self.get(name)?;
        let value = node.int(self.report, name)?;
        if value > 100 {
            self.report.error(&node.at, format!("{name} is a percentage, 0 to 100, not {value}"));
            return None;
        }
        Some(value)
    }

    /// 0..=100, with a fraction.
    pub(crate) fn percentage(&self, name: &'static str) -> Option<f64> {
        let value = self.number(name)?;
        if !(0.0..=100.0).contains(&value) {
            let at = self.get(name).map_or(self.at, |node| &node.at);
            self.report.error(at, format!("{name} is a percentage, 0 to 100, not {value}"));
            return None;
        }
        Some(value)
    }

    /// Any number.
    pub(crate) fn number(&self, name: &'static str) -> Option<f64> {
        let node = self.get(name)?;
        match node.value {
            #[allow(clippy::cast_precision_loss, reason = "what is so large is out of every range")]
            Value::Int(value) => Some(value as f64),
            Value::Float(value) => Some(value),
            ref other => {
                self.report.error(&node.at, format!("{name} is a number, not {}", other.kind()));
                None
            }
        }
    }

    /// `1.5s`, `25ms`, `1m30s`, ...; at least 1 ms, or exactly zero.
    pub(crate) fn duration(&self, name: &'static str) -> Option<Duration> {
        let text = self.string(name)?;
        match parse_duration(&text.value) {
            Some(value) if value.is_zero() || value >= Duration::from_millis(1) => Some(value),
            Some(_) => {
                self.report.error(&text.at, format!("{name} is shorter than 1ms: `{}`", text.value));
                None
            }
            None => {
                let reason = format!("{name} is a duration such as 25ms, 1.5s or 1m, not `{}`", text.value);
                self.report.error(&text.at, reason);
                None
            }
        }
    }

    /// As [`Self::duration`], and not zero.
    pub(crate) fn positive_duration(&self, name: &'static str) -> Option<Duration> {
        let value = self.duration(name)?;
        if value.is_zero() {
            let at = self.get(name).map_or(self.at, |node| &node.at);
            self.report.error(at, format!("{name} must be longer than zero"));
            return None;
        }
        Some(value)
    }

    pub(crate) fn list(&self, name: &'static str) -> &'a [Node] {
        self.get(name).map_or(&[], |node| node.list(self.report, name))
    }

    pub(crate) fn strings(&self, name: &'static str) -> Vec<Located<String>> {
        let item = format!("an item of {name}");
        self.list(name).iter().filter_map(|node| node.string(self.report, &item)).collect()
    }

    /// A map with any keys.
    pub(crate) fn map(&self, name: &'static str) -> &'a [(Key, Node)] {
        self.get(name).map_or(&[], |node| node.entries(self.report, name))
    }

    pub(crate) fn string_map(&self, name: &'static str) -> BTreeMap<String, String> {
        let entry = |(key, node): &(Key, Node)| {
            Some((key.name.clone(), node.string(self.report, &format!("{name}.{}", key.name))?.value))
        };
        self.map(name).iter().filter_map(entry).collect()
    }

    /// A nested map.
    pub(crate) fn nested<T>(&self, name: &'static str, read: impl FnOnce(&Fields<'_>) -> T) -> Option<T> {
        self.get(name)?.fields(self.report, name, read)
    }

    fn report_unknown(&self, what: &str) {
        if self.open.get() {
            return;
        }
        let known = self.known.borrow();
        for (key, _) in self.entries.iter().filter(|(key, _)| !known.contains(&key.name.as_str())) {
            let near = known.iter().map(|k| (distance(k, &key.name), *k)).min().filter(|(d, _)| *d <= 2);
            let hint = match near {
                Some((_, name)) => format!("did you mean `{name}`?"),
                None => format!("known are {}", known.join(", ")),
            };
            self.report.error(&key.at, format!("unknown field `{}` in {what}: {hint}", key.name));
        }
    }
}

/// Go's notation, as Istio takes it.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(unit_at);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let nanos = match unit {
            "ns" => 1.0,
            "us" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * nanos;
        rest = tail;
    }
    let seconds = (total / 1e9 * 1e9).round() / 1e9;
    Duration::try_from_secs_f64(seconds).ok().filter(|d| d.as_secs() <= 315_576_000_000)
}

/// Levenshtein distance, without regard to case.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.chars().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_go_notation() {
        let ms = |n| Some(Duration::from_millis(n));
        let cases =
            [("1s", ms(1000)), ("0.5s", ms(500)), ("25ms", ms(25)), ("1m30s", ms(90_000)), ("1h", ms(3_600_000))];
        for (text, expected) in
            cases.into_iter().chain([("", None), ("5", None), ("s", None), ("1x", None), ("-1s", None)])
        {
            assert_eq!(parse_duration(text), expected, "{text}");
        }
    }

    #[test]
    fn typing_errors_are_near() {
        assert_eq!(distance("weight", "wieght"), 2);
        assert_eq!(distance("consecutive5xxErrors", "consecutive5xxerrors"), 0);
        assert_eq!(distance("", "ab"), 2);
    }
}
