//! Random subsetting (gRFC A68): every client uses a part of the endpoints, its own and the same for its whole life.

use super::{Candidate, Group, hash::xxh64_seeded};
use std::sync::Arc;

/// `size` endpoints of each priority, those whose address has the smallest hash with the client's seed (rendezvous hashing: an endpoint
/// that comes or goes changes at most one of the part).
pub(super) fn part<C: Candidate>(priorities: &[Vec<Arc<Group<C>>>], size: u32, seed: u64) -> Vec<Vec<Arc<Group<C>>>> {
    priorities.iter().map(|groups| part_of(groups, size as usize, seed)).collect()
}

fn part_of<C: Candidate>(groups: &[Arc<Group<C>>], size: usize, seed: u64) -> Vec<Arc<Group<C>>> {
    let mut ranked: Vec<(u64, usize, usize)> = Vec::new();
    for (g, group) in groups.iter().enumerate() {
        for (i, member) in group.members().iter().enumerate() {
            ranked.push((xxh64_seeded(seed, member.address().to_string().as_bytes()), g, i));
        }
    }
    if ranked.len() <= size {
        return groups.to_vec();
    }
    ranked.select_nth_unstable(size);
    ranked.truncate(size);
    let mut kept = vec![Vec::new(); groups.len()];
    for (_, g, i) in ranked {
        kept[g].push(i);
    }
    let part = |(group, mut kept): (&Arc<Group<C>>, Vec<usize>)| {
        kept.sort_unstable();
        (!kept.is_empty()).then(|| Arc::new(group.part(&kept)))
    };
    groups.iter().zip(kept).filter_map(part).collect()
}
