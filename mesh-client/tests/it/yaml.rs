//! YAML that is refused: every finding with its place, nothing half applied, calls go on by the configuration before.

use crate::support::{World, greeter, hello, routes, rule, service, to, until};
use mesh_control::{ControlPlane, Error, Event};

const HEAD: &str = "apiVersion: networking.istio.io/v1\n";

/// What is wrong with a document; the line that is said, from its first; what is said of it.
const BAD: [(&str, &str, usize, &str); 9] = [
    (
        "an unknown field",
        "kind: DestinationRule\nmetadata: {name: d}\nspec: {host: greeter, hots: 1}\n",
        4,
        ":23: unknown field `hots`",
    ),
    (
        "a wrong type",
        "kind: DestinationRule\nmetadata: {name: d}\nspec: {host: [greeter]}\n",
        4,
        ":14: host is a string, not a list",
    ),
    (
        "a duplicate key",
        "kind: DestinationRule\nmetadata: {name: d}\nspec: {host: greeter}\nspec: {host: greeter}\n",
        5,
        ":1: duplicate key `spec`",
    ),
    (
        "a second document for one object",
        "kind: VirtualService\nmetadata: {name: greeter}\nspec: {hosts: [greeter], http: [{route: [{destination: {host: greeter}}]}]}\n",
        3,
        ":18: VirtualService default/greeter is already defined at <yaml>:",
    ),
    ("an unknown kind", "kind: Pod\nmetadata: {name: p}\nspec: {}\n", 2, ":7: unknown kind `Pod`"),
    (
        "a bad regular expression",
        "kind: VirtualService\nmetadata: {name: w}\nspec: {hosts: [other], http: [{match: [{uri: {regex: \"(\"}}]}]}\n",
        4,
        ":54: bad regular expression",
    ),
    (
        "an unknown host",
        "kind: VirtualService\nmetadata: {name: w}\nspec: {hosts: [nobody], http: [{route: [{destination: {host: nobody}}]}]}\n",
        4,
        ":16: no ServiceEntry has the host nobody",
    ),
    ("broken syntax", "kind: [\n", 2, ":"),
    ("no metadata", "kind: DestinationRule\nspec: {host: greeter}\n", 1, ":1: the document has no metadata"),
];

#[tokio::test]
async fn a_bad_document_is_refused_with_its_place_and_nothing_changes() {
    let (old, new) = (greeter("old").await, greeter("new").await);
    let routes = routes(&format!("[{{route: [{{destination: {}}}]}}]", to("")));
    let world = World::new(&(service(&[("old", old.addr())]) + &routes)).await;
    assert_eq!(hello(&world.channel).await.unwrap().backend, "old");
    let version = world.cp.cache().version();
    let mut events = world.cp.events();

    // All of these would move the calls to the other backend, if their good documents were applied.
    let good = service(&[("new", new.addr())]) + &routes;
    for (what, document, line, finding) in BAD {
        let error = world.cp.apply(&format!("{good}---\n{HEAD}{document}")).await.expect_err(what);
        let text = error.to_string();
        let place = format!("<yaml>:{}{finding}", good.lines().count() + 1 + line);
        assert!(
            text.lines().any(|l| l.starts_with(&place)),
            "{what}: no `{place}` in:
{text}"
        );
        let Error::Rejected(rejected) = error else { panic!("{what}: {error:?}") };
        assert!(rejected.errors.iter().all(|p| p.at.line > 12 && p.at.column > 0), "{what}: {rejected}");
        let Some(Event::Rejected { reason, errors }) = events.next().await else { panic!("{what}: no event") };
        assert_eq!((reason, errors), (text, rejected.errors));
        assert_eq!(world.cp.cache().version(), version, "{what}");
        assert_eq!(hello(&world.channel).await.unwrap().backend, "old", "{what}");
    }
    assert_eq!(new.state().calls(), 0);
    world.cp.apply(&good).await.unwrap();
    until("the good documents alone are applied", async || hello(&world.channel).await.unwrap().backend == "new").await;
}

#[tokio::test]
async fn every_finding_is_reported_at_once() {
    let bad = service(&[("one", "127.0.0.1:1".parse().unwrap())]).replace("STATIC", "SOMEHOW")
        + &rule("{loadBalancer: {simple: FASTEST}}", &[]);
    let cp = ControlPlane::builder().start().await.unwrap();
    let text = cp.apply(&bad).await.unwrap_err().to_string();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.contains("SOMEHOW") && text.contains("FASTEST"), "{text}");
    assert!(matches!(ControlPlane::builder().yaml(bad).start().await, Err(Error::Rejected(_))));
}

#[tokio::test]
async fn a_watched_file_that_breaks_keeps_the_configuration_before() {
    let (old, new) = (greeter("old").await, greeter("new").await);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mesh.yaml");
    std::fs::write(&file, service(&[("old", old.addr())])).unwrap();
    let world = World::on(ControlPlane::builder().dir(dir.path()).start().await.unwrap()).await;
    let mut events = world.cp.events();
    std::fs::write(&file, service(&[("new", new.addr())]).replace("endpoints:", "endpoint:")).unwrap();
    let reason = loop {
        match tokio::time::timeout(crate::support::GUARD, events.next()).await.expect("no event").unwrap() {
            Event::Rejected { reason, .. } if reason.contains("endpoint`") => break reason,
            _ => {}
        }
    };
    assert!(reason.contains("mesh.yaml:8:3: unknown field `endpoint`"), "{reason}");
    assert_eq!(hello(&world.channel).await.unwrap().backend, "old");
    std::fs::write(&file, service(&[("new", new.addr())])).unwrap();
    until("the mended file is applied", async || hello(&world.channel).await.unwrap().backend == "new").await;
}
