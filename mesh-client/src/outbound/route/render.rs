//! `%COMMAND%` texts, filled in with what a call knows.

use super::head::RequestHead;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, Version};
use mesh_xds::resource::{Field, FieldName, Format, FormatPart, TimePart};
use std::{
    io::Write as _,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

/// A value of a header edit, prepared.
#[derive(Debug)]
pub(crate) enum Text {
    /// The same for every request.
    Fixed(HeaderValue),
    /// To be filled in.
    Made(Format),
}

/// What is known of a call when a text is filled in; what is not known comes out empty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) request: Option<RequestHead<'a>>,
    pub(crate) response: Option<(StatusCode, &'a HeaderMap)>,
    /// The protocol of the caller's request.
    pub(crate) version: Version,
    /// The endpoint; known once there is a response.
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) cluster: &'a str,
    pub(crate) route: &'a str,
    /// When the call began.
    pub(crate) start: SystemTime,
}

impl Text {
    /// What does not depend on the call is filled in now: text, environment, host name.
    pub(crate) fn compile(format: &Format) -> Self {
        let mut parts: Vec<FormatPart> = Vec::with_capacity(format.parts.len());
        for part in &format.parts {
            let part = match part {
                FormatPart::Hostname => FormatPart::Text(hostname().into_bytes()),
                FormatPart::Environment { name, limit } => {
                    let value = std::env::var(name).unwrap_or_default();
                    FormatPart::Text(cut(value.as_bytes(), *limit).to_vec())
                }
                FormatPart::Unknowable => continue,
                part => part.clone(),
            };
            match (parts.last_mut(), part) {
                (Some(FormatPart::Text(last)), FormatPart::Text(more)) => last.extend(more),
                (_, part) => parts.push(part),
            }
        }
        let fixed = match parts.as_slice() {
            [] => Some(HeaderValue::from_static("")),
            [FormatPart::Text(text)] => HeaderValue::from_bytes(text).ok(),
            _ => None,
        };
        fixed.map_or(Self::Made(Format { parts }), Self::Fixed)
    }

    /// `None`: what came out is not a header value.
    pub(crate) fn value(&self, facts: &Facts<'_>) -> Option<HeaderValue> {
        match self {
            Self::Fixed(value) => Some(value.clone()),
            Self::Made(format) => HeaderValue::from_maybe_shared(Bytes::from(render(format, facts))).ok(),
        }
    }

    pub(super) fn reads_request(&self) -> bool {
        matches!(self, Self::Made(format) if format.reads_request())
    }
}

/// Fills in a text.
pub(super) fn render(format: &Format, facts: &Facts<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    for part in &format.parts {
        // Writing to a Vec cannot fail.
        let _ = match part {
            FormatPart::Text(text) => out.write_all(text),
            FormatPart::Request(field) => out.write_all(&request_field(field, facts)),
            FormatPart::Response(field) => out.write_all(&response_field(field, facts)),
            FormatPart::UpstreamAddress => facts.endpoint.map_or(Ok(()), |endpoint| write!(out, "{endpoint}")),
            FormatPart::UpstreamIp => facts.endpoint.map_or(Ok(()), |endpoint| write!(out, "{}", endpoint.ip())),
            FormatPart::UpstreamPort => facts.endpoint.map_or(Ok(()), |endpoint| write!(out, "{}", endpoint.port())),
            FormatPart::UpstreamCluster => out.write_all(facts.cluster.as_bytes()),
            FormatPart::RouteName => out.write_all(facts.route.as_bytes()),
            FormatPart::Protocol => out.write_all(protocol(facts.version)),
            FormatPart::ResponseCode => {
                facts.response.map_or(Ok(()), |(status, _)| out.write_all(status.as_str().as_bytes()))
            }
            FormatPart::StartTime(parts) => time(&mut out, parts, facts.start),
            FormatPart::Hostname | FormatPart::Environment { .. } | FormatPart::Unknowable => Ok(()),
        };
    }
    out
}

fn request_field(field: &Field, facts: &Facts<'_>) -> Vec<u8> {
    let Some(head) = &facts.request else { return Vec::new() };
    let read = |name: &FieldName| -> Option<Vec<u8>> {
        match name {
            FieldName::Method => Some(head.method.as_str().into()),
            FieldName::Path => Some(head.uri.path_and_query().map_or("/", |path| path.as_str()).into()),
            FieldName::Authority => Some(head.authority.into()),
            FieldName::Scheme => Some(head.scheme().into()),
            FieldName::Status => None,
            FieldName::Header(name) => head.headers.get(name).map(|value| value.as_bytes().into()),
        }
    };
    limited(field, read)
}

fn response_field(field: &Field, facts: &Facts<'_>) -> Vec<u8> {
    let Some((status, headers)) = facts.response else { return Vec::new() };
    let read = |name: &FieldName| -> Option<Vec<u8>> {
        match name {
            FieldName::Status => Some(status.as_str().into()),
            FieldName::Header(name) => headers.get(name).map(|value| value.as_bytes().into()),
            _ => None,
        }
    };
    limited(field, read)
}

fn limited(field: &Field, read: impl Fn(&FieldName) -> Option<Vec<u8>>) -> Vec<u8> {
    let value = read(&field.name).or_else(|| field.alternative.as_ref().and_then(&read)).unwrap_or_default();
    cut(&value, field.limit).to_vec()
}

fn cut(value: &[u8], limit: Option<usize>) -> &[u8] {
    &value[..limit.unwrap_or(value.len()).min(value.len())]
}

fn protocol(version: Version) -> &'static [u8] {
    match version {
        Version::HTTP_10 => b"HTTP/1.0",
        Version::HTTP_2 => b"HTTP/2",
        Version::HTTP_3 => b"HTTP/3",
        _ => b"HTTP/1.1",
    }
}

/// The name of this machine; empty where it is not to be found.
fn hostname() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    kernel.or_else(|| std::env::var("HOSTNAME").ok()).map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// UTC, to the millisecond: Envoy's default `%START_TIME%`.
pub(crate) fn iso8601(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, of_day) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

fn time(out: &mut Vec<u8>, parts: &[TimePart], at: SystemTime) -> std::io::Result<()> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since.as_secs();
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    for part in parts {
        match part {
            TimePart::Text(text) => out.write_all(text.as_bytes())?,
            TimePart::Epoch => write!(out, "{seconds}")?,
            TimePart::Fraction(digits) => {
                let nanos = format!("{:09}", since.subsec_nanos());
                out.write_all(&nanos.as_bytes()[..usize::from(*digits).min(9)])?;
            }
            TimePart::Number('Y') => write!(out, "{year}")?,
            TimePart::Number('y') => write!(out, "{:02}", year % 100)?,
            TimePart::Number('m') => write!(out, "{month:02}")?,
            TimePart::Number('d') => write!(out, "{day:02}")?,
            TimePart::Number('j') => write!(out, "{:03}", day_of_year(year, month, day))?,
            TimePart::Number('H') => write!(out, "{:02}", of_day / 3600)?,
            TimePart::Number('M') => write!(out, "{:02}", of_day / 60 % 60)?,
            TimePart::Number(_) => write!(out, "{:02}", of_day % 60)?,
        }
    }
    Ok(())
}

/// Year, month (1..=12) and day (1..=31) of a day since 1970, by the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years that begin in March, so that the leap day is the last; 719,468 days from 0000-03-01 to 1970-01-01.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

fn day_of_year(year: u64, month: u64, day: u64) -> u64 {
    const BEFORE: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    BEFORE[usize::try_from(month - 1).unwrap_or(0).min(11)] + day + u64::from(leap && month > 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, Uri};

    fn rendered(source: &str, start: u64) -> String {
        let (method, uri) = (Method::POST, Uri::from_static("http://greeter:80/a/b?c=d"));
        let headers = HeaderMap::from_iter([(http::header::USER_AGENT, HeaderValue::from_static("curl/8"))]);
        let response = HeaderMap::from_iter([(http::header::SERVER, HeaderValue::from_static("backend"))]);
        let facts = Facts {
            request: Some(RequestHead::new(&method, &uri, &headers)),
            response: Some((StatusCode::ACCEPTED, &response)),
            version: Version::HTTP_2,
            endpoint: Some(([10, 0, 0, 1], 8080).into()),
            cluster: "c",
            route: "r",
            start: SystemTime::UNIX_EPOCH + Duration::from_millis(start),
        };
        let text = Text::compile(&Format::parse(source).unwrap());
        text.value(&facts).unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn every_operator_is_filled_in() {
        for (source, expected) in [
            ("plain 100%%", "plain 100%"),
            ("%REQ(user-agent)%", "curl/8"),
            ("%REQ(x-none?User-Agent):4%", "curl"),
            ("%REQ(:path)% %REQ(:method)% %REQ(:authority)% %REQ(:scheme)%", "/a/b?c=d POST greeter:80 http"),
            ("<%REQ(x-none)%>", "<>"),
            ("%RESP(server)% %RESP(:status)%", "backend 202"),
            ("%UPSTREAM_REMOTE_ADDRESS%", "10.0.0.1:8080"),
            ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%", "10.0.0.1 8080"),
            ("%UPSTREAM_CLUSTER%/%ROUTE_NAME%", "c/r"),
            ("%PROTOCOL% %RESPONSE_CODE%", "HTTP/2 202"),
            ("<%DOWNSTREAM_REMOTE_ADDRESS%>", "<>"),
            ("<%ENVIRONMENT(MESH_NO_SUCH_VARIABLE)%>", "<>"),
        ] {
            assert_eq!(rendered(source, 0), expected, "{source}");
        }
        assert!(!rendered("%HOSTNAME%", 0).is_empty());
    }

    #[test]
    fn times_are_utc() {
        let at = 1_522_799_880_123;
        assert_eq!(rendered("%START_TIME%", at), "2018-04-03T23:58:00.123Z");
        assert_eq!(
            rendered("%START_TIME(%s.%3f %y %j %F %T%z)%", at),
            "1522799880.123 18 093 2018-04-03 23:58:00+0000"
        );
        assert_eq!(rendered("%START_TIME(%Y-%m-%d %j)%", 951_782_400_000), "2000-02-29 060");
        assert_eq!(rendered("%START_TIME(%Y-%m-%d %j)%", 1_735_603_200_000), "2024-12-31 366");
    }

    #[test]
    fn what_is_no_header_value_is_none() {
        let format = Format { parts: vec![FormatPart::Text(b"a\nb".to_vec()), FormatPart::RouteName] };
        let facts = Facts {
            request: None,
            response: None,
            version: Version::HTTP_11,
            endpoint: None,
            cluster: "",
            route: "",
            start: SystemTime::UNIX_EPOCH,
        };
        assert_eq!(Text::compile(&format).value(&facts), None);
    }
}
