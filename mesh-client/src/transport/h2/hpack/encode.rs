//! Writing header blocks.

use super::{ENTRY, STATIC, TABLE_SIZE, names};
use http::{HeaderName, HeaderValue, StatusCode, header};
use std::collections::VecDeque;

/// Places of the indexes below; a power of two. Two that fall on one place only cost some compression.
const PLACES: usize = 64;

/// The writing side of a connection's header compression.
#[derive(Debug)]
pub(in super::super) struct Encoder {
    /// The newest last.
    entries: VecDeque<Entry>,
    /// Entries ever made, wrapping.
    made: u32,
    size: usize,
    max: usize,
    /// The smallest size since the last block, if it changed: the peer has to hear of it first.
    resized: Option<usize>,
    /// By the hash of name and value, and of the name: the number of the newest such entry.
    by_field: [u32; PLACES],
    by_name: [u32; PLACES],
    /// Hashes of fields that were sent once and not kept.
    seen: [u32; PLACES],
}

#[derive(Debug)]
struct Entry {
    hash: u32,
    /// Its name in the static table; 0: not there, but in `text` before the value.
    fixed: usize,
    /// Where the value begins in `text`.
    split: usize,
    text: Box<[u8]>,
}

/// Name of a field: by its place in the static table, or spelled out.
#[derive(Clone, Copy)]
struct Key<'a> {
    fixed: usize,
    text: &'a [u8],
}

impl Default for Encoder {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            made: 0,
            size: 0,
            max: TABLE_SIZE,
            resized: None,
            by_field: [0; PLACES],
            by_name: [0; PLACES],
            seen: [0; PLACES],
        }
    }
}

impl Entry {
    fn size(&self) -> usize {
        let name = if self.fixed == 0 { 0 } else { names::TABLE[self.fixed - 1].0.len() };
        name + self.text.len() + ENTRY
    }

    fn is(&self, key: Key<'_>, value: &[u8]) -> bool {
        self.has_name(key) && &self.text[self.split..] == value
    }

    fn has_name(&self, key: Key<'_>) -> bool {
        self.fixed == key.fixed && &self.text[..self.split] == key.text
    }
}

impl Encoder {
    /// The peer's SETTINGS_HEADER_TABLE_SIZE. More than the default is not used.
    pub(in super::super) fn resize(&mut self, max: usize) {
        let max = max.min(TABLE_SIZE);
        if max == self.max {
            return;
        }
        self.max = max;
        self.resized = Some(self.resized.map_or(self.max, |smallest| smallest.min(self.max)));
        self.evict(0);
    }

    /// Begins a block.
    pub(in super::super) fn begin(&mut self, out: &mut Vec<u8>) {
        if let Some(smallest) = self.resized.take() {
            if smallest < self.max {
                integer(out, 0x20, 5, smallest);
            }
            integer(out, 0x20, 5, self.max);
        }
    }

    /// `:method`, `:scheme`, `:authority` or `:path`, by the index of its first static entry.
    pub(in super::super) fn pseudo(&mut self, fixed: usize, value: &[u8], out: &mut Vec<u8>) {
        let twin = fixed != names::AUTHORITY;
        match names::TABLE.get(fixed - 1..=fixed) {
            Some([first, _]) if first.1.as_bytes() == value && twin => integer(out, 0x80, 7, fixed),
            Some([_, second]) if second.1.as_bytes() == value && twin => integer(out, 0x80, 7, fixed + 1),
            _ => self.field(Key { fixed, text: &[] }, value, true, out),
        }
    }

    /// `:status`.
    pub(in super::super) fn status(&mut self, status: StatusCode, out: &mut Vec<u8>) {
        let fixed = match status.as_u16() {
            200 => 8,
            204 => 9,
            206 => 10,
            304 => 11,
            400 => 12,
            404 => 13,
            500 => 14,
            _ => return self.field(Key { fixed: names::STATUS, text: &[] }, status.as_str().as_bytes(), true, out),
        };
        integer(out, 0x80, 7, fixed);
    }

    /// A header. Sensitive ones are marked so for all who forward them; credentials never enter the table.
    pub(in super::super) fn header(&mut self, name: &HeaderName, value: &HeaderValue, out: &mut Vec<u8>) {
        let fixed = names::index(name);
        let key = Key { fixed, text: if fixed == 0 { name.as_str().as_bytes() } else { &[] } };
        if value.is_sensitive() {
            let index = self.name(key);
            literal(out, 0x10, 4, index, key, value.as_bytes());
            return;
        }
        // Guessed one by one, they could be found out by the size of what is sent (RFC 7541 section 7.1).
        let secret = matches!(
            *name,
            header::AUTHORIZATION | header::PROXY_AUTHORIZATION | header::COOKIE | header::CONTENT_LENGTH
        );
        self.field(key, value.as_bytes(), !secret, out);
    }

    fn field(&mut self, key: Key<'_>, value: &[u8], keep: bool, out: &mut Vec<u8>) {
        let name_hash = if key.fixed != 0 { hash(key.fixed as u64, &[]) } else { hash(0, key.text) };
        let field_hash = hash(name_hash, value);
        let (place, low) = place(field_hash);
        if let Some(index) = self.find(self.by_field[place], |entry| entry.hash == low && entry.is(key, value)) {
            return integer(out, 0x80, 7, index);
        }
        let index = self.name_at(key, name_hash);
        // A name that is not in the tables is worth an entry, whatever comes with it.
        // One that is half of the table would cost more entries than it is worth.
        let fits = key.text.len() + value.len() + ENTRY <= self.max / 2;
        if keep && fits && (index == 0 || self.seen[place] == low) {
            literal(out, 0x40, 6, index, key, value);
            self.insert(key, value, low);
            self.by_field[place] = self.made;
            self.by_name[self::place(name_hash).0] = self.made;
        } else {
            self.seen[place] = low;
            literal(out, 0x00, 4, index, key, value);
        }
    }

    /// Index of an entry with this name; 0: there is none.
    fn name(&self, key: Key<'_>) -> usize {
        if key.fixed != 0 { key.fixed } else { self.name_at(key, hash(0, key.text)) }
    }

    fn name_at(&self, key: Key<'_>, name_hash: u64) -> usize {
        if key.fixed != 0 {
            return key.fixed;
        }
        self.find(self.by_name[place(name_hash).0], |entry| entry.has_name(key)).unwrap_or(0)
    }

    /// Index of the entry of this number, if it is there still and is it.
    fn find(&self, number: u32, is: impl FnOnce(&Entry) -> bool) -> Option<usize> {
        let age = self.made.wrapping_sub(number) as usize;
        let at = self.entries.len().checked_sub(age + 1)?;
        is(self.entries.get(at)?).then_some(STATIC + 1 + age)
    }

    fn insert(&mut self, key: Key<'_>, value: &[u8], hash: u32) {
        let text = [key.text, value].concat().into_boxed_slice();
        let entry = Entry { hash, fixed: key.fixed, split: key.text.len(), text };
        let size = entry.size();
        self.evict(size);
        if size <= self.max {
            self.size += size;
            self.made = self.made.wrapping_add(1);
            self.entries.push_back(entry);
        }
    }

    /// Makes room for so much.
    fn evict(&mut self, room: usize) {
        while self.size + room > self.max
            && let Some(oldest) = self.entries.pop_front()
        {
            self.size -= oldest.size();
        }
    }
}

fn literal(out: &mut Vec<u8>, kind: u8, prefix: u32, index: usize, key: Key<'_>, value: &[u8]) {
    integer(out, kind, prefix, index);
    if index == 0 {
        string(out, key.text);
    }
    string(out, value);
}

/// RFC 7541 section 5.1, below the bits of `kind`.
fn integer(out: &mut Vec<u8>, kind: u8, prefix: u32, number: usize) {
    let mask = (1usize << prefix) - 1;
    if number < mask {
        out.push(kind | low(number));
        return;
    }
    out.push(kind | low(mask));
    let mut rest = number - mask;
    while rest >= 0x80 {
        out.push(low(rest) | 0x80);
        rest >>= 7;
    }
    out.push(low(rest));
}

fn string(out: &mut Vec<u8>, text: &[u8]) {
    integer(out, 0, 7, text.len());
    out.extend_from_slice(text);
}

/// The lowest byte.
fn low(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

/// Where a hash is looked up, and what tells it from others there.
fn place(hash: u64) -> (usize, u32) {
    let [a, b, c, d, place, ..] = hash.to_le_bytes();
    // Zero stands for nothing.
    (usize::from(place) % PLACES, u32::from_le_bytes([a, b, c, d]) | 1)
}

/// Mixes eight bytes at a time; what it finds is compared, so it need not be strong.
fn hash(seed: u64, text: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |state: u64, word: u64| (state.rotate_left(23) ^ word).wrapping_mul(FACTOR);
    let (words, rest) = text.as_chunks::<8>();
    let state = words.iter().fold(mix(seed, text.len() as u64), |state, word| mix(state, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let state = mix(state, u64::from_le_bytes(last));
    state ^ state >> 29
}
