//! Tasks that end with their owner.

use tokio::{runtime::Handle, task::AbortHandle};

/// A task that is aborted when this is dropped.
#[derive(Debug)]
pub(crate) struct Task(AbortHandle);

impl Task {
    /// Runs on the current runtime.
    ///
    /// # Panics
    /// Outside of one.
    pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::on(&Handle::current(), future)
    }

    /// Runs on this runtime.
    pub(crate) fn on(runtime: &Handle, future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(runtime.spawn(future).abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn a_task_ends_when_its_owner_drops_it() {
        let (held, ended) = oneshot::channel::<()>();
        let task = Task::spawn(async move {
            let _held = held;
            pending().await
        });
        tokio::task::yield_now().await;
        drop(task);
        ended.await.expect_err("what the task had is gone");
    }
}
