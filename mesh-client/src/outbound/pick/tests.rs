use super::*;
use mesh_xds::resource::{ConsistentHashing, Maglev, RingHash};
use std::sync::atomic::{AtomicBool, AtomicU32};

/// A candidate whose standing and load the test sets.
#[derive(Debug)]
struct Fake {
    id: usize,
    standing: AtomicU32,
    ejected: AtomicBool,
    load: AtomicU32,
}

const LEAST: LbPolicy = LbPolicy::least_request(2);
fn policies() -> [LbPolicy; 3] {
    [LbPolicy::RoundRobin, LbPolicy::Random, LEAST]
}

fn plain() -> PickInput<'static> {
    PickInput::plain(Instant::now())
}

impl Candidate for Fake {
    fn standing(&self, panic: bool) -> Standing {
        if self.ejected.load(Relaxed) && !panic {
            return Standing::Unavailable;
        }
        [Standing::Unavailable, Standing::Connecting, Standing::Available][self.standing.load(Relaxed) as usize]
    }

    fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    fn load(&self) -> u32 {
        self.load.load(Relaxed)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 0], u16::try_from(self.id).unwrap()))
    }

    fn hash_key(&self, _: bool) -> String {
        self.address().to_string()
    }

    fn joined(&self) -> Instant {
        Instant::now()
    }

    fn cost(&self, _: &Ewma, _: u64) -> u32 {
        self.load()
    }

    fn reported_weight(&self, _: &WeightedRoundRobin, _: Instant) -> Option<f64> {
        None
    }

    fn locality(&self) -> LocalityId {
        LocalityId::default()
    }

    fn lb_metadata(&self) -> BTreeMap<String, MetadataValue> {
        BTreeMap::new()
    }

    fn info(&self, _: u32) -> EndpointInfo {
        unreachable!("no policy here asks for it")
    }
}

impl Fake {
    fn set(&self, standing: Standing) {
        self.standing.store(standing as u32, Relaxed);
    }
}

fn fakes(ids: std::ops::Range<usize>) -> Vec<Arc<Fake>> {
    ids.map(|id| {
        let standing = AtomicU32::new(Standing::Available as u32);
        Arc::new(Fake { id, standing, ejected: AtomicBool::new(false), load: AtomicU32::new(0) })
    })
    .collect()
}

fn group(members: &[Arc<Fake>], weights: &[u32], weight: u32) -> Arc<Group<Fake>> {
    // A weight of 0 stands for an endpoint that the control plane says is not to be used.
    let classes = weights.iter().map(|w| if *w == 0 { Class::Unusable } else { Class::Usable }).collect();
    Arc::new(Group::new(members.to_vec(), weights.to_vec(), classes, weight, Turn::default()))
}

fn picker(policy: LbPolicy, priorities: &[Vec<Arc<Group<Fake>>>]) -> Option<Picker<Fake>> {
    Picker::new(&Recipe::of(policy, Instant::now()), priorities, &Arc::default(), None, Instant::now())
}

fn flat(policy: LbPolicy, members: &[Arc<Fake>]) -> Picker<Fake> {
    picker(policy, &[vec![group(members, &vec![1; members.len()], 1)]]).unwrap()
}

/// How often each of `n` is picked in `times` picks.
fn counts(picker: &Picker<Fake>, n: usize, times: usize) -> Vec<usize> {
    let mut rng = fastrand::Rng::with_seed(42);
    let mut counts = vec![0; n];
    for _ in 0..times {
        counts[picker.pick(&plain(), |_| false, &mut rng).unwrap().id] += 1;
    }
    counts
}

/// Each count within four standard deviations of its share; the rarest may come once.
fn assert_shares(counts: &[usize], shares: &[f64]) {
    let total = counts.iter().sum::<usize>() as f64;
    for (i, (count, share)) in counts.iter().zip(shares).enumerate() {
        let sigma = (total * share * (1.0 - share)).sqrt();
        let off = (*count as f64 - total * share).abs();
        assert!(off <= 4.0 * sigma + 1.0, "{i}: {count} of {total} for a share of {share} in {counts:?}");
    }
}

#[test]
fn round_robin_goes_round() {
    let picker = flat(LbPolicy::RoundRobin, &fakes(0..3));
    let mut rng = fastrand::Rng::with_seed(1);
    let ids: Vec<_> = (0..7).map(|_| picker.pick(&plain(), |_| false, &mut rng).unwrap().id).collect();
    assert_eq!(ids, [0, 1, 2, 0, 1, 2, 0]);
}

#[test]
fn round_robin_is_even_over_threads() {
    let picker = flat(LbPolicy::RoundRobin, &fakes(0..10));
    let hits: Vec<AtomicU32> = (0..10).map(|_| AtomicU32::new(0)).collect();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (picker, hits) = (&picker, &hits);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                for _ in 0..1000 {
                    hits[picker.pick(&plain(), |_| false, &mut rng).unwrap().id].fetch_add(1, Relaxed);
                }
            });
        }
    });
    assert!(hits.iter().all(|hits| hits.load(Relaxed) == 400), "{hits:?}");
}

#[test]
fn the_turn_goes_on_in_the_next_picker() {
    let (members, turn) = (fakes(0..4), Arc::default());
    let groups = [vec![group(&members, &[1; 4], 1)]];
    let mut rng = fastrand::Rng::with_seed(1);
    let ids: Vec<_> = (0..4)
        .map(|_| {
            let picker =
                Picker::new(&Recipe::of(LbPolicy::RoundRobin, Instant::now()), &groups, &turn, None, Instant::now())
                    .unwrap();
            picker.pick(&plain(), |_| false, &mut rng).unwrap().id
        })
        .collect();
    assert_eq!(ids, [0, 1, 2, 3]);
}

#[test]
fn weights_are_kept_by_every_policy() {
    let weights = [1, 2, 3, 10];
    let shares = weights.map(|w| f64::from(w) / 16.0);
    for policy in policies() {
        let picker = picker(policy.clone(), &[vec![group(&fakes(0..4), &weights, 1)]]).unwrap();
        assert_shares(&counts(&picker, 4, 160_000), &shares);
    }
    let picker = picker(LbPolicy::RoundRobin, &[vec![group(&fakes(0..4), &weights, 1)]]).unwrap();
    for (count, weight) in counts(&picker, 4, 1600).into_iter().zip(weights) {
        assert!(count.abs_diff(weight as usize * 100) <= 4, "round robin: {count} for {}", weight * 100);
    }
}

#[test]
fn localities_take_their_weight_whatever_their_size() {
    let members = fakes(0..5);
    for policy in policies() {
        let groups = vec![group(&members[..1], &[1], 80), group(&members[1..], &[1; 4], 20)];
        let picker = picker(policy.clone(), &[groups]).unwrap();
        assert_shares(&counts(&picker, 5, 50_000), &[0.8, 0.05, 0.05, 0.05, 0.05]);
    }
}

#[test]
fn a_locality_without_an_available_endpoint_leaves_its_share_to_the_others() {
    let members = fakes(0..3);
    members[0].set(Standing::Unavailable);
    for policy in policies() {
        let groups =
            vec![group(&members[..1], &[1], 98), group(&members[1..2], &[1], 1), group(&members[2..], &[1], 1)];
        let picker = picker(policy.clone(), &[groups]).unwrap();
        assert_shares(&counts(&picker, 3, 10_000), &[0.0, 0.5, 0.5]);
    }
}

#[test]
fn the_first_priority_with_an_available_endpoint_takes_all() {
    let members = fakes(0..3);
    let priorities: Vec<_> = members.chunks(1).map(|member| vec![group(member, &[1], 1)]).collect();
    for policy in policies() {
        let in_force = || picker(policy.clone(), &priorities).map(|picker| counts(&picker, 3, 100));
        assert_eq!(in_force(), Some(vec![100, 0, 0]));
        members[0].set(Standing::Unavailable);
        assert_eq!(in_force(), Some(vec![0, 100, 0]));
        members[1].ejected.store(true, Relaxed);
        assert_eq!(in_force(), Some(vec![0, 0, 100]));
        members[2].set(Standing::Unavailable);
        assert_eq!(in_force(), Some(vec![0, 100, 0]), "panic: the ejected one is better than none");
        members[1].set(Standing::Unavailable);
        assert_eq!(in_force(), None);
        for member in &members {
            member.set(Standing::Available);
            member.ejected.store(false, Relaxed);
        }
    }
}

#[test]
fn a_weight_of_zero_is_never_picked_nor_does_it_make_a_priority_available() {
    let members = fakes(0..3);
    for policy in policies() {
        let priorities = [vec![group(&members[..1], &[0], 1)], vec![group(&members[1..], &[0, 5], 1)]];
        let picker = picker(policy.clone(), &priorities).unwrap();
        assert_eq!((picker.priority(), counts(&picker, 3, 1000)), (1, vec![0, 0, 1000]));
    }
}

#[test]
fn an_endpoint_that_fails_after_the_build_is_stepped_over() {
    for policy in policies() {
        let members = fakes(0..3);
        let picker = flat(policy.clone(), &members);
        members[1].set(Standing::Unavailable);
        assert_shares(&counts(&picker, 3, 3000), &[0.5, 0.0, 0.5]);
        members[0].ejected.store(true, Relaxed);
        assert_eq!(counts(&picker, 3, 1000), [0, 0, 1000]);
        members[2].set(Standing::Unavailable);
        assert!(picker.pick(&plain(), |_| false, &mut fastrand::Rng::with_seed(1)).is_none());
    }
}

#[test]
fn round_robin_stays_even_over_those_that_are_left() {
    let members = fakes(0..5);
    let picker = flat(LbPolicy::RoundRobin, &members);
    members[1].set(Standing::Unavailable);
    members[4].set(Standing::Connecting);
    assert_eq!(counts(&picker, 5, 300), [100, 0, 100, 100, 0]);
}

#[test]
fn the_last_available_of_ten_thousand_is_found() {
    for policy in policies() {
        let members = fakes(0..10_000);
        let picker = flat(policy.clone(), &members);
        members.iter().filter(|m| m.id != 7777).for_each(|m| m.set(Standing::Unavailable));
        assert_eq!(counts(&picker, 10_000, 20)[7777], 20);
    }
}

#[test]
fn a_connecting_endpoint_is_picked_only_when_there_is_no_other() {
    for policy in policies() {
        let members = fakes(0..3);
        let picker = flat(policy.clone(), &members);
        members[0].set(Standing::Connecting);
        members[1].set(Standing::Connecting);
        assert_eq!(counts(&picker, 3, 1000), [0, 0, 1000]);
        members[2].set(Standing::Unavailable);
        let counts = counts(&picker, 3, 1000);
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2] == 0, "{counts:?}");
    }
}

#[test]
fn endpoints_that_all_connect_are_waited_for_alike() {
    for policy in policies() {
        let members = fakes(0..160);
        let picker = flat(policy, &members);
        members.iter().for_each(|member| member.set(Standing::Connecting));
        let counts = counts(&picker, 160, 16_000);
        assert!(counts.iter().all(|count| (40..=180).contains(count)), "six deviations from 100: {counts:?}");
    }
}

#[test]
fn an_excluded_endpoint_is_picked_only_when_there_is_no_other() {
    let mut rng = fastrand::Rng::with_seed(5);
    for policy in policies() {
        let members = fakes(0..3);
        let picker = flat(policy.clone(), &members);
        for _ in 0..1000 {
            assert_eq!(picker.pick(&plain(), |m| m.id != 1, &mut rng).unwrap().id, 1);
        }
        members[1].set(Standing::Connecting);
        assert_eq!(picker.pick(&plain(), |m| m.id != 1, &mut rng).unwrap().id, 1, "connecting is better than excluded");
        members[1].set(Standing::Unavailable);
        assert_ne!(picker.pick(&plain(), |m| m.id != 1, &mut rng).unwrap().id, 1, "excluded is better than none");
        assert!(picker.pick(&plain(), |_| true, &mut rng).is_some());
    }
}

#[test]
fn a_bound_on_the_load_does_not_lead_back_to_an_excluded_endpoint() {
    let hashing = ConsistentHashing { balance_factor: Some(100), ..ConsistentHashing::default() };
    let policies = [
        LbPolicy::RingHash(RingHash { hashing: hashing.clone(), ..RingHash::default() }),
        LbPolicy::Maglev(Maglev { hashing, ..Maglev::default() }),
    ];
    for policy in policies {
        let members = fakes(0..3);
        members[1].load.store(1000, Relaxed);
        let picker = flat(policy.clone(), &members);
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..100 {
            assert_eq!(
                picker.pick(&plain(), |m| m.id != 1, &mut rng).unwrap().id,
                1,
                "{policy:?}: full, but the only one"
            );
            assert_ne!(picker.pick(&plain(), |_| false, &mut rng).unwrap().id, 1, "{policy:?}");
        }
    }
}

#[test]
fn least_request_prefers_the_less_loaded_of_its_draws() {
    let members = fakes(0..5);
    for (member, load) in members.iter().zip([10, 20, 30, 40, 50]) {
        member.load.store(load, Relaxed);
    }
    // The k-th least loaded of n is the best of c draws with replacement with ((n-k+1)^c - (n-k)^c) / n^c.
    for choice_count in [2, 3, 10] {
        let tail = |k: usize| ((5 - k) as f64 / 5.0).powi(choice_count as i32);
        let shares: Vec<f64> = (0..5).map(|k| tail(k) - tail(k + 1)).collect();
        let picker = flat(LbPolicy::least_request(choice_count), &members);
        assert_shares(&counts(&picker, 5, 50_000), &shares);
    }
}

#[test]
fn a_full_scan_finds_the_least_loaded_of_all_and_draws_among_equals() {
    let policy = LbPolicy::LeastRequest { choice_count: 2, bias: None, full_scan: true };
    for count in [5, 500] {
        let members = fakes(0..count);
        for (i, member) in members.iter().enumerate() {
            member.load.store(if i % (count / 5) == 1 % (count / 5) { 1 } else { 2 }, Relaxed);
        }
        let least: Vec<f64> = members.iter().map(|member| if member.load() == 1 { 0.2 } else { 0.0 }).collect();
        let picker = flat(policy.clone(), &members);
        assert_shares(&counts(&picker, count, 20_000), &least);
        // It steps over what cannot be picked, to the next least loaded.
        let first = members.iter().position(|member| member.load() == 1).unwrap();
        members[first].set(Standing::Unavailable);
        let mut without = least.clone();
        without[first] = 0.0;
        without.iter_mut().filter(|share| **share > 0.0).for_each(|share| *share = 0.25);
        if count > 5 {
            assert_shares(&counts(&picker, count, 20_000), &without);
        }
        let mut rng = fastrand::Rng::with_seed(1);
        let other = picker.pick(&plain(), |member| member.load() == 1, &mut rng).unwrap();
        assert_eq!(other.load(), if count > 5 { 2 } else { other.load() });
    }
    // Weights that differ: as without it.
    let members = fakes(0..2);
    let picker = picker(policy, &[vec![group(&members, &[1, 3], 1)]]).unwrap();
    assert_shares(&counts(&picker, 2, 20_000), &[0.25, 0.75]);
}

#[test]
fn the_bias_says_how_much_load_counts_against_weight() {
    for bias in [0.0, 0.5, 2.0] {
        let policy = LbPolicy::LeastRequest { choice_count: 2, bias: Some(bias), full_scan: false };
        let members = fakes(0..4);
        let (weights, loads) = ([1, 2, 3, 4], [0, 3, 1, 8]);
        for (member, load) in members.iter().zip(loads) {
            member.load.store(load, Relaxed);
        }
        let rates: Vec<f64> =
            weights.iter().zip(loads).map(|(w, load)| f64::from(*w) / f64::from(load + 1).powf(bias)).collect();
        let total: f64 = rates.iter().sum();
        let shares: Vec<f64> = rates.iter().map(|rate| rate / total).collect();
        let picker = picker(policy.clone(), &[vec![group(&members, &weights, 1)]]).unwrap();
        assert_shares(&counts(&picker, 4, 50_000), &shares);
        // One weight: load alone counts, as without a bias.
        let plain = flat(policy, &members);
        let idle = counts(&plain, 4, 20_000)[0];
        assert!((8_300..9_200).contains(&idle), "{idle}: 1 - (3/4)^2 of them");
    }
    // Of many, a sample: half of them are idle and weigh 1, half are busy and weigh 2.
    let members = fakes(0..400);
    let weights: Vec<u32> = (0..400).map(|i| if i < 200 { 1 } else { 2 }).collect();
    members[200..].iter().for_each(|member| member.load.store(1, Relaxed));
    for (bias, idle) in [(0.0, 1.0 / 3.0), (2.0, 2.0 / 3.0)] {
        let policy = LbPolicy::LeastRequest { choice_count: 2, bias: Some(bias), full_scan: false };
        let picker = picker(policy, &[vec![group(&members, &weights, 1)]]).unwrap();
        let seen: usize = counts(&picker, 400, 20_000)[..200].iter().sum();
        let share = seen as f64 / 20_000.0;
        assert!((share - idle).abs() < 0.03, "{share} instead of {idle}");
    }
}

#[test]
fn least_request_fills_by_weight() {
    let members = fakes(0..2);
    let picker = picker(LEAST, &[vec![group(&members, &[1, 3], 1)]]).unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    let mut running: std::collections::VecDeque<Arc<Fake>> = Default::default();
    let mut seen = [0_u64; 2];
    for _ in 0..100_000 {
        let member = picker.pick(&plain(), |_| false, &mut rng).unwrap().clone();
        member.load.fetch_add(1, Relaxed);
        running.push_back(member);
        if running.len() > 400 {
            running.pop_front().unwrap().load.fetch_sub(1, Relaxed);
            seen[0] += u64::from(members[0].load());
            seen[1] += u64::from(members[1].load());
        }
    }
    let ratio = seen[1] as f64 / seen[0] as f64;
    assert!((2.8..=3.2).contains(&ratio), "in flight {ratio} to 1 for weights 3 to 1");
}

#[test]
fn a_priority_without_an_endpoint_to_pick_is_no_level_in_a_panic() {
    let (dead, live) = (fakes(0..4), fakes(4..6));
    for fake in dead.iter().chain(&live) {
        fake.ejected.store(true, Relaxed);
    }
    dead.iter().for_each(|fake| fake.set(Standing::Unavailable));
    let priorities = [vec![group(&dead, &[1; 4], 1)], vec![group(&live, &[1; 2], 1)]];
    let hashing = [
        LbPolicy::RingHash(RingHash::default()),
        LbPolicy::Maglev(Maglev::default()),
        LbPolicy::PickFirst { shuffle: false },
    ];
    for policy in policies().into_iter().chain(hashing) {
        let recipe = Recipe { profile: Profile::Envoy, ..Recipe::of(policy.clone(), Instant::now()) };
        let new = |priorities: &[_]| Picker::new(&recipe, priorities, &Arc::default(), None, Instant::now());
        let picker = new(&priorities).unwrap();
        assert_eq!(counts(&picker, 6, 100)[..4], [0; 4], "{policy:?}");
        assert!(new(&priorities[..1]).is_none(), "{policy:?}");
    }
}

#[test]
fn slow_start_keeps_great_weights_apart() {
    let members = fakes(0..2);
    let mut recipe = Recipe::of(LbPolicy::Random, Instant::now());
    recipe.settings.slow_start =
        Some(SlowStart { window: std::time::Duration::from_secs(60), aggression: 1.0, min_weight: 10.0 });
    let priorities = [vec![group(&members, &[400_000_000, 4_000_000_000], 1)]];
    let picker = Picker::new(&recipe, &priorities, &Arc::default(), None, Instant::now()).unwrap();
    assert_shares(&counts(&picker, 2, 10_000), &[1.0 / 11.0, 10.0 / 11.0]);
}
