//! Maglev (Envoy): every endpoint fills its share of a table in an order of its own; a request looks its hash up.

use super::{
    hash::{xxh64, xxh64_seeded},
    shares::index,
};

/// Endpoints by hash modulo the table's size.
pub(super) struct Table(Box<[u32]>);

const EMPTY: u32 = u32::MAX;

struct Builder {
    member: u32,
    offset: u64,
    skip: u64,
    next: u64,
    weight: f64,
    target: f64,
}

impl Table {
    /// One weight for each key, greater than zero; `size` is a prime. As Envoy's `OriginalMaglevTable`, so that tables are equal.
    #[allow(clippy::cast_precision_loss, reason = "weights")]
    pub(super) fn new(keys: &[String], weights: &[u64], size: u64) -> Self {
        let mut table = vec![EMPTY; index(size)];
        let total = weights.iter().sum::<u64>() as f64;
        let greatest = weights.iter().map(|weight| *weight as f64 / total).fold(0.0, f64::max);
        let mut order: Vec<u32> = (0..).take(keys.len()).collect();
        order.sort_by_key(|i| &keys[*i as usize]);
        let mut builders: Vec<Builder> = order
            .into_iter()
            .map(|member| {
                let key = keys[member as usize].as_bytes();
                Builder {
                    member,
                    offset: xxh64(key) % size,
                    skip: if size > 1 { xxh64_seeded(1, key) % (size - 1) + 1 } else { 0 },
                    next: 0,
                    weight: weights[member as usize] as f64 / total,
                    target: 0.0,
                }
            })
            .collect();
        let mut filled = 0;
        let mut iteration = 1.0;
        while filled < table.len() && !builders.is_empty() {
            for builder in &mut builders {
                if filled == table.len() {
                    break;
                }
                // The heaviest takes a place in each round, the others as often as their share of its weight.
                if iteration * builder.weight < builder.target {
                    continue;
                }
                builder.target += greatest;
                let mut at = builder.place(size);
                while table[at] != EMPTY {
                    builder.next += 1;
                    at = builder.place(size);
                }
                table[at] = builder.member;
                builder.next += 1;
                filled += 1;
            }
            iteration += 1.0;
        }
        Self(if builders.is_empty() { Box::default() } else { table.into() })
    }

    /// The endpoint of the hash, then those of the hashes made from it (Envoy's `attempt`).
    pub(super) fn tries(&self, hash: u64) -> impl Iterator<Item = usize> {
        let size = self.0.len() as u64;
        let at = move |attempt: u64| if attempt == 0 { hash } else { hash ^ (u64::MAX - attempt + 1) };
        (0..).map_while(move |attempt| self.0.get(index(at(attempt).checked_rem(size)?)).map(|i| *i as usize))
    }
}

impl Builder {
    fn place(&self, size: u64) -> usize {
        index((self.offset + self.skip.wrapping_mul(self.next)) % size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("127.0.0.1:{}", 90 + i)).collect()
    }

    fn counts(table: &Table, n: usize) -> Vec<usize> {
        let mut counts = vec![0; n];
        table.0.iter().for_each(|i| counts[*i as usize] += 1);
        counts
    }

    #[test]
    fn every_endpoint_fills_its_share() {
        let table = Table::new(&keys(10), &[1; 10], 65_537);
        assert!(counts(&table, 10).iter().all(|count| (6553..=6554).contains(count)), "{:?}", counts(&table, 10));
        let table = Table::new(&keys(3), &[1, 2, 5], 65_537);
        for (count, weight) in counts(&table, 3).into_iter().zip([1, 2, 5]) {
            assert!(count.abs_diff(65_537 * weight / 8) <= 3, "{count} for {weight}");
        }
    }

    #[test]
    fn the_order_of_the_endpoints_does_not_matter() {
        let (forward, mut backward) = (keys(5), keys(5));
        backward.reverse();
        let (a, b) = (Table::new(&forward, &[1; 5], 1009), Table::new(&backward, &[1; 5], 1009));
        assert!(a.0.iter().zip(&b.0).all(|(a, b)| forward[*a as usize] == backward[*b as usize]));
    }

    #[test]
    fn an_endpoint_that_goes_moves_little_else() {
        let before = Table::new(&keys(10), &[1; 10], 65_537);
        let after = Table::new(&keys(9), &[1; 9], 65_537);
        let moved = before.0.iter().zip(&after.0).filter(|(a, b)| **a != 9 && a != b).count();
        // Maglev gives a little of its stability for evenness: a few percent of the rest.
        assert!(moved < 65_537 / 10, "{moved}");
    }

    #[test]
    fn tries_go_on_to_other_endpoints() {
        let table = Table::new(&keys(4), &[1; 4], 65_537);
        let seen: std::collections::BTreeSet<_> = table.tries(12345).take(64).collect();
        assert_eq!(seen.len(), 4);
        assert_eq!(Table::new(&[], &[], 7).tries(1).next(), None);
    }
}
