//! Filters that keep a service from being overloaded: buffer, admission control, adaptive concurrency.

use std::{ops::Range, time::Duration};

/// `envoy.extensions.filters.http.buffer.v3.Buffer`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferConfig {
    /// Greater than zero; `None` only for a route: no limit (`BufferPerRoute.disabled`).
    pub max_request_bytes: Option<u32>,
}

/// `envoy.extensions.filters.http.admission_control.v3.AdmissionControl`
#[derive(Clone, Debug, PartialEq)]
pub struct AdmissionControlConfig {
    /// `enabled.default_value`; default true.
    pub enabled: bool,
    /// The time that is looked at, whole seconds; default 30 s.
    pub sampling_window: Duration,
    /// At least 1, the default: the larger, the sooner calls are refused.
    pub aggression: f64,
    /// Share of successes below which calls are refused, 0.01..=1; default 0.95.
    pub sr_threshold: f64,
    /// With fewer calls per second nothing is refused; default 0.
    pub rps_threshold: u32,
    /// 0..=1; default 0.8.
    pub max_rejection_probability: f64,
    /// HTTP statuses that are successes; default 100..500.
    pub http_success: Vec<Range<u16>>,
    /// Bit `n` is set where gRPC code `n` is a success; default: all but those that mean a failure of the server.
    pub grpc_success: u32,
}

/// `envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency` with the gradient controller.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptiveConcurrencyConfig {
    /// `enabled.default_value`; default true.
    pub enabled: bool,
    /// HTTP status of what is refused, at least 400; default 503.
    pub status: u16,
    /// Which latency of a window counts, 0..=1; default 0.5.
    pub percentile: f64,
    /// The limit is never higher; default 1000.
    pub max_concurrency: u32,
    /// Nor lower; default that of the measurement.
    pub min_concurrency_limit: u32,
    /// How often the limit is computed; greater than zero.
    pub update_interval: Duration,
    /// How often the least latency is measured.
    pub min_rtt_interval: Duration,
    /// Instead of measuring it.
    pub fixed_min_rtt: Option<Duration>,
    /// Calls of one measurement; default 50.
    pub min_rtt_requests: u32,
    /// Share of the interval by which a measurement is late, by chance, 0..=1; default 0.15.
    pub jitter: f64,
    /// The limit while it is measured; default 3.
    pub min_concurrency: u32,
    /// Share that is added to the least latency, 0..=1; default 0.25.
    pub buffer: f64,
}

impl Default for AdmissionControlConfig {
    fn default() -> Self {
        // ABORTED, DATA_LOSS, DEADLINE_EXCEEDED, INTERNAL, RESOURCE_EXHAUSTED, UNAVAILABLE (Envoy).
        let failures = [10, 15, 4, 13, 8, 14].into_iter().fold(0u32, |bits, code| bits | 1 << code);
        Self {
            enabled: true,
            sampling_window: Duration::from_secs(30),
            aggression: 1.0,
            sr_threshold: 0.95,
            rps_threshold: 0,
            max_rejection_probability: 0.8,
            http_success: vec![Range { start: 100, end: 500 }],
            grpc_success: 0x1_ffff & !failures,
        }
    }
}

impl Default for AdaptiveConcurrencyConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            status: 503,
            percentile: 0.5,
            max_concurrency: 1000,
            min_concurrency_limit: 3,
            update_interval: Duration::from_millis(100),
            min_rtt_interval: Duration::from_secs(60),
            fixed_min_rtt: None,
            min_rtt_requests: 50,
            jitter: 0.15,
            min_concurrency: 3,
            buffer: 0.25,
        }
    }
}
