//! Measures mesh beside its peers: one echo server, one load generator, one way to count, for every client.
//!
//! The programs are `sidebyside` (throughput, latency, CPU and allocations of whole calls), `streams` (messages and bodies in a row),
//! `inbound` (servers, and whole pairs of clients and servers), `churn` (latency while endpoints come and go), `pick` (the load balancing decision alone, and what its tables take to build),
//! `routes` (the route lookup alone), `apply` (configuration changes at ten thousand endpoints), `memory` (of idle channels and
//! endpoints), `hostile` (what clients that mean harm cost a server). `cargo bench` counts the instructions of the pure parts, under valgrind.

pub mod alloc;
pub mod apply;
pub mod client;
pub mod envoy;
pub mod histogram;
pub mod hostile;
pub mod inbound;
pub mod load;
pub mod process;
pub mod report;
pub mod resource;
pub mod server;
pub mod suite;
pub mod worker;
pub mod xds;
