//! The end of connections on which somebody else's server speaks.
//!
//! A client of HTTP/2 that has to leave is told so by a GOAWAY that is put between two frames of that server: it opens no further streams, and
//! closes when those that are open have ended. Who does not, or speaks something else, reads the end as soon as nothing is in
//! progress. Requests that come all the same a moment after the GOAWAY are not served, and what is left when the time to drain is over is cut.

use super::ConnectionInfo;
use crate::transport::PREFACE;
use futures::task::AtomicWaker;
use std::{
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{io::AsyncWrite, time::sleep};

/// What counts as silence then.
const SILENCE: Duration = Duration::from_millis(250);

/// GOAWAY with NO_ERROR, and without a last stream: what crosses it is still served (RFC 9113 section 6.8).
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];
const HEAD: usize = 9;
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

const OPEN: u8 = 0;
const LEAVING: u8 = 1;
/// It had its notice.
const LATE: u8 = 2;
/// Nothing more is read.
const OVER: u8 = 3;
const CUT: u8 = 4;

/// How far the end of a connection has come.
#[derive(Default)]
pub(super) struct Farewell {
    phase: AtomicU8,
    /// Who reads.
    reader: AtomicWaker,
    /// Requests in progress that came to the layer, and whether there ever was one.
    serving: AtomicU32,
    served: AtomicBool,
    /// Reads and writes, wrapping.
    moves: AtomicU32,
}

/// A request in progress.
#[derive(Debug)]
pub(super) struct Busy(ConnectionInfo);

impl Farewell {
    /// Returns how far it was.
    fn advance(&self, phase: u8) -> u8 {
        let before = self.phase.fetch_max(phase, Ordering::SeqCst);
        self.reader.wake();
        before
    }

    fn phase(&self) -> u8 {
        self.phase.load(Ordering::SeqCst)
    }

    /// Reads and writes fail from now on.
    pub(super) fn cut(&self) {
        self.advance(CUT);
    }

    /// Changes with everything that is read or written.
    pub(super) fn moves(&self) -> u32 {
        self.moves.load(Ordering::Relaxed)
    }

    /// Nothing is in progress, as far as the layer has seen requests; without it that is not known of connections on which something was said.
    fn is_idle(&self) -> bool {
        let known = self.served.load(Ordering::SeqCst) || self.moves() == 0;
        known && !self.is_serving()
    }

    pub(super) fn is_serving(&self) -> bool {
        self.serving.load(Ordering::SeqCst) > 0
    }
}

impl ConnectionInfo {
    /// Its client is told to leave.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub(super) fn leave(&self) {
        if self.farewell().advance(LEAVING) != OPEN {
            return;
        }
        let connection = self.clone();
        tokio::spawn(async move {
            sleep(connection.limits().drain_notice).await;
            let farewell = connection.farewell();
            farewell.advance(LATE);
            let mut moves = None;
            while farewell.phase() < OVER {
                let before = moves.replace(farewell.moves());
                if before == moves && farewell.is_idle() {
                    farewell.advance(OVER);
                }
                sleep(SILENCE).await;
            }
        });
    }

    /// A request of it begins; `None`: it comes too late.
    pub(super) fn begin(&self) -> Option<Busy> {
        let farewell = self.farewell();
        farewell.serving.fetch_add(1, Ordering::SeqCst);
        let busy = Busy(self.clone());
        if !farewell.served.load(Ordering::Relaxed) {
            farewell.served.store(true, Ordering::SeqCst);
        }
        (farewell.phase() < LATE).then_some(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.farewell().serving.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is known of the bytes of a connection.
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// Bytes of the client's preface that arrived; `None`: it does not speak HTTP/2.
    preface: Preface,
    sent: Sent,
    /// Bytes of GOAWAY that were written.
    goaway: usize,
}

#[derive(Debug)]
enum Preface {
    So(usize),
    /// It speaks something else.
    Not,
}

impl Default for Preface {
    fn default() -> Self {
        Self::So(0)
    }
}

/// Where in the server's frames the last byte was.
#[derive(Debug, Default)]
struct Sent {
    head: [u8; HEAD],
    /// Bytes of it that are known.
    known: usize,
    /// Bytes of the payload that are to come.
    left: usize,
    /// There was a frame, and it does not go on in the next.
    whole: bool,
}

impl Watched {
    /// Its client speaks something else than HTTP/2.
    pub(super) fn not_http2() -> Self {
        Self { preface: Preface::Not, ..Self::default() }
    }

    /// Before a read. Ready: nothing more is read.
    pub(super) fn poll_before_read<IO: AsyncWrite>(
        &mut self,
        farewell: &Farewell,
        mut io: Pin<&mut IO>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        farewell.reader.register(cx.waker());
        match farewell.phase() {
            OPEN => return Poll::Pending,
            CUT => return Poll::Ready(Err(cut())),
            _ => {}
        }
        if self.poll_goaway(io.as_mut(), cx)?.is_ready() && self.goaway > 0 {
            // Goes on with the next write if it cannot leave now.
            let _ = io.poll_flush(cx)?;
        }
        if farewell.phase() == OVER { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Before a write, which waits for what is said here.
    pub(super) fn poll_before_write<IO: AsyncWrite>(
        &mut self,
        farewell: &Farewell,
        io: Pin<&mut IO>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        match farewell.phase() {
            OPEN => Poll::Ready(Ok(())),
            CUT => Poll::Ready(Err(cut())),
            _ => self.poll_goaway(io, cx),
        }
    }

    /// Says goodbye, once, and where a frame can be.
    fn poll_goaway<IO: AsyncWrite>(&mut self, mut io: Pin<&mut IO>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let may_begin = matches!(self.preface, Preface::So(PREFACE_LENGTH)) && self.sent.is_between();
        if self.goaway == 0 && !may_begin {
            return Poll::Ready(Ok(()));
        }
        while self.goaway < GOAWAY.len() {
            match ready!(io.as_mut().poll_write(cx, &GOAWAY[self.goaway..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.goaway += written,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// This was read.
    pub(super) fn read(&mut self, farewell: &Farewell, bytes: &[u8]) {
        farewell.moves.fetch_add(1, Ordering::Relaxed);
        if let Preface::So(known @ ..PREFACE_LENGTH) = self.preface {
            let new = bytes.len().min(PREFACE_LENGTH - known);
            let fits = bytes[..new] == PREFACE[known..known + new];
            self.preface = if fits { Preface::So(known + new) } else { Preface::Not };
        }
    }

    /// So many bytes of this were written.
    pub(super) fn wrote(&mut self, farewell: &Farewell, pieces: &[IoSlice<'_>], mut written: usize) {
        farewell.moves.fetch_add(1, Ordering::Relaxed);
        if let Preface::Not = self.preface {
            return;
        }
        for piece in pieces {
            let some = piece.len().min(written);
            self.sent.take(&piece[..some]);
            written -= some;
        }
    }
}

const PREFACE_LENGTH: usize = PREFACE.len();

impl Sent {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let payload = bytes.len().min(self.left);
            self.left -= payload;
            bytes = &bytes[payload..];
            let head = bytes.len().min(HEAD - self.known);
            self.head[self.known..self.known + head].copy_from_slice(&bytes[..head]);
            self.known += head;
            bytes = &bytes[head..];
            if self.known == HEAD {
                let [a, b, c, kind, flags, ..] = self.head;
                self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                self.known = 0;
                self.whole = !matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) || flags & END_HEADERS != 0;
            }
        }
    }

    /// The next byte begins a frame, which may be any.
    fn is_between(&self) -> bool {
        self.whole && self.known == 0 && self.left == 0
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the time to drain is over")
}

impl fmt::Debug for Farewell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Farewell").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: u8, kind: u8, flags: u8) -> Vec<u8> {
        [vec![0, 0, length, kind, flags, 0, 0, 0, 1], vec![0xff; usize::from(length)]].concat()
    }

    #[test]
    fn a_frame_of_ours_has_its_place_between_two_of_the_server() {
        let all =
            [frame(0, 4, 0), frame(12, HEADERS, 0), frame(3, CONTINUATION, END_HEADERS), frame(200, 0, 1)].concat();
        let places = |piece: usize| -> Vec<usize> {
            let mut sent = Sent::default();
            let mut at = 0;
            let ends = all.chunks(piece).map(|bytes| {
                sent.take(bytes);
                at += bytes.len();
                sent.is_between().then_some(at)
            });
            ends.flatten().collect()
        };
        let (settings, block) = (9, 9 + 21 + 12);
        assert_eq!(places(1), [settings, block, all.len()]);
        assert_eq!(places(all.len()), [all.len()]);
        assert_eq!(
            places(3),
            [settings, block, all.len()]
                .iter()
                .copied()
                .filter(|at| at % 3 == 0 || *at == all.len())
                .collect::<Vec<_>>()
        );
        assert!(!Sent::default().is_between(), "SETTINGS come first");
    }
}
