//! Single policies as plain tower layers around a hyper client: no mesh, no control plane, nothing else to run.

use bytes::Bytes;
use examples::backend::{Backend, Options};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mesh_client::circuit_breaker::{CircuitBreakerLayer, Limits};
use mesh_client::retry::{Condition, Policy, RetryBudget, RetryLayer};
use tower::{Service, ServiceBuilder, ServiceExt};

const REQUESTS: u32 = 200;

#[tokio::main]
#[allow(clippy::print_stdout, reason = "the program's output")]
async fn main() -> anyhow::Result<()> {
    let options = Options { fail_rate: 0.3, ..Options::default() };
    let backend = Backend::http("flaky", "127.0.0.1:0".parse()?, options).await?;

    let policy = Policy::http().on(Condition::Http5xx).max_retries(10).build();
    let mut client = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(Limits::max_requests(100)))
        .layer(RetryLayer::new(policy).budget(RetryBudget::percent(20.0, 3)))
        .service(Client::builder(TokioExecutor::new()).build_http());

    let mut failed = 0;
    for _ in 0..REQUESTS {
        let request = Request::get(format!("http://{}/", backend.addr())).body(Full::<Bytes>::default())?;
        let answer = client.ready().await.map_err(anyhow::Error::from_boxed)?.call(request).await;
        let answer = answer.map_err(anyhow::Error::from_boxed)?;
        failed += u32::from(!answer.status().is_success());
        answer.into_body().collect().await?;
    }
    println!("the caller made {REQUESTS} requests, and {failed} of them failed");
    println!("the backend saw {} and failed {} of them", backend.state().calls(), backend.state().failed());
    Ok(())
}
