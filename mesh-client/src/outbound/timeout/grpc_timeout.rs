//! The `grpc-timeout` header: at most eight digits and a unit (gRPC over HTTP/2, "Timeout").

use crate::headers;
use http::HeaderValue;
use std::time::Duration;

const MAX_DIGITS: u128 = 99_999_999;

/// Units from fine to coarse, with their nanoseconds.
const UNITS: [(u8, u128); 6] = [
    (b'n', 1),
    (b'u', 1_000),
    (b'm', 1_000_000),
    (b'S', 1_000_000_000),
    (b'M', 60 * 1_000_000_000),
    (b'H', 3600 * 1_000_000_000),
];

/// Parses a header value; `None` when it is not of the form `[0-9]{1,8}[HMSmun]`.
pub(crate) fn parse_grpc_timeout(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let n = digits.iter().fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
    Some(match unit {
        b'n' => Duration::from_nanos(n),
        b'u' => Duration::from_micros(n),
        b'm' => Duration::from_millis(n),
        b'S' => Duration::from_secs(n),
        b'M' => Duration::from_secs(n * 60),
        b'H' => Duration::from_secs(n * 3600),
        _ => return None,
    })
}

/// Formats in the finest unit that fits eight digits, rounded up: the server never sees less than was meant. Longer
/// than 99,999,999 hours is cut to that.
pub(crate) fn encode_grpc_timeout(timeout: Duration) -> HeaderValue {
    let nanos = timeout.as_nanos();
    let (unit, n) = UNITS
        .into_iter()
        .map(|(unit, size)| (unit, nanos.div_ceil(size)))
        .find(|(_, n)| *n <= MAX_DIGITS)
        .unwrap_or((b'H', MAX_DIGITS));
    let mut text = [0u8; 9];
    let mut at = text.len() - 1;
    text[at] = unit;
    let mut n = u32::try_from(n).unwrap_or(99_999_999);
    loop {
        at -= 1;
        text[at] = b'0' + u8::try_from(n % 10).unwrap_or(0);
        n /= 10;
        if n == 0 {
            break;
        }
    }
    headers::value(&text[at..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Option<Duration> {
        parse_grpc_timeout(&HeaderValue::from_str(text).unwrap())
    }

    #[test]
    fn every_unit_is_read() {
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(parse("82m"), Some(Duration::from_millis(82)));
        assert_eq!(parse("7u"), Some(Duration::from_micros(7)));
        assert_eq!(parse("0n"), Some(Duration::ZERO));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in ["", "S", "1", "1s", "+1S", "-1S", " 1S", "123456789S", "1.5S", "1SS", "1h"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_finest_unit_that_fits_is_written() {
        let text = |d: Duration| encode_grpc_timeout(d).to_str().unwrap().to_owned();
        assert_eq!(text(Duration::ZERO), "0n");
        assert_eq!(text(Duration::from_nanos(99_999_999)), "99999999n");
        assert_eq!(text(Duration::from_nanos(100_000_001)), "100001u");
        assert_eq!(text(Duration::from_secs(100)), "100000m");
        assert_eq!(text(Duration::MAX), "99999999H");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_never_shorter_and_hardly_longer(nanos in 0u64..u64::MAX) {
            let meant = Duration::from_nanos(nanos);
            let read = parse_grpc_timeout(&encode_grpc_timeout(meant)).unwrap();
            prop_assert!(read >= meant);
            // Eight digits of a unit that is up to a thousand times the next smaller one.
            prop_assert!(read - meant <= meant / 100_000 + Duration::from_nanos(1));
        }
    }
}
