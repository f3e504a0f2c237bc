//! Stands before all services of a listener, and judges each request by its path.

use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

use cluster::tls::{PeerIdentity, peer_of};
use futures::future::BoxFuture;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::stream::Held;
use super::table::rule;
use super::{Access, Granted, Refused, Rule, judge};

/// The layer.
#[derive(Debug, Clone)]
pub struct Guard {
    access: Access,
    /// Where root is served: for whoever must be root.
    socket: Arc<Path>,
}

impl Guard {
    /// By these roles; `socket` is where root is served.
    #[must_use]
    pub fn new(access: Access, socket: &Path) -> Self {
        Self { access, socket: socket.into() }
    }

    fn judge<B>(&self, request: &http::Request<B>) -> Result<Judged, Status> {
        let path = request.uri().path();
        let peer = peer_of(request.extensions());
        let peer = peer.ok_or_else(|| Refused::Nobody.status(None))?;
        let judged = match rule(path) {
            Some(rule) => judge(rule, &peer, &self.access.roles()).map(|role| (rule, role)),
            None => Err(Refused::Unknown(path.escape_debug().to_string())),
        };
        match judged {
            Ok((rule, role)) => {
                Ok(Judged { rule, peer, granted: role.map(|role| Granted { role }) })
            }
            Err(refused) => {
                tracing::info!(%peer, "refused: {refused}");
                Err(refused.status(Some(&self.socket)))
            }
        }
    }

    /// Resolves when `peer` may not make a call any more that it was let in with.
    async fn lost(self, rule: &'static Rule, peer: PeerIdentity) -> Status {
        let mut roles = self.access.subscribe();
        loop {
            let judged = judge(rule, &peer, &roles.borrow_and_update());
            match judged {
                Ok(_) | Err(Refused::Unread) => {}
                Err(refused) => {
                    tracing::info!(%peer, "cut off: {refused}");
                    return refused.status(Some(&self.socket));
                }
            }
            if roles.changed().await.is_err() {
                // Nobody changes them any more.
                return std::future::pending().await;
            }
        }
    }
}

/// A request that is let through.
struct Judged {
    rule: &'static Rule,
    peer: PeerIdentity,
    /// Absent: without a role.
    granted: Option<Granted>,
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

/// A service with the guard before it.
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        // Nobody brings a word of their own.
        request.extensions_mut().remove::<Granted>();
        let Judged { rule, peer, granted } = match self.guard.judge(&request) {
            Ok(judged) => judged,
            Err(status) => return Box::pin(std::future::ready(Ok(status.into_http()))),
        };
        if let Some(granted) = granted {
            request.extensions_mut().insert(granted);
        }
        if !rule.streams || !matches!(peer, PeerIdentity::Client(_)) {
            return Box::pin(self.inner.call(request));
        }
        let lost = || Box::pin(self.guard.clone().lost(rule, peer.clone()));
        let answers = lost();
        let request = request.map(|body| Body::new(Held::request(body, lost())));
        let answered = self.inner.call(request);
        Box::pin(
            async move { Ok(answered.await?.map(|body| Body::new(Held::answer(body, answers)))) },
        )
    }
}
