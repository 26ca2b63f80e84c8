//! Mesh and real peers, end to end. `interop/run` installs the peers and runs these; without them they are left out.

mod common;
mod istiod;
mod mesh_control;
