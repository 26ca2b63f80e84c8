//! Load balancing as a tower layer, over services that come and go: no mesh needed.

use super::{
    Balancer, Candidate, Class, EndpointInfo, Ewma, Group, Latency, PickInput, Recipe, Slices, Standing, Turn,
};
use crate::{
    outbound::{
        cluster::{
            Cause, Outcome,
            outlier::{Counters, Ejection, Event, Host, Rules, Thresholds, Verdict, consecutive, release_due, sweep},
        },
        route::Profile,
        timeout::is_grpc,
    },
    time::after,
    transport::BoxError,
};
use arc_swap::ArcSwap;
use futures::Stream;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use mesh_xds::resource::{LbPolicy, LocalityId, MetadataValue, OutlierDetection, WeightedRoundRobin};
use pin_project::pin_project;
use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU8, AtomicU32,
            Ordering::{AcqRel, Relaxed, Release},
        },
    },
    task::{Context, Poll, Wake, Waker, ready},
    time::Duration,
};
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;

/// What happened to a set of services.
#[derive(Clone, Debug)]
pub enum Change<K, S> {
    /// There is one more, or another one under a key that is known.
    Insert(K, S),
    /// The service of this key is gone. Requests that it has go on.
    Remove(K),
}

/// Where services come from. A boxed, pinned stream of [`Change`]s is one, and so is [`ServiceList`].
pub trait Discover {
    /// Tells services apart. Its text is what consistent hashing places a service by.
    type Key: Eq + fmt::Display;
    /// What requests go to.
    type Service;
    /// Why nothing more is learnt.
    type Error: Into<BoxError>;

    /// The next change. `None`: there will be none; the services stay.
    #[allow(clippy::type_complexity, reason = "it is `poll_next` of a stream, whose type has no shorter name")]
    fn poll_change(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Change<Self::Key, Self::Service>, Self::Error>>>;
}

/// Services that are all known from the start. Keys are their places.
#[derive(Debug)]
pub struct ServiceList<S>(std::iter::Enumerate<std::vec::IntoIter<S>>);

/// Balances over the services of a [`Discover`], by the policies that a mesh has.
///
/// A request counts as load of its service until its response's body ended or was dropped. A service that fails stays, unless
/// [`outlier_detection`](LoadBalanceLayer::outlier_detection) is on.
///
/// ```
/// use mesh_client::balance::{LoadBalanceLayer, ServiceList};
/// use tower::{Layer, ServiceBuilder};
/// # use std::convert::Infallible;
///
/// # let client = tower::service_fn(|_: http::Request<http_body_util::Empty<bytes::Bytes>>| async {
/// #     Ok::<_, Infallible>(http::Response::new(http_body_util::Empty::<bytes::Bytes>::new()))
/// # });
/// let clients = ServiceList::new([client.clone(), client]);
/// let client = LoadBalanceLayer::least_request(2).layer(clients);
/// # fn is_service<S: tower::Service<http::Request<http_body_util::Empty<bytes::Bytes>>> + Clone>(_: S) {}
/// # is_service(client);
/// ```
#[derive(Clone, Debug)]
pub struct LoadBalanceLayer {
    policy: LbPolicy,
    outliers: Option<Arc<OutlierDetection>>,
}

/// A choice among services. Made by [`LoadBalanceLayer`]. Clones share the services and their load.
pub struct Balance<D: Discover> {
    shared: Arc<Shared<D>>,
}

/// The hash of a request, in its extensions: for policies that hash (ring hash, Maglev). Without one the choice is random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHash(pub u64);

/// There is no service to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("the balancer has no service")]
#[non_exhaustive]
pub struct NoServices;

struct Shared<D: Discover> {
    policy: LbPolicy,
    outliers: Option<Arc<Outliers>>,
    source: Mutex<Source<D>>,
    view: ArcSwap<Balancer<Member<D::Service>>>,
    turn: Arc<Turn>,
    begun: Instant,
    waiting: Arc<Waiting>,
}

/// A service, and what its source calls it.
type Known<D> = (<D as Discover>::Key, Arc<Member<<D as Discover>::Service>>);

struct Source<D: Discover> {
    discover: D,
    members: Vec<Known<D>>,
    ended: bool,
    /// When outlier detection looks at all again, and when the next one that was held out comes back.
    next_sweep: Instant,
    next_release: Option<Instant>,
}

/// Outlier detection by Envoy's rules. The clock is looked at when a request comes: nothing else needs to know.
struct Outliers {
    config: Arc<OutlierDetection>,
    thresholds: Thresholds,
    /// Somebody has offences that were not judged yet.
    offended: AtomicBool,
}

/// Everybody who waits for the first service: the source wakes them all.
#[derive(Default)]
struct Waiting(Mutex<Vec<Waker>>);

struct Member<S> {
    service: S,
    key: String,
    joined: Instant,
    load: AtomicU32,
    latency: Latency,
    /// Absent without outlier detection.
    outliers: Option<Arc<Outliers>>,
    counters: Counters,
    /// Rows of failures since the last look, by the bits of their causes.
    offences: AtomicU8,
    ejected: AtomicBool,
    ejection: Mutex<Ejection>,
}

/// Counts one request as load until dropped.
#[derive(Debug)]
struct Counted<S>(Arc<Member<S>>);

/// One call: waits for its service to be ready, then for its response. Dropping it drops the call.
#[pin_project]
pub struct ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    #[pin]
    state: State<S, B, S::Future>,
    /// Of peak EWMA.
    latency: Option<Ewma>,
}

#[allow(clippy::large_enum_variant, reason = "boxing it would cost an allocation per call")]
#[pin_project(project = StateProjection)]
enum State<S, B, F> {
    Waiting {
        service: S,
        request: Option<Request<B>>,
        counted: Option<Counted<S>>,
    },
    Called {
        #[pin]
        response: F,
        counted: Option<Counted<S>>,
        began: Instant,
    },
    Failed(Option<BoxError>),
}

/// A response body that counts as load of its service until its end.
#[pin_project]
pub struct ResponseBody<B, S> {
    #[pin]
    inner: B,
    counted: Option<Counted<S>>,
    /// Its trailers say how it went.
    grpc: bool,
}

impl LoadBalanceLayer {
    /// By any policy of a mesh; those of the program's own ([`LbPolicy::Custom`]) choose at random.
    ///
    /// # Panics
    /// It is none that [could be](LbPolicy::check): a Maglev table whose size is no prime.
    pub fn new(policy: LbPolicy) -> Self {
        if let Err(error) = policy.check() {
            panic!("the balancing policy cannot be: {error}");
        }
        Self { policy, outliers: None }
    }

    /// One after the other.
    pub fn round_robin() -> Self {
        Self::new(LbPolicy::RoundRobin)
    }

    /// The least loaded of so many (2..=10) drawn at random.
    pub fn least_request(choices: u32) -> Self {
        Self::new(LbPolicy::least_request(choices.clamp(2, 10)))
    }

    /// Holds out services that fail, as Envoy does: consecutive failures, success rate, failure percentage. 5xx, the gRPC statuses like
    /// them and errors count as failures. What is said of `failure_accrual` is ignored.
    ///
    /// # Panics
    /// It is none that [could be](OutlierDetection::check): a share of more than 100 percent.
    #[must_use]
    pub fn outlier_detection(mut self, config: OutlierDetection) -> Self {
        if let Err(error) = config.check() {
            panic!("the outlier detection cannot be: {error}");
        }
        self.outliers = Some(Arc::new(OutlierDetection { failure_accrual: None, ..config }));
        self
    }

    /// Any of them.
    pub fn random() -> Self {
        Self::new(LbPolicy::Random)
    }
}

impl<D: Discover> Layer<D> for LoadBalanceLayer {
    type Service = Balance<D>;

    fn layer(&self, discover: D) -> Self::Service {
        let outliers = self.outliers.clone().map(|config| {
            let thresholds = Thresholds::default();
            thresholds.set(Some(&config));
            Arc::new(Outliers { config, thresholds, offended: AtomicBool::new(false) })
        });
        let next_sweep = Instant::now();
        let source = Mutex::new(Source { discover, members: Vec::new(), ended: false, next_sweep, next_release: None });
        let shared = Shared {
            policy: self.policy.clone(),
            outliers,
            source,
            view: ArcSwap::from_pointee(Balancer::default()),
            turn: Arc::new(Turn::anywhere()),
            begun: Instant::now(),
            waiting: Arc::default(),
        };
        Balance { shared: Arc::new(shared) }
    }
}

impl<S> ServiceList<S> {
    /// These services, and no other ever.
    pub fn new(services: impl IntoIterator<Item = S>) -> Self {
        Self(services.into_iter().collect::<Vec<_>>().into_iter().enumerate())
    }
}

impl<S> Discover for ServiceList<S> {
    type Key = usize;
    type Service = S;
    type Error = std::convert::Infallible;

    fn poll_change(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Change<usize, S>, Self::Error>>> {
        Poll::Ready(self.0.next().map(|(key, service)| Ok(Change::Insert(key, service))))
    }
}

impl<T, K, S, E> Discover for Pin<Box<T>>
where
    T: Stream<Item = Result<Change<K, S>, E>> + ?Sized,
    K: Eq + fmt::Display,
    E: Into<BoxError>,
{
    type Key = K;
    type Service = S;
    type Error = E;

    fn poll_change(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Change<K, S>, E>>> {
        self.as_mut().poll_next(cx)
    }
}

impl<D: Discover> Shared<D> {
    /// Takes over what changed. Ready when there is a service, or never will be.
    fn poll_services(&self, cx: &mut Context<'_>) -> Poll<Result<(), D::Error>> {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Registered before the look: who is woken looks again.
            let waits = source.members.is_empty();
            let waker = self.waiting.clone().waker(cx.waker(), waits);
            let mut cx = Context::from_waker(&waker);
            let (mut changed, mut failed) = (false, None);
            while !source.ended && failed.is_none() {
                match source.discover.poll_change(&mut cx) {
                    Poll::Pending => break,
                    Poll::Ready(None) => source.ended = true,
                    Poll::Ready(Some(Err(error))) => failed = Some(error),
                    Poll::Ready(Some(Ok(change))) => {
                        changed = true;
                        source.apply(change, self.begun, self.outliers.as_ref());
                    }
                }
            }
            if let Some(outliers) = &self.outliers {
                changed |= source.judge(outliers, Instant::now());
            }
            if changed {
                self.publish(&source);
                self.waiting.wake_all();
            }
            if let Some(error) = failed {
                return Poll::Ready(Err(error));
            }
            if !source.members.is_empty() || source.ended {
                return Poll::Ready(Ok(()));
            }
            if waits && !changed {
                return Poll::Pending;
            }
            // The last one went just now, or those who wait were woken: this caller has to be among them.
        }
    }

    fn publish(&self, source: &MutexGuard<'_, Source<D>>) {
        let members: Vec<_> = source.members.iter().map(|(_, member)| member.clone()).collect();
        let (weights, classes) = (vec![1; members.len()], vec![Class::Usable; members.len()]);
        let group = Arc::new(Group::new(members, weights, classes, 1, Turn::anywhere()));
        let mut recipe = Recipe { profile: Profile::Envoy, ..Recipe::of(self.policy.clone(), self.begun) };
        let slices = Slices::new(&[vec![group]], &mut recipe);
        let balancer = Balancer::new(&slices, &recipe, &self.turn, Some(&self.view.load()), Instant::now());
        self.view.store(Arc::new(balancer));
    }

    fn pick(&self, hash: Option<u64>) -> Option<Arc<Member<D::Service>>> {
        let view = self.view.load();
        let input = PickInput { hash, ..PickInput::plain(Instant::now()) };
        view.picker(&input)?.pick(&input, |_| false, &mut fastrand::Rng::new()).cloned()
    }
}

impl<D: Discover> Source<D> {
    fn apply(&mut self, change: Change<D::Key, D::Service>, begun: Instant, outliers: Option<&Arc<Outliers>>) {
        let (key, service) = match change {
            Change::Insert(key, service) => (key, Some(service)),
            Change::Remove(key) => (key, None),
        };
        self.members.retain(|(known, _)| *known != key);
        if let Some(service) = service {
            let (text, now) = (key.to_string(), Instant::now());
            let member = Member {
                service,
                key: text,
                joined: now,
                load: AtomicU32::new(0),
                latency: Latency::new(begun, now),
                outliers: outliers.cloned(),
                counters: Counters::default(),
                offences: AtomicU8::new(0),
                ejected: AtomicBool::new(false),
                ejection: Mutex::default(),
            };
            self.members.push((key, Arc::new(member)));
        }
    }
}

impl<D: Discover> Source<D> {
    /// Ejects those whose failures are in a row, takes back those whose time is over, and sweeps at the end of each interval. True:
    /// somebody went or came back.
    fn judge(&mut self, outliers: &Outliers, now: Instant) -> bool {
        let offended = outliers.offended.swap(false, AcqRel);
        if !offended && now < self.next_sweep && self.next_release.is_none_or(|at| now < at) {
            return false;
        }
        let (config, total) = (&*outliers.config, self.members.len());
        let (rules, mut rng) = (Rules { config, profile: Profile::Envoy }, fastrand::Rng::new());
        let members: Vec<_> = self.members.iter().map(|(_, member)| member).collect();
        let mut ejections: Vec<_> = members.iter().map(|member| member.ejection()).collect();
        let mut ejected = ejections.iter().filter(|ejection| ejection.is_ejected()).count();
        for (member, ejection) in members.iter().zip(&mut ejections) {
            for cause in causes(member.offences.swap(0, Relaxed)) {
                let verdict = consecutive(cause, ejection, (ejected, total), rules, now, &mut rng);
                ejected += usize::from(verdict == Verdict::Ejected);
            }
        }
        release_due(ejections.iter_mut(), config, now, |_| {});
        if now >= self.next_sweep {
            self.next_sweep = after(now, config.interval);
            let hosts = members.iter().zip(&ejections).map(|(member, ejection)| {
                let [tally, local] = member.counters.take();
                Host { ejection: *ejection, tally, local }
            });
            let mut hosts: Vec<_> = hosts.collect();
            let _: Vec<Event> = sweep(&mut hosts, rules, now, &mut rng);
            ejections = hosts.into_iter().map(|host| host.ejection).collect();
        }
        self.next_release = ejections.iter().filter_map(|ejection| ejection.until(config)).min();
        let mut changed = false;
        for (member, ejection) in members.iter().zip(ejections) {
            changed |= member.set_ejection(ejection);
        }
        changed
    }
}

/// The causes whose bits are set.
fn causes(bits: u8) -> impl Iterator<Item = Cause> {
    Cause::ALL.into_iter().filter(move |cause| bits & (1 << *cause as u8) != 0)
}

impl<S> Member<S> {
    fn ejection(&self) -> Ejection {
        *self.ejection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True: it went or came back.
    fn set_ejection(&self, ejection: Ejection) -> bool {
        *self.ejection.lock().unwrap_or_else(PoisonError::into_inner) = ejection;
        let changed = self.ejected.swap(ejection.is_ejected(), Relaxed) != ejection.is_ejected();
        if changed && !ejection.is_ejected() {
            self.counters.forgive();
        }
        changed
    }

    /// A request ended so. What follows is decided when the next one comes.
    fn record(&self, outcome: Outcome) {
        let Some(outliers) = &self.outliers else { return };
        for cause in self.counters.record(outcome, &outliers.thresholds).into_iter().flatten() {
            self.offences.fetch_or(1 << cause as u8, Relaxed);
            outliers.offended.store(true, Release);
        }
    }
}

impl Waiting {
    /// A waker for the source; `caller` is woken too, if it `waits`.
    fn waker(self: Arc<Self>, caller: &Waker, waits: bool) -> Waker {
        if waits {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !waiting.iter().any(|waker| waker.will_wake(caller)) {
                waiting.push(caller.clone());
            }
        }
        self.into()
    }

    fn wake_all(&self) {
        let waiting = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }
}

impl<D: Discover> Clone for Balance<D> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<D, B, R> Service<Request<B>> for Balance<D>
where
    D: Discover,
    D::Service: Service<Request<B>, Response = Response<R>> + Clone,
    <D::Service as Service<Request<B>>>::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<R, D::Service>>;
    type Error = BoxError;
    type Future = ResponseFuture<D::Service, B>;

    /// Ready when there is a service; which one, and whether that is ready, depends on the request and is waited for in its future.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.shared.poll_services(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let hash = request.extensions().get::<RequestHash>().map(|hash| hash.0);
        let latency = match &self.shared.policy {
            LbPolicy::PeakEwma(config) => Some(Ewma::new(config, self.shared.begun)),
            _ => None,
        };
        let state = match self.shared.pick(hash) {
            None => State::Failed(Some(NoServices.into())),
            Some(member) => {
                member.load.fetch_add(1, Relaxed);
                let service = member.service.clone();
                State::Waiting { service, request: Some(request), counted: Some(Counted(member)) }
            }
        };
        ResponseFuture { state, latency }
    }
}

impl<S, B, R> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<R, S>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProjection::Failed(error) => {
                    return Poll::Ready(Err(error.take().expect("not polled again once it is ready")));
                }
                StateProjection::Waiting { service, request, counted } => {
                    ready!(service.poll_ready(cx)).map_err(Into::into)?;
                    let request = request.take().expect("sent once, in this state");
                    let response = service.call(request);
                    State::Called { response, counted: counted.take(), began: Instant::now() }
                }
                StateProjection::Called { response, counted, began } => {
                    let result = ready!(response.poll(cx));
                    let counted = counted.take();
                    if let (Some(ewma), Some(Counted(member))) = (&this.latency, &counted) {
                        let failed = result.as_ref().map_or(true, says_failure);
                        let took = began.elapsed().max(if failed { ewma.penalty } else { Duration::ZERO });
                        member.latency.observe(took, ewma, Instant::now());
                    }
                    return Poll::Ready(match result {
                        Ok(response) => {
                            let code = grpc_status(response.headers());
                            let grpc = code.is_none() && is_grpc(response.headers());
                            if let Some(Counted(member)) = counted.as_ref().filter(|_| !grpc) {
                                member.record(code.map_or(Outcome::of_http(response.status()), Outcome::of_grpc));
                            }
                            Ok(response.map(|inner| ResponseBody { inner, counted, grpc }))
                        }
                        Err(error) => {
                            if let Some(Counted(member)) = &counted {
                                member.record(Outcome::LocalOrigin);
                            }
                            Err(error.into())
                        }
                    });
                }
            };
            this.state.set(next);
        }
    }
}

impl<S> Drop for Counted<S> {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Relaxed);
    }
}

impl<B: Body, S> Body for ResponseBody<B, S> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data())
            && let Some(Counted(member)) = this.counted.take().as_ref().filter(|_| *this.grpc)
        {
            let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref());
            member.record(match (trailers.and_then(grpc_status), &frame) {
                (Some(code), _) => Outcome::of_grpc(code),
                (None, Some(Err(_))) => Outcome::LocalOrigin,
                // It ended without a status: UNKNOWN.
                (None, _) => Outcome::ServerError,
            });
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<tonic::Code> {
    headers.get("grpc-status").map(|value| tonic::Code::from_bytes(value.as_bytes()))
}

/// Its head says that the endpoint is broken, or has too much to do.
fn says_failure<B>(response: &Response<B>) -> bool {
    match grpc_status(response.headers()) {
        Some(code) => code == tonic::Code::ResourceExhausted || Outcome::of_grpc(code).is_failure(),
        None => response.status() == StatusCode::TOO_MANY_REQUESTS || Outcome::of_http(response.status()).is_failure(),
    }
}

impl<S> Candidate for Member<S> {
    fn standing(&self, panic: bool) -> Standing {
        if self.is_ejected() && !panic { Standing::Unavailable } else { Standing::Available }
    }

    fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    fn load(&self) -> u32 {
        self.load.load(Relaxed)
    }

    /// Nobody knows it.
    fn address(&self) -> SocketAddr {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    }

    fn hash_key(&self, _: bool) -> String {
        self.key.clone()
    }

    fn joined(&self) -> Instant {
        self.joined
    }

    fn cost(&self, ewma: &Ewma, now: u64) -> u32 {
        self.latency.cost(self.load(), ewma, now)
    }

    fn reported_weight(&self, _: &WeightedRoundRobin, _: Instant) -> Option<f64> {
        None
    }

    fn locality(&self) -> LocalityId {
        LocalityId::default()
    }

    fn lb_metadata(&self) -> BTreeMap<String, MetadataValue> {
        BTreeMap::new()
    }

    fn info(&self, locality_weight: u32) -> EndpointInfo {
        EndpointInfo {
            address: self.address(),
            hostname: self.key.as_str().into(),
            weight: 1,
            locality: Arc::default(),
            locality_weight,
            metadata: None,
        }
    }
}

impl<S> fmt::Debug for Member<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("key", &self.key).field("load", &self.load).finish_non_exhaustive()
    }
}

impl<D: Discover> fmt::Debug for Balance<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balance").field("policy", &self.shared.policy).finish_non_exhaustive()
    }
}

impl<S, B> fmt::Debug for ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl<B: fmt::Debug, S> fmt::Debug for ResponseBody<B, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
