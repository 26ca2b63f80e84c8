//! Which endpoints are near a client: locality weights and priorities, as istiod makes them for each proxy.

use super::{Target, cluster, uint32};
use crate::model::{LocalityLb, Resolution, Subset};
use envoy_types::{
    pb::{
        envoy::config::{
            core::v3::{Locality, Node},
            endpoint::v3::{ClusterLoadAssignment, LocalityLbEndpoints},
        },
        google::protobuf::{Any, Struct, value::Kind},
    },
    util::pack_any,
};
use mesh_xds::server::Tailor;
use std::collections::{BTreeMap, BTreeSet};

/// Labels, with those of the locality.
type Labels = BTreeMap<String, String>;

/// What is done for each client with the endpoints of a cluster.
#[derive(Clone, Debug)]
struct Rules {
    setting: LocalityLb,
    /// Istio: without outlier detection nobody would notice that a priority fails.
    failover: bool,
    /// Of every endpoint, by locality.
    labels: Vec<Vec<Labels>>,
}

/// What is made of the endpoints of a cluster for each client; `None`: they are the same for all.
pub(super) fn endpoints(
    target: &Target<'_>,
    subset: Option<&Subset>,
    assignment: &ClusterLoadAssignment,
) -> Option<Tailor> {
    let rules = Rules::of(target, subset, assignment)?;
    let assignment = assignment.clone();
    Some(rules.tailor(move |rules, node| {
        let mut assignment = assignment.clone();
        rules.apply(&mut assignment, node);
        pack_any(assignment)
    }))
}

/// The same for a cluster that has its endpoints itself.
pub(super) fn cluster(target: &Target<'_>, subset: Option<&Subset>, cluster: &cluster::Cluster) -> Option<Tailor> {
    let rules = Rules::of(target, subset, cluster.load_assignment.as_ref()?)?;
    let cluster = cluster.clone();
    Some(rules.tailor(move |rules, node| {
        let mut cluster = cluster.clone();
        if let Some(assignment) = &mut cluster.load_assignment {
            rules.apply(assignment, node);
        }
        pack_any(cluster)
    }))
}

impl Rules {
    fn of(target: &Target<'_>, subset: Option<&Subset>, assignment: &ClusterLoadAssignment) -> Option<Self> {
        let traffic = cluster::effective(target.policy, target.port.number.value, subset);
        let own = traffic.load_balancer.as_ref().and_then(|balancer| balancer.locality.clone());
        let setting = own.unwrap_or_else(|| target.mesh.locality.clone());
        let failover = traffic.outlier_detection.is_some();
        // One name of LOGICAL_DNS has nothing to choose from.
        let one = target.service.resolution == Resolution::DnsRoundRobin || target.service.endpoints.is_empty();
        if !setting.enabled || one || (setting.distribute.is_empty() && !failover) {
            return None;
        }
        let labels = target.by_locality(subset).into_values();
        let labels =
            labels.map(|w| w.into_iter().map(|w| with_locality(w.labels.clone(), &(&w.locality).into())).collect());
        let labels: Vec<_> = labels.collect();
        debug_assert_eq!(labels.len(), assignment.endpoints.len(), "both are by locality");
        Some(Self { setting, failover, labels })
    }

    fn tailor(self, make: impl Fn(&Self, &Node) -> Any + Send + Sync + 'static) -> Tailor {
        Tailor::new(format!("{self:?}"), move |node| make(&self, node))
    }

    /// istiod's `ApplyLocalityLoadBalancer`.
    fn apply(&self, assignment: &mut ClusterLoadAssignment, node: &Node) {
        let own = node.locality.clone().unwrap_or_default();
        if !self.setting.distribute.is_empty() {
            self.distribute(assignment, &own);
        } else if self.failover {
            if !self.setting.failover_priority.is_empty() {
                self.prefer_alike(assignment, node, &own);
            }
            if self.setting.failover_priority.is_empty() || !self.setting.failover.is_empty() {
                self.prefer_near(assignment, &own);
            }
        }
    }

    /// `applyLocalityWeights`: what no share leads to has no endpoints any more.
    fn distribute(&self, assignment: &mut ClusterLoadAssignment, own: &Locality) {
        let Some(rule) = self.setting.distribute.iter().find(|rule| matches(own, &rule.from)) else { return };
        let mut unmatched: BTreeSet<usize> = (0..assignment.endpoints.len()).collect();
        for (pattern, share) in &rule.to {
            let there = |index: &usize| matches(&locality(&assignment.endpoints[*index]), pattern);
            let found: Vec<usize> = unmatched.iter().copied().filter(there).collect();
            let weight = |index: &usize| weight(&assignment.endpoints[*index]);
            let total: u64 = found.iter().map(weight).sum();
            let shares: Vec<(usize, u64)> =
                found.iter().map(|i| (*i, (weight(i) * u64::from(*share)).div_ceil(total.max(1)))).collect();
            for (index, share) in shares {
                unmatched.remove(&index);
                assignment.endpoints[index].load_balancing_weight =
                    Some(uint32(u32::try_from(share).unwrap_or(u32::MAX)));
            }
        }
        for index in unmatched {
            assignment.endpoints[index].lb_endpoints.clear();
        }
    }

    /// `applyLocalityFailover`: the same sub-zone, zone, region, the region that is named for one's own, the rest.
    fn prefer_near(&self, assignment: &mut ClusterLoadAssignment, own: &Locality) {
        for endpoints in &mut assignment.endpoints {
            let there = locality(endpoints);
            let next = self.setting.failover.iter().find(|rule| rule.from == own.region);
            let distance = match next {
                _ if there.region == own.region => match (there.zone == own.zone, there.sub_zone == own.sub_zone) {
                    (true, true) => 0,
                    (true, false) => 1,
                    (false, _) => 2,
                },
                Some(rule) if rule.to != there.region => 4,
                _ => 3,
            };
            endpoints.priority = endpoints.priority * 5 + distance;
        }
        close_gaps(assignment);
    }

    /// `applyFailoverPriorities`: the first label in which an endpoint differs from the client decides.
    fn prefer_alike(&self, assignment: &mut ClusterLoadAssignment, node: &Node, own: &Locality) {
        let client = labels_of(node);
        if client.is_empty() {
            return;
        }
        let mut client = with_locality(client, own);
        let wanted: Vec<&str> = (self.setting.failover_priority.iter())
            .map(|label| match label.split_once('=') {
                Some((key, value)) => {
                    client.insert(key.to_owned(), value.to_owned());
                    key
                }
                None => label,
            })
            .collect();
        let rank = |labels: &Labels| {
            let differs = wanted.iter().position(|label| client.get(*label) != labels.get(*label));
            differs.map_or(0, |place| u32::try_from(wanted.len() - place).unwrap_or(u32::MAX))
        };
        let mut parts = Vec::new();
        for (endpoints, labels) in std::mem::take(&mut assignment.endpoints).into_iter().zip(&self.labels) {
            let mut by_rank: BTreeMap<u32, LocalityLbEndpoints> = BTreeMap::new();
            let shape = LocalityLbEndpoints { lb_endpoints: Vec::new(), ..endpoints.clone() };
            for (endpoint, labels) in endpoints.lb_endpoints.into_iter().zip(labels) {
                let priority = rank(labels);
                let part = by_rank.entry(priority).or_insert_with(|| LocalityLbEndpoints { priority, ..shape.clone() });
                part.lb_endpoints.push(endpoint);
            }
            for mut part in by_rank.into_values() {
                let weights =
                    part.lb_endpoints.iter().map(|e| e.load_balancing_weight.map_or(1, |weight| weight.value));
                part.load_balancing_weight = Some(uint32(weights.fold(0, u32::saturating_add)));
                parts.push(part);
            }
        }
        assignment.endpoints = parts;
        close_gaps(assignment);
    }
}

/// Priorities from 0 on, in the same order.
fn close_gaps(assignment: &mut ClusterLoadAssignment) {
    let used: BTreeSet<u32> = assignment.endpoints.iter().map(|endpoints| endpoints.priority).collect();
    for endpoints in &mut assignment.endpoints {
        endpoints.priority = u32::try_from(used.range(..endpoints.priority).count()).unwrap_or(u32::MAX);
    }
}

fn locality(endpoints: &LocalityLbEndpoints) -> Locality {
    endpoints.locality.clone().unwrap_or_default()
}

fn weight(endpoints: &LocalityLbEndpoints) -> u64 {
    endpoints.load_balancing_weight.map_or(1, |weight| weight.value).into()
}

/// Istio's `LocalityMatch`: `*` and missing parts match all.
fn matches(locality: &Locality, pattern: &str) -> bool {
    let mut parts = pattern.splitn(3, '/');
    let region = parts.next().unwrap_or_default();
    let mut part = |own: &str| parts.next().is_none_or(|part| part.is_empty() || part == "*" || part == own);
    (region == "*" || region == locality.region) && part(&locality.zone) && part(&locality.sub_zone)
}

fn with_locality(mut labels: Labels, locality: &Locality) -> Labels {
    let Locality { region, zone, sub_zone } = locality;
    let named = [
        ("topology.kubernetes.io/region", region),
        ("topology.kubernetes.io/zone", zone),
        ("topology.istio.io/subzone", sub_zone),
    ];
    for (label, value) in named.into_iter().filter(|(_, value)| !value.is_empty()) {
        labels.entry(label.to_owned()).or_insert_with(|| value.clone());
    }
    labels
}

/// `LABELS` of the node's metadata, where Istio's proxies have them.
pub(super) fn labels_of(node: &Node) -> Labels {
    let labels = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("LABELS"));
    let Some(Kind::StructValue(Struct { fields })) = labels.and_then(|labels| labels.kind.as_ref()) else {
        return Labels::new();
    };
    let text = |(key, value): (&String, &envoy_types::pb::google::protobuf::Value)| match &value.kind {
        Some(Kind::StringValue(text)) => Some((key.clone(), text.clone())),
        _ => None,
    };
    fields.iter().filter_map(text).collect()
}
