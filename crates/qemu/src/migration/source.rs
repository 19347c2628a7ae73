//! A stream as it arrives: large reads into one buffer, out of which everything is handed as slices.

use std::io::{self, Read};

use super::codec::Bytes;
use super::error::{Error, ErrorKind, Result};

/// Bytes of the buffer. Small enough to stay in the processor's cache between the kernel's copy and the sink's, large
/// enough that system calls and the move of an unfinished record to the front do not count.
const BUFFER_BYTES: usize = 256 << 10;

/// A buffered reader that never asks for more than what it needs to go on, so that it does not wait on a peer who has
/// nothing left to say.
#[derive(Debug)]
pub(super) struct StreamReader<R> {
    inner: R,
    buffer: Box<[u8]>,
    // What was read and not taken: buffer[start..end].
    start: usize,
    end: usize,
    taken: u64,
}

impl<R: Read> StreamReader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, buffer: vec![0; BUFFER_BYTES].into_boxed_slice(), start: 0, end: 0, taken: 0 }
    }

    /// Appends to `out` what is there; waits for one read if nothing is. Returns false at the end of the input.
    pub(super) fn more(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.read_once()? == 0 {
                return Ok(false);
            }
        }
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        out.extend_from_slice(there);
        self.taken += there.len() as u64;
        self.start = self.end;
        Ok(true)
    }

    /// Reads until `count` bytes are there, or fails.
    #[cold]
    fn fill(&mut self, count: usize, what: &'static str) -> Result<()> {
        if count > self.buffer.len() {
            let kind = ErrorKind::TooLarge { what, value: count as u64, limit: self.buffer.len() as u64 };
            return Err(Error::new(self.taken, kind));
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < count {
            if self.read_once()? == 0 {
                return Err(Error::new(self.taken + self.end as u64, ErrorKind::Truncated { what }));
            }
        }
        Ok(())
    }

    /// One read behind what is there. Returns the number of bytes, 0 at the end of the input.
    fn read_once(&mut self) -> Result<usize> {
        let free = self.buffer.get_mut(self.end..).unwrap_or_default();
        loop {
            match self.inner.read(free) {
                Ok(count) => {
                    // A reader that claims more than it was given room for must not move us out of the buffer.
                    let count = count.min(free.len());
                    self.end += count;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let offset = self.taken + (self.end - self.start) as u64;
                    return Err(Error::new(offset, ErrorKind::Read(error)));
                }
            }
        }
    }
}

impl<R: Read> Bytes for StreamReader<R> {
    #[inline]
    fn offset(&self) -> u64 {
        self.taken
    }

    #[inline]
    fn take(&mut self, count: usize, what: &'static str) -> Result<&[u8]> {
        if self.end - self.start < count {
            self.fill(count, what)?;
        }
        let start = self.start;
        self.start += count;
        self.taken += count as u64;
        // Never the empty default: fill has made sure that the bytes are there.
        Ok(self.buffer.get(start..start + count).unwrap_or_default())
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.read_once()? == 0 {
                return Ok(None);
            }
        }
        Ok(self.buffer.get(self.start).copied())
    }
}
