//! What is measured beyond what always is.

/// What a mesh measures of requests beyond `istio_requests_total` and `istio_request_duration_milliseconds`, which it always does:
/// [`MeshBuilder::metrics`](crate::MeshBuilder::metrics). Everything here costs a little of every request, and is off unless it is switched
/// on. All of it goes to the `metrics` facade; without a recorder it goes nowhere.
///
/// ```
/// use mesh_client::metrics::{Instrument, Metrics};
///
/// let metrics = Metrics::default().sizes(true).grpc(Instrument::DEFAULTS).grpc([Instrument::CallRetries]);
/// let builder = mesh_client::Mesh::builder().metrics(metrics);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    pub(crate) sizes: bool,
    pub(crate) workloads: bool,
    instruments: u32,
    attempt_labels: u8,
}

/// A label of gRPC's instruments of attempts (duration and sizes) that they have only where it is switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttemptLabel {
    /// `grpc.lb.locality` (gRFC A78): `{region="r", zone="z", sub_zone="s"}` of the endpoint; empty for attempts that came to none.
    Locality,
    /// `grpc.lb.backend_service` (gRFC A89): the cluster of the endpoint; empty likewise.
    BackendService,
}

/// One of gRPC's instruments (gRFC A66, A78, A94, A96).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Instrument {
    /// `grpc.client.attempt.started`: a counter of attempts, by `grpc.method` and `grpc.target`.
    AttemptStarted,
    /// `grpc.client.attempt.duration`: a histogram in seconds, by `grpc.method`, `grpc.target` and `grpc.status`.
    AttemptDuration,
    /// `grpc.client.attempt.sent_total_compressed_message_size`: a histogram in bytes, labelled likewise.
    AttemptSent,
    /// `grpc.client.attempt.rcvd_total_compressed_message_size`: a histogram in bytes, labelled likewise.
    AttemptReceived,
    /// `grpc.client.call.duration`: a histogram in seconds, labelled likewise.
    CallDuration,
    /// `grpc.client.call.retries`: a histogram of retries of a call that had some, by `grpc.method` and `grpc.target`.
    CallRetries,
    /// `grpc.client.call.transparent_retries`: likewise of transparent retries.
    CallTransparentRetries,
    /// `grpc.client.call.hedges`: likewise of hedges.
    CallHedges,
    /// `grpc.client.call.retry_delay`: a histogram of the seconds in which a call with several attempts had none in flight.
    CallRetryDelay,
    /// `grpc.subchannel.disconnections`: a counter, by `grpc.target`, `grpc.lb.backend_service` and `grpc.disconnect_error`.
    SubchannelDisconnections,
    /// `grpc.subchannel.connection_attempts_succeeded`: a counter, by `grpc.target` and `grpc.lb.backend_service`.
    SubchannelAttemptsSucceeded,
    /// `grpc.subchannel.connection_attempts_failed`: likewise.
    SubchannelAttemptsFailed,
    /// `grpc.subchannel.open_connections`: a gauge, labelled likewise.
    SubchannelOpenConnections,
    /// `grpc.lb.pick_first.disconnections`: as the one of subchannels, by `grpc.target`, of clusters that pick first.
    PickFirstDisconnections,
    /// `grpc.lb.pick_first.connection_attempts_succeeded`: likewise.
    PickFirstAttemptsSucceeded,
    /// `grpc.lb.pick_first.connection_attempts_failed`: likewise.
    PickFirstAttemptsFailed,
    /// `grpc.lb.wrr.rr_fallback`: a counter of updates of the weights in which fewer than two endpoints had one, by `grpc.target`.
    WrrRrFallback,
    /// `grpc.lb.wrr.endpoint_weight_not_yet_usable`: a counter of the endpoints of each update that had none yet.
    WrrEndpointWeightNotYetUsable,
    /// `grpc.lb.wrr.endpoint_weight_stale`: likewise of those whose reports are too old.
    WrrEndpointWeightStale,
    /// `grpc.lb.wrr.endpoint_weights`: a histogram of the weights of each update; 0 where there is none.
    WrrEndpointWeights,
}

impl Instrument {
    /// Those that gRPC has on by default (gRFC A66): of attempts and calls.
    pub const DEFAULTS: [Self; 5] =
        [Self::AttemptStarted, Self::AttemptDuration, Self::AttemptSent, Self::AttemptReceived, Self::CallDuration];

    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::AttemptStarted,
        Self::AttemptDuration,
        Self::AttemptSent,
        Self::AttemptReceived,
        Self::CallDuration,
        Self::CallRetries,
        Self::CallTransparentRetries,
        Self::CallHedges,
        Self::CallRetryDelay,
        Self::SubchannelDisconnections,
        Self::SubchannelAttemptsSucceeded,
        Self::SubchannelAttemptsFailed,
        Self::SubchannelOpenConnections,
        Self::PickFirstDisconnections,
        Self::PickFirstAttemptsSucceeded,
        Self::PickFirstAttemptsFailed,
        Self::WrrRrFallback,
        Self::WrrEndpointWeightNotYetUsable,
        Self::WrrEndpointWeightStale,
        Self::WrrEndpointWeights,
    ];

    /// Those of calls and attempts, which cost something of every call.
    const OF_CALLS: u32 = (1 << (Self::CallRetryDelay as u32 + 1)) - 1;

    /// Its name, as gRPC has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttemptStarted => "grpc.client.attempt.started",
            Self::AttemptDuration => "grpc.client.attempt.duration",
            Self::AttemptSent => "grpc.client.attempt.sent_total_compressed_message_size",
            Self::AttemptReceived => "grpc.client.attempt.rcvd_total_compressed_message_size",
            Self::CallDuration => "grpc.client.call.duration",
            Self::CallRetries => "grpc.client.call.retries",
            Self::CallTransparentRetries => "grpc.client.call.transparent_retries",
            Self::CallHedges => "grpc.client.call.hedges",
            Self::CallRetryDelay => "grpc.client.call.retry_delay",
            Self::SubchannelDisconnections => "grpc.subchannel.disconnections",
            Self::SubchannelAttemptsSucceeded => "grpc.subchannel.connection_attempts_succeeded",
            Self::SubchannelAttemptsFailed => "grpc.subchannel.connection_attempts_failed",
            Self::SubchannelOpenConnections => "grpc.subchannel.open_connections",
            Self::PickFirstDisconnections => "grpc.lb.pick_first.disconnections",
            Self::PickFirstAttemptsSucceeded => "grpc.lb.pick_first.connection_attempts_succeeded",
            Self::PickFirstAttemptsFailed => "grpc.lb.pick_first.connection_attempts_failed",
            Self::WrrRrFallback => "grpc.lb.wrr.rr_fallback",
            Self::WrrEndpointWeightNotYetUsable => "grpc.lb.wrr.endpoint_weight_not_yet_usable",
            Self::WrrEndpointWeightStale => "grpc.lb.wrr.endpoint_weight_stale",
            Self::WrrEndpointWeights => "grpc.lb.wrr.endpoint_weights",
        }
    }
}

impl Metrics {
    /// `istio_request_bytes` and `istio_response_bytes`: histograms of the bytes of bodies; `istio_request_messages_total` and
    /// `istio_response_messages_total`: counters of gRPC messages. Labelled as `istio_requests_total`.
    #[must_use]
    pub fn sizes(mut self, on: bool) -> Self {
        self.sizes = on;
        self
    }

    /// Fills in the `destination_*` labels of the endpoint that answered: its workload, as Istio's endpoint discovery names it, and the
    /// identity in its certificate. Without it they are `unknown`, but for the service's.
    #[must_use]
    pub fn destination_workloads(mut self, on: bool) -> Self {
        self.workloads = on;
        self
    }

    /// Switches these instruments on, beside those that are.
    #[must_use]
    pub fn grpc(mut self, instruments: impl IntoIterator<Item = Instrument>) -> Self {
        self.instruments |= instruments.into_iter().fold(0, |set, instrument| set | 1 << instrument as u32);
        self
    }

    /// Gives the instruments of attempts these labels, beside those that they have.
    #[must_use]
    pub fn attempt_labels(mut self, labels: impl IntoIterator<Item = AttemptLabel>) -> Self {
        self.attempt_labels |= labels.into_iter().fold(0, |set, label| set | 1 << label as u8);
        self
    }

    pub(crate) fn labels_attempts(self) -> bool {
        self.attempt_labels != 0
    }

    pub(crate) fn labels_with(self, label: AttemptLabel) -> bool {
        self.attempt_labels & 1 << label as u8 != 0
    }

    pub(crate) fn has(self, instrument: Instrument) -> bool {
        self.instruments & 1 << instrument as u32 != 0
    }

    /// Calls have to be watched for them.
    pub(crate) fn watch_calls(self) -> bool {
        self.sizes || self.workloads || self.of_calls()
    }

    /// There are instruments of gRPC calls.
    pub(crate) fn of_calls(self) -> bool {
        self.instruments & Instrument::OF_CALLS != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruments_are_switched_one_by_one() {
        let metrics = Metrics::default();
        assert!(!metrics.watch_calls());
        let metrics = metrics.grpc([Instrument::SubchannelOpenConnections]);
        assert!(!metrics.watch_calls() && metrics.has(Instrument::SubchannelOpenConnections));
        let metrics = metrics.grpc(Instrument::DEFAULTS);
        assert!(metrics.of_calls() && metrics.has(Instrument::CallDuration) && !metrics.has(Instrument::CallRetries));
        let names: std::collections::HashSet<_> = Instrument::ALL.map(Instrument::name).into_iter().collect();
        assert_eq!(names.len(), Instrument::ALL.len());
    }
}
