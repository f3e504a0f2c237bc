//! A stream that ends when whoever it is for loses the right to it.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http_body::Frame;
use tonic::Status;
use tonic::body::Body;

/// A body, until the right is lost.
pub(super) struct Held {
    /// `None`: it is over.
    body: Option<Body>,
    lost: BoxFuture<'static, Status>,
    /// What is answered ends with the reason as trailers, as every gRPC answer does; what is asked
    /// breaks.
    is_answer: bool,
}

impl Held {
    /// What a client sends.
    pub(super) fn request(body: Body, lost: BoxFuture<'static, Status>) -> Self {
        Self { body: Some(body), lost, is_answer: false }
    }

    /// What it is answered.
    pub(super) fn answer(body: Body, lost: BoxFuture<'static, Status>) -> Self {
        Self { body: Some(body), lost, is_answer: true }
    }

    fn end(&self, status: Status) -> Result<Frame<Bytes>, Status> {
        if !self.is_answer {
            return Err(status);
        }
        let mut trailers = http::HeaderMap::new();
        status.add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.body.is_none() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(status) = self.lost.poll_unpin(cx) {
            // With it goes whatever makes it, here and on the node it was passed on to.
            self.body = None;
            return Poll::Ready(Some(self.end(status)));
        }
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }
}
