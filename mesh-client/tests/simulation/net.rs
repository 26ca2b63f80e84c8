//! A network in memory, on the clock of the runtime: bytes take their time, links part and heal, hosts crash and come back.

use futures::future::BoxFuture;
use mesh_client::dial::{BoxedIo, Dial, ServerAddress};
use std::{
    collections::{HashMap, VecDeque},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, mpsc},
    time::{Instant, Sleep, sleep, sleep_until},
};

/// The longest that a byte is on its way over a link that is up.
pub(crate) const LATENCY: Duration = Duration::from_millis(30);
/// What a connection holds on its way, in each direction.
const CAPACITY: usize = 64 * 1024;

/// All hosts there are. A handle.
#[derive(Clone)]
pub(crate) struct Net(Arc<Mutex<Inner>>);

struct Inner {
    hosts: HashMap<SocketAddr, Host>,
    rng: fastrand::Rng,
    changed: Arc<Notify>,
}

/// One address.
struct Host {
    backlog: Option<mpsc::UnboundedSender<Pipe>>,
    /// Nothing gets through, and nobody says so.
    parted: bool,
    wires: Vec<Weak<Mutex<Wire>>>,
    /// When something last happened to it, or ended.
    disturbed: Instant,
}

/// A connection.
struct Wire {
    fate: Fate,
    /// By who writes: the client, the server.
    ways: [Way; 2],
    latency: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Bytes arrive after the latency.
    Flowing,
    /// Bytes wait for the link to heal.
    Stalled,
    /// Nothing arrives any more, and nobody is told.
    Lost,
    /// Both ends get an error.
    Reset,
}

#[derive(Default)]
struct Way {
    queue: VecDeque<(Instant, Vec<u8>)>,
    length: usize,
    /// The writer is done; this is when the reader learns of it.
    finished: Option<Instant>,
    /// The reader is gone.
    unread: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// One end of a connection.
pub(crate) struct Pipe {
    wire: Arc<Mutex<Wire>>,
    side: usize,
    sleep: Option<Pin<Box<Sleep>>>,
}

/// What becomes of the connections over a link that heals.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Healing {
    /// What waited arrives.
    Resumes,
    /// They are reset.
    Resets,
    /// They are dead, and nobody says so.
    Loses,
}

impl Net {
    pub(crate) fn new(seed: u64) -> Self {
        let rng = fastrand::Rng::with_seed(seed);
        Self(Arc::new(Mutex::new(Inner { hosts: HashMap::new(), rng, changed: Arc::default() })))
    }

    /// The host is there, or there again; connections to one that was there before are reset.
    pub(crate) fn listen(&self, address: SocketAddr) -> mpsc::UnboundedReceiver<Pipe> {
        let (backlog, pipes) = mpsc::unbounded_channel();
        self.change(address, |host| {
            host.backlog = Some(backlog);
            host.parted = false;
            host.all(Fate::Reset);
        });
        pipes
    }

    /// Nothing gets through until the link heals.
    pub(crate) fn part(&self, address: SocketAddr) {
        self.change(address, |host| {
            host.parted = true;
            host.all(Fate::Stalled);
        });
    }

    /// The link is up again.
    pub(crate) fn heal(&self, address: SocketAddr, healing: Healing) {
        self.change(address, |host| {
            host.parted = false;
            host.all(match healing {
                Healing::Resumes => Fate::Flowing,
                Healing::Resets => Fate::Reset,
                Healing::Loses => Fate::Lost,
            });
        });
    }

    /// The host is gone: `silently`, as when a machine dies; or its connections are reset and new ones refused, as when a process does.
    pub(crate) fn crash(&self, address: SocketAddr, silently: bool) {
        self.change(address, |host| {
            host.backlog = None;
            host.parted = silently;
            host.all(if silently { Fate::Lost } else { Fate::Reset });
        });
    }

    /// Whether nothing has happened to the host since then.
    pub(crate) fn quiet_since(&self, address: SocketAddr, then: Instant) -> bool {
        let inner = self.0.lock().unwrap();
        inner.hosts.get(&address).is_none_or(|host| host.disturbed <= then && !host.parted && host.backlog.is_some())
    }

    /// Connections that both ends hold.
    pub(crate) fn open(&self, address: SocketAddr) -> usize {
        let inner = self.0.lock().unwrap();
        let open = |wire: &&Weak<Mutex<Wire>>| {
            wire.upgrade().is_some_and(|wire| {
                let wire = wire.lock().unwrap();
                wire.fate == Fate::Flowing && wire.ways.iter().all(|way| !way.unread && way.finished.is_none())
            })
        };
        inner.hosts.get(&address).map_or(0, |host| host.wires.iter().filter(open).count())
    }

    async fn connect(self, address: SocketAddr) -> io::Result<Pipe> {
        let latency = Duration::from_micros(self.0.lock().unwrap().rng.u64(100..LATENCY.as_micros() as u64));
        sleep(latency).await;
        loop {
            let changed = {
                let mut inner = self.0.lock().unwrap();
                let changed = inner.changed.clone();
                let host = inner.hosts.get_mut(&address).ok_or(io::ErrorKind::HostUnreachable)?;
                match &host.backlog {
                    _ if host.parted => changed.notified_owned(),
                    None => return Err(io::ErrorKind::ConnectionRefused.into()),
                    Some(backlog) => {
                        let wire = Wire { fate: Fate::Flowing, ways: Default::default(), latency };
                        let wire = Arc::new(Mutex::new(wire));
                        host.wires.retain(|wire| wire.strong_count() > 0);
                        host.wires.push(Arc::downgrade(&wire));
                        let end = |side| Pipe { wire: wire.clone(), side, sleep: None };
                        let client = end(0);
                        backlog.send(end(1)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
                        return Ok(client);
                    }
                }
            };
            changed.await;
        }
    }

    fn change(&self, address: SocketAddr, change: impl FnOnce(&mut Host)) {
        let mut inner = self.0.lock().unwrap();
        let now = Instant::now();
        let host = Host { backlog: None, parted: false, wires: Vec::new(), disturbed: now };
        let host = inner.hosts.entry(address).or_insert(host);
        change(host);
        host.disturbed = now;
        inner.changed.notify_waiters();
    }
}

impl Host {
    /// What is lost or reset stays so, but that the lost learn of a reset.
    fn all(&self, fate: Fate) {
        for wire in self.wires.iter().filter_map(Weak::upgrade) {
            let mut wire = wire.lock().unwrap();
            if wire.fate == Fate::Reset || (wire.fate == Fate::Lost && fate != Fate::Reset) {
                continue;
            }
            wire.fate = fate;
            for way in &mut wire.ways {
                way.wake();
            }
        }
    }
}

impl Dial for Net {
    fn endpoint(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let connect = self.clone().connect(address);
        Box::pin(async move { Ok(Box::new(connect.await?) as BoxedIo) })
    }

    fn control_plane(&self, address: &ServerAddress) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let ServerAddress::Tcp { host, port } = address else { panic!("not in this network: {address:?}") };
        self.endpoint(SocketAddr::new(host.parse().expect("an address"), *port))
    }
}

impl Way {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let arrives = {
                let mut wire = this.wire.lock().unwrap();
                let fate = wire.fate;
                let way = &mut wire.ways[1 - this.side];
                match fate {
                    Fate::Reset => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                    Fate::Flowing => {}
                    Fate::Stalled | Fate::Lost => {
                        way.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
                let now = Instant::now();
                let next = way.queue.front().map(|(at, _)| *at).or(way.finished);
                if next.is_none_or(|at| at > now) {
                    way.reader = Some(cx.waker().clone());
                    next
                } else {
                    if let Some((_, bytes)) = way.queue.front_mut() {
                        let taken = bytes.len().min(buf.remaining());
                        buf.put_slice(&bytes[..taken]);
                        bytes.drain(..taken);
                        if bytes.is_empty() {
                            way.queue.pop_front();
                        }
                        way.length -= taken;
                        if let Some(writer) = way.writer.take() {
                            writer.wake();
                        }
                    }
                    return Poll::Ready(Ok(()));
                }
            };
            let Some(at) = arrives else { return Poll::Pending };
            let sleep = this.sleep.get_or_insert_with(|| Box::pin(sleep_until(at)));
            sleep.as_mut().reset(at);
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut wire = self.wire.lock().unwrap();
        let at = Instant::now() + wire.latency;
        let fate = wire.fate;
        let way = &mut wire.ways[self.side];
        if fate == Fate::Reset || (way.unread && fate == Fate::Flowing) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if way.length >= CAPACITY {
            way.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        way.queue.push_back((at, buf.to_vec()));
        way.length += buf.len();
        if let Some(reader) = way.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.lock().unwrap().finish(self.side);
        Poll::Ready(Ok(()))
    }
}

impl Wire {
    fn finish(&mut self, side: usize) {
        let at = Instant::now() + self.latency;
        let way = &mut self.ways[side];
        way.finished.get_or_insert(at);
        if let Some(reader) = way.reader.take() {
            reader.wake();
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut wire = self.wire.lock().unwrap();
        wire.finish(self.side);
        let other = &mut wire.ways[1 - self.side];
        other.unread = true;
        other.wake();
    }
}
