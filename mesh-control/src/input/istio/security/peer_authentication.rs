//! `PeerAuthentication`: mutual TLS, permissive, or none.

use super::{Node, selector};
use crate::{
    input::fields::Fields,
    model::{MtlsMode, Object, PeerAuthentication},
    problem::Report,
};
use std::collections::BTreeMap;

pub(super) fn read(object: Object, spec: &Node, report: &Report) -> Option<PeerAuthentication> {
    spec.fields(report, "PeerAuthentication.spec", |f| {
        let selector = selector(f);
        let own = f.nested("mtls", mode).flatten();
        let mut ports = BTreeMap::new();
        for (key, value) in f.map("portLevelMtls") {
            let Ok(port @ 1..) = key.name.parse::<u16>() else {
                report.error(&key.at, format!("`{}` is not a port number", key.name));
                continue;
            };
            ports.insert(port, value.fields(report, "an item of portLevelMtls", mode).flatten());
        }
        if let Some((key, _)) = f.entry("portLevelMtls")
            && selector.is_all()
        {
            report.error(&key.at, "portLevelMtls needs a selector");
        }
        PeerAuthentication { object, selector, mode: own, ports }
    })
}

/// `None`: inherited.
fn mode(f: &Fields<'_>) -> Option<MtlsMode> {
    let mode = f.string("mode")?;
    match mode.value.as_str() {
        "UNSET" => None,
        "DISABLE" => Some(MtlsMode::Disable),
        "PERMISSIVE" => Some(MtlsMode::Permissive),
        "STRICT" => Some(MtlsMode::Strict),
        other => {
            let known = "known are UNSET, DISABLE, PERMISSIVE, STRICT";
            f.report.error(&mode.at, format!("unknown mtls.mode `{other}`: {known}"));
            None
        }
    }
}
