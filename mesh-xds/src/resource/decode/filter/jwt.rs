//! JWT authentication (Envoy). What cannot be honoured whole is refused.

use crate::resource::{
    JwksSource, JwtClaimToHeader, JwtConfig, JwtHeader, JwtOfRoute, JwtProvider, JwtRequirement, JwtRule,
    JwtTokenCache, RemoteJwks,
    decode::{Decoder, Valid},
};
use envoy_types::pb::{
    envoy::{
        config::core::v3::{DataSource, data_source::Specifier, http_uri::HttpUpstreamType},
        extensions::filters::http::jwt_authn::v3::{
            JwtAuthentication, JwtClaimToHeader as ProtoClaim, JwtHeader as ProtoHeader, JwtProvider as ProtoProvider,
            JwtRequirement as ProtoRequirement, PerRouteConfig, RemoteJwks as ProtoRemote, RequirementRule,
            jwt_provider::JwksSourceSpecifier, jwt_requirement::RequiresType, per_route_config::RequirementSpecifier,
            requirement_rule::RequirementType,
        },
    },
    google::protobuf::Duration as ProtoDuration,
};
use http::HeaderName;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Requirements are nested at most so deep.
const MAX_DEPTH: usize = 16;

type Providers = BTreeMap<Arc<str>, Arc<JwtProvider>>;

/// How much longer fetched keys are used while they cannot be fetched again.
const STALE: Duration = Duration::from_secs(3600);

impl Decoder<'_> {
    pub(super) fn jwt(&mut self, proto: JwtAuthentication) -> Valid<JwtConfig> {
        if proto.filter_state_rules.is_some() {
            return Err(self.invalid_at("filter_state_rules", "not supported: no filter sets filter state"));
        }
        let mut providers = Providers::new();
        for (name, proto) in proto.providers {
            let provider = self.at_key("providers", &name, |cx| cx.jwt_provider(proto))?;
            providers.insert(name.into(), Arc::new(provider));
        }
        let mut requirements = BTreeMap::new();
        for (name, proto) in proto.requirement_map {
            let requirement = self.at_key("requirement_map", &name, |cx| cx.jwt_requirement(proto, &providers, 0))?;
            // One that asks for nothing is there for routes that need nothing.
            requirements.insert(name.into(), requirement.unwrap_or(JwtRequirement::All(Vec::new())));
        }
        let mut rules = Vec::with_capacity(proto.rules.len());
        for (index, proto) in proto.rules.into_iter().enumerate() {
            rules.push(self.at_index("rules", index, |cx| cx.jwt_rule(proto, &providers, &requirements))?);
        }
        Ok(JwtConfig {
            providers,
            rules,
            requirements,
            bypass_cors_preflight: proto.bypass_cors_preflight,
            strip_failure_response: proto.strip_failure_response,
        })
    }

    pub(super) fn jwt_of_route(&mut self, proto: PerRouteConfig) -> Valid<JwtOfRoute> {
        match proto.requirement_specifier {
            Some(RequirementSpecifier::Disabled(true)) => Ok(JwtOfRoute::Disabled),
            Some(RequirementSpecifier::Disabled(false)) => {
                Err(self.invalid_at("disabled", "must be true where it is set"))
            }
            Some(RequirementSpecifier::RequirementName(name)) => {
                Ok(JwtOfRoute::Requirement(self.filled("requirement_name", name)?.into()))
            }
            None => Err(self.invalid("has neither disabled nor requirement_name")),
        }
    }

    fn jwt_provider(&mut self, proto: ProtoProvider) -> Valid<JwtProvider> {
        self.ignored(&[
            ("failed_status_in_metadata", !proto.failed_status_in_metadata.is_empty()),
            ("clear_route_cache", proto.clear_route_cache),
        ]);
        let subjects = match proto.subjects {
            Some(matcher) => Some(self.at("subjects", |cx| cx.string_matcher(matcher))?),
            None => None,
        };
        let jwks = match proto.jwks_source_specifier {
            Some(JwksSourceSpecifier::LocalJwks(source)) => self.at("local_jwks", |cx| cx.local_jwks(source))?,
            Some(JwksSourceSpecifier::RemoteJwks(remote)) => self.at("remote_jwks", |cx| cx.remote_jwks(remote))?,
            None => return Err(self.invalid("has neither local_jwks nor remote_jwks")),
        };
        let header = match proto.forward_payload_header.as_str() {
            "" => None,
            name => Some(self.jwt_header_name("forward_payload_header", name)?),
        };
        let skew = if proto.clock_skew_seconds == 0 { 60 } else { proto.clock_skew_seconds };
        Ok(JwtProvider {
            issuer: proto.issuer,
            audiences: proto.audiences,
            subjects,
            require_expiration: proto.require_expiration,
            max_lifetime: self.duration("max_lifetime", proto.max_lifetime)?,
            jwks,
            forward: proto.forward,
            from_headers: self.each("from_headers", proto.from_headers, Self::jwt_header)?,
            from_params: self.each("from_params", proto.from_params, |cx, name| cx.filled("name", name))?,
            from_cookies: self.each("from_cookies", proto.from_cookies, |cx, name| cx.filled("name", name))?,
            forward_payload_header: header,
            pad_forward_payload_header: proto.pad_forward_payload_header,
            payload_in_metadata: proto.payload_in_metadata,
            space_delimited_claims: proto
                .normalize_payload_in_metadata
                .map(|normalize| normalize.space_delimited_claims)
                .unwrap_or_default(),
            header_in_metadata: proto.header_in_metadata,
            clock_skew: Duration::from_secs(skew.into()),
            claim_to_headers: self.each("claim_to_headers", proto.claim_to_headers, Self::claim_to_header)?,
            cache: proto.jwt_cache_config.map(|cache| {
                let or = |value: u32, default| if value == 0 { default } else { value as usize };
                JwtTokenCache { tokens: or(cache.jwt_cache_size, 100), max_length: or(cache.jwt_max_token_size, 4096) }
            }),
        })
    }

    fn local_jwks(&mut self, source: DataSource) -> Valid<JwksSource> {
        let (field, text) = match source.specifier {
            Some(Specifier::InlineString(text)) => ("inline_string", text),
            Some(Specifier::InlineBytes(bytes)) => match String::from_utf8(bytes) {
                Ok(text) => ("inline_bytes", text),
                Err(_) => return Err(self.invalid_at("inline_bytes", "is not text")),
            },
            Some(Specifier::Filename(name)) => return Ok(JwksSource::File(self.filled("filename", name)?.into())),
            Some(Specifier::EnvironmentVariable(name)) => match std::env::var(&name) {
                Ok(text) => ("environment_variable", text),
                Err(error) => return Err(self.invalid_at("environment_variable", format!("{name}: {error}"))),
            },
            None => return Err(self.invalid("has no specifier")),
        };
        match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(set) if set.get("keys").is_some_and(serde_json::Value::is_array) => Ok(JwksSource::Inline(text.into())),
            Ok(_) => Err(self.invalid_at(field, "is not a JSON Web Key Set: has no list \"keys\"")),
            Err(error) => Err(self.invalid_at(field, format!("is not a JSON Web Key Set: {error}"))),
        }
    }

    fn remote_jwks(&mut self, proto: ProtoRemote) -> Valid<JwksSource> {
        let Some(uri) = proto.http_uri else { return Err(self.invalid_at("http_uri", "is missing")) };
        let (address, cluster, timeout) = self.at("http_uri", |cx| {
            let address: http::Uri =
                uri.uri.parse().map_err(|error| cx.invalid_at("uri", format!("\"{}\": {error}", uri.uri)))?;
            if address.host().is_none() {
                return Err(cx.invalid_at("uri", format!("\"{}\" has no host", uri.uri)));
            }
            let Some(HttpUpstreamType::Cluster(cluster)) = uri.http_upstream_type else {
                return Err(cx.invalid_at("cluster", "is missing"));
            };
            let cluster = cx.filled("cluster", cluster)?;
            let Some(timeout) = cx.positive("timeout", uri.timeout)? else {
                return Err(cx.invalid_at("timeout", "is missing"));
            };
            Ok((address, cluster.into(), timeout))
        })?;
        let second = |cx: &mut Self, field, proto: Option<ProtoDuration>, default| {
            Ok(cx.duration(field, proto)?.unwrap_or(default).max(Duration::from_secs(1)))
        };
        let cache_duration = second(self, "cache_duration", proto.cache_duration, Duration::from_secs(600))?;
        let asynchronous = proto.async_fetch.is_some();
        let failed_refetch = self.at("async_fetch", |cx| {
            let failed = proto.async_fetch.and_then(|fetch| fetch.failed_refetch_duration);
            second(cx, "failed_refetch_duration", failed, Duration::from_secs(1))
        })?;
        let retries = proto.retry_policy.map_or(0, |policy| policy.num_retries.map_or(1, |retries| retries.value));
        Ok(JwksSource::Remote(RemoteJwks {
            uri: address,
            cluster,
            timeout,
            cache_duration,
            async_fetch: asynchronous,
            failed_refetch,
            retries: retries.min(10),
            stale: if asynchronous { Duration::MAX } else { STALE },
        }))
    }

    fn jwt_header(&mut self, proto: ProtoHeader) -> Valid<JwtHeader> {
        Ok(JwtHeader { name: self.jwt_header_name("name", &proto.name)?, prefix: proto.value_prefix })
    }

    fn jwt_header_name(&mut self, field: &'static str, name: &str) -> Valid<HeaderName> {
        name.parse().map_err(|_| self.invalid_at(field, format!("\"{name}\" is not the name of a header")))
    }

    fn claim_to_header(&mut self, proto: ProtoClaim) -> Valid<JwtClaimToHeader> {
        let header = self.jwt_header_name("header_name", &proto.header_name)?;
        let path = match (proto.claim_name, proto.claim_path) {
            (name, path) if path.is_empty() => self.filled("claim_name", name)?.split('.').map(str::to_owned).collect(),
            (name, path) if name.is_empty() => {
                self.each("claim_path", path, |cx, segment| cx.filled("key", segment.key))?
            }
            _ => return Err(self.invalid("has both claim_name and claim_path")),
        };
        Ok(JwtClaimToHeader { header, path })
    }

    fn jwt_rule(
        &mut self,
        proto: RequirementRule,
        providers: &Providers,
        named: &BTreeMap<Arc<str>, JwtRequirement>,
    ) -> Valid<JwtRule> {
        let Some(matches) = proto.r#match else { return Err(self.invalid_at("match", "is missing")) };
        let Some(matches) = self.at("match", |cx| cx.route_match(matches))? else {
            return Err(self.invalid_at("match", "asks for what is not known here"));
        };
        let requirement = match proto.requirement_type {
            None => None,
            Some(RequirementType::Requires(requires)) => {
                self.at("requires", |cx| cx.jwt_requirement(requires, providers, 0))?
            }
            Some(RequirementType::RequirementName(name)) => match named.get(name.as_str()) {
                Some(requirement) => Some(requirement.clone()),
                None => {
                    let reason = format!("\"{name}\" is not in the requirement_map");
                    return Err(self.invalid_at("requirement_name", reason));
                }
            },
        };
        Ok(JwtRule { matches, requirement })
    }

    /// `None`: nothing is required.
    fn jwt_requirement(
        &mut self,
        proto: ProtoRequirement,
        providers: &Providers,
        depth: usize,
    ) -> Valid<Option<JwtRequirement>> {
        if depth > MAX_DEPTH {
            return Err(self.invalid(format!("is nested more than {MAX_DEPTH} deep")));
        }
        let provider = |cx: &mut Self, field, name: String, audiences| match providers.get_key_value(name.as_str()) {
            Some((name, _)) => Ok(JwtRequirement::Provider { name: name.clone(), audiences }),
            None => Err(cx.invalid_at(field, format!("provider \"{name}\" is not configured"))),
        };
        let list = |cx: &mut Self, protos: Vec<ProtoRequirement>| {
            if protos.len() < 2 {
                return Err(cx.invalid_at("requirements", "must have at least two"));
            }
            let all = cx.each("requirements", protos, |cx, proto| cx.jwt_requirement(proto, providers, depth + 1))?;
            // One that asks for nothing is always met.
            Ok(all.into_iter().map(|one| one.unwrap_or(JwtRequirement::All(Vec::new()))).collect())
        };
        Ok(Some(match proto.requires_type {
            None => return Ok(None),
            Some(RequiresType::ProviderName(name)) => provider(self, "provider_name", name, None)?,
            Some(RequiresType::ProviderAndAudiences(both)) => {
                let audiences = Some(both.audiences).filter(|audiences| !audiences.is_empty());
                provider(self, "provider_and_audiences.provider_name", both.provider_name, audiences)?
            }
            Some(RequiresType::RequiresAny(any)) => {
                JwtRequirement::OneOf(self.at("requires_any", |cx| list(cx, any.requirements))?)
            }
            Some(RequiresType::RequiresAll(all)) => {
                JwtRequirement::All(self.at("requires_all", |cx| list(cx, all.requirements))?)
            }
            Some(RequiresType::AllowMissing(_)) => JwtRequirement::AllowMissing,
            Some(RequiresType::AllowMissingOrFailed(_)) => JwtRequirement::AllowMissingOrFailed,
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
                return Err(self.invalid_at("extract_only_without_validation", "not supported: tokens are verified"));
            }
        }))
    }
}
