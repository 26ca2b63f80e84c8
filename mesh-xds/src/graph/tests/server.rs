//! What servers and secrets are watched for.

use super::*;
use crate::{
    resource::{
        DataSource, FilterChain, FilterChainMatch, Secret, SecretKind, ServerConnections, ServerListener,
        TlsCertificate,
    },
    snapshot::{SecretState, ServerState},
};

struct Server {
    play: Play,
    watch: watch::Receiver<ServerState>,
}

impl Server {
    fn new() -> Self {
        let mut play = Play::new();
        play.graph.unwatch(&key());
        let watch = play.graph.watch(&TargetKey::Server("t".into()));
        Self { play, watch }
    }

    fn state(&mut self) -> ServerState {
        self.watch.borrow_and_update().clone()
    }

    fn ready(&mut self) -> Arc<ServerSnapshot> {
        match self.state() {
            ServerState::Ready(snapshot) => snapshot,
            other => panic!("{other:?}"),
        }
    }
}

fn serving(sources: Vec<RouteSource>) -> Resource {
    let chain = |(port, routes)| {
        Arc::new(FilterChain {
            name: "c".into(),
            matcher: FilterChainMatch { source_ports: vec![port], ..FilterChainMatch::default() },
            tls: None,
            http: HttpConnectionManager {
                routes,
                max_stream_duration: None,
                stream_idle_timeout: None,
                tracing: None,
                http_filters: Vec::new(),
            },
            connections: ServerConnections::default(),
        })
    };
    let mut filter_chains: Vec<_> = (1..).zip(sources).map(chain).collect();
    let default_filter_chain = filter_chains.pop();
    Resource::ServerListener(Arc::new(ServerListener {
        name: "t".into(),
        address: ([127, 0, 0, 1], 1).into(),
        filter_chains,
        default_filter_chain,
        detection_timeout: None,
    }))
}

fn rds(name: &str) -> RouteSource {
    RouteSource::Rds(name.into())
}

#[test]
fn a_server_is_complete_with_the_routes_of_all_its_chains() {
    let mut server = Server::new();
    server.play.good(serving(vec![rds("a"), RouteSource::Inline(config("i", &["x"])), rds("b")]));
    assert_eq!(server.play.wanted(Rds), ["a", "b"]);
    assert_eq!(server.play.wanted(Cds), [] as [&str; 0], "routes of servers lead to no cluster");
    server.play.good(routes("a", &[]));
    assert!(matches!(server.state(), ServerState::Pending { .. }), "b is not there yet");
    server.play.good(routes("b", &[]));
    let snapshot = server.ready();
    assert_eq!(&*snapshot.version, "lds=1 rds=3");
    let named: Vec<_> =
        snapshot.listener.chains().map(|chain| snapshot.routes_of(chain).unwrap().unwrap().name.clone()).collect();
    assert_eq!(named, ["a".into(), "i".into(), "b".into()]);
}

#[test]
fn a_bad_update_keeps_what_a_server_does_and_a_removed_listener_ends_it() {
    let mut server = Server::new();
    server.play.good(serving(vec![rds("a")]));
    server.play.good(routes("a", &[]));
    let before = server.ready();
    server.play.bad(Lds, "t");
    server.play.bad(Rds, "a");
    server.play.good(listener("r"));
    assert!(!server.watch.has_changed().unwrap(), "neither a rejected one nor one for clients counts");
    server.play.good(serving(vec![rds("late")]));
    assert!(!server.watch.has_changed().unwrap(), "the new one has no routes yet");
    server.play.good(routes("a", &["changed"]));
    let fresh = server.ready();
    assert!(Arc::ptr_eq(&before.listener, &fresh.listener), "what is in force stays, and stays fresh");
    server.play.good(routes("late", &[]));
    assert!(!Arc::ptr_eq(&before.listener, &server.ready().listener));
    assert_eq!(server.play.wanted(Rds), ["late"]);
    server.play.absent(Lds, "t", Absence::Removed);
    assert!(matches!(server.state(), ServerState::Absent(_)));
}

#[test]
fn routes_that_do_not_exist_fail_only_their_chains() {
    let mut server = Server::new();
    server.play.good(serving(vec![rds("a"), rds("b")]));
    server.play.good(routes("a", &[]));
    server.play.absent(Rds, "b", Absence::TimedOut);
    let snapshot = server.ready();
    let found: Vec<_> = snapshot.listener.chains().map(|chain| snapshot.routes_of(chain).unwrap().is_ok()).collect();
    assert_eq!(found, [true, false]);
}

#[test]
fn a_listener_for_servers_is_none_for_clients_and_the_other_way_round() {
    let mut play = Play::new();
    play.good(serving(vec![RouteSource::Inline(config("i", &[]))]));
    match play.state() {
        TargetState::Pending { cause: Some(cause) } => assert!(cause.message.contains("for servers"), "{cause}"),
        other => panic!("{other:?}"),
    }
    let mut server = Server::new();
    server.play.good(listener("r"));
    match server.state() {
        ServerState::Pending { cause: Some(cause) } => assert!(cause.message.contains("for clients"), "{cause}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_secret_is_watched_by_itself() {
    let mut play = Play::new();
    let key = TargetKey::Secret("s".into());
    let mut watch: watch::Receiver<SecretState> = play.graph.watch(&key);
    assert_eq!(play.wanted(ResourceType::Secret), ["s"]);
    let secret = |text: &'static str| {
        let part = || DataSource::Bytes(text.into());
        let own = TlsCertificate { chain: part(), key: part() };
        Resource::Secret(Arc::new(Secret { name: "s".into(), kind: SecretKind::Certificate(own.into()) }))
    };
    play.good(secret("one"));
    let SecretState::Ready(first) = watch.borrow_and_update().clone() else { panic!() };
    play.bad(ResourceType::Secret, "s");
    assert!(!watch.has_changed().unwrap());
    play.good(secret("two"));
    let SecretState::Ready(second) = watch.borrow_and_update().clone() else { panic!() };
    assert_ne!(first, second);
    play.graph.unwatch(&key);
    assert_eq!(play.wanted(ResourceType::Secret), [] as [&str; 0]);
}
