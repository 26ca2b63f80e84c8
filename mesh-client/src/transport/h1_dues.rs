//! What the client of a connection of HTTP/1.1 is to do, so that its request goes on.

use super::overdue::LOOKS;
use futures::task::AtomicWaker;
use pin_project::pin_project;
use std::{
    future, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep},
};

/// Of one connection: it has one request at a time.
#[derive(Debug, Default)]
pub(super) struct Dues {
    /// Reads and writes, wrapping.
    moves: AtomicU32,
    /// What is written waits until the client has read more.
    blocked: AtomicBool,
    /// A handler waits for the body.
    awaits_body: AtomicBool,
    answering: AtomicBool,
    /// The body did not come in time.
    late: AtomicBool,
    handler: AtomicWaker,
}

/// A byte stream that is watched.
#[pin_project]
pub(super) struct Watched<IO> {
    #[pin]
    io: IO,
    dues: Arc<Dues>,
}

impl Dues {
    pub(super) fn awaits_body(&self, awaits: bool) {
        self.awaits_body.store(awaits, Relaxed);
    }

    /// A request began, or its answer.
    pub(super) fn answers(&self, answering: bool) {
        self.answering.store(answering, Relaxed);
        // What was late of the request before is no matter of this one.
        self.late.store(false, Relaxed);
    }

    /// Whether the body that the handler waits for did not come, once; it is woken when that is so.
    pub(super) fn is_late(&self, cx: &Context<'_>) -> bool {
        self.handler.register(cx.waker());
        self.late.swap(false, Relaxed)
    }

    fn moved(&self) {
        self.moves.fetch_add(1, Relaxed);
    }

    /// Ready when the client has owed something for so long, and there is an answer already; else the handler is told.
    pub(super) async fn overdue(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return future::pending().await };
        let (mut moves, mut since) = (0, None);
        loop {
            sleep(limit / LOOKS).await;
            let (blocked, awaits_body) = (self.blocked.load(Relaxed), self.awaits_body.load(Relaxed));
            let (now, moved) = (Instant::now(), self.moves.load(Relaxed));
            let still = std::mem::replace(&mut moves, moved) == moved;
            let before = since.filter(|_| still);
            since = (blocked || awaits_body).then(|| before.unwrap_or(now));
            if since.is_none_or(|since| now - since < limit) {
                continue;
            }
            if blocked || self.answering.load(Relaxed) {
                return;
            }
            self.late.store(true, Relaxed);
            self.handler.wake();
        }
    }
}

impl<IO> Watched<IO> {
    pub(super) fn new(io: IO, dues: Arc<Dues>) -> Self {
        Self { io, dues }
    }
}

impl<IO: AsyncRead> AsyncRead for Watched<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        ready!(this.io.poll_read(cx, buf))?;
        this.dues.moved();
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite> AsyncWrite for Watched<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.project();
        let written = this.io.poll_write(cx, buf);
        this.dues.wrote(&written);
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        let written = this.io.poll_write_vectored(cx, bufs);
        this.dues.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        let flushed = this.io.poll_flush(cx);
        this.dues.blocked.store(flushed.is_pending(), Relaxed);
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }
}

impl Dues {
    fn wrote(&self, written: &Poll<io::Result<usize>>) {
        self.blocked.store(written.is_pending(), Relaxed);
        if written.is_ready() {
            self.moved();
        }
    }
}
