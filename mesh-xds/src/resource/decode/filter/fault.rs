//! Fault injection (gRFC A33).

use crate::resource::{
    Denominator, FaultAbort, FaultConfig, FaultDelay, FaultRateLimit, FractionalPercent,
    decode::{Decoder, Valid},
};
use envoy_types::pb::envoy::{
    extensions::filters::{
        common::fault::v3::{fault_delay::FaultDelaySecifier, fault_rate_limit::LimitType},
        http::fault::v3::{HttpFault, fault_abort::ErrorType},
    },
    r#type::v3::FractionalPercent as ProtoFraction,
};

impl Decoder<'_> {
    pub(super) fn fault(&mut self, proto: HttpFault) -> Valid<FaultConfig> {
        self.ignored(&[
            ("upstream_cluster", !proto.upstream_cluster.is_empty()),
            ("downstream_nodes", !proto.downstream_nodes.is_empty()),
            ("filter_metadata", proto.filter_metadata.is_some()),
        ]);
        let delay = match proto.delay {
            None => None,
            Some(delay) => self.at("delay", |cx| {
                let (percentage, denominator) = cx.of_calls(delay.percentage)?;
                let fixed = match delay.fault_delay_secifier {
                    Some(FaultDelaySecifier::FixedDelay(fixed)) => cx.duration("fixed_delay", Some(fixed))?,
                    Some(FaultDelaySecifier::HeaderDelay(_)) => None,
                    None => return Err(cx.invalid("has neither fixed_delay nor header_delay")),
                };
                Ok(Some(FaultDelay { fixed, percentage, denominator }))
            })?,
        };
        let abort = match proto.abort {
            None => None,
            Some(abort) => self.at("abort", |cx| {
                cx.ignored(&[("response_body", !abort.response_body.is_empty())]);
                let (percentage, denominator) = cx.of_calls(abort.percentage)?;
                match abort.error_type {
                    Some(ErrorType::HttpStatus(status @ 200..600)) => {
                        let status = u16::try_from(status).map_err(|_| cx.invalid("http_status out of range"))?;
                        Ok(Some(FaultAbort::Http { status, percentage }))
                    }
                    Some(ErrorType::HttpStatus(other)) => {
                        cx.note("http_status", format!("{other} is not in 200..600, ignored"));
                        Ok(None)
                    }
                    // gRFC A33: codes above 16 become UNKNOWN.
                    Some(ErrorType::GrpcStatus(code)) => {
                        Ok(Some(FaultAbort::Grpc { code: if code > 16 { 2 } else { code }, percentage }))
                    }
                    Some(ErrorType::HeaderAbort(_)) => Ok(Some(FaultAbort::Header { percentage, denominator })),
                    None => Err(cx.invalid("has no error type")),
                }
            })?,
        };
        let response_rate_limit = match proto.response_rate_limit {
            None => None,
            Some(limit) => self.at("response_rate_limit", |cx| {
                let (percentage, denominator) = cx.of_calls(limit.percentage)?;
                let kbps = match limit.limit_type {
                    Some(LimitType::FixedLimit(fixed)) if fixed.limit_kbps == 0 => {
                        return Err(cx.invalid_at("fixed_limit.limit_kbps", "must be at least 1"));
                    }
                    Some(LimitType::FixedLimit(fixed)) => Some(fixed.limit_kbps),
                    Some(LimitType::HeaderLimit(_)) => None,
                    None => return Err(cx.invalid("has neither fixed_limit nor header_limit")),
                };
                Ok(Some(FaultRateLimit { kbps, percentage, denominator }))
            })?,
        };
        Ok(FaultConfig {
            delay,
            abort,
            response_rate_limit,
            headers: self.header_matchers("headers", proto.headers)?,
            max_active_faults: proto.max_active_faults.map(|value| value.value),
        })
    }

    /// Unset is none.
    fn of_calls(&mut self, percentage: Option<ProtoFraction>) -> Valid<(FractionalPercent, Denominator)> {
        let Some(percentage) = percentage else { return Ok((FractionalPercent(0), Denominator::Hundred)) };
        Ok((self.fraction("percentage", percentage)?, self.denominator("percentage", percentage)?))
    }
}
