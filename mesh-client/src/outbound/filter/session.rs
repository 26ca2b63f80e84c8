//! Stateful sessions: a caller stays with its endpoint (gRFC A55, A60; Envoy's `stateful_session` filter).

use super::{Filter, FilterRequest, FilterResponse, Step, Verdict, Watch};
use crate::outbound::route::cookie;
use mesh_xds::resource::{SessionHost, SessionState};
use std::{borrow::Cow, sync::Arc};

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct StatefulSession(pub(super) Arc<SessionState>);

/// Looks whether the endpoint is still the one of the session.
struct Session {
    state: Arc<SessionState>,
    host: Option<SessionHost>,
    /// The route splits over several clusters.
    split: bool,
}

impl Filter for StatefulSession {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        let head = request.head();
        if !self.0.is_for(head.uri.path()) {
            return Step::Now(Verdict::Pass);
        }
        let value = match &*self.0 {
            SessionState::Cookie { name, .. } => cookie(&head.headers, name),
            SessionState::Header(name) => head.headers.get(name).map(http::HeaderValue::as_bytes),
        };
        let host = value.and_then(SessionHost::decode);
        if let Some(host) = &host {
            request.explain("session", || format!("sticks to {}", host.address));
            request.stick_to(host);
        }
        let split = request.place.split;
        Step::Now(Verdict::Watch(Box::new(Session { state: self.0.clone(), host, split })))
    }

    fn describe(&self) -> Cow<'_, str> {
        match &*self.0 {
            SessionState::Cookie { name, .. } => format!("session in cookie {name}").into(),
            SessionState::Header(name) => format!("session in header {name}").into(),
        }
    }
}

impl Watch for Session {
    /// Says the endpoint where it is another than the caller knows.
    fn response(&mut self, response: &mut FilterResponse<'_>) {
        let Some(address) = response.endpoint() else { return };
        let host = SessionHost { address, cluster: self.split.then(|| response.cluster().to_owned()) };
        if self.host.as_ref() == Some(&host) {
            return;
        }
        if let Some((name, value)) = self.state.header(&host) {
            let headers = &mut response.head_mut().headers;
            if name == http::header::SET_COOKIE {
                headers.append(name, value);
            } else {
                headers.insert(name, value);
            }
        }
    }
}
