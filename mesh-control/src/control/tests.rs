use super::*;
use mesh_xds::server::ResourceType;

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
