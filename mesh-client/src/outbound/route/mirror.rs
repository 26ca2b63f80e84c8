//! Who gets a copy of a request.

use super::RequestHead;
use http::HeaderName;
use mesh_xds::resource::{FractionalPercent, Mirror as Config, MirrorCluster, MirrorHost};
use std::{fmt, sync::Arc};

/// One mirror of a route. `C` is what a cluster's name was resolved to.
#[derive(Debug)]
pub(crate) struct Mirror<C> {
    to: To<C>,
    share: Option<FractionalPercent>,
    /// Whether the copy's trace is recorded, where that is not as the request's.
    pub(crate) sampled: Option<bool>,
    host: MirrorHost,
}

#[derive(Debug)]
enum To<C> {
    Named(Arc<str>, C),
    /// Every cluster of the virtual host, sorted by name.
    ByHeader(HeaderName, Box<[(Arc<str>, C)]>),
}

impl<C> Mirror<C> {
    /// `known` are the clusters that a header may name, sorted.
    pub(super) fn compile<'k>(
        config: &Config,
        known: impl IntoIterator<Item = &'k Arc<str>>,
        resolve: &mut dyn FnMut(&Arc<str>) -> C,
    ) -> Self {
        let to = match &config.cluster {
            MirrorCluster::Name(name) => To::Named(name.clone(), resolve(name)),
            MirrorCluster::Header(header) => {
                let known = known.into_iter().map(|name| (name.clone(), resolve(name)));
                To::ByHeader(header.clone(), known.collect())
            }
        };
        Self { to, share: config.fraction, sampled: config.trace_sampled, host: config.host.clone() }
    }

    /// The cluster that gets a copy of this request; `None`: it is not drawn, or its header names no cluster. `rng(bound)` is
    /// uniform in `0..bound`.
    pub(crate) fn draw(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> Option<(&Arc<str>, &C)> {
        if !self.share.is_none_or(|share| share.admits(rng(FractionalPercent::HUNDRED.0))) {
            return None;
        }
        match &self.to {
            To::Named(name, cluster) => Some((name, cluster)),
            To::ByHeader(header, known) => {
                let name = head.first(header)?;
                let at = known.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
                Some((&known[at].0, &known[at].1))
            }
        }
    }

    /// The authority of the copy of a request for `own`; `None`: the same. Envoy puts `-shadow` before the port.
    pub(crate) fn authority(&self, own: &str) -> Option<String> {
        match &self.host {
            MirrorHost::Same => None,
            MirrorHost::Literal(host) => Some(host.to_string()),
            MirrorHost::Shadow => {
                let bracket = own.rfind(']').unwrap_or(0);
                let port = own[bracket..].find(':').map_or(own.len(), |colon| bracket + colon);
                let (name, port) = own.split_at(port);
                // Inside the brackets of an IPv6 address no name can be made.
                Some(if name.ends_with(']') { own.to_owned() } else { format!("{name}-shadow{port}") })
            }
        }
    }
}

impl<C> fmt::Display for Mirror<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            To::Named(name, _) => write!(f, "a copy to `{name}`")?,
            To::ByHeader(header, _) => write!(f, "a copy to the cluster that header {header} names")?,
        }
        match self.share {
            Some(share) => write!(f, ", of {} % of the requests", f64::from(share.0) / 10_000.0),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, Method, Uri};

    fn mirror(config: Config) -> Mirror<()> {
        let known = ["a", "b"].map(Arc::from);
        Mirror::compile(&config, &known, &mut |_| ())
    }

    fn config(cluster: MirrorCluster) -> Config {
        Config { cluster, fraction: None, trace_sampled: None, host: MirrorHost::Shadow }
    }

    #[test]
    fn the_name_of_the_host_gets_a_suffix_and_its_port_stays() {
        let shadow = mirror(config(MirrorCluster::Name("m".into())));
        for (own, expected) in [
            ("greeter", "greeter-shadow"),
            ("greeter.default:8080", "greeter.default-shadow:8080"),
            ("[::1]:80", "[::1]:80"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(shadow.authority(own).as_deref(), Some(expected));
        }
        let host = |host| mirror(Config { host, ..config(MirrorCluster::Name("m".into())) }).authority("own");
        assert_eq!(host(MirrorHost::Same), None);
        assert_eq!(host(MirrorHost::Literal("other".into())).as_deref(), Some("other"));
    }

    #[test]
    fn a_share_is_drawn_and_a_header_names_only_what_is_known() {
        let (method, uri, mut headers) = (Method::GET, Uri::from_static("http://h/"), HeaderMap::new());
        let draw = |mirror: &Mirror<()>, headers: &HeaderMap, drawn: u32| {
            let head = RequestHead::new(&method, &uri, headers);
            mirror.draw(&head, &mut |_| drawn).map(|(name, ())| name.to_string())
        };
        let third = Config { fraction: Some(FractionalPercent(333_333)), ..config(MirrorCluster::Name("m".into())) };
        let third = mirror(third);
        assert_eq!(draw(&third, &headers, 333_332).as_deref(), Some("m"));
        assert_eq!(draw(&third, &headers, 333_333), None);
        let by_header = mirror(config(MirrorCluster::Header("x-mirror".parse().unwrap())));
        assert_eq!(draw(&by_header, &headers, 0), None);
        headers.insert("x-mirror", "b".parse().unwrap());
        assert_eq!(draw(&by_header, &headers, 0).as_deref(), Some("b"));
        headers.insert("x-mirror", "c".parse().unwrap());
        assert_eq!(draw(&by_header, &headers, 0), None);
    }
}
