//! Latencies in log-linear buckets: fixed memory, no allocation while recording, under 2 % error.

use std::time::Duration;

const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
const LEN: usize = SUB * 36;

/// Counts of durations, from one nanosecond to about a minute.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u32>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; LEN], total: 0 }
    }
}

impl Histogram {
    /// Adds one duration; those above the range count in the last bucket.
    pub fn record(&mut self, value: Duration) {
        let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        self.counts[index(nanos)] += 1;
        self.total += 1;
    }

    /// Adds all that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
    }

    /// How many durations were recorded.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.total
    }

    /// Whether nothing was recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The duration that `percent` (0..=100) of the recorded ones do not exceed; zero when empty.
    #[must_use]
    pub fn percentile(&self, percent: u64) -> Duration {
        let rank = (self.total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank {
                return Duration::from_nanos(lower_bound(bucket));
            }
        }
        Duration::ZERO
    }
}

/// Values below `SUB` have a bucket each; above, each power of two is cut into `SUB` parts.
fn index(nanos: u64) -> usize {
    let Some(shift) = (63 - nanos.max(1).leading_zeros()).checked_sub(SUB_BITS) else {
        return usize::try_from(nanos).unwrap_or(0);
    };
    let part = usize::try_from(nanos >> shift).unwrap_or(0) - SUB;
    (SUB * (shift as usize + 1) + part).min(LEN - 1)
}

fn lower_bound(bucket: usize) -> u64 {
    let (power, part) = (bucket / SUB, (bucket % SUB) as u64);
    if power == 0 { part } else { (part + SUB as u64) << (power - 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_two_percent() {
        let mut histogram = Histogram::default();
        for micros in 1..=10_000_u64 {
            histogram.record(Duration::from_micros(micros));
        }
        assert_eq!(histogram.len(), 10_000);
        for (percent, exact) in [(50, 5_000_f64), (90, 9_000.0), (99, 9_900.0), (100, 10_000.0)] {
            let found = histogram.percentile(percent).as_secs_f64() * 1e6;
            assert!((found / exact - 1.0).abs() < 0.02, "p{percent}: {found}");
        }
    }

    #[test]
    fn every_bucket_holds_its_lower_bound() {
        for bucket in 0..LEN {
            assert_eq!(index(lower_bound(bucket)), bucket);
        }
        assert_eq!(index(u64::MAX), LEN - 1);
    }

    #[test]
    fn merge_adds_up() {
        let (mut a, mut b) = (Histogram::default(), Histogram::default());
        a.record(Duration::from_millis(1));
        b.record(Duration::from_millis(3));
        a.merge(&b);
        assert_eq!(a.len(), 2);
        assert!(a.percentile(100) > Duration::from_millis(2));
        assert!(Histogram::default().is_empty());
    }
}
