//! Query parameters and cookies, read where a route asks for them. Nothing is decoded, as in Envoy's router.

use http::{HeaderMap, header};
use mesh_xds::resource::{CookieMatcher, QueryParameterMatcher, QueryParameterMatcherKind};

/// Whether the first parameter of the name is as asked.
pub(crate) fn query_matches(matcher: &QueryParameterMatcher, query: Option<&str>) -> bool {
    let value = query.and_then(|query| parameter(query, &matcher.name));
    match &matcher.kind {
        QueryParameterMatcherKind::Present(want) => value.is_some() == *want,
        QueryParameterMatcherKind::String(string) => value.is_some_and(|value| string.matches(value)),
    }
}

/// Whether the first cookie of the name is as asked. An absent one matches inverted matchers only.
pub(super) fn cookie_matches(matcher: &CookieMatcher, headers: &HeaderMap) -> bool {
    let matched = cookie(headers, &matcher.name).is_some_and(|value| matcher.value.matches_bytes(value));
    matched != matcher.invert
}

pub(crate) fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// The first of this name.
pub(crate) fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    cookies(headers, name).next()
}

/// The values without the quotes that may be around them (RFC 6265).
pub(crate) fn cookies<'h>(headers: &'h HeaderMap, name: &str) -> impl Iterator<Item = &'h [u8]> {
    let lines = headers.get_all(header::COOKIE).iter();
    let pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';')).filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        Some((pair[..at].trim_ascii(), pair[at + 1..].trim_ascii()))
    });
    let values = pairs.filter(move |(key, _)| *key == name.as_bytes()).map(|(_, value)| value);
    values.map(|value| value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn the_first_parameter_of_a_name_counts_as_it_is_written() {
        assert_eq!(parameter("a=1&b=2&a=3", "a"), Some("1"));
        assert_eq!(parameter("a=1&b&c=", "b"), Some(""));
        assert_eq!(parameter("a=b=c", "a"), Some("b=c"));
        assert_eq!(parameter("a=%20", "a"), Some("%20"));
        assert_eq!(parameter("ab=1", "a"), None);
        assert_eq!(parameter("", "a"), None);
    }

    #[test]
    fn cookies_are_found_in_every_line() {
        let lines = ["a=1; b=\"two\" ;c", "d = 4;a=9"].map(HeaderValue::from_static);
        let headers: HeaderMap = lines.map(|line| (header::COOKIE, line)).into_iter().collect();
        let mut appended = HeaderMap::new();
        for line in headers.get_all(header::COOKIE) {
            appended.append(header::COOKIE, line.clone());
        }
        appended.append(header::COOKIE, HeaderValue::from_static("a=1; b=\"two\" ;c"));
        let value = |name| cookie(&appended, name).map(|value| std::str::from_utf8(value).unwrap().to_owned());
        assert_eq!(value("b").as_deref(), Some("two"));
        assert_eq!(value("d").as_deref(), Some("4"));
        assert_eq!(value("c"), None);
    }
}
