//! Envoy's response flags.

use std::{
    fmt,
    ops::{BitAnd, BitOr, BitOrAssign},
};

/// Why a request ended as it did, as Envoy's access log says it (`%RESPONSE_FLAGS%`): a set, empty when an endpoint answered and nothing
/// else is to be said.
///
/// Displays as Envoy prints it: `UF,URX`, or `-` when empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u32);

/// In the order in which Envoy prints them.
const NAMES: [(ResponseFlags, &str); 19] = [
    (ResponseFlags::NO_HEALTHY_UPSTREAM, "UH"),
    (ResponseFlags::UPSTREAM_REQUEST_TIMEOUT, "UT"),
    (ResponseFlags::LOCAL_RESET, "LR"),
    (ResponseFlags::UPSTREAM_REMOTE_RESET, "UR"),
    (ResponseFlags::UPSTREAM_CONNECTION_FAILURE, "UF"),
    (ResponseFlags::UPSTREAM_CONNECTION_TERMINATION, "UC"),
    (ResponseFlags::UPSTREAM_OVERFLOW, "UO"),
    (ResponseFlags::NO_ROUTE, "NR"),
    (ResponseFlags::DELAY_INJECTED, "DI"),
    (ResponseFlags::FAULT_INJECTED, "FI"),
    (ResponseFlags::RATE_LIMITED, "RL"),
    (ResponseFlags::RATE_LIMIT_SERVICE_ERROR, "RLSE"),
    (ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION, "DC"),
    (ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED, "URX"),
    (ResponseFlags::STREAM_IDLE_TIMEOUT, "SI"),
    (ResponseFlags::UPSTREAM_MAX_STREAM_DURATION, "UMSDR"),
    (ResponseFlags::UPSTREAM_PROTOCOL_ERROR, "UPE"),
    (ResponseFlags::NO_CLUSTER, "NC"),
    (ResponseFlags::DROP_OVERLOAD, "DO"),
];

impl ResponseFlags {
    /// Nothing to say.
    pub const NONE: Self = Self(0);
    /// UH: no endpoint can be used.
    pub const NO_HEALTHY_UPSTREAM: Self = Self(1);
    /// UT: a deadline or the limit of an attempt passed.
    pub const UPSTREAM_REQUEST_TIMEOUT: Self = Self(1 << 1);
    /// LR: our own side ended the stream: the request's body failed, or the request cannot be sent.
    pub const LOCAL_RESET: Self = Self(1 << 2);
    /// UR: the endpoint reset the stream.
    pub const UPSTREAM_REMOTE_RESET: Self = Self(1 << 3);
    /// UF: no connection could be made.
    pub const UPSTREAM_CONNECTION_FAILURE: Self = Self(1 << 4);
    /// UC: the connection ended.
    pub const UPSTREAM_CONNECTION_TERMINATION: Self = Self(1 << 5);
    /// UO: a circuit breaker or the retry budget refused.
    pub const UPSTREAM_OVERFLOW: Self = Self(1 << 6);
    /// NR: no route, or one that does not forward.
    pub const NO_ROUTE: Self = Self(1 << 7);
    /// DI: a fault filter delayed it.
    pub const DELAY_INJECTED: Self = Self(1 << 8);
    /// FI: a fault filter aborted it.
    pub const FAULT_INJECTED: Self = Self(1 << 9);
    /// RL: a rate limit filter refused it.
    pub const RATE_LIMITED: Self = Self(1 << 10);
    /// RLSE: the rate limit service did not answer, and the filter denies then.
    pub const RATE_LIMIT_SERVICE_ERROR: Self = Self(1 << 11);
    /// DC: the caller gave up.
    pub const DOWNSTREAM_CONNECTION_TERMINATION: Self = Self(1 << 12);
    /// URX: it was retried as often as it may be.
    pub const UPSTREAM_RETRY_LIMIT_EXCEEDED: Self = Self(1 << 13);
    /// SI: nothing moved for too long.
    pub const STREAM_IDLE_TIMEOUT: Self = Self(1 << 14);
    /// UMSDR: the `max_stream_duration` of the route or the listener passed.
    pub const UPSTREAM_MAX_STREAM_DURATION: Self = Self(1 << 15);
    /// UPE: the endpoint broke the protocol.
    pub const UPSTREAM_PROTOCOL_ERROR: Self = Self(1 << 16);
    /// NC: the route's cluster cannot be used.
    pub const NO_CLUSTER: Self = Self(1 << 17);
    /// DO: the control plane's `drop_overload`.
    pub const DROP_OVERLOAD: Self = Self(1 << 18);

    /// No flag at all.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// These and `flags`.
    pub(crate) const fn with(self, flags: Self) -> Self {
        Self(self.0 | flags.0)
    }

    /// All of `flags` are among these.
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// The short names, in Envoy's order.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.into_iter().filter_map(move |(flag, name)| self.contains(flag).then_some(name))
    }
}

impl BitOr for ResponseFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for ResponseFlags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for ResponseFlags {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (position, name) in self.names().enumerate() {
            if position > 0 {
                f.write_str(",")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_as_envoy_prints_them() {
        assert_eq!(ResponseFlags::NONE.to_string(), "-");
        let both = ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED | ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
        assert_eq!(both.to_string(), "UF,URX");
        assert!(both.contains(ResponseFlags::UPSTREAM_CONNECTION_FAILURE));
        assert!(!both.contains(ResponseFlags::NO_ROUTE | ResponseFlags::UPSTREAM_CONNECTION_FAILURE));
        let all = NAMES.into_iter().fold(ResponseFlags::NONE, |all, (flag, _)| all | flag);
        assert_eq!(all.names().count(), NAMES.len());
    }
}
