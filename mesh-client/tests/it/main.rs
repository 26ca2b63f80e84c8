//! End to end, through the public API: what callers and backends see.

#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

mod support;

mod access_log;
mod actions;
mod aggregates;
mod balancing;
mod basics;
mod bootstrap;
mod breakers;
mod cancel;
mod connections;
mod connections_layer;
mod control_plane;
mod differential;
mod dns_clusters;
mod docs;
mod explain;
mod failfast;
mod faults;
mod features;
mod filters;
mod filters_headers;
mod filters_limits;
mod filters_overload;
mod filters_service;
mod filters_session;
mod fuzzing;
mod hashing;
mod headers;
mod health_checks;
mod hedging;
mod hostile;
mod layers;
mod localities;
mod matching;
mod mesh_layer;
mod metrics;
mod mirroring;
mod mtls;
mod numbers;
mod outliers;
mod policies;
mod policy;
mod retries;
mod retry_features;
mod rewrites;
mod routing;
mod spans;
mod standing_still;
mod subsets;
mod timeouts;
mod weighted;
mod yaml;
