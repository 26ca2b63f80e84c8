//! The decision trail of a request, in words.

use mesh_tls::PeerIdentity;
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Records how one request is served. Put a clone into the request's extensions, make the request, then print it:
///
/// ```
/// let explain = mesh_client::Explain::default();
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(explain.clone());
/// // … client.say_hello(request).await …
/// println!("{explain}");
/// ```
///
/// A request without it pays nothing. Cloning shares the record.
#[derive(Clone, Debug, Default)]
pub struct Explain(Arc<Trail>);

#[derive(Debug, Default)]
struct Trail {
    steps: Mutex<Vec<Step>>,
    /// Who was at the other end, each time it was sent.
    peers: Mutex<Vec<Option<PeerIdentity>>>,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What was decided: `target`, `config`, `listener`, `virtual host`, `skipped`, `route`, `timeout`, `retries`, `hedge`, `mirror`, `filters`,
    /// `rewrite`, `edits`, `cluster`, `leaf`, `subset`, `balancing`, `hash`, `metadata`, `breaker`, `load`, `endpoint`, `transport`,
    /// `outliers`, `checks`, `overload`, `wait`, `connect`, `pick`, `peer`, `attempt`, `trace`, `error`, ….
    pub subject: &'static str,
    /// The decision and its reason.
    pub text: String,
}

/// What [`Mesh::explain`](crate::Mesh::explain) says of a request that is not sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// In the order the decisions are made.
    pub steps: Vec<Step>,
}

impl Explain {
    /// The decisions so far.
    pub fn explanation(&self) -> Explanation {
        Explanation { steps: self.steps().clone() }
    }

    pub(crate) fn extend(&self, steps: impl IntoIterator<Item = Step>) {
        self.steps().extend(steps);
    }

    pub(crate) fn add(&self, subject: &'static str, text: impl Into<String>) {
        self.steps().push(Step { subject, text: text.into() });
    }

    fn steps(&self) -> MutexGuard<'_, Vec<Step>> {
        self.0.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request goes out to this peer; `None`: without TLS.
    pub(crate) fn sent_to(&self, peer: Option<&PeerIdentity>) {
        self.0.peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer.cloned());
    }

    /// Why who answered may be anybody, and not `host`.
    pub(crate) fn unproven(&self, host: &str) -> Option<String> {
        let peers = self.0.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.iter().find_map(|peer| match peer {
            None => Some("the connection is not encrypted: the cluster has no TLS settings".to_owned()),
            Some(peer) if peer.is_named() || peer.is_for(host) => None,
            Some(peer) => Some(format!(
                "the certificate of {peer} is not for {host}, and the cluster's TLS settings name nobody else"
            )),
        })
    }
}

impl Explanation {
    pub(crate) fn of(subject: &'static str, text: impl Into<String>) -> Self {
        Self { steps: vec![Step { subject, text: text.into() }] }
    }

    /// That of a failed request, out of its error: an [`Error`](crate::Error), or whatever has one among its sources, as the
    /// `tonic::Status` of a generated client does.
    ///
    /// ```no_run
    /// # fn of(status: tonic::Status) {
    /// if let Some(trail) = mesh_client::Explanation::of_error(&status) {
    ///     println!("{status}\n{trail}");
    /// }
    /// # }
    /// ```
    pub fn of_error(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        crate::error::trail(error)
    }

    /// The text of the first step about `subject`.
    pub fn get(&self, subject: &str) -> Option<&str> {
        self.steps.iter().find(|s| s.subject == subject).map(|s| s.text.as_str())
    }
}

impl fmt::Display for Explain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.explanation().fmt(f)
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Step { subject, text }) in self.steps.iter().enumerate() {
            write!(f, "{}{subject:<13} {text}", if i > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}
