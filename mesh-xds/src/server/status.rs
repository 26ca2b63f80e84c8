//! What the server knows of its clients: open streams, what each was sent and has accepted, and the last refusals.

use super::ResourceType;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::{broadcast, watch};

/// How many refusals are kept for [`super::ResourceCache::recent_nacks`].
const KEPT_NACKS: usize = 64;

/// A client refused a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nack {
    /// `node.id` of the client, or empty.
    pub node_id: String,
    /// What was refused.
    pub resource_type: ResourceType,
    /// The version of the refused response.
    pub version: u64,
    /// `error_detail.message`: what the client says.
    pub detail: String,
}

/// One open ADS stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamStatus {
    /// `node.id`, or empty until the first request.
    pub node_id: String,
    /// The client's address, when known.
    pub peer: Option<SocketAddr>,
    /// The types the client has asked for.
    pub types: BTreeMap<ResourceType, TypeStatus>,
}

/// State of one resource type on one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TypeStatus {
    /// Subscribed by name.
    pub names: Arc<BTreeSet<String>>,
    /// Subscribed to everything (LDS and CDS).
    pub wildcard: bool,
    /// The version up to which everything the client subscribed to was sent to it.
    pub seen: u64,
    /// Version of the last response, 0 before the first.
    pub sent: u64,
    /// Version of the last accepted response, 0 before the first.
    pub acked: u64,
    /// A response was sent that the client has neither accepted nor refused.
    pub outstanding: bool,
    /// What the client said when it refused the last response.
    pub error: Option<String>,
}

/// Streams and refusals, shared by the cache and the servers on it.
#[derive(Debug)]
pub(crate) struct Registry {
    streams: watch::Sender<BTreeMap<u64, StreamStatus>>,
    nacks: broadcast::Sender<Nack>,
    recent: Mutex<VecDeque<Nack>>,
}

impl Registry {
    pub(crate) fn new() -> Self {
        Self {
            streams: watch::Sender::new(BTreeMap::new()),
            nacks: broadcast::Sender::new(256),
            recent: Mutex::default(),
        }
    }

    pub(crate) fn streams(&self) -> watch::Receiver<BTreeMap<u64, StreamStatus>> {
        self.streams.subscribe()
    }

    pub(crate) fn update(&self, id: u64, status: StreamStatus) {
        self.streams.send_if_modified(|streams| {
            if streams.get(&id) == Some(&status) {
                return false;
            }
            streams.insert(id, status);
            true
        });
    }

    pub(crate) fn remove(&self, id: u64) {
        self.streams.send_if_modified(|streams| streams.remove(&id).is_some());
    }

    pub(crate) fn nacks(&self) -> broadcast::Receiver<Nack> {
        self.nacks.subscribe()
    }

    pub(crate) fn recent_nacks(&self) -> Vec<Nack> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    pub(crate) fn nack(&self, nack: Nack) {
        tracing::warn!(
            node = nack.node_id,
            r#type = %nack.resource_type,
            version = nack.version,
            detail = nack.detail,
            "client refused a response"
        );
        {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            if recent.len() == KEPT_NACKS {
                recent.pop_front();
            }
            recent.push_back(nack.clone());
        }
        // No receiver is no error: the refusal is logged and kept.
        let _ = self.nacks.send(nack);
    }
}
