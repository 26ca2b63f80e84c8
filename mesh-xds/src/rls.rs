//! The rate limit service (`envoy.service.ratelimit.v3`), as a client asks it.

use bytes::Bytes;
use envoy_types::pb::envoy::{
    config::core::v3::HeaderValue as ProtoHeader,
    extensions::common::ratelimit::v3::{RateLimitDescriptor, rate_limit_descriptor::Entry},
    service::ratelimit::v3::{
        RateLimitRequest,
        rate_limit_response::{Code, DescriptorStatus, rate_limit::Unit},
        rate_limit_service_client::RateLimitServiceClient,
    },
};
use http::{HeaderName, HeaderValue};
use std::{sync::Arc, time::Duration};
use tonic::{Status, body::Body, client::GrpcService, codegen};

/// A question: may a request with these descriptors go on?
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// `domain`
    pub domain: String,
    /// One for each limit that the request is under.
    pub descriptors: Vec<Descriptor>,
}

/// What a limit is looked up by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Key and value, in order.
    pub entries: Vec<(Arc<str>, Arc<str>)>,
    /// How many hits the request counts as, where the limit says so.
    pub hits: Option<u64>,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The request is over a limit.
    pub over_limit: bool,
    /// Of the descriptors that have a limit, in order.
    pub limits: Vec<Limit>,
    /// For the response to the caller.
    pub response_headers: Vec<(HeaderName, HeaderValue)>,
    /// For the request, if it goes on.
    pub request_headers: Vec<(HeaderName, HeaderValue)>,
    /// The body of the refusal; empty is none.
    pub body: Bytes,
}

/// The limit of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// This one is exceeded.
    pub over: bool,
    /// In each window.
    pub requests_per_unit: u32,
    /// The window.
    pub window: Duration,
    /// Requests left in this window.
    pub remaining: u32,
    /// Until the next window.
    pub reset: Duration,
}

/// Asks the rate limit service behind `service`.
///
/// # Errors
/// The service's, or the connection's.
///
/// # Cancel safety
/// Dropping the future gives up the question; the service may have counted the request.
pub async fn ask<S>(service: S, question: Question, timeout: Option<Duration>) -> Result<Answer, Status>
where
    S: GrpcService<Body>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::ResponseBody: codegen::Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as codegen::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let descriptors = question.descriptors.into_iter().map(|Descriptor { entries, hits }| RateLimitDescriptor {
        entries: entries.into_iter().map(|(key, value)| Entry { key: (*key).into(), value: (*value).into() }).collect(),
        hits_addend: hits.map(|value| envoy_types::pb::google::protobuf::UInt64Value { value }),
        ..RateLimitDescriptor::default()
    });
    let mut request = tonic::Request::new(RateLimitRequest {
        domain: question.domain,
        descriptors: descriptors.collect(),
        hits_addend: 0,
    });
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    let response = RateLimitServiceClient::new(service).should_rate_limit(request).await?.into_inner();
    Ok(Answer {
        over_limit: response.overall_code == i32::from(Code::OverLimit),
        limits: response.statuses.iter().filter_map(limit).collect(),
        response_headers: response.response_headers_to_add.into_iter().filter_map(header).collect(),
        request_headers: response.request_headers_to_add.into_iter().filter_map(header).collect(),
        body: response.raw_body.into(),
    })
}

fn limit(status: &DescriptorStatus) -> Option<Limit> {
    let limit = status.current_limit.as_ref()?;
    let seconds = match Unit::try_from(limit.unit).ok()? {
        Unit::Unknown => return None,
        Unit::Second => 1,
        Unit::Minute => 60,
        Unit::Hour => 3600,
        Unit::Day => 86_400,
        Unit::Week => 7 * 86_400,
        Unit::Month => 30 * 86_400,
        Unit::Year => 365 * 86_400,
    };
    let reset = status.duration_until_reset.unwrap_or_default();
    Some(Limit {
        over: status.code == i32::from(Code::OverLimit),
        requests_per_unit: limit.requests_per_unit,
        window: Duration::from_secs(seconds),
        remaining: status.limit_remaining,
        reset: Duration::from_secs(u64::try_from(reset.seconds).unwrap_or(0)),
    })
}

/// `None`: not a header; it is left out.
fn header(proto: ProtoHeader) -> Option<(HeaderName, HeaderValue)> {
    let value = if proto.raw_value.is_empty() { proto.value.into_bytes() } else { proto.raw_value };
    Some((HeaderName::from_bytes(proto.key.as_bytes()).ok()?, HeaderValue::from_bytes(&value).ok()?))
}
