//! `IstioOperator`: of its `meshConfig`, what has a meaning here.

use super::{Node, locality};
use crate::{model::MeshDefaults, problem::Report};

pub(super) fn read(spec: &Node, report: &Report) -> MeshDefaults {
    let setting = spec.fields(report, "IstioOperator.spec", |f| {
        let setting = f.nested("meshConfig", |mesh| {
            let setting = mesh.nested("localityLbSetting", locality::setting);
            mesh.rest_not_honoured();
            setting
        });
        f.rest_not_honoured();
        setting.flatten()
    });
    match setting.flatten() {
        Some(locality) => MeshDefaults { locality },
        None => MeshDefaults::default(),
    }
}
