//! The header mutation filter.

use crate::{
    filters::{add_filter, anything, edit_routes, packed, plane, refused},
    support::{
        TARGET, assert_says,
        echo::{Echo, Way, get, joined},
        mesh_on, until,
    },
};
use envoy_types::pb::{
    envoy::{
        config::{
            common::mutation_rules::v3::{
                HeaderMutation as Proto,
                header_mutation::{Action, RemoveOnMatch},
            },
            core::v3::{
                HeaderValue, HeaderValueOption, KeyValueAppend, KeyValueMutation, KeyValuePair,
                header_value_option::HeaderAppendAction, key_value_append::KeyValueAppendAction,
            },
        },
        extensions::filters::http::header_mutation::v3::{HeaderMutation, HeaderMutationPerRoute, Mutations},
        r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
    },
    google::protobuf::{Value, value::Kind},
};

fn add(key: &str, value: &str, action: HeaderAppendAction) -> Proto {
    let header = Some(HeaderValue { key: key.into(), value: value.into(), ..HeaderValue::default() });
    let option = HeaderValueOption { header, append_action: action.into(), ..HeaderValueOption::default() };
    Proto { action: Some(Action::Append(option)) }
}

fn remove(key: &str) -> Proto {
    Proto { action: Some(Action::Remove(key.into())) }
}

fn remove_prefix(prefix: &str) -> Proto {
    let matcher =
        StringMatcher { match_pattern: Some(MatchPattern::Prefix(prefix.into())), ..StringMatcher::default() };
    Proto { action: Some(Action::RemoveOnMatch(RemoveOnMatch { key_matcher: Some(matcher) })) }
}

fn query(key: &str, value: Option<&str>, action: KeyValueAppendAction) -> KeyValueMutation {
    let Some(value) = value else { return KeyValueMutation { remove: key.into(), ..KeyValueMutation::default() } };
    let value = Some(Value { kind: Some(Kind::StringValue(value.into())) });
    let record = Some(KeyValuePair { key: key.into(), value });
    KeyValueMutation {
        append: Some(KeyValueAppend { record, action: action.into(), ..KeyValueAppend::default() }),
        remove: String::new(),
    }
}

fn mutations() -> Mutations {
    use HeaderAppendAction::{AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExistsOrAdd};
    Mutations {
        request_mutations: vec![
            add("x-order", "first", AppendIfExistsOrAdd),
            remove("x-order"),
            add("x-order", "%REQ(x-in)%", AppendIfExistsOrAdd),
            add("x-in", "absent", AddIfAbsent),
            remove_prefix("x-secret-"),
        ],
        query_parameter_mutations: vec![
            query("gone", None, KeyValueAppendAction::AppendIfExistsOrAdd),
            query("here", Some("a b&c"), KeyValueAppendAction::OverwriteIfExistsOrAdd),
            query("not", Some("x"), KeyValueAppendAction::OverwriteIfExists),
        ],
        response_mutations: vec![
            remove("server"),
            add("x-from", "%UPSTREAM_REMOTE_ADDRESS% %REQ(x-in)% %RESP(:status)%", OverwriteIfExistsOrAdd),
        ],
        ..Mutations::default()
    }
}

#[tokio::test]
async fn mutations_are_made_in_order_on_request_query_and_response() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let config = HeaderMutation { mutations: Some(mutations()), ..HeaderMutation::default() };
    add_filter(&cp, "mutation", packed(&config), false);
    let mesh = mesh_on(&cp).await;
    for way in Way::BOTH {
        let request = get("/a?gone=1&x=2&here=old&gone=3").header("x-in", "in").header("x-secret-key", "1");
        let response = way.send(&mesh, request, "").await.unwrap();
        let seen = backend.last();
        assert_eq!((seen.header("x-order").as_str(), seen.header("x-in").as_str()), ("in", "in"), "{way:?}");
        assert_eq!(seen.header("x-secret-key"), "");
        assert_eq!(seen.path(), "/a?x=2&here=a%20b%26c");
        assert_eq!(joined(response.headers(), "server"), "");
        assert_eq!(joined(response.headers(), "x-from"), format!("{} in 200", backend.addr()));
    }
}

#[tokio::test]
async fn all_levels_of_routes_are_made_after_the_filters_own() {
    for way in Way::BOTH {
        let backend = Echo::start("v1").await;
        let cp = plane(&anything(), &backend).await;
        let level = |text: &str| Mutations {
            request_mutations: vec![add("x-level", text, HeaderAppendAction::AppendIfExistsOrAdd)],
            ..Mutations::default()
        };
        let of_route = |text| packed(&HeaderMutationPerRoute { mutations: Some(level(text)) });
        let chain =
            |wins| HeaderMutation { mutations: Some(level("chain")), most_specific_header_mutations_wins: wins };
        add_filter(&cp, "mutation", packed(&chain(false)), false);
        edit_routes(&cp, |r| {
            r.virtual_hosts[0].routes[0].typed_per_filter_config.insert("mutation".into(), of_route("route"));
            r.virtual_hosts[0].typed_per_filter_config.insert("mutation".into(), of_route("host"));
            r.typed_per_filter_config.insert("mutation".into(), of_route("routes"));
        });
        let mesh = mesh_on(&cp).await;
        for (wins, expected) in [(false, "chain,route,host,routes"), (true, "chain,routes,host,route")] {
            add_filter(&cp, "mutation", packed(&chain(wins)), false);
            until(expected, async || {
                way.send(&mesh, get("/"), "").await.unwrap();
                backend.last().header("x-level") == expected
            })
            .await;
        }
    }
}

#[tokio::test]
async fn bad_mutations_are_refused_by_their_path() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    let mut bad = mutations();
    bad.response_mutations.push(add(":status", "500", HeaderAppendAction::AppendIfExistsOrAdd));
    let config = HeaderMutation { mutations: Some(bad), ..HeaderMutation::default() };
    add_filter(&cp, "mutation", packed(&config), false);
    let path = "api_listener.http_filters[1].typed_config.mutations.response_mutations[2].append.header.key";
    assert_says(&refused(&mesh, "Listener").await, &[path, ":status"]);
}
