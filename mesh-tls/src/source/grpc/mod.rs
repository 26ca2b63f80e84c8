//! Sources that ask others over gRPC for certificates, and go on asking.

mod endpoint;
mod istio_ca;
mod workload;

pub use endpoint::{EndpointError, WorkloadEndpoint};
pub use istio_ca::{CaAuth, CaTls, IstioCaConfig, IstioCaSource};
pub use workload::{JwtToken, SvidChoice, WorkloadApiConfig, WorkloadApiSource};

use std::{error::Error, fmt, io, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{Code, Status, transport::Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A byte stream below HTTP/2.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type BoxedIo = Box<dyn Io>;

/// Waits between attempts: from one second on, doubled up to half a minute, each up to a fifth shorter or longer.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_secs(1);
    const LAST: Duration = Duration::from_secs(30);

    fn reset(&mut self) {
        self.failures = 0;
    }

    /// The next wait; `random` is from 0 to 1.
    fn next(&mut self, random: f64) -> Duration {
        let wait = Self::FIRST.saturating_mul(1 << self.failures.min(5)).min(Self::LAST);
        self.failures = self.failures.saturating_add(1);
        wait.mul_f64(0.8 + 0.4 * random)
    }
}

/// HTTP/2 to one server, whose death is noticed: on another machine by `pings`. The system says when a process on this machine ends,
/// and agents built on grpc-go send away who pings more often than every 5 min. The address only shows in `:authority`; where the
/// connection goes is the connector's.
fn endpoint(pings: bool) -> Endpoint {
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT_TIMEOUT);
    if !pings {
        return endpoint;
    }
    endpoint
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// Opens the connections of a channel with `connect`.
async fn channel<F>(connect: impl Fn() -> F + Send + 'static, pings: bool) -> Result<tonic::transport::Channel, String>
where
    F: Future<Output = io::Result<BoxedIo>> + Send + 'static,
{
    let connector = tower::service_fn(move |_| {
        let opening = connect();
        async move { opening.await.map(hyper_util::rt::TokioIo::new) }
    });
    endpoint(pings).connect_with_connector(connector).await.map_err(|error| causes(&error))
}

/// The last of an error's sources: those above say that a transport failed.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    // an io::Error's own source() skips what it wraps
    match last.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => inner.to_string(),
        None => last.to_string(),
    }
}

/// What a server's status comes to.
fn reason(server: &(impl fmt::Display + ?Sized), status: &Status) -> String {
    match status.code() {
        Code::Unavailable => format!("{server} was lost: {}", causes(status)),
        code => format!("{server}: it answered {code:?}: {}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_half_a_minute_and_start_again() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..7).map(|_| backoff.next(0.5).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
        backoff.reset();
        assert_eq!(backoff.next(0.0), Duration::from_millis(800));
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_millis(1200));
    }
}
