//! Header compression (RFC 7541).
//!
//! What we send is never Huffman coded, and enters the peer's table when it is seen a second time: headers of every request cost a
//! byte each, those that differ each time are copied and disturb nothing.

mod decode;
mod encode;
mod huffman;
pub(super) mod names;

pub(super) use decode::{Decoder, Field, Name};
pub(super) use encode::Encoder;

/// Bytes of the dynamic table of either direction, unless SETTINGS says less (RFC 9113 section 6.5.2).
const TABLE_SIZE: usize = 4096;
/// What an entry counts beside its name and value (RFC 7541 section 4.1).
const ENTRY: usize = 32;
/// The entries of the static table come first.
const STATIC: usize = 61;

/// A header block that cannot be read: the connection is lost with it, as the tables of both sides differ from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    fn round_trip(blocks: &[Vec<(String, String, bool)>], sizes: &[usize]) {
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        for (i, fields) in blocks.iter().enumerate() {
            let mut out = Vec::new();
            if let Some(&size) = sizes.get(i) {
                encoder.resize(size);
            }
            encoder.begin(&mut out);
            for (name, value, sensitive) in fields {
                let name = HeaderName::try_from(name.as_str()).expect("name");
                let mut value = HeaderValue::try_from(value.as_str()).expect("value");
                value.set_sensitive(*sensitive);
                encoder.header(&name, &value, &mut out);
            }
            let mut seen = Vec::new();
            let read = decoder.decode(&Bytes::from(out), |field| {
                let Name::Header(name) = field.name else { panic!("not a header") };
                seen.push((name, field.value.expect("a value")));
            });
            read.expect("our own block");
            let sent: Vec<_> = fields
                .iter()
                .map(|(n, v, _)| {
                    (HeaderName::try_from(n.as_str()).expect("n"), HeaderValue::try_from(v.as_str()).expect("v"))
                })
                .collect();
            assert_eq!(seen, sent);
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            blocks in prop::collection::vec(
                prop::collection::vec(("(te|date|x-[a-d]|x-long-[a-z]{30})", "[ -~]{0,3}|[a-c]{200}", any::<bool>()), 0..12),
                1..30,
            ),
            sizes in prop::collection::vec(prop_oneof![Just(0usize), 0..300usize, Just(4096), Just(100_000)], 0..30),
        ) {
            round_trip(&blocks, &sizes);
        }

        #[test]
        fn no_block_makes_the_decoder_panic(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..5)) {
            let mut decoder = Decoder::default();
            for block in blocks {
                if decoder.decode(&Bytes::from(block), |_| {}).is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn headers_of_every_request_become_one_byte_each() {
        let mut encoder = Encoder::default();
        let mut block = |id: &str| {
            let mut out = Vec::new();
            encoder.begin(&mut out);
            encoder.pseudo(names::METHOD, b"POST", &mut out);
            encoder.pseudo(names::PATH, b"/helloworld.Greeter/SayHello", &mut out);
            encoder.header(&http::header::CONTENT_TYPE, &HeaderValue::from_static("application/grpc"), &mut out);
            let name = HeaderName::from_static("x-request-id");
            encoder.header(&name, &HeaderValue::try_from(id).expect("value"), &mut out);
            out.len()
        };
        block("1");
        block("2");
        // Method, path, type; and the name by its index, its value in full.
        assert_eq!(block("3"), 3 + 2 + 2);
    }
}
