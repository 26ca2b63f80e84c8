use super::{super::ResourceCache, *};
use envoy_types::pb::{
    envoy::config::{cluster::v3::cluster::EdsClusterConfig, core::v3::Node},
    google::rpc::Status,
};

use ResourceType::{Cluster as Cds, ClusterLoadAssignment as Eds, Listener as Lds, RouteConfiguration as Rds};

struct Stream {
    cache: ResourceCache,
    session: Session,
}

fn any(content: &str) -> Any {
    Any { type_url: String::new(), value: content.as_bytes().to_vec() }
}

fn cluster(service_name: &str, alt_stat_name: &str) -> Any {
    let eds = EdsClusterConfig { service_name: service_name.to_owned(), ..EdsClusterConfig::default() };
    let cluster =
        Cluster { eds_cluster_config: Some(eds), alt_stat_name: alt_stat_name.to_owned(), ..Cluster::default() };
    envoy_types::util::pack_any(cluster)
}

impl Stream {
    fn new(resources: &[(ResourceType, &str, &str)]) -> Self {
        let cache = ResourceCache::new();
        let stream = Self { cache, session: Session::default() };
        stream.put(resources);
        stream
    }

    /// One atomic change: empty content removes.
    fn put(&self, resources: &[(ResourceType, &str, &str)]) {
        let mut set = self.cache.resources();
        for &(t, name, content) in resources {
            if content.is_empty() {
                set.remove(t, name);
            } else {
                set.insert(t, name, any(content));
            }
        }
        self.cache.set(set);
    }

    fn request(&mut self, resource_type: ResourceType, names: &[&str], nonce: &str) -> Option<Nack> {
        self.session.on_request(DiscoveryRequest {
            type_url: resource_type.type_url().to_owned(),
            resource_names: names.iter().map(|&n| n.to_owned()).collect(),
            response_nonce: nonce.to_owned(),
            ..DiscoveryRequest::default()
        })
    }

    fn next(&mut self) -> Option<DiscoveryResponse> {
        let view = self.cache.view();
        self.session.next(&view)
    }

    /// Everything owed, in order, as `Type@version: contents`.
    fn drain(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).map(|r| show(&r)).collect()
    }

    /// As [`Self::drain`], and each is accepted at once.
    fn accept_all(&mut self) -> Vec<String> {
        let mut seen = Vec::new();
        while let Some(response) = self.next() {
            let t = ResourceType::from_type_url(&response.type_url).unwrap();
            let names = self.session.subscriptions[&t].names.clone();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            assert_eq!(self.request(t, &names, &response.nonce), None);
            seen.push(show(&response));
        }
        seen
    }
}

fn show(response: &DiscoveryResponse) -> String {
    let contents: Vec<_> = response.resources.iter().map(|r| String::from_utf8_lossy(&r.value).into_owned()).collect();
    let t = match ResourceType::from_type_url(&response.type_url).unwrap() {
        Cds => "Cluster",
        Eds => "Endpoint",
        Lds => "Listener",
        Rds => "Route",
        ResourceType::Secret => "Secret",
    };
    format!("{t}@{}: {}", response.version_info, contents.join(" "))
}

#[test]
fn absent_listener_and_cluster_are_answered_at_once_with_an_empty_world() {
    let mut stream = Stream::new(&[]);
    stream.request(Lds, &["l"], "");
    assert_eq!(stream.drain(), ["Listener@0: "]);
    stream.request(Cds, &["c"], "");
    assert_eq!(stream.drain(), ["Cluster@0: "]);
    stream.request(Rds, &["r"], "");
    stream.request(Eds, &["e"], "");
    assert_eq!(stream.drain(), [""; 0], "absence of routes and endpoints is silence");
    stream.put(&[(Rds, "r", "r1"), (Eds, "e", "e1")]);
    assert_eq!(stream.drain(), ["Endpoint@1: e1", "Route@1: r1"]);
}

#[test]
fn an_ack_is_not_answered_and_new_names_are_although_the_version_is_the_same() {
    let mut stream = Stream::new(&[(Cds, "a", "a1"), (Cds, "b", "b1"), (Eds, "a", "A1"), (Eds, "b", "B1")]);
    stream.request(Cds, &["a"], "");
    stream.request(Eds, &["a"], "");
    assert_eq!(stream.drain(), ["Cluster@1: a1", "Endpoint@1: A1"]);
    stream.request(Cds, &["a"], "1");
    stream.request(Eds, &["a"], "2");
    assert_eq!(stream.drain(), [""; 0]);
    stream.request(Cds, &["a", "b"], "1");
    stream.request(Eds, &["a", "b"], "2");
    assert_eq!(stream.drain(), ["Cluster@1: a1 b1", "Endpoint@1: B1"], "the world, and only what is new");
}

#[test]
fn fewer_names_are_no_reason_to_answer() {
    let mut stream = Stream::new(&[(Cds, "a", "a1"), (Cds, "b", "b1")]);
    stream.request(Cds, &["a", "b"], "");
    stream.drain();
    stream.request(Cds, &["a"], "1");
    assert_eq!(stream.drain(), [""; 0]);
    stream.put(&[(Cds, "b", "b2")]);
    assert_eq!(stream.drain(), [""; 0], "what is no longer subscribed is not sent");
    stream.request(Cds, &["a", "b"], "1");
    assert_eq!(stream.drain(), ["Cluster@2: a1 b2"]);
}

#[test]
fn endpoints_subscribed_again_are_sent_again() {
    let mut stream = Stream::new(&[(Eds, "a", "a1"), (Eds, "b", "b1")]);
    stream.request(Eds, &["a", "b"], "");
    stream.drain();
    stream.request(Eds, &["b"], "1");
    assert_eq!(stream.drain(), [""; 0]);
    stream.request(Eds, &["a", "b"], "1");
    assert_eq!(stream.drain(), ["Endpoint@1: a1"]);
}

#[test]
fn only_endpoints_that_changed_are_pushed() {
    let mut stream = Stream::new(&[(Eds, "a", "a1"), (Eds, "b", "b1")]);
    stream.request(Eds, &["a", "b"], "");
    stream.drain();
    stream.put(&[(Eds, "a", "a2"), (Eds, "unrelated", "u1")]);
    assert_eq!(stream.drain(), ["Endpoint@2: a2"]);
    stream.put(&[(Eds, "unrelated", "u2")]);
    assert_eq!(stream.drain(), [""; 0]);
}

#[test]
fn wildcard_follows_everything_until_names_replace_it() {
    let mut stream = Stream::new(&[(Cds, "a", "a1")]);
    stream.request(Cds, &[], "");
    assert_eq!(stream.drain(), ["Cluster@1: a1"]);
    stream.request(Cds, &[], "1");
    stream.put(&[(Cds, "b", "b1")]);
    assert_eq!(stream.drain(), ["Cluster@2: a1 b1"]);
    stream.request(Cds, &["b"], "2");
    assert_eq!(stream.drain(), ["Cluster@2: b1"], "the answer to new names");
    stream.put(&[(Cds, "a", "a2")]);
    assert_eq!(stream.drain(), [""; 0]);
    stream.put(&[(Cds, "a", "a3")]);
    assert_eq!(stream.drain(), [""; 0]);
    stream.request(Cds, &["*", "b"], "3");
    assert_eq!(stream.drain(), ["Cluster@4: a3 b1"]);
    stream.request(Cds, &["b"], "4");
    stream.request(Cds, &[], "4");
    stream.drain();
    stream.put(&[(Cds, "b", "b2")]);
    assert_eq!(stream.drain(), [""; 0], "an empty list after names subscribes to nothing");
}

#[test]
fn an_empty_list_after_a_star_subscribes_to_nothing() {
    let mut stream = Stream::new(&[(Lds, "a", "a1")]);
    stream.request(Lds, &["*"], "");
    assert_eq!(stream.drain(), ["Listener@1: a1"]);
    stream.request(Lds, &[], "1");
    stream.put(&[(Lds, "a", "a2")]);
    assert_eq!(stream.drain(), [""; 0]);
}

#[test]
fn a_change_is_pushed_clusters_endpoints_listeners_routes() {
    let all = [(Rds, "r", "r1"), (Lds, "l", "l1"), (Eds, "c", "e1"), (Cds, "c", "c1")];
    let mut stream = Stream::new(&all);
    for (t, name) in [(Lds, "l"), (Rds, "r"), (Cds, "c"), (Eds, "c")] {
        stream.request(t, &[name], "");
    }
    assert_eq!(stream.accept_all().len(), 4);
    stream.put(&[(Rds, "r", "r2"), (Lds, "l", "l2"), (Eds, "c", "e2"), (Cds, "c", "c2")]);
    assert_eq!(stream.accept_all(), ["Cluster@2: c2", "Endpoint@2: e2", "Listener@2: l2", "Route@2: r2"]);
}

#[test]
fn a_removed_cluster_goes_only_after_the_routes_that_used_it_were_replaced() {
    let mut stream = Stream::new(&[(Cds, "old", "old1"), (Rds, "r", "to-old")]);
    stream.request(Rds, &["r"], "");
    stream.request(Cds, &["old", "new"], "");
    stream.accept_all();
    stream.put(&[(Cds, "old", ""), (Cds, "new", "new1"), (Rds, "r", "to-new")]);
    assert_eq!(stream.drain(), ["Cluster@2: new1 old1", "Route@2: to-new"]);
    stream.request(Cds, &["new", "old"], "3");
    assert_eq!(stream.drain(), [""; 0], "the client may still be on the old route");
    stream.request(Rds, &["r"], "4");
    assert_eq!(stream.drain(), ["Cluster@2: new1"]);
}

#[test]
fn a_cluster_removed_alone_goes_at_once() {
    let mut stream = Stream::new(&[(Cds, "a", "a1"), (Cds, "b", "b1"), (Rds, "r", "r1")]);
    stream.request(Rds, &["r"], "");
    stream.request(Cds, &[], "");
    stream.accept_all();
    stream.put(&[(Cds, "a", "")]);
    assert_eq!(stream.drain(), ["Cluster@2: b1"]);
    stream.put(&[(Cds, "b", "")]);
    assert_eq!(stream.drain(), ["Cluster@3: "]);
}

#[test]
fn endpoints_of_a_changed_cluster_are_sent_again_so_that_it_can_warm() {
    let mut stream = Stream::new(&[(Eds, "svc", "e1"), (Eds, "other", "o1")]);
    stream.cache.update(Cds, "c", cluster("svc", "one"));
    stream.request(Cds, &[], "");
    stream.request(Eds, &["svc", "other"], "");
    assert_eq!(stream.drain().len(), 2);
    stream.cache.update(Cds, "c", cluster("svc", "two"));
    let pushed = stream.drain();
    assert_eq!(pushed.len(), 2);
    assert_eq!(pushed[1], "Endpoint@1: e1");
}

#[test]
fn a_refusal_is_reported_once_and_the_refused_version_is_not_sent_again() {
    let mut stream = Stream::new(&[(Cds, "a", "bad")]);
    stream.request(Cds, &["a"], "");
    stream.drain();
    let nack = DiscoveryRequest {
        type_url: Cds.type_url().to_owned(),
        node: Some(Node { id: "n1".into(), ..Node::default() }),
        resource_names: vec!["a".into()],
        response_nonce: "1".into(),
        error_detail: Some(Status { message: "cluster a: no".into(), ..Status::default() }),
        ..DiscoveryRequest::default()
    };
    let reported = stream.session.on_request(nack.clone());
    let expected = Nack { node_id: "n1".into(), resource_type: Cds, version: 1, detail: "cluster a: no".into() };
    assert_eq!(reported, Some(expected));
    assert_eq!(stream.session.on_request(nack), None);
    assert_eq!(stream.drain(), [""; 0]);
    let status = stream.session.status().types[&Cds].clone();
    assert_eq!((status.sent, status.acked, status.error.as_deref()), (1, 0, Some("cluster a: no")));
    stream.put(&[(Cds, "a", "good")]);
    assert_eq!(stream.accept_all(), ["Cluster@2: good"]);
    let status = stream.session.status().types[&Cds].clone();
    assert_eq!((status.sent, status.acked, status.error), (2, 2, None));
}

#[test]
fn an_overtaken_nonce_acknowledges_nothing_but_its_names_count() {
    let mut stream = Stream::new(&[(Cds, "a", "a1"), (Cds, "b", "b1")]);
    stream.request(Cds, &["a"], "");
    stream.drain();
    stream.put(&[(Cds, "a", "a2")]);
    assert_eq!(stream.drain(), ["Cluster@2: a2"]);
    stream.request(Cds, &["a", "b"], "1");
    assert!(stream.session.status().types[&Cds].outstanding);
    assert_eq!(stream.session.status().types[&Cds].acked, 0);
    assert_eq!(stream.drain(), ["Cluster@2: a2 b1"]);
}

#[test]
fn a_nonce_and_version_of_an_earlier_stream_do_not_stop_the_first_answer() {
    let mut stream = Stream::new(&[(Cds, "a", "a1"), (Eds, "a", "e1")]);
    for t in [Cds, Eds] {
        let request = DiscoveryRequest {
            type_url: t.type_url().to_owned(),
            version_info: "1".into(),
            response_nonce: "7".into(),
            resource_names: vec!["a".into()],
            ..DiscoveryRequest::default()
        };
        stream.session.on_request(request);
    }
    assert_eq!(stream.drain(), ["Cluster@1: a1", "Endpoint@1: e1"]);
}

#[test]
fn an_unknown_type_is_ignored() {
    let mut stream = Stream::new(&[]);
    let request = DiscoveryRequest { type_url: "type.googleapis.com/x.Y".into(), ..DiscoveryRequest::default() };
    assert_eq!(stream.session.on_request(request), None);
    assert_eq!(stream.drain(), [""; 0]);
}
