//! The identity path through its public API.

#![allow(clippy::unwrap_used, reason = "a failed expectation of a helper is a failed test")]

mod alerts;
mod expiry;
mod files;
mod handshake;
mod incoming;
#[cfg(feature = "grpc")]
mod istio_ca;
mod matrix;
mod presented;
mod providers;
mod refusals;
mod rotation;
mod support;
#[cfg(all(feature = "grpc", unix))]
mod workload;
