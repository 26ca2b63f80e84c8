//! Audit logging of decisions (gRFC A59).

use super::Asked;
use crate::{BoxError, error::caught, outbound::iso8601};
use mesh_xds::resource::{AuditLoggerConfig, AuditLoggerParser, AuditLogging, FilterPayload};
use std::{any::Any, fmt, io::Write as _, sync::Arc, time::SystemTime};

/// A decision about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditEvent<'e> {
    /// The path of the request: of gRPC calls the full name of the method.
    pub rpc_method: &'e str,
    /// Who asked: the first URI SAN of his certificate, or DNS SAN, or its subject; empty without one.
    pub principal: &'e str,
    /// The instance name of the RBAC filter.
    pub policy_name: &'e str,
    /// The policy that matched; empty when none did.
    pub matched_rule: &'e str,
    /// Whether it was let in; where `shadow`: whether it would have been.
    pub authorized: bool,
    /// The decision of a dry run: the request went on, whatever it says.
    pub shadow: bool,
}

/// Is told of decisions about requests. Called in the course of the request: what takes long is to be done elsewhere.
pub trait AuditLogger: Send + Sync + 'static {
    /// Takes one event.
    fn log(&self, event: &AuditEvent<'_>);
}

/// Makes audit loggers from their configurations: see [`MeshBuilder::audit_logger`](crate::MeshBuilder::audit_logger).
pub trait AuditLoggerFactory: Send + Sync + 'static {
    /// Makes the logger of a configuration.
    ///
    /// # Errors
    /// Why the configuration is refused: the resource is rejected (NACK), with the path of the field.
    fn create(&self, config: &FilterPayload) -> Result<Arc<dyn AuditLogger>, BoxError>;
}

/// A logger for RBAC rules that are made in code (`AuditLogging::loggers`).
pub fn audit_logger(name: impl Into<Arc<str>>, logger: Arc<dyn AuditLogger>) -> AuditLoggerConfig {
    AuditLoggerConfig::custom(name, Arc::new(Made(logger)))
}

/// What goes through the configuration path.
struct Made(Arc<dyn AuditLogger>);

/// A factory, as the configuration path wants it.
pub(crate) struct Parser<F>(pub(crate) F);

/// Who is told of what.
pub(super) struct Audit {
    filter: Arc<str>,
    on_deny: bool,
    on_allow: bool,
    loggers: Box<[Arc<dyn AuditLogger>]>,
}

/// `StdoutAuditLog`
struct Stdout;

impl Audit {
    pub(super) fn compile(filter: &Arc<str>, config: &AuditLogging) -> Option<Self> {
        let loggers: Box<[_]> = config
            .loggers
            .iter()
            .filter_map(|logger| match logger {
                AuditLoggerConfig::Stdout => Some(Arc::new(Stdout) as Arc<dyn AuditLogger>),
                AuditLoggerConfig::Custom { made, .. } => Some(made.downcast_ref::<Made>()?.0.clone()),
                _ => None,
            })
            .collect();
        let AuditLogging { on_deny, on_allow, .. } = *config;
        (!loggers.is_empty()).then(|| Self { filter: filter.clone(), on_deny, on_allow, loggers })
    }

    pub(super) fn tell(&self, asked: &Asked<'_>, matched_rule: &str, authorized: bool, shadow: bool) {
        if if authorized { !self.on_allow } else { !self.on_deny } {
            return;
        }
        let event = AuditEvent {
            rpc_method: asked.head.path(),
            principal: asked.caller.principal(),
            policy_name: &self.filter,
            matched_rule,
            authorized,
            shadow,
        };
        self.loggers.iter().for_each(|logger| logger.log(&event));
    }
}

impl Stdout {
    /// One line, as gRPC writes it, with `shadow` where it is one.
    fn line(event: &AuditEvent<'_>, now: SystemTime) -> String {
        let mut line = serde_json::json!({"grpc_audit_log": {
            "rpc_method": event.rpc_method,
            "principal": event.principal,
            "policy_name": event.policy_name,
            "matched_rule": event.matched_rule,
            "authorized": event.authorized,
            "timestamp": iso8601(now),
        }});
        if event.shadow {
            line["grpc_audit_log"]["shadow"] = true.into();
        }
        format!("{line}\n")
    }
}

impl AuditLogger for Stdout {
    fn log(&self, event: &AuditEvent<'_>) {
        let line = Self::line(event, SystemTime::now());
        // A standard output that is closed is nobody's who could be told.
        let _ = std::io::stdout().lock().write_all(line.as_bytes());
    }
}

impl<F: AuditLoggerFactory> AuditLoggerParser for Parser<F> {
    fn parse(&self, payload: &FilterPayload) -> Result<Arc<dyn Any + Send + Sync>, String> {
        let made = caught(|| self.0.create(payload));
        match made.unwrap_or_else(|panic| Err(format!("its factory panicked: {panic}").into())) {
            Ok(logger) => Ok(Arc::new(Made(logger))),
            Err(error) => Err(crate::error::chain(&*error)),
        }
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audit").field("loggers", &self.loggers.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_line_is_as_grpc_writes_it() {
        let event = AuditEvent {
            rpc_method: "/pkg.Greeter/SayHello",
            principal: "spiffe://td/ns/a/sa/b",
            policy_name: "authz",
            matched_rule: "admins \"only\"",
            authorized: true,
            shadow: false,
        };
        let line = Stdout::line(&event, SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        assert!(line.ends_with('\n') && !line.trim_end().contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        let log = &value["grpc_audit_log"];
        assert_eq!(log["rpc_method"], "/pkg.Greeter/SayHello");
        assert_eq!(log["matched_rule"], "admins \"only\"");
        assert_eq!((&log["authorized"], &log["timestamp"]), (&true.into(), &"2023-11-14T22:13:20.000Z".into()));
        assert!(log.get("shadow").is_none());
        let shadow = Stdout::line(&AuditEvent { shadow: true, ..event }, SystemTime::UNIX_EPOCH);
        assert!(shadow.contains(r#""shadow":true"#), "{shadow}");
    }
}
