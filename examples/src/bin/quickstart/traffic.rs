//! Calls, counted.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use examples::greeter::greeter_client::GreeterClient;
use examples::greeter::{HelloReply, HelloRequest};
use mesh_client::MeshChannel;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Request, Status};

/// How calls ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Answers by backend.
    pub(crate) by_backend: BTreeMap<String, u64>,
    /// Answers by the identity that the backend saw.
    pub(crate) by_peer: BTreeMap<String, u64>,
    /// Calls that were answered only after a retry.
    pub(crate) retried: u64,
    pub(crate) failed: u64,
    /// The first failure.
    pub(crate) failure: Option<String>,
}

/// Calls that go on in the background until stopped.
#[derive(Debug)]
pub(crate) struct Traffic {
    tally: Arc<Mutex<Tally>>,
    stop: watch::Sender<bool>,
    callers: JoinSet<()>,
}

/// One call.
pub(crate) async fn call(
    channel: &MeshChannel,
    header: Option<(&'static str, &'static str)>,
) -> Result<HelloReply, Status> {
    let mut request = Request::new(HelloRequest { name: "quickstart".to_owned(), count: 0 });
    if let Some((name, value)) = header {
        request.metadata_mut().insert(name, value.parse().map_err(|_| Status::internal("not a header value"))?);
    }
    GreeterClient::new(channel.clone()).say_hello(request).await.map(tonic::Response::into_inner)
}

/// `calls` calls, `at_once` at a time.
pub(crate) async fn burst(
    channel: &MeshChannel,
    calls: u64,
    at_once: u64,
    header: Option<(&'static str, &'static str)>,
) -> Tally {
    let mut callers = JoinSet::new();
    for caller in 0..at_once {
        let channel = channel.clone();
        let share = calls / at_once + u64::from(caller < calls % at_once);
        callers.spawn(async move {
            let mut tally = Tally::default();
            for _ in 0..share {
                tally.add(call(&channel, header).await);
            }
            tally
        });
    }
    let mut all = Tally::default();
    while let Some(tally) = callers.join_next().await {
        all.merge(tally.unwrap_or_else(|error| Tally {
            failed: 1,
            failure: Some(error.to_string()),
            ..Tally::default()
        }));
    }
    all
}

impl Traffic {
    /// `callers` loops of calls, `pause` apart.
    pub(crate) fn start(channel: &MeshChannel, callers: usize, pause: Option<Duration>) -> Self {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for _ in 0..callers {
            let (channel, tally, stopped) = (channel.clone(), tally.clone(), stopped.clone());
            tasks.spawn(async move {
                while !*stopped.borrow() {
                    let result = call(&channel, None).await;
                    tally.lock().unwrap_or_else(PoisonError::into_inner).add(result);
                    match pause {
                        Some(pause) => tokio::time::sleep(pause).await,
                        None => tokio::task::yield_now().await,
                    }
                }
            });
        }
        Self { tally, stop, callers: tasks }
    }

    /// So far.
    pub(crate) fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// No new calls; those under way end first.
    pub(crate) async fn stop(&mut self) -> Tally {
        let _ = self.stop.send(true);
        while self.callers.join_next().await.is_some() {}
        self.tally()
    }
}

impl Tally {
    fn add(&mut self, result: Result<HelloReply, Status>) {
        match result {
            Ok(reply) => {
                *self.by_backend.entry(reply.backend).or_default() += 1;
                *self.by_peer.entry(reply.peer).or_default() += 1;
                self.retried += u64::from(reply.previous_attempts > 0);
            }
            Err(status) => {
                self.failed += 1;
                self.failure.get_or_insert_with(|| status.to_string());
            }
        }
    }

    fn merge(&mut self, other: Self) {
        for (backend, n) in other.by_backend {
            *self.by_backend.entry(backend).or_default() += n;
        }
        for (peer, n) in other.by_peer {
            *self.by_peer.entry(peer).or_default() += n;
        }
        self.retried += other.retried;
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
    }

    /// Answers.
    pub(crate) fn answered(&self) -> u64 {
        self.by_backend.values().sum()
    }

    /// Answers of one backend.
    pub(crate) fn of(&self, backend: &str) -> u64 {
        self.by_backend.get(backend).copied().unwrap_or(0)
    }

    /// Share of one backend, in percent.
    pub(crate) fn percent(&self, backend: &str) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a few thousand calls")]
        let share = self.of(backend) as f64 / self.answered().max(1) as f64;
        share * 100.0
    }

    /// Rows of a table.
    pub(crate) fn rows(&self) -> Vec<(&str, String)> {
        let mut rows: Vec<_> = (self.by_backend.iter())
            .map(|(backend, n)| (backend.as_str(), format!("{n:>6} calls  {:>5.1} %", self.percent(backend))))
            .collect();
        rows.push((
            "failed",
            format!("{:>6} calls{}", self.failed, self.failure.as_ref().map_or_else(String::new, |f| format!("  {f}"))),
        ));
        rows
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} calls, {} failed", self.answered() + self.failed, self.failed)?;
        for (backend, n) in &self.by_backend {
            write!(f, ", {backend} {n}")?;
        }
        Ok(())
    }
}
