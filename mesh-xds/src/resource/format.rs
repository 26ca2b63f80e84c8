//! Texts with `%COMMAND%` operators: the values of header edits and of some rewrites (Envoy's substitution format).

use http::HeaderName;
use std::fmt;

/// A text with operators, parsed. What cannot be known comes out empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Format {
    /// In order.
    pub parts: Vec<FormatPart>,
}

/// A part of a [`Format`].
#[derive(Clone, Debug, PartialEq)]
pub enum FormatPart {
    /// Bytes that stand for themselves.
    Text(Vec<u8>),
    /// `%REQ(X?Y):N%`
    Request(Field),
    /// `%RESP(X?Y):N%`
    Response(Field),
    /// `%UPSTREAM_REMOTE_ADDRESS%`, `%UPSTREAM_HOST%`
    UpstreamAddress,
    /// `%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%`
    UpstreamIp,
    /// `%UPSTREAM_REMOTE_PORT%`
    UpstreamPort,
    /// `%UPSTREAM_CLUSTER%`, `%UPSTREAM_CLUSTER_RAW%`
    UpstreamCluster,
    /// `%ROUTE_NAME%`
    RouteName,
    /// `%PROTOCOL%`
    Protocol,
    /// `%RESPONSE_CODE%`
    ResponseCode,
    /// `%START_TIME(FORMAT)%`, in UTC.
    StartTime(Vec<TimePart>),
    /// `%HOSTNAME%`
    Hostname,
    /// `%ENVIRONMENT(X):N%`
    Environment {
        /// The variable.
        name: String,
        /// At most this many bytes of it.
        limit: Option<usize>,
    },
    /// An operator of Envoy that means nothing in a client.
    Unknowable,
}

/// A header, another one that stands in for it, and how much of it is used.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// The first choice.
    pub name: FieldName,
    /// Used when the first is absent.
    pub alternative: Option<FieldName>,
    /// At most this many bytes.
    pub limit: Option<usize>,
}

/// A header or pseudo-header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldName {
    /// `:method`
    Method,
    /// `:path`, with the query.
    Path,
    /// `:authority`, `host`
    Authority,
    /// `:scheme`
    Scheme,
    /// `:status`
    Status,
    /// Any other.
    Header(HeaderName),
}

/// A part of a time format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimePart {
    /// Stands for itself.
    Text(String),
    /// `%Y`, `%m`, `%d`, `%H`, `%M`, `%S`, `%y`, `%j`
    Number(char),
    /// `%s`: seconds since 1970.
    Epoch,
    /// `%1f` to `%9f`, `%f` (9): so many digits of the fraction of the second.
    Fraction(u8),
}

/// Operators that Envoy knows, and that mean nothing where there is no downstream connection, no filter state and no access log.
const UNKNOWABLE: &[&str] = &[
    "DOWNSTREAM_",
    "UPSTREAM_",
    "REQUEST_",
    "RESPONSE_",
    "CONNECTION_",
    "DYNAMIC_METADATA",
    "CLUSTER_METADATA",
    "FILTER_STATE",
    "PER_REQUEST_STATE",
    "METADATA",
    "TRAILER",
    "BYTES_",
    "DURATION",
    "ROUNDTRIP_DURATION",
    "COMMON_DURATION",
    "EMIT_TIME",
    "GRPC_STATUS",
    "VIRTUAL_CLUSTER_NAME",
    "STREAM_ID",
    "TRACE_ID",
    "UNIQUE_ID",
    "LOCAL_REPLY_BODY",
    "FILTER_CHAIN_NAME",
    "ACCESS_LOG_TYPE",
    "REQUESTED_SERVER_NAME",
    "TLS_JA3_FINGERPRINT",
    "TLS_JA4_FINGERPRINT",
    "HISTOGRAM_",
    "CEL",
    "QUERY_PARAM",
    "PATH",
];

impl Format {
    /// Parses `source`; `%%` is a percent sign.
    ///
    /// # Errors
    /// An operator is unknown or written wrong; the text says which and why.
    pub fn parse(source: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = source;
        while let Some((before, after)) = rest.split_once('%') {
            text.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                text.push('%');
                rest = after;
                continue;
            }
            let (part, after) = operator(after).map_err(|reason| format!("\"{source}\": {reason}"))?;
            if !text.is_empty() {
                parts.push(FormatPart::Text(std::mem::take(&mut text).into_bytes()));
            }
            parts.push(part);
            rest = after;
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(FormatPart::Text(text.into_bytes()));
        }
        Ok(Self { parts })
    }

    /// Stands for itself.
    pub fn literal(value: impl Into<Vec<u8>>) -> Self {
        let value = value.into();
        Self { parts: if value.is_empty() { Vec::new() } else { vec![FormatPart::Text(value)] } }
    }

    /// Whether an operator is in it that a client can never fill in.
    pub fn has_unknowable(&self) -> bool {
        self.parts.contains(&FormatPart::Unknowable)
    }

    /// Whether a header of the request is in it.
    pub fn reads_request(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, FormatPart::Request(_)))
    }
}

/// One operator, after its percent sign, and what follows it.
fn operator(text: &str) -> Result<(FormatPart, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
    let (name, mut rest) = text.split_at(end);
    let mut argument = None;
    if let Some(after) = rest.strip_prefix('(') {
        let (inner, after) = after.split_once(')').ok_or_else(|| format!("%{name}( has no )"))?;
        argument = Some(inner);
        rest = after;
    }
    let mut limit = None;
    if let Some(after) = rest.strip_prefix(':') {
        let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let digits = &after[..end];
        limit = Some(digits.parse().map_err(|_| format!("%{name}%: \"{digits}\" is not a length"))?);
        rest = &after[end..];
    }
    let rest = match rest.strip_prefix('%') {
        Some(rest) if !name.is_empty() => rest,
        _ => return Err("a % begins no operator: use %% for a percent sign".to_owned()),
    };
    let required = || argument.filter(|a| !a.is_empty()).ok_or_else(|| format!("%{name}% needs an argument in ()"));
    let part = match name {
        "REQ" => FormatPart::Request(field(required()?, limit)?),
        "RESP" => FormatPart::Response(field(required()?, limit)?),
        "ENVIRONMENT" => FormatPart::Environment { name: required()?.to_owned(), limit },
        "START_TIME" => FormatPart::StartTime(time(argument.unwrap_or("%Y-%m-%dT%H:%M:%E3SZ"))?),
        "UPSTREAM_REMOTE_ADDRESS" | "UPSTREAM_HOST" => FormatPart::UpstreamAddress,
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => FormatPart::UpstreamIp,
        "UPSTREAM_REMOTE_PORT" => FormatPart::UpstreamPort,
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => FormatPart::UpstreamCluster,
        "ROUTE_NAME" => FormatPart::RouteName,
        "PROTOCOL" => FormatPart::Protocol,
        "RESPONSE_CODE" => FormatPart::ResponseCode,
        "HOSTNAME" => FormatPart::Hostname,
        other if UNKNOWABLE.iter().any(|known| *known == other || known.ends_with('_') && other.starts_with(known)) => {
            FormatPart::Unknowable
        }
        other => return Err(format!("unknown operator %{other}%")),
    };
    Ok((part, rest))
}

fn field(argument: &str, limit: Option<usize>) -> Result<Field, String> {
    let (name, alternative) = match argument.split_once('?') {
        Some((name, other)) => (name, Some(other)),
        None => (argument, None),
    };
    Ok(Field { name: field_name(name)?, alternative: alternative.map(field_name).transpose()?, limit })
}

fn field_name(name: &str) -> Result<FieldName, String> {
    Ok(match name.to_ascii_lowercase().as_str() {
        ":method" => FieldName::Method,
        ":path" => FieldName::Path,
        ":authority" | "host" => FieldName::Authority,
        ":scheme" => FieldName::Scheme,
        ":status" => FieldName::Status,
        lower => FieldName::Header(
            HeaderName::from_bytes(lower.as_bytes()).map_err(|_| format!("\"{name}\" is not a header name"))?,
        ),
    })
}

/// A strftime format, as far as it makes sense in UTC.
fn time(format: &str) -> Result<Vec<TimePart>, String> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut rest = format.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let unknown = |c: char| format!("%START_TIME%: unknown specifier %{c}");
        let specifier = rest.next().ok_or("%START_TIME%: a lone % at the end")?;
        let expanded: Vec<TimePart> = match specifier {
            '%' => {
                text.push('%');
                continue;
            }
            'Y' | 'm' | 'd' | 'H' | 'M' | 'S' | 'y' | 'j' => vec![TimePart::Number(specifier)],
            's' => vec![TimePart::Epoch],
            'f' => vec![TimePart::Fraction(9)],
            '1'..='9' if rest.next_if_eq(&'f').is_some() => {
                vec![TimePart::Fraction(u8::try_from(specifier.to_digit(10).unwrap_or(9)).unwrap_or(9))]
            }
            // %E3S: seconds with a fraction.
            'E' => {
                let digits = rest.next().and_then(|c| c.to_digit(10)).filter(|d| *d > 0).ok_or_else(|| unknown('E'))?;
                rest.next_if_eq(&'S').ok_or_else(|| unknown('E'))?;
                let digits = u8::try_from(digits).unwrap_or(9);
                vec![TimePart::Number('S'), TimePart::Text(".".to_owned()), TimePart::Fraction(digits)]
            }
            'F' => time("%Y-%m-%d")?,
            'T' => time("%H:%M:%S")?,
            'z' => vec![TimePart::Text("+0000".to_owned())],
            'Z' => vec![TimePart::Text("UTC".to_owned())],
            other => return Err(unknown(other)),
        };
        if !text.is_empty() {
            parts.push(TimePart::Text(std::mem::take(&mut text)));
        }
        parts.extend(expanded);
    }
    if !text.is_empty() {
        parts.push(TimePart::Text(text));
    }
    Ok(parts)
}

impl fmt::Display for FieldName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Method => ":method",
            Self::Path => ":path",
            Self::Authority => ":authority",
            Self::Scheme => ":scheme",
            Self::Status => ":status",
            Self::Header(name) => name.as_str(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_and_text_are_told_apart() {
        let header = |name: &'static str| FieldName::Header(HeaderName::from_static(name));
        let format = Format::parse("a%REQ(X-A?:authority):5%%%b%ROUTE_NAME%").unwrap();
        let field = Field { name: header("x-a"), alternative: Some(FieldName::Authority), limit: Some(5) };
        assert_eq!(
            format.parts,
            [
                FormatPart::Text(b"a".to_vec()),
                FormatPart::Request(field),
                FormatPart::Text(b"%b".to_vec()),
                FormatPart::RouteName
            ]
        );
        assert!(format.reads_request() && !format.has_unknowable());
        assert_eq!(Format::parse("").unwrap(), Format::default());
        assert!(Format::parse("%DOWNSTREAM_REMOTE_ADDRESS%").unwrap().has_unknowable());
        assert_eq!(Format::parse("100%%").unwrap(), Format::literal("100%"));
    }

    #[test]
    fn times_are_read_as_strftime_does() {
        let number = TimePart::Number;
        let text = |text: &str| TimePart::Text(text.to_owned());
        let Ok(Format { parts }) = Format::parse("%START_TIME(%F %E3S%z)%") else { panic!("refused") };
        let expected = [
            number('Y'),
            text("-"),
            number('m'),
            text("-"),
            number('d'),
            text(" "),
            number('S'),
            text("."),
            TimePart::Fraction(3),
            text("+0000"),
        ];
        assert_eq!(parts, [FormatPart::StartTime(expected.to_vec())]);
    }

    #[test]
    fn what_is_unknown_is_refused() {
        for (source, reason) in [
            ("50%", "use %% for a percent sign"),
            ("%NOPE%", "unknown operator %NOPE%"),
            ("%REQ%", "needs an argument"),
            ("%REQ(a", "has no )"),
            ("%REQ(a b)%", "not a header name"),
            ("%REQ(a):x%", "not a length"),
            ("%START_TIME(%Q)%", "unknown specifier %Q"),
            ("%req(a)%", "begins no operator"),
        ] {
            let error = Format::parse(source).expect_err(source);
            assert!(error.contains(reason), "{source}: {error}");
        }
    }
}
