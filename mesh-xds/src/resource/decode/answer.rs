//! `RedirectAction` and `DirectResponseAction`: what a route answers itself.

use super::{Decoder, Valid};
use crate::resource::{Action, DirectResponse, Redirect, RedirectPath};
use bytes::Bytes;
use envoy_types::pb::envoy::config::{
    core::v3::data_source::Specifier,
    route::v3::{
        DirectResponseAction, RedirectAction,
        redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier},
    },
};
use std::sync::Arc;

impl Decoder<'_> {
    pub(super) fn redirect(&mut self, proto: RedirectAction) -> Valid<Redirect> {
        let status = match RedirectResponseCode::try_from(proto.response_code) {
            Ok(RedirectResponseCode::MovedPermanently) => 301,
            Ok(RedirectResponseCode::Found) => 302,
            Ok(RedirectResponseCode::SeeOther) => 303,
            Ok(RedirectResponseCode::TemporaryRedirect) => 307,
            Ok(RedirectResponseCode::PermanentRedirect) => 308,
            Err(_) => return Err(self.invalid_at("response_code", format!("unknown code {}", proto.response_code))),
        };
        let scheme = match proto.scheme_rewrite_specifier {
            Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".to_owned()),
            Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) if !scheme.is_empty() => Some(scheme),
            _ => None,
        };
        let path = match proto.path_rewrite_specifier {
            Some(PathRewriteSpecifier::PathRedirect(path)) if !path.is_empty() => Some(RedirectPath::Whole(path)),
            Some(PathRewriteSpecifier::PrefixRewrite(prefix)) if !prefix.is_empty() => {
                Some(RedirectPath::Prefix(prefix))
            }
            Some(PathRewriteSpecifier::RegexRewrite(rewrite)) => {
                Some(RedirectPath::Regex(self.at("regex_rewrite", |cx| cx.regex_rewrite(&rewrite))?))
            }
            _ => None,
        };
        let port = match u16::try_from(proto.port_redirect) {
            Ok(0) => None,
            Ok(port) => Some(port),
            Err(_) => return Err(self.invalid_at("port_redirect", format!("{} is no port", proto.port_redirect))),
        };
        let host = Some(proto.host_redirect).filter(|host| !host.is_empty());
        Ok(Redirect { status, scheme, host, port, path, strip_query: proto.strip_query })
    }

    /// A body that would have to be read from elsewhere makes the route fail its requests.
    pub(super) fn direct_response(&mut self, proto: DirectResponseAction, max_body: usize) -> Valid<Action> {
        let Ok(status @ 200..600) = u16::try_from(proto.status) else {
            return Err(self.invalid_at("status", format!("{} is not in 200..=599", proto.status)));
        };
        self.ignored(&[("body_format", proto.body_format.is_some())]);
        let body = match proto.body.and_then(|body| body.specifier) {
            None => Bytes::new(),
            Some(Specifier::InlineBytes(bytes)) => bytes.into(),
            Some(Specifier::InlineString(text)) => text.into(),
            Some(Specifier::Filename(_) | Specifier::EnvironmentVariable(_)) => {
                let reason = "route action direct_response with a body from a file or the environment is not supported";
                return Ok(Action::Unsupported(reason.into()));
            }
        };
        if body.len() > max_body {
            let reason = format!("{} bytes are more than max_direct_response_body_size_bytes, {max_body}", body.len());
            return Err(self.invalid_at("body", reason));
        }
        Ok(Action::Direct(Arc::new(DirectResponse { status, body })))
    }
}
