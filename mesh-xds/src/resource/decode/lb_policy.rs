//! Load-balancing policies (gRFC A42, A48, A52, A58, A61, A68, A76).

use super::{
    Decoder, Valid,
    filter::{TypedStruct, is_typed_struct, json},
    type_name,
};
use crate::resource::{
    ConsistentHashing, CustomLb, HashFunction, LbPolicy, LbSettings, MAX_RING, MAX_TABLE, Maglev, PeakEwma, RingHash,
    WeightedRoundRobin, is_prime,
};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster as Proto, LoadBalancingPolicy,
                cluster::{LbConfig, LbPolicy as ProtoPolicy},
            },
            core::v3::RuntimeDouble,
        },
        extensions::load_balancing_policies::{
            client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin,
            common::v3::ConsistentHashingLbConfig,
            least_request::v3::{LeastRequest, least_request::SelectionMethod},
            maglev::v3::Maglev as ProtoMaglev,
            pick_first::v3::PickFirst,
            random::v3::Random,
            random_subsetting::v3::RandomSubsetting,
            ring_hash::v3::{RingHash as ProtoRing, ring_hash::HashFunction as ProtoFunction},
            round_robin::v3::RoundRobin,
            subset::v3::Subset,
            wrr_locality::v3::WrrLocality,
        },
    },
    google::protobuf::{Struct, UInt32Value, UInt64Value},
};
use std::{sync::Arc, time::Duration};

const MAX_DEPTH: usize = 16;
const PREFIX: &str = "envoy.extensions.load_balancing_policies.";
/// gRFC A58.
const MIN_UPDATE: Duration = Duration::from_millis(100);

impl Decoder<'_> {
    /// `load_balancing_policy` wins over `lb_policy`. What a policy's configuration says of its surroundings goes to `settings`.
    pub(super) fn lb_policy(&mut self, proto: &Proto, settings: &mut LbSettings) -> Valid<LbPolicy> {
        if let Some(list) = &proto.load_balancing_policy {
            return self.at("load_balancing_policy", |cx| cx.lb_list(list, 0, settings));
        }
        match (ProtoPolicy::try_from(proto.lb_policy), &proto.lb_config) {
            (Ok(ProtoPolicy::RoundRobin), config) => {
                if let Some(LbConfig::RoundRobinLbConfig(config)) = config {
                    settings.slow_start = self.legacy_slow_start(config.slow_start_config.as_ref())?;
                }
                Ok(LbPolicy::RoundRobin)
            }
            (Ok(ProtoPolicy::Random), _) => Ok(LbPolicy::Random),
            (Ok(ProtoPolicy::LeastRequest), Some(LbConfig::LeastRequestLbConfig(config))) => {
                settings.slow_start = self.legacy_slow_start(config.slow_start_config.as_ref())?;
                self.at("least_request_lb_config", |cx| {
                    cx.least_request(config.choice_count, config.active_request_bias.as_ref(), false)
                })
            }
            (Ok(ProtoPolicy::LeastRequest), _) => self.least_request(None, None, false),
            (Ok(ProtoPolicy::RingHash), config) => {
                let mut ring = match config {
                    Some(LbConfig::RingHashLbConfig(config)) => self.at("ring_hash_lb_config", |cx| {
                        let sizes = (config.minimum_ring_size, config.maximum_ring_size);
                        // The deprecated message counts its functions from XX_HASH; the extension from DEFAULT_HASH.
                        let function = config.hash_function.checked_add(1).filter(|function| *function > 0);
                        cx.ring_hash(sizes, function.unwrap_or(i32::MAX))
                    })?,
                    _ => RingHash::default(),
                };
                ring.hashing = self.common_hashing(proto)?;
                Ok(LbPolicy::RingHash(ring))
            }
            (Ok(ProtoPolicy::Maglev), config) => {
                let size = match config {
                    Some(LbConfig::MaglevLbConfig(config)) => config.table_size,
                    _ => None,
                };
                let table_size = self.at("maglev_lb_config", |cx| cx.table_size(size))?;
                Ok(LbPolicy::Maglev(Maglev { table_size, hashing: self.common_hashing(proto)? }))
            }
            (Ok(other), _) => Err(self.invalid_at("lb_policy", format!("{} is not supported", other.as_str_name()))),
            (Err(_), _) => Err(self.invalid_at("lb_policy", format!("unknown policy {}", proto.lb_policy))),
        }
    }

    /// gRFC A52: the first supported policy wins.
    fn lb_list(&mut self, list: &LoadBalancingPolicy, depth: usize, settings: &mut LbSettings) -> Valid<LbPolicy> {
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
                Some(name) => cx.known_policy(name, &any.value, depth, settings),
                None if is_typed_struct(name) => {
                    let typed: TypedStruct = cx.message(&any.value)?;
                    cx.named_policy(type_name(&typed.type_url), typed.value)
                }
                None => Ok(None),
            })?;
            if let Some(found) = found {
                return Ok(found);
            }
            seen.push(self.custom_name(name, &any.value));
        }
        Err(self.invalid(format!("no supported policy among [{}]", seen.join(", "))))
    }

    /// `None`: not one of ours.
    fn known_policy(
        &mut self,
        name: &str,
        bytes: &[u8],
        depth: usize,
        settings: &mut LbSettings,
    ) -> Valid<Option<LbPolicy>> {
        let child = |cx: &mut Self, field, list: Option<&LoadBalancingPolicy>, settings: &mut LbSettings| match list {
            Some(list) => cx.at(field, |cx| cx.lb_list(list, depth + 1, settings)),
            None => Err(cx.invalid_at(field, "is missing")),
        };
        Ok(Some(match name {
            "round_robin.v3.RoundRobin" => {
                let config: RoundRobin = self.message(bytes)?;
                settings.slow_start = self.slow_start(config.slow_start_config.as_ref())?;
                self.locality_lb(config.locality_lb_config.as_ref(), settings)?;
                LbPolicy::RoundRobin
            }
            "random.v3.Random" => {
                let config: Random = self.message(bytes)?;
                self.locality_lb(config.locality_lb_config.as_ref(), settings)?;
                LbPolicy::Random
            }
            "least_request.v3.LeastRequest" => {
                let config: LeastRequest = self.message(bytes)?;
                settings.slow_start = self.slow_start(config.slow_start_config.as_ref())?;
                self.locality_lb(config.locality_lb_config.as_ref(), settings)?;
                let full_scan = config.selection_method() == SelectionMethod::FullScan
                    || config.enable_full_scan.is_some_and(|flag| flag.value);
                self.least_request(config.choice_count, config.active_request_bias.as_ref(), full_scan)?
            }
            "wrr_locality.v3.WrrLocality" => {
                let config: WrrLocality = self.message(bytes)?;
                child(self, "endpoint_picking_policy", config.endpoint_picking_policy.as_ref(), settings)?
            }
            "ring_hash.v3.RingHash" => {
                let config: ProtoRing = self.message(bytes)?;
                let mut ring =
                    self.ring_hash((config.minimum_ring_size, config.maximum_ring_size), config.hash_function)?;
                ring.hashing = self.consistent_hashing(
                    config.consistent_hashing_lb_config.as_ref(),
                    (config.use_hostname_for_hashing, config.hash_balance_factor),
                )?;
                LbPolicy::RingHash(ring)
            }
            "maglev.v3.Maglev" => {
                let config: ProtoMaglev = self.message(bytes)?;
                let table_size = self.table_size(config.table_size)?;
                let hashing = self.consistent_hashing(config.consistent_hashing_lb_config.as_ref(), (false, None))?;
                LbPolicy::Maglev(Maglev { table_size, hashing })
            }
            "client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin" => {
                let config: ClientSideWeightedRoundRobin = self.message(bytes)?;
                settings.slow_start = self.slow_start(config.slow_start_config.as_ref())?;
                LbPolicy::WeightedRoundRobin(Arc::new(self.weighted_round_robin(config)?))
            }
            "pick_first.v3.PickFirst" => {
                LbPolicy::PickFirst { shuffle: self.message::<PickFirst>(bytes)?.shuffle_address_list }
            }
            "random_subsetting.v3.RandomSubsetting" => {
                let config: RandomSubsetting = self.message(bytes)?;
                let subset_size = config.subset_size.map_or(0, |size| size.value);
                if subset_size == 0 {
                    return Err(self.invalid_at("subset_size", "must be greater than zero"));
                }
                let child = Arc::new(child(self, "child_policy", config.child_policy.as_ref(), settings)?);
                LbPolicy::RandomSubsetting { subset_size, child }
            }
            "subset.v3.Subset" => {
                let config: Subset = self.message(bytes)?;
                let policy = child(self, "subset_lb_policy", config.subset_lb_policy.as_ref(), settings)?;
                settings.subsets = Some(Arc::new(self.subset_policy(config)?));
                policy
            }
            _ => return Ok(None),
        }))
    }

    /// A policy by its name, with its configuration as JSON: ours that have no message, gRPC's names, and what the program registered.
    fn named_policy(&mut self, name: &str, config: Option<Struct>) -> Valid<Option<LbPolicy>> {
        let config = serde_json::Value::Object(config.map(json).unwrap_or_default());
        let last = name.rsplit('.').next().unwrap_or(name);
        let known = |name: &&str| self.extensions.is_some_and(|extensions| extensions.has_lb_policy(name));
        if let Some(name) = [name, last].into_iter().find(known) {
            return Ok(Some(LbPolicy::Custom(Arc::new(CustomLb { name: name.into(), config }))));
        }
        let number = |key: &str| config.get(key).and_then(serde_json::Value::as_f64);
        let whole = |key: &str| {
            let text = config.get(key).and_then(|v| v.as_str()).and_then(|v| v.parse().ok());
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
            number(key).map(|n| n as u64).or(text)
        };
        Ok(Some(match last {
            "round_robin" => LbPolicy::RoundRobin,
            "random" | "random_experimental" => LbPolicy::Random,
            "pick_first" => LbPolicy::PickFirst {
                shuffle: config.get("shuffleAddressList").and_then(serde_json::Value::as_bool).unwrap_or(false),
            },
            "least_request_experimental" => {
                let choices = whole("choiceCount").and_then(|n| u32::try_from(n).ok());
                self.least_request(choices.map(|value| UInt32Value { value }), None, false)?
            }
            "ring_hash_experimental" => {
                let size = |key| whole(key).map(|value| UInt64Value { value });
                let mut ring = self.ring_hash((size("minRingSize"), size("maxRingSize")), 0)?;
                let header = config.get("requestHashHeader").and_then(|v| v.as_str()).filter(|v| !v.is_empty());
                if header.is_some_and(|header| header.ends_with("-bin")) {
                    return Err(self.invalid_at("requestHashHeader", "must not be a binary header"));
                }
                ring.request_header = match header {
                    Some(header) => Some(self.header_name("requestHashHeader", header)?),
                    None => None,
                };
                LbPolicy::RingHash(ring)
            }
            "peak_ewma" | "PeakEwma" => {
                let default = PeakEwma::default();
                let millis = |cx: &mut Self, field: &'static str, default: Duration| match number(field) {
                    None => Ok(default),
                    Some(value) if (0.0..=86_400_000.0).contains(&value) => Ok(Duration::from_secs_f64(value / 1e3)),
                    Some(value) => Err(cx.invalid_at(field, format!("{value} is not between 0 and a day"))),
                };
                LbPolicy::PeakEwma(PeakEwma {
                    default_rtt: millis(self, "defaultRttMs", default.default_rtt)?.max(Duration::from_millis(1)),
                    decay: millis(self, "decayMs", default.decay)?.max(Duration::from_millis(1)),
                    penalty: millis(self, "penaltyMs", default.penalty)?,
                })
            }
            _ => return Ok(None),
        }))
    }

    fn custom_name(&self, name: &str, value: &[u8]) -> String {
        let inner = is_typed_struct(name).then(|| self.message::<TypedStruct>(value).ok()).flatten();
        inner.map_or_else(|| name.to_owned(), |inner| type_name(&inner.type_url).to_owned())
    }

    /// gRFC A48: default 2, below 2 is rejected, above 10 is 10.
    fn least_request(
        &mut self,
        choices: Option<UInt32Value>,
        bias: Option<&RuntimeDouble>,
        full_scan: bool,
    ) -> Valid<LbPolicy> {
        let mut bias = bias.map_or(1.0, |bias| bias.default_value);
        if bias.is_nan() || bias < 0.0 {
            self.note("active_request_bias", format!("{bias} is negative: 1 is used"));
            bias = 1.0;
        }
        #[allow(clippy::float_cmp, reason = "1 is what stands for the default")]
        let bias = (bias != 1.0).then_some(bias);
        match choices.map_or(2, |choices| choices.value) {
            choices @ (0 | 1) => Err(self.invalid_at("choice_count", format!("{choices} is below 2 (gRFC A48)"))),
            choices => Ok(LbPolicy::LeastRequest { choice_count: choices.min(10), bias, full_scan }),
        }
    }

    /// gRFC A42. `function` is one of the extension's.
    fn ring_hash(&mut self, (min, max): (Option<UInt64Value>, Option<UInt64Value>), function: i32) -> Valid<RingHash> {
        let default = RingHash::default();
        let max_size = max.map_or(default.max_size, |size| size.value);
        if max_size > MAX_RING || max_size == 0 {
            return Err(self.invalid_at("maximum_ring_size", format!("{max_size} is not between 1 and {MAX_RING}")));
        }
        let min_size = min.map_or(default.min_size, |size| size.value);
        if min_size > max_size {
            return Err(self.invalid_at("minimum_ring_size", format!("{min_size} is more than the most, {max_size}")));
        }
        let function = match ProtoFunction::try_from(function) {
            Ok(ProtoFunction::DefaultHash | ProtoFunction::XxHash) => HashFunction::XxHash,
            Ok(ProtoFunction::MurmurHash2) => HashFunction::MurmurHash2,
            Err(_) => return Err(self.invalid_at("hash_function", format!("unknown function {function}"))),
        };
        Ok(RingHash { min_size, max_size, function, ..default })
    }

    fn table_size(&mut self, size: Option<UInt64Value>) -> Valid<u64> {
        match size.map_or(65_537, |size| size.value) {
            size if size > MAX_TABLE => Err(self.invalid_at("table_size", format!("{size} is more than {MAX_TABLE}"))),
            size if !is_prime(size) => Err(self.invalid_at("table_size", format!("{size} is not a prime"))),
            size => Ok(size),
        }
    }

    /// The legacy place of [`ConsistentHashing`].
    fn common_hashing(&mut self, proto: &Proto) -> Valid<ConsistentHashing> {
        let common = proto.common_lb_config.as_ref().and_then(|common| common.consistent_hashing_lb_config.as_ref());
        let Some(common) = common else { return Ok(ConsistentHashing::default()) };
        self.at("common_lb_config.consistent_hashing_lb_config", |cx| {
            let balance_factor = cx.balance_factor(common.hash_balance_factor)?;
            Ok(ConsistentHashing { use_hostname: common.use_hostname_for_hashing, balance_factor })
        })
    }

    fn consistent_hashing(
        &mut self,
        config: Option<&ConsistentHashingLbConfig>,
        (use_hostname, factor): (bool, Option<UInt32Value>),
    ) -> Valid<ConsistentHashing> {
        let Some(config) = config else {
            return Ok(ConsistentHashing { use_hostname, balance_factor: self.balance_factor(factor)? });
        };
        self.at("consistent_hashing_lb_config", |cx| {
            cx.ignored(&[("hash_policy", !config.hash_policy.is_empty())]);
            let balance_factor = cx.balance_factor(config.hash_balance_factor.or(factor))?;
            Ok(ConsistentHashing { use_hostname: config.use_hostname_for_hashing || use_hostname, balance_factor })
        })
    }

    fn balance_factor(&mut self, factor: Option<UInt32Value>) -> Valid<Option<u32>> {
        match factor.map(|factor| factor.value) {
            Some(factor @ ..100) => Err(self.invalid_at("hash_balance_factor", format!("{factor} is below 100"))),
            factor => Ok(factor),
        }
    }

    /// gRFC A58.
    fn weighted_round_robin(&mut self, proto: ClientSideWeightedRoundRobin) -> Valid<WeightedRoundRobin> {
        let default = WeightedRoundRobin::default();
        self.ignored(&[("oob_reporting_config", proto.oob_reporting_config.is_some())]);
        let period = self.duration("oob_reporting_period", proto.oob_reporting_period)?;
        let oob = proto.enable_oob_load_report.is_some_and(|flag| flag.value);
        let error_penalty =
            proto.error_utilization_penalty.map_or(default.error_penalty, |penalty| penalty.value.into());
        if error_penalty.is_nan() || error_penalty < 0.0 {
            return Err(self.invalid_at("error_utilization_penalty", format!("{error_penalty} is negative")));
        }
        Ok(WeightedRoundRobin {
            oob_period: oob.then(|| period.unwrap_or(Duration::from_secs(10))),
            blackout: self.duration("blackout_period", proto.blackout_period)?.unwrap_or(default.blackout),
            expiration: self
                .duration("weight_expiration_period", proto.weight_expiration_period)?
                .unwrap_or(default.expiration),
            update: self
                .duration("weight_update_period", proto.weight_update_period)?
                .map_or(default.update, |period| period.max(MIN_UPDATE)),
            error_penalty,
            utilization_metrics: proto.metric_names_for_computing_utilization,
        })
    }
}
