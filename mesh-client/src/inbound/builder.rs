//! An inbound side from code.

use super::{Chain, Config, Inbound, Limits};
use mesh_tls::{Acceptor, ServerSettings, TlsError, default_provider};
use std::{fmt, io};
use tokio::net::{TcpListener, ToSocketAddrs};

/// Makes an [`Inbound`] from code. Without TLS settings it takes plaintext.
#[derive(Default)]
pub struct InboundBuilder {
    tls: Option<Tls>,
    limits: Limits,
}

enum Tls {
    Settings(ServerSettings),
    Acceptor(Acceptor),
}

/// Why an inbound side cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The address cannot be listened on.
    #[error("cannot listen: {0}")]
    Listen(#[from] io::Error),
    /// The TLS settings cannot be used.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
}

impl InboundBuilder {
    /// Connections are secured so. [`ServerSettings::mode`] says whether plaintext is taken too.
    #[must_use]
    pub fn tls(mut self, settings: ServerSettings) -> Self {
        self.tls = Some(Tls::Settings(settings));
        self
    }

    /// Connections are secured by an acceptor that was made before. Its mode can be changed at any time.
    #[must_use]
    pub fn acceptor(mut self, acceptor: Acceptor) -> Self {
        self.tls = Some(Tls::Acceptor(acceptor));
        self
    }

    /// What clients may cost.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Listens on `address`.
    ///
    /// # Errors
    /// The address is taken or not ours, or the TLS settings cannot be used.
    pub async fn bind(self, address: impl ToSocketAddrs) -> Result<Inbound, BuildError> {
        self.listener(TcpListener::bind(address).await?)
    }

    /// Takes the connections of a listener that exists.
    ///
    /// # Errors
    /// The TLS settings cannot be used.
    pub fn listener(self, listener: TcpListener) -> Result<Inbound, BuildError> {
        let acceptor = match self.tls {
            None => None,
            Some(Tls::Acceptor(acceptor)) => Some(acceptor),
            Some(Tls::Settings(settings)) => Some(Acceptor::new(settings, default_provider())?),
        };
        let config = Config::single(Chain::new("", acceptor, None));
        Ok(Inbound::new(listener, config, self.limits)?)
    }

    /// The same, for a listener of the standard library: inherited, or made with options of its own.
    ///
    /// # Errors
    /// It cannot be used without blocking, or the TLS settings cannot be used.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn std_listener(self, listener: std::net::TcpListener) -> Result<Inbound, BuildError> {
        listener.set_nonblocking(true)?;
        self.listener(TcpListener::from_std(listener)?)
    }
}

impl fmt::Debug for InboundBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InboundBuilder")
            .field("tls", &self.tls.is_some())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
