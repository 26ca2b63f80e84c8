//! The client side of the request path.

pub(crate) mod connect;
