//! Matchers shared by routes, filters and SAN checks.

use std::fmt;

/// `envoy.type.matcher.v3.StringMatcher`, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct StringMatcher {
    /// What the value is compared with.
    pub pattern: StringPattern,
    /// Compare ASCII case-insensitively. Never set for [`StringPattern::Regex`].
    pub ignore_case: bool,
}

/// The pattern of a [`StringMatcher`]. Patterns are lower-cased at build time when `ignore_case` is set.
#[derive(Clone, Debug, PartialEq)]
pub enum StringPattern {
    /// The whole value is equal.
    Exact(String),
    /// The value starts with this (not empty).
    Prefix(String),
    /// The value ends with this (not empty).
    Suffix(String),
    /// The value contains this (not empty).
    Contains(String),
    /// The whole value matches.
    Regex(SafeRegex),
}

/// An RE2-style regular expression that must match the whole value (`safe_regex`). Linear time.
#[derive(Clone)]
pub struct SafeRegex {
    source: String,
    regex: regex::bytes::Regex,
}

/// `envoy.config.route.v3.HeaderMatcher`, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderMatcher {
    /// Lower-case header name. `:method`, `:path`, `:authority` are legal.
    pub name: String,
    /// What is asked of the value.
    pub kind: HeaderMatcherKind,
    /// The result is inverted; a missing header still does not match, except for `Present` (gRFC A28).
    pub invert: bool,
    /// A missing header is matched as an empty value (Envoy `treat_missing_header_as_empty`).
    pub treat_missing_as_empty: bool,
}

/// The kinds of a [`HeaderMatcher`].
#[derive(Clone, Debug, PartialEq)]
pub enum HeaderMatcherKind {
    /// exact_match, prefix_match, suffix_match, contains_match, safe_regex_match and string_match.
    String(StringMatcher),
    /// Half-open `[start, end)` over the value as a decimal i64.
    Range {
        /// First value inside.
        start: i64,
        /// First value outside.
        end: i64,
    },
    /// Matches iff the header's presence equals this.
    Present(bool),
}

/// `envoy.config.route.v3.QueryParameterMatcher`, validated. The first parameter of the name counts, as it is written.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryParameterMatcher {
    /// Compared exactly.
    pub name: String,
    /// What is asked of it.
    pub kind: QueryParameterMatcherKind,
}

/// The kinds of a [`QueryParameterMatcher`].
#[derive(Clone, Debug, PartialEq)]
pub enum QueryParameterMatcherKind {
    /// It is there, and its value matches.
    String(StringMatcher),
    /// Matches iff its presence equals this.
    Present(bool),
}

/// `envoy.config.route.v3.CookieMatcher`, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct CookieMatcher {
    /// Compared exactly.
    pub name: String,
    /// What is asked of the value; a cookie that is absent does not match.
    pub value: StringMatcher,
    /// The result is inverted, that of an absent cookie too.
    pub invert: bool,
}

/// A regular expression and what its matches are replaced by (`RegexMatchAndSubstitute`). Matches any part of a text.
#[derive(Clone)]
pub struct RegexRewrite {
    regex: regex::Regex,
    /// `\1` for a group, `\0` for the whole match.
    substitution: String,
    /// The substitution in the notation of the regex crate.
    expansion: String,
}

/// A share in parts per million: `0..=1_000_000` (larger denominators are scaled at parse time).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FractionalPercent(
    /// Parts per million.
    pub u32,
);

/// What the numerator of a share counts in (`FractionalPercent.denominator`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Denominator {
    /// Percent.
    #[default]
    Hundred,
    /// Hundredths of a percent.
    TenThousand,
    /// Parts per million.
    Million,
}

impl StringMatcher {
    /// Matches the whole value exactly, case-sensitively.
    pub fn exact(value: impl Into<String>) -> Self {
        Self { pattern: StringPattern::Exact(value.into()), ignore_case: false }
    }

    /// Whether `value` matches. No allocation.
    pub fn matches(&self, value: &str) -> bool {
        self.matches_bytes(value.as_bytes())
    }

    /// Whether the raw header value matches. No allocation.
    pub fn matches_bytes(&self, value: &[u8]) -> bool {
        match (&self.pattern, self.ignore_case) {
            (StringPattern::Exact(p), false) => value == p.as_bytes(),
            (StringPattern::Exact(p), true) => value.eq_ignore_ascii_case(p.as_bytes()),
            (StringPattern::Prefix(p), false) => value.starts_with(p.as_bytes()),
            (StringPattern::Prefix(p), true) => {
                value.len() >= p.len() && value[..p.len()].eq_ignore_ascii_case(p.as_bytes())
            }
            (StringPattern::Suffix(p), false) => value.ends_with(p.as_bytes()),
            (StringPattern::Suffix(p), true) => {
                value.len() >= p.len() && value[value.len() - p.len()..].eq_ignore_ascii_case(p.as_bytes())
            }
            (StringPattern::Contains(p), false) => p.is_empty() || value.windows(p.len()).any(|w| w == p.as_bytes()),
            (StringPattern::Contains(p), true) => {
                p.is_empty() || value.windows(p.len()).any(|w| w.eq_ignore_ascii_case(p.as_bytes()))
            }
            (StringPattern::Regex(r), _) => r.matches_bytes(value),
        }
    }
}

impl SafeRegex {
    /// Compiles `source` so that it must match the whole value.
    ///
    /// # Errors
    /// The expression is not valid RE2 syntax or compiles to more than 1 MiB.
    pub fn new(source: &str) -> Result<Self, regex::Error> {
        let regex = regex::bytes::RegexBuilder::new(&format!(r"\A(?:{source})\z")).size_limit(1 << 20).build()?;
        Ok(Self { source: source.to_owned(), regex })
    }

    /// The expression as configured.
    pub fn as_str(&self) -> &str {
        &self.source
    }

    /// Whether the whole value matches.
    pub fn matches_bytes(&self, value: &[u8]) -> bool {
        self.regex.is_match(value)
    }
}

impl RegexRewrite {
    /// Compiles both parts.
    ///
    /// # Errors
    /// The expression is not valid RE2 syntax, compiles to more than 1 MiB, or the substitution names a group that it lacks.
    pub fn new(pattern: &str, substitution: &str) -> Result<Self, String> {
        let regex = regex::RegexBuilder::new(pattern).size_limit(1 << 20).build().map_err(|error| error.to_string())?;
        let mut expansion = String::with_capacity(substitution.len());
        let mut rest = substitution.chars();
        while let Some(c) = rest.next() {
            match c {
                '$' => expansion.push_str("$$"),
                '\\' => match rest.next() {
                    Some('\\') => expansion.push('\\'),
                    Some(digit) if digit.is_ascii_digit() => {
                        if digit.to_digit(10).is_some_and(|group| group as usize >= regex.captures_len()) {
                            return Err(format!(
                                "the substitution names group {digit}, which \"{pattern}\" does not have"
                            ));
                        }
                        expansion.push_str("${");
                        expansion.push(digit);
                        expansion.push('}');
                    }
                    _ => {
                        return Err(format!(
                            "\"{substitution}\" has a backslash before neither a digit nor a backslash"
                        ));
                    }
                },
                c => expansion.push(c),
            }
        }
        Ok(Self { regex, substitution: substitution.to_owned(), expansion })
    }

    /// `text` with every match replaced.
    pub fn apply<'t>(&self, text: &'t str) -> std::borrow::Cow<'t, str> {
        self.regex.replace_all(text, self.expansion.as_str())
    }
}

impl PartialEq for RegexRewrite {
    fn eq(&self, other: &Self) -> bool {
        self.regex.as_str() == other.regex.as_str() && self.substitution == other.substitution
    }
}

impl fmt::Debug for RegexRewrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/{}/", self.regex, self.substitution)
    }
}

impl PartialEq for SafeRegex {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for SafeRegex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.source)
    }
}

impl Denominator {
    /// So many of these; more than the whole is the whole.
    pub fn share(self, numerator: u32) -> FractionalPercent {
        let scale = match self {
            Self::Hundred => 10_000,
            Self::TenThousand => 100,
            Self::Million => 1,
        };
        FractionalPercent(numerator.saturating_mul(scale).min(FractionalPercent::HUNDRED.0))
    }
}

impl FractionalPercent {
    /// Always.
    pub const HUNDRED: Self = Self(1_000_000);

    /// `draw` is uniform in `0..1_000_000`.
    pub fn admits(self, draw: u32) -> bool {
        draw < self.0
    }
}
