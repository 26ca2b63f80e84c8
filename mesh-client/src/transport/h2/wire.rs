//! The connection itself: reads, writes, and nothing else. Polled by one at a time.

use super::{fault::Fault, frame, outbox::Link, queue::Queue, reader::Reader};
use crate::transport::io::Io;
use bytes::BytesMut;
use std::{
    io::IoSlice,
    pin::{Pin, pin},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite},
    time::Instant,
};

/// Bytes that are asked for at once, at first; and at most, while there is more each time.
const READ: usize = 2 << 10;
const READ_MOST: usize = 64 << 10;
/// An idle connection keeps a buffer of no more.
const READ_KEEP: usize = 8 << 10;
/// Reads in a row, before others have their turn.
const READS: usize = 32;
/// Bytes of answers that may wait for the socket; before there is room for more, nothing is read.
const MAX_ANSWERS: usize = 16 << 10;
/// Bytes for a client that may wait for the socket, before nothing more is read of it. What windows hold back does not come near.
const MAX_UNREAD: usize = 1 << 20;
/// Slices of one write.
const SLICES: usize = 32;

/// A connection's byte stream with what is read and written.
pub(super) struct Wire {
    io: Io,
    input: BytesMut,
    /// Something is in it that the reader was not given.
    unseen: bool,
    /// How much to ask for.
    ask: usize,
    reader: Reader,
    /// What the outbox gave and is not written yet.
    out: Queue,
    /// A server has written all that it ever will.
    shut: bool,
}

impl Wire {
    pub(super) fn new(io: Io, reader: Reader) -> Self {
        Self { io, input: BytesMut::new(), ask: READ, reader, out: Queue::default(), unseen: false, shut: false }
    }

    /// Behind what was read already.
    pub(super) fn after(mut self, input: BytesMut) -> Self {
        self.unseen = !input.is_empty();
        self.input = input;
        self
    }

    /// All is written, and the client knows.
    pub(super) fn is_shut(&self) -> bool {
        self.shut
    }

    /// Ends requests whose clients have owed something for so long.
    pub(super) fn end_overdue(&self, limit: Duration, now: Instant) {
        self.reader.end_overdue(limit, now);
    }

    /// No more streams of the peer's are taken; which was the last.
    pub(super) fn stop(&mut self) -> u32 {
        self.reader.stop()
    }

    /// The peer's SETTINGS arrived.
    pub(super) fn is_settled(&self) -> bool {
        self.reader.is_settled()
    }

    /// Reads and writes what can be. Ready when the connection is over; [`fail`](Self::fail) then tells the streams why.
    pub(super) fn poll(&mut self, link: &Link, cx: &mut Context<'_>) -> Poll<Fault> {
        self.poll_with(link, cx, |_, _| {})
    }

    /// The same, with something to do between reading and writing.
    pub(super) fn poll_with(
        &mut self,
        link: &Link,
        cx: &mut Context<'_>,
        mut between: impl FnMut(&mut Reader, &mut Context<'_>),
    ) -> Poll<Fault> {
        let mut reads = 0;
        loop {
            let read = self.read(link, &mut reads, cx);
            between(&mut self.reader, cx);
            let halted = match read {
                Ok(halted) => halted,
                Err(fault) => {
                    self.say_why(link, &fault, cx);
                    return Poll::Ready(fault);
                }
            };
            match ready!(self.write(link, cx)) {
                Err(fault) => return Poll::Ready(fault),
                Ok(true) => return Poll::Ready(Fault::Closed),
                Ok(false) => self.reader.answers = 0,
            }
            if !halted {
                break;
            }
        }
        if self.reader.is_idle() {
            self.out.shrink();
            if self.ask > READ_KEEP && self.input.is_empty() {
                self.input = BytesMut::new();
                self.ask = READ;
                self.reader.reads(READ);
            }
        }
        Poll::Pending
    }

    /// True: there may be more, when the answers are written.
    fn read(&mut self, link: &Link, reads: &mut usize, cx: &mut Context<'_>) -> Result<bool, Fault> {
        if std::mem::take(&mut self.unseen) {
            self.reader.read(&mut self.input, link)?;
        }
        while *reads < READS {
            *reads += 1;
            if !self.shut && (self.reader.answers > MAX_ANSWERS || self.is_behind(link)) {
                return Ok(true);
            }
            if self.input.capacity() - self.input.len() < self.ask / 2 {
                self.input.reserve(self.ask);
            }
            let room = self.input.capacity() - self.input.len();
            let read = match pin!(self.io.read_buf(&mut self.input)).poll(cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(read) => read?,
            };
            if read == 0 {
                return Err(Fault::Eof);
            }
            if read == room {
                self.ask = (self.ask * 2).min(READ_MOST);
                self.reader.reads(self.ask);
            }
            if self.shut {
                self.input.clear();
                continue;
            }
            self.reader.read(&mut self.input, link)?;
        }
        cx.waker().wake_by_ref();
        Ok(false)
    }

    /// A client that does not read what it was answered is not asked for more.
    fn is_behind(&self, link: &Link) -> bool {
        self.reader.is_server() && !self.out.is_empty() && self.out.len() + link.lock().queue.len() > MAX_UNREAD
    }

    /// Ready when nothing is left to write. True: nor ever will be.
    fn write(&mut self, link: &Link, cx: &mut Context<'_>) -> Poll<Result<bool, Fault>> {
        if self.shut {
            // Its end is read, or waited for no longer.
            return Poll::Pending;
        }
        loop {
            while !self.out.is_empty() {
                let io = Pin::new(&mut self.io);
                let written = match self.out.single() {
                    Some(bytes) => ready!(io.poll_write(cx, bytes)),
                    None => {
                        let mut slices = [IoSlice::new(&[]); SLICES];
                        let filled = self.out.slices(&mut slices);
                        ready!(io.poll_write_vectored(cx, &slices[..filled]))
                    }
                };
                match written {
                    Ok(0) => return Poll::Ready(Err(Fault::Eof)),
                    Ok(written) => self.out.advance(written),
                    Err(error) => return Poll::Ready(Err(error.into())),
                }
            }
            let mut guard = link.lock();
            let outbox = &mut *guard;
            if let Some(more) = link.give_back(self.reader.window()) {
                self.reader.widen(more);
                frame::window_update(&mut outbox.queue.buf, 0, more);
            }
            self.reader.keep_up(&mut outbox.opened, &mut outbox.closed);
            if outbox.queue.is_empty() {
                outbox.rest();
                if self.reader.is_idle() {
                    outbox.queue.shrink();
                }
                let leaving = outbox.leaving;
                // Those who waited for room in the queue, not for the window: there is room now.
                let wakers = outbox.on_room(0)?;
                drop(guard);
                wakers.into_iter().for_each(Waker::wake);
                return self.written(leaving, cx);
            }
            std::mem::swap(&mut self.out, &mut outbox.queue);
        }
    }

    fn written(&mut self, leaving: bool, cx: &mut Context<'_>) -> Poll<Result<bool, Fault>> {
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        if leaving {
            // A peer that is gone already is fine too.
            let closed = ready!(Pin::new(&mut self.io).poll_shutdown(cx)).is_err();
            if self.reader.is_server() && !closed {
                // Closed with something unread, a socket throws away what the client has not read.
                self.shut = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(leaving))
    }

    /// A GOAWAY with the reason, if it can be written at once.
    fn say_why(&mut self, link: &Link, fault: &Fault, cx: &mut Context<'_>) {
        if let Fault::Broken(reason, what) = fault {
            tracing::debug!(%reason, what, "peer broke the protocol");
            frame::goaway(&mut link.lock().queue.buf, self.reader.last(), *reason);
            let _ = self.write(link, cx);
        }
    }

    /// Ends all streams.
    pub(super) fn fail(&mut self, link: &Link, fault: &Fault) {
        let unseen = link.end(fault);
        self.reader.fail(fault, unseen);
    }
}
