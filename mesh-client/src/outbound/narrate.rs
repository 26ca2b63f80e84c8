//! The decisions of the request path, in words: for [`Explain`] and [`Mesh::explain`](crate::Mesh::explain).

use crate::{
    channel::Core,
    outbound::{
        call::Settings,
        cluster::{Endpoint, Resource},
        connect::Subchannel,
        pick::MetadataKey,
        resolve::{Routing, State, UpstreamRef},
        retry::Decision,
        route::{ClusterChoice, Clusters, Forward, Profile, RequestHead, RouteAction, Trail, hash_of_header},
        timeout::is_grpc,
        upstream::Upstream,
    },
    telemetry::{
        explain::{Explain, Explanation, Step},
        metrics::subset_of,
    },
};
use http::HeaderMap;
use mesh_tls::PeerIdentity;
use mesh_xds::resource::{
    Cluster, DropOverload, HealthChecker, Hedge, HttpProtocol, LbPolicy, LbSettings, LocalityId, LocalityLb,
    OutlierDetection, RoutingPriority, TransportSocket,
};
use std::{borrow::Cow, net::SocketAddr};
use tokio::time::Instant;

pub(crate) use crate::error::chain;

/// At most this many endpoints of a cluster are listed.
const MAX_ENDPOINTS: usize = 32;

/// Listener, virtual host and version.
pub(crate) fn config(routing: &Routing) -> [Step; 3] {
    let snapshot = &routing.snapshot;
    let vhost = match snapshot.virtual_host.and_then(|i| snapshot.routes.virtual_hosts.get(i)) {
        Some(vhost) => {
            format!("`{}` of route configuration `{}`, for host `{}`", vhost.name, snapshot.routes.name, snapshot.host)
        }
        None => format!("none of route configuration `{}` answers for host `{}`", snapshot.routes.name, snapshot.host),
    };
    [
        step("config", format!("version {}", snapshot.version)),
        step("listener", format!("`{}`", snapshot.listener.name)),
        step("virtual host", vhost),
    ]
}

/// The route that was found, and why earlier ones were not.
pub(crate) fn route(trail: &Trail<'_, UpstreamRef>) -> Vec<Step> {
    let label =
        |index: usize, name: &str| if name.is_empty() { format!("#{index}") } else { format!("#{index} `{name}`") };
    let skipped =
        trail.skipped.iter().map(|s| step("skipped", format!("route {}: {}", label(s.index, &s.name), s.reason)));
    let found = match &trail.found {
        Ok(entry) => step("route", label(entry.index, &entry.name)),
        Err(none) => step("route", none.to_string()),
    };
    skipped.chain([found]).collect()
}

/// The cluster that was drawn.
pub(crate) fn cluster(forward: &Forward<UpstreamRef>, choice: &ClusterChoice<UpstreamRef>) -> Vec<Step> {
    let total = forward.clusters.total_weight();
    let of =
        if total > choice.weight { format!(", drawn with weight {} of {total}", choice.weight) } else { String::new() };
    let of = match &forward.clusters {
        Clusters::Named { header, .. } => format!(", named by header {header}"),
        _ => of,
    };
    let mut steps = vec![step("cluster", format!("`{}`{of}", choice.name))];
    if let Some(subset) = subset_of(&choice.name) {
        steps.push(step("subset", format!("`{subset}`")));
    }
    steps
}

/// Who is at the other end of the connection.
pub(crate) fn peer(peer: Option<&PeerIdentity>) -> String {
    match peer {
        None => "unknown: the connection is plaintext".into(),
        Some(peer) => format!("{}, over TLS", identity(peer)),
    }
}

/// The name in its certificate: the SPIFFE id, or else the subject.
pub(crate) fn identity(peer: &PeerIdentity) -> String {
    peer.spiffe_id().map_or_else(|| peer.subject().to_owned(), ToString::to_string)
}

/// How one attempt ended and what follows.
pub(crate) fn attempt(explain: &Explain, number: u32, endpoint: Option<SocketAddr>, ended: &str, decision: Decision) {
    let place = endpoint.map_or(Cow::Borrowed("no endpoint"), |e| Cow::Owned(e.to_string()));
    let then = match decision {
        Decision::Return(_) if ended.starts_with("HTTP 2") && !ended.contains("grpc-status") => String::new(),
        Decision::Return(stop) => format!("; final: {stop}"),
        Decision::RetryNow => "; sent again at once, the server did not process it".into(),
        Decision::RetryAfter(delay) => format!("; retried after {delay:?}"),
    };
    explain.add("attempt", format!("{number} at {place}: {ended}{then}"));
}

/// What would become of a request with this head.
pub(crate) fn request(core: &Core, request: &http::request::Parts) -> Explanation {
    let mut steps = vec![step("target", &*core.facts.label)];
    match &**core.resolver.state() {
        State::Pending(cause) => {
            let why = cause.as_ref().map_or_else(|| "it has not answered yet".into(), ToString::to_string);
            steps.push(step("config", format!("none yet from {}: {why}", core.server)));
        }
        State::Absent(cause) => {
            steps.push(step("config", format!("{} does not know the target: {cause}", core.server)))
        }
        State::Ready(routing) => {
            steps.extend(config(routing));
            live(routing, request, &mut steps);
        }
    }
    Explanation { steps }
}

fn live(routing: &Routing, request: &http::request::Parts, steps: &mut Vec<Step>) {
    let Some(table) = &routing.table else { return };
    let head = RequestHead::of(request);
    let trail = table.explain(&head, &mut |bound| fastrand::u32(..bound.max(1)));
    steps.extend(route(&trail));
    let Ok(entry) = trail.found else { return };
    let forward = match &entry.action {
        RouteAction::Forward(forward) => forward,
        RouteAction::Answer(answer) => return steps.push(step("action", answer.describe(&head))),
        RouteAction::Unsupported(reason) => return steps.push(step("action", format!("does not forward: {reason}"))),
    };
    steps.extend(limits(forward, &routing.facts.settings, &request.headers));
    steps.extend(forward.mirrors.iter().map(|mirror| step("mirror", mirror.to_string())));
    if is_grpc(&request.headers) {
        steps.push(step("protocol", "gRPC"));
    }
    let total = forward.clusters.total_weight();
    if let Clusters::Named { header, .. } = &forward.clusters
        && let Ok(drawn) = forward.draw(&head, &mut |_| 0)
    {
        steps.push(step("cluster", format!("`{}`, named by header {header}", forward.choice(drawn).name)));
    }
    // Cookies that are missing would be made; what they will be is not known.
    let hash = |upstream: &Upstream| match (upstream.live.hash_header(), &forward.hasher) {
        (Some(name), _) => Some(hash_of_header(&head, &name, routing.facts.profile)),
        (None, Some(hasher)) => {
            Some(hasher.hash(&head, routing.facts.channel_id, || 0)).filter(|h| h.cookies.is_empty()).map(|h| h.hash)
        }
        (None, None) => Some(None),
    };
    for choice in forward.possible(&head) {
        let choice = match choice {
            Ok(choice) => choice,
            Err(error) => {
                steps.push(step("cluster", error.to_string()));
                continue;
            }
        };
        if let Some(filters) = &choice.filters {
            steps.push(step("filters", filters.to_string()));
        }
        if let Some(edits) = &choice.edits {
            steps.push(step("edits", edits.to_string()));
        }
        let weight =
            if total > choice.weight { format!(", weight {} of {total}", choice.weight) } else { String::new() };
        steps.push(step("cluster", format!("`{}`{weight}", choice.name)));
        if let Some(subset) = subset_of(&choice.name) {
            steps.push(step("subset", format!("`{subset}`")));
        }
        match &choice.cluster {
            UpstreamRef::Failed(cause) => steps.push(step("cluster", format!("cannot be used: {cause}"))),
            UpstreamRef::Live(upstream) => match routing.leaves(*upstream) {
                [] => {
                    let upstream = &routing.upstreams()[*upstream];
                    steps.extend(balancing(upstream, choice.metadata.as_deref(), hash(upstream)));
                    serving(upstream, routing.facts.profile, steps);
                }
                leaves => {
                    for upstream in leaves.iter().map(|leaf| &routing.upstreams()[*leaf]) {
                        steps.push(leaf(upstream, &choice.name));
                        steps.extend(balancing(upstream, choice.metadata.as_deref(), hash(upstream)));
                        serving(upstream, routing.facts.profile, steps);
                    }
                }
            },
        }
    }
}

/// What limits a request to this route, and what is tried again.
pub(crate) fn limits(forward: &Forward<UpstreamRef>, settings: &Settings, headers: &HeaderMap) -> Vec<Step> {
    let mut steps = Vec::new();
    if let Some(deadline) = forward.timeouts.deadline(Instant::now(), headers) {
        steps.push(step("timeout", format!("{:?} ({})", deadline.limit, deadline.source)));
    }
    if let Some(idle) = forward.idle {
        steps.push(step("timeout", format!("{idle:?} without a movement (the route's idle_timeout)")));
    }
    if let Some(limit) = settings.response_headers {
        steps.push(step(
            "timeout",
            format!("{limit:?} from the end of a request to its answer (response_headers_timeout)"),
        ));
    }
    if let Some(policy) = &forward.retry {
        let mut text = format!("at most {}", policy.max_retries());
        if let Some(limit) = policy.per_try_timeout() {
            text += &format!(", each attempt within {limit:?}");
        }
        if let Some(limit) = policy.per_try_idle_timeout() {
            text += &format!(", none without a movement for {limit:?}");
        }
        steps.push(step("retries", text));
    }
    match forward.hedge {
        Some(Hedge::PerTryTimeout) => steps.push(step("hedge", "another request when the limit of an attempt passes")),
        Some(Hedge::After(delay)) => steps.push(step("hedge", format!("another request after each {delay:?}"))),
        None => {}
    }
    steps
}

/// The cluster of an aggregate that an attempt goes to.
pub(crate) fn leaf(leaf: &Upstream, aggregate: &str) -> Step {
    step("leaf", format!("`{}` of the aggregate `{aggregate}`", leaf.name))
}

/// How an endpoint is chosen. `hash`: that of the request, `None` when it is not known yet.
pub(crate) fn balancing(upstream: &Upstream, metadata: Option<&MetadataKey>, hash: Option<Option<u64>>) -> Vec<Step> {
    let cluster = upstream.live.config();
    let policy = &cluster.lb_policy;
    let mut steps = vec![step("balancing", policy_name(policy) + &surroundings(&cluster.lb))];
    if let Some(hash) = hash.filter(|_| policy_hashes(policy)) {
        let text =
            hash.map_or_else(|| "nothing of the request is hashed: any endpoint".into(), |hash| format!("{hash:016x}"));
        steps.push(step("hash", text));
    }
    if let Some(metadata) = metadata {
        steps.push(step("metadata", format!("endpoints with {metadata}, where the cluster has such a subset")));
    }
    steps
}

/// What holds beside the policy of a cluster.
fn surroundings(settings: &LbSettings) -> String {
    let mut text = String::new();
    if let LocalityLb::ZoneAware { .. } = settings.localities {
        text += ", the own zone first";
    }
    if let Some(slow) = settings.slow_start {
        text += &format!(", new endpoints get less for {:?}", slow.window);
    }
    if let Some(subsets) = &settings.subsets {
        let keys: Vec<_> = subsets.selectors.iter().map(|selector| selector.keys.join("+")).collect();
        text += &format!(", subsets by {}", keys.join(", "));
    }
    text
}

/// Whether consistent hashing chooses.
fn policy_hashes(policy: &LbPolicy) -> bool {
    match policy {
        LbPolicy::RingHash(_) | LbPolicy::Maglev(_) => true,
        LbPolicy::RandomSubsetting { child, .. } => policy_hashes(child),
        _ => false,
    }
}

fn policy_name(policy: &LbPolicy) -> String {
    match policy {
        LbPolicy::RoundRobin => "round robin".into(),
        LbPolicy::Random => "random".into(),
        LbPolicy::LeastRequest { full_scan: true, .. } => "least request of all".into(),
        LbPolicy::LeastRequest { choice_count, .. } => format!("least request of {choice_count} draws"),
        LbPolicy::RingHash(_) => "ring hash".into(),
        LbPolicy::Maglev(_) => "Maglev".into(),
        LbPolicy::WeightedRoundRobin(_) => "round robin, weighted by load reports".into(),
        LbPolicy::PickFirst { .. } => "pick first".into(),
        LbPolicy::PeakEwma(_) => "peak EWMA".into(),
        LbPolicy::RandomSubsetting { subset_size, child } => {
            format!("{} among a random {subset_size} of the endpoints", policy_name(child))
        }
        LbPolicy::Custom(_) => "a policy of the program's own".into(),
    }
}

/// How much is in flight, of what may be.
pub(crate) fn breaker(upstream: &Upstream, priority: RoutingPriority) -> String {
    let breaker = upstream.live.breaker();
    let name = if priority == RoutingPriority::High { " (priority HIGH)" } else { "" };
    let (used, limit) = (breaker.in_use(priority, Resource::Requests), breaker.limit(priority, Resource::Requests));
    format!("closed: max_requests {used} of {limit}{name}")
}

/// The endpoint that was picked.
pub(crate) fn pick(endpoint: &Endpoint<Subchannel>) -> String {
    let placement = endpoint.placement();
    let LocalityId { region, zone, sub_zone } = &*placement.locality;
    let mut text = format!("{}, priority {}, weight {}", endpoint.address(), placement.priority, placement.weight);
    if [region, zone, sub_zone].iter().any(|part| !part.is_empty()) {
        text += &format!(", in {region}/{zone}/{sub_zone}");
    }
    text + &format!(", {} in flight", endpoint.in_flight())
}

/// What a request finds in a cluster: how much is in flight, and the endpoints that are not used, and why.
pub(crate) fn standing(upstream: &Upstream) -> Vec<Step> {
    let status = upstream.live.status(Instant::now());
    let held = status.endpoints.iter().filter(|endpoint| endpoint.is_held_out()).take(MAX_ENDPOINTS);
    let held = held.map(|endpoint| step("endpoint", endpoint.to_string()));
    [step("load", status.to_string())].into_iter().chain(held).collect()
}

/// How a cluster's endpoints are spoken to and watched.
fn manners(cluster: &Cluster, profile: Profile) -> Vec<Step> {
    let version = match (cluster.http_protocol, profile) {
        (Some(HttpProtocol::Http1), _) | (None, Profile::Envoy) => "HTTP/1.1",
        (Some(HttpProtocol::Http2), _) | (None, Profile::Grpc) => "HTTP/2",
    };
    let security = match &cluster.transport_socket {
        TransportSocket::Plaintext => "in plaintext",
        TransportSocket::Tls(_) => "over TLS",
        TransportSocket::Fallback => "as the client's fallback credentials say",
    };
    let matches =
        if cluster.transport_socket_matches.is_empty() { "" } else { ", unless their metadata asks otherwise" };
    let text = format!("{version} {security}{matches}, connections within {:?}", cluster.connect_timeout);
    let mut steps = vec![step("transport", text)];
    if let Some(rules) = &cluster.outlier_detection {
        let OutlierDetection { base_ejection_time, max_ejection_percent, .. } = **rules;
        let text = format!("held out for {base_ejection_time:?} at first, at most {max_ejection_percent} %");
        steps.push(step("outliers", text));
    }
    if let Some(check) = &cluster.health_check {
        let kind = match check.checker {
            HealthChecker::Http(_) => "HTTP",
            HealthChecker::Grpc(_) => "gRPC",
            HealthChecker::Tcp(_) => "TCP",
        };
        steps.push(step("checks", format!("over {kind}, each {:?}", check.interval)));
    }
    steps
}

/// What a cluster looks like now.
fn serving(upstream: &Upstream, profile: Profile, steps: &mut Vec<Step>) {
    steps.extend(manners(&upstream.live.config(), profile));
    for DropOverload { category, percentage } in &upstream.live.drops() {
        let share = f64::from(percentage.0) / 10_000.0;
        steps.push(step("overload", format!("{share} % are dropped, category {category}")));
    }
    let status = upstream.live.status(Instant::now());
    steps.push(step("load", status.to_string()));
    for endpoint in status.endpoints.iter().take(MAX_ENDPOINTS) {
        steps.push(step("endpoint", endpoint.to_string()));
    }
    if status.endpoints.len() > MAX_ENDPOINTS {
        steps.push(step("endpoint", format!("… and {} more", status.endpoints.len() - MAX_ENDPOINTS)));
    }
}

fn step(subject: &'static str, text: impl Into<String>) -> Step {
    Step { subject, text: text.into() }
}
