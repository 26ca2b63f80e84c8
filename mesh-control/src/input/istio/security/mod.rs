//! Istio's security API, v1 and v1beta1 (one schema).

mod authorization_policy;
mod clause;
mod peer_authentication;
mod request_authentication;

use super::Node;
use crate::{
    input::fields::Fields,
    model::{Object, Security, Selector},
    problem::Report,
};

/// The kinds that are read.
pub(in crate::input) const KINDS: [&str; 3] = ["PeerAuthentication", "AuthorizationPolicy", "RequestAuthentication"];

/// Reads one object. What has errors is left out: the whole set is refused for them.
pub(super) fn read(object: Object, dry_run: bool, spec: &Node, report: &Report, security: &mut Security) {
    match object.kind {
        "PeerAuthentication" => security.peers.extend(peer_authentication::read(object, spec, report)),
        "AuthorizationPolicy" => {
            security.authorizations.extend(authorization_policy::read(object, dry_run, spec, report));
        }
        _ => security.requests.extend(request_authentication::read(object, spec, report)),
    }
}

/// `selector`; missing: every workload.
fn selector(f: &Fields<'_>) -> Selector {
    let labels = f.nested("selector", |s| {
        if s.get("matchLabels").is_none() {
            s.report.warning(s.at, "a selector without matchLabels selects every workload");
        }
        s.string_map("matchLabels")
    });
    Selector { labels: labels.unwrap_or_default() }
}

/// Gateways and waypoints, which there are none of here: who it would apply to cannot be told.
fn no_targets(f: &Fields<'_>) {
    for name in ["targetRef", "targetRefs"] {
        if let Some((key, _)) = f.entry(name) {
            f.report.error(&key.at, format!("{name} is not supported: use selector"));
        }
    }
}
