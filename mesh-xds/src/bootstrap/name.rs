//! Resource names: templates and the xdstp encoding (gRFC A47).

use super::{Bootstrap, BootstrapError};
use std::fmt::Write as _;

impl Bootstrap {
    /// The LDS name for `target`, of `xds:///target` or `xds://authority/target`.
    ///
    /// A template that starts with `xdstp:` gets the target percent-encoded (gRFC A47).
    ///
    /// # Errors
    /// The authority is not in the bootstrap.
    pub fn resource_name(&self, authority: Option<&str>, target: &str) -> Result<String, BootstrapError> {
        let Some(name) = authority.filter(|name| !name.is_empty()) else {
            return Ok(fill(&self.client_listener_template, target));
        };
        let entry = self.authorities.get(name).ok_or_else(|| self.unknown_authority(name))?;
        Ok(match &entry.client_listener_template {
            Some(template) => fill(template, target),
            None => fill(&format!("xdstp://{name}/envoy.config.listener.v3.Listener/%s"), target),
        })
    }

    /// The LDS name for a server that listens on `address` (`IP:port`), or `None` without a template.
    pub fn server_resource_name(&self, address: &str) -> Option<String> {
        self.server_listener_template.as_deref().map(|template| fill(template, address))
    }
}

/// The authority of a resource name: `Some` only for `xdstp://authority/...`.
pub(crate) fn authority_of(resource: &str) -> Option<&str> {
    let rest = resource.strip_prefix("xdstp://")?;
    rest.split('/').next().filter(|authority| !authority.is_empty())
}

fn fill(template: &str, target: &str) -> String {
    if template.starts_with("xdstp:") {
        template.replace("%s", &encode(target))
    } else {
        template.replace("%s", target)
    }
}

/// Percent-encodes what may not stand in a path segment sequence (RFC 3986 `pchar` and `/`).
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
