//! The JSON form of the bootstrap: every field read, checked and named in errors by its path.

use super::{
    Authority, Bootstrap, BootstrapError, CallCreds, CertificateProvider, ChannelCreds, ENV_CONFIG, ENV_FILE,
    FileWatcher, GrpcService, Node, SdsServer, ServerAddress, ServerConfig, ServerFeatures, Source, Timing, TlsCreds,
    builder::check_authority_template,
};
use crate::resource::LocalityId;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, ffi::OsString, path::Path, time::Duration};

type Object = Map<String, Value>;

/// `(path, reason)`
type Fault = (String, String);

const DEFAULT_REFRESH: Duration = Duration::from_secs(600);

/// Fields of `tls` channel credentials and of `file_watcher`.
const FILES: &[&str] = &[
    "certificate_file",
    "private_key_file",
    "ca_certificate_file",
    "spiffe_trust_bundle_map_file",
    "refresh_interval",
];

/// How words begin that say whom to trust, or how much is asked of them, in the names of fields.
const TRUST: &[&str] = &[
    "ca",
    "cert",
    "root",
    "trust",
    "bundle",
    "spiffe",
    "crl",
    "revo",
    "ocsp",
    "san",
    "subject",
    "issuer",
    "sni",
    "name",
    "host",
    "verif",
    "valid",
    "pin",
    "hash",
    "fingerprint",
    "spki",
    "allow",
    "min",
    "tls",
    "version",
    "cipher",
];

impl Bootstrap {
    /// Reads the bootstrap named by `GRPC_XDS_BOOTSTRAP` (a path, wins) or held by `GRPC_XDS_BOOTSTRAP_CONFIG` (JSON).
    ///
    /// # Errors
    /// Neither variable is set, the file cannot be read, or the content is not valid.
    pub fn from_env() -> Result<Self, BootstrapError> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// [`from_env`](Self::from_env) over any source of variables.
    pub(crate) fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, BootstrapError> {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        if let Some(path) = set(ENV_FILE) {
            let path = Path::new(&path);
            return read(path, Source::EnvFile(path.to_owned()));
        }
        match set(ENV_CONFIG) {
            Some(text) => match text.into_string() {
                Ok(text) => parse(&text, &Source::EnvConfig),
                Err(_) => Err(BootstrapError::Field {
                    origin: Source::EnvConfig,
                    path: "$".to_owned(),
                    reason: "is not UTF-8".to_owned(),
                }),
            },
            None if var(ENV_CONFIG).is_some() => Err(BootstrapError::Empty { origin: Source::EnvConfig }),
            None => Err(BootstrapError::Missing),
        }
    }

    /// Reads a bootstrap file.
    ///
    /// # Errors
    /// The file cannot be read, or its content is not valid.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, BootstrapError> {
        let path = path.as_ref();
        read(path, Source::File(path.to_owned()))
    }

    /// Checks bootstrap JSON.
    ///
    /// # Errors
    /// It is not valid.
    pub fn from_json(json: &str) -> Result<Self, BootstrapError> {
        parse(json, &Source::Json)
    }
}

fn read(path: &Path, origin: Source) -> Result<Bootstrap, BootstrapError> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text, &origin),
        Err(source) => Err(BootstrapError::Read { origin, source }),
    }
}

fn parse(text: &str, origin: &Source) -> Result<Bootstrap, BootstrapError> {
    if text.trim().is_empty() {
        return Err(BootstrapError::Empty { origin: origin.clone() });
    }
    let value: Value =
        serde_json::from_str(text).map_err(|source| BootstrapError::Syntax { origin: origin.clone(), source })?;
    let mut notes = Notes(Vec::new());
    bootstrap(&value, &mut notes)
        .map(|mut bootstrap| {
            bootstrap.notes = notes.0;
            bootstrap
        })
        .map_err(|(path, reason)| BootstrapError::Field { origin: origin.clone(), path, reason })
}

/// What was ignored.
struct Notes(Vec<String>);

impl Notes {
    fn unknown(&mut self, path: &str, object: &Object, known: &[&str]) {
        for key in object.keys().filter(|key| !known.contains(&key.as_str())) {
            self.0.push(format!("{}: unknown field, ignored", join(path, key)));
        }
    }

    /// The same for TLS. A field whose name says that it is about whom to trust is refused: without it more would be trusted than was asked for.
    fn unknown_of_tls(&mut self, path: &str, object: &Object, known: &[&str]) -> Result<(), Fault> {
        let is_about_trust = |key: &str| {
            // the words of `caFile` are those of `ca_file`
            let spaced =
                key.chars().flat_map(|c| [c.is_ascii_uppercase().then_some('_'), Some(c.to_ascii_lowercase())]);
            let spaced: String = spaced.flatten().collect();
            spaced
                .split(|c: char| !c.is_ascii_alphanumeric())
                .any(|word| TRUST.iter().any(|root| word.starts_with(root)))
        };
        if let Some(key) = object.keys().find(|key| !known.contains(&key.as_str()) && is_about_trust(key)) {
            let reason = "unknown field, and not to be ignored: its name says that it is about whom to trust";
            return Err((join(path, key), reason.to_owned()));
        }
        self.unknown(path, object, known);
        Ok(())
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn expected(path: &str, what: &str, value: &Value) -> Fault {
    let path = if path.is_empty() { "$" } else { path };
    (path.to_owned(), format!("expected {what}, found {}", kind(value)))
}

fn object<'a>(path: &str, value: &'a Value) -> Result<&'a Object, Fault> {
    value.as_object().ok_or_else(|| expected(path, "an object", value))
}

/// A field that is absent or null reads as `None`.
fn field<'a>(object: &'a Object, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

fn string(path: &str, object: &Object, key: &str) -> Result<Option<String>, Fault> {
    match field(object, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(expected(&join(path, key), "a string", other)),
    }
}

fn array<'a>(path: &str, object: &'a Object, key: &str) -> Result<&'a [Value], Fault> {
    match field(object, key) {
        None => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(expected(&join(path, key), "an array", other)),
    }
}

fn map<'a>(path: &str, parent: &'a Object, key: &str) -> Result<Vec<(String, &'a String, &'a Object)>, Fault> {
    let Some(value) = field(parent, key) else { return Ok(Vec::new()) };
    let path = join(path, key);
    object(&path, value)?
        .iter()
        .map(|(name, value)| {
            let path = format!("{path}[\"{name}\"]");
            let value = object(&path, value)?;
            Ok((path, name, value))
        })
        .collect()
}

/// `google.protobuf.Duration` in JSON: decimal seconds with an `s`.
fn duration(path: &str, object: &Object, key: &str, default: Duration) -> Result<Duration, Fault> {
    let Some(text) = string(path, object, key)? else { return Ok(default) };
    let bad = || (join(path, key), format!("\"{text}\" is not a positive duration such as \"600s\""));
    let seconds = text.strip_suffix('s').and_then(|number| number.parse::<f64>().ok()).ok_or_else(bad)?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(value) if !value.is_zero() => Ok(value),
        _ => Err(bad()),
    }
}

fn bootstrap(value: &Value, notes: &mut Notes) -> Result<Bootstrap, Fault> {
    let root = object("", value)?;
    notes.unknown(
        "",
        root,
        &[
            "xds_servers",
            "node",
            "certificate_providers",
            "client_default_listener_resource_name_template",
            "server_listener_resource_name_template",
            "authorities",
            "allowed_grpc_services",
        ],
    );
    let servers = servers("", root, notes)?;
    if servers.is_empty() {
        return Err(("xds_servers".to_owned(), "at least one server is needed".to_owned()));
    }
    Ok(Bootstrap {
        servers,
        node: node(root, notes)?,
        certificate_providers: certificate_providers(root, notes)?,
        client_listener_template: string("", root, "client_default_listener_resource_name_template")?
            .filter(|template| !template.is_empty())
            .unwrap_or_else(|| "%s".to_owned()),
        server_listener_template: string("", root, "server_listener_resource_name_template")?
            .filter(|template| !template.is_empty()),
        authorities: authorities(root, notes)?,
        allowed_grpc_services: allowed_grpc_services(root, notes)?,
        timing: Timing::default(),
        notes: Vec::new(),
    })
}

fn servers(path: &str, parent: &Object, notes: &mut Notes) -> Result<Vec<ServerConfig>, Fault> {
    let path = join(path, "xds_servers");
    array("", parent, "xds_servers")
        .map_err(|(_, reason)| (path.clone(), reason))?
        .iter()
        .enumerate()
        .map(|(index, value)| {
            let path = format!("{path}[{index}]");
            server(&path, object(&path, value)?, notes)
        })
        .collect()
}

fn server(path: &str, value: &Object, notes: &mut Notes) -> Result<ServerConfig, Fault> {
    notes.unknown(path, value, &["server_uri", "channel_creds", "call_creds", "server_features"]);
    let uri_path = join(path, "server_uri");
    let uri = string(path, value, "server_uri")?.ok_or_else(|| (uri_path.clone(), "is missing".to_owned()))?;
    let address = ServerAddress::parse(&uri).map_err(|reason| (uri_path, reason))?;
    let mut features = ServerFeatures::default();
    for (index, item) in array(path, value, "server_features")?.iter().enumerate() {
        match item.as_str() {
            Some("xds_v3") => {}
            Some("ignore_resource_deletion") => features.ignore_resource_deletion = true,
            Some("trusted_xds_server") => features.trusted_xds_server = true,
            Some("fail_on_data_errors") => features.fail_on_data_errors = true,
            Some("resource_timer_is_transient_error") => features.resource_timer_is_transient_error = true,
            _ => notes.0.push(format!("{path}.server_features[{index}]: unknown feature {item}, ignored")),
        }
    }
    Ok(ServerConfig {
        uri: uri.into(),
        address,
        channel_creds: channel_creds(path, value, notes)?,
        call_creds: call_creds(path, value, notes)?,
        features,
    })
}

/// The first supported entry wins; it is an error to have none (gRFC A27).
fn channel_creds(path: &str, parent: &Object, notes: &mut Notes) -> Result<ChannelCreds, Fault> {
    let list_path = join(path, "channel_creds");
    let items = array(path, parent, "channel_creds")?;
    let mut skipped = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let path = format!("{list_path}[{index}]");
        let item = object(&path, item)?;
        notes.unknown(&path, item, &["type", "config"]);
        let kind = string(&path, item, "type")?.ok_or_else(|| (join(&path, "type"), "is missing".to_owned()))?;
        match kind.as_str() {
            "insecure" => return Ok(ChannelCreds::Insecure),
            "tls" => return tls_creds(&path, item, notes).map(ChannelCreds::Tls),
            other => {
                notes.0.push(format!("{path}: unsupported channel credentials \"{other}\", ignored"));
                skipped.push(kind);
            }
        }
    }
    let reason = if items.is_empty() {
        "is missing: at least one of \"insecure\", \"tls\" is needed".to_owned()
    } else {
        format!("no supported type (\"insecure\", \"tls\") among [{}]", skipped.join(", "))
    };
    Err((list_path, reason))
}

fn tls_creds(path: &str, item: &Object, notes: &mut Notes) -> Result<TlsCreds, Fault> {
    let path = join(path, "config");
    let empty = Object::new();
    let config = match field(item, "config") {
        Some(value) => object(&path, value)?,
        None => &empty,
    };
    notes.unknown_of_tls(&path, config, FILES)?;
    let files = files(&path, config)?;
    Ok(TlsCreds {
        ca_certificate_file: files.ca_certificate_file,
        spiffe_trust_bundle_map_file: files.spiffe_trust_bundle_map_file,
        certificate_file: files.certificate_file,
        private_key_file: files.private_key_file,
        refresh_interval: files.refresh_interval,
    })
}

/// The files of `tls` channel credentials and of `file_watcher`, which are the same (gRFC A65).
fn files(path: &str, config: &Object) -> Result<FileWatcher, Fault> {
    let file = |key| string(path, config, key).map(|file| file.filter(|file| !file.is_empty()).map(Into::into));
    let files = FileWatcher {
        certificate_file: file("certificate_file")?,
        private_key_file: file("private_key_file")?,
        ca_certificate_file: file("ca_certificate_file")?,
        spiffe_trust_bundle_map_file: file("spiffe_trust_bundle_map_file")?,
        refresh_interval: duration(path, config, "refresh_interval", DEFAULT_REFRESH)?,
    };
    if files.certificate_file.is_some() != files.private_key_file.is_some() {
        return Err((path.to_owned(), "certificate_file and private_key_file must be given together".to_owned()));
    }
    Ok(files)
}

/// Unsupported call credentials are skipped (gRFC A97).
fn call_creds(path: &str, parent: &Object, notes: &mut Notes) -> Result<Vec<CallCreds>, Fault> {
    let list_path = join(path, "call_creds");
    let mut creds = Vec::new();
    for (index, item) in array(path, parent, "call_creds")?.iter().enumerate() {
        let path = format!("{list_path}[{index}]");
        let item = object(&path, item)?;
        match string(&path, item, "type")?.as_deref() {
            Some("jwt_token_file") => {
                let path = join(&path, "config");
                let config = match field(item, "config") {
                    Some(value) => object(&path, value)?,
                    None => return Err((path, "is missing".to_owned())),
                };
                let file = string(&path, config, "jwt_token_file")?
                    .filter(|file| !file.is_empty())
                    .ok_or_else(|| (join(&path, "jwt_token_file"), "is missing".to_owned()))?;
                creds.push(CallCreds::JwtTokenFile(file.into()));
            }
            Some(other) => notes.0.push(format!("{path}: unsupported call credentials \"{other}\", ignored")),
            None => return Err((join(&path, "type"), "is missing".to_owned())),
        }
    }
    Ok(creds)
}

fn node(root: &Object, notes: &mut Notes) -> Result<Node, Fault> {
    let Some(value) = field(root, "node") else { return Ok(Node::default()) };
    let value = object("node", value)?;
    notes.unknown("node", value, &["id", "cluster", "locality", "metadata"]);
    let text = |key| string("node", value, key).map(Option::unwrap_or_default);
    let locality = match field(value, "locality") {
        None => LocalityId::default(),
        Some(locality) => {
            let path = "node.locality";
            let locality = object(path, locality)?;
            // `subzone` is what the first gRFC said.
            notes.unknown(path, locality, &["region", "zone", "sub_zone", "subZone"]);
            let text = |key| string(path, locality, key);
            LocalityId {
                region: text("region")?.unwrap_or_default(),
                zone: text("zone")?.unwrap_or_default(),
                sub_zone: text("sub_zone")?.or(text("subZone")?).unwrap_or_default(),
            }
        }
    };
    let metadata = match field(value, "metadata") {
        None => Object::new(),
        Some(metadata) => object("node.metadata", metadata)?.clone(),
    };
    Ok(Node { id: text("id")?, cluster: text("cluster")?, locality, metadata })
}

fn certificate_providers(root: &Object, notes: &mut Notes) -> Result<BTreeMap<String, CertificateProvider>, Fault> {
    let mut providers = BTreeMap::new();
    for (path, name, value) in map("", root, "certificate_providers")? {
        notes.unknown(&path, value, &["plugin_name", "config"]);
        let plugin = string(&path, value, "plugin_name")?
            .filter(|plugin| !plugin.is_empty())
            .ok_or_else(|| (join(&path, "plugin_name"), "is missing".to_owned()))?;
        let provider = match plugin.as_str() {
            "file_watcher" => CertificateProvider::FileWatcher(file_watcher(&path, value, notes)?),
            "sds" => CertificateProvider::Sds(sds(&path, value, notes)?),
            _ => {
                notes.0.push(format!("{path}: unknown plugin \"{plugin}\", resources that use it will be rejected"));
                CertificateProvider::Unknown { plugin }
            }
        };
        providers.insert(name.clone(), provider);
    }
    Ok(providers)
}

fn sds(path: &str, value: &Object, notes: &mut Notes) -> Result<SdsServer, Fault> {
    let path = join(path, "config");
    let config = match field(value, "config") {
        Some(config) => object(&path, config)?,
        None => return Err((path, "is missing".to_owned())),
    };
    notes.unknown(&path, config, &["server_uri", "channel_creds", "call_creds", "certificate_name", "root_name"]);
    let uri_path = join(&path, "server_uri");
    let uri = string(&path, config, "server_uri")?.ok_or_else(|| (uri_path.clone(), "is missing".to_owned()))?;
    let address = ServerAddress::parse(&uri).map_err(|reason| (uri_path, reason))?;
    let channel_creds = match field(config, "channel_creds") {
        Some(_) => channel_creds(&path, config, notes)?,
        // Keys are sent over it.
        None if !address.is_local() => {
            let reason =
                "is missing: keys would be sent in the clear to another machine, which has to be said".to_owned();
            return Err((join(&path, "channel_creds"), reason));
        }
        None => ChannelCreds::Insecure,
    };
    let call_creds = call_creds(&path, config, notes)?;
    let name = |key, default: &str| {
        let name = string(&path, config, key)?.unwrap_or_else(|| default.to_owned());
        Ok::<_, Fault>(Some(name).filter(|name| !name.is_empty()))
    };
    let (certificate, roots) = (name("certificate_name", "default")?, name("root_name", "ROOTCA")?);
    if certificate.is_none() && roots.is_none() {
        return Err((path, "names no certificate_name and no root_name".to_owned()));
    }
    let features = ServerFeatures::default();
    let server = ServerConfig { uri: uri.into(), address, channel_creds, call_creds, features };
    Ok(SdsServer { server, certificate, roots })
}

fn file_watcher(path: &str, value: &Object, notes: &mut Notes) -> Result<FileWatcher, Fault> {
    let path = join(path, "config");
    let config = match field(value, "config") {
        Some(config) => object(&path, config)?,
        None => return Err((path, "is missing".to_owned())),
    };
    notes.unknown_of_tls(&path, config, FILES)?;
    let watcher = files(&path, config)?;
    if watcher.certificate_file.is_none()
        && watcher.ca_certificate_file.is_none()
        && watcher.spiffe_trust_bundle_map_file.is_none()
    {
        return Err((
            path,
            "names no certificate_file, ca_certificate_file or spiffe_trust_bundle_map_file".to_owned(),
        ));
    }
    Ok(watcher)
}

fn authorities(root: &Object, notes: &mut Notes) -> Result<BTreeMap<String, Authority>, Fault> {
    let mut authorities = BTreeMap::new();
    for (path, name, value) in map("", root, "authorities")? {
        notes.unknown(
            &path,
            value,
            &["client_listener_resource_name_template", "xds_servers", "fallback_on_reachability_only"],
        );
        let key = "client_listener_resource_name_template";
        let client_listener_template = string(&path, value, key)?.filter(|template| !template.is_empty());
        if let Some(template) = &client_listener_template {
            check_authority_template(name, template).map_err(|reason| (join(&path, key), reason))?;
        }
        let servers = servers(&path, value, notes)?;
        authorities.insert(name.clone(), Authority { client_listener_template, servers });
    }
    Ok(authorities)
}

fn allowed_grpc_services(root: &Object, notes: &mut Notes) -> Result<BTreeMap<String, GrpcService>, Fault> {
    let mut services = BTreeMap::new();
    for (path, target, value) in map("", root, "allowed_grpc_services")? {
        notes.unknown(&path, value, &["channel_creds", "call_creds"]);
        let service = GrpcService {
            channel_creds: channel_creds(&path, value, notes)?,
            call_creds: call_creds(&path, value, notes)?,
        };
        services.insert(target.clone(), service);
    }
    Ok(services)
}
