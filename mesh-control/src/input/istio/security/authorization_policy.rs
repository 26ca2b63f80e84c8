//! `AuthorizationPolicy`: which requests are taken.
//!
//! What is wrong is an error, and refuses the whole set, as everywhere. What is right for Istio and cannot be honoured here refuses
//! the policy alone: the workloads that it selects deny every request, rather than letting in whom it would have kept out.

use super::{Node, clause, no_targets, selector};
use crate::{
    input::fields::Fields,
    model::{Attribute, Authorization, AuthzAction, Clause, Object, Rule},
    problem::{Located, Report},
};
use std::cell::RefCell;

/// Collects why a policy is refused: the first reason counts.
#[derive(Debug, Default)]
pub(super) struct Refusal(RefCell<Option<Located<String>>>);

impl Refusal {
    pub(super) fn because(&self, reason: Located<String>) {
        self.0.borrow_mut().get_or_insert(reason);
    }
}

pub(super) fn read(object: Object, dry_run: bool, spec: &Node, report: &Report) -> Option<Authorization> {
    spec.fields(report, "AuthorizationPolicy.spec", |f| {
        let selector = selector(f);
        no_targets(f);
        let refusal = Refusal::default();
        let action = action(f, &refusal);
        let rules = rules(f, &refusal);
        if rules.is_empty() && matches!(action, AuthzAction::Deny | AuthzAction::Audit) {
            report.warning(object.at(), format!("{object} has no rules: it matches no request"));
        }
        let refused = refusal.0.into_inner();
        if let Some(reason) = &refused {
            let consequence = "the workloads that this policy selects deny every request";
            report.warning(&reason.at, format!("{}: {consequence}", reason.value));
        }
        Authorization { object, selector, action, rules, dry_run, refused }
    })
}

fn action(f: &Fields<'_>, refusal: &Refusal) -> AuthzAction {
    let provider = f.entry("provider");
    let Some(action) = f.string("action") else { return AuthzAction::Allow };
    if let Some((key, _)) = provider
        && action.value != "CUSTOM"
    {
        f.report.error(&key.at, "provider goes with action CUSTOM only");
    }
    match action.value.as_str() {
        "ALLOW" => AuthzAction::Allow,
        "DENY" => AuthzAction::Deny,
        "AUDIT" => AuthzAction::Audit,
        "CUSTOM" => {
            refusal.because(action.map(|_| "action CUSTOM is not supported: there is no external authorizer".into()));
            AuthzAction::Deny
        }
        other => {
            let known = "known are ALLOW, DENY, AUDIT, CUSTOM";
            f.report.error(&action.at, format!("unknown action `{other}`: {known}"));
            AuthzAction::Allow
        }
    }
}

fn rules(f: &Fields<'_>, refusal: &Refusal) -> Vec<Rule> {
    let rule = |node: &Node| {
        node.fields(f.report, "a rule", |r| {
            for name in ["from", "to", "when"] {
                if r.get(name).is_some_and(Node::is_empty_list) {
                    r.report.error(r.at, format!("{name} is empty: leave it out, or say what it is"));
                }
            }
            Rule {
                from: r.list("from").iter().filter_map(|node| from(node, r)).collect(),
                to: r.list("to").iter().filter_map(|node| to(node, r)).collect(),
                when: r.list("when").iter().filter_map(|node| clause::when(node, r.report, refusal)).collect(),
            }
        })
    };
    f.list("rules").iter().filter_map(rule).collect()
}

fn from(node: &Node, r: &Fields<'_>) -> Option<Vec<Clause>> {
    node.fields(r.report, "an item of from", |f| {
        let source = f.nested("source", |s| {
            let clauses: Vec<Clause> = [
                ("principals", "notPrincipals", Attribute::SourcePrincipal),
                ("requestPrincipals", "notRequestPrincipals", Attribute::RequestPrincipal),
                ("namespaces", "notNamespaces", Attribute::SourceNamespace),
                ("serviceAccounts", "notServiceAccounts", Attribute::SourceServiceAccount),
                ("remoteIpBlocks", "notRemoteIpBlocks", Attribute::RemoteIp),
                ("ipBlocks", "notIpBlocks", Attribute::SourceIp),
            ]
            .into_iter()
            .filter_map(|(yes, no, attribute)| clause::clause(s, yes, no, attribute))
            .collect();
            let has = |attribute| clauses.iter().any(|c| c.attribute == attribute);
            if has(Attribute::SourceServiceAccount)
                && (has(Attribute::SourcePrincipal) || has(Attribute::SourceNamespace))
            {
                s.report.error(s.at, "serviceAccounts do not go together with principals or namespaces");
            }
            some("source", clauses, s)
        });
        if source.is_none() {
            f.missing("source", "the item of from");
        }
        source.unwrap_or_default()
    })
}

fn to(node: &Node, r: &Fields<'_>) -> Option<Vec<Clause>> {
    node.fields(r.report, "an item of to", |f| {
        let operation = f.nested("operation", |o| {
            let clauses = [
                ("hosts", "notHosts", Attribute::Host),
                ("methods", "notMethods", Attribute::Method),
                ("paths", "notPaths", Attribute::Path),
                ("ports", "notPorts", Attribute::DestinationPort),
            ];
            let clauses =
                clauses.into_iter().filter_map(|(yes, no, attribute)| clause::clause(o, yes, no, attribute)).collect();
            some("operation", clauses, o)
        });
        if operation.is_none() {
            f.missing("operation", "the item of to");
        }
        operation.unwrap_or_default()
    })
}

/// An empty source or operation would match everything, which nobody writes on purpose.
fn some(what: &str, clauses: Vec<Clause>, f: &Fields<'_>) -> Vec<Clause> {
    if clauses.is_empty() {
        f.report.error(f.at, format!("the {what} says nothing"));
    }
    clauses
}
