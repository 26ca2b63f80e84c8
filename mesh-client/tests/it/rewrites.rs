//! Rewrites and header edits that only raw resources say: every kind, and the order of the levels.

use crate::support::{
    CLUSTER, TARGET, World,
    echo::{Echo, Seen, Way, get, joined},
    edit, hello_with, routes, rule, service, to,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    HeaderValue, HeaderValueOption, TypedExtensionConfig, header_value_option::HeaderAppendAction,
                },
                endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
                route::v3::{
                    RouteAction, RouteConfiguration, RouteMatch, WeightedCluster, route,
                    route_action::{ClusterSpecifier, HostRewriteSpecifier},
                    route_match::PathSpecifier,
                    weighted_cluster::ClusterWeight,
                },
            },
            extensions::path::{
                r#match::uri_template::v3::UriTemplateMatchConfig, rewrite::uri_template::v3::UriTemplateRewriteConfig,
            },
            r#type::matcher::v3::{RegexMatchAndSubstitute, RegexMatcher},
        },
        google::protobuf::{BoolValue, UInt32Value},
    },
    util::pack_any,
};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;

/// A control plane whose only route was edited so.
async fn control_plane(backend: &Echo, change: impl FnOnce(&mut RouteConfiguration)) -> ControlPlane {
    let http = format!("[{{route: [{{destination: {}}}]}}]", to("v1"));
    let yaml = service(&[("v1", backend.addr())]) + &routes(&http) + &rule("{}", &["v1"]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, change);
    cp
}

fn action(config: &mut RouteConfiguration) -> &mut RouteAction {
    match &mut config.virtual_hosts[0].routes[0].action {
        Some(route::Action::Route(action)) => action,
        other => panic!("{other:?}"),
    }
}

fn substitute(regex: &str, substitution: &str) -> RegexMatchAndSubstitute {
    let pattern = RegexMatcher { regex: regex.into(), ..RegexMatcher::default() };
    RegexMatchAndSubstitute { pattern: Some(pattern), substitution: substitution.into() }
}

/// What the backend sees of a request, both ways into the mesh.
async fn seen(change: impl Fn(&mut RouteConfiguration), path: &str, header: (&str, &str)) -> [Seen; 2] {
    let backend = Echo::start("v1").await;
    let world = World::on(control_plane(&backend, change).await).await;
    let mut all = Vec::new();
    for way in Way::BOTH {
        way.send(&world.mesh, get(path).header(header.0, header.1), "").await.unwrap();
        all.push(backend.last());
    }
    all.try_into().unwrap()
}

#[tokio::test]
async fn paths_by_template_and_as_a_whole() {
    let by_template = |config: &mut RouteConfiguration| {
        let matched = UriTemplateMatchConfig { path_template: "/{kind}/{rest=**}".into() };
        let rewritten = UriTemplateRewriteConfig { path_template_rewrite: "/{rest}/of/{kind}".into() };
        let typed = |any| Some(TypedExtensionConfig { name: "t".into(), typed_config: Some(any) });
        config.virtual_hosts[0].routes[0].r#match = Some(RouteMatch {
            path_specifier: typed(pack_any(matched)).map(PathSpecifier::PathMatchPolicy),
            ..RouteMatch::default()
        });
        action(config).path_rewrite_policy = typed(pack_any(rewritten));
    };
    for seen in seen(by_template, "/books/1/2?q", ("x", "y")).await {
        assert_eq!((seen.path(), seen.header("x-envoy-original-path").as_str()), ("/1/2/of/books?q", "/books/1/2?q"));
    }
    let whole = |config: &mut RouteConfiguration| action(config).path_rewrite = "/all/%REQ(x-tenant)%".into();
    for seen in seen(whole, "/anything?q", ("x-tenant", "blue")).await {
        assert_eq!(seen.path(), "/all/blue?q");
    }
}

#[tokio::test]
async fn authorities_by_header_and_by_path() {
    let by_header = |config: &mut RouteConfiguration| {
        action(config).host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteHeader("x-host".into()));
        action(config).append_x_forwarded_host = true;
    };
    for seen in seen(by_header, "/", ("x-host", "other.example:81")).await {
        assert_eq!(seen.authority(), "other.example:81");
        assert_eq!(seen.header("x-forwarded-host"), &TARGET["xds:///".len()..]);
    }
    // Without the header nothing is rewritten, and there is nothing to remember.
    for seen in seen(by_header, "/", ("x", "y")).await {
        assert_eq!(
            (seen.authority().as_str(), seen.header("x-forwarded-host").as_str()),
            (&TARGET["xds:///".len()..], "")
        );
    }
    let by_path = |config: &mut RouteConfiguration| {
        let rewrite = substitute("^/([a-z]+)/.*$", "\\1.example");
        action(config).host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewritePathRegex(rewrite));
    };
    for seen in seen(by_path, "/tenant/x?q=1", ("x", "y")).await {
        assert_eq!((seen.authority().as_str(), seen.path()), ("tenant.example", "/tenant/x?q=1"));
    }
}

fn append(value: &str) -> HeaderValueOption {
    let header = HeaderValue { key: "x-level".into(), value: value.into(), ..HeaderValue::default() };
    let append_action = HeaderAppendAction::AppendIfExistsOrAdd.into();
    HeaderValueOption { header: Some(header), append_action, ..HeaderValueOption::default() }
}

fn overwrite(value: &str) -> HeaderValueOption {
    HeaderValueOption { append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(), ..append(value) }
}

/// The same edit on all four levels, for requests and responses.
fn everywhere(config: &mut RouteConfiguration, edit: fn(&str) -> HeaderValueOption) {
    let name = CLUSTER.replace("||", "|v1|");
    let part = ClusterWeight {
        name,
        weight: Some(UInt32Value { value: 1 }),
        request_headers_to_add: vec![edit("cluster")],
        response_headers_to_add: vec![edit("cluster")],
        ..ClusterWeight::default()
    };
    let clusters = WeightedCluster { clusters: vec![part], ..WeightedCluster::default() };
    action(config).cluster_specifier = Some(ClusterSpecifier::WeightedClusters(clusters));
    let route = &mut config.virtual_hosts[0].routes[0];
    (route.request_headers_to_add, route.response_headers_to_add) = (vec![edit("route")], vec![edit("route")]);
    let host = &mut config.virtual_hosts[0];
    (host.request_headers_to_add, host.response_headers_to_add) = (vec![edit("host")], vec![edit("host")]);
    (config.request_headers_to_add, config.response_headers_to_add) = (vec![edit("config")], vec![edit("config")]);
}

#[tokio::test]
async fn edits_of_four_levels_are_made_in_order() {
    for most_specific_wins in [false, true] {
        for (edit, expected) in [
            (append as fn(&str) -> _, ["caller,cluster,route,host,config", "caller,config,host,route,cluster"]),
            (overwrite, ["config", "cluster"]),
        ] {
            let backend = Echo::start("v1").await;
            let cp = control_plane(&backend, |config| {
                everywhere(config, edit);
                config.most_specific_header_mutations_wins = most_specific_wins;
            })
            .await;
            let world = World::on(cp).await;
            let expected = expected[usize::from(most_specific_wins)];
            for way in Way::BOTH {
                let response = way.send(&world.mesh, get("/").header("x-level", "caller"), "").await.unwrap();
                assert_eq!(backend.last().header("x-level"), expected, "{way:?}");
                let back = joined(response.headers(), "x-level");
                assert_eq!(back, expected.trim_start_matches("caller,"));
            }
        }
    }
}

/// The route's authority is that of the endpoint, which has this name.
async fn named(backend: &Echo, hostname: &str) -> ControlPlane {
    let cp = control_plane(backend, |config| {
        action(config).host_rewrite_specifier = Some(HostRewriteSpecifier::AutoHostRewrite(BoolValue { value: true }));
        action(config).append_x_forwarded_host = true;
    })
    .await;
    let name = CLUSTER.replace("||", "|v1|");
    edit::<ClusterLoadAssignment>(&cp, ResourceType::ClusterLoadAssignment, &name, |assignment| {
        let Some(HostIdentifier::Endpoint(endpoint)) = &mut assignment.endpoints[0].lb_endpoints[0].host_identifier
        else {
            panic!()
        };
        endpoint.hostname = hostname.into();
    });
    cp
}

#[tokio::test]
async fn the_authority_becomes_the_name_of_the_endpoint() {
    let backend = Echo::start("v1").await;
    let own = &TARGET["xds:///".len()..];
    for (hostname, authority, forwarded) in [("node-1.example", "node-1.example", own), ("", own, "")] {
        let world = World::on(named(&backend, hostname).await).await;
        Way::Layer.send(&world.mesh, get("/"), "").await.unwrap();
        let seen = backend.last();
        assert_eq!((seen.authority().as_str(), seen.header("x-forwarded-host").as_str()), (authority, forwarded));
    }
}

#[tokio::test]
async fn grpc_lets_only_a_trusted_control_plane_do_so() {
    let backend = Echo::start("v1").await;
    let cp = named(&backend, "node-1.example").await;
    let own = &TARGET["xds:///".len()..];
    for trusted in [false, true] {
        let feature = if trusted { "\"trusted_xds_server\"" } else { "" };
        let json = format!(
            r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}], "server_features": [{feature}]}}],
            "node": {{"id": "test"}}}}"#,
            cp.addr()
        );
        let mesh = Mesh::builder().bootstrap_json(&json).unwrap().build().await.unwrap();
        // The echo server is no greeter: what counts is what it saw.
        hello_with(&mesh.channel(TARGET).unwrap(), |_| {}).await.unwrap_err();
        assert_eq!(backend.last().authority(), if trusted { "node-1.example" } else { own });
        // What the application says itself stands.
        Way::Channel.send(&mesh, get("/"), "").await.unwrap();
        assert_eq!(backend.last().authority(), own);
    }
}
