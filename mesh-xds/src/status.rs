//! What the client knows, in the shape of the client status discovery service (gRFC A40).

use crate::lint::Note;
use std::{sync::Arc, time::SystemTime};

/// Everything an [`XdsClient`](crate::XdsClient) knows.
#[derive(Clone, Debug, Default)]
pub struct ClientStatus {
    /// Our node id.
    pub node_id: String,
    /// One entry per control plane that is or was in use.
    pub servers: Vec<ServerStatus>,
    /// Every resource asked for, by type and name.
    pub resources: Vec<ResourceStatus>,
}

/// The connection to one control plane.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerStatus {
    /// `server_uri`.
    pub uri: Arc<str>,
    /// A stream is open.
    pub connected: bool,
    /// Why the last stream or connection attempt ended; `None` once a response arrived.
    pub last_error: Option<Arc<str>>,
}

/// One resource, as in `ClientConfig.GenericXdsConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct ResourceStatus {
    /// `type.googleapis.com/...`
    pub type_url: &'static str,
    /// Resource name.
    pub name: Arc<str>,
    /// The control plane it is asked from.
    pub server: Arc<str>,
    /// `version_info` of the accepted version, or empty.
    pub version: Arc<str>,
    /// When that version was accepted.
    pub last_updated: Option<SystemTime>,
    /// Where it stands.
    pub client_status: ClientResourceStatus,
    /// The last rejection, while it stands.
    pub error_state: Option<ErrorState>,
    /// Fields of the accepted version that are not honoured.
    pub notes: Arc<[Note]>,
}

/// `ClientResourceStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientResourceStatus {
    /// Asked for, no answer yet.
    Requested,
    /// The control plane has none.
    DoesNotExist,
    /// Accepted and in force.
    Acked,
    /// The last version was rejected; the accepted version, if any, stays in force.
    Nacked,
    /// Not sent in time (gRFC A88).
    Timeout,
}

/// `UpdateFailureState`.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorState {
    /// Field path and reason.
    pub details: Arc<str>,
    /// `version_info` of the rejected response.
    pub version: Arc<str>,
    /// When it was rejected.
    pub last_attempt: SystemTime,
}
