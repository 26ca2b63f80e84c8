//! The record as text: Istio's default formats.

use super::{AccessLog, Direction};
use crate::outbound::iso8601;
use http::{HeaderValue, Version};
use std::fmt;

impl AccessLog {
    /// As an object with the keys of Istio's JSON format, and `attempts`, `grpc_status`, `peer` and `trace_id`.
    pub fn to_json(&self) -> serde_json::Value {
        let header = |value: &Option<HeaderValue>| value.as_ref().map(|value| text(value).into_owned());
        serde_json::json!({
            "start_time": iso8601(self.start_time),
            "method": self.method.as_str(),
            "path": self.path(),
            "protocol": protocol(self.version),
            "response_code": self.status,
            "response_flags": self.flags.to_string(),
            "response_code_details": self.details(),
            "upstream_transport_failure_reason": self.failure(),
            "bytes_received": self.request_bytes,
            "bytes_sent": self.response_bytes,
            "duration": millis(self.duration),
            "upstream_service_time": header(&self.upstream_service_time),
            "x_forwarded_for": header(&self.forwarded_for),
            "user_agent": header(&self.user_agent),
            "request_id": header(&self.request_id),
            "authority": self.authority,
            "upstream_host": self.endpoint.map(|endpoint| endpoint.to_string()),
            "upstream_cluster": self.cluster.as_deref(),
            "route_name": self.route.as_deref(),
            "grpc_status": self.grpc_status,
            "attempts": self.attempts,
            "peer": self.peer,
            "direction": if self.direction == Direction::Inbound { "inbound" } else { "outbound" },
            "downstream_remote_address": self.remote.map(|remote| remote.to_string()),
            "trace_id": self.trace_id.map(|id| id.to_string()),
        })
    }

    /// Envoy's `%RESPONSE_CODE_DETAILS%`, as far as they are known.
    fn details(&self) -> &str {
        if let Some(details) = &self.details {
            return details;
        }
        match (self.endpoint.is_some(), self.error.is_some()) {
            (true, false) if self.status != 0 => "via_upstream",
            (false, false) if self.status != 0 => "direct_response",
            (_, true) => "local_error",
            _ => "downstream_remote_disconnect",
        }
    }

    /// Envoy's `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    fn failure(&self) -> Option<&str> {
        self.error.as_deref()
    }
}

impl fmt::Display for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "[{}] \"{} {} {}\" {} {} {} - \"{}\" {} {} {} {} \"{}\" \"{}\" \"{}\" \"{}\" \"{}\" {} - - {} - {}",
            iso8601(self.start_time),
            self.method,
            self.path(),
            protocol(self.version),
            self.status,
            self.flags,
            self.details(),
            Quoted(self.failure()),
            self.request_bytes,
            self.response_bytes,
            millis(self.duration),
            Header(&self.upstream_service_time),
            Header(&self.forwarded_for),
            Header(&self.user_agent),
            Header(&self.request_id),
            Quoted(Some(&self.authority).filter(|text| !text.is_empty()).map(String::as_str)),
            Quoted(self.endpoint.map(|endpoint| endpoint.to_string()).as_deref()),
            self.cluster.as_deref().unwrap_or("-"),
            Quoted(self.remote.map(|remote| remote.to_string()).as_deref()),
            self.route.as_deref().filter(|name| !name.is_empty()).unwrap_or("-"),
        )
    }
}

/// What is not there is a dash; what would end a quoted field is escaped.
struct Quoted<'a>(Option<&'a str>);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(text) = self.0 else { return f.write_str("-") };
        text.chars().try_for_each(|c| match c {
            '"' | '\\' => write!(f, "\\{c}"),
            c if c.is_control() => write!(f, "{}", c.escape_default()),
            c => write!(f, "{c}"),
        })
    }
}

struct Header<'a>(&'a Option<HeaderValue>);

impl fmt::Display for Header<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Quoted(self.0.as_ref().map(text).as_deref()).fmt(f)
    }
}

fn text(value: &HeaderValue) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Envoy's `%PROTOCOL%`.
fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 | Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_3 => "HTTP/3",
        _ => "HTTP/1.1",
    }
}

#[cfg(test)]
mod tests {
    use crate::access_log::{AccessLog, Direction, ResponseFlags};
    use http::{HeaderValue, Method, Uri, Version};
    use std::time::{Duration, SystemTime};

    fn record() -> AccessLog {
        AccessLog {
            direction: Direction::Outbound,
            remote: None,
            start_time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            duration: Duration::from_micros(12_900),
            response_duration: Some(Duration::from_millis(3)),
            target: "xds:///reviews:9080".into(),
            method: Method::GET,
            uri: Uri::from_static("/reviews/0?x=1"),
            authority: "reviews:9080".to_owned(),
            version: Version::HTTP_11,
            grpc: false,
            user_agent: Some(HeaderValue::from_static("curl \"8\"")),
            request_id: None,
            forwarded_for: None,
            status: 503,
            grpc_status: None,
            flags: ResponseFlags::UPSTREAM_CONNECTION_FAILURE | ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED,
            error: Some("connection refused".to_owned()),
            request_bytes: 5,
            response_bytes: 91,
            request_messages: 0,
            response_messages: 0,
            route: Some("default".into()),
            cluster: Some("outbound|9080||reviews".into()),
            endpoint: Some(([127, 0, 0, 1], 9080).into()),
            attempts: 3,
            peer: None,
            upstream_service_time: None,
            details: None,
            trace_id: None,
        }
    }

    #[test]
    fn a_line_is_in_istios_default_format() {
        assert_eq!(
            record().to_string(),
            "[2023-11-14T22:13:20.123Z] \"GET /reviews/0?x=1 HTTP/1.1\" 503 UF,URX local_error - \"connection refused\" 5 91 12 - \
             \"-\" \"curl \\\"8\\\"\" \"-\" \"reviews:9080\" \"127.0.0.1:9080\" outbound|9080||reviews - - - - default"
        );
    }

    #[test]
    fn an_object_has_istios_keys() {
        let json = record().to_json();
        for (key, value) in [
            ("start_time", "2023-11-14T22:13:20.123Z"),
            ("response_flags", "UF,URX"),
            ("upstream_host", "127.0.0.1:9080"),
            ("upstream_cluster", "outbound|9080||reviews"),
            ("route_name", "default"),
        ] {
            assert_eq!(json[key], value, "{key}");
        }
        assert_eq!((json["response_code"].as_u64(), json["duration"].as_u64()), (Some(503), Some(12)));
        assert!(json["request_id"].is_null());
    }
}
