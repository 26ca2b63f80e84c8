//! Which filter chain takes a connection, by what its client says first: the server name, and the protocols it offers.

use crate::{
    inbound_xds::{Pair, chain, mutual},
    support::{GUARD, until},
};
use envoy_types::pb::envoy::{
    config::listener::v3::{FilterChain, FilterChainMatch},
    extensions::transport_sockets::tls::v3::{CommonTlsContext, DownstreamTlsContext},
};
use examples::greeter::{HelloRequest, greeter_client::GreeterClient};
use hyper_util::rt::TokioIo;
use mesh_tls::{ClientSettings, ClientTls, FileSource, FileSourceConfig, Source, default_provider};
use std::{io, net::SocketAddr, sync::Arc};
use tokio::{net::TcpStream, runtime::Handle};
use tonic::transport::Endpoint;

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// A chain that asks for no certificate: its callers are nobody.
fn open(name: &str) -> FilterChain {
    let whole = mutual("default").common_tls_context.unwrap();
    let common = CommonTlsContext { validation_context_type: None, ..whole };
    chain(name, "tls", Some(DownstreamTlsContext { common_tls_context: Some(common), ..Default::default() }))
}

fn matching(chain: FilterChain, server_names: &[&str], protocols: &[&str]) -> FilterChain {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let matching = FilterChainMatch {
        server_names: texts(server_names),
        application_protocols: texts(protocols),
        ..chain.filter_chain_match.unwrap_or_default()
    };
    FilterChain { filter_chain_match: Some(matching), ..chain }
}

/// The client's certificates.
fn client(pair: &Pair) -> Arc<dyn Source> {
    let files = pair.cp.ca().unwrap().identity_dir("default", "client");
    let config = FileSourceConfig {
        certificate_file: Some(files.join("cert.pem")),
        private_key_file: Some(files.join("key.pem")),
        ca_certificate_file: Some(files.join("ca.pem")),
        ..FileSourceConfig::new("client", default_provider())
    };
    Arc::new(FileSource::new(config, &Handle::current()).unwrap())
}

/// Whom the server takes us for, when we say this first; `None`: no chain takes the connection.
async fn taken_for(addr: SocketAddr, source: &Arc<dyn Source>, name: Option<&str>, alpn: &[&str]) -> Option<String> {
    let alpn = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let settings = ClientSettings { alpn, sni: name.map(str::to_owned), ..ClientSettings::mtls(source.clone()) };
    let tls = ClientTls::new(settings, default_provider()).unwrap();
    let connect = tower::service_fn(move |_| {
        let tls = tls.clone();
        async move {
            let tcp = TcpStream::connect(addr).await?;
            let (stream, _) = tls.connect(tcp, None).await.map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    let call = async {
        let channel = Endpoint::from_static("http://greeter").connect_with_connector(connect).await.ok()?;
        let request = HelloRequest { name: "world".into(), ..HelloRequest::default() };
        Some(GreeterClient::new(channel).say_hello(request).await.ok()?.into_inner().peer)
    };
    tokio::time::timeout(GUARD, call).await.expect("hangs")
}

/// The server serves these chains.
async fn serving(chains: Vec<FilterChain>) -> (Pair, Arc<dyn Source>, SocketAddr) {
    let pair = Pair::new().await;
    pair.serve(pair.listener(chains));
    tokio::time::timeout(GUARD, pair.inbound.ready()).await.unwrap();
    let (source, addr) = (client(&pair), pair.inbound.local_addr());
    (pair, source, addr)
}

#[tokio::test]
async fn the_server_name_chooses_the_chain_the_most_specific_first() {
    let chains = vec![
        matching(chain("mutual", "tls", Some(mutual("default"))), &["mutual.shop.test"], &[]),
        matching(open("open"), &["*.shop.test"], &[]),
    ];
    let (pair, source, addr) = serving(chains).await;
    let h2 = &["h2"][..];
    let (us, nobody) = (Some(CLIENT.to_owned()), Some(String::new()));
    assert_eq!(taken_for(addr, &source, Some("mutual.shop.test"), h2).await, us);
    assert_eq!(taken_for(addr, &source, Some("MUTUAL.shop.test"), h2).await, us, "names have no case");
    assert_eq!(taken_for(addr, &source, Some("any.shop.test"), h2).await, nobody);
    assert_eq!(
        taken_for(addr, &source, Some("very.any.shop.test"), h2).await,
        nobody,
        "a wildcard is any number of labels"
    );
    assert_eq!(taken_for(addr, &source, Some("shop.test"), h2).await, None);
    assert_eq!(taken_for(addr, &source, None, h2).await, None);
    // The names change places.
    pair.serve(pair.listener(vec![
        matching(open("open"), &["mutual.shop.test"], &[]),
        matching(chain("mutual", "tls", Some(mutual("default"))), &[], &[]),
    ]));
    until("the update is in force", async || taken_for(addr, &source, Some("mutual.shop.test"), h2).await == nobody)
        .await;
    assert_eq!(taken_for(addr, &source, None, h2).await, us, "the chain without names takes the rest");
}

#[tokio::test]
async fn the_protocols_that_are_offered_choose_the_chain() {
    let chains = vec![
        matching(chain("mesh", "tls", Some(mutual("default"))), &[], &["istio", "istio-h2"]),
        matching(open("others"), &[], &["h2"]),
    ];
    let (_pair, source, addr) = serving(chains).await;
    let (us, nobody) = (Some(CLIENT.to_owned()), Some(String::new()));
    assert_eq!(taken_for(addr, &source, None, &["istio", "h2"]).await, us, "Istio tells its members by it");
    assert_eq!(taken_for(addr, &source, None, &["h2"]).await, nobody);
    assert_eq!(taken_for(addr, &source, None, &["h2", "istio"]).await, nobody, "the client's order counts");
    assert_eq!(taken_for(addr, &source, None, &["http/1.1"]).await, None);
}
