//! Pick first (gRFC A61, A62, A113): one endpoint takes everything, until it fails.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// The endpoint that is stayed with.
#[derive(Debug)]
pub(super) struct First {
    /// [`NONE`]: none yet.
    current: AtomicUsize,
}

const NONE: usize = usize::MAX;

impl First {
    /// `current`: the one that was stayed with, which is still there.
    pub(super) fn new(current: Option<usize>) -> Self {
        Self { current: AtomicUsize::new(current.unwrap_or(NONE)) }
    }

    /// The order in which endpoints are tried: as given, or by chance and weight (gRFC A113: greatest `u^(1/weight)` first), then
    /// IPv4 and IPv6 in turn (gRFC A61, RFC 8305).
    pub(super) fn order(addresses: &[SocketAddr], weights: &[u64], shuffle: Option<u64>) -> Vec<usize> {
        let mut order: Vec<usize> = (0..addresses.len()).collect();
        if let Some(seed) = shuffle {
            let mut rng = fastrand::Rng::with_seed(seed);
            #[allow(clippy::cast_precision_loss, reason = "weights")]
            let keys: Vec<f64> = weights.iter().map(|weight| rng.f64().powf(1.0 / (*weight).max(1) as f64)).collect();
            order.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
        }
        let Some(first) = order.first().map(|i| addresses[*i].is_ipv6()) else { return order };
        let (mut same, mut other) = (Vec::new(), Vec::new());
        for i in order {
            if addresses[i].is_ipv6() == first { same.push(i) } else { other.push(i) }
        }
        let mut mixed = Vec::with_capacity(addresses.len());
        let (mut same, mut other) = (same.into_iter(), other.into_iter());
        loop {
            let before = mixed.len();
            mixed.extend(same.next());
            mixed.extend(other.next());
            if mixed.len() == before {
                return mixed;
            }
        }
    }

    pub(super) fn current(&self) -> Option<usize> {
        Some(self.current.load(Relaxed)).filter(|current| *current != NONE)
    }

    /// The current one while it is usable, else the first that is.
    pub(super) fn pick(&self, n: usize, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let current = self.current.load(Relaxed);
        if current < n && usable(current) {
            return Some(current);
        }
        let next = (0..n).find(|i| usable(*i))?;
        self.current.store(next, Relaxed);
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_with_an_endpoint_until_that_fails() {
        let first = First::new(None);
        assert_eq!(first.pick(3, |_| true), Some(0));
        assert_eq!(first.pick(3, |i| i != 0), Some(1));
        assert_eq!(first.pick(3, |_| true), Some(1), "the first one being back does not matter");
        assert_eq!(first.pick(3, |_| false), None);
        assert_eq!(First::new(Some(2)).pick(3, |_| true), Some(2));
    }

    #[test]
    fn families_take_turns() {
        let addresses: Vec<SocketAddr> =
            ["[::1]:1", "[::1]:2", "[::1]:3", "127.0.0.1:1", "127.0.0.1:2"].map(|a| a.parse().unwrap()).into();
        assert_eq!(First::order(&addresses, &[1; 5], None), [0, 3, 1, 4, 2]);
    }

    #[test]
    fn the_heavy_come_first_as_often_as_their_weight_says() {
        let addresses: Vec<SocketAddr> = (1..=3).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        let mut firsts = [0.0_f64; 3];
        for seed in 0..10_000 {
            firsts[First::order(&addresses, &[1, 2, 7], Some(seed))[0]] += 1.0;
        }
        for (count, share) in firsts.into_iter().zip([0.1, 0.2, 0.7_f64]) {
            let sigma = (10_000.0 * share * (1.0 - share)).sqrt();
            assert!((count - 10_000.0 * share).abs() < 4.0 * sigma, "{firsts:?}");
        }
    }
}
