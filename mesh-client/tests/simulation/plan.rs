//! What a seed stands for: a configuration, and faults with their times.

use crate::net::Healing;
use mesh_client::{Profile, retry::RetryBudget};
use std::time::Duration;

/// How the mesh is configured, and what happens to it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) profile: Profile,
    pub(crate) http2: bool,
    pub(crate) balancing: Balancing,
    pub(crate) budget: Budget,
    /// Of each call at most.
    pub(crate) retries: u32,
    /// `per_try_timeout` is set.
    pub(crate) per_try: Option<()>,
    pub(crate) outliers: Option<Outliers>,
    pub(crate) failfast: bool,
    pub(crate) backends: usize,
    /// Backends from this one on have the second priority.
    pub(crate) second: usize,
    /// Between two calls.
    pub(crate) pace: Duration,
    /// With their time, in order.
    pub(crate) faults: Vec<(Duration, Fault)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Balancing {
    RoundRobin,
    Random,
    LeastRequest,
    RingHash,
    Maglev,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Outliers {
    Consecutive,
    SuccessRate,
    FailurePercentage,
}

/// Of retries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Budget {
    /// `retry_budget`
    Percent(f64, u32),
    /// `max_retries`
    Fixed(u32),
    /// Linkerd's, from code.
    Ratio { ratio: f64, per_second: u32, ttl: Duration },
    /// gRPC's, from code.
    Throttle { tokens: u32, ratio: f64 },
}

/// To a backend, by its number; or to the control plane.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Part(usize),
    Heal(usize, Healing),
    Crash {
        backend: usize,
        silently: bool,
    },
    Restart(usize),
    Slow(usize, Duration),
    Fail(usize, u32),
    /// All of them.
    FailAll(u32),
    /// Leaves the assignment.
    Remove(usize),
    /// Joins it (again).
    Add(usize),
    ControlPlaneParts,
    ControlPlaneHeals(Healing),
    ControlPlaneCrashes,
    ControlPlaneRestarts,
}

/// All faults begin within this time.
pub(crate) const FAULTS: Duration = Duration::from_secs(10);

impl Plan {
    pub(crate) fn of(seed: u64) -> Self {
        let rng = &mut fastrand::Rng::with_seed(seed);
        let profile = if rng.bool() { Profile::Grpc } else { Profile::Envoy };
        let http2 = profile == Profile::Grpc || rng.bool();
        let balancing = match rng.u32(..8) {
            0..=2 => Balancing::RoundRobin,
            3 => Balancing::Random,
            4 | 5 => Balancing::LeastRequest,
            6 => Balancing::RingHash,
            _ => Balancing::Maglev,
        };
        let budget = match rng.u32(..4) {
            0 => Budget::Percent(f64::from(rng.u32(5..60)), rng.u32(0..4)),
            // gRPC does not heed it.
            1 if profile == Profile::Envoy => Budget::Fixed(rng.u32(0..4)),
            1 | 2 => Budget::Ratio {
                ratio: f64::from(rng.u32(5..60)) / 100.0,
                per_second: rng.u32(0..3),
                ttl: Duration::from_secs(rng.u64(1..5)),
            },
            _ => Budget::Throttle { tokens: rng.u32(2..20), ratio: f64::from(rng.u32(1..10)) / 10.0 },
        };
        let outliers = match rng.u32(..4) {
            0 => None,
            1 => Some(Outliers::SuccessRate),
            2 => Some(Outliers::FailurePercentage),
            _ => Some(Outliers::Consecutive),
        };
        let backends = rng.usize(2..7);
        let second = if rng.bool() { backends } else { rng.usize(1..backends) };
        let mut plan = Self {
            profile,
            http2,
            balancing,
            budget,
            retries: rng.u32(1..5),
            per_try: (profile == Profile::Envoy && rng.bool()).then_some(()),
            outliers,
            failfast: rng.u32(..4) == 0,
            backends,
            second,
            pace: Duration::from_millis(rng.u64(40..160)),
            faults: Vec::new(),
        };
        for _ in 0..rng.u32(2..10) {
            plan.misfortune(rng);
        }
        plan.faults.sort_by_key(|(at, _)| *at);
        plan
    }

    /// A fault, and mostly its end.
    fn misfortune(&mut self, rng: &mut fastrand::Rng) {
        let at = FAULTS.mul_f64(rng.f64());
        let end = at + Duration::from_millis(rng.u64(50..6_000));
        let backend = rng.usize(..self.backends);
        let healing = match rng.u32(..3) {
            0 => Healing::Resumes,
            // Nothing but PINGs tells that a connection is dead, and HTTP/1.1 has none.
            1 if self.http2 => Healing::Loses,
            _ => Healing::Resets,
        };
        let of_control_plane = if rng.bool() { Healing::Loses } else { Healing::Resumes };
        let (begin, finish) = match rng.u32(..12) {
            0 | 1 => (Fault::Part(backend), Fault::Heal(backend, healing)),
            2 | 3 => (Fault::Crash { backend, silently: rng.bool() }, Fault::Restart(backend)),
            4 => (Fault::Slow(backend, Duration::from_millis(rng.u64(1..5_000))), Fault::Slow(backend, Duration::ZERO)),
            5 | 6 => (Fault::Fail(backend, rng.u32(10..=100)), Fault::Fail(backend, 0)),
            7 => (Fault::Remove(backend), Fault::Add(backend)),
            8 | 9 => (Fault::FailAll(rng.u32(20..=100)), Fault::FailAll(0)),
            10 => (Fault::ControlPlaneParts, Fault::ControlPlaneHeals(of_control_plane)),
            _ => (Fault::ControlPlaneCrashes, Fault::ControlPlaneRestarts),
        };
        self.faults.push((at, begin));
        // Some that were removed stay away.
        if !matches!(finish, Fault::Add(_)) || rng.bool() {
            self.faults.push((end, finish));
        }
    }
}

impl Budget {
    /// For the builder of the mesh, where it is not the cluster's.
    pub(crate) fn of_the_mesh(self) -> Option<RetryBudget> {
        match self {
            Self::Percent(..) | Self::Fixed(_) => None,
            Self::Ratio { ratio, per_second, ttl } => Some(RetryBudget::ratio(ratio, per_second, ttl)),
            Self::Throttle { tokens, ratio } => Some(RetryBudget::throttle(tokens, ratio)),
        }
    }

    /// The most retries in flight at once while so many calls are, if that is what it limits.
    pub(crate) fn at_once(self, active: u32) -> Option<u32> {
        match self {
            Self::Percent(percent, min) => Some(min.max((f64::from(active) * percent / 100.0) as u32)),
            Self::Fixed(max) => Some(max),
            Self::Ratio { .. } | Self::Throttle { .. } => None,
        }
    }

    /// The most retries in all within this time, if that is what it limits: after so many calls, and attempts that were answered well.
    pub(crate) fn in_all(self, calls: u32, well: u32, elapsed: Duration) -> Option<f64> {
        match self {
            Self::Percent(..) | Self::Fixed(_) => None,
            // The reserve of the windows that lie in it, in part or whole.
            Self::Ratio { ratio, per_second, ttl } => {
                Some(f64::from(calls) * ratio + f64::from(per_second) * (elapsed + 2 * ttl).as_secs_f64() + 0.001)
            }
            // Each follows a failure, which costs a token; half of them are never given; what ends well gives back.
            Self::Throttle { tokens, ratio } => Some(f64::from(tokens) / 2.0 + f64::from(well) * ratio),
        }
    }
}
