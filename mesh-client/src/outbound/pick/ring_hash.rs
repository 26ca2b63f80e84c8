//! Ring hash (gRFC A42): every endpoint has places on a ring, in number by its weight; a request goes to the next place from its hash on.

use super::{hash, shares::index};
use mesh_xds::resource::RingHash;
use std::fmt::Write as _;

/// Places by hash, and where to look for a hash first.
pub(super) struct Ring {
    places: Box<[Place]>,
    /// The first place at or after each of `2^bits` equal parts of the circle: looking a hash up takes constant time.
    starts: Box<[u32]>,
    bits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    hash: u64,
    member: u32,
}

impl Ring {
    /// One weight for each key, greater than zero. `cap` limits both sizes of the configuration (gRFC A42: 4096).
    pub(super) fn new(keys: &[String], weights: &[u64], config: &RingHash, cap: u64) -> Self {
        let mut places = places(keys, weights, config, cap);
        places.sort_unstable();
        let bits = usize::BITS - places.len().next_power_of_two().leading_zeros() - 1;
        let mut starts = Vec::with_capacity(1 << bits);
        let mut at = 0;
        for part in 0..1_u64 << bits {
            let from = part.checked_shl(64 - bits).unwrap_or(0);
            while at < places.len() && places[at].hash < from {
                at += 1;
            }
            starts.push(u32::try_from(at).unwrap_or(u32::MAX));
        }
        Self { places: places.into(), starts: starts.into(), bits }
    }

    /// Places; at least one for someone, if there are endpoints at all.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The endpoints from the hash on, once around; each as often as it has places.
    pub(super) fn from(&self, hash: u64) -> impl Iterator<Item = usize> {
        let part = hash.checked_shr(64 - self.bits).unwrap_or(0);
        let mut at = self.starts.get(index(part)).map_or(0, |at| *at as usize);
        while self.places.get(at).is_some_and(|place| place.hash < hash) {
            at += 1;
        }
        let (before, after) = self.places.split_at(at.min(self.places.len()));
        after.iter().chain(before).map(|place| place.member as usize)
    }
}

/// As C-core and Envoy place them, so that rings are equal: `scale` makes the least weight fill whole places, and every endpoint takes
/// places until the sum of the scaled weights so far is reached.
#[allow(clippy::cast_precision_loss, reason = "as in the reference")]
fn places(keys: &[String], weights: &[u64], config: &RingHash, cap: u64) -> Vec<Place> {
    let (min_size, max_size) = (config.min_size.min(cap), config.max_size.min(cap));
    let total = weights.iter().sum::<u64>() as f64;
    let normal = |weight: &u64| *weight as f64 / total;
    let least = weights.iter().map(normal).fold(f64::INFINITY, f64::min);
    if !least.is_finite() || least <= 0.0 {
        return Vec::new();
    }
    let scale = ((least * min_size as f64).ceil() / least).min(max_size as f64);
    let mut places = Vec::new();
    let (mut current, mut target) = (0.0, 0.0);
    let mut key = String::new();
    for (member, (endpoint, weight)) in (0..).zip(keys.iter().zip(weights)) {
        key.clear();
        key.push_str(endpoint);
        key.push('_');
        let stem = key.len();
        target += scale * normal(weight);
        let mut i = 0_u32;
        while current < target {
            key.truncate(stem);
            // Writing to a String cannot fail.
            let _ = write!(key, "{i}");
            places.push(Place { hash: hash::of_entry(config.function, key.as_bytes()), member });
            i += 1;
            current += 1.0;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn keys(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("10.0.{}.{}:8080", i / 256, i % 256)).collect()
    }

    /// The independent model: sort all places, take the first at or after the hash by a plain search.
    fn naive(keys: &[String], weights: &[u64], config: &RingHash, hash: u64) -> usize {
        let mut all: Vec<Place> = places(keys, weights, config, u64::MAX);
        all.sort();
        all.iter().find(|place| place.hash >= hash).unwrap_or(&all[0]).member as usize
    }

    #[test]
    fn a_hash_goes_to_the_next_place() {
        let mut rng = fastrand::Rng::with_seed(4);
        for (n, min_size) in [(1, 1), (1, 1024), (3, 8), (10, 1024), (100, 1000), (500, 1024)] {
            let (keys, weights) = (keys(n), vec![1; n]);
            let config = RingHash { min_size, ..RingHash::default() };
            let ring = Ring::new(&keys, &weights, &config, u64::MAX);
            for hash in (0..200).map(|_| rng.u64(..)).chain([0, 1, u64::MAX]) {
                assert_eq!(ring.from(hash).next(), Some(naive(&keys, &weights, &config, hash)), "{n} {hash:x}");
            }
        }
    }

    #[test]
    fn sizes_are_those_of_a42() {
        let size = |weights: &[u64], min_size, max_size, cap| {
            let config = RingHash { min_size, max_size, ..RingHash::default() };
            let ring = Ring::new(&keys(weights.len()), weights, &config, cap);
            let mut counts = vec![0; weights.len()];
            ring.places.iter().for_each(|place| counts[place.member as usize] += 1);
            counts
        };
        // grpc-go's ring_test: weights 3, 3, 4 of 10, at least 1, 10, 20 places.
        assert_eq!(
            size(&[3, 3, 4], 1, 20, 4096),
            [1, 1, 2][..].to_vec().into_iter().zip([0; 3]).map(|(a, _)| a).collect::<Vec<_>>()
        );
        assert_eq!(size(&[3, 3, 4], 10, 20, 4096), [3, 3, 4]);
        assert_eq!(size(&[3, 3, 4], 1024, 8192, 4096).iter().sum::<i32>(), 1027);
        assert_eq!(size(&[1; 10], 1024, 8192, 4096).iter().sum::<i32>(), 1030);
        assert_eq!(size(&[1; 10], 1 << 20, 8 << 20, 4096).iter().sum::<i32>(), 4096, "the cap of gRPC clients");
        // More endpoints than places: some have none.
        assert_eq!(size(&[1; 100], 8, 50, 4096).iter().sum::<i32>(), 50);
    }

    #[test]
    fn an_endpoint_that_goes_moves_only_its_own_requests_and_weights_are_kept() {
        let weights = [1, 2, 3, 4];
        let config = RingHash { min_size: 100_000, ..RingHash::default() };
        let all = keys(4);
        let ring = Ring::new(&all, &weights, &config, u64::MAX);
        let mut counts = BTreeMap::<usize, f64>::new();
        let mut rng = fastrand::Rng::with_seed(9);
        let hashes: Vec<u64> = (0..20_000).map(|_| rng.u64(..)).collect();
        for hash in &hashes {
            *counts.entry(ring.from(*hash).next().unwrap()).or_default() += 1.0;
        }
        for (i, weight) in weights.iter().enumerate() {
            let share = counts[&i] / hashes.len() as f64;
            assert!((share - *weight as f64 / 10.0).abs() < 0.02, "{i} got {share}");
        }
        // The ring without the last: equal weights, so that the scale is the same for those that stay.
        let config = RingHash { min_size: 1000, ..config };
        let (four, three) =
            (Ring::new(&all, &[1; 4], &config, u64::MAX), Ring::new(&all[..3], &[1; 3], &config, u64::MAX));
        let moved = hashes
            .iter()
            .map(|hash| (four.from(*hash).next().unwrap(), three.from(*hash).next().unwrap()))
            .filter(|(before, after)| *before != 3 && before != after)
            .count();
        // The rest may move where the rings differ in size (1000 places of four, 1002 of three).
        assert!(moved < hashes.len() / 4, "{moved} of {} moved", hashes.len());
    }

    #[test]
    fn walking_on_from_a_place_that_fails_is_the_ring_without_it() {
        let (all, config) = (keys(5), RingHash::default());
        let ring = Ring::new(&all, &[1; 5], &config, u64::MAX);
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..1000 {
            let hash = rng.u64(..);
            let order: Vec<_> = ring.from(hash).collect();
            assert_eq!(order.len(), ring.len());
            let next = order.iter().find(|i| **i != order[0]).unwrap();
            let mut rest: Vec<Place> = ring.places.iter().copied().filter(|p| p.member as usize != order[0]).collect();
            rest.sort();
            assert_eq!(rest.iter().find(|p| p.hash >= hash).unwrap_or(&rest[0]).member as usize, *next);
        }
    }
}
