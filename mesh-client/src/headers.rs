//! Headers on the path of every request: found without hashing, written without an allocation for each.

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::cell::RefCell;

/// Bytes of one of the blocks that values share: room for those of a few hundred requests in flight.
const BLOCK: usize = 8 << 10;

thread_local! {
    /// The block of the next values, and the one before it. That one is used again when all its values are gone, as those of unary
    /// calls are by then; else it is freed with the last of them.
    static BLOCKS: RefCell<[BytesMut; 2]> = RefCell::new([BytesMut::new(), BytesMut::new()]);
}

/// The first value of `name`. Requests and responses have few headers: comparing their names costs less than hashing one.
pub(crate) fn find<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    headers.iter().find_map(|(other, value)| (other == name).then_some(value))
}

/// A short value, in memory shared with the values made before it.
///
/// # Panics
/// `text` has bytes that no header value may have.
pub(crate) fn value(text: &[u8]) -> HeaderValue {
    let text = BLOCKS.with_borrow_mut(|[block, spare]| {
        if block.capacity() < text.len() {
            std::mem::swap(block, spare);
            if !block.try_reclaim(BLOCK.max(text.len())) {
                *block = BytesMut::with_capacity(BLOCK.max(text.len()));
            }
        }
        block.extend_from_slice(text);
        block.split().freeze()
    });
    HeaderValue::from_maybe_shared(text).expect("the caller's text is a legal header value")
}

/// A number as a value.
pub(crate) fn decimal(mut number: u64) -> HeaderValue {
    let mut text = [0; 20];
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
        if number == 0 {
            return value(&text[at..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_full() {
        for number in [0, 7, 10, 69, 1 << 20, u64::MAX] {
            assert_eq!(decimal(number), HeaderValue::from(number));
        }
    }

    #[test]
    fn values_outlive_their_block_and_may_be_longer_than_one() {
        let texts = [1, 55, BLOCK / 2, BLOCK, BLOCK + 1, 3 * BLOCK, 2].map(|length| "x".repeat(length));
        let values: Vec<HeaderValue> = texts.iter().map(|text| value(text.as_bytes())).collect();
        assert!(values.iter().zip(&texts).all(|(value, text)| value == text));
    }

    #[test]
    fn a_block_is_used_again_when_its_values_are_gone() {
        let address = |value: &HeaderValue| value.as_bytes().as_ptr().addr();
        let half = "x".repeat(BLOCK / 2);
        let places: Vec<usize> = (0..12).map(|_| address(&value(half.as_bytes()))).collect();
        let distinct: std::collections::BTreeSet<_> = places.iter().collect();
        assert_eq!(distinct.len(), 4, "two halves of two blocks");
    }

    #[test]
    fn the_first_of_several_values_is_found() {
        let mut headers = HeaderMap::new();
        headers.insert("a", HeaderValue::from_static("1"));
        headers.append("b", HeaderValue::from_static("2"));
        headers.append("b", HeaderValue::from_static("3"));
        let find = |name| find(&headers, &HeaderName::from_static(name));
        assert_eq!((find("b"), find("c")), (Some(&HeaderValue::from_static("2")), None));
    }
}
