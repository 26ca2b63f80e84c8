//! Zone-aware routing (Envoy): our own zone first, as long as it does not get more than its share of all clients' requests.

use super::{Candidate, OwnZone, Usable};

/// Weights of the localities. When it is not known which zone is ours, none of them is, or there are too few endpoints, each gets the
/// weight of its endpoints.
///
/// Envoy `ZoneAwareLoadBalancerBase::regenerateLocalityRoutingStructures`: with at least as many endpoints as clients our zone keeps
/// everything; else it gets what it can serve, and the others share the rest by what they have to spare.
#[allow(clippy::cast_precision_loss, reason = "counts of endpoints")]
pub(super) fn weights<C: Candidate>(
    localities: &[Usable<C>],
    enabled: f64,
    min_cluster_size: u64,
    own: Option<&OwnZone>,
) -> Vec<u32> {
    let total: usize = localities.iter().map(Usable::len).sum();
    let even = || localities.iter().map(|l| u32::try_from(l.len()).unwrap_or(u32::MAX)).collect();
    let Some(OwnZone { locality, share: own_share }) = own else { return even() };
    let Some(own) = localities.iter().position(|l| l.member(0).locality() == *locality) else { return even() };
    if (total as u64) < min_cluster_size || enabled <= 0.0 {
        return even();
    }
    let shares: Vec<f64> = localities.iter().map(|l| l.len() as f64 / total as f64).collect();
    let kept = (shares[own] / own_share.max(f64::MIN_POSITIVE)).min(1.0);
    let others = 1.0 - shares[own];
    let aware = |i: usize| match i == own {
        true => kept,
        false if others > 0.0 => (1.0 - kept) * shares[i] / others,
        false => 0.0,
    };
    let enabled = enabled / 100.0;
    (0..localities.len())
        .map(|i| {
            let share = enabled * aware(i) + (1.0 - enabled) * shares[i];
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 0..=1e6")]
            let weight = (share * 1e6).round() as u32;
            weight
        })
        .collect()
}
