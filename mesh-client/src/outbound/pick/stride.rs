//! Weighted round robin by the weights that endpoints report (gRFC A58): the static stride scheduler.

use super::{Candidate, locality::Usable, shares::index};
use mesh_xds::resource::WeightedRoundRobin;
use std::sync::Arc;
use tokio::time::Instant;

/// Weights as a share of the greatest, which is [`MAX`].
#[derive(Debug)]
pub(super) struct Stride(Box<[u16]>);

const MAX: u64 = u16::MAX as u64;
/// Weights are kept within these times their mean, so that no endpoint makes the search for the next one long (C-core, grpc-go).
const MAX_RATIO: f64 = 10.0;
const MIN_RATIO: f64 = 0.1;

impl Stride {
    /// Of the endpoints' weights now. `None`: fewer than two have one, so that plain round robin holds.
    pub(super) fn of<C: Candidate>(locality: &Usable<C>, config: &WeightedRoundRobin, now: Instant) -> Option<Self> {
        let weights: Vec<Option<f64>> =
            (0..locality.len()).map(|i| locality.member(i).reported_weight(config, now)).collect();
        Self::new(&weights)
    }

    fn new(weights: &[Option<f64>]) -> Option<Self> {
        let known: Vec<f64> = weights.iter().flatten().copied().filter(|weight| *weight > 0.0).collect();
        if known.len() < 2 {
            return None;
        }
        let greatest = known.iter().copied().fold(0.0, f64::max);
        #[allow(clippy::cast_precision_loss, reason = "a count of endpoints")]
        let unscaled_mean = known.iter().sum::<f64>() / known.len() as f64;
        #[allow(clippy::cast_precision_loss, reason = "16 bits")]
        let full = MAX as f64;
        let most = greatest.min(unscaled_mean * MAX_RATIO);
        let scale = full / most;
        let mean = (scale * unscaled_mean).round();
        let least = (mean * MIN_RATIO).ceil();
        let scaled = |weight: &Option<f64>| {
            let weight = match weight {
                Some(weight) if *weight > 0.0 => (weight.min(most) * scale).round().max(least),
                // Unweighted endpoints get the mean (gRFC A58).
                _ => mean,
            };
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
            let weight = weight as u16;
            weight.max(1)
        };
        Some(Self(weights.iter().map(scaled).collect()))
    }

    /// The next one: `turns` counts up. Each endpoint is looked at once a generation, and taken as often as its weight says.
    pub(super) fn next(&self, mut turns: impl FnMut() -> u64) -> usize {
        let n = self.0.len() as u64;
        loop {
            let turn = turns();
            let (generation, at) = (turn / n, turn % n);
            let weight = u64::from(self.0[index(at)]);
            // Sets neighbours out of step.
            let offset = if at % 2 == 1 { MAX / 2 } else { 0 };
            if (weight * generation + offset) % MAX >= MAX - weight {
                return index(at);
            }
        }
    }
}

/// The next one by its weight.
#[inline]
pub(super) fn draw<'a, C>(locality: &'a Usable<C>, stride: &Stride) -> &'a Arc<C> {
    locality.member(stride.next(|| locality.next_turn()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(weights: &[Option<f64>], picks: usize) -> Vec<usize> {
        let stride = Stride::new(weights).unwrap();
        let (mut turn, mut counts) = (0, vec![0; weights.len()]);
        for _ in 0..picks {
            counts[stride.next(|| {
                turn += 1;
                turn - 1
            })] += 1;
        }
        counts
    }

    #[test]
    fn picks_are_in_proportion_to_the_weights() {
        let weights = [Some(1.0), Some(2.0), Some(3.0), Some(4.0)];
        for (count, share) in counts(&weights, 10_000).into_iter().zip([0.1, 0.2, 0.3, 0.4]) {
            assert!((count as f64 - 10_000.0 * share).abs() <= 20.0, "{count} for {share}");
        }
    }

    #[test]
    fn an_endpoint_without_a_weight_gets_the_mean() {
        let counts = counts(&[Some(1.0), Some(3.0), None], 6000);
        assert!(counts[2].abs_diff(2000) <= 10, "{counts:?}");
    }

    #[test]
    fn fewer_than_two_weights_are_none() {
        assert!(Stride::new(&[Some(1.0), None, None]).is_none());
        assert!(Stride::new(&[None, Some(0.0), Some(4.0)]).is_none());
    }

    #[test]
    fn a_weight_is_kept_within_a_tenth_and_ten_times_the_mean() {
        let mut weights = vec![Some(1.0); 99];
        weights.push(Some(1e9));
        let counts = counts(&weights, 100_000);
        // The mean is 1e7; the least anyone has is a tenth of it, and the greatest stands at ten times.
        assert!(counts[0] >= 400, "{}", counts[0]);
        assert!(counts[99] <= 70_000, "{}", counts[99]);
    }
}
