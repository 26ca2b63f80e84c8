//! The client side of the request path.

pub(crate) mod call;
pub(crate) mod cluster;
pub(crate) mod connect;
#[cfg(test)]
mod contract;
pub(crate) mod filter;
pub(crate) mod identity;
pub(crate) mod narrate;
pub(crate) mod pick;
pub(crate) mod resolve;
pub(crate) mod retry;
pub(crate) mod route;
mod slots;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod timeout;
pub(crate) mod upstream;

pub use route::Profile;
pub(crate) use route::iso8601;
