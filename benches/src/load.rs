//! The closed loop: `concurrency` tasks, each of which calls again as soon as it has its answer.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::client::Client;
use crate::histogram::Histogram;
use crate::{alloc, process, server};

/// One slice of load.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Load {
    /// Bytes of the message, without the five of its gRPC prefix.
    pub payload: usize,
    /// What is called.
    #[serde(default)]
    pub shape: Shape,
    /// Calls in flight.
    pub concurrency: usize,
    /// Time to warm up, in milliseconds; not measured.
    pub warm_ms: u64,
    /// Time to measure, in milliseconds.
    pub run_ms: u64,
    /// Calls after the measured ones over which allocations are counted; 0 for none.
    pub counted_calls: u64,
}

/// What goes up and what comes down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// The message comes back.
    #[default]
    Echo,
    /// So many messages of so many bytes come down.
    Down {
        /// Frames of data.
        messages: usize,
        /// Bytes of each.
        size: usize,
    },
    /// The message is read, and nothing comes back.
    Up,
    /// An echo whose request is part of a trace.
    Traced,
}

impl Shape {
    /// What asks the server for it.
    #[must_use]
    pub fn header(self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Echo => None,
            Self::Down { messages, size } => {
                let value = HeaderValue::from_str(&format!("{messages}x{size}")).ok()?;
                Some((HeaderName::from_static(server::DOWN_HEADER), value))
            }
            Self::Up => Some((HeaderName::from_static(server::UP_HEADER), HeaderValue::from_static("1"))),
            Self::Traced => Some((
                HeaderName::from_static("traceparent"),
                HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            )),
        }
    }

    /// Bytes that come back for a message of `sent` bytes.
    #[must_use]
    pub fn comes_back(self, sent: usize) -> usize {
        match self {
            Self::Echo | Self::Traced => sent,
            Self::Down { messages, size } => messages * size,
            Self::Up => 0,
        }
    }
}

/// What one slice of load gave.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Measured {
    /// Calls completed.
    pub calls: u64,
    /// Calls per second.
    pub rps: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile of latency in microseconds.
    pub p99_us: f64,
    /// CPU time of the client's process per call, in microseconds.
    pub cpu_us: f64,
    /// Blocks allocated per call; `None` when not counted.
    pub allocations: Option<f64>,
}

/// A gRPC message of `payload` zero bytes, with its prefix.
#[must_use]
pub fn message(payload: usize) -> Bytes {
    let mut frame = BytesMut::with_capacity(payload + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(payload).unwrap_or(u32::MAX));
    frame.resize(payload + 5, 0);
    frame.freeze()
}

/// Runs one slice of load on the current runtime.
///
/// # Errors
/// When a call fails or answers with another length than it was sent, and when the slice takes ten seconds longer than
/// it should.
pub async fn run<C: Client>(client: &C, load: Load) -> Result<Measured> {
    let limit = Duration::from_millis(load.warm_ms + load.run_ms) + Duration::from_secs(10);
    timeout(limit, measure(client, load)).await.with_context(|| format!("the load did not end within {limit:?}"))?
}

async fn measure<C: Client>(client: &C, load: Load) -> Result<Measured> {
    let message = message(load.payload);
    closed_loop(client, &message, load, Until::Time(Duration::from_millis(load.warm_ms))).await?;

    let (start, cpu) = (Instant::now(), process::cpu_time());
    let until = Until::Time(Duration::from_millis(load.run_ms));
    let histogram = closed_loop(client, &message, load, until).await?;
    let (cpu, elapsed) = (process::cpu_time() - cpu, start.elapsed());

    let allocations = if load.counted_calls == 0 {
        None
    } else {
        let each = load.counted_calls.div_ceil(load.concurrency as u64).max(20);
        // What the loop itself allocates (tasks, histograms) is the difference between a long and a short one.
        let short = counted(client, &message, load, each).await?;
        let long = counted(client, &message, load, 2 * each).await?;
        Some(long.saturating_sub(short) as f64 / (each * load.concurrency as u64) as f64)
    };
    let calls = histogram.len();
    if calls == 0 {
        bail!("no call was completed in {} ms", load.run_ms);
    }
    Ok(Measured {
        calls,
        rps: calls as f64 / elapsed.as_secs_f64(),
        p50_us: histogram.percentile(50).as_secs_f64() * 1e6,
        p99_us: histogram.percentile(99).as_secs_f64() * 1e6,
        cpu_us: cpu.as_secs_f64() * 1e6 / calls as f64,
        allocations,
    })
}

async fn counted<C: Client>(client: &C, message: &Bytes, load: Load, each: u64) -> Result<u64> {
    alloc::start();
    let outcome = closed_loop(client, message, load, Until::Calls(each)).await;
    let allocations = alloc::stop();
    outcome.map(|_| allocations)
}

#[derive(Debug, Clone, Copy)]
enum Until {
    Time(Duration),
    Calls(u64),
}

async fn closed_loop<C: Client>(client: &C, message: &Bytes, load: Load, until: Until) -> Result<Histogram> {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    let expected = load.shape.comes_back(message.len());
    for _ in 0..load.concurrency {
        let (mut client, message) = (client.clone(), message.clone());
        tasks.spawn(async move {
            let mut histogram = Histogram::default();
            let mut before = Instant::now();
            loop {
                let received = client.call(message.clone(), load.shape).await?.length;
                if received != expected {
                    bail!("{received} bytes came back, not {expected}");
                }
                let now = Instant::now();
                histogram.record(now - before);
                before = now;
                let done = match until {
                    Until::Time(limit) => now - start >= limit,
                    Until::Calls(calls) => histogram.len() >= calls,
                };
                if done {
                    return Ok(histogram);
                }
            }
        });
    }
    let mut all = Histogram::default();
    while let Some(joined) = tasks.join_next().await {
        all.merge(&joined.context("a load task panicked")??);
    }
    Ok(all)
}
