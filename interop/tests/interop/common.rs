//! Backends and calls that the tests share.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use examples::backend::{Backend, Options};

/// Three greeters, on the loopback addresses 127.0.1.1 to 127.0.1.3: `v1-a`, `v1-b` and `v2-a`.
#[derive(Debug)]
pub(crate) struct Backends([Backend; 3]);

impl Backends {
    pub(crate) async fn start() -> Self {
        let start = async |host, name| {
            let addr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, host)), 0);
            Backend::start(name, addr, Options::default()).await.expect("loopback has free ports")
        };
        Self([start(1, "v1-a").await, start(2, "v1-b").await, start(3, "v2-a").await])
    }

    /// `yaml` with the ports of these backends in the place of 6001, 6002 and 6003.
    pub(crate) fn written_into(&self, yaml: &str) -> String {
        self.0.iter().zip(["6001", "6002", "6003"]).fold(yaml.to_owned(), |yaml, (backend, placeholder)| {
            assert!(yaml.contains(placeholder), "the YAML has no port {placeholder}");
            yaml.replace(placeholder, &backend.addr().port().to_string())
        })
    }
}

/// Checks that `part` of `whole` is `share` within five standard deviations of a fair draw.
#[track_caller]
pub(crate) fn assert_share(part: u64, whole: u64, share: f64) {
    let (part, whole) = (part as f64, whole as f64);
    let spread = 5.0 * (whole * share * (1.0 - share)).sqrt();
    let expected = whole * share;
    assert!((part - expected).abs() <= spread, "{part} of {whole}, where {expected} +- {spread:.0} were expected");
}
