//! String, header and fraction matchers.

use super::{Decoder, Valid};
use crate::resource::{
    Denominator, FractionalPercent, HeaderMatcher, HeaderMatcherKind, SafeRegex, StringMatcher, StringPattern,
};
use envoy_types::pb::envoy::{
    config::route::v3::{HeaderMatcher as ProtoHeaderMatcher, header_matcher::HeaderMatchSpecifier},
    r#type::{
        matcher::v3::{RegexMatcher, StringMatcher as ProtoStringMatcher, string_matcher::MatchPattern},
        v3::{FractionalPercent as ProtoFraction, fractional_percent::DenominatorType},
    },
};

impl Decoder<'_> {
    pub(super) fn string_matcher(&mut self, proto: ProtoStringMatcher) -> Valid<StringMatcher> {
        let ignore_case = proto.ignore_case;
        let (field, make, text): (_, fn(String) -> StringPattern, _) = match proto.match_pattern {
            Some(MatchPattern::Exact(text)) => {
                return Ok(StringMatcher { pattern: StringPattern::Exact(fold(text, ignore_case)), ignore_case });
            }
            Some(MatchPattern::Prefix(text)) => ("prefix", StringPattern::Prefix, text),
            Some(MatchPattern::Suffix(text)) => ("suffix", StringPattern::Suffix, text),
            Some(MatchPattern::Contains(text)) => ("contains", StringPattern::Contains, text),
            Some(MatchPattern::SafeRegex(regex)) => {
                // Envoy: ignore_case has no effect on safe_regex.
                let regex = self.at("safe_regex", |cx| cx.regex(&regex))?;
                return Ok(StringMatcher { pattern: StringPattern::Regex(regex), ignore_case: false });
            }
            Some(MatchPattern::Custom(_)) => return Err(self.invalid_at("custom", "not supported")),
            None => return Err(self.invalid("has no match pattern")),
        };
        if text.is_empty() {
            return Err(self.invalid_at(field, "must not be empty"));
        }
        Ok(StringMatcher { pattern: make(fold(text, ignore_case)), ignore_case })
    }

    pub(super) fn regex(&mut self, proto: &RegexMatcher) -> Valid<SafeRegex> {
        SafeRegex::new(&proto.regex)
            .map_err(|error| self.invalid_at("regex", format!("\"{}\" is not valid: {error}", proto.regex)))
    }

    /// gRFC A28. A matcher without a specifier is rejected, as grpc-go does.
    pub(super) fn header_matcher(&mut self, proto: ProtoHeaderMatcher) -> Valid<HeaderMatcher> {
        if proto.name.is_empty() {
            return Err(self.invalid_at("name", "must not be empty"));
        }
        let plain = |pattern| HeaderMatcherKind::String(StringMatcher { pattern, ignore_case: false });
        let kind = match proto.header_match_specifier {
            Some(HeaderMatchSpecifier::ExactMatch(text)) => plain(StringPattern::Exact(text)),
            Some(HeaderMatchSpecifier::PrefixMatch(text)) => {
                plain(StringPattern::Prefix(self.filled("prefix_match", text)?))
            }
            Some(HeaderMatchSpecifier::SuffixMatch(text)) => {
                plain(StringPattern::Suffix(self.filled("suffix_match", text)?))
            }
            Some(HeaderMatchSpecifier::ContainsMatch(text)) => {
                plain(StringPattern::Contains(self.filled("contains_match", text)?))
            }
            Some(HeaderMatchSpecifier::SafeRegexMatch(regex)) => {
                plain(StringPattern::Regex(self.at("safe_regex_match", |cx| cx.regex(&regex))?))
            }
            Some(HeaderMatchSpecifier::StringMatch(matcher)) => {
                HeaderMatcherKind::String(self.at("string_match", |cx| cx.string_matcher(matcher))?)
            }
            Some(HeaderMatchSpecifier::RangeMatch(range)) => {
                if range.start > range.end {
                    return Err(
                        self.invalid_at("range_match", format!("start {} is above end {}", range.start, range.end))
                    );
                }
                HeaderMatcherKind::Range { start: range.start, end: range.end }
            }
            Some(HeaderMatchSpecifier::PresentMatch(present)) => HeaderMatcherKind::Present(present),
            None => return Err(self.invalid("has no header_match_specifier")),
        };
        Ok(HeaderMatcher {
            name: proto.name.to_ascii_lowercase(),
            kind,
            invert: proto.invert_match,
            treat_missing_as_empty: proto.treat_missing_header_as_empty,
        })
    }

    pub(super) fn header_matchers(
        &mut self,
        field: &'static str,
        protos: Vec<ProtoHeaderMatcher>,
    ) -> Valid<Vec<HeaderMatcher>> {
        protos
            .into_iter()
            .enumerate()
            .map(|(index, proto)| self.at_index(field, index, |cx| cx.header_matcher(proto)))
            .collect()
    }

    pub(super) fn filled(&mut self, field: &'static str, text: String) -> Valid<String> {
        if text.is_empty() { Err(self.invalid_at(field, "must not be empty")) } else { Ok(text) }
    }

    /// Scaled to parts per million; more than the whole is the whole.
    pub(super) fn fraction(&mut self, field: &'static str, proto: ProtoFraction) -> Valid<FractionalPercent> {
        Ok(self.denominator(field, proto)?.share(proto.numerator))
    }

    /// What the numerator counts in.
    pub(super) fn denominator(&mut self, field: &'static str, proto: ProtoFraction) -> Valid<Denominator> {
        match DenominatorType::try_from(proto.denominator) {
            Ok(DenominatorType::Hundred) => Ok(Denominator::Hundred),
            Ok(DenominatorType::TenThousand) => Ok(Denominator::TenThousand),
            Ok(DenominatorType::Million) => Ok(Denominator::Million),
            Err(_) => Err(self.invalid_at(field, format!("unknown denominator {}", proto.denominator))),
        }
    }
}

fn fold(text: String, ignore_case: bool) -> String {
    if ignore_case { text.to_ascii_lowercase() } else { text }
}
