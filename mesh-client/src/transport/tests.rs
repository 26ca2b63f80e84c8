//! Both protocols against real servers, over loopback TCP or an in-memory pipe.

mod frames;
mod http1;
mod http2;
mod lifecycle;
mod server_frames;
mod support;
