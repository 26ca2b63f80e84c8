//! Mesh and real peers, end to end. `interop/run` installs the peers and runs these; without them they are left out.

#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

mod common;
mod http2;
mod identity;
mod istio_authority;
mod istio_identity;
mod istiod;
mod mesh_control;
mod mtls;
mod ring;
mod served;
