//! Reading header blocks.

use super::{ENTRY, Malformed, STATIC, TABLE_SIZE, huffman, names};
use bytes::{Buf, Bytes};
use http::{HeaderName, HeaderValue};
use std::{collections::VecDeque, sync::LazyLock};

static TABLE: LazyLock<Vec<Field>> = LazyLock::new(|| {
    let field = |&(name, value): &(&'static str, &'static str)| Field {
        name: Name::parse(name.as_bytes()),
        value: Some(HeaderValue::from_static(value)),
        name_len: name.len(),
        size: name.len() + value.len() + ENTRY,
    };
    names::TABLE.iter().map(field).collect()
});

/// The name of a field.
#[derive(Clone, Debug)]
pub(in super::super) enum Name {
    /// `:status`
    Status,
    /// `:method`
    Method,
    /// `:scheme`
    Scheme,
    /// `:authority`
    Authority,
    /// `:path`
    Path,
    /// Any other pseudo header.
    Pseudo,
    Header(HeaderName),
    /// Not a name that HTTP/2 allows.
    Invalid,
}

/// One field of a header block.
#[derive(Clone, Debug)]
pub(in super::super) struct Field {
    pub(in super::super) name: Name,
    /// `None`: not a value that HTTP allows.
    pub(in super::super) value: Option<HeaderValue>,
    name_len: usize,
    /// What it counts towards SETTINGS_MAX_HEADER_LIST_SIZE.
    pub(in super::super) size: usize,
}

/// The reading side of a connection's header compression.
#[derive(Debug)]
pub(in super::super) struct Decoder {
    /// The newest last.
    entries: VecDeque<Field>,
    size: usize,
    max: usize,
    /// No value shares the memory of its block.
    pub(in super::super) copies: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { entries: VecDeque::new(), size: 0, max: TABLE_SIZE, copies: false }
    }
}

impl Name {
    fn parse(name: &[u8]) -> Self {
        match name {
            b":status" => Self::Status,
            b":method" => Self::Method,
            b":scheme" => Self::Scheme,
            b":authority" => Self::Authority,
            b":path" => Self::Path,
            [b':', ..] => Self::Pseudo,
            name => HeaderName::from_lowercase(name).map_or(Self::Invalid, Self::Header),
        }
    }
}

impl Decoder {
    /// Hands each field of `block` to `each`, in order.
    ///
    /// Values that do not enter the table share the memory of `block`, unless [`copies`](Self::copies) is set.
    ///
    /// # Errors
    ///
    /// The block breaks the format; the connection cannot be used any more.
    pub(in super::super) fn decode(&mut self, block: &Bytes, mut each: impl FnMut(Field)) -> Result<(), Malformed> {
        let mut rest: &[u8] = block;
        let mut begun = false;
        while let Some(&first) = rest.first() {
            if first & 0x80 != 0 {
                let index = integer(&mut rest, 7)?;
                each(self.entry(index)?.clone());
            } else if first & 0xe0 == 0x20 {
                let max = integer(&mut rest, 5)?;
                if begun || max > TABLE_SIZE {
                    return Err(Malformed("header table size"));
                }
                self.max = max;
                self.evict(0);
                continue;
            } else {
                let keep = first & 0x40 != 0;
                let index = integer(&mut rest, if keep { 6 } else { 4 })?;
                let (name, name_len) = if index == 0 {
                    let name = string(block, &mut rest)?;
                    (Name::parse(&name), name.len())
                } else {
                    let entry = self.entry(index)?;
                    (entry.name.clone(), entry.name_len)
                };
                let value = string(block, &mut rest)?;
                let size = name_len + value.len() + ENTRY;
                // What stays in the table must not hold on to the whole of what was read.
                let value = if keep || self.copies {
                    HeaderValue::from_bytes(&value).ok()
                } else {
                    HeaderValue::from_maybe_shared(value).ok()
                };
                let field = Field { name, value, name_len, size };
                if keep {
                    self.insert(field.clone());
                }
                each(field);
            }
            begun = true;
        }
        Ok(())
    }

    fn entry(&self, index: usize) -> Result<&Field, Malformed> {
        let missing = Malformed("index of a header that is not in the table");
        let at = index.checked_sub(1).ok_or(missing)?;
        if at < STATIC {
            return Ok(&TABLE[at]);
        }
        self.entries.len().checked_sub(at - STATIC + 1).and_then(|at| self.entries.get(at)).ok_or(missing)
    }

    fn insert(&mut self, field: Field) {
        self.evict(field.size);
        if field.size <= self.max {
            self.size += field.size;
            self.entries.push_back(field);
        }
    }

    /// Makes room for so much.
    fn evict(&mut self, room: usize) {
        while self.size + room > self.max
            && let Some(oldest) = self.entries.pop_front()
        {
            self.size -= oldest.size;
        }
    }
}

/// RFC 7541 section 5.1.
fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, Malformed> {
    const CUT: Malformed = Malformed("header block ends within a number");
    let mask = (1usize << prefix) - 1;
    let mut number = usize::from(rest.first().copied().ok_or(CUT)?) & mask;
    rest.advance(1);
    if number < mask {
        return Ok(number);
    }
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(rest.first().copied().ok_or(CUT)?);
        rest.advance(1);
        number += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Malformed("number in a header block"))
}

/// RFC 7541 section 5.2.
fn string(block: &Bytes, rest: &mut &[u8]) -> Result<Bytes, Malformed> {
    let coded = rest.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(rest, 7)?;
    let (text, after) = rest.split_at_checked(length).ok_or(Malformed("header block ends within a string"))?;
    *rest = after;
    if !coded {
        return Ok(block.slice_ref(text));
    }
    // The shortest code has five bits.
    let mut decoded = Vec::with_capacity(length * 8 / 5);
    huffman::decode(text, &mut decoded)?;
    Ok(decoded.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(decoder: &mut Decoder, hex: &str) -> Result<Vec<(String, String)>, Malformed> {
        let hex: String = hex.split_whitespace().collect();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect();
        let mut seen = Vec::new();
        decoder.decode(&bytes.into(), |field| {
            let name = match field.name {
                Name::Header(name) => name.to_string(),
                other => format!("{other:?}"),
            };
            seen.push((name, field.value.expect("value").to_str().expect("text").to_owned()));
        })?;
        Ok(seen)
    }

    #[test]
    fn responses_of_the_standard() {
        // RFC 7541 appendix C.6: Huffman coded, with a table that holds across blocks (but is larger here).
        let mut decoder = Decoder::default();
        let first = all(
            &mut decoder,
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718
             63c7 8f0b 97c8 e9ae 82ae 43d3",
        );
        let date = ("date".to_owned(), "Mon, 21 Oct 2013 20:13:21 GMT".to_owned());
        assert_eq!(first.as_ref().expect("read")[0], ("Status".to_owned(), "302".to_owned()));
        assert_eq!(first.as_ref().expect("read")[2], date);
        let second = all(&mut decoder, "4883 640e ffc1 c0bf").expect("read");
        assert_eq!(second[0], ("Status".to_owned(), "307".to_owned()));
        assert_eq!(second[1..], first.expect("read")[1..]);
    }

    #[test]
    fn the_table_keeps_to_its_size() {
        let mut decoder = Decoder::default();
        all(&mut decoder, "40 01 61 01 31").expect("read");
        assert_eq!(all(&mut decoder, "be").expect("read"), [("a".to_owned(), "1".to_owned())]);
        // Size 33: one byte too few for it.
        assert_eq!(all(&mut decoder, "3f 02 be"), Err(Malformed("index of a header that is not in the table")));
        all(&mut decoder, "40 01 61 01 31").expect("an entry larger than the table empties it");
        assert!(decoder.entries.is_empty() && decoder.size == 0);
    }

    #[test]
    fn what_cannot_be_read() {
        for bad in
            ["80", "c0", "ff ff ff ff ff 7f", "40", "40 02 61", "00 01 61 05 31", "3f e2 1f", "88 20", "00 81 00 00"]
        {
            assert!(all(&mut Decoder::default(), bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_and_values_that_http_forbids_are_told() {
        let mut fields = Vec::new();
        let block = Bytes::from_static(b"\x00\x01A\x011\x00\x01a\x01\x0a\x00\x05:path\x01/\x00\x03:pa\x01/");
        Decoder::default().decode(&block, |field| fields.push(field)).expect("well formed");
        assert!(matches!(fields[0].name, Name::Invalid));
        assert!(matches!(fields[1], Field { name: Name::Header(_), value: None, .. }));
        assert!(matches!((&fields[2].name, &fields[3].name), (Name::Path, Name::Pseudo)));
    }
}
