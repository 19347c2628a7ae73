//! Pages in frames: some that lie together are compressed together, where that makes them smaller.
//!
//! Every frame says what it is, so that frames can be found in a pack whose table is damaged.

use crate::PAGE_SIZE;
use crate::codec::Reader;
use crate::error::Problem;

use super::frame::MAX_FRAME_PAGES;

/// Begins every frame.
pub(crate) const FRAME_MAGIC: &[u8; 4] = b"SPFR";
/// Bytes before a frame's content.
const FRAME_HEADER: usize = 16;

/// Pages of a frame that we write: 64 KiB. Longer ones save 2 % and cost a reader of single pages as much more.
pub(crate) const FRAME_PAGES: u32 = 16;

/// A frame is compressed if that takes away a 16th of it.
const WORTH: usize = 16;

/// Where the frames of a pack are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frames {
    /// Pages in each frame; the last one may have fewer.
    pub(crate) pages: u32,
    /// Offset of each from the start of the first, in units of eight bytes, and the end of the last.
    starts: Vec<u32>,
}

impl Frames {
    /// Decodes the table of a pack of `pages` pages whose frames take `bytes` bytes.
    pub(crate) fn decode(table: &[u8], per_frame: u32, pages: u32, bytes: u64) -> Result<Self, Problem> {
        let (records, rest) = table.as_chunks::<4>();
        let impossible = Problem::Field("table of frames");
        let count = pages.div_ceil(per_frame.max(1)) as usize;
        if !rest.is_empty() || records.len() != count {
            return Err(impossible);
        }
        let mut starts: Vec<u32> = records.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        starts.push(u32::try_from(bytes / 8).map_err(|_| impossible)?);
        if starts.first() != Some(&0)
            || !starts.windows(2).all(|w| matches!(w, [a, b] if a < b || count == 0))
        {
            return Err(impossible);
        }
        Ok(Self { pages: per_frame, starts })
    }

    /// Encodes the table: the start of each frame.
    pub(crate) fn encode(starts: &[u32]) -> Vec<u8> {
        starts.iter().flat_map(|start| start.to_le_bytes()).collect()
    }

    /// Number of the frame that has a page, and which of its pages that is.
    pub(crate) fn find(&self, slot: u32) -> (u32, usize) {
        (slot / self.pages, (slot % self.pages) as usize)
    }

    /// Start of a frame and its length, in bytes from the start of the first.
    pub(crate) fn range(&self, frame: u32) -> Option<(u64, usize)> {
        let (start, end) = (self.starts.get(frame as usize)?, self.starts.get(frame as usize + 1)?);
        Some((u64::from(*start) * 8, (end - start) as usize * 8))
    }

    /// Bytes that a page takes, a part of its frame, in a pack of `pages` pages: the last frame may have fewer than the others.
    pub(crate) fn page_bytes(&self, slot: u32, pages: u32) -> u64 {
        let (frame, _) = self.find(slot);
        let (_, len) = self.range(frame).unwrap_or((0, 0));
        let own = pages.saturating_sub(frame.saturating_mul(self.pages)).clamp(1, self.pages);
        (len as u64).div_ceil(u64::from(own))
    }
}

/// Makes frames of one level of compression.
pub(crate) struct FrameWriter(zstd::bulk::Compressor<'static>);

impl FrameWriter {
    pub(crate) fn new(level: i32) -> std::io::Result<Self> {
        zstd::bulk::Compressor::new(level).map(Self)
    }

    /// One frame of whole pages, padded to a multiple of eight bytes.
    pub(crate) fn encode(&mut self, pages: &[u8]) -> Vec<u8> {
        // What cannot be compressed, for whatever reason, stays as it is.
        let packed =
            self.0.compress(pages).ok().filter(|packed| packed.len() <= pages.len() - pages.len() / WORTH);
        let (kind, content): (u16, &[u8]) = packed.as_deref().map_or((0, pages), |packed| (1, packed));
        let mut out = Vec::with_capacity(FRAME_HEADER + content.len() + 8);
        out.extend(FRAME_MAGIC);
        out.extend((content.len() as u32).to_le_bytes());
        out.extend(((pages.len() / PAGE_SIZE) as u16).to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend([0; 4]);
        out.extend(content);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

/// Bytes of the frame whose header is at the head of `bytes`; none if it cannot be one.
pub(crate) fn frame_bytes(bytes: &[u8]) -> Option<u64> {
    let mut reader = Reader::new(bytes);
    let (magic, len) = (reader.array::<4>().ok()?, u64::from(reader.u32().ok()?));
    let (pages, kind, zero) = (reader.u16().ok()?, reader.u16().ok()?, reader.u32().ok()?);
    let fits = u32::from(pages) <= MAX_FRAME_PAGES && len <= u64::from(pages) * PAGE_SIZE as u64;
    (&magic == FRAME_MAGIC && fits && len > 0 && kind <= 1 && zero == 0).then_some(FRAME_HEADER as u64 + len)
}

/// The pages of the frame at the head of `bytes`, at most `most` of them. Their content is checked by their names, not here.
pub(crate) fn decode_frame(bytes: &[u8], most: u32) -> Result<Vec<[u8; PAGE_SIZE]>, Problem> {
    let mut reader = Reader::new(bytes);
    let (magic, len) = (reader.array::<4>()?, reader.u32()? as usize);
    let (pages, kind, zero) = (reader.u16()?, reader.u16()?, reader.u32()?);
    if &magic != FRAME_MAGIC || zero != 0 || pages == 0 || u32::from(pages) > most {
        return Err(Problem::Field("frame"));
    }
    let content = bytes.get(FRAME_HEADER..).and_then(|rest| rest.get(..len)).ok_or(Problem::TooShort)?;
    let mut out = vec![[0; PAGE_SIZE]; usize::from(pages)];
    let room = out.as_flattened_mut();
    let whole = match kind {
        0 if len == room.len() => {
            room.copy_from_slice(content);
            true
        }
        1 => zstd::bulk::decompress_to_buffer(content, room).is_ok_and(|len| len == room.len()),
        _ => false,
    };
    if whole { Ok(out) } else { Err(Problem::Field("frame content")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_whatever_is_in_it() {
        let mut writer = FrameWriter::new(3).unwrap();
        for count in [1, 2, 16] {
            for random in [false, true] {
                let mut pages = vec![[7; PAGE_SIZE]; count];
                if random {
                    blake3::Hasher::new().finalize_xof().fill(pages.as_flattened_mut());
                }
                let frame = writer.encode(pages.as_flattened());
                assert_eq!(frame.len() % 8, 0);
                assert_eq!(frame.len() < count * PAGE_SIZE, !random);
                assert_eq!(decode_frame(&frame, 16).unwrap(), pages);
                assert!(count == 1 || decode_frame(&frame, count as u32 - 1).is_err());
                for len in 0..frame.len().saturating_sub(8) {
                    assert!(decode_frame(&frame[..len], 16).is_err(), "cut to {len}");
                }
            }
        }
    }

    #[test]
    fn a_table_that_contradicts_itself_is_refused() {
        let table = Frames::encode(&[0, 5, 9]);
        assert!(Frames::decode(&table, 16, 40, 96).is_ok());
        for (table, pages, bytes) in [
            (table.clone(), 50, 96),
            (table.clone(), 40, 72),
            (table[..11].to_vec(), 40, 96),
            (Frames::encode(&[1, 5, 9]), 40, 96),
            (Frames::encode(&[0, 9, 5]), 40, 96),
        ] {
            assert!(Frames::decode(&table, 16, pages, bytes).is_err());
        }
    }
}
