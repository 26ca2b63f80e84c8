//! The client side of the request path.

pub(crate) mod cluster;
pub(crate) mod connect;
pub(crate) mod filter;
pub(crate) mod pick;
pub(crate) mod retry;
pub(crate) mod route;
pub(crate) mod timeout;
