//! What mesh-client makes of the translation: its own validation, with the places of the documents.

use crate::{
    model::{Authorization, Clause, Model, Rule},
    problem::{At, Report},
    translate::{self, Options, Target},
};
use envoy_types::pb::google::protobuf::Any;
use mesh_xds::{
    bootstrap::{CertificateProvider, FileWatcher},
    resource::{Decoder, Resource, ResourceType},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// What stands before the parts of server listeners that documents speak of.
const FILTERS: [&str; 2] = ["-rule[0]\"].", "providers[\"origins-0\"]."];

/// Warns of every part that mesh-client would ignore or refuse.
pub(super) fn check(model: &Model, report: &Report) {
    debug_assert_eq!(report.errors(), 0, "a model with errors is not translated");
    let files = FileWatcher {
        certificate_file: Some("cert.pem".into()),
        private_key_file: Some("key.pem".into()),
        ca_certificate_file: Some("ca.pem".into()),
        spiffe_trust_bundle_map_file: None,
        refresh_interval: Duration::from_secs(1),
    };
    let mut check = Check {
        providers: [(translate::PROVIDER.to_owned(), CertificateProvider::FileWatcher(files))].into(),
        said: BTreeSet::new(),
        report,
    };
    let options = Options::default();
    for target in translate::targets(model) {
        check.target(&target, model, &options);
    }
    check.servers(model);
}

struct Check<'a> {
    providers: BTreeMap<String, CertificateProvider>,
    /// One place says a thing once, whatever the number of resources made from it.
    said: BTreeSet<(At, String)>,
    report: &'a Report,
}

impl Check<'_> {
    fn target(&mut self, target: &Target<'_>, model: &Model, options: &Options) {
        let service = target.service.object.at();
        let policy = target.policy.map_or(service, |p| p.object.at());
        let (routes, places) = target.routes(model);
        let routing = target.routing.map_or(service, |r| r.object.at());
        self.resource(ResourceType::RouteConfiguration, &routes, |path| match route_of(path) {
            Some((index, rest)) => (places.get(index).copied().unwrap_or(routing), rest),
            None => (routing, path),
        });
        let base = self.resource(ResourceType::Cluster, &target.cluster(None, options), |path| (policy, path));
        if target.has_eds() {
            self.resource(ResourceType::ClusterLoadAssignment, &target.endpoints(None, options), |path| {
                (service, path)
            });
        }
        for subset in target.subsets() {
            let cluster = target.cluster(Some(subset), options);
            let place = &subset.name.at;
            // What the subset inherits is said of the policy.
            self.said.extend(base.iter().map(|said| (place.clone(), said.clone())));
            self.resource(ResourceType::Cluster, &cluster, |path| (place, path));
        }
    }

    /// What servers are told: of each condition and each issuer by itself, for then its place is known.
    fn servers(&mut self, model: &Model) {
        for policy in &model.security.authorizations {
            let rule = |from: &[&Clause], to: &[&Clause], when: &[&Clause]| {
                let clauses = |all: &[&Clause]| all.iter().copied().cloned().collect::<Vec<_>>();
                let any_of = |all: &[&Clause]| if all.is_empty() { Vec::new() } else { vec![clauses(all)] };
                Rule { from: any_of(from), to: any_of(to), when: clauses(when) }
            };
            for Rule { from, to, when } in &policy.rules {
                let from = from.iter().flatten().map(|clause| (clause, rule(&[clause], &[], &[])));
                let to = to.iter().flatten().map(|clause| (clause, rule(&[], &[clause], &[])));
                let when = when.iter().map(|clause| (clause, rule(&[], &[], &[clause])));
                for (clause, rule) in from.chain(to).chain(when) {
                    let alone = Authorization { rules: vec![rule], ..policy.clone() };
                    self.server(&translate::listener_of(&[], &[&alone]), &clause.at);
                }
            }
        }
        for rule in model.security.requests.iter().flat_map(|policy| &policy.rules) {
            self.server(&translate::listener_of(&[rule], &[]), &rule.issuer.at);
        }
    }

    fn server(&mut self, listener: &Any, at: &At) {
        self.resource(ResourceType::Listener, listener, |path| {
            let rest = FILTERS.iter().find_map(|before| Some(path.split_once(before)?.1));
            (at, rest.unwrap_or(path))
        });
    }

    /// Says of a resource what `place` finds a place for. Returns all of it.
    fn resource<'p>(
        &mut self,
        resource_type: ResourceType,
        any: &Any,
        place: impl for<'a> Fn(&'a str) -> (&'p At, &'a str),
    ) -> Vec<String> {
        let mut decoder = Decoder::new(&self.providers);
        let refused = Resource::decode(resource_type, &any.value, &mut decoder).err();
        let refused =
            refused.map(|invalid| (invalid.path, format!("{}: the {resource_type} is refused", invalid.reason)));
        let ignored = decoder.take_notes().into_iter().map(|note| (note.path, note.reason));
        let mut all = Vec::new();
        for (path, reason) in ignored.chain(refused) {
            let (at, path) = place(&path);
            let finding = format!("mesh-client: {path}: {reason}");
            if self.said.insert((at.clone(), finding.clone())) {
                self.report.warning(at, finding.clone());
            }
            all.push(finding);
        }
        all
    }
}

/// Splits `virtual_hosts[0].routes[N].rest`.
fn route_of(path: &str) -> Option<(usize, &str)> {
    let (index, rest) = path.strip_prefix("virtual_hosts[0].routes[")?.split_once("].")?;
    Some((index.parse().ok()?, rest))
}
