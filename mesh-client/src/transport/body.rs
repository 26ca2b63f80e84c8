//! The response body of both protocols.

use super::TransportError;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll},
};

/// The body of a response. It is the flow control: what is not read is not sent, once the window is full.
///
/// Dropped before its end it resets the stream (HTTP/1.1: closes the connection).
#[derive(Debug)]
pub struct RecvBody;

impl Body for RecvBody {
    type Data = Bytes;
    type Error = TransportError;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, TransportError>>> {
        unimplemented!()
    }

    fn is_end_stream(&self) -> bool {
        unimplemented!()
    }

    fn size_hint(&self) -> SizeHint {
        unimplemented!()
    }
}
