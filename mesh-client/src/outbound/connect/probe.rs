//! One active health check: over HTTP, gRPC or plain TCP, on a connection of its own.

use super::{ConnectError, Connector, Security};
use crate::{
    error::chain,
    outbound::cluster::{CheckTarget, Failed},
    transport::{Connection, Events, Protocol, RecvBody, Stream},
};
use bytes::{BufMut, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_TYPE, HOST, TE, USER_AGENT},
    uri::Authority,
};
use http_body_util::{BodyExt, Full};
use mesh_xds::resource::{GrpcHealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck};
use std::{error::Error, sync::Arc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The connection of an endpoint's checks, between two of them. Closed when dropped.
#[derive(Default)]
pub(crate) struct Kept(Option<Open>);

enum Open {
    Http(Connection),
    Tcp(Box<dyn Stream>),
}

/// Nobody waits for a stream of it.
struct Unheard;

/// Bytes of a response that are read so that its connection can be used again.
const DISCARDED: usize = 64 << 10;
/// Bytes of an answer over TCP.
const MAX_ANSWER: usize = 64 << 10;
const AGENT: HeaderValue = HeaderValue::from_static("mesh-client health check");
/// An endpoint that answers a check with it is to be left out at once (Envoy).
const FAIL_NOW: HeaderName = HeaderName::from_static("x-envoy-immediate-health-check-fail");
/// The service that an endpoint says it is (Envoy's `service_name_matcher`).
const CHECKED_CLUSTER: HeaderName = HeaderName::from_static("x-envoy-upstream-healthchecked-cluster");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// `grpc.health.v1.HealthCheckResponse.SERVING`
const SERVING: u64 = 1;

impl Connector {
    /// Asks an endpoint how it is.
    ///
    /// # Errors
    /// It is not well, or gave no answer.
    ///
    /// # Cancel safety
    /// A check that is given up leaves nothing behind but what is `kept`, which is then to be dropped.
    pub(crate) async fn check(&self, target: &CheckTarget, kept: &mut Kept) -> Result<(), Failed> {
        let result = match &target.check.checker {
            HealthChecker::Http(http) => self.http_check(target, http, kept).await,
            HealthChecker::Grpc(grpc) => self.grpc_check(target, grpc, kept).await,
            HealthChecker::Tcp(tcp) => self.tcp_check(target, tcp, kept).await,
        };
        if !target.check.reuse_connection {
            *kept = Kept::default();
        }
        result
    }

    async fn http_check(&self, target: &CheckTarget, http: &HttpHealthCheck, kept: &mut Kept) -> Result<(), Failed> {
        let protocol = if http.http2 { Protocol::Http2 } else { Protocol::Http1 };
        let mut request = Request::new(Full::<Bytes>::default());
        *request.method_mut() = http.method.clone();
        *request.uri_mut() = http.path.parse().map_err(|_| certain("the path of the check cannot be sent"))?;
        name(request.headers_mut(), target);
        for (name, value) in &http.headers {
            request.headers_mut().append(name, value.clone());
        }
        let response = self.ask(target, protocol, request, kept).await?;
        let (head, mut body) = response.into_parts();
        let limit = match http.response_buffer_size {
            _ if http.receive.is_empty() => DISCARDED,
            0 => usize::MAX,
            size => usize::try_from(size).unwrap_or(usize::MAX),
        };
        let (text, _) = read(&mut body, limit).await?;
        let status = head.status.as_u16();
        let expected = match &*http.expected_statuses {
            [] => head.status == StatusCode::OK,
            ranges => ranges.iter().any(|range| range.contains(&status)),
        };
        if !expected {
            let retriable = http.retriable_statuses.iter().any(|range| range.contains(&status));
            return Err(Failed { certain: !retriable, reason: format!("HTTP {status}") });
        }
        if head.headers.contains_key(FAIL_NOW) {
            return Err(certain("it asks to be left out at once"));
        }
        if let Some(matcher) = &http.service_name {
            let said = head.headers.get(CHECKED_CLUSTER).map_or(&b""[..], HeaderValue::as_bytes);
            let service = said.split(|byte| *byte == b'-').next().unwrap_or_default();
            if !matcher.matches_bytes(service) {
                let reason = format!("it is the service `{}`", String::from_utf8_lossy(service));
                return Err(Failed { certain: true, reason });
            }
        }
        if !contains_in_order(&text, &http.receive) {
            return Err(certain("its response is not the one that is expected"));
        }
        Ok(())
    }

    async fn grpc_check(&self, target: &CheckTarget, grpc: &GrpcHealthCheck, kept: &mut Kept) -> Result<(), Failed> {
        let mut request = Request::new(Full::new(health_request(&grpc.service)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = "/grpc.health.v1.Health/Check".parse().expect("a legal path");
        name(request.headers_mut(), target);
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        for (name, value) in &grpc.metadata {
            request.headers_mut().append(name, value.clone());
        }
        let response = self.ask(target, Protocol::Http2, request, kept).await?;
        let (head, mut body) = response.into_parts();
        if head.status != StatusCode::OK {
            return Err(Failed { certain: true, reason: format!("HTTP {}", head.status.as_u16()) });
        }
        let (message, trailers) = read(&mut body, DISCARDED).await?;
        let code = trailers.get(GRPC_STATUS).or_else(|| head.headers.get(GRPC_STATUS));
        match code.map(HeaderValue::as_bytes) {
            Some(b"0") => {}
            Some(code) => {
                let reason = format!("grpc-status {}", String::from_utf8_lossy(code));
                return Err(Failed { certain: true, reason });
            }
            None => return Err(certain("its answer has no grpc-status")),
        }
        match health_status(&message) {
            Some(SERVING) => Ok(()),
            Some(status) => Err(Failed { certain: true, reason: format!("it is not SERVING: status {status}") }),
            None => Err(certain("its answer is no HealthCheckResponse")),
        }
    }

    async fn tcp_check(&self, target: &CheckTarget, tcp: &TcpHealthCheck, kept: &mut Kept) -> Result<(), Failed> {
        let mut io = match kept.0.take() {
            Some(Open::Tcp(io)) => io,
            _ => self.open_raw(target).await.map_err(|error| network(&error))?,
        };
        if tcp.receive.is_empty() && tcp.send.is_empty() {
            return Ok(());
        }
        io.write_all(&tcp.send).await.map_err(|error| network(&error))?;
        let mut answer = BytesMut::new();
        while !contains_in_order(&answer, &tcp.receive) {
            if answer.len() > MAX_ANSWER {
                return Err(certain("its answer is not the one that is expected"));
            }
            if io.read_buf(&mut answer).await.map_err(|error| network(&error))? == 0 {
                return Err(Failed { certain: false, reason: "it closed the connection".into() });
            }
        }
        kept.0 = Some(Open::Tcp(io));
        Ok(())
    }

    /// Sends a request on the connection that is kept, or on a new one.
    async fn ask(
        &self,
        target: &CheckTarget,
        protocol: Protocol,
        request: Request<Full<Bytes>>,
        kept: &mut Kept,
    ) -> Result<Response<RecvBody>, Failed> {
        let usable = |open: &Open| matches!(open, Open::Http(connection) if connection.has_capacity());
        if !kept.0.as_ref().is_some_and(usable) {
            *kept = Kept::default();
            let opened = self.open_as(target.address, protocol, Arc::new(Unheard)).await;
            kept.0 = Some(Open::Http(opened.map_err(|error| network(&error))?.connection));
        }
        let lease = match &kept.0 {
            Some(Open::Http(connection)) => connection.lease(),
            _ => None,
        };
        let lease = lease.ok_or_else(|| Failed { certain: false, reason: "its connection takes no request".into() })?;
        lease.send(request).await.map_err(|error| {
            *kept = Kept::default();
            network(&error)
        })
    }

    /// TCP, and TLS where the cluster has it.
    async fn open_raw(&self, target: &CheckTarget) -> Result<Box<dyn Stream>, ConnectError> {
        let tcp = self.tcp(target.address).await?;
        let Security::Tls(tls) = &self.settings.security else { return Ok(Box::new(tcp)) };
        tls.ready().await;
        let session = tls.connect(tcp, self.settings.server_name.as_deref()).await;
        let (stream, _) = session.map_err(|source| ConnectError::Tls { address: target.address, source })?;
        Ok(Box::new(stream))
    }
}

/// Says who asks, and whom, if that can be said over HTTP.
fn name(headers: &mut HeaderMap, target: &CheckTarget) {
    headers.insert(USER_AGENT, AGENT);
    if target.authority.parse::<Authority>().is_ok()
        && let Ok(host) = HeaderValue::from_str(&target.authority)
    {
        headers.insert(HOST, host);
    }
}

/// Up to `limit` bytes of a body, and its trailers. What is longer is not read to its end.
async fn read(body: &mut RecvBody, limit: usize) -> Result<(BytesMut, HeaderMap), Failed> {
    let (mut text, mut trailers) = (BytesMut::new(), HeaderMap::new());
    while let Some(frame) = body.frame().await {
        match frame.map_err(|error| network(&error))?.into_data() {
            Ok(data) => {
                text.extend_from_slice(&data[..data.len().min(limit - text.len())]);
                if text.len() == limit {
                    break;
                }
            }
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Ok((text, trailers))
}

/// All parts are in the text, one after the other.
fn contains_in_order(mut text: &[u8], parts: &[Vec<u8>]) -> bool {
    parts.iter().all(|part| match text.windows(part.len().max(1)).position(|window| window == part) {
        Some(at) => {
            text = &text[at + part.len()..];
            true
        }
        None => part.is_empty(),
    })
}

/// `grpc.health.v1.HealthCheckRequest`, framed.
fn health_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(u8::try_from(length & 0x7f).expect("seven bits") | 0x80);
            length >>= 7;
        }
        message.put_u8(u8::try_from(length).expect("seven bits"));
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.extend_from_slice(&message);
    framed.freeze()
}

/// The status in a framed `grpc.health.v1.HealthCheckResponse`; 0 is `UNKNOWN`, which is not written.
fn health_status(framed: &[u8]) -> Option<u64> {
    let (prefix, message) = framed.split_at_checked(5)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?);
    if prefix[0] != 0 || message.len() != length as usize {
        return None;
    }
    match message {
        [] => Some(0),
        // Field 1, a varint of one byte: there are four statuses.
        [0x08, status] if *status < 0x80 => Some(u64::from(*status)),
        _ => None,
    }
}

fn network(error: &(dyn Error + 'static)) -> Failed {
    Failed { certain: false, reason: chain(error) }
}

fn certain(reason: &str) -> Failed {
    Failed { certain: true, reason: reason.to_owned() }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(Open::Http(connection)) = &self.0 {
            connection.drain();
        }
    }
}

impl Events for Unheard {
    fn capacity(&self) {}

    fn raised(&self) {}

    fn unusable(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_in_their_order() {
        let parts = |parts: &[&str]| parts.iter().map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>();
        assert!(contains_in_order(b"+PONG ok\r\n", &parts(&["PONG", "ok"])));
        assert!(!contains_in_order(b"+PONG ok\r\n", &parts(&["ok", "PONG"])));
        assert!(!contains_in_order(b"aa", &parts(&["a", "a", "a"])) && contains_in_order(b"", &[]));
    }

    #[test]
    fn health_messages_are_written_and_read() {
        assert_eq!(&*health_request(""), [0, 0, 0, 0, 0]);
        assert_eq!(&*health_request("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = health_request(&"x".repeat(300));
        assert_eq!((&long[..8], long.len()), (&[0, 0, 0, 1, 47, 0x0a, 0xac, 2][..], 308));
        assert_eq!(health_status(&[0, 0, 0, 0, 2, 8, 1]), Some(SERVING));
        assert_eq!(health_status(&[0, 0, 0, 0, 0]), Some(0));
        assert_eq!((health_status(&[0, 0, 0, 0, 2, 8]), health_status(b"")), (None, None));
    }
}
