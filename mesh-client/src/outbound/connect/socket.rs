//! Options of the sockets to endpoints.

use mesh_xds::resource::TcpKeepalive;
use socket2::SockRef;
use std::time::Duration;
use tokio::net::TcpStream;

/// What is set on every socket of a cluster. A system that does not know an option goes without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TcpOptions {
    /// `None`: no probes.
    pub(crate) keepalive: Option<TcpKeepalive>,
    /// How long data may stay unacknowledged before the connection is dead (`TCP_USER_TIMEOUT`, Linux). `None`: the system's.
    pub(crate) user_timeout: Option<Duration>,
}

impl TcpOptions {
    pub(crate) fn apply(&self, tcp: &TcpStream) {
        // Without it small writes wait for the peer's ACK; a failure costs only that.
        let _ = tcp.set_nodelay(true);
        let socket = SockRef::from(tcp);
        if let Some(keepalive) = self.keepalive
            && let Err(error) = socket.set_tcp_keepalive(&parameters(keepalive))
        {
            tracing::debug!(%error, "TCP keepalive cannot be set");
        }
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Some(timeout) = self.user_timeout
            && let Err(error) = socket.set_tcp_user_timeout(Some(timeout))
        {
            tracing::debug!(%error, "the TCP user timeout cannot be set");
        }
    }
}

fn parameters(keepalive: TcpKeepalive) -> socket2::TcpKeepalive {
    let mut parameters = socket2::TcpKeepalive::new();
    if let Some(time) = keepalive.time {
        parameters = parameters.with_time(time);
    }
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "windows"))]
    if let Some(interval) = keepalive.interval {
        parameters = parameters.with_interval(interval);
    }
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "windows"))]
    if let Some(probes) = keepalive.probes {
        parameters = parameters.with_retries(probes);
    }
    parameters
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn options_reach_the_socket() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let second = Duration::from_secs(1);
        let keepalive = TcpKeepalive { probes: Some(7), time: Some(30 * second), interval: Some(5 * second) };
        TcpOptions { keepalive: Some(keepalive), user_timeout: Some(9 * second) }.apply(&tcp);
        let socket = SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap() && tcp.nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), 30 * second);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), 5 * second);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 7);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(9 * second));
    }
}
