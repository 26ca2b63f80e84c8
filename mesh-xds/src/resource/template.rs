//! Path templates: `envoy.extensions.path.match.uri_template.v3` and its rewrite.

use std::fmt;

/// At most this many variables (Envoy: `kPatternMatchingMaxVariablesPerUrl`).
const MAX_VARIABLES: usize = 5;
/// A variable's name has at most this many characters (Envoy: `kPatternMatchingMaxVariableNameLen`).
const MAX_NAME: usize = 16;
/// What a path segment may hold: RFC 3986 `pchar`, as a class of a regular expression.
const SEGMENT: &str = r"[a-zA-Z0-9._~%!$&'()*+,;:@=-]";
/// The same and `/`.
const SEGMENTS: &str = r"[a-zA-Z0-9._~%!$&'()*+,;:@=/-]";
/// Of a compiled template, in bytes.
const MAX_SIZE: usize = 1 << 20;

/// A path template such as `/videos/{id}/*`, compiled.
///
/// `*` is one segment or a part of it, `**` any number of segments (last operator only), `{name}` and `{name=PATTERN}` catch what
/// they match.
#[derive(Clone)]
pub struct PathTemplate {
    source: String,
    regex: regex::Regex,
    /// The same, whose operators match any bytes but `/` (`**`: any).
    open: regex::bytes::Regex,
    names: Vec<String>,
}

/// What a path becomes, such as `/{lang}/{file}.vtt`: names of a [`PathTemplate`] in braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRewrite(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(String),
}

/// Turns a template into a regular expression.
struct Parser {
    regex: String,
    open: String,
    names: Vec<String>,
    /// `**` was seen: no operator may follow.
    ended: bool,
}

impl PathTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// It is not a template; the text says why.
    pub fn new(source: &str) -> Result<Self, String> {
        if !source.starts_with('/') {
            return Err(format!("\"{source}\" does not start with /"));
        }
        let mut parser = Parser { regex: r"\A".to_owned(), open: r"\A".to_owned(), names: Vec::new(), ended: false };
        parser.template(source)?;
        parser.push(r"\z");
        let wrong = |error| format!("\"{source}\": {error}");
        let regex = regex::RegexBuilder::new(&parser.regex).size_limit(MAX_SIZE).build().map_err(wrong)?;
        let open = regex::bytes::RegexBuilder::new(&parser.open).size_limit(MAX_SIZE).build().map_err(wrong)?;
        Ok(Self { source: source.to_owned(), regex, open, names: parser.names })
    }

    /// As configured.
    pub fn as_str(&self) -> &str {
        &self.source
    }

    /// Whether the whole path (without query) matches.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }

    /// The same, whatever characters the path has, also those that a path may not have and servers take all the same: what is forbidden stays
    /// forbidden.
    pub fn matches_any_bytes(&self, path: &str) -> bool {
        self.open.is_match(path.as_bytes())
    }

    /// What every path that matches starts with.
    pub fn literal_prefix(&self) -> &str {
        self.source.split(['*', '{']).next().unwrap_or_default()
    }

    /// `path` rewritten; `None` when it does not match.
    pub fn rewrite(&self, path: &str, rewrite: &TemplateRewrite) -> Option<String> {
        let caught = self.regex.captures(path)?;
        Some(rewrite.0.iter().fold(String::new(), |out, part| {
            out + match part {
                Part::Text(text) => text,
                Part::Variable(name) => caught.name(name).map_or("", |found| found.as_str()),
            }
        }))
    }
}

impl Parser {
    fn template(&mut self, source: &str) -> Result<(), String> {
        let mut rest = source;
        while let Some(at) = rest.find(['*', '{']) {
            let (text, operator) = rest.split_at(at);
            self.literal(text)?;
            rest = match operator.strip_prefix('{') {
                Some(inner) => {
                    let (variable, after) =
                        inner.split_once('}').ok_or_else(|| format!("\"{source}\" has a {{ without }}"))?;
                    self.variable(variable)?;
                    after
                }
                None => self.star(operator)?,
            };
        }
        self.literal(rest)
    }

    fn star<'s>(&mut self, operator: &'s str) -> Result<&'s str, String> {
        if self.ended {
            return Err("no operator may follow **".to_owned());
        }
        match operator.strip_prefix("**") {
            Some(after) => {
                self.ended = true;
                self.regex.push_str(SEGMENTS);
                self.open.push_str("(?s-u:.)");
                self.push("*");
                Ok(after)
            }
            None => {
                self.regex.push_str(SEGMENT);
                self.open.push_str("(?-u:[^/])");
                self.push("+");
                Ok(&operator[1..])
            }
        }
    }

    fn variable(&mut self, variable: &str) -> Result<(), String> {
        let (name, pattern) = variable.split_once('=').unwrap_or((variable, "*"));
        let legal = name.len() <= MAX_NAME
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !legal {
            return Err(format!(
                "\"{name}\" is not a variable name: 1 to {MAX_NAME} letters, digits or _, a letter first"
            ));
        }
        if self.names.iter().any(|known| known == name) {
            return Err(format!("variable \"{name}\" is there twice"));
        }
        if self.names.len() == MAX_VARIABLES {
            return Err(format!("more than {MAX_VARIABLES} variables"));
        }
        if pattern.is_empty() {
            return Err(format!("variable \"{name}\" has an empty pattern"));
        }
        self.names.push(name.to_owned());
        self.push(&format!("(?P<{name}>"));
        let mut rest = pattern;
        while let Some(at) = rest.find('*') {
            let (text, operator) = rest.split_at(at);
            self.literal(text)?;
            rest = self.star(operator)?;
        }
        self.literal(rest)?;
        self.push(")");
        Ok(())
    }

    fn literal(&mut self, text: &str) -> Result<(), String> {
        if let Some(bad) = text.chars().find(|c| !c.is_ascii_alphanumeric() && !"/-._~%!$&'()+,;:@=".contains(*c)) {
            return Err(format!("{bad:?} may not be in a path template"));
        }
        self.push(&regex::escape(text));
        Ok(())
    }

    fn push(&mut self, text: &str) {
        self.regex.push_str(text);
        self.open.push_str(text);
    }
}

impl TemplateRewrite {
    /// Reads `source`, which may use the variables of `template`.
    ///
    /// # Errors
    /// A brace is open or a variable unknown.
    pub fn new(source: &str, template: &PathTemplate) -> Result<Self, String> {
        if !source.starts_with('/') {
            return Err(format!("\"{source}\" does not start with /"));
        }
        let mut parts = Vec::new();
        let mut rest = source;
        while let Some((text, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').ok_or_else(|| format!("\"{source}\" has a {{ without }}"))?;
            if !template.names.iter().any(|known| known == name) {
                return Err(format!("\"{}\" has no variable \"{name}\"", template.source));
            }
            parts.extend([Part::Text(text.to_owned()), Part::Variable(name.to_owned())]);
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        match parts.iter().any(|part| matches!(part, Part::Text(text) if text.contains(['}', '*']))) {
            true => Err(format!("\"{source}\" is not a rewrite: text and variables in braces")),
            false => Ok(Self(parts)),
        }
    }
}

impl PartialEq for PathTemplate {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for PathTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(template: &str, path: &str) -> bool {
        PathTemplate::new(template).unwrap().matches(path)
    }

    /// The examples of the API's documentation, and their edges.
    #[test]
    fn templates_match_as_documented() {
        for (template, path, expected) in [
            ("/videos/*/*/*.m4s", "/videos/123414/hls/1080p5000_00001.m4s", true),
            ("/videos/*/*/*.m4s", "/videos/123414/hls/a/1080p5000_00001.m4s", false),
            ("/videos/{file}", "/videos/1080p5000_00001.m4s", true),
            ("/videos/{file}", "/videos/", false),
            ("/videos/{file}", "/videos/a/b", false),
            ("/**.mpd", "/content/123/india/dash/55/manifest.mpd", true),
            ("/**.mpd", "/content/123/india/dash/55/manifest.mpd2", false),
            ("/api/v{version}/users/{id}.json", "/api/v2/users/456.json", true),
            ("/api/v{version}/users/{id}.json", "/api/2/users/456.json", false),
            ("/api/**", "/api/", true),
            ("/{all=**}", "/", true),
            ("/{v=videos/*}/x", "/videos/1/x", true),
            ("/{v=videos/*}/x", "/videos/1/2/x", false),
            ("/a.b", "/a.b", true),
            ("/a.b", "/axb", false),
        ] {
            assert_eq!(matches(template, path), expected, "{template} {path}");
        }
    }

    #[test]
    fn characters_that_no_path_should_have_hide_nothing() {
        let matches = |template: &str, path: &str| {
            let template = PathTemplate::new(template).unwrap();
            assert!(!template.matches(path), "routes are as Envoy's");
            template.matches_any_bytes(path)
        };
        for path in ["/admin/7|", "/admin/^", "/admin/[x]", "/admin/\u{e4}", "/admin/\n", "/admin/{"] {
            for template in ["/admin/*", "/admin/{id}", "/admin/**", "/{all=**}", "/{a}/{b}"] {
                assert!(matches(template, path), "{template} {path}");
            }
        }
        assert!(!matches("/admin/*", "/admin/|/x") && !matches("/admin/{id}", "/admin/"));
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for (template, reason) in [
            ("videos", "does not start with /"),
            ("/**/*", "no operator may follow **"),
            ("/**/{a}", "no operator may follow **"),
            ("/{a", "without }"),
            ("/{1a}", "not a variable name"),
            ("/{a}/{a}", "twice"),
            ("/{a}/{b}/{c}/{d}/{e}/{f}", "more than 5"),
            ("/{a=}", "empty pattern"),
            ("/a b", "' ' may not be"),
            ("/a}", "'}' may not be"),
            ("/{seventeenletters1}", "not a variable name"),
        ] {
            let error = PathTemplate::new(template).expect_err(template);
            assert!(error.contains(reason), "{template}: {error}");
        }
    }

    #[test]
    fn rewrites_use_what_was_caught() {
        for (template, rewrite, path, expected) in [
            ("/{one}/{two}", "/{two}/{one}", "/cat/dog", "/dog/cat"),
            ("/videos/{language=lang/*}/*", "/{language}", "/videos/lang/en/video.m4s", "/lang/en"),
            (
                "/content/{format}/{lang}/{id}/{file}.vtt",
                "/{lang}/{format}/{file}.vtt",
                "/content/hls/en-us/12345/en_193913.vtt",
                "/en-us/hls/en_193913.vtt",
            ),
        ] {
            let template = PathTemplate::new(template).unwrap();
            let rewrite = TemplateRewrite::new(rewrite, &template).unwrap();
            assert_eq!(template.rewrite(path, &rewrite).as_deref(), Some(expected));
        }
        let template = PathTemplate::new("/{one}").unwrap();
        for (rewrite, reason) in [
            ("/{two}", "no variable \"two\""),
            ("one", "start with /"),
            ("/{one", "without }"),
            ("/*", "not a rewrite"),
        ] {
            let error = TemplateRewrite::new(rewrite, &template).expect_err(rewrite);
            assert!(error.contains(reason), "{rewrite}: {error}");
        }
        assert_eq!(template.literal_prefix(), "/");
    }
}
