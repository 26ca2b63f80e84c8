//! Weighted choice in constant time: an alias table (Walker, Vose), drawn from at random or in turn.

/// `n` columns of equal width; each belongs to its own index up to `threshold`, and to `alias` above it.
#[derive(Debug)]
pub(crate) struct Shares(Box<[Column]>);

#[derive(Clone, Copy, Debug)]
struct Column {
    /// Of 2^32.
    threshold: u32,
    alias: u32,
}

/// 2^64 over the golden ratio: multiples of it are spread over the circle as evenly as can be.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// 2^64 times the fraction of the square root of two: sets neighbouring columns out of step.
const ROOT_TWO: u64 = 0x6A09_E667_F3BC_C909;

impl Shares {
    /// A table of these weights; `None` when all are alike (a plain index is enough) or none is positive. Exact: integers
    /// only, up to the rounding of a column to 32 bits. At most 2^32 weights.
    pub(crate) fn new(weights: &[u32]) -> Option<Self> {
        let first = *weights.first()?;
        if weights.iter().all(|w| *w == first) {
            return None;
        }
        let n = weights.len() as u64;
        let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
        // A weight w fills w * n of a width of `total`, so that columns of `total` hold all of them.
        let mut rest: Vec<u64> = weights.iter().map(|w| u64::from(*w) * n).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..rest.len()).partition(|i| rest[*i] < total);
        let mut columns: Vec<Column> =
            (0..rest.len()).map(|i| Column { threshold: u32::MAX, alias: narrow(i) }).collect();
        while let (Some(poor), Some(rich)) = (small.pop(), large.last().copied()) {
            let threshold = (u128::from(rest[poor]) << 32) / u128::from(total);
            columns[poor] = Column { threshold: u32::try_from(threshold).unwrap_or(u32::MAX), alias: narrow(rich) };
            rest[rich] -= total - rest[poor];
            if rest[rich] < total {
                large.pop();
                small.push(rich);
            }
        }
        Some(Self(columns.into()))
    }

    /// The index at `turn` of an endless sequence in which every prefix is close to the weights: `n` turns visit each column once.
    pub(crate) fn at(&self, turn: u64) -> usize {
        let n = self.0.len() as u64;
        let (round, column) = (turn / n, turn % n);
        let coin = round.wrapping_mul(GOLDEN).wrapping_add(column.wrapping_mul(ROOT_TWO)) >> 32;
        self.resolve(index(column), u32::try_from(coin).unwrap_or(u32::MAX))
    }

    /// An index drawn with the probability of its weight.
    pub(crate) fn draw(&self, rng: &mut fastrand::Rng) -> usize {
        let column = rng.usize(..self.0.len());
        self.resolve(column, rng.u32(..))
    }

    fn resolve(&self, column: usize, coin: u32) -> usize {
        let Column { threshold, alias } = self.0[column];
        if coin < threshold { column } else { alias as usize }
    }
}

fn narrow(i: usize) -> u32 {
    u32::try_from(i).expect("fewer than 2^32 endpoints")
}

/// Of a value below the length of something in memory.
pub(super) fn index(i: u64) -> usize {
    usize::try_from(i).expect("less than a length in memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(n: usize, turns: u64, mut next: impl FnMut(u64) -> usize) -> Vec<f64> {
        let mut counts = vec![0.0; n];
        for turn in 0..turns {
            counts[next(turn)] += 1.0;
        }
        counts
    }

    /// The independent model: what each index should get.
    fn expected(weights: &[u32], turns: u64) -> Vec<f64> {
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        weights.iter().map(|w| f64::from(*w) / total * turns as f64).collect()
    }

    const CASES: &[&[u32]] = &[
        &[1, 3],
        &[90, 10],
        &[1, 1, 2],
        &[1, 0, 3],
        &[7, 13, 1, 100, 55],
        &[u32::MAX, u32::MAX - 1, 1],
        &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    ];

    #[test]
    fn equal_weights_need_no_table() {
        assert!(Shares::new(&[]).is_none());
        assert!(Shares::new(&[4, 4, 4]).is_none());
        assert!(Shares::new(&[0, 0]).is_none());
    }

    #[test]
    fn draws_have_the_probability_of_the_weight() {
        for weights in CASES {
            let shares = Shares::new(weights).unwrap();
            let mut rng = fastrand::Rng::with_seed(7);
            let turns = 200_000;
            let got = counts(weights.len(), turns, |_| shares.draw(&mut rng));
            for (got, want) in got.iter().zip(expected(weights, turns)) {
                let sigma = (want * (1.0 - want / turns as f64)).sqrt();
                assert!((got - want).abs() <= 4.0 * sigma + 1e-9, "{weights:?}: {got} for {want}");
            }
        }
    }

    #[test]
    fn turns_keep_closer_to_the_weights_than_chance_does_at_every_prefix() {
        for weights in CASES {
            let shares = Shares::new(weights).unwrap();
            let mut counts = vec![0.0; weights.len()];
            for turn in 0..20_000_u64 {
                counts[shares.at(turn)] += 1.0;
                let bound = 2.0 * weights.len() as f64 + 2.0;
                for (got, want) in counts.iter().zip(expected(weights, turn + 1)) {
                    assert!((got - want).abs() <= bound, "{weights:?} at {turn}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn an_index_of_weight_zero_never_comes() {
        let shares = Shares::new(&[0, 5, 0, 1]).unwrap();
        let mut rng = fastrand::Rng::with_seed(1);
        for turn in 0..100_000 {
            assert!([1, 3].contains(&shares.at(turn)));
            assert!([1, 3].contains(&shares.draw(&mut rng)));
        }
    }

    #[test]
    fn one_heavy_among_ten_thousand_gets_its_share() {
        let mut weights = vec![1; 10_000];
        weights[1234] = 10_000;
        let shares = Shares::new(&weights).unwrap();
        let hits = (0..100_000).filter(|turn| shares.at(*turn) == 1234).count();
        assert!((49_000..=51_100).contains(&hits), "{hits} of 100000 for a share of half");
    }
}
