//! The protocol core against a scripted control plane, on virtual time.

use super::state::{Absence, Action, Event, Request, Response, State};
use crate::{
    bootstrap::{ServerFeatures, Timing},
    resource::ResourceType::{self, Cluster, ClusterLoadAssignment, Listener, RouteConfiguration},
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::time::Instant;

/// The core and a control plane that the test plays, with a clock that only the test moves.
struct Pair {
    state: State,
    now: Instant,
    /// Everything the core did and nobody looked at yet.
    actions: Vec<Action>,
    nonce: u32,
}

impl Pair {
    fn new() -> Self {
        Self::with(ServerFeatures::default())
    }

    fn with(features: ServerFeatures) -> Self {
        let state = State::new(features, &Timing::default(), fastrand::Rng::with_seed(1));
        Self { state, now: Instant::now(), actions: Vec::new(), nonce: 0 }
    }

    /// A pair with an open stream and these LDS names subscribed.
    fn live(names: &[&str]) -> Self {
        let mut pair = Self::new();
        pair.open(names);
        pair
    }

    fn open(&mut self, names: &[&str]) {
        self.want(Listener, names);
        assert_eq!(self.take(), [Action::Connect]);
        self.event(Event::Connected);
    }

    fn event(&mut self, event: Event) {
        let actions = self.state.handle(event, self.now);
        self.actions.extend(actions);
    }

    fn want(&mut self, kind: ResourceType, names: &[&str]) {
        self.event(Event::Wanted(kind, names.iter().map(|name| Arc::from(*name)).collect::<BTreeSet<_>>()));
    }

    /// A response with these resources, applied and answered.
    fn respond(&mut self, kind: ResourceType, version: &str, names: &[&str]) {
        self.deliver(kind, version, names, None);
        self.event(Event::Applied(kind));
    }

    fn deliver(&mut self, kind: ResourceType, version: &str, names: &[&str], error: Option<&str>) {
        self.nonce += 1;
        self.event(Event::Response(Response {
            kind,
            version: version.into(),
            nonce: self.nonce.to_string().into(),
            received: names.iter().map(|name| Arc::from(*name)).collect(),
            absent: Vec::new(),
            unnamed: false,
            error: error.map(Arc::from),
        }));
    }

    fn close(&mut self, error: &str) {
        self.event(Event::Closed(error.into()));
    }

    /// Moves the clock, with a tick at every timeout on the way.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.state.next_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.event(Event::Tick);
        }
        self.now = end;
    }

    fn take(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// The requests sent since the last look; every other action must have been looked at.
    fn requests(&mut self) -> Vec<Request> {
        let take = |action| match action {
            Action::Send(request) => Some(request),
            Action::Reachable => None,
            other => panic!("{other:?}"),
        };
        self.take().into_iter().filter_map(take).collect()
    }

    fn request(&mut self) -> Request {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "{requests:?}");
        requests.remove(0)
    }
}

fn names(request: &Request) -> Vec<&str> {
    request.names.iter().map(|name| &**name).collect()
}

fn absences(actions: &[Action]) -> Vec<(ResourceType, &str, Absence)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Absent(kind, name, absence) => Some((*kind, &**name, *absence)),
            _ => None,
        })
        .collect()
}

#[test]
fn connects_only_when_something_is_wanted() {
    let mut pair = Pair::new();
    pair.want(Listener, &[]);
    assert_eq!(pair.take(), []);
    pair.want(Listener, &["a"]);
    assert_eq!(pair.take(), [Action::Connect]);
    pair.want(Listener, &["a", "b"]);
    assert_eq!(pair.take(), [], "one connection attempt at a time");
    pair.event(Event::Connected);
    assert_eq!(names(&pair.request()), ["a", "b"]);
}

#[test]
fn the_node_is_in_the_first_request_of_a_stream_only() {
    let mut pair = Pair::live(&["a"]);
    assert!(pair.request().with_node);
    pair.want(Cluster, &["c"]);
    assert!(!pair.request().with_node);
    pair.respond(Listener, "1", &["a"]);
    assert!(!pair.request().with_node);
    pair.close("gone");
    pair.pass(Duration::from_secs(1));
    pair.event(Event::Connected);
    let requests: Vec<_> =
        pair.take().into_iter().filter_map(|a| if let Action::Send(r) = a { Some(r) } else { None }).collect();
    assert_eq!(requests.iter().map(|request| request.with_node).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn a_good_response_is_acknowledged_after_it_is_applied() {
    let mut pair = Pair::live(&["a"]);
    let first = pair.request();
    assert_eq!((&*first.version, &*first.nonce, first.error), ("", "", None));
    pair.deliver(Listener, "7", &["a"], None);
    assert_eq!(pair.requests(), [], "not before the dependants are subscribed");
    pair.want(RouteConfiguration, &["r"]);
    let dependant = pair.request();
    assert_eq!((dependant.kind, names(&dependant)), (RouteConfiguration, vec!["r"]));
    pair.event(Event::Applied(Listener));
    let ack = pair.request();
    assert_eq!((ack.kind, &*ack.version, &*ack.nonce, ack.error), (Listener, "7", "1", None));
}

#[test]
fn a_bad_response_is_rejected_with_the_last_good_version() {
    let mut pair = Pair::live(&["a"]);
    pair.respond(Listener, "1", &["a"]);
    pair.take();
    pair.deliver(Listener, "2", &["a"], Some("a: bad"));
    pair.event(Event::Applied(Listener));
    let nack = pair.request();
    assert_eq!((&*nack.version, &*nack.nonce, nack.error.as_deref()), ("1", "2", Some("a: bad")));
    pair.want(Listener, &["a", "b"]);
    let more = pair.request();
    assert_eq!((&*more.version, &*more.nonce, more.error), ("1", "2", None));
}

#[test]
fn names_that_change_while_a_reply_waits_go_with_the_reply() {
    let mut pair = Pair::live(&["a"]);
    pair.take();
    pair.deliver(Listener, "1", &["a"], None);
    pair.want(Listener, &["a", "b"]);
    assert_eq!(pair.requests(), []);
    pair.event(Event::Applied(Listener));
    let ack = pair.request();
    assert_eq!((&*ack.version, names(&ack)), ("1", vec!["a", "b"]));
}

#[test]
fn versions_and_nonces_are_kept_per_type() {
    let mut pair = Pair::live(&["a"]);
    pair.want(Cluster, &["c"]);
    pair.respond(Listener, "l1", &["a"]);
    pair.take();
    pair.respond(Cluster, "c1", &["c"]);
    let ack = pair.request();
    assert_eq!((ack.kind, &*ack.version, &*ack.nonce), (Cluster, "c1", "2"));
    pair.want(Listener, &["a", "b"]);
    let lds = pair.request();
    assert_eq!((&*lds.version, &*lds.nonce), ("l1", "1"));
}

#[test]
fn an_empty_list_is_never_the_first_request_of_a_type() {
    let mut pair = Pair::live(&["a"]);
    let first = pair.request();
    assert_eq!(first.kind, Listener);
    for kind in [RouteConfiguration, Cluster, ClusterLoadAssignment] {
        pair.want(kind, &[]);
    }
    assert_eq!(pair.requests(), []);
    pair.want(Cluster, &["c"]);
    pair.want(Cluster, &[]);
    let requests = pair.requests();
    assert_eq!(requests.iter().map(names).collect::<Vec<_>>(), [vec!["c"], vec![]], "after names it unsubscribes");
    pair.close("gone");
    pair.take();
    pair.pass(Duration::from_secs(2));
    pair.event(Event::Connected);
    let kinds: Vec<_> = pair
        .take()
        .into_iter()
        .filter_map(|action| if let Action::Send(request) = action { Some(request.kind) } else { None })
        .collect();
    assert_eq!(kinds, [Listener], "on a new stream it would be a wildcard");
}

#[test]
fn a_type_that_was_not_asked_for_gets_no_reply() {
    let mut pair = Pair::live(&["a"]);
    pair.take();
    pair.respond(Cluster, "1", &["x"]);
    assert_eq!(pair.requests(), []);
}

#[test]
fn a_reconnect_subscribes_again_with_the_version_and_without_the_nonce() {
    let mut pair = Pair::live(&["a", "b"]);
    pair.want(Cluster, &["c"]);
    pair.respond(Listener, "5", &["a", "b"]);
    pair.take();
    pair.close("gone");
    assert!(pair.take().is_empty(), "the stream had answered: no error for watchers (gRFC A57)");
    pair.want(Listener, &["b", "z"]);
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.take(), [Action::Connect]);
    pair.event(Event::Connected);
    let requests = pair.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!((&*requests[0].version, &*requests[0].nonce, names(&requests[0])), ("5", "", vec!["b", "z"]));
    assert_eq!((requests[1].kind, &*requests[1].version), (Cluster, ""));
}

#[test]
fn failures_back_off_and_a_response_resets_it() {
    let mut pair = Pair::new();
    pair.want(Listener, &["a"]);
    pair.take();
    let mut expected = 1.0;
    for _ in 0..12 {
        pair.close("refused");
        assert_eq!(pair.take(), [Action::Unreachable("refused".into())]);
        let wait = (pair.state.next_timeout().expect("a reconnect is due") - pair.now).as_secs_f64();
        assert!((0.8 * expected..=1.2 * expected).contains(&wait), "{wait} is not within 20 % of {expected}");
        pair.pass(Duration::from_secs(145));
        assert_eq!(pair.take(), [Action::Connect]);
        expected = f64::min(expected * 1.6, 120.0);
    }
    pair.event(Event::Connected);
    pair.respond(Listener, "1", &["a"]);
    assert!(pair.take().contains(&Action::Reachable));
    pair.pass(Duration::from_secs(60));
    pair.close("gone");
    assert_eq!(pair.take(), [Action::Connect], "a stream that worked is tried again at once");
    pair.close("refused");
    assert_eq!(pair.take(), [Action::Unreachable("refused".into())]);
    assert!(pair.state.next_timeout().unwrap() - pair.now <= Duration::from_millis(1200));
}

#[test]
fn a_stream_that_answers_and_ends_is_not_reopened_in_a_hot_loop() {
    let mut pair = Pair::live(&["a"]);
    pair.respond(Listener, "1", &["a"]);
    pair.take();
    pair.close("gone");
    assert_eq!(pair.take(), []);
    pair.pass(Duration::from_millis(999));
    assert_eq!(pair.take(), []);
    pair.pass(Duration::from_millis(1));
    assert_eq!(pair.take(), [Action::Connect]);
}

#[test]
fn a_stream_that_ends_without_an_answer_is_an_error_for_watchers() {
    let mut pair = Pair::live(&["a"]);
    pair.take();
    pair.close("unavailable");
    assert_eq!(pair.take(), [Action::Unreachable("unavailable".into())]);
}

#[test]
fn a_resource_that_does_not_come_in_time_does_not_exist() {
    let mut pair = Pair::live(&["a"]);
    pair.take();
    pair.pass(Duration::from_millis(14_999));
    assert_eq!(pair.take(), []);
    pair.pass(Duration::from_millis(1));
    assert_eq!(absences(&pair.take()), [(Listener, "a", Absence::TimedOut)]);
    pair.respond(Listener, "1", &["a"]);
    assert_eq!(pair.request().version.as_ref(), "1", "it may still come later");
}

#[test]
fn the_timer_of_a_name_starts_when_it_is_subscribed() {
    let mut pair = Pair::live(&["a"]);
    pair.pass(Duration::from_secs(10));
    pair.want(Listener, &["a", "b"]);
    pair.take();
    pair.pass(Duration::from_secs(5));
    assert_eq!(absences(&pair.take()), [(Listener, "a", Absence::TimedOut)]);
    pair.pass(Duration::from_secs(10));
    assert_eq!(absences(&pair.take()), [(Listener, "b", Absence::TimedOut)]);
}

#[test]
fn timers_stop_with_the_stream_and_start_again_on_the_next() {
    let mut pair = Pair::new();
    pair.want(Listener, &["a"]);
    pair.take();
    pair.pass(Duration::from_secs(60));
    assert_eq!(pair.take(), [], "no stream, no timer");
    pair.event(Event::Connected);
    pair.pass(Duration::from_secs(14));
    pair.close("gone");
    pair.take();
    pair.pass(Duration::from_secs(2));
    assert_eq!(pair.take(), [Action::Connect]);
    pair.event(Event::Connected);
    pair.pass(Duration::from_secs(14));
    assert_eq!(absences(&pair.take()), []);
    pair.pass(Duration::from_secs(1));
    assert_eq!(absences(&pair.take()), [(Listener, "a", Absence::TimedOut)]);
}

#[test]
fn a_received_resource_has_no_timer_even_if_it_was_bad() {
    let mut pair = Pair::live(&["a"]);
    pair.deliver(Listener, "1", &["a"], Some("bad"));
    pair.event(Event::Applied(Listener));
    pair.take();
    pair.pass(Duration::from_secs(100));
    assert_eq!(pair.take(), []);
}

#[test]
fn a_late_resource_is_transient_for_a_server_that_says_so() {
    let features = ServerFeatures { resource_timer_is_transient_error: true, ..ServerFeatures::default() };
    let mut pair = Pair::with(features);
    pair.open(&["a"]);
    pair.pass(Duration::from_millis(29_999));
    assert_eq!(absences(&pair.take()), []);
    pair.pass(Duration::from_millis(1));
    assert_eq!(absences(&pair.take()), [(Listener, "a", Absence::Transient)]);
}

#[test]
fn a_listener_or_cluster_left_out_of_a_response_is_removed() {
    for kind in [Listener, Cluster] {
        let mut pair = Pair::live(&["seed"]);
        pair.want(kind, &["a", "b", "c"]);
        pair.respond(kind, "1", &["a", "b"]);
        assert_eq!(absences(&pair.take()), [], "c was never there: its timer decides");
        pair.respond(kind, "2", &["b"]);
        assert_eq!(absences(&pair.take()), [(kind, "a", Absence::Removed)]);
        pair.respond(kind, "3", &["b"]);
        assert_eq!(absences(&pair.take()), [], "said once");
    }
}

#[test]
fn routes_and_endpoints_left_out_of_a_response_stay() {
    for kind in [RouteConfiguration, ClusterLoadAssignment] {
        let mut pair = Pair::live(&["seed"]);
        pair.want(kind, &["a", "b"]);
        pair.respond(kind, "1", &["a", "b"]);
        pair.respond(kind, "2", &["b"]);
        assert_eq!(absences(&pair.take()), []);
    }
}

#[test]
fn deletions_are_ignored_when_the_server_feature_says_so() {
    let mut pair = Pair::with(ServerFeatures { ignore_resource_deletion: true, ..ServerFeatures::default() });
    pair.open(&["a"]);
    pair.respond(Listener, "1", &["a"]);
    pair.respond(Listener, "2", &[]);
    assert_eq!(absences(&pair.take()), []);
}

#[test]
fn a_rejected_resource_is_not_a_removed_one() {
    let mut pair = Pair::live(&["a", "b"]);
    pair.respond(Listener, "1", &["a", "b"]);
    pair.deliver(Listener, "2", &["a", "b"], Some("b: bad"));
    assert_eq!(absences(&pair.take()), []);
    pair.event(Event::Response(Response {
        kind: Listener,
        version: "3".into(),
        nonce: "x".into(),
        received: ["a".into()].into(),
        absent: Vec::new(),
        unnamed: true,
        error: Some("resources[1]: malformed".into()),
    }));
    assert_eq!(absences(&pair.take()), [], "the malformed one may be b");
}

#[test]
fn the_control_plane_can_say_that_a_resource_does_not_exist() {
    let mut pair = Pair::live(&["a"]);
    pair.event(Event::Response(Response {
        kind: Listener,
        version: "1".into(),
        nonce: "1".into(),
        received: [].into(),
        absent: vec!["a".into()],
        unnamed: false,
        error: None,
    }));
    assert_eq!(absences(&pair.take()), [(Listener, "a", Absence::Removed)]);
    pair.pass(Duration::from_secs(60));
    assert_eq!(absences(&pair.take()), [], "and its timer is off");
}

#[test]
fn a_stream_without_subscriptions_is_closed_after_a_while() {
    let mut pair = Pair::live(&["a"]);
    pair.respond(Listener, "1", &["a"]);
    pair.want(Listener, &[]);
    pair.take();
    pair.pass(Duration::from_secs(9));
    assert_eq!(pair.take(), []);
    pair.want(Listener, &["b"]);
    assert_eq!(names(&pair.request()), ["b"], "a new name uses the stream that is still there");
    pair.want(Listener, &[]);
    pair.take();
    pair.pass(Duration::from_secs(10));
    assert_eq!(pair.take(), [Action::Disconnect]);
    assert_eq!(pair.state.next_timeout(), None);
    pair.want(Listener, &["c"]);
    assert_eq!(pair.take(), [Action::Connect]);
}

#[test]
fn nothing_wanted_means_no_reconnect() {
    let mut pair = Pair::new();
    pair.want(Listener, &["a"]);
    pair.close("refused");
    pair.want(Listener, &[]);
    pair.take();
    pair.pass(Duration::from_secs(500));
    assert_eq!(pair.take(), []);
}

#[test]
fn an_answer_without_a_new_listener_counts_soon() {
    let mut pair = Pair::live(&["a"]);
    pair.respond(Listener, "1", &[]);
    pair.pass(Duration::from_millis(249));
    assert_eq!(absences(&pair.take()), [], "the answer may have crossed the request");
    pair.pass(Duration::from_millis(1));
    assert_eq!(absences(&pair.take()), [(Listener, "a", Absence::Removed)]);
    let mut pair = Pair::live(&["seed"]);
    pair.want(ClusterLoadAssignment, &["a"]);
    pair.respond(ClusterLoadAssignment, "1", &[]);
    pair.pass(Duration::from_secs(14));
    assert_eq!(absences(&pair.take()), [], "endpoints come one by one");
}

#[test]
fn an_answer_without_a_new_cluster_leaves_it_to_the_timer() {
    let mut pair = Pair::live(&["seed"]);
    pair.respond(Listener, "1", &["seed"]);
    pair.want(Cluster, &["a", "b"]);
    pair.respond(Cluster, "1", &[]);
    pair.requests();
    pair.pass(Duration::from_millis(249));
    assert_eq!(pair.take(), [], "the answer may have crossed the request");
    pair.pass(Duration::from_millis(1));
    assert_eq!(pair.take(), [Action::Missing("a".into()), Action::Missing("b".into())]);
    pair.respond(Cluster, "2", &["b"]);
    pair.requests();
    pair.pass(Duration::from_millis(14_749));
    assert_eq!(pair.take(), [], "said once");
    pair.pass(Duration::from_millis(1));
    assert_eq!(pair.take(), [Action::Absent(Cluster, "a".into(), Absence::TimedOut)]);
}
