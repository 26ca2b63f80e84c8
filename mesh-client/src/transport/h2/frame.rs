//! The layout of frames (RFC 9113 sections 4 and 6).

use h2::Reason;

/// Bytes before the payload.
pub(super) const HEAD: usize = 9;
/// Bytes of payload that every peer takes, and that we take.
pub(super) const MAX_PAYLOAD: usize = 16_384;
/// The largest window, and the largest stream identifier.
pub(super) const MAX: u32 = (1 << 31) - 1;
/// The window of a connection or stream until something else is said.
pub(super) const WINDOW: u32 = 65_535;
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

pub(super) const ACK: u8 = 0x1;
pub(super) const END_STREAM: u8 = 0x1;
pub(super) const END_HEADERS: u8 = 0x4;
pub(super) const PADDED: u8 = 0x8;
pub(super) const WITH_PRIORITY: u8 = 0x20;

pub(super) const HEADER_TABLE_SIZE: u16 = 1;
pub(super) const ENABLE_PUSH: u16 = 2;
pub(super) const MAX_CONCURRENT_STREAMS: u16 = 3;
pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;
pub(super) const MAX_FRAME_SIZE: u16 = 5;
pub(super) const MAX_HEADER_LIST_SIZE: u16 = 6;

/// The first nine bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) length: usize,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl Head {
    /// `None` until all of it is there.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, s, t, u, v] = bytes.first_chunk()?;
        Some(Self {
            length: usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c),
            kind,
            flags,
            stream: u32::from_be_bytes([s, t, u, v]) & MAX,
        })
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The number that begins `bytes`, without its reserved bit.
pub(super) fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?) & MAX)
}

/// Of at most [`MAX_PAYLOAD`] bytes, or what the peer allowed.
pub(super) fn head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    let [.., a, b, c] = length.to_be_bytes();
    let [s, t, u, v] = stream.to_be_bytes();
    out.extend_from_slice(&[a, b, c, kind, flags, s, t, u, v]);
}

/// Writes the length of the frame that begins at `start` and ends here.
pub(super) fn close(out: &mut [u8], start: usize) {
    let [.., a, b, c] = (out.len() - start - HEAD).to_be_bytes();
    out[start..start + 3].copy_from_slice(&[a, b, c]);
}

pub(super) fn reset(out: &mut Vec<u8>, stream: u32, reason: Reason) {
    head(out, 4, RST_STREAM, 0, stream);
    out.extend_from_slice(&u32::from(reason).to_be_bytes());
}

/// Stream 0: the connection's window.
pub(super) fn window_update(out: &mut Vec<u8>, stream: u32, more: u32) {
    head(out, 4, WINDOW_UPDATE, 0, stream);
    out.extend_from_slice(&more.to_be_bytes());
}

pub(super) fn settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    head(out, settings.len() * 6, SETTINGS, 0, 0);
    for (name, value) in settings {
        out.extend_from_slice(&name.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

pub(super) fn settings_ack(out: &mut Vec<u8>) {
    head(out, 0, SETTINGS, ACK, 0);
}

pub(super) fn ping(out: &mut Vec<u8>, flags: u8, payload: [u8; 8]) {
    head(out, 8, PING, flags, 0);
    out.extend_from_slice(&payload);
}

/// `last`: the highest stream of the peer's that was or may be taken; 0 of a client, as there is no push.
pub(super) fn goaway(out: &mut Vec<u8>, last: u32, reason: Reason) {
    head(out, 8, GOAWAY, 0, 0);
    out.extend_from_slice(&last.to_be_bytes());
    out.extend_from_slice(&u32::from(reason).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_come_back() {
        let mut out = Vec::new();
        head(&mut out, 0x01_02_03, DATA, END_STREAM, 0x7fff_fffe);
        let read = Head::read(&out).expect("complete");
        assert_eq!(read, Head { length: 0x01_02_03, kind: DATA, flags: END_STREAM, stream: 0x7fff_fffe });
        assert!(Head::read(&out[..8]).is_none());
        out[5] |= 0x80;
        assert_eq!(Head::read(&out), Some(read), "the reserved bit means nothing");
    }

    #[test]
    fn a_length_is_filled_in_later() {
        let mut out = b"before".to_vec();
        head(&mut out, 0, HEADERS, 0, 1);
        out.extend_from_slice(&[0; 300]);
        close(&mut out, 6);
        assert_eq!(Head::read(&out[6..]).map(|head| head.length), Some(300));
    }
}
