//! Stateful sessions (gRFC A55).

use crate::resource::{
    SessionState, StatefulSessionConfig,
    decode::{Decoder, Valid, type_name},
};
use envoy_types::pb::envoy::{
    config::core::v3::TypedExtensionConfig,
    extensions::{
        filters::http::stateful_session::v3::{
            StatefulSession, StatefulSessionPerRoute, stateful_session_per_route::Override,
        },
        http::stateful_session::{cookie::v3::CookieBasedSessionState, header::v3::HeaderBasedSessionState},
    },
};
use http::HeaderName;
use std::time::Duration;

impl Decoder<'_> {
    pub(super) fn stateful_session(&mut self, proto: StatefulSession) -> Valid<StatefulSessionConfig> {
        self.ignored(&[
            ("strict", proto.strict),
            ("status_on_strict_destination_not_found", proto.status_on_strict_destination_not_found != 0),
        ]);
        let state = match proto.session_state {
            None => None,
            Some(state) => Some(self.at("session_state", |cx| cx.session_state(state))?),
        };
        Ok(StatefulSessionConfig { state })
    }

    pub(super) fn session_per_route(&mut self, proto: StatefulSessionPerRoute) -> Valid<StatefulSessionConfig> {
        match proto.r#override {
            Some(Override::StatefulSession(session)) => self.at("stateful_session", |cx| cx.stateful_session(session)),
            Some(Override::Disabled(true)) => Ok(StatefulSessionConfig { state: None }),
            Some(Override::Disabled(false)) => Err(self.invalid_at("disabled", "must be true where it is set")),
            None => Err(self.invalid("has neither disabled nor stateful_session")),
        }
    }

    fn session_state(&mut self, proto: TypedExtensionConfig) -> Valid<SessionState> {
        let Some(config) = proto.typed_config else { return Err(self.invalid_at("typed_config", "is missing")) };
        self.at("typed_config", |cx| match type_name(&config.type_url) {
            "envoy.extensions.http.stateful_session.cookie.v3.CookieBasedSessionState" => {
                let proto: CookieBasedSessionState = cx.message(&config.value)?;
                let Some(cookie) = proto.cookie else { return Err(cx.invalid_at("cookie", "is missing")) };
                cx.at("cookie", |cx| {
                    let name = cx.filled("name", cookie.name)?;
                    if HeaderName::from_bytes(name.as_bytes()).is_err() {
                        return Err(cx.invalid_at("name", format!("\"{name}\" is not the name of a cookie")));
                    }
                    let ttl = cx.duration("ttl", cookie.ttl)?.filter(|ttl| *ttl > Duration::ZERO);
                    let path = if cookie.path.is_empty() { "/".to_owned() } else { cookie.path };
                    let legal = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b';');
                    let attributes = cx.each("attributes", cookie.attributes, |cx, attribute| {
                        if attribute.name.is_empty() || !legal(&attribute.name) || !legal(&attribute.value) {
                            return Err(cx.invalid("is not an attribute of a cookie"));
                        }
                        Ok(match attribute.value.as_str() {
                            "" => attribute.name,
                            value => format!("{}={value}", attribute.name),
                        })
                    })?;
                    if !legal(&path) {
                        return Err(cx.invalid_at("path", format!("{path:?} is not the path of a cookie")));
                    }
                    Ok(SessionState::Cookie { name, ttl, path, attributes })
                })
            }
            "envoy.extensions.http.stateful_session.header.v3.HeaderBasedSessionState" => {
                let proto: HeaderBasedSessionState = cx.message(&config.value)?;
                Ok(SessionState::Header(cx.header_name("name", &proto.name)?))
            }
            other => Err(cx.invalid(format!("unknown session state \"{other}\": use a cookie or a header"))),
        })
    }
}
