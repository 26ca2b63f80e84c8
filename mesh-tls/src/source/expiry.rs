//! Says in time that a certificate is about to expire, whether or not an attempt to renew it failed.

use super::shelf::Task;
use crate::{Identity, x509::Utc};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

/// With less than this part of its lifetime left a certificate should have had a successor: who renews does so at a third or before.
const SHARE: u32 = 6;
/// How often the clock of the wall is looked at, as that of the process stands still while the machine sleeps.
const LOOK: Duration = Duration::from_secs(3600);
/// Between two alarms about the same certificate: a quarter of the time that was left at the first, within these bounds.
const PAUSES: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(24 * 3600));
/// Between two alarms that it has expired.
const EXPIRED_PAUSE: Duration = Duration::from_secs(3600);

/// Watches the certificate of one source.
#[derive(Debug)]
pub(super) struct Expiry {
    source: String,
    state: metrics::Gauge,
    /// `None`: that of whoever brings a certificate, if there is one.
    runtime: Option<Handle>,
    watch: Mutex<Option<Task>>,
}

/// What is to be said of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Good,
    /// Its successor is late.
    Soon,
    Expired,
}

/// The lifetime of a certificate.
#[derive(Clone, Copy, Debug)]
struct Lifetime {
    end: SystemTime,
    /// What is left when its successor is late.
    margin: Duration,
}

/// The time, which goes on even if the wall's clock is set back.
struct Clock {
    wall: SystemTime,
    since: Instant,
}

impl Expiry {
    pub(super) fn new(source: String, runtime: Option<Handle>) -> Self {
        metrics::describe_gauge!(
            "mesh_tls_certificate_state",
            "Whether the certificate of the source is renewed in time: 0 it is, 1 less than a sixth of its lifetime is left, 2 it has expired"
        );
        let state = metrics::gauge!("mesh_tls_certificate_state", "source" => source.clone());
        Self { source, state, runtime, watch: Mutex::default() }
    }

    /// Watches this certificate from now on, and no other.
    pub(super) fn of(&self, identity: Option<&Arc<Identity>>) {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        *watch = None;
        let Some(identity) = identity else { return };
        let runtime = self.runtime.clone().or_else(|| Handle::try_current().ok());
        let (source, state, identity) = (self.source.clone(), self.state.clone(), identity.clone());
        self.state.set(Lifetime::of(&identity).stage(SystemTime::now()).value());
        *watch = runtime.map(|runtime| runtime.spawn(async move { follow(&source, &state, &identity).await }).into());
    }
}

/// Where a certificate is in its life.
pub(super) fn stage(identity: &Identity, now: SystemTime) -> Stage {
    Lifetime::of(identity).stage(now)
}

/// Never returns.
async fn follow(source: &str, state: &metrics::Gauge, identity: &Identity) {
    let lifetime = Lifetime::of(identity);
    let clock = Clock { wall: SystemTime::now(), since: Instant::now() };
    let mut told: Option<(Stage, SystemTime)> = None;
    loop {
        let now = clock.now();
        let stage = lifetime.stage(now);
        state.set(stage.value());
        let due = |(before, at): (Stage, SystemTime)| before != stage || now >= at + lifetime.pause(stage);
        if told.is_none_or(due) {
            told = Some((stage, now));
            let expires = Utc::from(lifetime.end);
            let left = Duration::from_secs(lifetime.end.duration_since(now).unwrap_or_default().as_secs());
            let certificate = identity.name();
            match stage {
                Stage::Good => {}
                Stage::Soon => {
                    tracing::warn!(source, certificate, %expires, expires_in = ?left, "the certificate in use expires soon, and there is no newer one");
                }
                Stage::Expired => {
                    tracing::error!(source, certificate, %expires, "the certificate in use has expired, and there is no newer one: peers refuse it");
                }
            }
        }
        sleep(lifetime.next(stage, now).min(LOOK)).await;
    }
}

impl Lifetime {
    fn of(identity: &Identity) -> Self {
        let end = identity.not_after();
        let whole = end.duration_since(identity.not_before()).unwrap_or_default();
        Self { end, margin: whole / SHARE }
    }

    fn stage(&self, now: SystemTime) -> Stage {
        match self.end.duration_since(now) {
            Ok(left) if left > self.margin => Stage::Good,
            Ok(left) if !left.is_zero() => Stage::Soon,
            _ => Stage::Expired,
        }
    }

    fn pause(&self, stage: Stage) -> Duration {
        match stage {
            Stage::Good | Stage::Expired => EXPIRED_PAUSE,
            Stage::Soon => (self.margin / 4).clamp(PAUSES.0, PAUSES.1),
        }
    }

    /// How long nothing new is to be said.
    fn next(&self, stage: Stage, now: SystemTime) -> Duration {
        let left = self.end.duration_since(now).unwrap_or_default();
        match stage {
            Stage::Good => left.saturating_sub(self.margin),
            Stage::Soon => left.min(self.pause(stage)),
            Stage::Expired => self.pause(stage),
        }
        .max(Duration::from_millis(1))
    }
}

impl Stage {
    fn value(self) -> f64 {
        match self {
            Self::Good => 0.0,
            Self::Soon => 1.0,
            Self::Expired => 2.0,
        }
    }
}

impl Clock {
    fn now(&self) -> SystemTime {
        SystemTime::now().max(self.wall + self.since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_begin_at_a_sixth_of_the_lifetime_and_are_few() {
        let begin = SystemTime::UNIX_EPOCH;
        for hours in [1, 24, 24 * 90, 24 * 365] {
            let whole = Duration::from_secs(hours * 3600);
            let lifetime = Lifetime { end: begin + whole, margin: whole / SHARE };
            let (mut now, mut said) = (begin, Vec::new());
            while now < begin + whole + 3 * EXPIRED_PAUSE {
                let stage = lifetime.stage(now);
                if said.last().is_none_or(|(before, at): &(Stage, SystemTime)| {
                    *before != stage || now >= *at + lifetime.pause(stage)
                }) {
                    said.push((stage, now));
                }
                now += lifetime.next(stage, now);
            }
            let first = said.iter().find(|(stage, _)| *stage == Stage::Soon).unwrap().1;
            assert_eq!(first, begin + whole - whole / SHARE);
            let count = |of| said.iter().filter(|(stage, _)| *stage == of).count();
            assert!((4..=61).contains(&count(Stage::Soon)), "{hours} h: {said:?}");
            assert_eq!(count(Stage::Expired), 3, "{hours} h: {said:?}");
        }
    }

    #[test]
    fn a_lifetime_that_ends_before_it_begins_has_expired() {
        let end = SystemTime::UNIX_EPOCH;
        let lifetime = Lifetime { end, margin: Duration::ZERO };
        assert_eq!(lifetime.stage(end), Stage::Expired);
        assert_eq!(lifetime.stage(end - Duration::from_secs(1)), Stage::Good);
        assert!(lifetime.next(Stage::Expired, end) > Duration::ZERO);
    }
}
