//! EDS validation (gRFC A27), straight from the wire.
//!
//! One allocation per locality, none per endpoint: hostnames, metadata and locality ids are shared.

use super::{
    Decoder, Invalid, Valid,
    wire::{Fields, Malformed, Value},
};
use crate::resource::{
    ClusterLoadAssignment, DropOverload, Endpoint, FractionalPercent, HealthStatus, Locality, LocalityId, MetadataValue,
};
use envoy_types::pb::{
    envoy::{config::core::v3::Metadata, r#type::v3::FractionalPercent as ProtoFraction},
    google::protobuf::{Value as ProtoValue, value::Kind},
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasherDefault, Hasher},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

type SharedMetadata = Arc<BTreeMap<String, BTreeMap<String, MetadataValue>>>;

impl ClusterLoadAssignment {
    /// Decodes and validates a serialized `envoy.config.endpoint.v3.ClusterLoadAssignment`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        let assignment = cx.assignment(bytes, false)?;
        if assignment.name.is_empty() {
            return Err(cx.invalid_at("cluster_name", "must not be empty"));
        }
        Ok(assignment)
    }
}

/// What the endpoints of one assignment have in common.
struct Shared<'a> {
    seen: HashSet<SocketAddr, BuildHasherDefault<AddressHasher>>,
    hostnames: HashMap<&'a [u8], Arc<str>>,
    metadata: HashMap<&'a [u8], Option<SharedMetadata>>,
    no_hostname: Arc<str>,
}

impl Decoder<'_> {
    /// `fixed`: the assignment of a STATIC cluster, where an unset locality weight is 1 (by EDS the locality is skipped).
    pub(super) fn assignment(&mut self, bytes: &[u8], fixed: bool) -> Valid<ClusterLoadAssignment> {
        let mut shared = Shared {
            seen: HashSet::default(),
            hostnames: HashMap::new(),
            metadata: HashMap::new(),
            no_hostname: "".into(),
        };
        let mut name = "";
        let mut drops = Vec::new();
        let mut overprovisioning_factor = None;
        let mut priorities: BTreeMap<u32, Vec<Locality>> = BTreeMap::new();
        let mut index = 0;
        for field in Fields::of(bytes) {
            match self.wire(field)? {
                (1, value) => name = self.wire(value.text())?,
                (2, value) => {
                    let body = self.wire(value.bytes())?;
                    self.at_index("endpoints", index, |cx| cx.locality(body, fixed, &mut shared, &mut priorities))?;
                    index += 1;
                }
                (4, value) => {
                    let body = self.wire(value.bytes())?;
                    drops = self.at("policy", |cx| cx.drop_overloads(body))?;
                    overprovisioning_factor = self.at("policy", |cx| cx.overprovisioning_factor(body))?;
                }
                _ => {}
            }
        }
        for (expected, priority) in (0u32..).zip(priorities.keys()) {
            if expected != *priority {
                return Err(self.invalid_at("endpoints", format!("there is priority {priority}, but no {expected}")));
            }
        }
        for (priority, localities) in &priorities {
            let total: u64 = localities.iter().map(|locality| u64::from(locality.weight)).sum();
            if total > u64::from(u32::MAX) {
                return Err(self.invalid_at(
                    "endpoints",
                    format!("the locality weights of priority {priority} add up to {total}, more than {}", u32::MAX),
                ));
            }
        }
        let priorities = priorities.into_values().collect();
        Ok(ClusterLoadAssignment { name: name.into(), priorities, drops, overprovisioning_factor })
    }

    fn overprovisioning_factor(&mut self, body: &[u8]) -> Valid<Option<u32>> {
        let mut factor = None;
        for field in Fields::of(body) {
            if let (3, value) = self.wire(field)? {
                factor = Some(self.wire(value.wrapped_uint32())?);
            }
        }
        match factor {
            Some(0) => Err(self.invalid_at("overprovisioning_factor", "must be greater than zero")),
            factor => Ok(factor),
        }
    }

    pub(super) fn wire<T>(&self, result: Result<T, Malformed>) -> Valid<T> {
        result.map_err(|_| self.invalid("malformed protobuf"))
    }

    fn locality<'b>(
        &mut self,
        body: &'b [u8],
        fixed: bool,
        shared: &mut Shared<'b>,
        priorities: &mut BTreeMap<u32, Vec<Locality>>,
    ) -> Valid<()> {
        let mut id = LocalityId::default();
        let mut weight = None;
        let mut priority = 0;
        // Counted first, so that the endpoints are allocated once.
        let mut count = 0;
        for field in Fields::of(body) {
            match self.wire(field)? {
                (1, value) => id = self.locality_id(self.wire(value.bytes())?)?,
                (2, _) => count += 1,
                (3, value) => weight = Some(self.wire(value.wrapped_uint32())?),
                (5, value) => priority = self.wire(value.uint32())?,
                (7 | 8, _) => return Err(self.invalid_at("lb_config", "not supported: use lb_endpoints")),
                _ => {}
            }
        }
        let mut endpoints = Vec::with_capacity(count);
        shared.seen.reserve(count);
        let mut total: u64 = 0;
        let bodies = Fields::of(body).flatten().filter(|(tag, _)| *tag == 2);
        for (index, (_, value)) in bodies.enumerate() {
            let body = self.wire(value.bytes())?;
            let endpoint = self.at_index("lb_endpoints", index, |cx| cx.endpoint(body, shared))?;
            total += u64::from(endpoint.weight);
            endpoints.push(endpoint);
        }
        if total > u64::from(u32::MAX) {
            return Err(self.invalid_at(
                "lb_endpoints",
                format!("the endpoint weights add up to {total}, more than {}", u32::MAX),
            ));
        }
        let weight = weight.unwrap_or(u32::from(fixed));
        if weight == 0 {
            return Ok(());
        }
        let localities = priorities.entry(priority).or_default();
        if localities.iter().any(|other| *other.id == id) {
            return Err(self.invalid_at(
                "locality",
                format!("{}/{}/{} is twice in priority {priority}", id.region, id.zone, id.sub_zone),
            ));
        }
        localities.push(Locality { id: Arc::new(id), weight, endpoints });
        Ok(())
    }

    fn locality_id(&self, body: &[u8]) -> Valid<LocalityId> {
        let mut id = LocalityId::default();
        for field in Fields::of(body) {
            match self.wire(field)? {
                (1, value) => self.wire(value.text())?.clone_into(&mut id.region),
                (2, value) => self.wire(value.text())?.clone_into(&mut id.zone),
                (3, value) => self.wire(value.text())?.clone_into(&mut id.sub_zone),
                _ => {}
            }
        }
        Ok(id)
    }

    fn endpoint<'b>(&mut self, body: &'b [u8], shared: &mut Shared<'b>) -> Valid<Endpoint> {
        let mut target = None;
        let mut health = HealthStatus::Unknown;
        let mut metadata = None;
        let mut weight = 1;
        for field in Fields::of(body) {
            match self.wire(field)? {
                (1, value) => target = Some(self.wire(value.bytes())?),
                (2, value) => health = health_status(self.wire(value.uint32())?),
                (3, value) => metadata = self.shared_metadata(self.wire(value.bytes())?, shared)?,
                (4, value) => weight = self.wire(value.wrapped_uint32())?,
                (5, _) => return Err(self.invalid_at("endpoint_name", "not supported: use endpoint")),
                _ => {}
            }
        }
        let Some(target) = target else { return Err(self.invalid_at("endpoint", "is missing")) };
        if weight == 0 {
            return Err(self.invalid_at("load_balancing_weight", "must be greater than zero"));
        }
        let mut address = None;
        let mut hostname: &[u8] = &[];
        let mut health_check = None;
        for field in Fields::of(target) {
            match self.wire(field)? {
                (1, value) => address = Some(self.wire(value.bytes())?),
                (2, value) => {
                    let body = self.wire(value.bytes())?;
                    health_check = self.at("endpoint.health_check_config", |cx| cx.endpoint_health_check(body))?;
                }
                (3, value) => hostname = self.wire(value.bytes())?,
                _ => {}
            }
        }
        let Some(address) = address else { return Err(self.invalid_at("endpoint.address", "is missing")) };
        let address = self.address(address)?;
        if !shared.seen.insert(address) {
            return Err(self.invalid_at("endpoint.address", format!("{address} is used twice")));
        }
        let hostname = if hostname.is_empty() {
            shared.no_hostname.clone()
        } else if let Some(known) = shared.hostnames.get(hostname) {
            known.clone()
        } else {
            let text: Arc<str> = self.wire(std::str::from_utf8(hostname).map_err(|_| Malformed))?.into();
            shared.hostnames.insert(hostname, text.clone());
            text
        };
        Ok(Endpoint { address, weight, health, hostname, metadata, health_check })
    }

    pub(super) fn address(&mut self, body: &[u8]) -> Valid<SocketAddr> {
        const FIELD: &str = "endpoint.address";
        let mut socket = None;
        for field in Fields::of(body) {
            match self.wire(field)? {
                (1, value) => socket = Some(self.wire(value.bytes())?),
                (2, _) => return Err(self.invalid_at(FIELD, "pipe addresses are not supported")),
                (3, _) => return Err(self.invalid_at(FIELD, "envoy_internal_address is not supported")),
                _ => {}
            }
        }
        let Some(socket) = socket else { return Err(self.invalid_at(FIELD, "has no socket_address")) };
        let (mut host, mut port) = ("", None);
        for field in Fields::of(socket) {
            match self.wire(field)? {
                (1, Value::Varint(0)) => {}
                (1, _) => return Err(self.invalid_at(FIELD, "protocol must be TCP")),
                (2, value) => host = self.wire(value.text())?,
                (3, value) => port = Some(self.wire(value.uint32())?),
                (4, _) => return Err(self.invalid_at(FIELD, "named_port is not supported")),
                _ => {}
            }
        }
        let ip: IpAddr = match host.parse() {
            Ok(ip) => ip,
            Err(_) => return Err(self.invalid_at(FIELD, format!("\"{host}\" is not an IP address"))),
        };
        match port.map(u16::try_from) {
            Some(Ok(port)) => Ok(SocketAddr::new(ip, port)),
            Some(Err(_)) => Err(self.invalid_at(FIELD, format!("port {} is out of range", port.unwrap_or_default()))),
            None => Err(self.invalid_at(FIELD, "has no port_value")),
        }
    }

    fn shared_metadata<'b>(&self, body: &'b [u8], shared: &mut Shared<'b>) -> Valid<Option<SharedMetadata>> {
        if let Some(known) = shared.metadata.get(body) {
            return Ok(known.clone());
        }
        let proto: Metadata = self.message(body)?;
        let mut metadata = BTreeMap::new();
        for (namespace, fields) in proto.filter_metadata {
            let values = metadata_values(fields.fields);
            if !values.is_empty() {
                metadata.insert(namespace, values);
            }
        }
        let metadata = (!metadata.is_empty()).then(|| Arc::new(metadata));
        shared.metadata.insert(body, metadata.clone());
        Ok(metadata)
    }

    fn drop_overloads(&mut self, body: &[u8]) -> Valid<Vec<DropOverload>> {
        let mut drops = Vec::new();
        for field in Fields::of(body) {
            let (2, value) = self.wire(field)? else { continue };
            let body = self.wire(value.bytes())?;
            let index = drops.len();
            drops.push(self.at_index("drop_overloads", index, |cx| {
                let mut category = "";
                let mut percentage = FractionalPercent(0);
                for field in Fields::of(body) {
                    match cx.wire(field)? {
                        (1, value) => category = cx.wire(value.text())?,
                        (2, value) => {
                            let bytes = cx.wire(value.bytes())?;
                            let proto = ProtoFraction::decode(bytes).map_err(|_| cx.invalid("malformed protobuf"))?;
                            percentage = cx.fraction("drop_percentage", proto)?;
                        }
                        _ => {}
                    }
                }
                if category.is_empty() {
                    return Err(cx.invalid_at("category", "must not be empty"));
                }
                Ok(DropOverload { category: category.into(), percentage })
            })?);
        }
        Ok(drops)
    }
}

/// Lists and structs are left out.
pub(super) fn metadata_values(fields: HashMap<String, ProtoValue>) -> BTreeMap<String, MetadataValue> {
    let value = |value: ProtoValue| match value.kind {
        Some(Kind::StringValue(text)) => Some(MetadataValue::String(text)),
        Some(Kind::NumberValue(number)) => Some(MetadataValue::Number(number)),
        Some(Kind::BoolValue(flag)) => Some(MetadataValue::Bool(flag)),
        _ => None,
    };
    fields.into_iter().filter_map(|(key, kind)| Some((key, value(kind)?))).collect()
}

/// A value we do not know is treated as unhealthy: it was not said to be usable.
fn health_status(value: u32) -> HealthStatus {
    match value {
        0 => HealthStatus::Unknown,
        1 => HealthStatus::Healthy,
        3 => HealthStatus::Draining,
        4 => HealthStatus::Timeout,
        5 => HealthStatus::Degraded,
        _ => HealthStatus::Unhealthy,
    }
}

/// Mixes the few words of a socket address. The control plane is trusted, so there is no need for a keyed hash.
#[derive(Default)]
struct AddressHasher(u64);

impl AddressHasher {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }

    fn write_u16(&mut self, value: u16) {
        self.mix(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(u64::from(value));
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }
}
