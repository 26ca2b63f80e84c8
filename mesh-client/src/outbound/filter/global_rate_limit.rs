//! Global rate limit: a service is asked about each request that has descriptors (Envoy's `ratelimit` filter).

use super::{
    Filter, FilterRequest, FilterResponse, Reply, Step, Verdict, Watch,
    descriptor::Descriptors,
    draw,
    local_rate_limit::{LIMIT, LIMITED, REMAINING, RESET},
    plain_facts,
    service::Service,
};
use crate::{
    outbound::route::{Facts, Ops, RequestHead},
    telemetry::access_log::ResponseFlags as Flag,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use mesh_xds::{
    resource::GlobalRateLimitConfig,
    rls::{Answer, Limit, Question, ask},
};
use std::{borrow::Cow, fmt::Write as _, sync::Arc};

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct GlobalRateLimit {
    config: Arc<GlobalRateLimitConfig>,
    domain: String,
    service: Arc<Service>,
    descriptors: Descriptors,
    response_edits: Ops,
}

/// Headers for the response of a request that went on.
struct Added(Vec<(HeaderName, HeaderValue)>);

impl GlobalRateLimit {
    pub(super) fn new(
        config: Arc<GlobalRateLimitConfig>,
        domain: String,
        service: Arc<Service>,
        descriptors: Descriptors,
    ) -> Self {
        let response_edits = Ops::compile(&config.response_edits);
        Self { config, domain, service, descriptors, response_edits }
    }

    async fn ask(&self, question: Question) -> Result<Answer, String> {
        let asked = ask(self.service.channel.clone(), question, self.config.timeout);
        let answer = match self.config.timeout {
            None => asked.await,
            Some(timeout) => {
                tokio::time::timeout(timeout, asked).await.map_err(|_| format!("no answer within {timeout:?}"))?
            }
        };
        answer.map_err(|status| format!("{:?}: {}", status.code(), status.message()))
    }

    /// Headers for the caller: of the service, and the state of the limits.
    fn headers(&self, answer: &Answer) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers = answer.response_headers.clone();
        let least = answer.limits.iter().min_by_key(|limit| limit.remaining);
        if let Some(least) = least.filter(|_| self.config.x_headers) {
            headers.extend(HeaderValue::try_from(policy(least, &answer.limits)).map(|policy| (LIMIT, policy)));
            headers.push((REMAINING, HeaderValue::from(least.remaining)));
            headers.push((RESET, HeaderValue::from(least.reset.as_secs())));
        }
        headers
    }

    fn decide(&self, answer: Result<Answer, String>, request: &mut FilterRequest<'_>) -> Verdict {
        let answer = match answer {
            Ok(answer) => answer,
            Err(reason) => {
                let deny = draw(self.config.deny_on_error);
                request.explain("rate limit", || {
                    let then = if deny { "refused" } else { "goes on" };
                    format!("cluster `{}` did not say, {then}: {reason}", self.config.cluster)
                });
                if !deny {
                    return Verdict::Pass;
                }
                let status = StatusCode::from_u16(self.config.status_on_error);
                let reply = Reply::new(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), "rate_limiter_error");
                return Verdict::Answer(reply.flag(Flag::RATE_LIMIT_SERVICE_ERROR));
            }
        };
        let headers = self.headers(&answer);
        if answer.over_limit && draw(self.config.enforced) {
            return Verdict::Answer(self.refuse(answer, headers, request));
        }
        request.explain("rate limit", || {
            let over = if answer.over_limit { "over the limit, not enforced" } else { "within the limit" };
            format!("{over}, says cluster `{}`", self.config.cluster)
        });
        for (name, value) in answer.request_headers {
            request.head_mut().headers.append(name, value);
        }
        if headers.is_empty() { Verdict::Pass } else { Verdict::Watch(Box::new(Added(headers))) }
    }

    fn refuse(&self, answer: Answer, added: Vec<(HeaderName, HeaderValue)>, request: &FilterRequest<'_>) -> Reply {
        let config = &self.config;
        let status = StatusCode::from_u16(config.status).unwrap_or(StatusCode::TOO_MANY_REQUESTS);
        let wait = answer.limits.iter().filter(|limit| limit.over).map(|limit| limit.reset.as_secs()).max();
        let mut reply = Reply::new(status, answer.body).flag(Flag::RATE_LIMITED);
        reply = reply.grpc_status(if config.resource_exhausted { 8 } else { 14 });
        let headers = reply.headers_mut();
        append(headers, added);
        if config.ratelimited_header {
            headers.insert(LIMITED, HeaderValue::from_static("true"));
        }
        if config.retry_after && config.status == 429 {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.unwrap_or(1).max(1)));
        }
        let Parts { method, uri, headers: asked, .. } = request.head();
        let facts = Facts { request: Some(RequestHead::new(method, uri, asked)), ..plain_facts(request) };
        self.response_edits
            .apply(headers, |headers, text| text.value(&Facts { response: Some((status, headers)), ..facts }));
        reply
    }
}

fn append(headers: &mut HeaderMap, added: Vec<(HeaderName, HeaderValue)>) {
    for (name, value) in added {
        headers.append(name, value);
    }
}

/// The limit that is nearest, and all with their windows (draft-polli-ratelimit-headers-03).
fn policy(least: &Limit, all: &[Limit]) -> String {
    let mut text = least.requests_per_unit.to_string();
    for limit in all {
        // Writing to a String cannot fail.
        let _ = write!(text, ", {};w={}", limit.requests_per_unit, limit.window.as_secs());
    }
    text
}

impl Filter for GlobalRateLimit {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        if !draw(self.config.enabled) {
            return Step::Now(Verdict::Pass);
        }
        let descriptors = self.descriptors.of(request);
        if descriptors.is_empty() {
            return Step::Now(Verdict::Pass);
        }
        request.waits_for(format!("a question to the rate limit service `{}`", self.config.cluster));
        Step::Later(Box::pin(async move {
            let answer = self.ask(Question { domain: self.domain.clone(), descriptors }).await;
            self.decide(answer, request)
        }))
    }

    fn describe(&self) -> Cow<'_, str> {
        format!("global rate limit of domain `{}`, asked of cluster `{}`", self.domain, self.config.cluster).into()
    }
}

impl Watch for Added {
    fn response(&mut self, response: &mut FilterResponse<'_>) {
        append(&mut response.head_mut().headers, std::mem::take(&mut self.0));
    }
}
