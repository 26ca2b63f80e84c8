//! The mini control plane of mesh: Istio YAML in, xDS out, with a dev CA, on a laptop or in a test.
//!
//! ```
//! # async fn run() -> Result<(), mesh_control::Error> {
//! let yaml = "
//! apiVersion: networking.istio.io/v1
//! kind: ServiceEntry
//! metadata: {name: greeter}
//! spec:
//!   hosts: [greeter.default.svc.cluster.local]
//!   resolution: STATIC
//!   ports: [{number: 50051, name: grpc, protocol: GRPC}]
//!   endpoints: [{address: 127.0.0.1, ports: {grpc: 6001}}]
//! ";
//! let control_plane = mesh_control::ControlPlane::builder().yaml(yaml).start().await?;
//! println!("GRPC_XDS_BOOTSTRAP_CONFIG='{}'", control_plane.bootstrap());
//! control_plane.shutdown().await;
//! # Ok(())
//! # }
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run()).unwrap();
//! ```
//!
//! The way of the data: [`input`] reads YAML into a [`model`], which is checked as a whole; [`translate`] turns it into xDS
//! resources; [`ControlPlane`] serves them. A set of documents is applied as a whole or not at all.

pub mod bootstrap;
pub mod ca;
pub mod cli;
mod control;
pub mod input;
mod lint;
pub mod model;
pub mod problem;
pub mod translate;
mod watch;

pub use ca::CertificateAuthority;
pub use control::{Builder, ControlPlane, Error, Event, Events};
