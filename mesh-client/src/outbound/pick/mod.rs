//! Which endpoint takes a request: priority, locality, policy, each in constant time.
//!
//! A [`Picker`] is built when endpoints come, go, fail or recover, over the [`Group`]s of the priority in force. Between
//! the change of an endpoint and the next picker, picks step over it: a few draws, and at worst one look at all.

mod least_request;
mod locality;
mod priority;
mod random;
mod round_robin;
mod shares;

pub(crate) use locality::Group;

use locality::Usable;
use mesh_xds::resource::LbPolicy;
use shares::Shares;
use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
};

/// What can be picked.
pub(crate) trait Candidate {
    /// Whether it may be picked now. `panic`: although it is ejected.
    fn standing(&self, panic: bool) -> Standing;

    /// Requests in flight.
    fn load(&self) -> u32;
}

/// Whether a candidate may be picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// Ejected, or does not take connections.
    Unavailable,
    /// Somebody waits for its first connection: others go elsewhere if they can.
    Connecting,
    /// Connected, or not yet tried.
    Available,
}

/// A choice among the endpoints of one priority.
pub(crate) struct Picker<C> {
    policy: LbPolicy,
    priority: usize,
    panic: bool,
    localities: Box<[Usable<C>]>,
    /// Of the localities; `None` when their weights are alike.
    shares: Option<Shares>,
    turn: Arc<Turn>,
    size: usize,
}

/// Whose turn it is; kept from one picker to the next. On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Turn(AtomicU64);

/// Draws before a look at all. An available endpoint is missed with a chance of (share of unavailable)^8, and the next
/// picker leaves those out.
const DRAWS: usize = 8;
/// Up to this many endpoints a look at all of them costs no more than the draws did.
const SMALL: usize = 32;

impl<C: Candidate> Picker<C> {
    /// A picker over the first priority that has an available endpoint, localities without one left out. If there is none, over the
    /// ejected endpoints of the first priority that has any that take connections (Envoy's panic mode). `None`: none at all.
    ///
    /// `priorities` are the groups of each priority, highest first.
    pub(crate) fn new(policy: LbPolicy, priorities: &[Vec<Arc<Group<C>>>], turn: &Arc<Turn>) -> Option<Self> {
        let (priority, panic) = priority::in_force(priorities)?;
        let localities: Box<[_]> = priorities[priority].iter().filter_map(|group| Usable::new(group, panic)).collect();
        let weights: Vec<u32> = localities.iter().map(Usable::weight).collect();
        let size = localities.iter().map(Usable::len).sum();
        Some(Self { policy, priority, panic, localities, shares: Shares::new(&weights), turn: turn.clone(), size })
    }

    /// Picks one, not among `excluded` when there is another. `None`: all have become unavailable since the picker was built.
    #[inline]
    pub(crate) fn pick(&self, excluded: impl Fn(&Arc<C>) -> bool, rng: &mut fastrand::Rng) -> Option<&Arc<C>> {
        let first = self.draw(&excluded, rng);
        if let Drawn::Good(candidate) = first {
            return Some(candidate);
        }
        self.pick_further(first, &excluded, rng)
    }

    #[cold]
    fn pick_further<'a>(
        &'a self,
        first: Drawn<'a, C>,
        excluded: &impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<&'a Arc<C>> {
        let mut second_best = first.connecting();
        for _ in 1..DRAWS {
            match self.draw(excluded, rng) {
                Drawn::Good(candidate) => return Some(candidate),
                drawn => second_best = second_best.or(drawn.connecting()),
            }
        }
        match second_best {
            Some(candidate) if self.size > SMALL => Some(candidate),
            _ => self.look_at_all(excluded, rng),
        }
    }

    /// The priority in force.
    pub(crate) fn priority(&self) -> usize {
        self.priority
    }

    /// Whether ejected endpoints are picked, because nothing else is left.
    pub(crate) fn is_panic(&self) -> bool {
        self.panic
    }

    #[inline]
    fn draw(&self, excluded: &impl Fn(&Arc<C>) -> bool, rng: &mut fastrand::Rng) -> Drawn<'_, C> {
        let locality = match (&*self.localities, &self.shares) {
            ([only], _) => only,
            (several, shares) => {
                &several[locality::choose(self.policy, several.len(), shares.as_ref(), &self.turn, rng)]
            }
        };
        self.judge(
            match self.policy {
                LbPolicy::RoundRobin => round_robin::draw(locality),
                LbPolicy::Random => random::draw(locality, rng),
                LbPolicy::LeastRequest { choice_count } => least_request::draw(locality, choice_count, rng),
            },
            excluded,
        )
    }

    #[inline]
    fn judge<'a>(&self, candidate: &'a Arc<C>, excluded: &impl Fn(&Arc<C>) -> bool) -> Drawn<'a, C> {
        match candidate.standing(self.panic) {
            Standing::Unavailable => Drawn::Bad,
            _ if excluded(candidate) => Drawn::Bad,
            Standing::Connecting => Drawn::Connecting(candidate),
            Standing::Available => Drawn::Good(candidate),
        }
    }

    /// The best of all, from a random place on: available, else connecting, else excluded.
    fn look_at_all(&self, excluded: &impl Fn(&Arc<C>) -> bool, rng: &mut fastrand::Rng) -> Option<&Arc<C>> {
        let start = rng.usize(..self.localities.len());
        let mut best: Option<((bool, Standing), &Arc<C>)> = None;
        for locality in self.localities[start..].iter().chain(&self.localities[..start]) {
            let start = rng.usize(..locality.len());
            for i in (start..locality.len()).chain(0..start) {
                let candidate = locality.member(i);
                let rank = (!excluded(candidate), candidate.standing(self.panic));
                if rank == (true, Standing::Available) {
                    return Some(candidate);
                }
                if rank.1 > Standing::Unavailable && best.as_ref().is_none_or(|(other, _)| rank > *other) {
                    best = Some((rank, candidate));
                }
            }
        }
        best.map(|(_, candidate)| candidate)
    }
}

/// A candidate, judged.
enum Drawn<'a, C> {
    Good(&'a Arc<C>),
    Connecting(&'a Arc<C>),
    Bad,
}

impl<'a, C> Drawn<'a, C> {
    fn connecting(&self) -> Option<&'a Arc<C>> {
        match self {
            Self::Connecting(candidate) => Some(candidate),
            Self::Good(_) | Self::Bad => None,
        }
    }
}

impl Turn {
    /// Starts anywhere, so that processes that start together do not go the same way round together.
    pub(crate) fn anywhere() -> Self {
        Self(AtomicU64::new(fastrand::u32(..).into()))
    }

    fn next(&self) -> u64 {
        self.0.fetch_add(1, Relaxed)
    }

    fn same(&self) -> Self {
        Self(AtomicU64::new(self.0.load(Relaxed)))
    }
}

impl<C> fmt::Debug for Picker<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Picker")
            .field("policy", &self.policy)
            .field("priority", &self.priority)
            .field("panic", &self.panic)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
