//! Load-balancing policies (gRFC A48, A52).

use super::{
    Decoder, Valid,
    filter::{TypedStruct, is_typed_struct},
    type_name,
};
use crate::resource::LbPolicy;
use envoy_types::pb::{
    envoy::{
        config::cluster::v3::{
            Cluster as Proto, LoadBalancingPolicy,
            cluster::{LbConfig, LbPolicy as ProtoPolicy},
        },
        extensions::load_balancing_policies::{least_request::v3::LeastRequest, wrr_locality::v3::WrrLocality},
    },
    google::protobuf::UInt32Value,
};

const MAX_DEPTH: usize = 16;
const PREFIX: &str = "envoy.extensions.load_balancing_policies.";

impl Decoder<'_> {
    /// `load_balancing_policy` wins over `lb_policy`.
    pub(super) fn lb_policy(&mut self, proto: &Proto) -> Valid<LbPolicy> {
        if let Some(list) = &proto.load_balancing_policy {
            return self.at("load_balancing_policy", |cx| cx.lb_list(list, 0));
        }
        match ProtoPolicy::try_from(proto.lb_policy) {
            Ok(ProtoPolicy::RoundRobin) => Ok(LbPolicy::RoundRobin),
            Ok(ProtoPolicy::Random) => Ok(LbPolicy::Random),
            Ok(ProtoPolicy::LeastRequest) => {
                let choices = match &proto.lb_config {
                    Some(LbConfig::LeastRequestLbConfig(config)) => config.choice_count,
                    _ => None,
                };
                self.at("least_request_lb_config", |cx| cx.least_request(choices))
            }
            Ok(other) => Err(self.invalid_at("lb_policy", format!("{} is not supported", other.as_str_name()))),
            Err(_) => Err(self.invalid_at("lb_policy", format!("unknown policy {}", proto.lb_policy))),
        }
    }

    /// gRFC A52: the first supported policy wins.
    fn lb_list(&mut self, list: &LoadBalancingPolicy, depth: usize) -> Valid<LbPolicy> {
        if depth >= MAX_DEPTH {
            return Err(self.invalid(format!("policies are nested more than {MAX_DEPTH} deep")));
        }
        let mut seen = Vec::new();
        for (index, policy) in list.policies.iter().enumerate() {
            let Some(any) = policy.typed_extension_config.as_ref().and_then(|config| config.typed_config.as_ref())
            else {
                continue;
            };
            let name = type_name(&any.type_url);
            let found = self.at_index("policies", index, |cx| match name.strip_prefix(PREFIX) {
                Some("round_robin.v3.RoundRobin") => Ok(Some(LbPolicy::RoundRobin)),
                Some("random.v3.Random") => Ok(Some(LbPolicy::Random)),
                Some("least_request.v3.LeastRequest") => {
                    let config: LeastRequest = cx.message(&any.value)?;
                    cx.least_request(config.choice_count).map(Some)
                }
                Some("wrr_locality.v3.WrrLocality") => {
                    let config: WrrLocality = cx.message(&any.value)?;
                    match config.endpoint_picking_policy {
                        Some(child) => cx.at("endpoint_picking_policy", |cx| cx.lb_list(&child, depth + 1)).map(Some),
                        None => Err(cx.invalid_at("endpoint_picking_policy", "is missing")),
                    }
                }
                _ => Ok(None),
            })?;
            if let Some(found) = found {
                return Ok(found);
            }
            seen.push(self.custom_name(name, &any.value));
        }
        Err(self.invalid(format!("no supported policy among [{}]", seen.join(", "))))
    }

    fn custom_name(&self, name: &str, value: &[u8]) -> String {
        let inner = is_typed_struct(name).then(|| self.message::<TypedStruct>(value).ok()).flatten();
        inner.map_or_else(|| name.to_owned(), |inner| type_name(&inner.type_url).to_owned())
    }

    /// gRFC A48: default 2, below 2 is rejected, above 10 is 10.
    fn least_request(&mut self, choices: Option<UInt32Value>) -> Valid<LbPolicy> {
        match choices.map_or(2, |choices| choices.value) {
            choices @ (0 | 1) => Err(self.invalid_at("choice_count", format!("{choices} is below 2 (gRFC A48)"))),
            choices => Ok(LbPolicy::LeastRequest { choice_count: choices.min(10) }),
        }
    }
}
