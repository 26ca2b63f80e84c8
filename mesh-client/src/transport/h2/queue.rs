//! Bytes on their way to the socket: small ones copied together, large ones shared.

use bytes::{Buf, Bytes};
use std::io::IoSlice;

/// Up to this size copying is cheaper than a slice of its own.
const COPY: usize = 2048;
/// What the queue of an idle connection keeps of its memory.
const KEEP: usize = 8 << 10;

/// Frames to be written, in order.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) buf: Vec<u8>,
    /// Payloads, and where in `buf` each belongs.
    shared: Vec<(usize, Bytes)>,
    shared_bytes: usize,
    /// Of `buf` and `shared`, what is written already.
    buf_at: usize,
    shared_at: usize,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn len(&self) -> usize {
        self.buf.len() - self.buf_at + self.shared_bytes
    }

    /// Takes the next `length` bytes of `data`.
    pub(super) fn push(&mut self, data: &mut Bytes, length: usize) {
        if length <= COPY {
            self.buf.extend_from_slice(&data[..length]);
            data.advance(length);
        } else {
            self.shared.push((self.buf.len(), data.split_to(length)));
            self.shared_bytes += length;
        }
    }

    /// What comes next in one piece, if nothing of it is shared.
    pub(super) fn single(&self) -> Option<&[u8]> {
        self.shared.is_empty().then(|| &self.buf[self.buf_at..])
    }

    /// Fills `slices` with what comes next; returns how many.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut from = self.buf_at;
        let shared = self.shared[self.shared_at..].iter().flat_map(|(at, data)| {
            let copied = &self.buf[std::mem::replace(&mut from, *at)..*at];
            [copied, &data[..]]
        });
        let last = &self.buf[self.shared.last().map_or(self.buf_at, |(at, _)| *at).max(self.buf_at)..];
        let all = shared.chain([last]).filter(|bytes| !bytes.is_empty());
        slices.iter_mut().zip(all).map(|(slice, bytes)| *slice = IoSlice::new(bytes)).count()
    }

    /// So many bytes are written.
    pub(super) fn advance(&mut self, mut written: usize) {
        while written > 0 {
            let next = self.shared.get_mut(self.shared_at);
            let until = next.as_ref().map_or(self.buf.len(), |(at, _)| *at);
            let copied = written.min(until - self.buf_at);
            self.buf_at += copied;
            written -= copied;
            let Some((_, data)) = next else { break };
            let own = written.min(data.len());
            data.advance(own);
            self.shared_bytes -= own;
            written -= own;
            if self.buf_at == until && data.is_empty() {
                *data = Bytes::new();
                self.shared_at += 1;
            }
        }
        if self.is_empty() {
            self.clear();
        }
    }

    fn clear(&mut self) {
        self.buf.clear();
        self.shared.clear();
        self.shared_at = 0;
        self.buf_at = 0;
    }

    /// Gives memory back, for a connection that has nothing to do.
    pub(super) fn shrink(&mut self) {
        if self.is_empty() && self.buf.capacity() > KEEP {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(
            parts in prop::collection::vec((any::<bool>(), 0..3 * COPY), 0..20),
            steps in prop::collection::vec(1..2 * COPY, 1..20),
        ) {
            let (mut queue, mut expected) = (Queue::default(), Vec::new());
            for (i, (raw, length)) in parts.iter().enumerate() {
                let bytes = vec![u8::try_from(i).expect("few"); *length];
                expected.extend_from_slice(&bytes);
                if *raw {
                    queue.buf.extend_from_slice(&bytes);
                } else {
                    queue.push(&mut bytes.into(), *length);
                }
            }
            let mut out = Vec::new();
            let mut steps = steps.iter().cycle();
            while !queue.is_empty() {
                prop_assert_eq!(queue.len() + out.len(), expected.len());
                let mut slices = [IoSlice::new(&[]); 3];
                let filled = queue.slices(&mut slices);
                let all: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
                let step = (*steps.next().expect("cycle")).min(all.len());
                prop_assert!(step > 0);
                out.extend_from_slice(&all[..step]);
                queue.advance(step);
            }
            prop_assert_eq!(out, expected);
        }
    }
}
