use super::*;
use http::{HeaderValue, Method, Uri};
use mesh_xds::resource::{HeaderMatcher, HeaderMatcherKind};

fn compile(config: &FaultConfig) -> Fault {
    Fault::compile(config, Profile::Grpc, ActiveFaults::default())
}

fn percent(percent: u32) -> FractionalPercent {
    FractionalPercent(percent * 10_000)
}

/// Decides with these request headers; `draws` are the draws in percent, delay first.
fn decide(fault: &Fault, headers: &[(&'static str, &str)], draws: &[u32]) -> FaultPlan {
    let headers: HeaderMap = headers
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
        .collect();
    let (method, uri) = (Method::POST, Uri::from_static("/pkg.Svc/Method"));
    let mut draws = draws.iter();
    fault.decide(&RequestHead::new(&method, &uri, &headers), &mut |bound| {
        assert_eq!(bound, 1_000_000);
        draws.next().expect("no further draw") * 10_000
    })
}

fn both() -> FaultConfig {
    FaultConfig {
        delay: Some(FaultDelay {
            fixed: Some(Duration::from_secs(1)),
            percentage: percent(50),
            denominator: Denominator::Hundred,
        }),
        abort: Some(FaultAbort::Grpc { code: 10, percentage: percent(50) }),
        ..FaultConfig::default()
    }
}

#[test]
fn delay_and_abort_are_drawn_independently() {
    let fault = compile(&both());
    let outcome = |draws: &[u32]| {
        let plan = decide(&fault, &[], draws);
        (plan.delay.is_some(), plan.abort.is_some())
    };
    assert_eq!(outcome(&[49, 49]), (true, true));
    assert_eq!(outcome(&[49, 50]), (true, false));
    assert_eq!(outcome(&[50, 49]), (false, true));
    assert_eq!(outcome(&[50, 50]), (false, false));
}

#[test]
fn zero_percent_is_never_and_hundred_always() {
    let mut config = both();
    config.abort = Some(FaultAbort::Http { status: 503, percentage: percent(0) });
    config.delay = Some(FaultDelay {
        fixed: Some(Duration::from_secs(1)),
        percentage: percent(100),
        denominator: Denominator::Hundred,
    });
    let plan = decide(&compile(&config), &[], &[99, 0]);
    assert_eq!((plan.delay, plan.abort), (Some(Duration::from_secs(1)), None));
}

#[test]
fn statuses_are_mapped_both_ways() {
    let abort = |abort| {
        let config = FaultConfig { abort: Some(abort), ..FaultConfig::default() };
        let plan = decide(&compile(&config), &[], &[0]);
        plan.abort.map(|status| (status.http, status.grpc))
    };
    let http = |status| abort(FaultAbort::Http { status, percentage: percent(100) });
    let grpc = |code| abort(FaultAbort::Grpc { code, percentage: percent(100) });
    assert_eq!(http(503), Some((503, 14)));
    assert_eq!(http(200), Some((200, 2)), "200 without grpc-status is UNKNOWN");
    assert_eq!(http(401), Some((401, 16)));
    assert_eq!(grpc(0), Some((200, 0)));
    assert_eq!(grpc(14), Some((503, 14)));
    assert_eq!(grpc(99), Some((500, 2)));
}

#[test]
fn the_request_says_what_it_wants_where_the_config_lets_it() {
    let config = FaultConfig {
        delay: Some(FaultDelay { fixed: None, percentage: percent(100), denominator: Denominator::Hundred }),
        abort: Some(FaultAbort::Header { percentage: percent(30), denominator: Denominator::Hundred }),
        ..FaultConfig::default()
    };
    let fault = compile(&config);
    let plan = decide(&fault, &[], &[]);
    assert_eq!((plan.delay, plan.abort), (None, None), "without headers nothing is drawn");

    let asked = [("x-envoy-fault-delay-request", "250"), ("x-envoy-fault-abort-grpc-request", "7")];
    let plan = decide(&fault, &asked, &[0, 29]);
    assert_eq!(plan.delay, Some(Duration::from_millis(250)));
    assert_eq!(plan.abort.map(|a| a.grpc), Some(7));
    assert_eq!(decide(&fault, &asked, &[0, 30]).abort, None, "the configured share");

    let http = [("x-envoy-fault-abort-grpc-request", "7"), ("x-envoy-fault-abort-request", "429")];
    assert_eq!(decide(&fault, &http, &[0]).abort.map(|a| (a.http, a.grpc)), Some((429, 14)), "HTTP takes precedence");
    let illegal = [("x-envoy-fault-abort-grpc-request", "7"), ("x-envoy-fault-abort-request", "600")];
    assert_eq!(decide(&fault, &illegal, &[0]).abort.map(|a| a.grpc), Some(7));
    let junk = [("x-envoy-fault-delay-request", "1.5"), ("x-envoy-fault-abort-request", "oops")];
    let plan = decide(&fault, &junk, &[]);
    assert_eq!((plan.delay, plan.abort), (None, None));
}

#[test]
fn a_share_from_the_request_never_exceeds_the_configured_one() {
    let config = FaultConfig {
        abort: Some(FaultAbort::Header { percentage: percent(30), denominator: Denominator::Hundred }),
        ..FaultConfig::default()
    };
    let fault = compile(&config);
    let aborted = |asked: &str, draw| {
        let headers = [("x-envoy-fault-abort-request", "500"), ("x-envoy-fault-abort-request-percentage", asked)];
        decide(&fault, &headers, &[draw]).abort.is_some()
    };
    assert!(aborted("10", 9));
    assert!(!aborted("10", 10));
    assert!(aborted("99", 29));
    assert!(!aborted("99", 30));
    assert!(!aborted("0", 0));
    assert!(aborted("x", 29), "an unparseable share is ignored");
}

#[test]
fn only_matching_requests_are_touched() {
    let mut config = both();
    let kind = HeaderMatcherKind::Present(true);
    config.headers = vec![HeaderMatcher { name: "x-test".into(), kind, invert: false, treat_missing_as_empty: false }];
    let fault = compile(&config);
    assert!(decide(&fault, &[], &[]).delay.is_none());
    assert!(decide(&fault, &[("x-test", "1")], &[0, 0]).delay.is_some());
}

#[test]
fn active_faults_are_limited_across_filters_and_come_back_when_dropped() {
    let active = ActiveFaults::default();
    let config = FaultConfig { max_active_faults: Some(2), ..both() };
    let fault = Fault::compile(&config, Profile::Grpc, active.clone());
    let other = Fault::compile(&config, Profile::Grpc, active.clone());
    let first = decide(&fault, &[], &[0, 0]);
    let second = decide(&other, &[], &[0, 0]);
    assert_eq!(active.0.load(Ordering::Relaxed), 2);
    assert!(decide(&fault, &[], &[0, 0]).delay.is_none());
    drop(first);
    assert!(decide(&fault, &[], &[0, 0]).delay.is_some());
    drop(second);
    assert_eq!(active.0.load(Ordering::Relaxed), 0);
    let none = Fault::compile(&FaultConfig { max_active_faults: Some(0), ..both() }, Profile::Grpc, active);
    assert!(decide(&none, &[], &[0, 0]).abort.is_none());
}

#[test]
fn an_untouched_request_holds_no_guard() {
    let fault = compile(&both());
    assert!(decide(&fault, &[], &[99, 99]).guard.is_none());
    assert!(decide(&fault, &[], &[0, 99]).guard.is_some());
}
