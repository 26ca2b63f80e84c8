//! Checks of security policies: what contradicts itself, what selects nobody, and what can never match.

use super::References;
use crate::{
    model::{Attribute, Authorization, JwtKeys, Object, PeerAuthentication, Scoped, Workload},
    problem::{At, Located},
};
use std::collections::BTreeMap;

pub(super) fn check(references: &References<'_>) {
    let security = &references.model.security;
    for policy in &security.peers {
        peers(policy, references);
    }
    one_each(references);
    for policy in &security.authorizations {
        somebody(policy, references);
        tokens(policy, references);
    }
    for policy in &security.requests {
        somebody(policy, references);
        for rule in &policy.rules {
            if let JwtKeys::Uri(Located { value: uri, at }) = &rule.keys {
                references.keys(uri, at);
            }
        }
    }
}

/// Workloads that a policy is about, with their namespaces.
fn selected<'a>(
    policy: &'a impl Scoped,
    references: &References<'a>,
) -> impl Iterator<Item = (&'a str, &'a Workload)> + 'a {
    let model = references.model;
    let workloads =
        model.services.iter().flat_map(|s| s.endpoints.iter().map(move |w| (s.object.namespace.as_str(), w)));
    workloads.filter(|(namespace, w)| policy.selects(namespace, &w.labels, &model.mesh.root_namespace))
}

fn somebody(policy: &impl Scoped, references: &References<'_>) {
    if !references.gaps.services && !policy.selector().is_all() && selected(policy, references).next().is_none() {
        let object = policy.object();
        references.report.warning(object.at(), format!("{object} selects no endpoint"));
    }
}

fn peers(policy: &PeerAuthentication, references: &References<'_>) {
    let object = &policy.object;
    if object.namespace == references.model.mesh.root_namespace && !policy.selector.is_all() {
        let reason =
            format!("{object} has no effect: in the root namespace it is about all workloads, without a selector");
        references.report.warning(object.at(), reason);
    } else {
        somebody(policy, references);
    }
}

/// Two PeerAuthentications of one scope: which wins would be chance.
fn one_each(references: &References<'_>) {
    let mut first: BTreeMap<(&str, Option<&At>), &Object> = BTreeMap::new();
    let report = references.report;
    for policy in &references.model.security.peers {
        let object = &policy.object;
        if policy.selector.is_all() {
            if let Some(first) = first.insert((&object.namespace, None), object) {
                let reason =
                    format!("namespace {} already has a PeerAuthentication, at {}", object.namespace, first.at());
                report.error(object.at(), reason);
            }
            continue;
        }
        for (namespace, workload) in selected(policy, references).filter(|(n, _)| *n == object.namespace) {
            let at = &workload.address.at;
            if let Some(first) = first.insert((namespace, Some(at)), object)
                && first.at() != object.at()
            {
                let reason = format!("the endpoint at {at} already has a PeerAuthentication, at {}", first.at());
                report.error(object.at(), reason);
            }
        }
    }
}

/// What asks about tokens where no token is known.
fn tokens(policy: &Authorization, references: &References<'_>) {
    let of_tokens = |attribute: &Attribute| {
        matches!(
            attribute,
            Attribute::RequestPrincipal
                | Attribute::RequestAudiences
                | Attribute::RequestPresenter
                | Attribute::RequestClaim(_)
        )
    };
    let clauses = policy.rules.iter().flat_map(|rule| rule.from.iter().flatten().chain(&rule.when));
    let Some(clause) = clauses.into_iter().find(|clause| of_tokens(&clause.attribute)) else { return };
    let model = references.model;
    let known = |(namespace, workload): (&str, &Workload)| {
        let mut policies = model.security.requests.iter();
        policies.any(|p| p.selects(namespace, &workload.labels, &model.mesh.root_namespace) && !p.rules.is_empty())
    };
    let mut workloads = selected(policy, references).peekable();
    if workloads.peek().is_some() && !workloads.any(known) {
        let reason = "no RequestAuthentication is about the workloads of this policy: no token is ever known to them";
        references.report.warning(&clause.at, reason);
    }
}
