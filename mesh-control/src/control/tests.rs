use super::*;
use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DiscoveryRequest, DiscoveryResponse, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    google::rpc,
};
use examples::port::Port;
use mesh_xds::server::{Any, ResourceType};
use std::path::Path;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const SERVICE: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter}
spec:
  hosts: [greeter]
  resolution: STATIC
  ports: [{number: 50051, name: grpc, protocol: GRPC}]
  endpoints: [{address: 127.0.0.1, ports: {grpc: 6001}, serviceAccount: greeter}]
";
const CLUSTER: &str = "outbound|50051||greeter.default.svc.cluster.local";

fn names(cp: &ControlPlane, resource_type: ResourceType) -> Vec<String> {
    cp.cache().resources().iter(resource_type).map(|(name, _)| name.to_owned()).collect()
}

#[tokio::test]
async fn apply_replaces_everything_or_nothing() {
    let cp = ControlPlane::builder().yaml(SERVICE).start().await.unwrap();
    assert_eq!(names(&cp, ResourceType::Cluster), [CLUSTER]);
    let mut events = cp.events();

    let before = cp.cache().resources();
    let good_and_bad = format!("{}\n---\nkind: x\n", SERVICE.replace("greeter", "other"));
    let error = cp.apply(&good_and_bad).await.unwrap_err();
    assert!(matches!(error, Error::Rejected(_)));
    assert!(error.to_string().starts_with("<yaml>:12:1: "), "{error}");
    assert_eq!(cp.cache().resources(), before, "nothing of a bad set is applied");
    assert!(matches!(events.next().await, Some(Event::Rejected { errors, .. }) if errors.len() == 2), "{error}");

    let version = cp.apply(&SERVICE.replace("greeter", "other")).await.unwrap();
    assert_eq!((version, cp.cache().version()), (2, 2));
    assert!(matches!(events.next().await, Some(Event::Applied { version: 2, .. })));
    assert_eq!(names(&cp, ResourceType::Cluster), ["outbound|50051||other.default.svc.cluster.local"]);
    assert_eq!(cp.apply(&SERVICE.replace("greeter", "other")).await.unwrap(), 2, "an equal text is no new version");
    cp.shutdown().await;
}

/// Writes as editors do: beside it, then by rename.
fn write(path: &Path, text: &str) {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, text).unwrap();
    std::fs::rename(&temporary, path).unwrap();
}

async fn applied(events: &mut Events) -> u64 {
    match events.next().await {
        Some(Event::Applied { version, .. }) => version,
        other => panic!("{other:?}"),
    }
}

async fn rejected(events: &mut Events) -> String {
    match events.next().await {
        Some(Event::Rejected { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_folder_is_followed_through_edits_errors_and_its_own_removal() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("mesh");
    std::fs::create_dir(&dir).unwrap();
    let file = dir.join("services.yaml");
    write(&file, SERVICE);
    let cp = ControlPlane::builder().dir(&dir).start().await.unwrap();
    let mut events = cp.events();
    let clusters = |cp: &ControlPlane| names(cp, ResourceType::Cluster);

    write(&file, &SERVICE.replace("greeter", "renamed"));
    applied(&mut events).await;
    assert_eq!(clusters(&cp), ["outbound|50051||renamed.default.svc.cluster.local"]);

    std::fs::write(dir.join("more.yml"), SERVICE).unwrap();
    applied(&mut events).await;
    assert_eq!(clusters(&cp).len(), 2);

    write(&file, &SERVICE.replace("greeter", "renamed").replace("resolution: STATIC", "resolution: [STATIC]"));
    let reason = rejected(&mut events).await;
    assert_eq!(reason, format!("{}:7:15: resolution is a string, not a list", file.display()));
    assert_eq!(clusters(&cp).len(), 2, "the last good configuration stays");

    std::fs::remove_dir_all(&dir).unwrap();
    let reason = rejected(&mut events).await;
    assert!(reason.starts_with("cannot read ") && reason.contains("mesh"), "{reason}");
    assert_eq!(clusters(&cp).len(), 2);

    // The new folder is complete when it appears.
    let staged = parent.path().join("staged");
    std::fs::create_dir(&staged).unwrap();
    std::fs::write(staged.join("services.yaml"), SERVICE).unwrap();
    std::fs::rename(&staged, &dir).unwrap();
    applied(&mut events).await;
    assert_eq!(clusters(&cp), [CLUSTER]);

    write(&file, &SERVICE.replace("greeter", "again"));
    applied(&mut events).await;
    assert_eq!(clusters(&cp), ["outbound|50051||again.default.svc.cluster.local"]);
}

#[tokio::test]
async fn a_single_file_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mesh.yaml");
    std::fs::write(&file, SERVICE).unwrap();
    let cp = ControlPlane::builder().file(&file).start().await.unwrap();
    let mut events = cp.events();
    write(&file, &SERVICE.replace("greeter", "renamed"));
    assert_eq!(applied(&mut events).await, 2);
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let start = |builder: Builder| async { builder.start().await.unwrap_err().to_string() };
    let missing = start(ControlPlane::builder().dir("no/such/folder")).await;
    assert!(missing.starts_with("cannot read no/such/folder: "), "{missing}");
    let bad = start(ControlPlane::builder().yaml("kind: 3")).await;
    assert!(bad.lines().any(|l| l == "<yaml>:1:7: kind is a string, not a number: put it in quotes"), "{bad}");
    let taken = ControlPlane::builder().start().await.unwrap();
    let in_use = start(ControlPlane::builder().listen(taken.addr())).await;
    assert!(in_use.starts_with(&format!("cannot listen on {}: ", taken.addr())), "{in_use}");
}

#[tokio::test]
async fn raw_resources_are_served_beside_every_configuration() {
    let raw = Any { type_url: ResourceType::Cluster.type_url().to_owned(), value: b"not a cluster".to_vec() };
    let raw = ResourceSet::new().with(ResourceType::Cluster, "bad", raw);
    let cp = ControlPlane::builder().yaml(SERVICE).raw_resources(raw).start().await.unwrap();
    assert_eq!(names(&cp, ResourceType::Cluster), ["bad", CLUSTER]);
    cp.apply("").await.unwrap();
    assert_eq!(names(&cp, ResourceType::Cluster), ["bad"]);
}

#[tokio::test]
async fn identities_exist_before_the_configuration_that_needs_them() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::builder().yaml(SERVICE).ca(dir.path()).identity("prod", "shop").start().await.unwrap();
    let exists =
        |namespace: &str, account: &str| cp.ca().unwrap().identity_dir(namespace, account).join("cert.pem").exists();
    assert!(exists("default", "greeter") && exists("default", "default") && exists("prod", "shop"));
    assert!(!exists("default", "client"), "another was named");
    cp.apply(&SERVICE.replace("serviceAccount: greeter", "serviceAccount: new")).await.unwrap();
    assert!(exists("default", "new"));
    let client = dir.path().join("ns/prod/sa/shop/cert.pem").display().to_string();
    assert!(cp.bootstrap().contains(&client), "{}", cp.bootstrap());
    let error = cp.apply(&SERVICE.replace("serviceAccount: greeter", "serviceAccount: a/b")).await.unwrap_err();
    assert!(matches!(error, Error::Ca(ca::Error::Name(_))), "{error}");
}

/// A raw client of one type.
struct Client {
    resource_type: ResourceType,
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: tonic::Streaming<DiscoveryResponse>,
}

impl Client {
    async fn connect(cp: &ControlPlane, resource_type: ResourceType) -> Self {
        let mut client = AggregatedDiscoveryServiceClient::connect(format!("http://{}", cp.addr())).await.unwrap();
        let (requests, outbound) = mpsc::channel(4);
        let responses = client.stream_aggregated_resources(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        Self { resource_type, requests, responses }
    }

    async fn send(&self, nonce: &str, error: Option<&str>) {
        let request = DiscoveryRequest {
            type_url: self.resource_type.type_url().to_owned(),
            response_nonce: nonce.to_owned(),
            error_detail: error.map(|m| rpc::Status { message: m.to_owned(), ..rpc::Status::default() }),
            ..DiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> DiscoveryResponse {
        self.responses.message().await.unwrap().expect("the stream is open")
    }
}

#[tokio::test]
async fn clients_follow_what_is_applied_and_their_refusals_are_events() {
    let cp = ControlPlane::builder().yaml(SERVICE).start().await.unwrap();
    let mut client = Client::connect(&cp, ResourceType::Cluster).await;
    client.send("", None).await;
    let first = client.next().await;
    assert_eq!((first.version_info.as_str(), first.resources.len()), ("1", 1));
    client.send(&first.nonce, None).await;
    cp.cache().settled(1).await;
    assert_eq!(cp.connections(), 1);

    let version = cp.apply(&SERVICE.replace("[greeter]", "[greeter, other]")).await.unwrap();
    let second = client.next().await;
    assert_eq!((second.version_info, second.resources.len()), (version.to_string(), 2));
    let mut events = cp.events();
    client.send(&second.nonce, Some("no")).await;
    let Some(Event::Nack(nack)) = events.next().await else { panic!("no refusal") };
    assert_eq!((nack.resource_type, nack.version, nack.detail.as_str()), (ResourceType::Cluster, version, "no"));
    cp.shutdown().await;
    assert!(client.responses.message().await.is_err());
}

#[tokio::test]
async fn the_control_plane_comes_back_on_its_address() {
    let port = Port::take("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = port.addr();
    let cp = ControlPlane::builder().yaml(SERVICE).listen(addr).start().await.unwrap();
    let mut client = Client::connect(&cp, ResourceType::Cluster).await;
    client.send("", None).await;
    client.next().await;
    cp.shutdown().await;
    let cp = ControlPlane::builder().yaml(SERVICE).listen(addr).start().await.unwrap();
    assert_eq!(cp.addr(), addr);
}
