//! Who may do what: RBAC (gRFC A41, Envoy), compiled once, asked without an allocation.

mod audit;
mod rule;
#[cfg(test)]
mod tests;

pub(crate) use audit::Parser;
pub use audit::{AuditEvent, AuditLogger, AuditLoggerFactory, audit_logger};
pub(crate) use rule::{Asked, Caller, Certificate};

use audit::Audit;
use mesh_xds::resource::{RbacAction, RbacConfig, RbacRules};
use metrics::{Counter, counter};
use rule::Rule;
use std::{fmt, sync::Arc};

/// One RBAC filter, compiled.
#[derive(Debug)]
pub(crate) struct Authorization {
    /// Instance name.
    name: Arc<str>,
    enforced: Option<Engine>,
    shadow: Option<Engine>,
}

/// Policies with one action.
struct Engine {
    action: RbacAction,
    policies: Box<[Policy]>,
    audit: Option<Audit>,
    /// Requests that were let in and refused, where they are counted.
    allowed: Option<Counter>,
    denied: Counter,
}

#[derive(Debug)]
struct Policy {
    name: Arc<str>,
    permission: Rule,
    principal: Rule,
}

/// A request was refused. Displays as Envoy's details of such an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Denied {
    /// The policy that said so; `None`: none let it in.
    pub(crate) policy: Option<Arc<str>>,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = self.policy.as_deref().unwrap_or("none").replace(char::is_whitespace, "_");
        write!(f, "rbac_access_denied_matched_policy[{policy}]")
    }
}

impl Authorization {
    /// `None`: there is nothing to ask.
    pub(crate) fn compile(name: &Arc<str>, config: &RbacConfig) -> Option<Self> {
        if config.is_inert() {
            return None;
        }
        let engine = |rules: &RbacRules, shadow: bool| {
            let prefix = if shadow { &config.shadow_rules_stat_prefix } else { &config.rules_stat_prefix };
            Engine::compile(name, rules, prefix, shadow)
        };
        Some(Self {
            name: name.clone(),
            enforced: config.rules.as_ref().map(|rules| engine(rules, false)),
            shadow: config.shadow_rules.as_ref().map(|rules| engine(rules, true)),
        })
    }

    /// Whether a request is let in. The shadow rules are asked first, and change nothing.
    pub(crate) fn check(&self, asked: &Asked<'_>) -> Result<(), Denied> {
        if let Some(shadow) = &self.shadow {
            let (allowed, policy) = shadow.decide(asked);
            shadow.told(&self.name, asked, allowed, policy, true);
        }
        let Some(enforced) = &self.enforced else { return Ok(()) };
        let (allowed, policy) = enforced.decide(asked);
        enforced.told(&self.name, asked, allowed, policy, false);
        if allowed { Ok(()) } else { Err(Denied { policy: policy.map(|policy| policy.name.clone()) }) }
    }
}

impl Engine {
    fn compile(filter: &Arc<str>, rules: &RbacRules, prefix: &str, shadow: bool) -> Self {
        let count = |result: &'static str| counter!("mesh_rbac_requests_total", "filter" => filter.to_string(), "prefix" => prefix.to_owned(), "result" => result);
        let (allowed, denied) = match (shadow, rules.action) {
            (true, _) => (Some(count("shadow_allowed")), count("shadow_denied")),
            (false, RbacAction::Log) => (Some(count("logged")), count("denied")),
            (false, _) => (None, count("denied")),
        };
        Self {
            action: rules.action,
            policies: rules
                .policies
                .iter()
                .map(|policy| Policy {
                    name: policy.name.clone(),
                    permission: Rule::permissions(&policy.permissions),
                    principal: Rule::principals(&policy.principals),
                })
                .collect(),
            audit: rules.audit.as_ref().and_then(|audit| Audit::compile(filter, audit)),
            allowed,
            denied,
        }
    }

    /// Whether it is let in, and the first policy that matches.
    fn decide(&self, asked: &Asked<'_>) -> (bool, Option<&Policy>) {
        let policy = self.policies.iter().find(|policy| policy.matches(asked));
        let allowed = match self.action {
            RbacAction::Allow => policy.is_some(),
            RbacAction::Deny => policy.is_none(),
            RbacAction::Log => true,
        };
        (allowed, policy)
    }

    /// Counts, logs and audits a decision.
    fn told(&self, filter: &str, asked: &Asked<'_>, allowed: bool, policy: Option<&Policy>, shadow: bool) {
        if !allowed {
            self.denied.increment(1);
            let policy = policy.map_or("", |policy| &policy.name);
            let principal = asked.caller.principal();
            tracing::debug!(target: "mesh::rbac", filter, policy, principal, path = asked.head.path(), shadow, "denied");
        } else if let Some(counter) = &self.allowed
            && (self.action != RbacAction::Log || policy.is_some())
        {
            counter.increment(1);
            let policy = policy.map_or("", |policy| &policy.name);
            let principal = asked.caller.principal();
            tracing::debug!(target: "mesh::rbac", filter, policy, principal, path = asked.head.path(), shadow, "allowed");
        }
        if let Some(audit) = &self.audit {
            audit.tell(asked, policy.map_or("", |policy| &policy.name), allowed, shadow);
        }
    }
}

impl Policy {
    fn matches(&self, asked: &Asked<'_>) -> bool {
        self.permission.matches(asked) && self.principal.matches(asked)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("action", &self.action).field("policies", &self.policies).finish_non_exhaustive()
    }
}

impl fmt::Display for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut engines = [("", &self.enforced), ("shadow ", &self.shadow)].into_iter();
        engines.try_for_each(|(kind, engine)| match engine {
            Some(engine) => write!(f, "{kind}{:?} of {} policies ", engine.action, engine.policies.len()),
            None => Ok(()),
        })
    }
}
