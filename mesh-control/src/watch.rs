//! Follows a file or a folder: a change that has come to rest is applied, the last good configuration stays otherwise.

use crate::{
    control::{Core, Error},
    input::Source,
};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// A change is taken when two readings this far apart are equal: editors truncate, write and rename.
const REST: Duration = Duration::from_millis(50);
/// What keeps changing for this long is taken as it is then: a half-written file is rejected, and read again.
const LONGEST_UNREST: Duration = Duration::from_secs(2);
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
        let reading = at_rest(|| read(&path)).await;
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

/// The first reading that is equal to the one before it, or the last one that [`LONGEST_UNREST`] allows.
async fn at_rest<F: Future<Output = Reading>>(mut read: impl FnMut() -> F) -> Reading {
    let end = Instant::now() + LONGEST_UNREST;
    let mut reading = read().await;
    loop {
        tokio::time::sleep(REST).await;
        let again = read().await;
        if again == reading || Instant::now() >= end {
            return again;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Readings that differ up to the `still`th, and how long it took to come to rest.
    async fn rest_after(still: u32) -> (Reading, Duration) {
        let (mut count, start) = (0, Instant::now());
        let reading = at_rest(|| {
            count = still.min(count + 1);
            std::future::ready(Ok(vec![Source::inline(count.to_string())]))
        });
        (reading.await, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_taken_once_two_readings_are_equal() {
        let (reading, took) = rest_after(3).await;
        assert_eq!(reading, Ok(vec![Source::inline("3".to_owned())]));
        assert_eq!(took.as_millis(), 3 * REST.as_millis());
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_keeps_changing_is_taken_in_the_end() {
        let (reading, took) = rest_after(u32::MAX).await;
        assert!(reading.is_ok());
        assert!((LONGEST_UNREST..LONGEST_UNREST + 2 * REST).contains(&took), "{took:?}");
    }
}
