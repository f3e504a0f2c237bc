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
use crate::store::Store;

/// The layer.
#[derive(Debug, Clone)]
pub struct Guard {
    access: Access,
    /// Where roles are confirmed; none before there is a cluster, when root alone is served.
    store: Option<Store>,
    /// Where root is served: for whoever must be root.
    socket: Arc<Path>,
}

impl Guard {
    /// By these roles; `socket` is where root is served.
    #[must_use]
    pub fn new(access: Access, socket: &Path) -> Self {
        Self { access, store: None, socket: socket.into() }
    }

    /// As a member, which has its clients' roles confirmed before they change anything.
    #[must_use]
    pub fn confirming(self, store: Store) -> Self {
        Self { store: Some(store), ..self }
    }

    fn asked<B>(request: &http::Request<B>) -> Result<Asked, Refused> {
        let path = request.uri().path();
        let peer = peer_of(request.extensions()).ok_or(Refused::Nobody)?;
        let rule = rule(path).ok_or_else(|| Refused::Unknown(path.escape_debug().to_string()))?;
        Ok(Asked { rule, peer })
    }

    /// By what this node knows.
    fn judge(&self, Asked { rule, peer }: &Asked) -> Result<Option<Granted>, Refused> {
        let known = self.access.known();
        let client = matches!(peer, PeerIdentity::Client(_));
        let rests_on = (client && rule.carries).then_some(known.revision);
        let role = judge(rule, peer, &known.roles)?;
        Ok(role.map(|role| Granted { role, rests_on }))
    }

    /// By what a quorum confirms, within the store's request timeout; `first` is what this node knew.
    async fn confirm(
        &self,
        asked: &Asked,
        first: Result<Option<Granted>, Refused>,
    ) -> Result<Option<Granted>, Refused> {
        let (Some(store), PeerIdentity::Client(client)) = (&self.store, &asked.peer) else {
            return first.and(Err(Refused::Unread));
        };
        match self.access.catch_up(store).await {
            Ok(()) => self.judge(asked),
            // Whoever could not before is told why, rather than that nobody knows.
            Err(error) => {
                let (call, why) = (asked.rule.call.clone(), error.to_string());
                first.and(Err(Refused::Unconfirmed { call, client: client.clone(), why }))
            }
        }
    }

    fn refuse(&self, peer: Option<&PeerIdentity>, refused: &Refused) -> Status {
        let peer = peer.map(ToString::to_string).unwrap_or_default();
        tracing::info!(peer, "refused: {refused}");
        refused.status(Some(&self.socket))
    }

    /// Resolves when `peer` may not make a call any more that it was let in with.
    async fn lost(self, rule: &'static Rule, peer: PeerIdentity) -> Status {
        let mut roles = self.access.subscribe();
        loop {
            let judged = judge(rule, &peer, &roles.borrow_and_update().roles);
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

/// Who makes which call.
struct Asked {
    rule: &'static Rule,
    peer: PeerIdentity,
}

impl Asked {
    /// Whether what this node has heard of roles is too little to let it through by.
    fn needs_quorum(&self, judged: &Result<Option<Granted>, Refused>) -> bool {
        let client = matches!(self.peer, PeerIdentity::Client(_));
        let carries = self.rule.carries && judged.is_ok();
        client && self.rule.changes() && !carries
    }
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

type Answer<S> = Result<
    <S as Service<http::Request<Body>>>::Response,
    <S as Service<http::Request<Body>>>::Error,
>;

impl<S> Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    /// Has a request served, or says why not.
    fn serve(
        &mut self,
        mut request: http::Request<Body>,
        Asked { rule, peer }: Asked,
        judged: Result<Option<Granted>, Refused>,
    ) -> BoxFuture<'static, Answer<S>> {
        // Absent: without a role.
        let granted = match judged {
            Ok(granted) => granted,
            Err(refused) => return self.refuse(Some(&peer), &refused),
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

    fn refuse(
        &self,
        peer: Option<&PeerIdentity>,
        refused: &Refused,
    ) -> BoxFuture<'static, Answer<S>> {
        let status = self.guard.refuse(peer, refused);
        Box::pin(std::future::ready(Ok(status.into_http())))
    }
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
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
        let asked = match Guard::asked(&request) {
            Ok(asked) => asked,
            Err(refused) => {
                return self.refuse(peer_of(request.extensions()).as_ref(), &refused);
            }
        };
        let judged = self.guard.judge(&asked);
        if !asked.needs_quorum(&judged) {
            return self.serve(request, asked, judged);
        }
        // The one that is ready serves it; its clone is asked whether it is ready for the next one.
        let next = Self { guard: self.guard.clone(), inner: self.inner.clone() };
        let mut ready = std::mem::replace(self, next);
        Box::pin(async move {
            let judged = ready.guard.confirm(&asked, judged).await;
            ready.serve(request, asked, judged).await
        })
    }
}
