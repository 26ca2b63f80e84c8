//! The sending side of a connection, shared by all who send: frames are encoded in place, in the order of the calls.

use super::{
    Alarm,
    fault::Fault,
    frame,
    hpack::{Encoder, names},
    queue::Queue,
    stream::{Part, State, Stream},
};
use crate::transport::{
    ServerConfig,
    head::{is_of_connection, without_user},
};
use bytes::Bytes;
use futures::task::AtomicWaker;
use h2::Reason;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header, response};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::SystemTime,
};

/// Bytes that wait for the socket, above which request bodies wait too.
const FULL: usize = 256 << 10;
/// Bytes that wait for the socket, above which no stream is opened: the peer does not read.
const OVERFULL: usize = 4 * FULL;
/// Streams that wait for the connection's window, below which nobody looks whether they are alive.
const FEW: usize = 64;
/// Bytes of a window that are worth waking one of them for: a client that opens it by single bytes wakes one at a time.
const WORTH: i64 = 1 << 10;
/// Of the counter of requests in progress: those are above these bits, the bytes of their headers below.
const HEADER_BITS: u32 = 40;
/// The largest payload we send, whatever the peer takes: others wait behind it.
const MAX_PAYLOAD: usize = 64 << 10;

/// The peer's SETTINGS did not arrive, or a frame is incomplete: with twice the number of frames that did.
pub(super) const UNSETTLED: u32 = 1;

/// Marks a stream that we reset; numbers of streams have 31 bits.
pub(super) const CUT: u32 = 1 << 31;

/// What the users of a connection and its driver share.
pub(in crate::transport) struct Link {
    outbox: Mutex<Outbox>,
    pub(super) alarm: Arc<Alarm>,
    /// Bytes of data that were read and not yet given back to the connection's window.
    read: AtomicU32,
    /// From this many on they are: half of the window, or what is left of it when others do not read theirs.
    give_back: AtomicU32,
    half_window: u32,
    /// The window of each stream.
    window: u32,
    /// The peer's MAX_CONCURRENT_STREAMS.
    pub(super) limit: AtomicU32,
    /// The peer takes no new streams, and why.
    pub(super) goaway: OnceLock<Reason>,
    /// The last PING of ours that was answered, and who waits for that.
    pongs: AtomicU32,
    ponged: AtomicWaker,
    /// Of a server: requests in progress, whatever became of their streams, and the bytes of their headers.
    serving: AtomicU64,
    /// Header blocks in pieces that began and ended: odd while there is one.
    heads: AtomicU32,
    /// The frame that is incomplete; 0: none.
    partial: AtomicU32,
    /// Of a server: the last stream.
    pub(super) started: AtomicU32,
}

pub(super) struct Outbox {
    pub(super) queue: Queue,
    pub(super) encoder: Encoder,
    next: u32,
    /// Bytes of data that we may send on the connection, and at first on a stream.
    window: i64,
    pub(super) stream_window: i64,
    pub(super) max_payload: usize,
    /// Streams that the reader has not seen yet.
    pub(super) opened: Vec<Arc<Stream>>,
    /// Streams that we ended; with [`CUT`] when the peer had not.
    pub(super) closed: Vec<u32>,
    /// Streams whose data waits for the connection, the first first.
    waiting: VecDeque<Arc<Stream>>,
    /// As many of them are woken as there is a window for: who sends for a client needs not be asked twice. Callers may, so they are woken
    /// all at once.
    by_turns: bool,
    /// Why it takes nothing more.
    ended: Option<Fault>,
    /// GOAWAY was sent: close when all is written.
    pub(super) leaving: bool,
    /// The driver was woken and has not looked since.
    signalled: bool,
    pings: u32,
    /// Frames of answers that were queued, wrapping.
    pub(super) answered: u32,
    date: Date,
}

/// What follows the first chunk of an answer, as far as is known.
pub(super) enum Tail<'a> {
    /// Perhaps more.
    More,
    End,
    Trailers(&'a HeaderMap),
}

/// How much of a chunk was taken.
pub(super) enum Sent {
    All,
    /// The waker is registered.
    Blocked,
    /// The stream is closed, or was never to be sent on.
    Closed,
}

impl Link {
    /// A client's, with the preface and our SETTINGS ready to be written.
    pub(super) fn client(alarm: Arc<Alarm>, window: u32, connection_window: u32, max_header_list_size: u32) -> Self {
        let mut queue = Queue::default();
        queue.buf.extend_from_slice(frame::PREFACE);
        let settings = [(frame::ENABLE_PUSH, 0), (frame::MAX_HEADER_LIST_SIZE, max_header_list_size)];
        Self::new(alarm, queue, &settings, window, connection_window)
    }

    /// A server's.
    pub(super) fn server(alarm: Arc<Alarm>, config: &ServerConfig) -> Self {
        let settings = [
            (frame::MAX_CONCURRENT_STREAMS, config.max_concurrent_streams),
            (frame::MAX_HEADER_LIST_SIZE, config.max_header_list_size),
        ];
        let mut link = Self::new(alarm, Queue::default(), &settings, config.stream_window, config.connection_window);
        link.outbox.get_mut().unwrap_or_else(PoisonError::into_inner).by_turns = true;
        link
    }

    fn new(
        alarm: Arc<Alarm>,
        mut queue: Queue,
        settings: &[(u16, u32); 2],
        window: u32,
        connection_window: u32,
    ) -> Self {
        let window = window.min(frame::MAX);
        let [first, second] = *settings;
        frame::settings(&mut queue.buf, &[first, (frame::INITIAL_WINDOW_SIZE, window), second]);
        let connection_window = connection_window.clamp(frame::WINDOW, frame::MAX);
        if connection_window > frame::WINDOW {
            frame::window_update(&mut queue.buf, 0, connection_window - frame::WINDOW);
        }
        Self {
            outbox: Mutex::new(Outbox {
                queue,
                encoder: Encoder::default(),
                next: 1,
                window: i64::from(frame::WINDOW),
                stream_window: i64::from(frame::WINDOW),
                max_payload: frame::MAX_PAYLOAD,
                opened: Vec::new(),
                closed: Vec::new(),
                waiting: VecDeque::new(),
                by_turns: false,
                ended: None,
                leaving: false,
                signalled: false,
                pings: 0,
                answered: 0,
                date: Date::default(),
            }),
            alarm,
            read: AtomicU32::new(0),
            give_back: AtomicU32::new(connection_window / 2),
            half_window: connection_window / 2,
            window,
            limit: AtomicU32::new(u32::MAX),
            goaway: OnceLock::new(),
            pongs: AtomicU32::new(0),
            ponged: AtomicWaker::new(),
            serving: AtomicU64::new(0),
            heads: AtomicU32::new(0),
            partial: AtomicU32::new(UNSETTLED),
            started: AtomicU32::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was queued: the driver writes it.
    fn signal(&self, mut outbox: MutexGuard<'_, Outbox>) {
        let first = !std::mem::replace(&mut outbox.signalled, true);
        drop(outbox);
        if first {
            self.alarm.ring();
        }
    }

    /// Opens a stream with `head` and as much of `chunk` as may be sent. `last`: nothing follows.
    pub(super) fn open(&self, head: &Request<()>, chunk: Option<&mut Bytes>, last: bool) -> Result<Arc<Stream>, Fault> {
        let mut guard = self.lock();
        let outbox = &mut *guard;
        if let Some(fault) = &outbox.ended {
            return Err(fault.clone());
        }
        if outbox.queue.len() > OVERFULL {
            return Err(Fault::Full);
        }
        let refused = if outbox.next > frame::MAX { Some(&Reason::NO_ERROR) } else { self.goaway.get() };
        if let Some(reason) = refused {
            return Err(Fault::GoAway(*reason, Arc::from("")));
        }
        let id = outbox.next;
        outbox.next += 2;
        let stream = Arc::new(Stream::new(id, outbox.stream_window, self.window, head.method() == Method::HEAD));
        outbox.head(id, head, last && chunk.is_none());
        {
            let mut state = stream.lock();
            match chunk {
                None => state.sent = last,
                Some(chunk) => _ = outbox.data(&mut state, id, chunk, last),
            }
        }
        outbox.opened.push(Arc::clone(&stream));
        self.signal(guard);
        Ok(stream)
    }

    /// Sends as much of `chunk` as may be. `last`: nothing follows it.
    pub(super) fn send(&self, stream: &Arc<Stream>, chunk: &mut Bytes, last: bool, cx: &Context<'_>) -> Sent {
        let mut guard = self.lock();
        let outbox = &mut *guard;
        let mut state = stream.lock();
        if state.sent {
            return Sent::Closed;
        }
        let before = chunk.len();
        if outbox.data(&mut state, stream.id, chunk, last) {
            state.dues.blocked = false;
            outbox.forget_if_closed(&state, stream.id);
            drop(state);
            self.signal(guard);
            return Sent::All;
        }
        state.dues.blocked = true;
        state.wait_to_send(cx.waker());
        let waits = state.send_window > 0 && !std::mem::replace(&mut state.waiting, true);
        drop(state);
        if waits {
            // Those that ended meanwhile, from time to time: the window may never open again.
            if outbox.waiting.len() >= FEW && outbox.waiting.len().is_power_of_two() {
                outbox.waiting.retain(|other| !other.lock().sent);
            }
            outbox.waiting.push_back(Arc::clone(stream));
        }
        if chunk.len() < before || outbox.has_turn() {
            self.signal(guard);
        }
        Sent::Blocked
    }

    /// Nothing more is sent: DATA without payload, or trailers, say so.
    pub(super) fn finish(&self, stream: &Stream, trailers: Option<&HeaderMap>) {
        let mut guard = self.lock();
        let outbox = &mut *guard;
        let mut state = stream.lock();
        if std::mem::replace(&mut state.sent, true) {
            return;
        }
        match trailers {
            None => frame::head(&mut outbox.queue.buf, 0, frame::DATA, frame::END_STREAM, stream.id),
            Some(trailers) => outbox.trailers(stream.id, trailers),
        }
        outbox.forget_if_closed(&state, stream.id);
        drop(state);
        self.signal(guard);
    }

    /// Ends a stream that is not closed yet.
    pub(super) fn reset(&self, stream: &Stream, reason: Reason, fault: Fault) {
        let mut guard = self.lock();
        let mut state = stream.lock();
        if state.is_closed() {
            return;
        }
        // A response that is complete can still be read.
        let unread = if state.received { 0 } else { state.discard() };
        state.fail(fault);
        let (reader, writer) = (state.take_reader(), state.take_writer());
        drop(state);
        frame::reset(&mut guard.queue.buf, stream.id, reason);
        guard.closed.push(stream.id | CUT);
        self.signal(guard);
        self.took(unread);
        reader.into_iter().chain(writer).for_each(Waker::wake);
    }

    /// What follows the head of a response, which is then given back to the windows. Ready with `None` at the end.
    pub(in crate::transport) fn poll_part(
        &self,
        stream: &Stream,
        cx: &Context<'_>,
    ) -> Poll<Option<Result<Part, Fault>>> {
        let mut state = stream.lock();
        let part = ready!(state.poll_part(cx.waker()));
        if let Some(Ok(Part::Data(data))) = &part {
            let more = state.took(data.len());
            drop(state);
            self.took(data.len());
            if let Some(more) = more {
                self.widen(stream.id, more);
            }
        }
        Poll::Ready(part)
    }

    /// Nobody reads the response any more.
    pub(in crate::transport) fn abandon(&self, stream: &Stream) {
        let mut state = stream.lock();
        if !state.received {
            drop(state);
            self.reset(stream, Reason::CANCEL, Fault::Cancelled);
            // The end may have come between the two.
            state = stream.lock();
        }
        let unread = state.discard();
        drop(state);
        self.took(unread);
    }

    /// So much data was read: by itself for the connection, by [`State::took`] for the stream.
    pub(super) fn took(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let before = self.read.fetch_add(bytes, Ordering::SeqCst);
        if before.saturating_add(bytes) >= self.give_back.load(Ordering::SeqCst) {
            self.alarm.ring();
        }
    }

    /// What the connection's window, of which so much is left, is to grow by.
    pub(super) fn give_back(&self, left: i64) -> Option<u32> {
        let enough = u32::try_from(left).unwrap_or(0).clamp(1, self.half_window);
        self.give_back.store(enough, Ordering::SeqCst);
        (self.read.load(Ordering::SeqCst) >= enough).then(|| self.read.swap(0, Ordering::SeqCst))
    }

    /// Tells the peer that it may send so much more on a stream.
    pub(super) fn widen(&self, stream: u32, more: u32) {
        let mut outbox = self.lock();
        frame::window_update(&mut outbox.queue.buf, stream, more);
        self.signal(outbox);
    }

    /// Sends a PING; returns its number. `None`: the connection ended.
    pub(super) fn ping(&self) -> Option<u32> {
        let mut outbox = self.lock();
        if outbox.ended.is_some() {
            return None;
        }
        outbox.pings = outbox.pings.wrapping_add(1);
        let number = outbox.pings;
        let [a, b, c, d] = number.to_be_bytes();
        frame::ping(&mut outbox.queue.buf, 0, [b'm', b'e', b's', b'h', a, b, c, d]);
        self.signal(outbox);
        Some(number)
    }

    /// Waits for the answer to the PING of this number.
    pub(super) fn poll_pong(&self, number: u32, cx: &Context<'_>) -> Poll<()> {
        self.ponged.register(cx.waker());
        if self.has_pong(number) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Whether the PING of this number, or a later one, was answered. The driver is woken when one is.
    pub(super) fn has_pong(&self, number: u32) -> bool {
        self.pongs.load(Ordering::SeqCst).wrapping_sub(number) < 1 << 31
    }

    pub(super) fn on_pong(&self, number: u32) {
        self.pongs.store(number, Ordering::SeqCst);
        self.ponged.wake();
        self.alarm.ring();
    }

    /// Says goodbye; the connection closes when that is written.
    pub(super) fn leave(&self) {
        let mut outbox = self.lock();
        if !std::mem::replace(&mut outbox.leaving, true) && outbox.ended.is_none() {
            outbox.ended = Some(Fault::Closed);
            frame::goaway(&mut outbox.queue.buf, 0, Reason::NO_ERROR);
        }
        self.signal(outbox);
    }

    /// Tells a client that no stream above `last` is served; the connection stays.
    pub(super) fn say_goodbye(&self, last: u32) {
        let mut outbox = self.lock();
        frame::goaway(&mut outbox.queue.buf, last, Reason::NO_ERROR);
        self.signal(outbox);
    }

    /// All is said: the connection closes when it is written.
    pub(super) fn close(&self) {
        let mut outbox = self.lock();
        outbox.leaving = true;
        outbox.ended = Some(Fault::Closed);
        self.signal(outbox);
    }

    /// Begins the answer on a stream with `head`, as much of `chunk` as may be sent, and `tail` if that was all. True: the answer is
    /// complete, or nobody waits for it.
    pub(super) fn respond(
        &self,
        stream: &Stream,
        head: &response::Parts,
        chunk: Option<&mut Bytes>,
        tail: Tail<'_>,
    ) -> bool {
        let mut guard = self.lock();
        let outbox = &mut *guard;
        let mut state = stream.lock();
        if state.sent {
            return true;
        }
        state.answering = true;
        let last = matches!(tail, Tail::End);
        state.dues.grpc = outbox.answer(stream.id, head, last && chunk.is_none());
        let queued = match chunk {
            Some(chunk) => outbox.data(&mut state, stream.id, chunk, last),
            None => {
                state.sent = last;
                true
            }
        };
        if queued && let Tail::Trailers(trailers) = tail {
            outbox.trailers(stream.id, trailers);
            state.sent = true;
        }
        let (complete, received) = (state.sent, state.received);
        outbox.forget_if_closed(&state, stream.id);
        drop(state);
        self.signal(guard);
        if complete && !received {
            // What the client has not sent yet nobody waits for (RFC 9113 section 8.1).
            self.reset(stream, Reason::NO_ERROR, Fault::Cancelled);
        }
        complete
    }

    /// Requests in progress.
    pub(super) fn serving(&self) -> u32 {
        requests(self.serving.load(Ordering::Acquire))
    }

    /// Bytes of their headers.
    pub(super) fn header_bytes(&self) -> u64 {
        self.serving.load(Ordering::Relaxed) & ((1 << HEADER_BITS) - 1)
    }

    /// A request with so many bytes of headers begins.
    pub(super) fn serves(&self, header_bytes: u32) {
        self.serving.fetch_add(one_of(header_bytes), Ordering::AcqRel);
    }

    /// It is over. True: it was the last.
    pub(super) fn served(&self, header_bytes: u32) -> bool {
        requests(self.serving.fetch_sub(one_of(header_bytes), Ordering::AcqRel)) == 1
    }

    /// A header block goes on in further frames, or has ended.
    pub(super) fn head_in_pieces(&self) {
        self.heads.fetch_add(1, Ordering::Relaxed);
    }

    /// A frame is incomplete, or none is any more (0).
    pub(super) fn leaves_unfinished(&self, frame: u32) {
        self.partial.store(frame, Ordering::Relaxed);
    }

    /// Which header block or frame is incomplete, if one is.
    pub(super) fn unfinished(&self) -> Option<(u32, u32)> {
        let heads = self.heads.load(Ordering::Relaxed);
        let block = if heads % 2 == 1 { heads } else { 0 };
        let partial = self.partial.load(Ordering::Relaxed);
        // Within a block, frames that go on with it are no progress.
        let pending = if block == 0 { (0, partial) } else { (block, 0) };
        (pending != (0, 0)).then_some(pending)
    }

    /// Asks the client for the body of its request, if the answer has not begun (RFC 9110 section 10.1.1).
    pub(in crate::transport) fn ask(&self, stream: &Stream) {
        let mut outbox = self.lock();
        let state = stream.lock();
        if state.sent || state.answering || state.received {
            return;
        }
        drop(state);
        outbox.bare_answer(stream.id, StatusCode::CONTINUE, false);
        self.signal(outbox);
    }

    /// Answers a request that was not accepted.
    pub(super) fn refuse(&self, id: u32, refusal: Refusal, ended: bool) {
        let mut outbox = self.lock();
        match refusal {
            Refusal::Status(status) => {
                outbox.bare_answer(id, status, true);
                if !ended {
                    frame::reset(&mut outbox.queue.buf, id, Reason::NO_ERROR);
                }
            }
            Refusal::Reset(reason) => frame::reset(&mut outbox.queue.buf, id, reason),
        }
        self.signal(outbox);
    }

    /// Nobody reads the request any more: what comes of it is thrown away, and the stream's window stays as it is.
    pub(in crate::transport) fn ignore(&self, stream: &Stream) {
        let mut state = stream.lock();
        state.ignored = !state.received;
        let unread = state.discard();
        drop(state);
        self.took(unread);
    }

    /// Whoever queues something from here on need not wake the driver: it looks before it rests. Answers bear this date from now on.
    pub(super) fn attend(&self, now: SystemTime) {
        let mut outbox = self.lock();
        outbox.signalled = true;
        outbox.date.set(now);
    }

    /// The connection is over: nothing can be opened or sent. Returns the streams that only the outbox knows.
    pub(super) fn end(&self, fault: &Fault) -> Vec<Arc<Stream>> {
        let mut outbox = self.lock();
        outbox.ended = Some(fault.clone());
        outbox.waiting.clear();
        outbox.queue = Queue::default();
        std::mem::take(&mut outbox.opened)
    }
}

fn one_of(header_bytes: u32) -> u64 {
    1 << HEADER_BITS | u64::from(header_bytes)
}

fn requests(serving: u64) -> u32 {
    // At most 24 bits.
    u32::try_from(serving >> HEADER_BITS).unwrap_or(u32::MAX)
}

impl Outbox {
    /// Whether we ever opened this stream.
    pub(super) fn has_opened(&self, id: u32) -> bool {
        id < self.next
    }

    /// Nothing is left to write: from now on the driver has to be woken.
    pub(super) fn rest(&mut self) {
        self.signalled = false;
    }

    /// The connection may send more, or there is room in the queue again: those to wake.
    pub(super) fn on_room(&mut self, more: u32) -> Result<Vec<Waker>, Fault> {
        self.window += i64::from(more);
        if self.window > i64::from(frame::MAX) {
            return Err(Fault::Broken(Reason::FLOW_CONTROL_ERROR, "window of more than 2^31-1"));
        }
        if self.window <= 0 || self.waiting.is_empty() {
            return Ok(Vec::new());
        }
        let turns =
            if self.by_turns { usize::try_from(self.window / WORTH + 1).unwrap_or(usize::MAX) } else { usize::MAX };
        let mut wakers = Vec::new();
        while wakers.len() < turns
            && let Some(stream) = self.waiting.pop_front()
        {
            let mut state = stream.lock();
            state.waiting = false;
            wakers.extend(state.take_writer());
        }
        Ok(wakers)
    }

    /// Others wait for what somebody did not use: the driver has to give it to them.
    fn has_turn(&self) -> bool {
        self.by_turns && self.window > 0 && !self.waiting.is_empty()
    }

    fn head(&mut self, id: u32, head: &Request<()>, end: bool) {
        let (start, out) = (self.queue.buf.len(), &mut self.queue.buf);
        frame::head(out, 0, frame::HEADERS, frame::END_HEADERS | if end { frame::END_STREAM } else { 0 }, id);
        self.encoder.begin(out);
        let uri = head.uri();
        self.encoder.pseudo(names::METHOD, head.method().as_str().as_bytes(), out);
        if head.method() != Method::CONNECT {
            self.encoder.pseudo(names::SCHEME, uri.scheme_str().unwrap_or("http").as_bytes(), out);
        }
        if let Some(authority) = uri.authority() {
            self.encoder.pseudo(names::AUTHORITY, without_user(authority).as_bytes(), out);
        }
        if head.method() != Method::CONNECT {
            let path = uri.path_and_query().map_or("/", |path| path.as_str());
            self.encoder.pseudo(names::PATH, path.as_bytes(), out);
        }
        for (name, value) in head.headers() {
            self.encoder.header(name, value, out);
        }
        self.close_block(start);
    }

    /// Whether it is gRPC's.
    fn answer(&mut self, id: u32, head: &response::Parts, end: bool) -> bool {
        let (start, out) = (self.queue.buf.len(), &mut self.queue.buf);
        frame::head(out, 0, frame::HEADERS, frame::END_HEADERS | if end { frame::END_STREAM } else { 0 }, id);
        self.encoder.begin(out);
        self.encoder.status(head.status, out);
        let (mut dated, mut grpc) = (false, false);
        for (name, value) in &head.headers {
            if is_of_connection(name, value) {
                continue;
            }
            dated |= name == header::DATE;
            grpc |= name == header::CONTENT_TYPE && value.as_bytes().starts_with(b"application/grpc");
            self.encoder.header(name, value, out);
        }
        // gRPC has no use for a date.
        if !dated
            && !grpc
            && let Some(date) = &self.date.value
        {
            self.encoder.header(&header::DATE, date, out);
        }
        self.close_block(start);
        self.answered = self.answered.wrapping_add(1);
        grpc
    }

    /// A head without fields.
    fn bare_answer(&mut self, id: u32, status: StatusCode, end: bool) {
        let (start, out) = (self.queue.buf.len(), &mut self.queue.buf);
        frame::head(out, 0, frame::HEADERS, frame::END_HEADERS | if end { frame::END_STREAM } else { 0 }, id);
        self.encoder.begin(out);
        self.encoder.status(status, out);
        self.close_block(start);
    }

    fn trailers(&mut self, id: u32, trailers: &HeaderMap) {
        let (start, out) = (self.queue.buf.len(), &mut self.queue.buf);
        frame::head(out, 0, frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, id);
        self.encoder.begin(out);
        for (name, value) in trailers {
            self.encoder.header(name, value, out);
        }
        self.close_block(start);
    }

    /// Ends the header block of the frame at `start`, in further frames if it is too large for one.
    fn close_block(&mut self, start: usize) {
        let max = self.max_payload;
        let out = &mut self.queue.buf;
        let block = start + frame::HEAD;
        if out.len() - block <= max {
            return frame::close(out, start);
        }
        let rest = out.split_off(block + max);
        frame::close(out, start);
        let Some(head) = frame::Head::read(&out[start..]) else { return };
        out[start + 4] = head.flags & !frame::END_HEADERS;
        let mut pieces = rest.chunks(max).peekable();
        while let Some(piece) = pieces.next() {
            let flags = if pieces.peek().is_none() { frame::END_HEADERS } else { 0 };
            frame::head(out, piece.len(), frame::CONTINUATION, flags, head.stream);
            out.extend_from_slice(piece);
        }
    }

    /// Queues as much of `chunk` as the windows and the queue have room for. True: all of it.
    fn data(&mut self, state: &mut State, id: u32, chunk: &mut Bytes, last: bool) -> bool {
        loop {
            let window = self.window.min(state.send_window).max(0);
            let length = chunk.len().min(self.max_payload).min(usize::try_from(window).unwrap_or(usize::MAX));
            if length == 0 || self.queue.len() >= FULL {
                return false;
            }
            let end = last && length == chunk.len();
            self.answered = self.answered.wrapping_add(1);
            frame::head(&mut self.queue.buf, length, frame::DATA, if end { frame::END_STREAM } else { 0 }, id);
            self.queue.push(chunk, length);
            // At most a window, which fits.
            let taken = i64::try_from(length).unwrap_or(i64::MAX);
            self.window -= taken;
            state.send_window -= taken;
            state.dues.moves = state.dues.moves.wrapping_add(1);
            if chunk.is_empty() {
                state.sent = end;
                return true;
            }
        }
    }

    fn forget_if_closed(&mut self, state: &State, id: u32) {
        if state.is_closed() {
            self.closed.push(id);
        }
    }

    /// The peer's SETTINGS_MAX_FRAME_SIZE.
    pub(super) fn set_max_payload(&mut self, max: u32) {
        self.max_payload = usize::try_from(max).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD);
    }
}

/// What a request that is not accepted gets.
pub(super) enum Refusal {
    Status(StatusCode),
    Reset(Reason),
}

/// The `date` of answers (RFC 9110 section 6.6.1), written once a second.
#[derive(Debug, Default)]
struct Date {
    second: u64,
    value: Option<HeaderValue>,
}

impl Date {
    fn set(&mut self, now: SystemTime) {
        let Ok(since) = now.duration_since(SystemTime::UNIX_EPOCH) else { return };
        if since.as_secs() != self.second || self.value.is_none() {
            self.second = since.as_secs();
            self.value = HeaderValue::try_from(httpdate::fmt_http_date(now)).ok();
        }
    }
}

/// Waits until the sending side of a stream is closed.
pub(super) fn poll_sent(stream: &Stream, cx: &Context<'_>) -> Poll<()> {
    let mut state = stream.lock();
    if state.sent {
        return Poll::Ready(());
    }
    state.wait_to_send(cx.waker());
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::task::noop_waker;

    #[test]
    fn a_window_opened_by_single_bytes_wakes_one_stream_at_a_time_and_none_is_forgotten() {
        const STREAMS: u32 = 500;
        let link = Link::server(Arc::new(Alarm::default()), &ServerConfig::default());
        let (waker, window) = (noop_waker(), i64::from(frame::WINDOW));
        let cx = Context::from_waker(&waker);
        let stream = |id: u32| Arc::new(Stream::of_request(2 * id + 1, window, frame::WINDOW, None, true));
        let mut all = Bytes::from(vec![0; usize::try_from(window).unwrap()]);
        assert!(matches!(link.send(&stream(STREAMS), &mut all, true, &cx), Sent::All));
        let streams: Vec<_> = (0..STREAMS).map(stream).collect();
        let mut chunks = vec![Bytes::from_static(b"some"); streams.len()];
        let blocked = |stream, chunk: &mut Bytes| matches!(link.send(stream, chunk, true, &cx), Sent::Blocked);
        assert!(streams.iter().zip(&mut chunks).all(|(stream, chunk)| blocked(stream, chunk)));
        let woken = |more| {
            let before = link.lock().waiting.len();
            let wakers = link.lock().on_room(more).unwrap();
            assert_eq!(wakers.len(), before - link.lock().waiting.len());
            wakers.len()
        };
        assert_eq!(woken(1), 1);
        assert!(blocked(&streams[0], &mut chunks[0]), "it sends one byte, and waits behind the others");
        assert_eq!((chunks[0].len(), woken(1)), (3, 1));
        // Those that ended meanwhile take nobody's turn, and what is not used goes on to the next.
        link.reset(&streams[1], Reason::CANCEL, Fault::Cancelled);
        assert!(matches!(link.send(&streams[1], &mut chunks[1], true, &cx), Sent::Closed));
        assert_eq!(woken(0), 1);
        let worth = u32::try_from(WORTH).unwrap();
        assert_eq!(woken(9 * worth), 10);
        assert_eq!(woken(2000 * worth), streams.len() - 12);
    }
}
