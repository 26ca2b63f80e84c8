//! Places for handshakes, of which nobody can take all.

use super::Limits;
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The handshakes of one listening socket, by where they come from: an IPv4 address, or the /64 of an IPv6 address, which is what one host has.
#[derive(Debug)]
pub(super) struct Handshakes {
    all: Arc<Semaphore>,
    most: usize,
    share: usize,
    /// Those that have or want a place.
    sources: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
}

/// A place. What is dropped first is given back first.
#[derive(Debug)]
pub(super) struct Place {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
    _claim: Claim,
}

/// Somebody has or wants a place.
#[derive(Debug)]
struct Claim {
    handshakes: Arc<Handshakes>,
    source: IpAddr,
    /// `None`: dropped.
    own: Option<Arc<Semaphore>>,
}

impl Handshakes {
    pub(super) fn new(limits: &Limits) -> Self {
        let places = |limit: usize| limit.clamp(1, Semaphore::MAX_PERMITS);
        let (most, share) = (places(limits.max_handshakes), places(limits.max_handshakes_per_address));
        Self { all: Arc::new(Semaphore::new(most)), most, share, sources: Mutex::default() }
    }

    /// Whether these limits are its own.
    pub(super) fn are_of(&self, limits: &Limits) -> bool {
        let other = Self::new(limits);
        (self.most, self.share) == (other.most, other.share)
    }

    /// Waits for a place: behind others from there first, and only then behind all.
    ///
    /// # Cancel safety
    /// Whoever gives up gives up its turn.
    pub(super) async fn place(self: &Arc<Self>, remote: IpAddr) -> Place {
        const OPEN: &str = "the semaphore is never closed";
        let (claim, own) = self.claim(source(remote));
        let own = own.acquire_owned().await.expect(OPEN);
        let all = Arc::clone(&self.all).acquire_owned().await.expect(OPEN);
        Place { _all: all, _own: own, _claim: claim }
    }

    fn claim(self: &Arc<Self>, source: IpAddr) -> (Claim, Arc<Semaphore>) {
        let mut sources = self.sources();
        let own = sources.entry(source).or_insert_with(|| Arc::new(Semaphore::new(self.share)));
        let own = Arc::clone(own);
        (Claim { handshakes: Arc::clone(self), source, own: Some(Arc::clone(&own)) }, own)
    }

    fn sources(&self) -> MutexGuard<'_, HashMap<IpAddr, Arc<Semaphore>>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut sources = self.handshakes.sources();
        self.own = None;
        if sources.get(&self.source).is_some_and(|own| Arc::strong_count(own) == 1) {
            sources.remove(&self.source);
        }
    }
}

/// What counts as one client.
fn source(remote: IpAddr) -> IpAddr {
    match remote.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::poll;
    use std::pin::pin;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_client_is_an_address_or_a_64() {
        assert_eq!(source(ip("::ffff:10.0.0.1")), ip("10.0.0.1"));
        assert_eq!(source(ip("2001:db8:1:2:3:4:5:6")), ip("2001:db8:1:2::"));
        assert_ne!(source(ip("2001:db8:1:2::1")), source(ip("2001:db8:1:3::1")));
    }

    #[tokio::test]
    async fn who_has_its_share_waits_alone_and_nothing_is_kept_of_it() {
        let limits = Limits::default().max_handshakes(3).max_handshakes_per_address(2);
        let handshakes = Arc::new(Handshakes::new(&limits));
        assert!(handshakes.are_of(&limits) && !handshakes.are_of(&limits.clone().max_handshakes(4)));
        let first = handshakes.place(ip("10.0.0.1")).await;
        let second = handshakes.place(ip("10.0.0.1")).await;
        {
            let mut third = pin!(handshakes.place(ip("10.0.0.1")));
            assert!(poll!(&mut third).is_pending());
            let mut other = pin!(handshakes.place(ip("10.0.0.2")));
            assert!(poll!(&mut other).is_ready());
            drop(first);
            assert!(poll!(&mut third).is_ready(), "its turn among its own");
        }
        assert_eq!(handshakes.sources().len(), 1, "who gave up, or is through, is forgotten");
        drop(second);
        assert_eq!((handshakes.sources().len(), handshakes.all.available_permits()), (0, 3));
    }
}
