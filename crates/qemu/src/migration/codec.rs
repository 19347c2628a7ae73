//! The one door to bytes from outside: checked, big-endian, with the byte offset in every error.

use super::error::{Error, ErrorKind, Result};

/// Bytes that are taken from the front. `what` names the thing being read, for the error.
pub(super) trait Bytes {
    /// Bytes taken so far, plus where the input began.
    fn offset(&self) -> u64;

    /// The next `count` bytes. Fails with [`ErrorKind::Truncated`] if there are fewer.
    fn take(&mut self, count: usize, what: &'static str) -> Result<&[u8]>;

    /// The next byte, which stays; none at the end of the input.
    fn peek(&mut self) -> Result<Option<u8>>;

    /// The next `N` bytes.
    #[inline]
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<&[u8; N]> {
        let offset = self.offset();
        self.take(N, what)?.first_chunk().ok_or(Error::new(offset, ErrorKind::Truncated { what }))
    }

    fn u8(&mut self, what: &'static str) -> Result<u8> {
        self.array(what).map(|bytes| u8::from_be_bytes(*bytes))
    }

    fn be16(&mut self, what: &'static str) -> Result<u16> {
        self.array(what).map(|bytes| u16::from_be_bytes(*bytes))
    }

    fn be32(&mut self, what: &'static str) -> Result<u32> {
        self.array(what).map(|bytes| u32::from_be_bytes(*bytes))
    }

    #[inline]
    fn be64(&mut self, what: &'static str) -> Result<u64> {
        self.array(what).map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// A be32 length or count that is at most `limit`.
    fn length(&mut self, what: &'static str, limit: usize) -> Result<usize> {
        let offset = self.offset();
        let value = self.be32(what)? as usize;
        if value > limit {
            let kind = ErrorKind::TooLarge { what, value: value as u64, limit: limit as u64 };
            return Err(Error::new(offset, kind));
        }
        Ok(value)
    }

    /// `count` bytes of UTF-8.
    fn text(&mut self, count: usize, what: &'static str) -> Result<String> {
        let offset = self.offset();
        let bytes = self.take(count, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Error::new(offset, ErrorKind::NotUtf8 { what })),
        }
    }

    /// A byte of length and that many bytes of UTF-8.
    fn str8(&mut self, what: &'static str) -> Result<String> {
        let count = self.u8(what)?;
        self.text(usize::from(count), what)
    }

    /// A be32 that can only have one value.
    fn expect_be32(&mut self, expected: u32, what: &'static str) -> Result<()> {
        let offset = self.offset();
        match self.be32(what)? {
            found if found == expected => Ok(()),
            found => Err(unexpected(offset, what, found.into(), expected.into())),
        }
    }

    /// A byte that can only have one value.
    fn expect_u8(&mut self, expected: u8, what: &'static str) -> Result<()> {
        let offset = self.offset();
        match self.u8(what)? {
            found if found == expected => Ok(()),
            found => Err(unexpected(offset, what, found.into(), expected.into())),
        }
    }
}

fn unexpected(offset: u64, what: &'static str, found: u64, expected: u64) -> Error {
    Error::new(offset, ErrorKind::Unexpected { what, found, expected })
}

/// Bytes that are all there already.
#[derive(Debug)]
pub(super) struct SliceReader<'a> {
    rest: &'a [u8],
    taken: usize,
    base: u64,
}

impl<'a> SliceReader<'a> {
    /// Reads `bytes`, of which the first is byte `base` of what errors should count in.
    pub(super) fn new(bytes: &'a [u8], base: u64) -> Self {
        Self { rest: bytes, taken: 0, base }
    }

    /// Bytes taken so far.
    pub(super) fn position(&self) -> usize {
        self.taken
    }

    /// What was not taken yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Fails if anything is left.
    pub(super) fn end(&self, what: &'static str) -> Result<()> {
        match self.rest.len() as u64 {
            0 => Ok(()),
            count => Err(Error::new(self.offset(), ErrorKind::Trailing { what, count })),
        }
    }
}

impl Bytes for SliceReader<'_> {
    fn offset(&self) -> u64 {
        self.base + self.taken as u64
    }

    fn take(&mut self, count: usize, what: &'static str) -> Result<&[u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(Error::new(self.offset(), ErrorKind::Truncated { what }));
        };
        self.rest = rest;
        self.taken += count;
        Ok(taken)
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        Ok(self.rest.first().copied())
    }
}

/// Keeps a copy of everything that is taken through it.
#[derive(Debug)]
pub(super) struct Recorder<'a, B> {
    inner: &'a mut B,
    pub(super) bytes: Vec<u8>,
}

impl<'a, B: Bytes> Recorder<'a, B> {
    pub(super) fn new(inner: &'a mut B) -> Self {
        Self { inner, bytes: Vec::new() }
    }
}

impl<B: Bytes> Bytes for Recorder<'_, B> {
    fn offset(&self) -> u64 {
        self.inner.offset()
    }

    fn take(&mut self, count: usize, what: &'static str) -> Result<&[u8]> {
        let taken = self.inner.take(count, what)?;
        self.bytes.extend_from_slice(taken);
        Ok(taken)
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        self.inner.peek()
    }
}

/// Appends `text` with its length in one byte. Names in a stream have at most 255 bytes; a longer one is refused where
/// it enters ([`RamBlocks`](super::RamBlocks), [`StreamHeader`](super::StreamHeader)), so nothing is cut off here.
pub(super) fn put_str8(out: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= usize::from(u8::MAX), "a name of {} bytes", text.len());
    out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    out.extend(text.bytes().take(usize::from(u8::MAX)));
}
