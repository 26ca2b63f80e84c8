//! The byte stream under a connection, with its type erased and its activity counted.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a connection runs over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Counts of reads and writes that moved bytes. One writer (whoever polls the connection), any reader.
#[derive(Debug, Default)]
pub(super) struct Activity {
    reads: AtomicU32,
    writes: AtomicU32,
}

impl Activity {
    /// Changes when bytes arrived.
    pub(super) fn reads(&self) -> u32 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Changes when bytes left.
    pub(super) fn writes(&self) -> u32 {
        self.writes.load(Ordering::Acquire)
    }
}

/// A byte stream of any type.
pub(super) struct Io {
    stream: Box<dyn Stream>,
    /// A write that failed may have sent a part before, in records of its own.
    tls: bool,
    activity: Arc<Activity>,
}

impl Io {
    pub(super) fn new(stream: impl Stream, tls: bool, activity: Arc<Activity>) -> Self {
        Self { stream: Box::new(stream), tls, activity }
    }

    fn wrote(&self, result: &Poll<io::Result<usize>>) {
        if matches!(result, Poll::Ready(Ok(1..))) || self.tls && matches!(result, Poll::Ready(Err(_))) {
            let count = self.activity.writes.load(Ordering::Relaxed);
            self.activity.writes.store(count.wrapping_add(1), Ordering::Release);
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() != before {
            let count = self.activity.reads.load(Ordering::Relaxed);
            self.activity.reads.store(count.wrapping_add(1), Ordering::Relaxed);
        }
        result
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
