//! Matchers of dynamic metadata, and sets of matchers within matchers.

use super::{Decoder, Valid};
use crate::resource::{MetadataMatcher, ValueMatcher};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    MetadataMatcher as ProtoMetadata, ValueMatcher as ProtoValue, double_matcher, list_matcher,
    metadata_matcher::path_segment::Segment, value_matcher::MatchPattern as ValuePattern,
};

/// Matchers are nested at most so deep.
const MAX_DEPTH: usize = 64;

impl Decoder<'_> {
    pub(super) fn metadata_matcher(&mut self, proto: ProtoMetadata) -> Valid<MetadataMatcher> {
        let filter = self.filled("filter", proto.filter)?.into();
        if proto.path.is_empty() {
            return Err(self.invalid_at("path", "must not be empty"));
        }
        let path = self.each("path", proto.path, |cx, segment| match segment.segment {
            Some(Segment::Key(key)) => cx.filled("key", key),
            None => Err(cx.invalid_at("key", "is missing")),
        })?;
        let Some(value) = proto.value else { return Err(self.invalid_at("value", "is missing")) };
        let value = self.at("value", |cx| cx.value_matcher(value, 0))?;
        Ok(MetadataMatcher { filter, path, value, invert: proto.invert })
    }

    fn value_matcher(&mut self, proto: ProtoValue, depth: usize) -> Valid<ValueMatcher> {
        self.nested(depth)?;
        Ok(match proto.match_pattern {
            Some(ValuePattern::NullMatch(_)) => ValueMatcher::Null,
            Some(ValuePattern::DoubleMatch(double)) => match double.match_pattern {
                Some(double_matcher::MatchPattern::Range(range)) => ValueMatcher::DoubleRange(range.start, range.end),
                Some(double_matcher::MatchPattern::Exact(number)) => ValueMatcher::Double(number),
                None => return Err(self.invalid_at("double_match", "has no pattern")),
            },
            Some(ValuePattern::StringMatch(string)) => {
                ValueMatcher::String(self.at("string_match", |cx| cx.string_matcher(string))?)
            }
            Some(ValuePattern::BoolMatch(wanted)) => ValueMatcher::Bool(wanted),
            Some(ValuePattern::PresentMatch(wanted)) => ValueMatcher::Present(wanted),
            Some(ValuePattern::ListMatch(list)) => match list.match_pattern {
                Some(list_matcher::MatchPattern::OneOf(element)) => ValueMatcher::List(Box::new(
                    self.at("list_match.one_of", |cx| cx.value_matcher(*element, depth + 1))?,
                )),
                None => return Err(self.invalid_at("list_match", "has no pattern")),
            },
            Some(ValuePattern::OrMatch(any)) => ValueMatcher::OneOf(
                self.at("or_match", |cx| cx.set(any.value_matchers, "value_matchers", Self::value_matcher, depth))?,
            ),
            None => return Err(self.invalid("has no pattern that is known")),
        })
    }

    /// # Errors
    /// Something is nested too deep.
    pub(super) fn nested(&self, depth: usize) -> Valid<()> {
        if depth > MAX_DEPTH { Err(self.invalid(format!("is nested more than {MAX_DEPTH} deep"))) } else { Ok(()) }
    }

    /// One or more, each within this one.
    pub(super) fn set<P, T>(
        &mut self,
        protos: Vec<P>,
        field: &'static str,
        one: impl Fn(&mut Self, P, usize) -> Valid<T>,
        depth: usize,
    ) -> Valid<Vec<T>> {
        if protos.is_empty() {
            return Err(self.invalid_at(field, "must not be empty"));
        }
        self.each(field, protos, |cx, proto| one(cx, proto, depth + 1))
    }
}
