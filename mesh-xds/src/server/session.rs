//! One ADS stream, state of the world, without I/O: requests in, responses out, in push order.

use super::{
    Any, Nack, Node, PUSH_ORDER, ResourceType, StreamStatus, TypeStatus,
    cache::{Entry, TypeView, View},
};
use envoy_types::pb::envoy::{
    config::{cluster::v3::Cluster, core::v3::ControlPlane},
    service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
};
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Protocol state of one stream.
///
/// After every [`Self::on_request`] and every change of the cache, call [`Self::next`] until it returns `None`.
#[derive(Debug, Default)]
pub(crate) struct Session {
    node: Node,
    last_nonce: u64,
    subscriptions: BTreeMap<ResourceType, Subscription>,
}

/// One type's subscription.
#[derive(Debug, Default)]
struct Subscription {
    /// Everything is subscribed: by an empty first request (the old form), or by `*`.
    wildcard: bool,
    /// By the old form: an empty list keeps it. After any other, an empty list subscribes to nothing.
    implicit: bool,
    names: Arc<BTreeSet<String>>,
    /// The client asked for something that must be answered even if nothing changed (LDS and CDS).
    due: bool,
    /// Endpoints to be sent again although the client has them.
    resend: BTreeSet<String>,
    /// The version of the type up to which the cache was looked at; `None` after the client asked for more.
    seen: Option<u64>,
    sent: BTreeMap<String, Entry>,
    sent_version: u64,
    acked_version: u64,
    nonce: String,
    outstanding: bool,
    error: Option<String>,
    /// Removed clusters are still in the last response, because routes to them may be in force at the client: they go
    /// once it has answered to the new routes (make before break).
    retaining: bool,
}

impl Session {
    /// Takes a request in. Returns the refusal it carries, if any.
    pub(crate) fn on_request(&mut self, request: DiscoveryRequest) -> Option<Nack> {
        if let Some(node) = request.node {
            self.node = node;
        }
        let Some(resource_type) = ResourceType::from_type_url(&request.type_url) else {
            tracing::debug!(node = self.node.id, type_url = request.type_url, "unknown resource type ignored");
            return None;
        };
        let first = !self.subscriptions.contains_key(&resource_type);
        let subscription = self.subscriptions.entry(resource_type).or_default();
        // A nonce of an earlier stream, or of a response that was overtaken, acknowledges nothing; its names still count,
        // because requests arrive in the order in which the client sent them.
        let answers = !first && request.response_nonce == subscription.nonce;
        let mut nack = None;
        if answers && subscription.outstanding {
            subscription.outstanding = false;
            match request.error_detail {
                Some(status) => {
                    subscription.error = Some(status.message.clone());
                    nack = Some(Nack {
                        node_id: self.node.id.clone(),
                        resource_type,
                        version: subscription.sent_version,
                        detail: status.message,
                    });
                }
                None => {
                    subscription.acked_version = subscription.sent_version;
                    subscription.error = None;
                }
            }
        }
        subscription.subscribe(resource_type, first, request.resource_names);
        nack
    }

    /// The next response that the client is owed, or `None` when it is up to date with `view`.
    pub(crate) fn next(&mut self, view: &View) -> Option<DiscoveryResponse> {
        for resource_type in PUSH_ORDER {
            if !self.subscriptions.get(&resource_type).is_some_and(|s| s.is_stale(view.of(resource_type))) {
                continue;
            }
            let resources = if resource_type.is_full_state() {
                self.next_world(resource_type, view)
            } else {
                self.next_news(resource_type, view)
            };
            if let Some(resources) = resources {
                return Some(self.respond(resource_type, view.of(resource_type).version, resources));
            }
        }
        None
    }

    /// LDS and CDS: everything subscribed that exists, if it differs from what was sent or was asked for.
    fn next_world(&mut self, resource_type: ResourceType, view: &View) -> Option<Vec<Any>> {
        let retain = resource_type == ResourceType::Cluster && self.routes_pending(view);
        let of_type = view.of(resource_type);
        let subscription = self.subscriptions.get_mut(&resource_type)?;
        let mut wanted = subscription.selection(of_type);
        let existing = wanted.len();
        if retain {
            for (name, entry) in &subscription.sent {
                wanted.entry(name.clone()).or_insert_with(|| entry.clone());
            }
        }
        subscription.retaining = wanted.len() > existing;
        subscription.seen = Some(of_type.version);
        let due = std::mem::take(&mut subscription.due);
        if !due && same(&wanted, &subscription.sent) {
            return None;
        }
        let before = std::mem::replace(&mut subscription.sent, wanted);
        let resources = anys(subscription.sent.values(), &self.node);
        if resource_type == ResourceType::Cluster {
            self.resend_endpoints_of_changed_clusters(&before);
        }
        Some(resources)
    }

    /// RDS and EDS: what the client does not have yet.
    fn next_news(&mut self, resource_type: ResourceType, view: &View) -> Option<Vec<Any>> {
        let of_type = view.of(resource_type);
        let subscription = self.subscriptions.get_mut(&resource_type)?;
        let news = subscription.news(of_type);
        subscription.seen = Some(of_type.version);
        subscription.resend.clear();
        if news.is_empty() {
            return None;
        }
        let resources = anys(news.values(), &self.node);
        subscription.sent.extend(news);
        Some(resources)
    }

    /// For the server's status page and tests.
    pub(crate) fn status(&self) -> StreamStatus {
        let types = self.subscriptions.iter().map(|(&t, s)| (t, s.status())).collect();
        StreamStatus { node_id: self.node.id.clone(), peer: None, types }
    }

    fn respond(&mut self, resource_type: ResourceType, version: u64, resources: Vec<Any>) -> DiscoveryResponse {
        self.last_nonce += 1;
        let nonce = format!("{:x}", self.last_nonce);
        if let Some(subscription) = self.subscriptions.get_mut(&resource_type) {
            subscription.nonce.clone_from(&nonce);
            subscription.sent_version = version;
            subscription.outstanding = true;
        }
        DiscoveryResponse {
            version_info: version.to_string(),
            resources,
            type_url: resource_type.type_url().to_owned(),
            nonce,
            control_plane: Some(ControlPlane { identifier: "mesh".to_owned() }),
            ..DiscoveryResponse::default()
        }
    }

    /// Whether the client has yet to hear of, or to answer, listeners or routes of this view.
    fn routes_pending(&self, view: &View) -> bool {
        [ResourceType::Listener, ResourceType::RouteConfiguration].into_iter().any(|resource_type| {
            let of_type = view.of(resource_type);
            self.subscriptions.get(&resource_type).is_some_and(|subscription| {
                subscription.outstanding
                    || if resource_type.is_full_state() {
                        !same(&subscription.selection(of_type), &subscription.sent)
                    } else {
                        !subscription.news(of_type).is_empty()
                    }
            })
        })
    }

    /// A client warms a changed cluster until endpoints for it arrive (Envoy, "resource warming"), so they are sent again.
    fn resend_endpoints_of_changed_clusters(&mut self, before: &BTreeMap<String, Entry>) {
        let Some(clusters) = self.subscriptions.get(&ResourceType::Cluster) else { return };
        let changed: Vec<String> = clusters
            .sent
            .iter()
            .filter(|(name, entry)| before.get(*name).is_some_and(|b| b.changed != entry.changed))
            .map(|(name, entry)| eds_name(name, entry.any()))
            .collect();
        let Some(endpoints) = self.subscriptions.get_mut(&ResourceType::ClusterLoadAssignment) else { return };
        let subscribed = changed.into_iter().filter(|name| endpoints.names.contains(name));
        endpoints.resend.extend(subscribed.collect::<Vec<_>>());
    }
}

impl Subscription {
    fn subscribe(&mut self, resource_type: ResourceType, first: bool, names: Vec<String>) {
        let mut names: BTreeSet<String> = names.into_iter().collect();
        self.implicit = resource_type.is_full_state() && names.is_empty() && (first || self.implicit);
        let wildcard = self.implicit || (resource_type.is_full_state() && names.remove("*"));
        let added = !names.is_subset(&self.names) || (wildcard && !self.wildcard);
        if first || added {
            self.due = resource_type.is_full_state();
            self.seen = None;
        }
        self.wildcard = wildcard;
        if !wildcard {
            self.sent.retain(|name, _| names.contains(name));
        }
        if *self.names != names {
            self.names = Arc::new(names);
        }
    }

    /// Whether there may be something to send. Cheap, and never wrong when it says no.
    fn is_stale(&self, of_type: &TypeView) -> bool {
        self.due || self.retaining || !self.resend.is_empty() || self.seen != Some(of_type.version)
    }

    /// What is subscribed and exists.
    fn selection(&self, of_type: &TypeView) -> BTreeMap<String, Entry> {
        if self.wildcard {
            return of_type.resources.clone();
        }
        let existing = |name: &String| Some((name.clone(), of_type.resources.get(name)?.clone()));
        self.names.iter().filter_map(existing).collect()
    }

    /// RDS and EDS: what is subscribed, exists, and is new to the client.
    fn news(&self, of_type: &TypeView) -> BTreeMap<String, Entry> {
        let mut news = self.selection(of_type);
        news.retain(|name, entry| {
            self.resend.contains(name) || self.sent.get(name).is_none_or(|sent| sent.changed != entry.changed)
        });
        news
    }

    fn status(&self) -> TypeStatus {
        TypeStatus {
            names: self.names.clone(),
            wildcard: self.wildcard,
            seen: self.seen.unwrap_or(0),
            sent: self.sent_version,
            acked: self.acked_version,
            outstanding: self.outstanding,
            error: self.error.clone(),
        }
    }
}

fn same(a: &BTreeMap<String, Entry>, b: &BTreeMap<String, Entry>) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((n, x), (m, y))| n == m && x.changed == y.changed)
}

fn anys<'a>(entries: impl Iterator<Item = &'a Entry>, node: &Node) -> Vec<Any> {
    entries.map(|entry| entry.for_node(node)).collect()
}

/// The name under which a cluster's endpoints are served.
fn eds_name(cluster: &str, any: &Any) -> String {
    let service_name = Cluster::decode(any.value.as_slice()).ok().and_then(|c| c.eds_cluster_config);
    service_name.map(|c| c.service_name).filter(|name| !name.is_empty()).unwrap_or_else(|| cluster.to_owned())
}

#[cfg(test)]
mod tests;
