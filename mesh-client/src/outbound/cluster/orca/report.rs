//! One load report: its forms, and the weight that it gives.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderName};
use mesh_xds::resource::WeightedRoundRobin;
use prost::Message as _;
use std::collections::HashMap;

const BINARY: HeaderName = HeaderName::from_static("endpoint-load-metrics-bin");
const TEXT: HeaderName = HeaderName::from_static("endpoint-load-metrics");
/// gRPC sends none, others may.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// `xds.data.orca.v3.OrcaLoadReport`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Report {
    #[prost(double, tag = "1")]
    pub(super) cpu_utilization: f64,
    #[prost(double, tag = "2")]
    pub(super) mem_utilization: f64,
    /// Before `rps_fractional`.
    #[prost(uint64, tag = "3")]
    pub(super) rps: u64,
    #[prost(map = "string, double", tag = "4")]
    pub(super) request_cost: HashMap<String, f64>,
    #[prost(map = "string, double", tag = "5")]
    pub(super) utilization: HashMap<String, f64>,
    #[prost(double, tag = "6")]
    pub(super) rps_fractional: f64,
    #[prost(double, tag = "7")]
    pub(super) eps: f64,
    #[prost(map = "string, double", tag = "8")]
    pub(super) named_metrics: HashMap<String, f64>,
    #[prost(double, tag = "9")]
    pub(super) application_utilization: f64,
}

impl Report {
    /// Of response headers or trailers: `endpoint-load-metrics-bin`, or `endpoint-load-metrics` as `TEXT`, `JSON` or `BIN`. `None`: there
    /// is none, or it cannot be read.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        if let Some(value) = headers.get(BINARY) {
            return Self::binary(value.as_bytes());
        }
        let text = headers.get(TEXT)?.to_str().ok()?.trim();
        let (form, value) = text.split_once(' ')?;
        match form {
            "TEXT" => Some(Self::text(value)),
            "JSON" => Self::json(value),
            "BIN" => Self::binary(value.trim().as_bytes()),
            _ => None,
        }
    }

    fn binary(base64: &[u8]) -> Option<Self> {
        Self::decode(&*BASE64.decode(base64).ok()?).ok()
    }

    /// `cpu_utilization=0.3,named_metrics.queue=2`
    fn text(text: &str) -> Self {
        let mut report = Self::default();
        for pair in text.split(',') {
            if let Some((name, value)) = pair.split_once(['=', ':'])
                && let Ok(value) = value.trim().parse()
            {
                report.set(name.trim(), value);
            }
        }
        report
    }

    /// The JSON form of the message.
    fn json(text: &str) -> Option<Self> {
        let mut report = Self::default();
        let serde_json::Value::Object(fields) = serde_json::from_str(text).ok()? else { return None };
        for (name, value) in fields {
            let number = |value: &serde_json::Value| value.as_f64().or_else(|| value.as_str()?.parse().ok());
            match &value {
                serde_json::Value::Object(entries) => {
                    for (key, value) in entries {
                        report.set(&format!("{name}.{key}"), number(value)?);
                    }
                }
                value => report.set(&name, number(value)?),
            }
        }
        Some(report)
    }

    fn set(&mut self, name: &str, value: f64) {
        match name {
            "cpu_utilization" | "cpuUtilization" => self.cpu_utilization = value,
            "mem_utilization" | "memUtilization" => self.mem_utilization = value,
            "application_utilization" | "applicationUtilization" => self.application_utilization = value,
            "rps_fractional" | "rpsFractional" | "rps" => self.rps_fractional = value,
            "eps" => self.eps = value,
            name => {
                let Some((map, key)) = name.split_once('.') else { return };
                let map = match map {
                    "utilization" => &mut self.utilization,
                    "named_metrics" | "namedMetrics" => &mut self.named_metrics,
                    "request_cost" | "requestCost" => &mut self.request_cost,
                    _ => return,
                };
                map.insert(key.to_owned(), value);
            }
        }
    }

    fn metric(&self, name: &str) -> Option<f64> {
        match name {
            "cpu_utilization" => Some(self.cpu_utilization),
            "mem_utilization" => Some(self.mem_utilization),
            "application_utilization" => Some(self.application_utilization),
            name => match name.split_once('.')? {
                ("utilization", key) => self.utilization.get(key).copied(),
                ("named_metrics", key) => self.named_metrics.get(key).copied(),
                ("request_cost", key) => self.request_cost.get(key).copied(),
                _ => None,
            },
        }
    }

    /// The application's own, else the greatest of the configured metrics (gRFC A114), else the CPU's.
    fn utilization(&self, config: &WeightedRoundRobin) -> f64 {
        if self.application_utilization > 0.0 {
            return self.application_utilization;
        }
        let named = config.utilization_metrics.iter().filter_map(|name| self.metric(name));
        let greatest = named.filter(|value| value.is_finite()).fold(0.0, f64::max);
        if greatest > 0.0 { greatest } else { self.cpu_utilization }
    }

    /// gRFC A58: queries per second by what they cost, errors making them dearer. `None`: it says too little.
    pub(crate) fn weight(&self, config: &WeightedRoundRobin) -> Option<f64> {
        #[allow(clippy::cast_precision_loss, reason = "requests per second")]
        let queries = if self.rps_fractional > 0.0 { self.rps_fractional } else { self.rps as f64 };
        let utilization = self.utilization(config);
        if !(queries > 0.0 && utilization > 0.0) {
            return None;
        }
        let errors = if self.eps > 0.0 { self.eps / queries * config.error_penalty } else { 0.0 };
        let weight = queries / (utilization + errors);
        (weight.is_finite() && weight > 0.0).then_some(weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn weight(report: &Report, config: &WeightedRoundRobin) -> Option<f64> {
        report.weight(config)
    }

    #[test]
    fn a_weight_is_queries_by_utilization_and_errors() {
        let config = WeightedRoundRobin::default();
        let report = Report { rps_fractional: 100.0, cpu_utilization: 0.5, ..Report::default() };
        assert_eq!(weight(&report, &config), Some(200.0));
        let errors = Report { eps: 50.0, ..report.clone() };
        assert_eq!(weight(&errors, &config), Some(100.0), "100 / (0.5 + 50 / 100)");
        assert_eq!(weight(&errors, &WeightedRoundRobin { error_penalty: 0.0, ..config.clone() }), Some(200.0));
        let own = Report { application_utilization: 0.8, ..report.clone() };
        assert_eq!(weight(&own, &config), Some(125.0), "the application's own comes before the CPU's");
        assert_eq!(weight(&Report { rps_fractional: 0.0, ..report.clone() }, &config), None);
        assert_eq!(weight(&Report { cpu_utilization: 0.0, ..report.clone() }, &config), None);
        assert_eq!(weight(&Report { eps: f64::NAN, ..report.clone() }, &config), Some(200.0));
        let metrics =
            vec!["named_metrics.queue".to_owned(), "utilization.disk".to_owned(), "mem_utilization".to_owned()];
        let config = WeightedRoundRobin { utilization_metrics: metrics, ..config };
        assert_eq!(weight(&report, &config), Some(200.0), "none of them is there");
        let named = Report { named_metrics: [("queue".into(), 0.25)].into(), mem_utilization: 0.4, ..report };
        assert_eq!(weight(&named, &config), Some(250.0), "the greatest of those that are");
    }

    #[test]
    fn every_form_says_the_same() {
        let report = Report {
            cpu_utilization: 0.5,
            rps_fractional: 100.0,
            named_metrics: [("queue".into(), 2.0)].into(),
            ..Report::default()
        };
        let bin = BASE64.encode(report.encode_to_vec());
        let of = |name: HeaderName, value: &str| {
            Report::of(&[(name, HeaderValue::try_from(value).unwrap())].into_iter().collect())
        };
        for value in [
            "TEXT cpu_utilization=0.5, rps_fractional=100,named_metrics.queue=2,other=1".to_owned(),
            "TEXT cpu_utilization:0.5,rps:100,named_metrics.queue:2".to_owned(),
            r#"JSON {"cpu_utilization": 0.5, "rpsFractional": 100, "namedMetrics": {"queue": 2}}"#.to_owned(),
            format!("BIN {bin}"),
        ] {
            assert_eq!(of(TEXT, &value).as_ref(), Some(&report), "{value}");
        }
        assert_eq!(of(BINARY, &bin).as_ref(), Some(&report));
        assert_eq!(of(BINARY, bin.trim_end_matches('=')).as_ref(), Some(&report));
        for bad in ["", "XML <a/>", "JSON {", "JSON []", "BIN ?"] {
            assert_eq!(of(TEXT, bad), None, "{bad}");
        }
        assert_eq!(of(BINARY, "????"), None);
        assert_eq!(Report::of(&HeaderMap::new()), None);
    }
}
