//! AuthorizationPolicies as RBAC filters: AUDIT, then DENY, then ALLOW. The permissions and principals are istiod's
//! (`pilot/pkg/security/authz`).

#![allow(deprecated, reason = "the fields that Istio sets")]

use super::{cidr, filter};
use crate::model::{Attribute, Authorization, AuthzAction, Clause, IpBlock, Rule};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::TypedExtensionConfig,
                rbac::v3::{Permission, Policy, Principal, Rbac, permission, principal, rbac},
                route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier},
            },
            extensions::{
                filters::{http::rbac::v3::Rbac as HttpRbac, network::http_connection_manager::v3::HttpFilter},
                path::r#match::uri_template::v3::UriTemplateMatchConfig,
            },
            r#type::matcher::v3::{
                ListMatcher, MetadataMatcher, OrMatcher, PathMatcher, RegexMatcher, StringMatcher, ValueMatcher,
                list_matcher, metadata_matcher, path_matcher, string_matcher::MatchPattern, value_matcher,
            },
        },
        google::protobuf::Any,
    },
    util::pack_any,
};
use permission::Rule as Allows;
use principal::Identifier;
use std::collections::BTreeMap;

/// Where the verified payload of a token is found.
const JWT: &str = "envoy.filters.http.jwt_authn";
pub(super) const PAYLOAD: &str = "payload";

/// Field numbers of `envoy.extensions.filters.http.rbac.v3.RBAC`.
const RULES: u8 = 1;
const SHADOW_RULES: u8 = 2;

/// The filters of a workload, in the order in which they stand.
pub(super) fn filters(policies: &[&Authorization]) -> Vec<HttpFilter> {
    let actions = [
        (AuthzAction::Audit, rbac::Action::Log, "envoy.filters.http.rbac.AUDIT"),
        (AuthzAction::Deny, rbac::Action::Deny, "envoy.filters.http.rbac.DENY"),
        (AuthzAction::Allow, rbac::Action::Allow, "envoy.filters.http.rbac"),
    ];
    actions
        .into_iter()
        .filter_map(|(action, as_rbac, name)| {
            let (mut enforced, mut shadow) = (BTreeMap::new(), BTreeMap::new());
            for policy in policies {
                match &policy.refused {
                    // What cannot be honoured denies everything; a policy on trial denies nothing.
                    Some(_) if action == AuthzAction::Deny && !policy.dry_run => {
                        enforced.insert(format!("{}-refused", policy_name(policy)), everything());
                    }
                    None if policy.action == action => {
                        let rules = if policy.dry_run { &mut shadow } else { &mut enforced };
                        rules.extend(translated(policy));
                    }
                    _ => {}
                }
            }
            let mut config = Vec::new();
            for (number, policies, prefix) in [(RULES, enforced, ""), (SHADOW_RULES, shadow, "istio_dry_run_")] {
                if !policies.is_empty() {
                    field(&mut config, number, &rules(as_rbac, policies));
                    if !prefix.is_empty() {
                        let said = if action == AuthzAction::Allow { "allow_" } else { "deny_" };
                        let prefix =
                            HttpRbac { shadow_rules_stat_prefix: format!("{prefix}{said}"), ..HttpRbac::default() };
                        config.extend(pack_any(prefix).value);
                    }
                }
            }
            let type_url = pack_any(HttpRbac::default()).type_url;
            (!config.is_empty()).then(|| filter(name, Any { type_url, value: config }))
        })
        .collect()
}

/// An encoded `RBAC` with its policies in order: maps of the generated types have none, and the same model yields the same bytes.
fn rules(action: rbac::Action, policies: BTreeMap<String, Policy>) -> Vec<u8> {
    let mut bytes = pack_any(Rbac { action: action.into(), ..Rbac::default() }).value;
    for entry in policies {
        bytes.extend(pack_any(Rbac { policies: [entry].into(), ..Rbac::default() }).value);
    }
    bytes
}

/// Appends a length-delimited field.
fn field(bytes: &mut Vec<u8>, number: u8, content: &[u8]) {
    bytes.push(number << 3 | 2);
    let mut length = content.len();
    while length >= 0x80 {
        bytes.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
        length >>= 7;
    }
    bytes.push(u8::try_from(length).unwrap_or_default());
    bytes.extend_from_slice(content);
}

fn policy_name(policy: &Authorization) -> String {
    format!("ns[{}]-policy[{}]", policy.object.namespace, policy.object.name.value)
}

fn translated(policy: &Authorization) -> Vec<(String, Policy)> {
    let name = policy_name(policy);
    if policy.rules.is_empty() {
        // It matches nothing, which for ALLOW says: nobody.
        return vec![(format!("{name}-rule[0]"), nothing())];
    }
    let rule = |(index, rule): (usize, &Rule)| (format!("{name}-rule[{index}]"), one(rule, &policy.object.namespace));
    policy.rules.iter().enumerate().map(rule).collect()
}

fn everything() -> Policy {
    Policy { permissions: vec![any_permission()], principals: vec![any_principal()], ..Policy::default() }
}

fn nothing() -> Policy {
    Policy {
        permissions: vec![not_permission(any_permission())],
        principals: vec![not_principal(any_principal())],
        ..Policy::default()
    }
}

fn one(rule: &Rule, namespace: &str) -> Policy {
    let everybody = [Vec::new()];
    let from = if rule.from.is_empty() { &everybody } else { rule.from.as_slice() };
    let to = if rule.to.is_empty() { &everybody } else { rule.to.as_slice() };
    let (of_caller, of_request): (Vec<&Clause>, Vec<&Clause>) = rule.when.iter().partition(|c| is_of_caller(c));
    let permissions = to.iter().map(|clauses| {
        let clauses = clauses.iter().chain(of_request.iter().copied());
        let parts: Vec<_> = clauses.flat_map(permissions).collect();
        let rules = if parts.is_empty() { vec![any_permission()] } else { parts };
        permission(Allows::AndRules(permission::Set { rules }))
    });
    let principals = from.iter().map(|clauses| {
        let clauses = clauses.iter().chain(of_caller.iter().copied());
        let parts: Vec<_> = clauses.flat_map(|clause| principals(clause, namespace)).collect();
        let ids = if parts.is_empty() { vec![any_principal()] } else { parts };
        principal(Identifier::AndIds(principal::Set { ids }))
    });
    Policy { permissions: permissions.collect(), principals: principals.collect(), ..Policy::default() }
}

fn is_of_caller(clause: &Clause) -> bool {
    use Attribute::{ConnectionSni, DestinationIp, DestinationPort, Host, Method, Path};
    !matches!(clause.attribute, DestinationIp | DestinationPort | ConnectionSni | Host | Method | Path)
}

/// Any of the values, and none of the others.
fn permissions(clause: &Clause) -> Vec<Permission> {
    let any_of = |values: &[String]| {
        let rules = values.iter().map(|value| permission(allows(&clause.attribute, value))).collect();
        permission(Allows::OrRules(permission::Set { rules }))
    };
    let yes = (!clause.values.is_empty()).then(|| any_of(&clause.values));
    let no = (!clause.not_values.is_empty()).then(|| not_permission(any_of(&clause.not_values)));
    yes.into_iter().chain(no).collect()
}

fn allows(attribute: &Attribute, value: &str) -> Allows {
    match attribute {
        Attribute::Host => Allows::Header(header(":authority", value, true)),
        Attribute::Method => Allows::Header(header(":method", value, false)),
        Attribute::Path if value.contains('{') => {
            let template = value.replace("{**}", "**").replace("{*}", "*");
            Allows::UriTemplate(TypedExtensionConfig {
                name: "uri-template".to_owned(),
                typed_config: Some(pack_any(UriTemplateMatchConfig { path_template: template })),
            })
        }
        Attribute::Path => Allows::UrlPath(PathMatcher { rule: Some(path_matcher::Rule::Path(string(value, ""))) }),
        Attribute::DestinationIp => match IpBlock::parse(value) {
            Some(block) => Allows::DestinationIp(cidr(block)),
            None => never(),
        },
        Attribute::DestinationPort => {
            value.parse::<u16>().map_or_else(|_| never(), |p| Allows::DestinationPort(p.into()))
        }
        Attribute::ConnectionSni => Allows::RequestedServerName(string(value, "")),
        // Of the caller: not asked for here.
        _ => never(),
    }
}

/// As above.
fn principals(clause: &Clause, namespace: &str) -> Vec<Principal> {
    let any_of = |values: &[String]| match &clause.attribute {
        Attribute::RequestAudiences => claim(vec!["aud".to_owned()], values),
        Attribute::RequestPresenter => claim(vec!["azp".to_owned()], values),
        Attribute::RequestClaim(path) => claim(path.clone(), values),
        attribute => {
            let ids = values.iter().map(|value| principal(identifier(attribute, value, namespace))).collect();
            principal(Identifier::OrIds(principal::Set { ids }))
        }
    };
    let yes = (!clause.values.is_empty()).then(|| any_of(&clause.values));
    let no = (!clause.not_values.is_empty()).then(|| not_principal(any_of(&clause.not_values)));
    yes.into_iter().chain(no).collect()
}

fn identifier(attribute: &Attribute, value: &str, namespace: &str) -> Identifier {
    let authenticated = |name| Identifier::Authenticated(principal::Authenticated { principal_name: Some(name) });
    let address = |make: fn(_) -> Identifier| IpBlock::parse(value).map_or_else(nobody, |block| make(cidr(block)));
    match attribute {
        Attribute::SourcePrincipal => authenticated(string(value, "spiffe://")),
        Attribute::SourceNamespace => {
            let pattern: Vec<_> = value.split('*').map(escaped).collect();
            authenticated(regex(format!(".*/ns/{}/.*", pattern.join(".*"))))
        }
        Attribute::SourceServiceAccount => {
            let (namespace, account) = value.split_once('/').unwrap_or((namespace, value));
            let (namespace, account) = (escaped(namespace), escaped(account));
            authenticated(regex(format!("spiffe://.+/ns/{namespace}/(.+/|)sa/{account}(/.+)?")))
        }
        Attribute::SourceIp => address(Identifier::DirectRemoteIp),
        Attribute::RemoteIp => address(Identifier::RemoteIp),
        Attribute::RequestPrincipal => request_principal(value),
        Attribute::RequestHeader(name) => Identifier::Header(header(name, value, false)),
        // Of the request: not asked for here.
        _ => nobody(),
    }
}

/// `ISSUER/SUBJECT`, split at the last slash: an issuer may be a URL.
fn request_principal(value: &str) -> Identifier {
    let some = || regex(".+".to_owned());
    let split = value.rsplit_once('/');
    let (issuer, subject) = match (value, split) {
        ("*", _) => (some(), some()),
        (_, Some(("*", subject))) => (some(), exact(subject)),
        (_, Some((issuer, subject))) if issuer.starts_with('*') => (suffix(&issuer[1..]), exact(subject)),
        (_, Some((issuer, "*"))) => (exact(issuer), some()),
        (_, Some((issuer, subject))) if subject.ends_with('*') => {
            (exact(issuer), prefix(&subject[..subject.len() - 1]))
        }
        (_, Some((issuer, subject))) => (exact(issuer), exact(subject)),
        (_, None) if value.starts_with('*') => (some(), suffix(&value[1..])),
        (_, None) if value.ends_with('*') => (prefix(&value[..value.len() - 1]), some()),
        (_, None) => (exact(value), exact("")),
    };
    let one = |name: &str, matcher| {
        let value = ValueMatcher { match_pattern: Some(value_matcher::MatchPattern::StringMatch(matcher)) };
        principal(Identifier::Metadata(metadata(vec![name.to_owned()], value)))
    };
    Identifier::AndIds(principal::Set { ids: vec![one("iss", issuer), one("sub", subject)] })
}

/// A claim that is one of the values, or a list with one of them.
fn claim(path: Vec<String>, values: &[String]) -> Principal {
    let matcher = |pattern| ValueMatcher { match_pattern: Some(pattern) };
    let strings = values.iter().map(|v| matcher(value_matcher::MatchPattern::StringMatch(string(v, ""))));
    let mut strings: Vec<_> = strings.collect();
    let any = match strings.len() {
        1 => strings.remove(0),
        _ => matcher(value_matcher::MatchPattern::OrMatch(OrMatcher { value_matchers: strings })),
    };
    let listed = ListMatcher { match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(any.clone()))) };
    let listed = matcher(value_matcher::MatchPattern::ListMatch(Box::new(listed)));
    let value = matcher(value_matcher::MatchPattern::OrMatch(OrMatcher { value_matchers: vec![listed, any] }));
    principal(Identifier::Metadata(metadata(path, value)))
}

fn metadata(path: Vec<String>, value: ValueMatcher) -> MetadataMatcher {
    let segment =
        |key| metadata_matcher::PathSegment { segment: Some(metadata_matcher::path_segment::Segment::Key(key)) };
    MetadataMatcher {
        filter: JWT.to_owned(),
        path: std::iter::once(PAYLOAD.to_owned()).chain(path).map(segment).collect(),
        value: Some(value),
        invert: false,
    }
}

fn header(name: &str, value: &str, ignore_case: bool) -> HeaderMatcher {
    let specifier = match value {
        "*" => HeaderMatchSpecifier::PresentMatch(true),
        _ => HeaderMatchSpecifier::StringMatch(StringMatcher { ignore_case, ..string(value, "") }),
    };
    HeaderMatcher { name: name.to_owned(), header_match_specifier: Some(specifier), ..HeaderMatcher::default() }
}

/// `*`, `*SUFFIX`, `PREFIX*`, or the value itself, of what begins with `before`.
fn string(value: &str, before: &str) -> StringMatcher {
    match (value.strip_prefix('*'), value.strip_suffix('*')) {
        (Some(""), _) => regex(".+".to_owned()),
        (Some(end), _) if before.is_empty() => suffix(end),
        (Some(end), _) => regex(format!("{before}.*{}", escaped(end))),
        (None, Some(begin)) => prefix(&format!("{before}{begin}")),
        (None, None) => exact(&format!("{before}{value}")),
    }
}

/// As a regular expression for itself.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut all, c| {
        if r"\.+*?()|[]{}^$".contains(c) {
            all.push('\\');
        }
        all.push(c);
        all
    })
}

fn pattern(pattern: MatchPattern) -> StringMatcher {
    StringMatcher { match_pattern: Some(pattern), ignore_case: false }
}

fn exact(text: &str) -> StringMatcher {
    pattern(MatchPattern::Exact(text.to_owned()))
}

fn prefix(text: &str) -> StringMatcher {
    pattern(MatchPattern::Prefix(text.to_owned()))
}

fn suffix(text: &str) -> StringMatcher {
    pattern(MatchPattern::Suffix(text.to_owned()))
}

fn regex(regex: String) -> StringMatcher {
    pattern(MatchPattern::SafeRegex(RegexMatcher { regex, ..RegexMatcher::default() }))
}

fn permission(rule: Allows) -> Permission {
    Permission { rule: Some(rule) }
}

fn principal(identifier: Identifier) -> Principal {
    Principal { identifier: Some(identifier) }
}

fn any_permission() -> Permission {
    permission(Allows::Any(true))
}

fn any_principal() -> Principal {
    principal(Identifier::Any(true))
}

fn not_permission(of: Permission) -> Permission {
    permission(Allows::NotRule(Box::new(of)))
}

fn not_principal(of: Principal) -> Principal {
    principal(Identifier::NotId(Box::new(of)))
}

/// For values that were refused when they were read.
fn never() -> Allows {
    Allows::NotRule(Box::new(any_permission()))
}

fn nobody() -> Identifier {
    Identifier::NotId(Box::new(any_principal()))
}
