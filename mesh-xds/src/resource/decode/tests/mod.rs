//! Each rule of acceptance and rejection, as a table of one change to a good resource each.

mod cluster;
mod endpoint;
mod fuzz;
mod jwt;
mod listener;
mod rbac;
mod route;
mod secret;
mod server_listener;

use super::*;
use crate::{
    bootstrap::FileWatcher,
    resource::{Credential, Resource, ResourceType},
};
use envoy_types::pb::envoy::config::core::v3::AggregatedConfigSource;
use prost::{Message, Name};

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn unknown(name: &str) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: Vec::new() }
}

fn ads() -> ConfigSource {
    let specifier = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() }
}

fn not_ads() -> ConfigSource {
    ConfigSource { config_source_specifier: Some(ConfigSourceSpecifier::Path("/x".into())), ..ConfigSource::default() }
}

fn seconds(seconds: i64) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds, nanos: 0 })
}

fn uint(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn providers() -> BTreeMap<String, CertificateProvider> {
    let files = FileWatcher {
        certificate_file: Some("cert.pem".into()),
        private_key_file: Some("key.pem".into()),
        ca_certificate_file: Some("ca.pem".into()),
        spiffe_trust_bundle_map_file: None,
        refresh_interval: Duration::from_secs(600),
    };
    BTreeMap::from([
        ("default".to_owned(), CertificateProvider::FileWatcher(files)),
        ("odd".to_owned(), CertificateProvider::Unknown { plugin: "vault".to_owned() }),
    ])
}

fn decode<M: Message>(kind: ResourceType, message: &M) -> Result<(Resource, Vec<Note>), Invalid> {
    let providers = providers();
    let mut decoder = Decoder::new(&providers);
    let resource = Resource::decode(kind, &message.encode_to_vec(), &mut decoder)?;
    Ok((resource, decoder.take_notes()))
}

/// A change to a good resource, and what the error then says: path and part of the reason.
type Case<M> = (&'static str, &'static str, fn(&mut M));

fn rejects<M: Message + Clone>(kind: ResourceType, good: &M, cases: &[Case<M>]) {
    decode(kind, good).expect("the unchanged resource is good");
    for (path, reason, change) in cases {
        let mut bad = good.clone();
        change(&mut bad);
        let error = decode(kind, &bad).err().unwrap_or_else(|| panic!("{path}: {reason}: was accepted"));
        assert_eq!(&error.path, path, "{error}");
        assert!(error.reason.contains(reason), "{error} does not say \"{reason}\"");
    }
}

/// The paths of the notes on an accepted resource.
fn note_paths(notes: &[Note]) -> Vec<&str> {
    notes.iter().map(|note| note.path.as_str()).collect()
}
