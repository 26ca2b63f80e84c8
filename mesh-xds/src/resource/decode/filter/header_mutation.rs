//! Header mutation.

use crate::resource::{
    AppendAction, Format, HeaderMutation, HeaderMutationConfig, QueryMutation,
    decode::{Decoder, Valid},
};
use envoy_types::pb::{
    envoy::{
        config::{
            common::mutation_rules::v3::{HeaderMutation as Proto, header_mutation::Action},
            core::v3::{KeyValueMutation, key_value_append::KeyValueAppendAction},
        },
        extensions::filters::http::header_mutation::v3::Mutations,
    },
    google::protobuf::value::Kind,
};

impl Decoder<'_> {
    /// The `mutations` of a config.
    pub(super) fn mutations(
        &mut self,
        proto: Option<Mutations>,
        most_specific_wins: bool,
    ) -> Valid<HeaderMutationConfig> {
        let proto = proto.unwrap_or_default();
        self.at("mutations", |cx| {
            cx.ignored(&[("request_trailers_mutations", !proto.request_trailers_mutations.is_empty())]);
            Ok(HeaderMutationConfig {
                request: cx.each("request_mutations", proto.request_mutations, Self::header_mutation)?,
                query: cx.each("query_parameter_mutations", proto.query_parameter_mutations, Self::query_mutation)?,
                response: cx.each("response_mutations", proto.response_mutations, Self::header_mutation)?,
                response_trailers: cx.each(
                    "response_trailers_mutations",
                    proto.response_trailers_mutations,
                    Self::header_mutation,
                )?,
                most_specific_wins,
            })
        })
    }

    fn header_mutation(&mut self, proto: Proto) -> Valid<HeaderMutation> {
        Ok(match proto.action {
            Some(Action::Remove(name)) => HeaderMutation::Remove(self.at("remove", |cx| cx.editable(&name))?),
            Some(Action::Append(option)) => HeaderMutation::Add(self.at("append", |cx| cx.header_add(option))?),
            Some(Action::RemoveOnMatch(on)) => HeaderMutation::RemoveMatching(self.at("remove_on_match", |cx| {
                let Some(matcher) = on.key_matcher else { return Err(cx.invalid_at("key_matcher", "is missing")) };
                cx.at("key_matcher", |cx| cx.string_matcher(matcher))
            })?),
            None => return Err(self.invalid("has no action")),
        })
    }

    fn query_mutation(&mut self, proto: KeyValueMutation) -> Valid<QueryMutation> {
        let append = match (proto.append, proto.remove) {
            (None, name) if !name.is_empty() => return Ok(QueryMutation::Remove(name)),
            (Some(append), name) if name.is_empty() => append,
            _ => return Err(self.invalid("must have one of append and remove")),
        };
        let action = match KeyValueAppendAction::try_from(append.action) {
            Ok(KeyValueAppendAction::AppendIfExistsOrAdd) => AppendAction::Append,
            Ok(KeyValueAppendAction::AddIfAbsent) => AppendAction::AddIfAbsent,
            Ok(KeyValueAppendAction::OverwriteIfExistsOrAdd) => AppendAction::Overwrite,
            Ok(KeyValueAppendAction::OverwriteIfExists) => AppendAction::OverwriteIfExists,
            Err(_) => return Err(self.invalid_at("append.action", format!("unknown action {}", append.action))),
        };
        self.at("append", |cx| {
            let Some(record) = append.record else { return Err(cx.invalid_at("record", "is missing")) };
            if record.key.is_empty() {
                return Err(cx.invalid_at("record.key", "must not be empty"));
            }
            let Some(Kind::StringValue(text)) = record.value.and_then(|value| value.kind) else {
                return Err(cx.invalid_at("record.value", "must be a string"));
            };
            let value = Format::parse(&text).map_err(|reason| cx.invalid_at("record.value", reason))?;
            Ok(QueryMutation::Add { name: record.key, value, action })
        })
    }
}
