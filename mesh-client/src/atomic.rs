//! The atomics of what counts without locks. The models in `loom/` include those files by their paths, with loom's atomics in this place.

pub(crate) use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
