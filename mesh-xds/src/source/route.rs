//! Routes in code: what matches, and then what is done, as the same validated types that xDS decodes to.
//!
//! ```
//! use mesh_xds::{resource::{Redirect, RetryOn, RetryPolicy}, source::{Policy, route}};
//! use std::time::Duration;
//!
//! let retry = RetryPolicy { on: RetryOn { http_5xx: true, ..RetryOn::default() }, ..RetryPolicy::default() };
//! let policy = Policy::default()
//!     .with_route(route::exact("/old").redirect(Redirect { status: 308, host: Some("new.example".into()), ..Redirect::default() }))
//!     .with_route(route::prefix("/users").header("x-canary", "1").to("canary").timeout(Duration::from_secs(1)))
//!     .with_route(route::any().split([("v1", 90), ("v2", 10)]).retry(retry).mirror("shadow", 5.0));
//! assert_eq!(policy.routes.len(), 3);
//! ```

use crate::resource::{
    Action, AppendAction, ClusterSpecifier, CookieMatcher, DirectResponse, FilterOverride, FilterStateMatcher, Format,
    Forward, FractionalPercent, HashPolicy, HeaderAdd, HeaderEdits, HeaderMatcher, HeaderMatcherKind, HeaderOps, Hedge,
    HostRewrite, MetadataMatcher, MetadataValue, Mirror, MirrorCluster, MirrorHost, PathMatcher, PathRewrite,
    PathTemplate, QueryParameterMatcher, QueryParameterMatcherKind, RateLimit, Redirect, RegexRewrite, RetryPolicy,
    Route, RouteMatch, RoutingPriority, SafeRegex, StringMatcher, TemplateRewrite, TlsContextMatch, WeightedCluster,
};
use bytes::Bytes;
use http::{HeaderName, Method, StatusCode, uri::Authority};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// What a route matches; every part must. Ends in [`to`](Self::to) or another action.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct RouteBuilder {
    name: Arc<str>,
    matches: RouteMatch,
}

/// A route that forwards, and how.
#[derive(Clone, Debug)]
#[must_use]
pub struct ForwardBuilder {
    route: RouteBuilder,
    forward: Forward,
    edits: HeaderEdits,
    filter_overrides: BTreeMap<Arc<str>, FilterOverride>,
}

/// Every request.
pub fn any() -> RouteBuilder {
    RouteBuilder::default()
}

/// Paths that start with this.
pub fn prefix(prefix: impl Into<String>) -> RouteBuilder {
    on(PathMatcher::Prefix { prefix: prefix.into(), case_sensitive: true })
}

/// This path.
pub fn exact(path: impl Into<String>) -> RouteBuilder {
    on(PathMatcher::Exact { path: path.into(), case_sensitive: true })
}

/// This path and those below it; a `/` at its end does not count.
pub fn under(path: &str) -> RouteBuilder {
    on(PathMatcher::Separated { prefix: path.trim_end_matches('/').to_owned(), case_sensitive: true })
}

/// Paths that match as a whole.
pub fn regex(regex: SafeRegex) -> RouteBuilder {
    on(PathMatcher::Regex(regex))
}

/// Paths that match a template.
pub fn template(template: PathTemplate) -> RouteBuilder {
    on(PathMatcher::Template(Arc::new(template)))
}

/// The method `/service/method` of gRPC.
pub fn grpc_method(service: &str, method: &str) -> RouteBuilder {
    exact(format!("/{service}/{method}"))
}

fn on(path: PathMatcher) -> RouteBuilder {
    RouteBuilder { matches: RouteMatch { path, ..RouteMatch::default() }, ..RouteBuilder::default() }
}

/// So many percent, 0.0..=100.0.
fn percent(percent: f64) -> FractionalPercent {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
    FractionalPercent((percent.clamp(0.0, 100.0) * 10_000.0).round() as u32)
}

impl RouteBuilder {
    /// Its name, for explain, errors and access logs.
    pub fn named(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// The path matches whatever its case; not a regular expression or a template.
    pub fn ignore_case(mut self) -> Self {
        match &mut self.matches.path {
            PathMatcher::Prefix { prefix: text, case_sensitive }
            | PathMatcher::Exact { path: text, case_sensitive }
            | PathMatcher::Separated { prefix: text, case_sensitive } => {
                text.make_ascii_lowercase();
                *case_sensitive = false;
            }
            PathMatcher::Regex(_) | PathMatcher::Template(_) => {}
        }
        self
    }

    /// The header has this value. `:method`, `:path`, `:authority` and `:scheme` are headers, too.
    pub fn header(self, name: &str, value: impl Into<String>) -> Self {
        self.header_with(name, HeaderMatcherKind::String(StringMatcher::exact(value)))
    }

    /// The header is there.
    pub fn has_header(self, name: &str) -> Self {
        self.header_with(name, HeaderMatcherKind::Present(true))
    }

    /// The header matches.
    pub fn header_with(self, name: &str, kind: HeaderMatcherKind) -> Self {
        let name = name.to_ascii_lowercase();
        self.header_matches(HeaderMatcher { name, kind, invert: false, treat_missing_as_empty: false })
    }

    /// The header matches.
    pub fn header_matches(mut self, matcher: HeaderMatcher) -> Self {
        self.matches.headers.push(matcher);
        self
    }

    /// Requests of this method.
    pub fn method(self, method: &Method) -> Self {
        self.header(":method", method.as_str())
    }

    /// The query parameter has this value.
    pub fn query(self, name: &str, value: impl Into<String>) -> Self {
        let kind = QueryParameterMatcherKind::String(StringMatcher::exact(value));
        self.query_matches(QueryParameterMatcher { name: name.to_owned(), kind })
    }

    /// The query parameter matches.
    pub fn query_matches(mut self, matcher: QueryParameterMatcher) -> Self {
        self.matches.query.push(matcher);
        self
    }

    /// The cookie has this value.
    pub fn cookie(self, name: &str, value: impl Into<String>) -> Self {
        let value = StringMatcher::exact(value);
        self.cookie_matches(CookieMatcher { name: name.to_owned(), value, invert: false })
    }

    /// The cookie matches.
    pub fn cookie_matches(mut self, matcher: CookieMatcher) -> Self {
        self.matches.cookies.push(matcher);
        self
    }

    /// gRPC only.
    pub fn grpc(mut self) -> Self {
        self.matches.grpc_only = true;
        self
    }

    /// A share of the requests that match otherwise, in percent, 0.0..=100.0.
    pub fn share(mut self, share: f64) -> Self {
        self.matches.fraction = Some(percent(share));
        self
    }

    /// By the certificate of the connection that the request came to this process by.
    pub fn tls(mut self, tls: TlsContextMatch) -> Self {
        self.matches.tls = tls;
        self
    }

    /// By metadata of the request.
    pub fn metadata(mut self, matcher: MetadataMatcher) -> Self {
        self.matches.metadata.push(matcher);
        self
    }

    /// By filter state of the request.
    pub fn filter_state(mut self, matcher: FilterStateMatcher) -> Self {
        self.matches.filter_state.push(matcher);
        self
    }

    /// They go to this cluster: one of [`Policy::clusters`](super::Policy::clusters), or
    /// [`Policy::TARGET`](super::Policy::TARGET).
    pub fn to(self, cluster: impl Into<Arc<str>>) -> ForwardBuilder {
        self.forward(ClusterSpecifier::Cluster(cluster.into()))
    }

    /// They go to the target's own endpoints.
    pub fn to_target(self) -> ForwardBuilder {
        self.to(super::Policy::TARGET)
    }

    /// They are split among clusters by weight.
    pub fn split<C: Into<Arc<str>>>(self, parts: impl IntoIterator<Item = (C, u32)>) -> ForwardBuilder {
        self.split_parts(parts.into_iter().map(|(cluster, weight)| WeightedCluster::new(cluster, weight)))
    }

    /// The same, where parts have header edits or overrides of their own.
    pub fn split_parts(self, parts: impl IntoIterator<Item = WeightedCluster>) -> ForwardBuilder {
        self.forward(ClusterSpecifier::Weighted(parts.into_iter().collect()))
    }

    /// A header names the cluster, one that some route names.
    pub fn to_named_by(self, header: HeaderName) -> ForwardBuilder {
        self.forward(ClusterSpecifier::Header(header))
    }

    fn forward(self, cluster: ClusterSpecifier) -> ForwardBuilder {
        ForwardBuilder {
            route: self,
            forward: Forward::to(cluster),
            edits: HeaderEdits::default(),
            filter_overrides: BTreeMap::new(),
        }
    }

    /// They are redirected. A status that is no redirect's is 301.
    pub fn redirect(self, redirect: Redirect) -> Route {
        let status = if (300..400).contains(&redirect.status) { redirect.status } else { 301 };
        self.ends(Action::Redirect(Arc::new(Redirect { status, ..redirect })))
    }

    /// They are answered at once.
    pub fn respond(self, status: StatusCode, body: impl Into<Bytes>) -> Route {
        self.ends(Action::Direct(Arc::new(DirectResponse { status: status.as_u16(), body: body.into() })))
    }

    fn ends(self, action: Action) -> Route {
        Route::new(self.name, self.matches, action)
    }
}

impl ForwardBuilder {
    /// Limit of the whole call; zero is none. See `Profile` for who heeds it.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.forward.timeout = Some(limit);
        self
    }

    /// `max_stream_duration`; zero is none.
    pub fn max_stream_duration(mut self, limit: Duration) -> Self {
        self.forward.max_stream_duration.max_stream_duration = Some(limit);
        self
    }

    /// A stream on which nothing moves for so long is ended; zero is none.
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.forward.idle_timeout = Some(limit);
        self
    }

    /// What is tried again, instead of the policy's.
    pub fn retry(mut self, policy: impl Into<Arc<RetryPolicy>>) -> Self {
        self.forward.retry_policy = Some(policy.into());
        self
    }

    /// When a request is sent once more while it waits for its answer; limited by the retry policy.
    pub fn hedge(mut self, hedge: Hedge) -> Self {
        self.forward.hedge = Some(hedge);
        self
    }

    /// What a cluster whose policy hashes requests takes for their hash.
    pub fn hash(mut self, policies: impl IntoIterator<Item = HashPolicy>) -> Self {
        self.forward.hash_policies = policies.into_iter().collect();
        self
    }

    /// Only endpoints with this metadata (`envoy.lb`), where the cluster has such a subset.
    pub fn endpoints_with(mut self, key: impl Into<String>, value: MetadataValue) -> Self {
        let metadata = self.forward.metadata_match.get_or_insert_default();
        Arc::make_mut(metadata).insert(key.into(), value);
        self
    }

    /// Whose circuit breakers count the requests.
    pub fn priority(mut self, priority: RoutingPriority) -> Self {
        self.forward.priority = priority;
        self
    }

    /// The status of requests whose cluster is not known: 503, 404 or 500.
    pub fn cluster_not_found(mut self, status: StatusCode) -> Self {
        self.forward.cluster_not_found = status.as_u16();
        self
    }

    /// This instead of the prefix that matched, or of the whole path where none did.
    pub fn rewrite_prefix(mut self, by: impl Into<String>) -> Self {
        self.forward.path_rewrite = Some(PathRewrite::Prefix(by.into()));
        self
    }

    /// Matches in the path are replaced.
    pub fn rewrite_path(mut self, rewrite: RegexRewrite) -> Self {
        self.forward.path_rewrite = Some(PathRewrite::Regex(rewrite));
        self
    }

    /// A path made of what the route's [`template`] caught.
    ///
    /// # Errors
    /// The route does not match by a template, or the rewrite is none for it.
    pub fn rewrite_template(mut self, rewrite: &str) -> Result<Self, String> {
        let PathMatcher::Template(template) = &self.route.matches.path else {
            return Err("a template rewrite needs a match by path template".into());
        };
        let rewrite = TemplateRewrite::new(rewrite, template)?;
        self.forward.path_rewrite = Some(PathRewrite::Template(template.clone(), rewrite));
        Ok(self)
    }

    /// Another authority.
    pub fn rewrite_host(self, host: &Authority) -> Self {
        self.rewrite_host_by(HostRewrite::Literal(host.as_str().into()))
    }

    /// Another authority, of whatever kind.
    pub fn rewrite_host_by(mut self, host: HostRewrite) -> Self {
        self.forward.host_rewrite = Some(host);
        self
    }

    /// A share of the requests is copied to this cluster, in percent; their authority has `-shadow` behind its name.
    pub fn mirror(self, cluster: impl Into<Arc<str>>, share: f64) -> Self {
        self.mirror_with(Mirror {
            cluster: MirrorCluster::Name(cluster.into()),
            fraction: Some(percent(share)),
            trace_sampled: None,
            host: MirrorHost::Shadow,
        })
    }

    /// The same in every detail.
    pub fn mirror_with(mut self, mirror: Mirror) -> Self {
        self.forward.mirrors = self.forward.mirrors.iter().cloned().chain([mirror]).collect();
        self
    }

    /// A rewrite of the authority keeps the original one in `x-forwarded-host`.
    pub fn keep_host(mut self) -> Self {
        self.forward.append_x_forwarded_host = true;
        self
    }

    /// Descriptors for the rate limit filters, instead of those that the route has.
    pub fn rate_limits(mut self, limits: impl IntoIterator<Item = RateLimit>) -> Self {
        self.forward.rate_limits = limits.into_iter().collect();
        self
    }

    /// The request has this header, instead of what it has.
    pub fn set_header(mut self, name: HeaderName, value: Format) -> Self {
        set(&mut self.edits.request, name, value);
        self
    }

    /// The request does not have this header.
    pub fn remove_header(mut self, name: HeaderName) -> Self {
        self.edits.request.remove.push(name);
        self
    }

    /// The response has this header, instead of what it has.
    pub fn set_response_header(mut self, name: HeaderName, value: Format) -> Self {
        set(&mut self.edits.response, name, value);
        self
    }

    /// The response does not have this header.
    pub fn remove_response_header(mut self, name: HeaderName) -> Self {
        self.edits.response.remove.push(name);
        self
    }

    /// A filter of the policy is another one here, or off (gRFC A39).
    pub fn filter(mut self, name: impl Into<Arc<str>>, over: FilterOverride) -> Self {
        self.filter_overrides.insert(name.into(), over);
        self
    }

    /// The route.
    pub fn build(self) -> Route {
        let Self { route, forward, edits, filter_overrides } = self;
        Route { edits, filter_overrides, ..route.ends(Action::Forward(Arc::new(forward))) }
    }
}

fn set(ops: &mut HeaderOps, name: HeaderName, value: Format) {
    ops.add.push(HeaderAdd { name, value, action: AppendAction::Overwrite, keep_empty: false });
}

impl From<ForwardBuilder> for Route {
    fn from(builder: ForwardBuilder) -> Self {
        builder.build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_what_xds_decodes_to() {
        let built = prefix("/Api").ignore_case().named("api").header("X-Env", "blue").to("c").build();
        assert_eq!(built.matches.path, PathMatcher::Prefix { prefix: "/api".into(), case_sensitive: false });
        assert_eq!((&*built.name, built.matches.headers[0].name.as_str()), ("api", "x-env"));
        assert_eq!(percent(0.5), FractionalPercent(5_000));
        assert_eq!((percent(1000.0), percent(f64::NAN)), (FractionalPercent::HUNDRED, FractionalPercent(0)));
        let redirect = any().redirect(Redirect::default());
        let Action::Redirect(redirect) = redirect.action else { panic!() };
        assert_eq!(redirect.status, 301);
        assert!(any().to("c").rewrite_template("/{id}").is_err());
        let template = PathTemplate::new("/users/{id}").unwrap();
        assert!(super::template(template).to("c").rewrite_template("/u/{id}").is_ok());
    }
}
