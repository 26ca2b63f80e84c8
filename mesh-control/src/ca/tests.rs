use super::*;
use mesh_tls::{Acceptor, ClientSettings, ClientTls, FileSource, FileSourceConfig, ServerSettings, default_provider};
use std::time::SystemTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn authority(dir: &Path) -> CertificateAuthority {
    CertificateAuthority::open(dir, "cluster.local", DEFAULT_LIFETIME).unwrap()
}

fn read(dir: &Path) -> [String; 3] {
    ["cert.pem", "key.pem", "ca.pem"].map(|name| std::fs::read_to_string(dir.join(name)).unwrap())
}

/// The files as clients and servers read them: a key that is not the certificate's is refused here.
fn identity(dir: &Path) -> mesh_tls::Identity {
    let [certificate, key, _] = read(dir);
    mesh_tls::Identity::from_pem(certificate.as_bytes(), key.as_bytes(), &default_provider()).unwrap()
}

fn source(dir: &Path) -> Arc<FileSource> {
    let mut config = FileSourceConfig::new("test", default_provider());
    config.certificate_file = Some(dir.join("cert.pem"));
    config.private_key_file = Some(dir.join("key.pem"));
    config.ca_certificate_file = Some(dir.join("ca.pem"));
    Arc::new(FileSource::new(config, &tokio::runtime::Handle::current()).unwrap())
}

#[tokio::test]
async fn identities_of_a_created_and_of_the_reloaded_root_trust_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    let created = authority(&path);
    let loaded = authority(&path);
    assert_eq!(created.root_pem(), loaded.root_pem());
    let client = source(&created.issue("default", "client").unwrap());
    let server = source(&loaded.issue("prod", "greeter").unwrap());

    let client = ClientTls::new(ClientSettings::mtls(client), default_provider()).unwrap();
    let server = Acceptor::new(ServerSettings::mtls(server), default_provider()).unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let connect = async {
        let (mut stream, peer) = client.connect(near, None).await.unwrap();
        stream.read_u8().await.unwrap();
        peer.spiffe_id().unwrap().to_string()
    };
    let accept = async {
        let mut accepted = server.accept(far).await.unwrap();
        accepted.write_u8(1).await.unwrap();
        accepted.flush().await.unwrap();
        accepted.peer().unwrap().spiffe_id().unwrap().to_string()
    };
    let (seen_by_client, seen_by_server) = tokio::join!(connect, accept);
    assert_eq!(seen_by_client, "spiffe://cluster.local/ns/prod/sa/greeter");
    assert_eq!(seen_by_server, "spiffe://cluster.local/ns/default/sa/client");
}

#[cfg(unix)]
#[test]
fn everything_is_for_the_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/ca");
    let identity = authority(&path).issue("default", "client").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for folder in [&path, &identity, &path.join("ns")] {
        assert_eq!(mode(folder), 0o700, "{}", folder.display());
    }
    for file in [path.join("ca-key.pem"), path.join("ca.pem"), identity.join("key.pem"), identity.join("cert.pem")] {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}

/// What an authority says of a folder of which a part has this mode.
#[cfg(unix)]
fn opened_with(dir: &Path, part: &str, mode: u32) -> Result<CertificateAuthority, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let part = dir.join(part);
    let before = std::fs::metadata(&part).unwrap().permissions();
    std::fs::set_permissions(&part, std::fs::Permissions::from_mode(mode)).unwrap();
    let opened = CertificateAuthority::open(dir, "cluster.local", DEFAULT_LIFETIME);
    let found = std::fs::metadata(dir).unwrap().permissions().mode() & 0o777;
    assert!(opened.is_err() || found == 0o700, "{found:o}");
    std::fs::set_permissions(&part, before).unwrap();
    opened.map_err(|error| error.to_string())
}

#[cfg(unix)]
#[test]
fn folders_and_keys_that_others_can_open_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    authority(&path);
    for (part, mode, remedy) in [
        ("", 0o755, "chmod 700"),
        ("", 0o701, "chmod 700"),
        ("ca-key.pem", 0o640, "chmod 600"),
        ("jwt-key.pem", 0o604, "chmod 600"),
        ("ca.pem", 0o664, "chmod go-w"),
    ] {
        let error = opened_with(&path, part, mode).unwrap_err();
        let named = path.join(part);
        let named = named.to_str().unwrap().trim_end_matches('/');
        for said in [named, &format!("its mode is {mode:03o}"), remedy] {
            assert!(error.contains(said), "{part} {mode:o}: {error}");
        }
    }
    opened_with(&path, "ca.pem", 0o644).expect("certificates are no secret");
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    opened_with(&empty, "", 0o755).expect("nobody has put anything into it");
    // Of no folder that is refused something is left behind, or taken for ours.
    let names: Vec<_> = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
}

#[cfg(unix)]
#[test]
fn a_folder_of_somebody_else_is_refused() {
    use std::os::unix::fs::{MetadataExt as _, chown};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    authority(&path);
    let us = std::fs::metadata(&path).unwrap().uid();
    let key = path.join("ca-key.pem");
    // Only root can give files away.
    if chown(&key, Some(us + 1), None).is_err() {
        return;
    }
    let error = CertificateAuthority::open(&path, "cluster.local", DEFAULT_LIFETIME).unwrap_err().to_string();
    assert!(error.contains("ca-key.pem") && error.contains(&format!("belongs to user {}", us + 1)), "{error}");
    chown(&key, Some(us), None).unwrap();
    chown(&path, Some(us + 1), None).unwrap();
    let error = CertificateAuthority::open(&path, "cluster.local", DEFAULT_LIFETIME).unwrap_err().to_string();
    assert!(error.contains("/ca:") && error.contains(&format!("belongs to user {}", us + 1)), "{error}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_socket_is_made_where_nobody_else_is_and_replaces_only_sockets() {
    use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
    let dir = tempfile::tempdir().unwrap();
    // The folder itself is open: what is within is not, at any moment.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = dir.path().join("api.sock");
    for _ in 0..2 {
        let listener = files::bind_private(&path).unwrap();
        let made = std::fs::symlink_metadata(&path).unwrap();
        assert!(made.file_type().is_socket() && made.permissions().mode() & 0o777 == 0o600);
        let (client, server) = tokio::join!(tokio::net::UnixStream::connect(&path), listener.accept());
        assert!(client.is_ok() && server.is_ok());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    assert_eq!(files::bind_private(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn certificate_says_who_for_how_long() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::open(dir.path(), "example.org", Duration::from_secs(600)).unwrap();
    let identity = identity(&ca.issue("default", "client").unwrap());
    assert_eq!(identity.spiffe_id().unwrap().as_str(), "spiffe://example.org/ns/default/sa/client");
    let left = identity.not_after().duration_since(SystemTime::now()).unwrap();
    assert!(left <= Duration::from_secs(600) && left > Duration::from_secs(500), "{left:?}");
}

#[test]
fn rotation_replaces_the_pair_at_once_and_keeps_only_the_version_before() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority(dir.path());
    let folder = ca.issue("default", "client").unwrap();
    ca.issue("default", "greeter").unwrap();
    let before = read(&folder);
    for _ in 0..4 {
        ca.rotate_all().unwrap();
        identity(&folder);
    }
    let after = read(&folder);
    assert!(before[0] != after[0] && before[1] != after[1]);
    assert_eq!(before[2], after[2], "the root stays");
    let versions = std::fs::read_dir(&folder).unwrap().flatten();
    let versions = versions.filter(|e| e.file_name().to_string_lossy().starts_with("..v")).count();
    assert_eq!(versions, 2);
}

#[test]
fn a_new_process_takes_over_the_folders_of_an_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let folder = authority(dir.path()).issue("default", "client").unwrap();
    let before = read(&folder);
    let again = authority(dir.path());
    assert_eq!(again.identities(), []);
    assert_eq!(again.ensure("default", "client").unwrap(), folder);
    assert_ne!(read(&folder)[0], before[0]);
    let unchanged = read(&folder);
    again.ensure("default", "client").unwrap();
    assert_eq!(read(&folder), unchanged, "issued once by one authority");
}

#[tokio::test(start_paused = true)]
async fn identities_are_renewed_at_half_of_their_lifetime() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::open(dir.path(), "cluster.local", Duration::from_secs(600)).unwrap();
    let renewal = tokio::spawn(ca.clone().renew());
    let folder = ca.issue("default", "client").unwrap();
    let first = read(&folder)[0].clone();
    tokio::time::sleep(Duration::from_secs(299)).await;
    assert_eq!(read(&folder)[0], first);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let second = read(&folder)[0].clone();
    assert_ne!(second, first);
    // Issued in between: the other one is due first, and this one again 300 s later.
    tokio::time::sleep(Duration::from_secs(301)).await;
    assert_ne!(read(&folder)[0], second);
    renewal.abort();
}

#[test]
fn names_that_would_leave_the_folder_or_the_id_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority(dir.path());
    for (namespace, account) in [("..", "a"), ("a", "b/c"), ("", "a"), ("a", "b c"), ("a", "é")] {
        assert!(matches!(ca.issue(namespace, account), Err(Error::Name(_))), "{namespace}/{account}");
    }
}

#[test]
fn a_root_that_cannot_be_used_is_an_error_and_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    files::outermost_dir(dir.path()).unwrap();
    files::write_private(&dir.path().join("ca-key.pem"), "no key").unwrap();
    files::write_private(&dir.path().join("ca.pem"), "no certificate").unwrap();
    let error = CertificateAuthority::open(dir.path(), "cluster.local", DEFAULT_LIFETIME).unwrap_err();
    assert!(matches!(&error, Error::Certificate { path, .. } if path.ends_with("ca-key.pem")), "{error}");
    assert_eq!(std::fs::read_to_string(dir.path().join("ca-key.pem")).unwrap(), "no key");
}

/// Certificates and roots that are in memory.
fn given(dir: &Path, roots: &str) -> Arc<mesh_tls::MemorySource> {
    let roots = mesh_tls::TrustRoots::from_pem(roots.as_bytes()).unwrap();
    Arc::new(mesh_tls::MemorySource::new("test", Some(identity(dir)), Some(Arc::new(roots))))
}

/// Whether a workload that holds these certificates now is taken by somebody who trusts these roots.
async fn trusted(dir: &Path, roots: &str) -> bool {
    let client = ClientTls::new(ClientSettings::mtls(given(dir, roots)), default_provider()).unwrap();
    let server = Acceptor::new(ServerSettings::mtls(given(dir, roots)), default_provider()).unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (connected, accepted) = tokio::join!(client.connect(near, None), server.accept(far));
    connected.is_ok() && accepted.is_ok()
}

#[tokio::test(start_paused = true)]
async fn a_root_is_trusted_before_it_signs_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::open(dir.path(), "cluster.local", Duration::from_secs(600)).unwrap();
    let renewal = tokio::spawn(ca.clone().renew());
    let folder = ca.issue("default", "client").unwrap();
    let first = ca.root_pem();
    assert!(trusted(&folder, &first).await);

    ca.rotate_root().unwrap();
    let both = ca.root_pem();
    assert_eq!(both.matches("BEGIN").count(), 2);
    assert_eq!(read(&folder)[2], both, "workloads hear of it at once");
    assert!(trusted(&folder, &first).await, "who has not heard of it yet goes on");
    assert!(matches!(ca.rotate_root(), Err(Error::Rotating)));

    // Another process takes over in the middle.
    let again = CertificateAuthority::open(dir.path(), "cluster.local", Duration::from_secs(600)).unwrap();
    assert_eq!(again.root_pem(), both);

    tokio::time::sleep(Duration::from_secs(601)).await;
    assert!(!trusted(&folder, &first).await, "the new root signs");
    assert!(trusted(&folder, &both).await);
    assert_eq!(ca.root_pem().matches("BEGIN").count(), 2, "certificates of the old one are still about");

    tokio::time::sleep(Duration::from_secs(600)).await;
    let second = ca.root_pem();
    assert_eq!(second.matches("BEGIN").count(), 1);
    assert_ne!(second, first);
    assert!(trusted(&folder, &second).await);
    let later = CertificateAuthority::open(dir.path(), "cluster.local", Duration::from_secs(600)).unwrap();
    assert_eq!(later.root_pem(), second);
    renewal.abort();
}

#[test]
fn an_authority_in_memory_writes_no_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca");
    let ca = CertificateAuthority::in_memory(&path, "cluster.local", DEFAULT_LIFETIME).unwrap();
    let folder = ca.issue("default", "client").unwrap();
    ca.rotate_root().unwrap();
    assert!(folder.join("token").exists() && folder.join("ca.pem").exists() && !folder.join("cert.pem").exists());
    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
    }
    for file in files(&path) {
        assert!(!std::fs::read_to_string(&file).unwrap().contains("PRIVATE"), "{}", file.display());
    }
    let kept = tempfile::tempdir().unwrap();
    authority(kept.path());
    let error = CertificateAuthority::in_memory(kept.path(), "cluster.local", DEFAULT_LIFETIME).unwrap_err();
    assert!(matches!(error, Error::Kept(_)), "{error}");
}

#[test]
fn a_signed_request_has_the_callers_name_whatever_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority(dir.path());
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::new(vec!["www.example.com".to_owned()]).unwrap().serialize_request(&key).unwrap();
    let id: SpiffeId = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
    let [leaf, roots] = ca.sign(&request.pem().unwrap(), &id, Some(Duration::from_secs(60))).unwrap();
    assert_eq!(roots, ca.root_pem());
    let signed =
        mesh_tls::Identity::from_pem(leaf.as_bytes(), key.serialize_pem().as_bytes(), &default_provider()).unwrap();
    assert_eq!(signed.name(), id.as_str());
    let left = signed.not_after().duration_since(SystemTime::now()).unwrap();
    assert!(left <= Duration::from_secs(60), "{left:?}");
    for bad in ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
        assert!(matches!(ca.sign(bad, &id, None), Err(Error::Request(_))), "{bad}");
    }
}
