//! Bounded load (Envoy `hash_balance_factor`): an endpoint that has more than its share of the requests in flight passes on.

use super::{hash::xxh64, shares::index};

/// How much load each endpoint may have.
#[derive(Debug)]
pub(super) struct Bound {
    /// Percent of the fair share.
    factor: u64,
    /// Of all, adding up to 1.
    shares: Box<[f64]>,
}

impl Bound {
    pub(super) fn new(factor: u32, weights: &[u64]) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "weights")]
        let total = weights.iter().sum::<u64>() as f64;
        #[allow(clippy::cast_precision_loss, reason = "weights")]
        let shares = weights.iter().map(|weight| *weight as f64 / total).collect();
        Self { factor: factor.into(), shares }
    }

    /// The endpoint itself while it has a slot free, else the first that has in an order that the hash gives, else the one with the
    /// least load for its slots. `in_flight` is that of the whole cluster; `load` is `None` for who cannot be picked.
    pub(super) fn choose(&self, first: usize, hash: u64, in_flight: u32, load: impl Fn(usize) -> Option<u32>) -> usize {
        let slots = (u64::from(in_flight) + 1) * self.factor;
        #[allow(clippy::cast_precision_loss, reason = "a count of requests")]
        let slots = slots.div_ceil(100) as f64;
        let overload = |i: usize| {
            let own = (slots * self.shares[i]).ceil().max(1.0);
            load(i).map(|load| f64::from(load) / own)
        };
        let mut best = (overload(first).unwrap_or(f64::INFINITY), first);
        if best.0 < 1.0 {
            return first;
        }
        // A walk through all by a step that has no factor in common with their number.
        let n = self.shares.len() as u64;
        let mixed = xxh64(&hash.to_le_bytes());
        let mut step = 1 + (mixed >> 32) % n;
        while gcd(step, n) != 1 {
            step = step % n + 1;
        }
        let mut at = mixed % n;
        for _ in 0..n {
            let i = index(at);
            if let Some(overload) = overload(i)
                && overload < best.0
            {
                best = (overload, i);
                if overload < 1.0 {
                    break;
                }
            }
            at = (at + step) % n;
        }
        best.1
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_keeps_within_its_share_and_the_same_hash_goes_to_the_same_other() {
        let bound = Bound::new(150, &[1; 10]);
        // 40 in flight: 62 slots, 7 for each.
        assert_eq!(bound.choose(3, 99, 40, |_| Some(6)), 3);
        let busy = |i: usize| Some(if i == 3 { 7 } else { 0 });
        let other = bound.choose(3, 99, 40, busy);
        assert_ne!(other, 3);
        assert_eq!(bound.choose(3, 99, 40, busy), other);
        let spread: std::collections::BTreeSet<_> =
            (0..1000).map(|hash| bound.choose(3, hash << 7, 40, busy)).collect();
        assert_eq!(spread.len(), 9, "different hashes go to different others");
    }

    #[test]
    fn when_all_are_full_the_least_loaded_takes_it() {
        let bound = Bound::new(100, &[1, 1, 2]);
        let loads = [9, 8, 12];
        assert_eq!(bound.choose(0, 5, 0, |i| Some(loads[i])), 1);
        assert_eq!(bound.choose(0, 5, 0, |i| (i != 1).then_some(loads[i])), 0);
    }
}
