//! Huffman decoding of header strings (RFC 7541 section 5.2). We send none.

use super::Malformed;

/// Bits of the code of each byte (RFC 7541 appendix B). The code is canonical: these lengths say it all.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26,
];
const LONGEST: usize = 30;
/// Codes of so many bits are found at once: all of what headers are made of.
const FAST: usize = 10;

static CODE: Code = Code::new();

struct Code {
    /// By the next [`FAST`] bits: the byte and, above it, the length of its code; 0: the code is longer.
    fast: [u16; 1 << FAST],
    /// By length: the first code, how many there are, and where their bytes begin in `bytes`.
    first: [u32; LONGEST + 1],
    count: [u32; LONGEST + 1],
    start: [u32; LONGEST + 1],
    /// All bytes, by the length of their code, then by value.
    bytes: [u8; 256],
}

impl Code {
    const fn new() -> Self {
        let mut code = Self {
            fast: [0; 1 << FAST],
            first: [0; LONGEST + 1],
            count: [0; LONGEST + 1],
            start: [0; LONGEST + 1],
            bytes: [0; 256],
        };
        let (mut length, mut next, mut placed) = (1u16, 0u32, 0u32);
        while length as usize <= LONGEST {
            next <<= 1;
            code.first[length as usize] = next;
            code.start[length as usize] = placed;
            let mut byte = 0u8;
            loop {
                if LENGTHS[byte as usize] as u16 == length {
                    code.bytes[placed as usize] = byte;
                    placed += 1;
                    code.count[length as usize] += 1;
                    if length as usize <= FAST {
                        let spare = FAST - length as usize;
                        let mut at = (next as usize) << spare;
                        while at < (next as usize + 1) << spare {
                            code.fast[at] = length << 8 | byte as u16;
                            at += 1;
                        }
                    }
                    next += 1;
                }
                if byte == u8::MAX {
                    break;
                }
                byte += 1;
            }
            length += 1;
        }
        code
    }

    /// The byte whose code begins `window`, and its length.
    fn find(&self, window: u32) -> Option<(u8, usize)> {
        let [length, byte] = self.fast[(window >> (32 - FAST)) as usize].to_be_bytes();
        if length != 0 {
            return Some((byte, length as usize));
        }
        (FAST + 1..=LONGEST).find_map(|length| {
            let nth = (window >> (32 - length)).checked_sub(self.first[length])?;
            (nth < self.count[length]).then(|| (self.bytes[(self.start[length] + nth) as usize], length))
        })
    }
}

/// Appends what `text` stands for.
pub(super) fn decode(text: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let mut input = text.iter();
    // The bits read and not yet used are the low ones.
    let (mut bits, mut ready) = (0u64, 0usize);
    loop {
        while ready <= 56
            && let Some(&byte) = input.next()
        {
            bits = bits << 8 | u64::from(byte);
            ready += 8;
        }
        if ready == 0 {
            return Ok(());
        }
        // The next 32 bits, with ones where there are no more: as the padding is.
        let window = if ready >= 32 { bits >> (ready - 32) } else { bits << (32 - ready) | ((1 << (32 - ready)) - 1) };
        let [.., a, b, c, d] = window.to_be_bytes();
        let window = u32::from_be_bytes([a, b, c, d]);
        match CODE.find(window) {
            Some((byte, length)) if length <= ready => {
                out.push(byte);
                ready -= length;
            }
            // Less than a byte of ones ends a string; more would be a code of its own, which may not be sent.
            _ if ready < 8 && window == u32::MAX => return Ok(()),
            _ => return Err(Malformed("Huffman code")),
        }
    }
}

#[cfg(test)]
pub(super) fn encode(text: &[u8]) -> Vec<u8> {
    let mut bits = String::new();
    for &byte in text {
        let length = usize::from(LENGTHS[usize::from(byte)]);
        let of_length = (0..=255u8).filter(|&other| usize::from(LENGTHS[usize::from(other)]) == length);
        let nth = u32::try_from(of_length.take_while(|&other| other != byte).count()).expect("small");
        bits += &format!("{:0length$b}", CODE.first[length] + nth);
    }
    while !bits.len().is_multiple_of(8) {
        bits.push('1');
    }
    bits.as_bytes()
        .chunks(8)
        .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).expect("digits"), 2).expect("a byte"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(text: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        decode(text, &mut out).ok().map(|()| out)
    }

    #[test]
    fn the_examples_of_the_standard() {
        // RFC 7541 appendix C.4 and C.6.
        for (hex, text) in [
            ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
            ("a8eb10649cbf", "no-cache"),
            ("25a849e95ba97d7f", "custom-key"),
            ("6402", "302"),
            ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("9d29ad171863c78f0b97c8e9ae82ae43d3", "https://www.example.com"),
        ] {
            let bytes: Vec<u8> =
                (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect();
            assert_eq!(decoded(&bytes).as_deref(), Some(text.as_bytes()));
            assert_eq!(encode(text.as_bytes()), bytes);
        }
    }

    #[test]
    fn every_byte_comes_back() {
        for byte in 0..=255u8 {
            for text in [vec![byte], vec![byte; 9], vec![b'a', byte, b'z']] {
                assert_eq!(decoded(&encode(&text)), Some(text));
            }
        }
    }

    #[test]
    fn padding_is_less_than_a_byte_of_ones() {
        assert_eq!(decoded(&[]), Some(vec![]));
        assert_eq!(decoded(&[0b0000_0111]).as_deref(), Some(&b"0"[..]));
        assert_eq!(decoded(&[0b0000_0000]), None, "zeros are no padding");
        assert_eq!(decoded(&[0xff]), None, "a whole byte of padding");
        assert_eq!(decoded(&[0xff; 4]), None, "the end of a string, spelled out");
    }
}
