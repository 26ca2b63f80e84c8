//! A byte stream of which some was read already.

use bytes::{Buf, Bytes};
use pin_project::pin_project;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// A byte stream whose first bytes were taken out of it, to look at, and are read again.
#[pin_project]
#[derive(Debug)]
pub struct Rewind<IO> {
    /// What is left of them.
    read: Bytes,
    #[pin]
    io: IO,
}

impl<IO> Rewind<IO> {
    /// Nothing was read yet.
    pub fn new(io: IO) -> Self {
        Self::with(Bytes::new(), io)
    }

    /// `read` comes first, then what `io` has.
    pub fn with(read: Bytes, io: IO) -> Self {
        Self { read, io }
    }

    /// The stream below.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }
}

impl<IO: AsyncRead + Unpin> Rewind<IO> {
    /// The first `N` bytes, or fewer if fewer arrive together; none at the end of input. To be called once, before any read.
    pub(crate) async fn peek<const N: usize>(&mut self) -> io::Result<&[u8]> {
        let mut bytes = [0; N];
        let length = self.io.read(&mut bytes).await?;
        self.read = Bytes::copy_from_slice(&bytes[..length]);
        Ok(&self.read)
    }
}

impl<IO: AsyncRead> AsyncRead for Rewind<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        if this.read.is_empty() {
            return this.io.poll_read(cx, buf);
        }
        let some = this.read.len().min(buf.remaining());
        buf.put_slice(&this.read[..some]);
        this.read.advance(some);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite> AsyncWrite for Rewind<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_looked_at_is_read_first_whatever_the_size_of_the_reads() {
        let mut stream = Rewind::new(&b"abcdef"[..]);
        assert_eq!(stream.peek::<4>().await.unwrap(), b"abcd");
        let mut some = [0; 3];
        stream.read_exact(&mut some).await.unwrap();
        assert_eq!(&some, b"abc");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "def");
        let mut whole = String::new();
        Rewind::with(Bytes::from_static(b"ab"), &b"c"[..]).read_to_string(&mut whole).await.unwrap();
        assert_eq!(whole, "abc");
    }
}
