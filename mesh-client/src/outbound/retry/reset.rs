//! Response headers that say when to come back: `Retry-After`, `X-RateLimit-Reset` and their like.

use http::HeaderMap;
use mesh_xds::resource::{ResetFormat, ResetHeader};
use std::time::{Duration, SystemTime};

/// What the first of `headers` that can be read asks for; more than `max` is passed over (Envoy's `rate_limited_retry_back_off`).
/// Whole numbers only: Envoy reads no dates either.
pub(super) fn interval(
    headers: &[ResetHeader],
    max: Duration,
    response: &HeaderMap,
    now: SystemTime,
) -> Option<Duration> {
    headers.iter().find_map(|header| {
        let number: u64 = response.get(&header.name)?.to_str().ok()?.trim().parse().ok()?;
        let interval = match header.format {
            ResetFormat::Seconds => Duration::from_secs(number),
            ResetFormat::UnixTime => {
                let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(number))?;
                at.duration_since(now).ok()?
            }
        };
        (interval <= max).then_some(interval)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_header_that_is_there_and_short_enough_counts() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let header = |name: &str, format| ResetHeader { name: name.parse().unwrap(), format };
        let headers = [header("retry-after", ResetFormat::Seconds), header("x-reset", ResetFormat::UnixTime)];
        let read = |values: &[(&'static str, &str)]| {
            let response = values.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            interval(&headers, Duration::from_secs(60), &response, now).map(|interval| interval.as_secs())
        };
        assert_eq!(read(&[("retry-after", "7"), ("x-reset", "1003")]), Some(7));
        assert_eq!(read(&[("retry-after", "61"), ("x-reset", "1003")]), Some(3));
        assert_eq!(read(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]), None);
        assert_eq!(read(&[("x-reset", "999")]), None, "in the past");
        assert_eq!(read(&[("x-reset", "1061")]), None, "too far");
        assert_eq!(read(&[("x-reset", "18446744073709551615")]), None);
        assert_eq!(read(&[]), None);
    }
}
