//! Reading the body of a request before it is served (Envoy's `buffer` filter), whatever server's body it is.

use crate::{BoxError, outbound::filter::Buffered, transport::RequestBody};
use bytes::Bytes;
use http::HeaderMap;
use http_body::Body;
use std::{any::Any, pin::Pin};

/// A body that is being read; `None`: it is too large.
pub(super) type Reading<B> = Pin<Box<dyn Future<Output = Result<Option<B>, BoxError>> + Send>>;

/// Reads at most `limit` bytes. A body that nobody here can make again comes back as it was: only what it announces can be looked at.
pub(super) fn read<B: Send + 'static>(body: B, headers: &HeaderMap, limit: u64) -> Result<Reading<B>, B> {
    let body = match cast::<B, RequestBody>(body) {
        Ok(body) => return Ok(reading(body, headers, limit, RequestBody::whole)),
        Err(body) => body,
    };
    cast::<B, tonic::body::Body>(body).map(|body| reading(body, headers, limit, tonic::body::Body::new))
}

fn reading<A, B>(body: A, headers: &HeaderMap, limit: u64, make: fn(Buffered) -> A) -> Reading<B>
where
    A: Body<Data = Bytes> + Send + Unpin + 'static,
    A::Error: Into<BoxError>,
    B: Send + 'static,
{
    let headers = headers.clone();
    Box::pin(async move {
        let whole = Buffered::read(body, &headers, limit).await?;
        // It is the same type.
        Ok(whole.and_then(|whole| cast::<A, B>(make(whole)).ok()))
    })
}

/// The value, if it is of this type.
fn cast<A: 'static, B: 'static>(value: A) -> Result<B, A> {
    let mut slot = Some(value);
    let taken = (&mut slot as &mut dyn Any).downcast_mut::<Option<B>>().and_then(Option::take);
    match (taken, slot) {
        (Some(taken), _) => Ok(taken),
        (None, Some(value)) => Err(value),
        (None, None) => unreachable!("what is not taken is there"),
    }
}
