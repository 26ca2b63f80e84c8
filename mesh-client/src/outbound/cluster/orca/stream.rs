//! Reports out of band (gRFC A51): `OpenRcaService.StreamCoreMetrics`, over the connection that requests use.

use super::Report;
use crate::{outbound::connect::Subchannel, transport::RecvBody};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, header};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use std::{net::SocketAddr, time::Duration};

/// Why a stream of reports ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// There is no connection.
    NotConnected,
    /// The endpoint does not have the service: it is not asked again.
    NotServed,
    /// Anything else: it may be asked again.
    Broken,
}

/// `xds.service.orca.v3.OrcaLoadReportRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct ReportRequest {
    #[prost(message, optional, tag = "1")]
    report_interval: Option<Interval>,
}

/// `google.protobuf.Duration`.
#[derive(Clone, PartialEq, prost::Message)]
struct Interval {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

const METHOD: &str = "xds.service.orca.v3.OpenRcaService/StreamCoreMetrics";
/// No report is longer.
const MAX_MESSAGE: usize = 64 << 10;
const PREFIX: usize = 5;
const UNIMPLEMENTED: &[u8] = b"12";

/// Gives each report to `take` until the stream ends. Makes no connection.
pub(crate) async fn follow(link: &Subchannel, address: SocketAddr, period: Duration, take: impl Fn(&Report)) -> Ended {
    let Some(lease) = link.ready() else { return Ended::NotConnected };
    let Ok(mut request) = Request::post(format!("http://{address}/{METHOD}")).body(Full::new(message(period))) else {
        return Ended::NotServed;
    };
    request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    let Ok(response) = lease.send(request).await else { return Ended::Broken };
    if response.status() != http::StatusCode::OK || is_unimplemented(response.headers()) {
        return Ended::NotServed;
    }
    let mut body: RecvBody = response.into_body();
    let mut received = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => received.extend_from_slice(&data),
            Ok(Err(frame)) if frame.trailers_ref().is_some_and(is_unimplemented) => return Ended::NotServed,
            _ => return Ended::Broken,
        }
        while let Some(report) = next(&mut received) {
            match report {
                Some(report) => take(&report),
                None => return Ended::Broken,
            }
        }
    }
    Ended::Broken
}

fn message(period: Duration) -> Bytes {
    let seconds = i64::try_from(period.as_secs()).unwrap_or(i64::MAX);
    let nanos = i32::try_from(period.subsec_nanos()).unwrap_or_default();
    let request = ReportRequest { report_interval: Some(Interval { seconds, nanos }) }.encode_to_vec();
    let mut bytes = BytesMut::with_capacity(PREFIX + request.len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(request.len()).unwrap_or_default());
    bytes.extend_from_slice(&request);
    bytes.freeze()
}

/// `None`: no whole message is there. `Some(None)`: it cannot be read, or is compressed.
fn next(received: &mut BytesMut) -> Option<Option<Report>> {
    let mut prefix = received.get(..PREFIX)?;
    let (compressed, length) = (prefix.get_u8() != 0, prefix.get_u32() as usize);
    if compressed || length > MAX_MESSAGE {
        return Some(None);
    }
    received.get(..PREFIX + length)?;
    received.advance(PREFIX);
    Some(Report::decode(received.split_to(length)).ok())
}

fn is_unimplemented(headers: &HeaderMap) -> bool {
    headers.get("grpc-status").is_some_and(|status| status.as_bytes() == UNIMPLEMENTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let report = Report { cpu_utilization: 0.5, ..Report::default() }.encode_to_vec();
        let mut framed = vec![0, 0, 0, 0, u8::try_from(report.len()).unwrap()];
        framed.extend(&report);
        let mut received = BytesMut::new();
        for byte in &framed[..framed.len() - 1] {
            received.put_u8(*byte);
            assert_eq!(next(&mut received), None);
        }
        received.put_u8(framed[framed.len() - 1]);
        received.extend_from_slice(&framed);
        for _ in 0..2 {
            assert!(next(&mut received).unwrap().is_some_and(|report| report.cpu_utilization > 0.4));
        }
        assert_eq!(next(&mut received), None);
        for bad in [[1, 0, 0, 0, 0], [0, 255, 0, 0, 0]] {
            assert_eq!(next(&mut BytesMut::from(&bad[..])), Some(None), "compressed, or too long");
        }
    }

    #[test]
    fn the_request_names_the_period() {
        let bytes = message(Duration::from_millis(1500));
        let request = ReportRequest::decode(&bytes[PREFIX..]).unwrap();
        assert_eq!(request.report_interval, Some(Interval { seconds: 1, nanos: 500_000_000 }));
        assert_eq!(bytes[..PREFIX], [0, 0, 0, 0, u8::try_from(bytes.len() - PREFIX).unwrap()]);
    }
}
