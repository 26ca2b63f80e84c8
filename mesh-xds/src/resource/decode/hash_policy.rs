//! `RouteAction.hash_policy` (gRFC A42 and Envoy) and `metadata_match`.

use super::{Decoder, Valid, endpoint::metadata_values};
use crate::resource::{CookieHash, HashPolicy, HashSource, MetadataValue};
use envoy_types::pb::envoy::config::{
    core::v3::Metadata,
    route::v3::route_action::{
        HashPolicy as Proto,
        hash_policy::{Cookie, PolicySpecifier},
    },
};
use std::{collections::BTreeMap, sync::Arc};

/// gRFC A42: the filter state that is the same for all requests of a channel.
const CHANNEL_ID: &str = "io.grpc.channel_id";
/// Endpoints and requests are matched by the metadata of this filter (Envoy).
const LB_FILTER: &str = "envoy.lb";

impl Decoder<'_> {
    /// A policy that is not known is left out, with a note.
    pub(super) fn hash_policies(&mut self, protos: Vec<Proto>) -> Valid<Arc<[HashPolicy]>> {
        let mut policies = Vec::with_capacity(protos.len());
        for (index, proto) in protos.into_iter().enumerate() {
            if let Some(policy) = self.at_index("hash_policy", index, |cx| cx.hash_policy(proto))? {
                policies.push(policy);
            }
        }
        Ok(policies.into())
    }

    fn hash_policy(&mut self, proto: Proto) -> Valid<Option<HashPolicy>> {
        let source = match proto.policy_specifier {
            Some(PolicySpecifier::Header(header)) => self.at("header", |cx| {
                if header.header_name.is_empty() {
                    return Err(cx.invalid_at("header_name", "must not be empty"));
                }
                let rewrite = match header.regex_rewrite {
                    None => None,
                    Some(rewrite) => Some(cx.at("regex_rewrite", |cx| cx.regex_rewrite(&rewrite))?),
                };
                Ok(HashSource::Header { name: header.header_name.to_ascii_lowercase().into(), rewrite })
            })?,
            Some(PolicySpecifier::Cookie(cookie)) => self.at("cookie", |cx| cx.hash_cookie(cookie))?,
            Some(PolicySpecifier::ConnectionProperties(properties)) => {
                if !properties.source_ip {
                    return Ok(None);
                }
                HashSource::SourceIp
            }
            Some(PolicySpecifier::QueryParameter(parameter)) => {
                if parameter.name.is_empty() {
                    return Err(self.invalid_at("query_parameter.name", "must not be empty"));
                }
                HashSource::QueryParameter(parameter.name.into())
            }
            Some(PolicySpecifier::FilterState(state)) if state.key == CHANNEL_ID => HashSource::ChannelId,
            Some(PolicySpecifier::FilterState(state)) if state.key.is_empty() => {
                return Err(self.invalid_at("filter_state.key", "must not be empty"));
            }
            Some(PolicySpecifier::FilterState(state)) => HashSource::FilterState(state.key.into()),
            None => {
                self.note("policy_specifier", "is missing or not known, ignored");
                return Ok(None);
            }
        };
        Ok(Some(HashPolicy { source, terminal: proto.terminal }))
    }

    fn hash_cookie(&mut self, proto: Cookie) -> Valid<HashSource> {
        let token = |c: u8| c.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?={}".contains(&c);
        if proto.name.is_empty() || !proto.name.bytes().all(token) {
            return Err(self.invalid_at("name", format!("\"{}\" is not a cookie's name", proto.name)));
        }
        let value = |text: &str| text.bytes().all(|c| (b' '..=b'~').contains(&c) && c != b';');
        if !value(&proto.path) {
            return Err(self.invalid_at("path", format!("\"{}\" is not a path", proto.path)));
        }
        if let Some(bad) = proto.attributes.iter().find(|a| a.name.is_empty() || !value(&a.name) || !value(&a.value)) {
            return Err(self.invalid_at("attributes", format!("\"{}={}\" is not an attribute", bad.name, bad.value)));
        }
        Ok(HashSource::Cookie(CookieHash {
            name: proto.name.into(),
            ttl: self.duration("ttl", proto.ttl)?,
            path: proto.path.into(),
            attributes: proto.attributes.into_iter().map(|a| (a.name, a.value)).collect(),
        }))
    }

    /// `None`: nothing is asked of the endpoints.
    pub(super) fn metadata_match(&mut self, proto: Option<Metadata>) -> Option<Arc<BTreeMap<String, MetadataValue>>> {
        let values = proto?.filter_metadata.remove(LB_FILTER).map(|fields| metadata_values(fields.fields))?;
        (!values.is_empty()).then(|| Arc::new(values))
    }
}
