//! Follows a file or a folder: a change that has come to rest is applied, the last good configuration stays otherwise.

use crate::{
    control::{Core, Error},
    input::Source,
};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::Notify;

/// A change is taken when two readings this far apart are equal: editors truncate, write and rename.
const REST: Duration = Duration::from_millis(50);
/// The folder is read this often without being told to: no notification survives every way of replacing a folder, and
/// some file systems have none.
const POLL: Duration = Duration::from_secs(1);

/// What was read: the sources, or why not.
type Reading = Result<Vec<Source>, String>;

/// Applies every change of `path` after `known`, forever.
pub(crate) async fn follow(path: PathBuf, known: Vec<Source>, core: Arc<Core>) {
    let changed = Arc::new(Notify::new());
    let mut watcher = watcher(changed.clone());
    let mut last: Reading = Ok(known);
    loop {
        if let Some(watcher) = &mut watcher {
            subscribe(watcher, &path);
        }
        // Elapsed or notified: look in either case.
        let _ = tokio::time::timeout(POLL, changed.notified()).await;
        let reading = at_rest(&path).await;
        if reading == last {
            continue;
        }
        match &reading {
            // A rejection is reported by `apply`.
            Ok(sources) => drop(core.apply(sources)),
            Err(reason) => core.reject(&Error::Read(io::Error::other(reason.clone()))),
        }
        last = reading;
    }
}

async fn at_rest(path: &Path) -> Reading {
    let mut reading = read(path).await;
    loop {
        tokio::time::sleep(REST).await;
        let again = read(path).await;
        if again == reading {
            return reading;
        }
        reading = again;
    }
}

async fn read(path: &Path) -> Reading {
    let path = path.to_owned();
    match tokio::task::spawn_blocking(move || Source::path(&path)).await {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn watcher(changed: Arc<Notify>) -> Option<RecommendedWatcher> {
    let notify = move |event: notify::Result<notify::Event>| {
        // Reading a file is an event too; it would wake us for our own look.
        if !event.is_ok_and(|e| e.kind.is_access()) {
            changed.notify_one();
        }
    };
    notify::recommended_watcher(notify)
        .inspect_err(|error| tracing::warn!(%error, "no file notifications: the configuration is polled"))
        .ok()
}

/// Watches the path, and its parent for the day when the path is replaced or comes back. Again and again: what is watched
/// already is no error, and a folder that was recreated is a new one.
fn subscribe(watcher: &mut RecommendedWatcher, path: &Path) {
    let folder = if path.is_dir() { Some(path) } else { None };
    let parent = path.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    for watched in folder.into_iter().chain(parent) {
        if let Err(error) = watcher.watch(watched, RecursiveMode::NonRecursive) {
            tracing::debug!(%error, path = %watched.display(), "cannot watch");
        }
    }
}
