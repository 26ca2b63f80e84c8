//! Paths in one form (RFC 3986 section 6.2.2), so that policy and application read the same.

use crate::outbound::route::set_path;
use http::Uri;

/// Normalises the path of a URI. `false`: it can be read in two ways.
#[must_use]
pub(super) fn path(uri: &mut Uri) -> bool {
    let path = uri.path();
    if is_normal(path) {
        return true;
    }
    // `*` of OPTIONS, and nothing of CONNECT.
    if !path.starts_with('/') {
        return path == "*" || path.is_empty();
    }
    let Some(mut normal) = decoded(path).map(|path| without_dots(&path)) else { return false };
    if let Some(query) = uri.query() {
        normal.push('?');
        normal.push_str(query);
    }
    set_path(uri, &normal).is_ok()
}

/// The common case, without an allocation.
fn is_normal(path: &str) -> bool {
    path.starts_with('/') && !path.contains(['%', '\\']) && !path.contains("//") && !path.contains("/.")
}

/// What need not be encoded is not, and the rest in capitals. `None`: an encoded slash or backslash, or half a code.
fn decoded(path: &str) -> Option<String> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find(['%', '\\']) {
        out.push_str(&rest[..at]);
        if rest.as_bytes()[at] == b'\\' {
            out.push('/');
            rest = &rest[at + 1..];
            continue;
        }
        let digits = rest.get(at + 1..at + 3).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        match u8::from_str_radix(digits, 16).ok()? {
            b'/' | b'\\' | 0 => return None,
            byte if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => out.push(byte.into()),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
        rest = &rest[at + 3..];
    }
    out.push_str(rest);
    Some(out)
}

/// RFC 3986 section 5.2.4, and empty segments go too.
fn without_dots(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => _ = segments.pop(),
            _ => segments.push(segment),
        }
    }
    let directory = path.ends_with('/') || path.ends_with("/.") || path.ends_with("/..");
    let mut out = segments.iter().fold(String::with_capacity(path.len()), |out, segment| out + "/" + segment);
    if directory || out.is_empty() {
        out.push('/');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normal(text: &str) -> Option<String> {
        let mut uri: Uri = text.parse().unwrap();
        path(&mut uri).then(|| uri.to_string())
    }

    #[test]
    fn one_path_has_one_form() {
        for (came, expected) in [
            ("/a/b?x=%61//", "/a/b?x=%61//"),
            ("/%61dmin", "/admin"),
            ("//admin", "/admin"),
            ("/x/../admin", "/admin"),
            ("/x/%2e%2E/admin/", "/admin/"),
            ("/./admin/.", "/admin/"),
            ("/../../admin", "/admin"),
            ("/x\\..\\admin", "/admin"),
            ("/a%c3%a4%20", "/a%C3%A4%20"),
            ("/.hidden", "/.hidden"),
            ("/..", "/"),
            ("http://h/x/..?q", "http://h/?q"),
        ] {
            assert_eq!(normal(came).as_deref(), Some(expected), "{came}");
        }
        for came in ["/a%2fb", "/a%5Cb", "/a%00", "/a%", "/a%4", "/a%zz"] {
            assert_eq!(normal(came), None, "{came}");
        }
    }

    proptest! {
        #[test]
        fn what_is_normal_stays_as_it_is(came in "(/|[a-c.]|%61|%2e|%C3){1,12}") {
            let came = format!("/{came}");
            if let Some(once) = normal(&came) {
                prop_assert!(!once.contains("//") && !once.split('/').any(|segment| segment == ".."), "{}", once);
                prop_assert_eq!(normal(&once), Some(once));
            }
        }
    }
}
