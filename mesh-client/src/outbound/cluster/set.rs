//! The endpoints of a cluster, carried over from one assignment to the next by address.

use super::{Endpoint, Link, Placement, placement::Placements};
use crate::outbound::{
    connect::Said,
    pick::{Class, Group, Turn},
};
use mesh_xds::resource::{self, ClusterLoadAssignment, HealthStatus, Locality};
use std::{collections::HashMap, fmt, net::SocketAddr, sync::Arc};

/// The live endpoints of an assignment: by priority, by locality, in its order.
pub(super) struct EndpointSet<L: Link> {
    assignment: Arc<ClusterLoadAssignment>,
    priorities: Vec<Vec<Arc<Group<Endpoint<L>>>>>,
    usable: usize,
}

/// A locality of the next assignment, and how much of it stands where it stood.
struct Plan<'a, L: Link> {
    locality: &'a Locality,
    before: Option<(&'a Locality, &'a Arc<Group<Endpoint<L>>>)>,
    /// As many addresses at the start, and at the end, are those of `before`.
    prefix: usize,
    suffix: usize,
}

impl<L: Link> EndpointSet<L> {
    pub(super) fn empty() -> Self {
        Self { assignment: Arc::default(), priorities: Vec::new(), usable: 0 }
    }

    pub(super) fn assignment(&self) -> &Arc<ClusterLoadAssignment> {
        &self.assignment
    }

    /// The groups of each priority, highest first.
    pub(super) fn priorities(&self) -> &[Vec<Arc<Group<Endpoint<L>>>>] {
        &self.priorities
    }

    /// Every endpoint, whatever its health.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Endpoint<L>>> {
        self.priorities.iter().flatten().flat_map(|group| group.members())
    }

    /// The endpoints that the control plane lets be used.
    pub(super) fn usable(&self) -> impl Iterator<Item = &Arc<Endpoint<L>>> {
        self.priorities.iter().flatten().flat_map(|group| group.usable())
    }

    /// Those, and the degraded: whom outlier detection judges.
    pub(super) fn in_service(&self) -> impl Iterator<Item = &Arc<Endpoint<L>>> {
        self.priorities.iter().flatten().flat_map(|group| group.in_service())
    }

    /// How many [`Self::usable`] has.
    pub(super) fn usable_len(&self) -> usize {
        self.usable
    }

    /// The set of the next assignment, and the endpoints that are not in it. Endpoints keep their identity by address, wherever they
    /// move; only new addresses are made. Costs a comparison per endpoint; hashes only those between the first
    /// and the last difference of a locality.
    pub(super) fn next(
        &self,
        assignment: Arc<ClusterLoadAssignment>,
        mut make: impl FnMut(SocketAddr, Arc<Placement>) -> Arc<Endpoint<L>>,
        differ: impl Fn(Said<'_>, Said<'_>) -> bool,
    ) -> (Self, Vec<Arc<Endpoint<L>>>) {
        let mut orphans: HashMap<SocketAddr, Arc<Endpoint<L>>> = HashMap::new();
        let plans: Vec<Vec<Plan<'_, L>>> = (assignment.priorities.iter().enumerate())
            .map(|(priority, localities)| {
                let before = self.localities(priority);
                localities.iter().enumerate().map(|(i, locality)| Plan::new(locality, i, &before, &differ)).collect()
            })
            .collect();
        self.disown(&plans, &mut orphans);

        let mut usable = 0;
        let mut placements = Placements::default();
        let mut priorities = Vec::with_capacity(plans.len());
        for (priority, plans) in (0..).zip(&plans) {
            let mut groups = Vec::with_capacity(plans.len());
            for plan in plans {
                let group = plan.build(&mut placements, |placements, endpoint| {
                    let placement = placements.of(endpoint, &plan.locality.id, priority);
                    // Of a cluster that begins nobody is to be hashed.
                    let orphan = if orphans.is_empty() { None } else { orphans.remove(&endpoint.address) };
                    match orphan {
                        // Its connections are of another kind: they end with their requests.
                        Some(live) if differ(live.placement().said(), placement.said()) => {
                            orphans.insert(endpoint.address, live);
                            make(endpoint.address, placement)
                        }
                        Some(live) => {
                            live.set_placement(placement);
                            live
                        }
                        None => make(endpoint.address, placement),
                    }
                });
                usable += group.usable().count();
                groups.push(group);
            }
            priorities.push(groups);
        }
        drop(plans);
        (Self { assignment, priorities, usable }, orphans.into_values().collect())
    }

    /// The same places with other endpoints.
    pub(super) fn replaced(&self, mut replace: impl FnMut(&Arc<Endpoint<L>>) -> Arc<Endpoint<L>>) -> Self {
        let groups = |groups: &Vec<Arc<Group<Endpoint<L>>>>| {
            groups.iter().map(|group| Arc::new(group.map(&mut replace))).collect::<Vec<_>>()
        };
        let priorities = self.priorities.iter().map(groups).collect();
        Self { assignment: self.assignment.clone(), priorities, usable: self.usable }
    }

    fn localities(&self, priority: usize) -> Vec<(&Locality, &Arc<Group<Endpoint<L>>>)> {
        let localities = self.assignment.priorities.get(priority).into_iter().flatten();
        localities.zip(self.priorities.get(priority).into_iter().flatten()).collect()
    }

    /// Collects the endpoints that no plan keeps in its place.
    fn disown(&self, plans: &[Vec<Plan<'_, L>>], orphans: &mut HashMap<SocketAddr, Arc<Endpoint<L>>>) {
        for (priority, groups) in self.priorities.iter().enumerate() {
            for group in groups {
                let keeps = |plan: &&Plan<'_, L>| plan.before.is_some_and(|(_, before)| Arc::ptr_eq(before, group));
                let plan = plans.get(priority).and_then(|plans| plans.iter().find(keeps));
                let (prefix, suffix) = plan.map_or((0, 0), |plan| (plan.prefix, plan.suffix));
                let members = group.members();
                let middle = &members[prefix..members.len() - suffix];
                orphans.extend(middle.iter().map(|endpoint| (endpoint.address(), endpoint.clone())));
            }
        }
    }
}

impl<'a, L: Link> Plan<'a, L> {
    fn new(
        locality: &'a Locality,
        i: usize,
        before: &[(&'a Locality, &'a Arc<Group<Endpoint<L>>>)],
        differ: &impl Fn(Said<'_>, Said<'_>) -> bool,
    ) -> Self {
        let same = |(old, _): &&(&'a Locality, _)| old.id == locality.id;
        let before = before.get(i).filter(same).or_else(|| before.iter().find(same)).copied();
        let old = before.map_or(&[][..], |(old, _)| &old.endpoints);
        let new = &locality.endpoints;
        let same =
            |(a, b): &(&resource::Endpoint, &resource::Endpoint)| a.address == b.address && !differ(said(a), said(b));
        let prefix = old.iter().zip(new).take_while(same).count();
        let suffix = old[prefix..].iter().rev().zip(new[prefix..].iter().rev()).take_while(same).count();
        Self { locality, before, prefix, suffix }
    }

    fn build(
        &self,
        placements: &mut Placements,
        mut find: impl FnMut(&mut Placements, &resource::Endpoint) -> Arc<Endpoint<L>>,
    ) -> Arc<Group<Endpoint<L>>> {
        let new = &self.locality.endpoints;
        let weight = self.locality.weight;
        if let Some((old, group)) = self.before
            && old == self.locality
        {
            return group.clone();
        }
        let mut members = Vec::with_capacity(new.len());
        let tail = new.len() - self.suffix;
        for (i, endpoint) in new.iter().enumerate() {
            let stays = match self.before {
                Some((old, group)) if i < self.prefix => Some((&old.endpoints[i], &group.members()[i])),
                Some((old, group)) if i >= tail => {
                    let i = i + old.endpoints.len() - new.len();
                    Some((&old.endpoints[i], &group.members()[i]))
                }
                _ => None,
            };
            members.push(match stays {
                Some((said, live)) => {
                    if said != endpoint {
                        let before = live.placement();
                        live.set_placement(placements.of(endpoint, &before.locality, before.priority));
                    }
                    live.clone()
                }
                None => find(placements, endpoint),
            });
        }
        let weights = new.iter().map(|e| e.weight.max(1)).collect();
        let classes = new.iter().map(|e| class(e.health)).collect();
        let turn = self.before.map_or_else(Turn::anywhere, |(_, group)| group.turn());
        Arc::new(Group::new(members, weights, classes, weight, turn))
    }
}

fn said(endpoint: &resource::Endpoint) -> Said<'_> {
    Said { hostname: &endpoint.hostname, metadata: endpoint.metadata.as_deref() }
}

fn class(health: HealthStatus) -> Class {
    match health {
        HealthStatus::Unknown | HealthStatus::Healthy => Class::Usable,
        HealthStatus::Degraded => Class::Degraded,
        HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout => Class::Unusable,
    }
}

impl<L: Link> fmt::Debug for EndpointSet<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointSet")
            .field("name", &self.assignment.name)
            .field("usable", &self.usable)
            .finish_non_exhaustive()
    }
}
