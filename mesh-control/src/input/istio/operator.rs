//! `IstioOperator`: of its `meshConfig`, what has a meaning here.

use super::{Node, locality};
use crate::{model::MeshDefaults, problem::Report};

pub(super) fn read(spec: &Node, report: &Report) -> MeshDefaults {
    let defaults = spec.fields(report, "IstioOperator.spec", |f| {
        let defaults = f.nested("meshConfig", |mesh| {
            let defaults = MeshDefaults::default();
            let locality = mesh.nested("localityLbSetting", locality::setting).unwrap_or(defaults.locality);
            let root = mesh.text("rootNamespace").filter(|name| !name.is_empty());
            mesh.rest_not_honoured();
            MeshDefaults { locality, root_namespace: root.unwrap_or(defaults.root_namespace) }
        });
        f.rest_not_honoured();
        defaults
    });
    defaults.flatten().unwrap_or_default()
}
