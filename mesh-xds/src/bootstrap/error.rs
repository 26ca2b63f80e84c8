//! Errors of the bootstrap: each names its source and the field.

use super::{ENV_CONFIG, ENV_FILE};
use std::{fmt, path::PathBuf};

/// Where a bootstrap came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file named by `GRPC_XDS_BOOTSTRAP`.
    EnvFile(PathBuf),
    /// The JSON in `GRPC_XDS_BOOTSTRAP_CONFIG`.
    EnvConfig,
    /// A file named by the application.
    File(PathBuf),
    /// JSON given by the application.
    Json,
    /// Built in code.
    Builder,
}

/// Why there is no usable bootstrap, or a name cannot be made from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// Neither environment variable is set.
    #[error("no xDS bootstrap: set {ENV_FILE} to the path of a bootstrap file, or {ENV_CONFIG} to its JSON")]
    Missing,
    /// There is nothing in it.
    #[error("{origin} is empty: expected a JSON object with `xds_servers`")]
    Empty {
        /// Where it came from.
        origin: Source,
    },
    /// The file cannot be read.
    #[error("{origin} cannot be read: {source}")]
    Read {
        /// Where it came from.
        origin: Source,
        /// Why.
        source: std::io::Error,
    },
    /// It is not JSON.
    #[error("{origin} is not valid JSON: {source}")]
    Syntax {
        /// Where it came from.
        origin: Source,
        /// Line and column.
        source: serde_json::Error,
    },
    /// A field is missing or wrong.
    #[error("{origin}: {path}: {reason}")]
    Field {
        /// Where it came from.
        origin: Source,
        /// Path of the field, as in `xds_servers[0].channel_creds`.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A server needs the name of its listener.
    #[error(
        "the bootstrap has no server_listener_resource_name_template: a server needs it to know its listener's name"
    )]
    NoServerTemplate,
    /// A target names an authority the bootstrap does not have.
    #[error("unknown xDS authority \"{authority}\": the bootstrap's `authorities` has [{known}]")]
    UnknownAuthority {
        /// The authority asked for.
        authority: String,
        /// Those that exist.
        known: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnvFile(path) => write!(f, "xDS bootstrap file {} (from {ENV_FILE})", path.display()),
            Self::EnvConfig => write!(f, "xDS bootstrap (from {ENV_CONFIG})"),
            Self::File(path) => write!(f, "xDS bootstrap file {}", path.display()),
            Self::Json => f.write_str("xDS bootstrap JSON"),
            Self::Builder => f.write_str("xDS bootstrap builder"),
        }
    }
}
