//! Faults that requests ask for by their headers, and how many there are at once.

use crate::{
    filters::{add_filter, anything, packed, plane},
    support::{
        GUARD, TARGET, assert_says,
        echo::{Echo, Way, get, joined},
        mesh_on, until,
    },
};
use envoy_types::pb::{
    envoy::{
        extensions::filters::{
            common::fault::v3::{
                FaultDelay,
                fault_delay::{FaultDelaySecifier, HeaderDelay},
            },
            http::fault::v3::{
                FaultAbort, HttpFault,
                fault_abort::{ErrorType, HeaderAbort},
            },
        },
        r#type::v3::FractionalPercent,
    },
    google::protobuf::UInt32Value,
};
use mesh_client::{Explain, Mesh};
use mesh_control::ControlPlane;
use std::time::Duration;
use tokio::time::Instant;

const ABORT: &str = "x-envoy-fault-abort-request";
const ABORT_GRPC: &str = "x-envoy-fault-abort-grpc-request";
const ABORT_SHARE: &str = "x-envoy-fault-abort-request-percentage";
const DELAY: &str = "x-envoy-fault-delay-request";
const DELAY_SHARE: &str = "x-envoy-fault-delay-request-percentage";
/// An hour, in milliseconds.
const LONG: &str = "3600000";

/// Whatever the headers ask for, of up to this share of the requests.
fn by_header(percentage: FractionalPercent) -> HttpFault {
    let percentage = Some(percentage);
    let abort =
        FaultAbort { percentage, error_type: Some(ErrorType::HeaderAbort(HeaderAbort {})), ..FaultAbort::default() };
    let delay = FaultDelay { percentage, fault_delay_secifier: Some(FaultDelaySecifier::HeaderDelay(HeaderDelay {})) };
    HttpFault { delay: Some(delay), abort: Some(abort), ..HttpFault::default() }
}

/// So many of a hundred.
fn percent(numerator: u32) -> FractionalPercent {
    FractionalPercent { numerator, denominator: 0 }
}

async fn faulty(backend: &Echo, fault: &HttpFault) -> (ControlPlane, Mesh) {
    let cp = plane(&anything(), backend).await;
    add_filter(&cp, "fault", packed(fault), false);
    let mesh = mesh_on(&cp).await;
    mesh.channel(TARGET).unwrap().ready(GUARD).await.unwrap();
    (cp, mesh)
}

/// A request with these headers.
fn asking(headers: &[(&str, &str)]) -> http::request::Builder {
    headers.iter().fold(get("/x"), |request, (name, value)| request.header(*name, *value))
}

#[tokio::test]
async fn requests_ask_for_faults_by_their_headers() {
    let backend = Echo::start("v1").await;
    let (_cp, mesh) = faulty(&backend, &by_header(percent(100))).await;
    let grpc = ("content-type", "application/grpc");
    for way in Way::BOTH {
        let seen = backend.seen().len();
        for (headers, status, code) in [
            (&[(ABORT, "418")][..], 418, ""),
            (&[(ABORT_GRPC, "7")], 403, ""),
            (&[grpc, (ABORT_GRPC, "7")], 200, "7"),
            (&[grpc, (ABORT, "429")], 200, "14"),
            // The HTTP status goes first, unless it is none.
            (&[(ABORT, "429"), (ABORT_GRPC, "7")], 429, ""),
            (&[(ABORT, "600"), (ABORT_GRPC, "7")], 403, ""),
            (&[(ABORT, "503"), (DELAY, "1")], 503, ""),
        ] {
            let response = way.send(&mesh, asking(headers), "").await.unwrap();
            assert_eq!(
                (response.status().as_u16(), &*joined(response.headers(), "grpc-status")),
                (status, code),
                "{headers:?}"
            );
        }
        assert_eq!(backend.seen().len(), seen, "nothing was sent");

        let (explain, begun) = (Explain::default(), Instant::now());
        let mut request = asking(&[(DELAY, "30")]);
        request.extensions_mut().unwrap().insert(explain.clone());
        assert_eq!(way.backend(&mesh, request).await, "v1");
        assert!(begun.elapsed() >= Duration::from_millis(30), "{:?}", begun.elapsed());
        assert_says(&explain.to_string(), &["delayed by 30ms"]);

        for headers in [
            &[][..],
            &[(ABORT, "oops")],
            &[(DELAY, "1.5")],
            &[(ABORT, "503"), (ABORT_SHARE, "0")],
            &[(ABORT_GRPC, "7"), (ABORT_SHARE, "0")],
            &[(DELAY, LONG), (DELAY_SHARE, "0")],
        ] {
            assert_eq!(way.backend(&mesh, asking(headers)).await, "v1", "{headers:?}");
        }
    }
}

#[tokio::test]
async fn a_request_asks_for_no_more_faults_than_are_configured() {
    let backend = Echo::start("v1").await;
    let (_cp, mesh) = faulty(&backend, &by_header(percent(50))).await;
    for way in Way::BOTH {
        // Of 100; more than five standard deviations.
        for (asked, expected) in [("100", 25..=75), ("nonsense", 25..=75), ("5", 0..=20), ("0", 0..=0)] {
            let mut aborted = 0;
            for _ in 0..100 {
                let request = asking(&[(ABORT, "503"), (ABORT_SHARE, asked)]);
                aborted += u32::from(way.send(&mesh, request, "").await.unwrap().status() == 503);
            }
            assert!(expected.contains(&aborted), "{aborted} of 100, asked for {asked}, {way:?}");
        }
    }
}

#[tokio::test]
async fn a_share_asked_for_counts_in_what_the_configured_one_does() {
    let backend = Echo::start("v1").await;
    let of = |numerator, denominator| FractionalPercent { numerator, denominator };
    // All of the requests, in hundreds, ten thousands, millions; more than five standard deviations of 200.
    for (all, half) in [(of(100, 0), "50"), (of(10_000, 1), "5000"), (of(1_000_000, 2), "500000")] {
        let (_cp, mesh) = faulty(&backend, &by_header(all)).await;
        for way in Way::BOTH {
            let mut aborted = 0;
            for _ in 0..200 {
                let request = asking(&[(ABORT, "503"), (ABORT_SHARE, half)]);
                aborted += u32::from(way.send(&mesh, request, "").await.unwrap().status() == 503);
            }
            assert!((60..=140).contains(&aborted), "{aborted} of 200, asked for {half} of {all:?}, {way:?}");
        }
    }
    // 90 of a million are next to none.
    let (_cp, mesh) = faulty(&backend, &by_header(of(1_000_000, 2))).await;
    for way in Way::BOTH {
        let mut aborted = 0;
        for _ in 0..100 {
            let request = asking(&[(ABORT, "503"), (ABORT_SHARE, "90")]);
            aborted += u32::from(way.send(&mesh, request, "").await.unwrap().status() == 503);
        }
        assert!(aborted <= 2, "{aborted} of 100, {way:?}");
    }
}

#[tokio::test]
async fn beyond_the_faults_that_may_be_active_requests_pass() {
    let backend = Echo::start("v1").await;
    let fault = HttpFault { max_active_faults: Some(UInt32Value { value: 1 }), ..by_header(percent(100)) };
    let (_cp, mesh) = faulty(&backend, &fault).await;
    for way in Way::BOTH {
        let explain = Explain::default();
        let mut request = asking(&[(DELAY, LONG)]);
        request.extensions_mut().unwrap().insert(explain.clone());
        let mut first = Box::pin(way.send(&mesh, request, ""));
        tokio::select! {
            biased;
            () = until("one is delayed", async || explain.explanation().get("fault").is_some()) => {}
            answer = &mut first => panic!("{answer:?}"),
        }
        // Through either way: the mesh counts.
        for other in Way::BOTH {
            assert_eq!(other.backend(&mesh, asking(&[(DELAY, LONG)])).await, "v1");
            assert_eq!(other.backend(&mesh, asking(&[(ABORT, "503")])).await, "v1");
        }
        drop(first);
        assert_eq!(way.send(&mesh, asking(&[(ABORT, "503")]), "").await.unwrap().status(), 503, "it is over");
    }
}
