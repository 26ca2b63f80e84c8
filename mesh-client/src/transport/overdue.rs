//! Clients that do not go on: who decides about a request is told while it is polled, or dropped, because of them.

use std::cell::Cell;

thread_local! {
    static TOLD: Cell<bool> = const { Cell::new(false) };
}

/// How often within its time a client is looked at.
pub(crate) const LOOKS: u32 = 4;

/// Polls or drops a request whose client has owed something for too long: its body, or reading the answer.
pub(super) fn tell<R>(act: impl FnOnce() -> R) -> R {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            TOLD.set(self.0);
        }
    }
    let _before = Before(TOLD.replace(true));
    act()
}

/// Whether that is why we are here. Whoever asks has to act: others are not told the same.
pub(crate) fn is_told() -> bool {
    TOLD.replace(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_told_and_only_meanwhile() {
        assert!(!is_told());
        assert_eq!(tell(|| (is_told(), is_told())), (true, false));
        tell(|| ());
        assert!(!is_told());
    }
}
