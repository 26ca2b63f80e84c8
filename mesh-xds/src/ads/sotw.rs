//! The state-of-the-world wire form: DiscoveryRequest and DiscoveryResponse to and from what the core understands.

use super::{
    Service,
    state::{Request, Response},
};
use crate::{
    bootstrap::Node,
    lint::Note,
    resource::{Decoder, Resource, ResourceType, peek_name},
};
use envoy_types::pb::{
    envoy::{
        config::core::v3::{BuildVersion, Locality, Node as ProtoNode, node::UserAgentVersionType},
        service::discovery::v3::{DiscoveryRequest, DiscoveryResponse, Resource as Wrapper},
        r#type::v3::SemanticVersion,
    },
    google::{
        protobuf::{Any, ListValue, Struct, Value, value::Kind},
        rpc::Status,
    },
};
use prost::Message as _;
use std::{collections::HashSet, sync::Arc};

const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";
/// `google.rpc.Code.INVALID_ARGUMENT`, the code of every NACK.
const INVALID_ARGUMENT: i32 = 3;
/// `google.rpc.Code.NOT_FOUND`.
const NOT_FOUND: i32 = 5;

/// An accepted resource and the bytes it was made from.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) bytes: Vec<u8>,
    pub(crate) resource: Resource,
    pub(crate) notes: Arc<[Note]>,
}

/// What a response says of one wanted resource.
#[derive(Clone, Debug)]
pub(crate) enum Verdict {
    /// In force from now on. The same `Arc` as before when the bytes are the same.
    Accepted(Arc<Accepted>),
    /// Rejected: field path and reason.
    Rejected(Arc<str>),
    /// Only says that it is still there.
    Heartbeat,
}

/// A resource of a response that is wanted: its name and the version in force.
pub(crate) type Wanted = (Arc<str>, Option<Arc<Accepted>>);

/// A validated response: for the core, and for the graph.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) response: Response,
    pub(crate) verdicts: Vec<(Arc<str>, Verdict)>,
}

/// The names of the resources in a response, where they can be told.
pub(crate) fn names(kind: ResourceType, response: &DiscoveryResponse) -> Vec<Option<String>> {
    response.resources.iter().map(|any| Packed::of(kind, any).ok().and_then(|packed| packed.name())).collect()
}

/// Validates every wanted resource of a response by itself (gRFC A46). `wanted` has the names that count, in the order of
/// [`names`], each with the version in force.
pub(crate) fn decode(
    kind: ResourceType,
    response: DiscoveryResponse,
    wanted: Vec<Option<Wanted>>,
    decoder: &mut Decoder<'_>,
) -> Decoded {
    let mut errors = Vec::new();
    let mut verdicts = Vec::new();
    let mut received = HashSet::new();
    let mut unnamed = false;
    for (index, (any, wanted)) in response.resources.into_iter().zip(wanted).enumerate() {
        let packed = match Packed::of(kind, &any) {
            Ok(packed) => packed,
            Err(reason) => {
                unnamed = true;
                errors.push(format!("resources[{index}]: {reason}"));
                continue;
            }
        };
        let Some((name, previous)) = wanted else {
            if packed.name().is_none() {
                unnamed = true;
                errors.push(format!("resources[{index}]: has no name"));
            }
            continue;
        };
        received.insert(name.clone());
        let verdict = match (packed.bytes(), previous) {
            (None, _) => Verdict::Heartbeat,
            (Some(bytes), Some(previous)) if previous.bytes == bytes => Verdict::Accepted(previous),
            (Some(bytes), previous) => match Resource::decode(kind, bytes, decoder) {
                Ok(resource) => {
                    let notes: Arc<[Note]> = decoder.take_notes().into();
                    // Equal in meaning: keep the pointer, so that nothing downstream is rebuilt.
                    let resource = match previous {
                        Some(previous) if previous.resource == resource => previous.resource.clone(),
                        _ => resource,
                    };
                    Verdict::Accepted(Arc::new(Accepted { bytes: bytes.to_vec(), resource, notes }))
                }
                Err(error) => {
                    decoder.take_notes();
                    errors.push(format!("{kind} \"{name}\": {error}"));
                    Verdict::Rejected(error.to_string().into())
                }
            },
        };
        verdicts.push((name, verdict));
    }
    let mut absent = Vec::new();
    for error in response.resource_errors {
        let name = error.resource_name.map(|name| name.name).unwrap_or_default();
        if error.error_detail.is_some_and(|detail| detail.code == NOT_FOUND) && !name.is_empty() {
            absent.push(name.into());
        }
    }
    let response = Response {
        kind,
        version: response.version_info.into(),
        nonce: response.nonce.into(),
        received,
        absent,
        unnamed,
        error: (!errors.is_empty()).then(|| errors.join("; ").into()),
    };
    Decoded { response, verdicts }
}

/// A resource as it stands in a response: plain or wrapped.
enum Packed<'a> {
    Plain(&'a [u8]),
    Wrapped(Box<Wrapper>),
}

impl<'a> Packed<'a> {
    fn of(kind: ResourceType, any: &'a Any) -> Result<Self, String> {
        let expected = kind.type_url();
        if any.type_url == expected {
            return Ok(Self::Plain(&any.value));
        }
        if any.type_url != WRAPPER {
            return Err(format!("is a \"{}\", not a {expected}", any.type_url));
        }
        let wrapper = Wrapper::decode(any.value.as_slice()).map_err(|error| format!("malformed wrapper: {error}"))?;
        match &wrapper.resource {
            Some(inner) if inner.type_url != expected => {
                Err(format!("wraps a \"{}\", not a {expected}", inner.type_url))
            }
            _ => Ok(Self::Wrapped(Box::new(wrapper))),
        }
    }

    fn name(&self) -> Option<String> {
        let name = match self {
            Self::Plain(bytes) => peek_name(bytes).map(str::to_owned),
            Self::Wrapped(wrapper) if !wrapper.name.is_empty() => Some(wrapper.name.clone()),
            Self::Wrapped(wrapper) => {
                wrapper.resource.as_ref().and_then(|inner| peek_name(&inner.value)).map(str::to_owned)
            }
        };
        name.filter(|name| !name.is_empty())
    }

    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Plain(bytes) => Some(bytes),
            Self::Wrapped(wrapper) => wrapper.resource.as_ref().map(|inner| inner.value.as_slice()),
        }
    }
}

/// The request as sent.
pub(crate) fn encode(request: Request, node: &ProtoNode) -> DiscoveryRequest {
    DiscoveryRequest {
        version_info: request.version.as_ref().to_owned(),
        node: request.with_node.then(|| node.clone()),
        resource_names: request.names.iter().map(|name| name.as_ref().to_owned()).collect(),
        type_url: request.kind.type_url().to_owned(),
        response_nonce: request.nonce.as_ref().to_owned(),
        error_detail: request.error.map(|error| Status {
            code: INVALID_ARGUMENT,
            message: error.as_ref().to_owned(),
            details: Vec::new(),
        }),
        ..DiscoveryRequest::default()
    }
}

/// Envoy's version whose SDS ours is as good as: SPIRE's agent serves the roots of several trust domains from 1.18 on, and knows versions only so.
const AS_ENVOY: SemanticVersion = SemanticVersion { major_number: 1, minor_number: 30, patch: 0 };

/// The node as sent.
pub(crate) fn encode_node(node: &Node, service: Service) -> ProtoNode {
    let locality = Locality {
        region: node.locality.region.clone(),
        zone: node.locality.zone.clone(),
        sub_zone: node.locality.sub_zone.clone(),
    };
    ProtoNode {
        id: node.id.clone(),
        cluster: node.cluster.clone(),
        metadata: Some(encode_struct(&node.metadata)),
        locality: (locality != Locality::default()).then_some(locality),
        user_agent_name: "mesh".to_owned(),
        user_agent_version_type: Some(match service {
            Service::Aggregated => UserAgentVersionType::UserAgentVersion(env!("CARGO_PKG_VERSION").to_owned()),
            Service::Secrets => UserAgentVersionType::UserAgentBuildVersion(BuildVersion {
                version: Some(AS_ENVOY),
                ..BuildVersion::default()
            }),
        }),
        client_features: vec![
            "envoy.lb.does_not_support_overprovisioning".to_owned(),
            "xds.config.resource-in-sotw".to_owned(),
        ],
        ..ProtoNode::default()
    }
}

fn encode_struct(object: &serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct { fields: object.iter().map(|(key, value)| (key.clone(), encode_value(value))).collect() }
}

fn encode_value(value: &serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(flag) => Kind::BoolValue(*flag),
        serde_json::Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        serde_json::Value::String(text) => Kind::StringValue(text.clone()),
        serde_json::Value::Array(items) => {
            Kind::ListValue(ListValue { values: items.iter().map(encode_value).collect() })
        }
        serde_json::Value::Object(object) => Kind::StructValue(encode_struct(object)),
    };
    Value { kind: Some(kind) }
}
