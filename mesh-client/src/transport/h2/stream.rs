//! One stream: what arrived and was not yet read, and what may be sent.

use super::{fault::Fault, frame};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::Duration,
};
use tokio::time::Instant;

/// Reads whose frames wait to be read, above which small ones are joined: each frame holds on to the whole read that it came with.
const JOIN_AFTER: u32 = 4;
/// What counts as small then.
const SMALL: usize = 8 << 10;
/// To pieces of about this size.
const JOINED: usize = 64 << 10;

/// A stream that the connection and its users share.
///
/// Locked for moments, and never before the [`Outbox`](super::outbox::Outbox) if both are needed.
#[derive(Debug)]
pub(in crate::transport) struct Stream {
    pub(super) id: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    head: Option<(StatusCode, HeaderMap)>,
    has_head: bool,
    data: Option<Bytes>,
    more: VecDeque<Bytes>,
    /// The read that the last of them came with, and how many others the rest came with.
    last_read: u32,
    reads: u32,
    trailers: Option<HeaderMap>,
    /// The peer sends nothing more, or nothing more is taken.
    pub(super) received: bool,
    /// We send nothing more.
    pub(super) sent: bool,
    /// Why it ended, if not well.
    fault: Option<Fault>,
    /// Bytes of data to come, where `content-length` said so.
    length: Option<u64>,
    /// Answers to HEAD have a `content-length` and no data.
    bodiless: bool,
    /// Of a request: nobody reads it any more.
    pub(super) ignored: bool,
    /// Of a request: the head of its answer was sent.
    pub(super) answering: bool,
    /// Bytes the peer may send; what was read and not yet given back to it; half of the window.
    receive_window: i64,
    read: u32,
    give_back: u32,
    /// Bytes we may send.
    pub(super) send_window: i64,
    /// It waits for the connection, and is in the list of those.
    pub(super) waiting: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// What the client of a request owes.
    pub(super) dues: Dues,
}

/// What a client is to do, so that its request goes on.
#[derive(Debug, Default)]
pub(super) struct Dues {
    /// Data waits until it has read more.
    pub(super) blocked: bool,
    /// The answer is gRPC's: a client that has something to say may say it later.
    pub(super) grpc: bool,
    /// Pieces of data both ways, wrapping.
    pub(super) moves: u32,
    /// Those when it was looked at, and since when something is owed.
    moved: u32,
    since: Option<Instant>,
    /// It is over: whoever serves the request has to end it.
    overdue: bool,
}

/// How a stream is that a server sends on.
pub(super) enum Standing {
    Open,
    /// We sent all, or nobody wants it.
    Sent,
    /// Its client does not go on.
    Overdue,
}

/// What comes after the response head.
#[derive(Debug)]
pub(in crate::transport) enum Part {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// Something the peer may not do on a stream.
pub(super) type Breach = (h2::Reason, &'static str);

impl Stream {
    /// A stream just opened.
    pub(super) fn new(id: u32, send_window: i64, receive_window: u32, bodiless: bool) -> Self {
        Self {
            id,
            state: Mutex::new(State {
                head: None,
                has_head: false,
                data: None,
                more: VecDeque::new(),
                last_read: 0,
                reads: 0,
                trailers: None,
                received: false,
                sent: false,
                fault: None,
                length: None,
                bodiless,
                ignored: false,
                answering: false,
                receive_window: i64::from(receive_window),
                read: 0,
                give_back: receive_window / 2,
                send_window,
                waiting: false,
                reader: None,
                writer: None,
                dues: Dues::default(),
            }),
        }
    }

    /// A stream that a client opened with a request. `ended`: it has no body; else one of `length` bytes, if that is known.
    pub(super) fn of_request(id: u32, send_window: i64, receive_window: u32, length: Option<u64>, ended: bool) -> Self {
        let mut stream = Self::new(id, send_window, receive_window, false);
        let state = stream.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.has_head = true;
        state.received = ended;
        state.length = length;
        stream
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The head of the answer to a request was sent.
    pub(super) fn is_answering(&self) -> bool {
        self.lock().answering
    }

    /// All of the response was received and taken, and it ended well.
    pub(in crate::transport) fn is_read(&self) -> bool {
        self.lock().is_read()
    }
}

impl State {
    /// Of the response, nothing is left to be read.
    fn is_read(&self) -> bool {
        self.received && self.fault.is_none() && self.head.is_none() && self.data.is_none() && self.trailers.is_none()
    }

    /// Both sides are done with it.
    pub(super) fn is_closed(&self) -> bool {
        self.received && self.sent
    }

    /// The response head, once; whether nothing follows it.
    pub(super) fn poll_head(&mut self, waker: &Waker) -> Poll<Result<(StatusCode, HeaderMap, bool), Fault>> {
        if let Some((status, headers)) = self.head.take() {
            return Poll::Ready(Ok((status, headers, self.is_read())));
        }
        self.ended_or_wait(waker).map(|ended| Err(ended.unwrap_or(Fault::Eof)))
    }

    /// What follows. Ready with `None` at the end.
    pub(super) fn poll_part(&mut self, waker: &Waker) -> Poll<Option<Result<Part, Fault>>> {
        if let Some(data) = self.data.take() {
            self.data = self.more.pop_front();
            return Poll::Ready(Some(Ok(Part::Data(data))));
        }
        if let Some(trailers) = self.trailers.take() {
            return Poll::Ready(Some(Ok(Part::Trailers(trailers))));
        }
        self.ended_or_wait(waker).map(|fault| fault.map(Err))
    }

    fn ended_or_wait(&mut self, waker: &Waker) -> Poll<Option<Fault>> {
        if self.received {
            return Poll::Ready(self.fault.clone());
        }
        keep(&mut self.reader, waker);
        Poll::Pending
    }

    /// So much was read. Returns what the peer is to be told that it may send.
    pub(super) fn took(&mut self, bytes: usize) -> Option<u32> {
        if self.received {
            return None;
        }
        // At most a window.
        self.read += u32::try_from(bytes).unwrap_or(0);
        (self.read >= self.give_back).then(|| {
            self.receive_window += i64::from(self.read);
            std::mem::take(&mut self.read)
        })
    }

    /// Registers whoever sends: woken when there may be room, and when the stream is closed.
    pub(super) fn wait_to_send(&mut self, waker: &Waker) {
        keep(&mut self.writer, waker);
    }

    pub(super) fn take_writer(&mut self) -> Option<Waker> {
        self.writer.take()
    }

    /// Header fields arrived. True: whoever reads should look.
    pub(super) fn on_headers(
        &mut self,
        status: Option<StatusCode>,
        fields: HeaderMap,
        length: Option<u64>,
        end: bool,
    ) -> Result<bool, Breach> {
        const BAD: h2::Reason = h2::Reason::PROTOCOL_ERROR;
        if self.received {
            return Err((h2::Reason::STREAM_CLOSED, "headers behind the end of a response"));
        }
        match status {
            Some(status) if !self.has_head => {
                if status.is_informational() {
                    return match end || status == StatusCode::SWITCHING_PROTOCOLS {
                        true => Err((BAD, "interim response that is none")),
                        false => Ok(false),
                    };
                }
                let empty = self.bodiless || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
                self.length = length.filter(|_| !empty);
                self.has_head = true;
                self.head = Some((status, fields));
            }
            None if self.has_head => {
                if !end {
                    return Err((BAD, "trailers that do not end the response"));
                }
                self.trailers = Some(fields);
            }
            Some(_) => return Err((BAD, "a status in trailers")),
            None => return Err((BAD, "a response without a status")),
        }
        if end {
            self.on_end()?;
        }
        Ok(true)
    }

    /// DATA of so many bytes with its padding, from the read of this number.
    pub(super) fn on_data(&mut self, data: Bytes, whole: u32, end: bool, read: u32) -> Result<(), Breach> {
        if !self.has_head {
            return Err((h2::Reason::PROTOCOL_ERROR, "data before the response headers"));
        }
        if self.received {
            return Err((h2::Reason::STREAM_CLOSED, "data behind the end of a response"));
        }
        self.receive_window -= i64::from(whole);
        if self.receive_window < 0 {
            return Err((h2::Reason::FLOW_CONTROL_ERROR, "more data than the window of the stream"));
        }
        if let Some(length) = &mut self.length {
            *length = length.checked_sub(data.len() as u64).filter(|rest| !end || *rest == 0).ok_or(LENGTH)?;
        }
        if !data.is_empty() && !self.ignored {
            self.dues.moves = self.dues.moves.wrapping_add(1);
            self.push(data, read);
        }
        if end { self.on_end() } else { Ok(()) }
    }

    fn push(&mut self, data: Bytes, read: u32) {
        let first = std::mem::replace(&mut self.last_read, read) != read;
        if self.data.is_none() {
            self.reads = 0;
            self.data = Some(data);
            return;
        }
        self.reads += u32::from(first);
        if self.reads < JOIN_AFTER || data.len() > SMALL {
            self.more.push_back(data);
            return;
        }
        let mut joined = match self.more.pop_back().map(Bytes::try_into_mut) {
            Some(Ok(last)) if last.len() < JOINED => last,
            Some(last) => {
                self.more.push_back(last.map_or_else(|shared| shared, BytesMut::freeze));
                BytesMut::with_capacity(SMALL)
            }
            None => BytesMut::with_capacity(data.len().max(SMALL / 8)),
        };
        joined.extend_from_slice(&data);
        self.more.push_back(joined.freeze());
    }

    fn on_end(&mut self) -> Result<(), Breach> {
        if self.length.is_some_and(|length| length != 0) {
            return Err(LENGTH);
        }
        self.received = true;
        Ok(())
    }

    /// The peer may be sent more.
    pub(super) fn on_window(&mut self, more: i64) -> Result<(), Breach> {
        self.send_window += more;
        if self.send_window > i64::from(frame::MAX) {
            return Err((h2::Reason::FLOW_CONTROL_ERROR, "window of more than 2^31-1"));
        }
        Ok(())
    }

    /// Of a request: whether its client has owed something for so long, as far as looking at it now and then shows. Who is to end it then.
    ///
    /// Owed is a body that the handler waits for, unless it is a gRPC stream that was answered; and that the answer is read.
    pub(super) fn end_overdue(&mut self, limit: Duration, now: Instant) -> Option<Waker> {
        let talk = self.answering && self.dues.grpc;
        let body = !self.received && !self.ignored && !talk && self.reader.is_some();
        let dues = &mut self.dues;
        let owed = !self.sent && (body || dues.blocked);
        let moved = std::mem::replace(&mut dues.moved, dues.moves) != dues.moves;
        dues.since = owed.then(|| dues.since.filter(|_| !moved).unwrap_or(now));
        dues.overdue = dues.since.is_some_and(|since| now - since >= limit);
        if dues.overdue { self.writer.take() } else { None }
    }

    /// How it stands; registers whoever serves the request, who is woken when that changes.
    pub(super) fn poll_standing(&mut self, waker: &Waker) -> Standing {
        if self.sent {
            return Standing::Sent;
        }
        if std::mem::take(&mut self.dues.overdue) {
            return Standing::Overdue;
        }
        self.wait_to_send(waker);
        Standing::Open
    }

    /// Ends both directions. What arrived before can still be read; a response that is complete stays so.
    pub(super) fn fail(&mut self, fault: Fault) {
        if !self.received {
            self.fault = Some(fault);
        }
        self.received = true;
        self.sent = true;
    }

    /// Throws away what was not read. Returns how many bytes of data that was.
    pub(super) fn discard(&mut self) -> usize {
        self.head = None;
        self.trailers = None;
        let first = self.data.take().map_or(0, |data| data.len());
        first + self.more.drain(..).map(|data| data.len()).sum::<usize>()
    }

    pub(super) fn take_reader(&mut self) -> Option<Waker> {
        self.reader.take()
    }
}

const LENGTH: Breach = (h2::Reason::PROTOCOL_ERROR, "data of another length than content-length");

fn keep(slot: &mut Option<Waker>, waker: &Waker) {
    match slot {
        Some(kept) => kept.clone_from(waker),
        None => *slot = Some(waker.clone()),
    }
}
