//! Measures mesh beside its peers: one echo server, one load generator, one way to count, for every client.
//!
//! The programs are `sidebyside` (throughput, latency, CPU and allocations of whole calls), `pick` (the load
//! balancing decision alone), `routes` (the route lookup alone) and `apply` (configuration changes at ten thousand
//! endpoints).

pub mod alloc;
pub mod apply;
pub mod client;
pub mod envoy;
pub mod histogram;
pub mod load;
pub mod process;
pub mod report;
pub mod resource;
pub mod server;
pub mod suite;
pub mod worker;
pub mod xds;
