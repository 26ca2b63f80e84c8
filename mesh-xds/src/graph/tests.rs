//! The graph: reachability, completeness and what is published when.

mod server;
mod spread;

use super::*;
use crate::{
    ads::Accepted,
    bootstrap::{Authority, ServerConfig},
    resource::{
        Action, Cluster, ClusterLoadAssignment, ClusterSpecifier, Discovery, DomainPattern, Endpoint, Forward,
        HttpConnectionManager, Listener, Resource, Route, RouteConfiguration, RouteMatch, RouteSource, VirtualHost,
    },
    snapshot::{ClusterEntry, ResourceErrorKind, TargetState},
    status::ClientResourceStatus,
};
use ResourceType::{Cluster as Cds, ClusterLoadAssignment as Eds, Listener as Lds, RouteConfiguration as Rds};

/// A graph with one watched target, `t` on host `t`, and a control plane that the test plays.
struct Play {
    graph: Graph,
    watch: watch::Receiver<TargetState>,
    version: u32,
}

fn key() -> TargetKey {
    target("t", "t")
}

fn target(name: &str, host: &str) -> TargetKey {
    TargetKey::Client { name: name.into(), host: host.into() }
}

impl Play {
    fn new() -> Self {
        Self::with(Bootstrap::builder().server("cp:1").node_id("n").build().unwrap())
    }

    fn with(bootstrap: Bootstrap) -> Self {
        let mut graph = Graph::new(Arc::new(bootstrap));
        let watch = graph.watch(&key());
        Self { graph, watch, version: 0 }
    }

    /// A complete target: RDS `r`, clusters `a` and `b` over EDS.
    fn complete() -> Self {
        let mut play = Self::new();
        play.good(listener("r"));
        play.good(routes("r", &["a", "b"]));
        for name in ["a", "b"] {
            play.good(cluster(name));
            play.good(endpoints(name, 1));
        }
        play.ready();
        play
    }

    fn verdict(&mut self, kind: ResourceType, name: &str, verdict: Verdict) {
        self.version += 1;
        let version = self.version.to_string().into();
        self.graph.apply(0, kind, &version, vec![(name.into(), verdict)], SystemTime::UNIX_EPOCH);
    }

    fn good(&mut self, resource: Resource) -> Arc<Accepted> {
        let kind = match &resource {
            Resource::Listener(_) | Resource::ServerListener(_) => Lds,
            Resource::RouteConfiguration(_) => Rds,
            Resource::Cluster(_) => Cds,
            Resource::ClusterLoadAssignment(_) => Eds,
            Resource::Secret(_) => ResourceType::Secret,
        };
        let name = resource.name().clone();
        let accepted = Arc::new(Accepted { bytes: Vec::new(), resource, notes: Arc::default() });
        self.verdict(kind, &name, Verdict::Accepted(accepted.clone()));
        accepted
    }

    fn bad(&mut self, kind: ResourceType, name: &str) {
        self.verdict(kind, name, Verdict::Rejected("lb_policy: MAGLEV is not supported".into()));
    }

    fn absent(&mut self, kind: ResourceType, name: &str, absence: Absence) {
        self.graph.absent(kind, &name.into(), absence);
    }

    fn state(&mut self) -> TargetState {
        self.watch.borrow_and_update().clone()
    }

    fn ready(&mut self) -> Arc<Snapshot> {
        match self.state() {
            TargetState::Ready(snapshot) => snapshot,
            other => panic!("{other:?}"),
        }
    }

    /// Whether something was published since the last look.
    fn published(&mut self) -> bool {
        self.watch.has_changed().unwrap()
    }

    fn wanted(&mut self, kind: ResourceType) -> Vec<String> {
        self.graph.wanted(0, kind).iter().map(|name| name.as_ref().to_owned()).collect()
    }

    fn status(&self, kind: ResourceType, name: &str) -> ClientResourceStatus {
        let status = self.graph.status();
        let found = status.resources.iter().find(|r| r.type_url == kind.type_url() && &*r.name == name);
        found.unwrap_or_else(|| panic!("no {kind} {name}")).client_status
    }
}

fn listener(routes: &str) -> Resource {
    listener_with(RouteSource::Rds(routes.into()))
}

fn listener_with(routes: RouteSource) -> Resource {
    let http = HttpConnectionManager {
        routes,
        max_stream_duration: None,
        stream_idle_timeout: None,
        tracing: None,
        http_filters: Vec::new(),
    };
    Resource::Listener(Arc::new(Listener { name: "t".into(), http }))
}

fn host(domain: DomainPattern, clusters: &[&str]) -> VirtualHost {
    let route = |cluster: &&str| {
        let forward = Forward::to(ClusterSpecifier::Cluster((*cluster).into()));
        Route::new("", RouteMatch::default(), Action::Forward(Arc::new(forward)))
    };
    VirtualHost { domains: vec![domain], routes: clusters.iter().map(route).collect(), ..VirtualHost::default() }
}

fn config(name: &str, clusters: &[&str]) -> Arc<RouteConfiguration> {
    Arc::new(RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![host(DomainPattern::Any, clusters)],
        ..RouteConfiguration::default()
    })
}

fn routes(name: &str, clusters: &[&str]) -> Resource {
    Resource::RouteConfiguration(config(name, clusters))
}

fn cluster(name: &str) -> Resource {
    let discovery = Discovery::Eds { service_name: name.into() };
    Resource::Cluster(Arc::new(Cluster { discovery, ..Cluster::fixed(name, Arc::default()) }))
}

fn assignment(name: &str, port: u16) -> Arc<ClusterLoadAssignment> {
    let endpoint = Endpoint::new(([10, 0, 0, 1], port).into());
    Arc::new(ClusterLoadAssignment::of(name, vec![endpoint]))
}

fn endpoints(name: &str, port: u16) -> Resource {
    Resource::ClusterLoadAssignment(assignment(name, port))
}

#[test]
fn everything_reachable_is_wanted_step_by_step() {
    let mut play = Play::new();
    assert_eq!((play.wanted(Lds), play.wanted(Rds)), (vec!["t".to_owned()], vec![]));
    assert_eq!(play.graph.take_changed(), [0]);
    play.good(listener("r"));
    assert_eq!(play.wanted(Rds), ["r"]);
    assert_eq!(play.graph.take_changed(), [0]);
    play.good(routes("r", &["a", "b"]));
    assert_eq!(play.wanted(Cds), ["a", "b"]);
    play.good(cluster("a"));
    assert_eq!(play.wanted(Eds), ["a"]);
    play.good(cluster("b"));
    play.good(endpoints("a", 1));
    assert!(matches!(play.state(), TargetState::Pending { cause: None }), "b has no endpoints yet");
    play.good(endpoints("b", 2));
    let snapshot = play.ready();
    assert_eq!(snapshot.clusters.len(), 2);
    assert_eq!(&*snapshot.version, "lds=1 rds=2 cds=4 eds=6");
    play.graph.take_changed();
    play.good(endpoints("a", 9));
    assert!(play.graph.take_changed().is_empty(), "new endpoints change no subscription");
}

#[test]
fn only_the_virtual_host_of_the_target_counts() {
    let mut play = Play::new();
    let hosts = vec![host(DomainPattern::Any, &["other"]), host(DomainPattern::Exact("t".into()), &["mine"])];
    let config =
        Arc::new(RouteConfiguration { name: "inline".into(), virtual_hosts: hosts, ..RouteConfiguration::default() });
    play.good(listener_with(RouteSource::Inline(config)));
    assert_eq!(play.wanted(Cds), ["mine"]);
    play.good(Resource::Cluster(Arc::new(Cluster::fixed("mine", assignment("mine", 1)))));
    let snapshot = play.ready();
    assert_eq!((snapshot.virtual_host, snapshot.clusters.len()), (Some(1), 1));
    assert_eq!(play.wanted(Eds), [] as [&str; 0], "a STATIC cluster needs no EDS");
}

#[test]
fn a_host_without_virtual_host_is_complete_and_empty() {
    let mut play = Play::new();
    let hosts = vec![host(DomainPattern::Exact("elsewhere".into()), &["x"])];
    let config =
        Arc::new(RouteConfiguration { name: "inline".into(), virtual_hosts: hosts, ..RouteConfiguration::default() });
    play.good(listener_with(RouteSource::Inline(config)));
    let snapshot = play.ready();
    assert_eq!((snapshot.virtual_host, snapshot.clusters.len()), (None, 0));
}

#[test]
fn nothing_is_published_when_nothing_changed() {
    let mut play = Play::complete();
    let same = play.good(endpoints("a", 5));
    play.ready();
    play.verdict(Eds, "a", Verdict::Accepted(same));
    play.verdict(Eds, "a", Verdict::Heartbeat);
    play.bad(Eds, "a");
    assert!(!play.published());
}

#[test]
fn unchanged_parts_keep_their_pointers() {
    let mut play = Play::complete();
    let before = play.ready();
    play.good(endpoints("a", 7));
    assert!(play.published());
    let after = play.ready();
    assert!(Arc::ptr_eq(&before.listener, &after.listener) && Arc::ptr_eq(&before.routes, &after.routes));
    let parts = |snapshot: &Snapshot, name: &str| match &snapshot.clusters[name] {
        ClusterEntry::Ready { cluster, endpoints } => (cluster.clone(), endpoints.clone()),
        other => panic!("{other:?}"),
    };
    let ((a, a_endpoints), (b, b_endpoints)) = (parts(&before, "a"), parts(&before, "b"));
    assert!(Arc::ptr_eq(&a, &parts(&after, "a").0) && !Arc::ptr_eq(&a_endpoints, &parts(&after, "a").1));
    assert!(Arc::ptr_eq(&b, &parts(&after, "b").0) && Arc::ptr_eq(&b_endpoints, &parts(&after, "b").1));
}

#[test]
fn the_last_snapshot_stays_and_stays_fresh_until_the_next_is_complete() {
    let mut play = Play::complete();
    play.good(routes("r", &["c"]));
    assert!(!play.published(), "c is not there yet");
    assert_eq!(play.wanted(Cds), ["a", "b", "c"], "what is served stays subscribed");
    play.good(endpoints("a", 42));
    let served = play.ready();
    assert_eq!(served.clusters.len(), 2);
    match &served.clusters["a"] {
        ClusterEntry::Ready { endpoints, .. } => {
            assert_eq!(endpoints.priorities[0][0].endpoints[0].address.port(), 42);
        }
        other => panic!("{other:?}"),
    }
    play.good(cluster("c"));
    assert!(!play.published());
    play.good(endpoints("c", 3));
    assert_eq!(play.ready().clusters.keys().map(|name| &**name).collect::<Vec<_>>(), ["c"]);
    assert_eq!(play.wanted(Cds), ["c"], "what is not reachable any more is dropped");
    assert_eq!(play.wanted(Eds), ["c"]);
}

#[test]
fn a_cluster_that_does_not_exist_fails_alone() {
    for absence in [Absence::TimedOut, Absence::Removed] {
        let mut play = Play::complete();
        play.absent(Cds, "a", absence);
        let snapshot = play.ready();
        let ClusterEntry::Failed(error) = &snapshot.clusters["a"] else { panic!() };
        assert_eq!(error.kind, ResourceErrorKind::DoesNotExist);
        assert!(error.message.contains("Cluster \"a\"") && error.message.contains("cp:1"), "{error}");
        assert!(matches!(snapshot.clusters["b"], ClusterEntry::Ready { .. }));
        assert_eq!(play.status(Cds, "a"), ClientResourceStatus::DoesNotExist);
        assert_eq!(play.wanted(Eds), ["b"]);
    }
}

#[test]
fn a_cluster_that_was_never_valid_fails_with_the_reason() {
    let mut play = Play::new();
    play.good(listener("r"));
    play.good(routes("r", &["a"]));
    play.bad(Cds, "a");
    let snapshot = play.ready();
    let ClusterEntry::Failed(error) = &snapshot.clusters["a"] else { panic!() };
    assert_eq!(error.kind, ResourceErrorKind::Invalid);
    assert!(error.message.contains("MAGLEV") && error.message.contains("version \"3\""), "{error}");
    assert_eq!(play.status(Cds, "a"), ClientResourceStatus::Nacked);
    play.good(cluster("a"));
    play.good(endpoints("a", 1));
    assert!(matches!(play.ready().clusters["a"], ClusterEntry::Ready { .. }));
    assert_eq!(play.status(Cds, "a"), ClientResourceStatus::Acked);
}

#[test]
fn a_rejected_version_leaves_the_good_one_in_force() {
    for kind in [Lds, Rds, Cds, Eds] {
        let mut play = Play::complete();
        let name = match kind {
            Lds => "t",
            Rds => "r",
            _ => "a",
        };
        play.bad(kind, name);
        assert!(!play.published());
        assert_eq!(play.status(kind, name), ClientResourceStatus::Nacked);
        let status = play.graph.status();
        let entry = status.resources.iter().find(|r| r.error_state.is_some()).unwrap();
        assert_eq!(&*entry.error_state.as_ref().unwrap().version, "7");
        assert_ne!(&*entry.version, "7");
    }
}

#[test]
fn a_server_can_ask_to_drop_what_it_broke() {
    let mut server = ServerConfig::insecure("cp:1").unwrap();
    server.features.fail_on_data_errors = true;
    let mut play = Play::with(Bootstrap::builder().server_config(server).build().unwrap());
    play.good(listener_with(RouteSource::Inline(config("i", &["a"]))));
    play.good(Resource::Cluster(Arc::new(Cluster::fixed("a", assignment("a", 1)))));
    assert!(matches!(play.ready().clusters["a"], ClusterEntry::Ready { .. }));
    play.bad(Cds, "a");
    assert!(matches!(play.ready().clusters["a"], ClusterEntry::Failed(_)));
    play.bad(Lds, "t");
    assert!(matches!(play.state(), TargetState::Absent(_)));
}

#[test]
fn endpoints_that_do_not_exist_are_an_empty_list() {
    let mut play = Play::complete();
    play.absent(Eds, "a", Absence::TimedOut);
    let snapshot = play.ready();
    let ClusterEntry::Ready { endpoints, .. } = &snapshot.clusters["a"] else { panic!() };
    assert!(endpoints.priorities.is_empty());
    play.good(cluster("b"));
    let again = play.ready();
    let ClusterEntry::Ready { endpoints: same, .. } = &again.clusters["a"] else { panic!() };
    assert!(Arc::ptr_eq(endpoints, same));
}

#[test]
fn a_transient_absence_is_not_a_deletion() {
    let mut play = Play::new();
    play.absent(Lds, "t", Absence::Transient);
    match play.state() {
        TargetState::Pending { cause: Some(cause) } => assert_eq!(cause.kind, ResourceErrorKind::Unreachable),
        other => panic!("{other:?}"),
    }
    assert_eq!(play.status(Lds, "t"), ClientResourceStatus::Timeout);
}

#[test]
fn an_absent_listener_or_route_configuration_makes_the_target_absent() {
    let mut play = Play::complete();
    play.absent(Lds, "t", Absence::Removed);
    let TargetState::Absent(error) = play.state() else { panic!() };
    assert!(error.message.contains("Listener \"t\""), "{error}");
    assert_eq!((play.wanted(Rds).len(), play.wanted(Cds).len(), play.wanted(Lds).len()), (0, 0, 1));

    let mut play = Play::new();
    play.good(listener("r"));
    play.absent(Rds, "r", Absence::TimedOut);
    let TargetState::Absent(error) = play.state() else { panic!() };
    assert!(error.message.contains("RouteConfiguration \"r\""), "{error}");
}

#[test]
fn a_rejected_listener_without_a_good_version_is_pending_with_the_reason() {
    let mut play = Play::new();
    play.bad(Lds, "t");
    match play.state() {
        TargetState::Pending { cause: Some(cause) } => {
            assert_eq!(cause.kind, ResourceErrorKind::Invalid);
            assert!(cause.to_string().starts_with("resource rejected: Listener \"t\""), "{cause}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_unreachable_server_is_the_cause_until_it_answers() {
    let mut play = Play::new();
    play.graph.reachable(0, Some("connection refused".into()));
    let TargetState::Pending { cause: Some(cause) } = play.state() else { panic!() };
    assert_eq!(
        cause.to_string(),
        "control plane unreachable: cp:1 (node \"n\"): connection refused; waiting for Listener \"t\""
    );
    play.graph.reachable(0, Some("connection refused".into()));
    assert!(!play.published(), "the same cause is not news");
    let late: watch::Receiver<TargetState> = play.graph.watch(&target("u", "u"));
    assert!(matches!(&*late.borrow(), TargetState::Pending { cause: Some(_) }), "a new target knows at once");
    play.graph.reachable(0, None);
    assert!(matches!(play.state(), TargetState::Pending { cause: None }));
}

#[test]
fn an_outage_does_not_touch_what_is_in_force() {
    let mut play = Play::complete();
    play.graph.reachable(0, Some("gone".into()));
    play.graph.connected(0, false);
    assert!(!play.published());
    assert_eq!(play.graph.status().servers[0].last_error.as_deref(), Some("gone"));
}

#[test]
fn targets_share_resources_and_entries() {
    let mut play = Play::complete();
    let mut same: watch::Receiver<TargetState> = play.graph.watch(&key());
    assert!(matches!(&*same.borrow_and_update(), TargetState::Ready(_)), "an equal target is ready at once");
    let other: watch::Receiver<TargetState> = play.graph.watch(&target("t", "elsewhere"));
    assert!(matches!(&*other.borrow(), TargetState::Ready(_)), "another host of known resources too");
    play.graph.unwatch(&key());
    play.graph.unwatch(&key());
    assert_eq!(play.wanted(Cds), ["a", "b"]);
    play.graph.unwatch(&target("t", "elsewhere"));
    for kind in ResourceType::ALL {
        assert_eq!(play.wanted(kind), [] as [&str; 0]);
    }
    assert_eq!(play.graph.status().resources, []);
}

#[test]
fn each_authority_has_its_own_server() {
    let mine = ServerConfig::insecure("mine:1").unwrap();
    let authority = Authority { servers: vec![mine], ..Authority::default() };
    let bootstrap = Bootstrap::builder().server("cp:1").authority("a", authority).build().unwrap();
    let mut play = Play::with(bootstrap);
    play.good(listener("xdstp://a/envoy.config.route.v3.RouteConfiguration/r"));
    assert_eq!(play.wanted(Rds), [] as [&str; 0]);
    assert_eq!(play.graph.wanted(1, Rds).len(), 1);
    assert_eq!(&*play.graph.server(1).uri, "mine:1");
    assert_eq!(play.graph.take_changed(), [0, 1]);
    play.good(listener("xdstp://stranger/envoy.config.route.v3.RouteConfiguration/r"));
    match play.state() {
        TargetState::Pending { cause: Some(cause) } => {
            assert!(cause.message.contains("unknown xDS authority \"stranger\""), "{cause}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_dropped_and_watched_again_before_the_driver_looks_is_still_known() {
    let mut play = Play::complete();
    let before = play.ready();
    play.graph.unwatch(&key());
    assert_eq!(play.graph.status().resources, []);
    // The control plane may still send what it has not seen unsubscribed.
    play.good(endpoints("a", 8));
    play.watch = play.graph.watch(&key());
    let after = play.ready();
    assert!(Arc::ptr_eq(&before.listener, &after.listener) && Arc::ptr_eq(&before.routes, &after.routes));
    assert!(!same(&before.clusters["a"], &after.clusters["a"]), "the endpoints that came meanwhile count");
    assert_eq!(play.wanted(Cds), ["a", "b"]);

    play.graph.unwatch(&key());
    assert_eq!(play.graph.take_changed(), [0], "the driver is told");
    for kind in ResourceType::ALL {
        assert_eq!(play.wanted(kind), [] as [&str; 0]);
    }
    play.watch = play.graph.watch(&key());
    assert!(matches!(play.state(), TargetState::Pending { .. }), "once unsubscribed it has to come again");
}

fn same(a: &ClusterEntry, b: &ClusterEntry) -> bool {
    matches!((a, b), (ClusterEntry::Ready { endpoints: a, .. }, ClusterEntry::Ready { endpoints: b, .. }) if Arc::ptr_eq(a, b))
}

#[test]
fn two_targets_can_swap_their_clusters_in_one_update() {
    let shared = |first: &str, second: &str| {
        let hosts =
            vec![host(DomainPattern::Exact("t".into()), &[first]), host(DomainPattern::Exact("u".into()), &[second])];
        Resource::RouteConfiguration(Arc::new(RouteConfiguration {
            name: "r".into(),
            virtual_hosts: hosts,
            ..RouteConfiguration::default()
        }))
    };
    let mut play = Play::new();
    let other: watch::Receiver<TargetState> = play.graph.watch(&target("t", "u"));
    play.good(listener("r"));
    play.good(shared("x", "y"));
    for name in ["x", "y"] {
        play.good(cluster(name));
        play.good(endpoints(name, 1));
    }
    play.graph.take_changed();
    play.good(shared("y", "x"));
    let clusters = |state: &TargetState| match state {
        TargetState::Ready(snapshot) => snapshot.clusters.keys().map(|name| name.to_string()).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!((clusters(&play.state()), clusters(&other.borrow())), (vec!["y".to_owned()], vec!["x".to_owned()]));
    assert_eq!((play.wanted(Cds), play.wanted(Eds)), (vec!["x".into(), "y".into()], vec!["x".into(), "y".into()]));
}

#[test]
fn a_missing_cluster_fails_where_nothing_good_is_given_up() {
    let mut play = Play::new();
    play.good(listener("r"));
    play.good(routes("r", &["a", "ghost"]));
    play.good(cluster("a"));
    play.good(endpoints("a", 1));
    play.graph.missing(&"ghost".into());
    let ClusterEntry::Failed(error) = &play.ready().clusters["ghost"] else { panic!() };
    assert_eq!(error.kind, ResourceErrorKind::DoesNotExist);
    assert!(error.message.contains("Cluster \"ghost\"") && error.message.contains("cp:1"), "{error}");
    play.graph.missing(&"ghost".into());
    assert!(!play.published());
    play.good(endpoints("a", 2));
    assert!(matches!(play.ready().clusters["ghost"], ClusterEntry::Failed(_)), "its neighbour stays fresh");
    play.good(cluster("ghost"));
    play.good(endpoints("ghost", 3));
    assert!(matches!(play.ready().clusters["ghost"], ClusterEntry::Ready { .. }));
}

#[test]
fn a_missing_cluster_displaces_no_good_snapshot_until_its_time_is_up() {
    let mut play = Play::complete();
    play.good(routes("r", &["late"]));
    play.graph.missing(&"late".into());
    assert!(!play.published(), "it may only be late");
    play.absent(Cds, "late", Absence::TimedOut);
    assert!(matches!(play.ready().clusters["late"], ClusterEntry::Failed(_)));
}
