//! Header edits: `*_headers_to_add` and `*_headers_to_remove`.

use super::{Decoder, Valid};
use crate::resource::{AppendAction, Format, HeaderAdd, HeaderEdits, HeaderOps};
use envoy_types::pb::envoy::config::core::v3::{HeaderValueOption, header_value_option::HeaderAppendAction};
use http::{HeaderName, HeaderValue};

/// What is added and what is removed.
type Ops = (Vec<HeaderValueOption>, Vec<String>);

impl Decoder<'_> {
    pub(super) fn header_edits(&mut self, request: Ops, response: Ops) -> Valid<HeaderEdits> {
        Ok(HeaderEdits {
            request: self.header_ops("request_headers_to_add", "request_headers_to_remove", request)?,
            response: self.header_ops("response_headers_to_add", "response_headers_to_remove", response)?,
        })
    }

    fn header_ops(&mut self, to_add: &'static str, to_remove: &'static str, (add, remove): Ops) -> Valid<HeaderOps> {
        let add = add.into_iter().enumerate();
        let add = add
            .map(|(index, option)| self.at_index(to_add, index, |cx| cx.header_add(option)))
            .collect::<Valid<_>>()?;
        let remove = remove.into_iter().enumerate();
        let remove = remove
            .map(|(index, name)| self.at_index(to_remove, index, |cx| cx.editable(&name)))
            .collect::<Valid<_>>()?;
        Ok(HeaderOps { remove, add })
    }

    pub(super) fn header_add(&mut self, option: HeaderValueOption) -> Valid<HeaderAdd> {
        let Some(header) = option.header else { return Err(self.invalid_at("header", "is missing")) };
        let action = match (option.append, HeaderAppendAction::try_from(option.append_action)) {
            // The deprecated field counts when it is there, as in Envoy; false was "replace".
            (Some(append), _) if append.value => AppendAction::Append,
            (Some(_), _) => AppendAction::Overwrite,
            (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => AppendAction::Append,
            (None, Ok(HeaderAppendAction::AddIfAbsent)) => AppendAction::AddIfAbsent,
            (None, Ok(HeaderAppendAction::OverwriteIfExistsOrAdd)) => AppendAction::Overwrite,
            (None, Ok(HeaderAppendAction::OverwriteIfExists)) => AppendAction::OverwriteIfExists,
            (None, Err(_)) => {
                return Err(self.invalid_at("append_action", format!("unknown action {}", option.append_action)));
            }
        };
        self.at("header", |cx| {
            let name = cx.at("key", |cx| cx.editable(&header.key))?;
            let value = match (header.value.as_str(), header.raw_value) {
                ("", raw) => match HeaderValue::from_bytes(&raw) {
                    Ok(_) => Format::literal(raw),
                    Err(_) => return Err(cx.invalid_at("raw_value", "is not a header value")),
                },
                (text, raw) if raw.is_empty() => {
                    if HeaderValue::from_str(text).is_err() {
                        return Err(cx.invalid_at("value", format!("{text:?} is not a header value")));
                    }
                    Format::parse(text).map_err(|reason| cx.invalid_at("value", reason))?
                }
                _ => return Err(cx.invalid("has both value and raw_value")),
            };
            if value.has_unknowable() {
                let reason =
                    format!("\"{}\" has an operator that a client knows no value of: it stays empty", header.value);
                cx.note("value", reason);
            }
            Ok(HeaderAdd { name, value, action, keep_empty: option.keep_empty_value })
        })
    }

    /// Envoy: pseudo-headers and `host` are changed by rewrites only.
    pub(super) fn editable(&mut self, name: &str) -> Valid<HeaderName> {
        if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
            return Err(self.invalid(format!("\"{name}\" may not be changed: :-headers and host are for rewrites")));
        }
        HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes())
            .map_err(|_| self.invalid(format!("\"{name}\" is not a header name")))
    }
}
