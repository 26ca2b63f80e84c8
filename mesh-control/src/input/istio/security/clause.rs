//! One condition of an authorization rule: its attribute, and values that make sense for it.

use super::{Node, authorization_policy::Refusal};
use crate::{
    input::fields::Fields,
    model::{Attribute, Clause, IpBlock},
    problem::{Located, Report},
};

/// As many as Istio takes in one list of `serviceAccounts`.
const MOST_SERVICE_ACCOUNTS: usize = 16;

/// Reads the two lists of an attribute; `None` when neither says anything.
pub(super) fn clause(
    f: &Fields<'_>,
    name: &'static str,
    not_name: &'static str,
    attribute: Attribute,
) -> Option<Clause> {
    let (values, not_values) = (f.strings(name), f.strings(not_name));
    let at = f.entry(name).or_else(|| f.entry(not_name)).map(|(key, _)| key.at.clone())?;
    for value in values.iter().chain(&not_values) {
        check(value, &attribute, f.report);
    }
    if attribute == Attribute::SourceServiceAccount && values.len().max(not_values.len()) > MOST_SERVICE_ACCOUNTS {
        f.report.error(&at, format!("more than {MOST_SERVICE_ACCOUNTS} service accounts"));
    }
    if values.is_empty() && not_values.is_empty() {
        f.report.error(&at, format!("{name} is empty: leave it out, or say what it is"));
    }
    let text = |values: Vec<Located<String>>| values.into_iter().map(|v| v.value).collect();
    Some(Clause { attribute, values: text(values), not_values: text(not_values), at })
}

/// An item of `when`.
pub(super) fn when(node: &Node, report: &Report, refusal: &Refusal) -> Option<Clause> {
    node.fields(report, "an item of when", |f| {
        let key = f.required_string("key", "the condition");
        let attribute = key.and_then(|key| attribute(&key, report, refusal));
        match attribute {
            Some(attribute) => {
                let clause = clause(f, "values", "notValues", attribute);
                if clause.is_none() {
                    report.error(f.at, "the condition has neither values nor notValues");
                }
                clause
            }
            None => {
                f.skip(&["values", "notValues"]);
                None
            }
        }
    })?
}

fn attribute(key: &Located<String>, report: &Report, refusal: &Refusal) -> Option<Attribute> {
    let (name, brackets) = match key.value.find('[') {
        Some(open) => (&key.value[..open], names_in_brackets(&key.value[open..])),
        None => (key.value.as_str(), Some(Vec::new())),
    };
    let Some(mut names) = brackets else {
        report.error(&key.at, format!("`{}`: expected NAME[KEY]", key.value));
        return None;
    };
    if name.starts_with("experimental.envoy.filters.") {
        refusal.because(key.clone().map(|key| format!("the condition `{key}` is not supported")));
        return None;
    }
    let plain = [
        ("source.ip", Attribute::SourceIp),
        ("remote.ip", Attribute::RemoteIp),
        ("source.namespace", Attribute::SourceNamespace),
        ("source.serviceAccount", Attribute::SourceServiceAccount),
        ("source.principal", Attribute::SourcePrincipal),
        ("request.auth.principal", Attribute::RequestPrincipal),
        ("request.auth.audiences", Attribute::RequestAudiences),
        ("request.auth.presenter", Attribute::RequestPresenter),
        ("destination.ip", Attribute::DestinationIp),
        ("destination.port", Attribute::DestinationPort),
        ("connection.sni", Attribute::ConnectionSni),
    ];
    match (name, names.len()) {
        ("request.headers", 1) => Some(Attribute::RequestHeader(names.remove(0).to_ascii_lowercase())),
        ("request.auth.claims", 1..) => Some(Attribute::RequestClaim(names)),
        ("request.headers" | "request.auth.claims", _) => {
            report.error(&key.at, format!("`{}`: expected {name}[NAME]", key.value));
            None
        }
        (_, 0) => {
            let found = plain.iter().find(|(known, _)| *known == name).map(|(_, attribute)| attribute.clone());
            if found.is_none() {
                let known: Vec<_> = plain.iter().map(|(known, _)| *known).collect();
                let others = "request.headers[NAME], request.auth.claims[NAME]";
                let reason = format!("unknown condition `{}`: known are {}, {others}", key.value, known.join(", "));
                report.error(&key.at, reason);
            }
            found
        }
        _ => {
            report.error(&key.at, format!("unknown condition `{}`", key.value));
            None
        }
    }
}

/// `[a][b]` as `a`, `b`.
fn names_in_brackets(mut text: &str) -> Option<Vec<String>> {
    let mut names = Vec::new();
    while !text.is_empty() {
        let (name, rest) = text.strip_prefix('[')?.split_once(']')?;
        if name.is_empty() {
            return None;
        }
        names.push(name.to_owned());
        text = rest;
    }
    Some(names)
}

/// Values that could never match, or not as they were meant, are errors.
fn check(value: &Located<String>, attribute: &Attribute, report: &Report) {
    let text = value.value.as_str();
    let wrong = |reason: &str| report.error(&value.at, format!("`{text}` {reason}"));
    if text.is_empty() {
        report.error(&value.at, "an empty value matches nothing");
        return;
    }
    match attribute {
        Attribute::SourceIp | Attribute::RemoteIp | Attribute::DestinationIp if IpBlock::parse(text).is_none() => {
            wrong("is neither an IP address nor a range of them");
        }
        Attribute::DestinationPort if text.parse::<u16>().is_err() => wrong("is not a port number"),
        Attribute::SourceServiceAccount => {
            let parts: Vec<_> = text.split('/').collect();
            if text.contains('*') || parts.len() > 2 || parts.iter().any(|part| part.is_empty()) {
                wrong("is not a service account: NAME or NAMESPACE/NAME, without wildcards");
            }
        }
        Attribute::Path if text.contains('{') || text.contains('}') => {
            if let Err(reason) = check_template(text) {
                wrong(reason);
            }
        }
        Attribute::SourcePrincipal | Attribute::SourceNamespace if text.starts_with("spiffe://") => {
            wrong("has a scheme: a principal is written without spiffe://");
        }
        // A `*` in the middle is a character like any other to Istio, which is hardly ever meant.
        _ if *attribute != Attribute::SourceNamespace && inner_star(text) => {
            report.warning(&value.at, format!("`{text}`: only a `*` at the beginning or the end is a wildcard"));
        }
        _ => {}
    }
}

/// Whether there is a `*` that is not the one wildcard.
fn inner_star(text: &str) -> bool {
    let rest = text.strip_prefix('*').or_else(|| text.strip_suffix('*')).unwrap_or(text);
    rest.contains('*')
}

/// Istio's path templates: `{*}` is one segment, `{**}` any number of them, and is the last operator.
fn check_template(path: &str) -> Result<(), &'static str> {
    let Some(path) = path.strip_prefix('/') else { return Err("is a template and does not begin with /") };
    let mut ended = false;
    for segment in path.split('/') {
        match segment {
            "{*}" if ended => return Err("has an operator after {**}"),
            "{**}" if ended => return Err("has {**} twice"),
            "{*}" => {}
            "{**}" => ended = true,
            other if other.contains(['{', '}']) => {
                return Err("is not a template: an operator, {*} or {**}, is a segment of its own");
            }
            other if other.contains('*') => return Err("mixes the operators of templates with a `*` of its own"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_checked_as_istio_does() {
        for good in ["/a/{*}", "/a/{*}/b/{**}", "/{**}/b", "/{*}"] {
            assert_eq!(check_template(good), Ok(()), "{good}");
        }
        for bad in ["a/{*}", "/a{*}", "/{**}/{*}", "/{**}/{**}", "/{*}/x*", "/{id}", "/{*}{**}"] {
            assert!(check_template(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_in_brackets_are_paths() {
        let names = |text| names_in_brackets(text).map(|names| names.join(" "));
        assert_eq!(names("[a]"), Some("a".into()));
        assert_eq!(names("[a][b.c/d]"), Some("a b.c/d".into()));
        for bad in ["[", "[]", "[a", "[a]b", "a]"] {
            assert_eq!(names(bad), None, "{bad}");
        }
    }
}
