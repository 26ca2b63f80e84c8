//! The receiving side of a connection: frames become what streams and windows know.

use super::{
    fault::Fault,
    frame::{self, Head},
    hpack::{Decoder, Malformed, Name},
    outbox::{CUT, Link, Refusal},
    request::{Accepted, Requests},
    stream::{Breach, Stream},
};
use crate::transport::{ServerConfig, count_refused, head::is_of_connection};
use bytes::{Buf, Bytes, BytesMut};
use h2::Reason;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, atomic::Ordering},
    task::Waker,
    time::Duration,
};
use tokio::time::Instant;

/// Header blocks are read to their end, for the tables' sake, up to so many times the size we take.
const MAX_BLOCK: usize = 4;
/// What a reset, and a request that is not accepted, cost a client of what it may do without use.
const RESET: u32 = 2;
const REFUSED: u32 = 3;
/// Streams that a change of all windows costs as much for as one frame without use.
const WALKED: usize = 16;
/// Bytes of the trailers of a request, however large its headers may be: many could wait to be read.
const MAX_TRAILERS: usize = 8 << 10;
/// Buffers for reads larger than this are not held on to for the few headers that came with them.
const LARGE_READ: usize = 16 << 10;
/// Bytes of GOAWAY's debug data that errors show.
const MAX_DEBUG: usize = 256;

/// Reads what the peer sends.
pub(super) struct Reader {
    decoder: Decoder,
    streams: HashMap<u32, Arc<Stream>, BuildHasherDefault<ById>>,
    /// A header block whose end is to come.
    partial: Option<Partial>,
    /// Bytes of data that the peer may send on the connection.
    window: i64,
    /// Bytes of data that we may send on a new stream.
    peer_window: i64,
    max_header_list_size: usize,
    /// The first SETTINGS arrived.
    settled: bool,
    /// Who is to look, of the stream that the last frame was for: more for it is likely right behind.
    waking: Option<(u32, Waker)>,
    /// The number of the read that is looked at.
    reads: u32,
    /// Twice the number of frames that were read.
    frames: u32,
    /// What [`Link::unfinished`] was told last.
    unfinished: u32,
    /// Bytes of answers queued and not known to be written.
    pub(super) answers: usize,
    /// We are the server; the streams are the client's.
    server: Option<Box<Requests>>,
}

struct Partial {
    stream: u32,
    end: bool,
    block: BytesMut,
}

/// Identifiers are made by us, one after the other: they need no mixing but this.
#[derive(Default)]
struct ById(u64);

impl Hasher for ById {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

const TOO_LARGE: Fault = Fault::Broken(Reason::FLOW_CONTROL_ERROR, "window of more than 2^31-1");

fn broken(what: &'static str) -> Fault {
    Fault::Broken(Reason::PROTOCOL_ERROR, what)
}

fn size_error(what: &'static str) -> Fault {
    Fault::Broken(Reason::FRAME_SIZE_ERROR, what)
}

impl From<Malformed> for Fault {
    fn from(Malformed(what): Malformed) -> Self {
        Self::Broken(Reason::COMPRESSION_ERROR, what)
    }
}

impl Reader {
    pub(super) fn new(connection_window: u32, max_header_list_size: u32) -> Self {
        Self {
            decoder: Decoder::default(),
            streams: HashMap::default(),
            partial: None,
            window: i64::from(connection_window.clamp(frame::WINDOW, frame::MAX)),
            peer_window: i64::from(frame::WINDOW),
            max_header_list_size: usize::try_from(max_header_list_size).unwrap_or(usize::MAX),
            settled: false,
            waking: None,
            reads: 0,
            frames: 0,
            unfinished: super::outbox::UNSETTLED,
            answers: 0,
            server: None,
        }
    }

    /// The server's side, behind the client's preface.
    pub(super) fn server(config: &ServerConfig, requests: Requests) -> Self {
        Self { server: Some(Box::new(requests)), ..Self::new(config.connection_window, config.max_header_list_size) }
    }

    pub(super) fn is_server(&self) -> bool {
        self.server.is_some()
    }

    /// The requests whose heads arrived since.
    pub(super) fn accepted(&mut self) -> impl Iterator<Item = Accepted> {
        self.server.iter_mut().flat_map(|server| {
            server.accepted_bytes = 0;
            server.accepted.drain(..)
        })
    }

    /// Whether there are any.
    pub(super) fn has_accepted(&self) -> bool {
        self.server.as_ref().is_some_and(|server| !server.accepted.is_empty())
    }

    /// Takes no more streams; returns the last that was taken.
    pub(super) fn stop(&mut self) -> u32 {
        self.server.as_mut().map_or(0, |server| *server.stop.get_or_insert(server.last))
    }

    /// The last stream of the peer's that was taken.
    pub(super) fn last(&self) -> u32 {
        self.server.as_ref().map_or(0, |server| server.stop.unwrap_or(server.last))
    }

    /// The peer's SETTINGS arrived.
    pub(super) fn is_settled(&self) -> bool {
        self.settled
    }

    pub(super) fn is_idle(&self) -> bool {
        self.streams.is_empty()
    }

    /// Bytes of data that the peer may send on the connection.
    pub(super) fn window(&self) -> i64 {
        self.window
    }

    /// The connection's window was opened so much more.
    pub(super) fn widen(&mut self, more: u32) {
        self.window += i64::from(more);
    }

    /// Takes note of streams that were opened and ended since. Before anything of theirs is written.
    pub(super) fn keep_up(&mut self, opened: &mut Vec<Arc<Stream>>, closed: &mut Vec<u32>) {
        if let Some(server) = &mut self.server {
            // What we reset was of no use to anybody.
            server.floods.earn(closed.iter().filter(|id| *id & CUT == 0).count());
        }
        for stream in opened.drain(..) {
            self.streams.insert(stream.id, stream);
        }
        for id in closed.drain(..) {
            self.streams.remove(&(id & frame::MAX));
            if let Some(server) = &mut self.server
                && id & CUT != 0
            {
                server.cut(id & frame::MAX);
            }
        }
    }

    /// So much is read at once.
    pub(super) fn reads(&mut self, bytes: usize) {
        self.decoder.copies = self.server.is_some() && bytes > LARGE_READ;
    }

    /// Reads all complete frames of `input`.
    ///
    /// # Errors
    ///
    /// The peer broke the protocol in a way that ends the connection.
    pub(super) fn read(&mut self, input: &mut BytesMut, link: &Link) -> Result<(), Fault> {
        self.reads = self.reads.wrapping_add(1);
        let result = loop {
            let Some(head) = Head::read(input) else { break Ok(()) };
            if head.length > frame::MAX_PAYLOAD {
                break Err(size_error("frame of more than 16 KiB"));
            }
            if input.len() < frame::HEAD + head.length {
                break Ok(());
            }
            input.advance(frame::HEAD);
            let payload = input.split_to(head.length).freeze();
            self.frames = self.frames.wrapping_add(2);
            if let Err(fault) = self.frame(head, payload, link) {
                break Err(fault);
            }
        };
        self.wake();
        let unfinished = if input.is_empty() && self.settled { 0 } else { self.frames | super::outbox::UNSETTLED };
        if std::mem::replace(&mut self.unfinished, unfinished) != unfinished {
            link.leaves_unfinished(unfinished);
        }
        result
    }

    /// Ends requests whose clients have owed something for so long: whoever serves them does, and is woken.
    pub(super) fn end_overdue(&self, limit: Duration, now: Instant) {
        for stream in self.streams.values() {
            let server = stream.lock().end_overdue(limit, now);
            if let Some(server) = server {
                tracing::debug!(stream = stream.id, ?limit, "a client does not go on with its request");
                server.wake();
            }
        }
    }

    /// Ends all streams with the connection.
    pub(super) fn fail(&mut self, fault: &Fault, unseen: Vec<Arc<Stream>>) {
        self.wake();
        for stream in self.streams.drain().map(|(_, stream)| stream).chain(unseen) {
            fail(&stream, fault.clone());
        }
    }

    fn wake(&mut self) {
        if let Some((_, waker)) = self.waking.take() {
            waker.wake();
        }
    }

    fn wake_later(&mut self, id: u32, waker: Option<Waker>) {
        let Some(waker) = waker else { return };
        if let Some((_, last)) = self.waking.replace((id, waker)) {
            last.wake();
        }
    }

    fn frame(&mut self, head: Head, payload: Bytes, link: &Link) -> Result<(), Fault> {
        if !self.settled && (head.kind != frame::SETTINGS || head.has(frame::ACK)) {
            return Err(broken("the first frame is no SETTINGS"));
        }
        if self.waking.as_ref().is_some_and(|(id, _)| *id != head.stream) {
            self.wake();
        }
        if self.partial.is_some() && head.kind != frame::CONTINUATION {
            return Err(broken("frame within a header block"));
        }
        match head.kind {
            frame::DATA => self.data(head, payload, link),
            frame::HEADERS => self.headers(head, payload, link),
            frame::CONTINUATION => self.continuation(head, &payload, link),
            frame::RST_STREAM => self.reset(head, &payload, link),
            frame::SETTINGS => self.settings(head, &payload, link),
            frame::PUSH_PROMISE => Err(broken("PUSH_PROMISE, which was switched off")),
            frame::PING => self.ping(head, &payload, link),
            frame::GOAWAY => self.goaway(head, &payload, link),
            frame::WINDOW_UPDATE => self.window_update(head, &payload, link),
            frame::PRIORITY if head.stream == 0 => Err(broken("PRIORITY of no stream")),
            // PRIORITY, and kinds that nobody knows yet, mean nothing here.
            _ => self.charge(1),
        }
    }

    fn data(&mut self, head: Head, mut payload: Bytes, link: &Link) -> Result<(), Fault> {
        let whole = head.length;
        let counted = u32::try_from(whole).unwrap_or(u32::MAX);
        self.window -= i64::from(counted);
        if self.window < 0 {
            return Err(Fault::Broken(Reason::FLOW_CONTROL_ERROR, "more data than the window of the connection"));
        }
        unpad(head, &mut payload)?;
        let Some(stream) = self.find(head.stream, link)? else {
            if self.server.as_ref().is_some_and(|server| !server.was_cut(head.stream)) {
                return Err(Fault::Broken(Reason::STREAM_CLOSED, "data of a stream that ended"));
            }
            // It crossed our RST_STREAM.
            link.took(whole);
            return Ok(());
        };
        let end = head.has(frame::END_STREAM);
        let mut state = stream.lock();
        let length = payload.len();
        let useless = length == 0 && !end;
        let ignored = state.ignored;
        let result = state.on_data(payload, counted, end, self.reads);
        // Padding is never read: it is as good as given back.
        let more = state.took(whole - length);
        let waker = if length > 0 || end { state.take_reader() } else { None };
        let closed = state.is_closed();
        drop(state);
        if let Err(breach) = result {
            link.took(whole);
            self.breach(head.stream, breach, link)?;
        } else {
            link.took(if ignored { whole } else { whole - length });
            if let Some(more) = more {
                link.widen(head.stream, more);
            }
            if closed {
                self.streams.remove(&head.stream);
            }
        }
        self.wake_later(head.stream, waker);
        if useless { self.charge(1) } else { Ok(()) }
    }

    fn headers(&mut self, head: Head, mut payload: Bytes, link: &Link) -> Result<(), Fault> {
        unpad(head, &mut payload)?;
        if head.has(frame::WITH_PRIORITY) {
            if payload.len() < 5 {
                return Err(size_error("HEADERS too short for a priority"));
            }
            payload.advance(5);
        }
        let end = head.has(frame::END_STREAM);
        if head.has(frame::END_HEADERS) {
            return self.block(head.stream, &payload, end, link);
        }
        link.head_in_pieces();
        self.partial = Some(Partial { stream: head.stream, end, block: BytesMut::from(&payload[..]) });
        Ok(())
    }

    fn continuation(&mut self, head: Head, payload: &[u8], link: &Link) -> Result<(), Fault> {
        let max = self.max_header_list_size.saturating_mul(MAX_BLOCK);
        let Some(partial) = self.partial.as_mut().filter(|partial| partial.stream == head.stream) else {
            return Err(broken("CONTINUATION of nothing"));
        };
        // Empty ones could go on for ever.
        if partial.block.len() + payload.len() > max || payload.is_empty() && !head.has(frame::END_HEADERS) {
            return Err(Fault::Broken(Reason::ENHANCE_YOUR_CALM, "header block without end"));
        }
        partial.block.extend_from_slice(payload);
        if !head.has(frame::END_HEADERS) {
            return Ok(());
        }
        let Some(Partial { stream, end, block }) = self.partial.take() else { return Ok(()) };
        link.head_in_pieces();
        self.block(stream, &block.freeze(), end, link)
    }

    fn block(&mut self, id: u32, block: &Bytes, end: bool, link: &Link) -> Result<(), Fault> {
        if self.server.is_some() && !self.streams.contains_key(&id) {
            return self.request(id, block, end, link);
        }
        let most = if self.is_server() { MAX_TRAILERS } else { usize::MAX };
        let mut fields = Fields { room: self.max_header_list_size.min(most), ..Fields::default() };
        self.decoder.decode(block, |field| fields.add(field))?;
        let Some(stream) = self.find(id, link)? else { return Ok(()) };
        let mut state = stream.lock();
        let result = match fields.breach {
            Some(breach) => Err(breach),
            None => state.on_headers(fields.status, fields.map, fields.length, end),
        };
        let waker = if let Ok(true) = result { state.take_reader() } else { None };
        let closed = state.is_closed();
        drop(state);
        if let Err(breach) = result {
            self.breach(id, breach, link)?;
        } else if closed {
            self.streams.remove(&id);
        }
        self.wake_later(id, waker);
        Ok(())
    }

    /// A client opens a stream.
    fn request(&mut self, id: u32, block: &Bytes, end: bool, link: &Link) -> Result<(), Fault> {
        let Some(server) = &mut self.server else { return Ok(()) };
        if id <= server.last || id.is_multiple_of(2) {
            // Trailers may cross our reset.
            self.decoder.decode(block, |_| {})?;
            return match id.is_multiple_of(2) {
                false if server.was_cut(id) => Ok(()),
                false => Err(Fault::Broken(Reason::STREAM_CLOSED, "headers of a stream that ended")),
                true => Err(broken("a stream with an even number")),
            };
        }
        server.last = id;
        link.started.store(id, Ordering::Relaxed);
        let mut asked = server.begin(self.max_header_list_size);
        self.decoder.decode(block, |field| asked.add(field))?;
        if server.stop.is_some() {
            // It hears of that by our GOAWAY; what it sends for it meanwhile is ignored.
            server.cut(id);
            return Ok(());
        }
        let (too_large, length) = (asked.too_large, asked.length);
        let header_bytes = u32::try_from(self.max_header_list_size - asked.room).unwrap_or(u32::MAX);
        let held = link.header_bytes() + u64::from(server.accepted_bytes) + u64::from(header_bytes);
        let busy = link.serving().max(u32::try_from(self.streams.len()).unwrap_or(u32::MAX));
        let (why, refusal) = if busy >= server.limit || held > server.header_bytes && !too_large {
            ("overload", Refusal::Reset(Reason::REFUSED_STREAM))
        } else if too_large {
            ("headers", Refusal::Status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE))
        } else {
            match server.head(asked, end) {
                Ok(head) => {
                    let window = self.peer_window;
                    let stream = Arc::new(Stream::of_request(id, window, server.window, length, end));
                    self.streams.insert(id, Arc::clone(&stream));
                    server.accepted_bytes = server.accepted_bytes.saturating_add(header_bytes);
                    server.accepted.push(Accepted { head, stream, ended: end, header_bytes });
                    return Ok(());
                }
                Err((reason, what)) => {
                    tracing::debug!(what, "a request that is none");
                    ("malformed", Refusal::Reset(reason))
                }
            }
        };
        count_refused(why);
        server.cut(id);
        link.refuse(id, refusal, end);
        self.answers += frame::HEAD + 4;
        self.charge(REFUSED)
    }

    /// A client did something that is of no use.
    fn charge(&mut self, cost: u32) -> Result<(), Fault> {
        self.server.as_mut().map_or(Ok(()), |server| server.floods.charge(cost))
    }

    fn reset(&mut self, head: Head, payload: &[u8], link: &Link) -> Result<(), Fault> {
        let &[a, b, c, d] = payload else { return Err(size_error("RST_STREAM")) };
        if self.find(head.stream, link)?.is_some()
            && let Some(stream) = self.streams.remove(&head.stream)
        {
            fail(&stream, Fault::Reset(Reason::from(u32::from_be_bytes([a, b, c, d]))));
            self.forget(head.stream);
        }
        self.charge(RESET)
    }

    fn settings(&mut self, head: Head, payload: &[u8], link: &Link) -> Result<(), Fault> {
        if head.stream != 0 {
            return Err(broken("SETTINGS of a stream"));
        }
        if head.has(frame::ACK) {
            return if payload.is_empty() { Ok(()) } else { Err(size_error("SETTINGS")) };
        }
        let (settings, []) = payload.as_chunks::<6>() else { return Err(size_error("SETTINGS")) };
        let walked = self.streams.len() / WALKED;
        self.charge(u32::try_from(walked).unwrap_or(u32::MAX).saturating_add(1))?;
        let most = u32::from(self.server.is_some());
        let mut outbox = link.lock();
        let mut window = outbox.stream_window;
        for &[a, b, v, w, x, y] in settings {
            let value = u32::from_be_bytes([v, w, x, y]);
            match u16::from_be_bytes([a, b]) {
                frame::HEADER_TABLE_SIZE => outbox.encoder.resize(usize::try_from(value).unwrap_or(usize::MAX)),
                frame::ENABLE_PUSH if value > most => return Err(broken("SETTINGS_ENABLE_PUSH out of its bounds")),
                frame::MAX_CONCURRENT_STREAMS => link.limit.store(value, Ordering::SeqCst),
                frame::INITIAL_WINDOW_SIZE if value > frame::MAX => return Err(TOO_LARGE),
                frame::INITIAL_WINDOW_SIZE => window = i64::from(value),
                frame::MAX_FRAME_SIZE => {
                    if !(16_384..1 << 24).contains(&value) {
                        return Err(broken("SETTINGS_MAX_FRAME_SIZE out of its bounds"));
                    }
                    outbox.set_max_payload(value);
                }
                _ => {}
            }
        }
        if !std::mem::replace(&mut self.settled, true) {
            // Nothing said about streams: as many as there are numbers.
            let _ = link.limit.compare_exchange(u32::MAX, frame::MAX, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.peer_window = window;
        // The last one counts, as if there were no others: each is a walk over all streams.
        let change = window - std::mem::replace(&mut outbox.stream_window, window);
        let mut wakers = Vec::new();
        let mut fits = true;
        if change != 0 {
            for stream in self.streams.values().chain(&outbox.opened) {
                let mut state = stream.lock();
                fits &= state.on_window(change).is_ok();
                wakers.extend(state.take_writer());
                self.answers += 1;
            }
        }
        frame::settings_ack(&mut outbox.queue.buf);
        self.answers += frame::HEAD;
        drop(outbox);
        wakers.into_iter().for_each(Waker::wake);
        if fits { Ok(()) } else { Err(TOO_LARGE) }
    }

    fn ping(&mut self, head: Head, payload: &[u8], link: &Link) -> Result<(), Fault> {
        let payload = <[u8; 8]>::try_from(payload).map_err(|_| size_error("PING"))?;
        if head.stream != 0 {
            return Err(broken("PING of a stream"));
        }
        if head.has(frame::ACK) {
            let [.., a, b, c, d] = payload;
            link.on_pong(u32::from_be_bytes([a, b, c, d]));
        } else {
            let mut outbox = link.lock();
            frame::ping(&mut outbox.queue.buf, frame::ACK, payload);
            let answered = outbox.answered;
            drop(outbox);
            self.answers += frame::HEAD + 8;
            // One for every frame of ours measures the path; others do nothing.
            if let Some(server) = &mut self.server
                && std::mem::replace(&mut server.pinged_at, answered) == answered
            {
                server.floods.charge(1)?;
            }
        }
        Ok(())
    }

    fn goaway(&mut self, head: Head, payload: &[u8], link: &Link) -> Result<(), Fault> {
        let (Some(last), Some(&[a, b, c, d])) = (frame::number(payload), payload.get(4..8)) else {
            return Err(size_error("GOAWAY"));
        };
        if head.stream != 0 {
            return Err(broken("GOAWAY of a stream"));
        }
        let reason = Reason::from(u32::from_be_bytes([a, b, c, d]));
        let debug = &payload[8..payload.len().min(8 + MAX_DEBUG)];
        let fault = Fault::GoAway(reason, String::from_utf8_lossy(debug).into());
        let _ = link.goaway.set(reason);
        if self.server.is_some() {
            // It speaks of streams that we would have opened.
            return self.charge(1);
        }
        // Those that are opened and not yet written will not be taken either.
        let mut outbox = link.lock();
        let mut opened = std::mem::take(&mut outbox.opened);
        self.keep_up(&mut opened, &mut outbox.closed);
        drop(outbox);
        for (_, stream) in self.streams.extract_if(|id, _| *id > last) {
            fail(&stream, fault.clone());
        }
        Ok(())
    }

    fn window_update(&mut self, head: Head, payload: &[u8], link: &Link) -> Result<(), Fault> {
        let more = frame::number(payload).filter(|_| payload.len() == 4).ok_or(size_error("WINDOW_UPDATE"))?;
        if head.stream == 0 {
            if more == 0 {
                return Err(broken("WINDOW_UPDATE of nothing"));
            }
            let wakers = link.lock().on_room(more)?;
            wakers.into_iter().for_each(Waker::wake);
            return Ok(());
        }
        let Some(stream) = self.find(head.stream, link)? else { return Ok(()) };
        let mut state = stream.lock();
        let result = match more {
            0 => Err((Reason::PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")),
            more => state.on_window(i64::from(more)),
        };
        let waker = state.take_writer();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
        result.or_else(|breach| self.breach(head.stream, breach, link))
    }

    /// The stream of a frame; `None` for those that are closed already.
    fn find(&self, id: u32, link: &Link) -> Result<Option<&Arc<Stream>>, Fault> {
        let stream = self.streams.get(&id);
        let known = || self.server.as_ref().map_or_else(|| link.lock().has_opened(id), |server| id <= server.last);
        if stream.is_none() && (id.is_multiple_of(2) || !known()) {
            return Err(broken("frame of a stream that was never opened"));
        }
        Ok(stream)
    }

    /// Resets one stream that the peer broke the protocol on. It costs a client as much as a reset of its own: it could have us begin
    /// and drop requests as well (CVE-2025-8671).
    fn breach(&mut self, id: u32, (reason, what): Breach, link: &Link) -> Result<(), Fault> {
        let Some(stream) = self.streams.remove(&id) else { return Ok(()) };
        link.reset(&stream, reason, Fault::Malformed(reason, what));
        self.answers += frame::HEAD + 4;
        if let Some(server) = &mut self.server {
            server.cut(id);
        }
        self.forget(id);
        self.charge(RESET)
    }

    /// A request that was not begun yet need not be any more.
    fn forget(&mut self, id: u32) {
        if let Some(server) = &mut self.server
            && let Some(at) = server.accepted.iter().rposition(|accepted| accepted.stream.id == id)
        {
            let forgotten = server.accepted.remove(at);
            server.accepted_bytes = server.accepted_bytes.saturating_sub(forgotten.header_bytes);
        }
    }
}

fn fail(stream: &Stream, fault: Fault) {
    let mut state = stream.lock();
    state.fail(fault);
    let (reader, writer) = (state.take_reader(), state.take_writer());
    drop(state);
    reader.into_iter().chain(writer).for_each(Waker::wake);
}

/// Takes the padding off.
fn unpad(head: Head, payload: &mut Bytes) -> Result<(), Fault> {
    if head.stream == 0 {
        return Err(broken("DATA or HEADERS of no stream"));
    }
    if head.has(frame::PADDED) {
        let padding = usize::from(*payload.first().ok_or(size_error("padded frame without padding"))?);
        payload.advance(1);
        let length = payload.len().checked_sub(padding).ok_or(broken("more padding than frame"))?;
        payload.truncate(length);
    }
    Ok(())
}

/// Takes note of a `content-length`.
pub(super) fn content_length(known: &mut Option<u64>, value: &HeaderValue) -> Result<(), &'static str> {
    let digits = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let length = digits.and_then(|text| text.parse().ok()).ok_or("content-length that is no number")?;
    match known.replace(length) {
        Some(other) if other != length => Err("content-length twice"),
        _ => Ok(()),
    }
}

/// A header block, as it is read.
#[derive(Default)]
struct Fields {
    status: Option<StatusCode>,
    map: HeaderMap,
    length: Option<u64>,
    room: usize,
    breach: Option<Breach>,
}

impl Fields {
    fn add(&mut self, field: super::hpack::Field) {
        if self.breach.is_none()
            && let Err(what) = self.try_add(field)
        {
            self.breach = Some((Reason::PROTOCOL_ERROR, what));
        }
    }

    fn try_add(&mut self, field: super::hpack::Field) -> Result<(), &'static str> {
        self.room = self.room.checked_sub(field.size).ok_or("headers of more bytes than are taken")?;
        let value = field.value.ok_or("a header value with bytes that it may not have")?;
        match field.name {
            Name::Header(name) => {
                if is_of_connection(&name, &value) {
                    return Err("a header of the connection");
                }
                if name == header::CONTENT_LENGTH {
                    content_length(&mut self.length, &value)?;
                }
                self.map.try_append(name, value).map_err(|_| "more headers than are taken")?;
            }
            Name::Status => {
                if self.status.is_some() || !self.map.is_empty() {
                    return Err("a status twice, or behind headers");
                }
                self.status = Some(StatusCode::from_bytes(value.as_bytes()).map_err(|_| "status that is no number")?);
            }
            Name::Method | Name::Scheme | Name::Authority | Name::Path | Name::Pseudo => {
                return Err("a pseudo header that this block does not have");
            }
            Name::Invalid => return Err("a header name that HTTP/2 does not allow"),
        }
        Ok(())
    }
}
