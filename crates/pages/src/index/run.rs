//! A run: names and places of many packs, sorted, in a file that is mapped.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use super::Mapping;
use crate::Fingerprint;
use crate::codec::Reader;
use crate::error::Problem;
use crate::pack::{At, PackId, Place, seal, unseal};
use crate::sync::{AtomicBool, Ordering};

const MAGIC: &[u8; 8] = b"SPININDX";
const END_MAGIC: &[u8; 8] = b"SPINXEND";

/// Format version that this program writes. A run of any other is made anew.
const VERSION: u32 = 1;

pub(super) const HEADER: usize = 4096;
pub(super) const TRAILER: usize = 96;
/// Bytes of an entry: name, number of the pack in the run's list, place in it.
pub(super) const ENTRY: usize = 24;
/// Bytes of a bucket's start.
const BUCKET: usize = 4;
/// Bytes of a pack's id.
const ID: usize = 8;
/// Names of a bucket on average; a bucket is read as a whole.
const PER_BUCKET: usize = 8;

/// No pack of this process.
const NONE: u32 = u32::MAX;

/// One file of the index.
pub(crate) struct Run {
    /// Its number; a higher one is newer.
    pub(crate) number: u64,
    pub(crate) path: PathBuf,
    bytes: Mapping,
    parts: Parts,
    /// Numbers in this process of the packs in the run's list.
    packs: Vec<u32>,
    ids: Vec<PackId>,
    checksum: [u8; 32],
    /// The checksum was looked at.
    checked: AtomicBool,
}

/// Where the parts of a run are.
struct Parts {
    entries: usize,
    bits: u32,
    buckets_at: usize,
}

impl Run {
    /// Accepts the bytes of a file. `pack` knows the packs of this process by their ids; `whole` has every checksum looked at.
    pub(crate) fn new(
        number: u64,
        path: PathBuf,
        bytes: Mapping,
        group: &[u8; 16],
        pack: impl Fn(PackId) -> Option<u32>,
        whole: bool,
    ) -> Result<Self, Problem> {
        let header = bytes.get(..HEADER).ok_or(Problem::TooShort)?;
        let mut reader = Reader::new(header);
        if &reader.array::<8>()? != MAGIC {
            return Err(Problem::Magic("index"));
        }
        unseal(header, "index")?;
        let (version, zero, own) = (reader.u32()?, reader.u32()?, reader.u64()?);
        if version != VERSION || zero != 0 || own != number {
            return Err(Problem::Field("version or number of an index"));
        }
        if &reader.array::<16>()? != group {
            return Err(Problem::OtherGroup);
        }
        let end = bytes.len().checked_sub(TRAILER).filter(|end| *end >= HEADER).ok_or(Problem::TooShort)?;
        let trailer = bytes.get(end..).ok_or(Problem::TooShort)?;
        let mut reader = Reader::new(trailer);
        if &reader.array::<8>()? != END_MAGIC {
            return Err(Problem::Magic("end of an index"));
        }
        unseal(trailer, "end of an index")?;
        let (entries, bits, packs) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let checksum = reader.array::<32>()?;
        let impossible = Problem::Field("lengths in an index");
        if bits > 31 || entries > u64::from(u32::MAX) || packs > u64::from(NONE) {
            return Err(impossible);
        }
        let (entries, buckets) = (entries as usize, (1_usize << bits) + 1);
        let buckets_at = HEADER + entries * ENTRY;
        let packs_at = buckets_at + buckets * BUCKET;
        if packs_at + packs as usize * ID != end {
            return Err(impossible);
        }
        let ids = bytes.get(packs_at..end).unwrap_or_default().as_chunks::<ID>().0;
        let ids: Vec<PackId> = ids.iter().map(|id| PackId(u64::from_le_bytes(*id))).collect();
        let packs = ids.iter().map(|id| pack(*id).unwrap_or(NONE)).collect();
        let parts = Parts { entries, bits: bits as u32, buckets_at };
        let run = Self { number, path, bytes, parts, packs, ids, checksum, checked: AtomicBool::new(false) };
        if whole && !run.is_whole() { Err(Problem::Checksum("index")) } else { Ok(run) }
    }

    /// Everything in it is as it was written. Slow, the first time.
    pub(super) fn is_whole(&self) -> bool {
        if !self.checked.load(Ordering::Relaxed) {
            let content = self.bytes.get(HEADER..self.bytes.len().saturating_sub(TRAILER));
            if content.map(checksum_of) != Some(self.checksum) {
                return false;
            }
            self.checked.store(true, Ordering::Relaxed);
        }
        true
    }

    /// A file of these parts whose checksums fit, for fuzzing.
    pub(crate) fn bytes_of(
        group: &[u8; 16],
        entries: &[u8],
        bits: u8,
        buckets: &[u8],
        packs: &[u8],
    ) -> Vec<u8> {
        let content = [entries, buckets, packs].concat();
        let mut trailer = END_MAGIC.to_vec();
        for count in [entries.len() / ENTRY, usize::from(bits), packs.len() / ID] {
            trailer.extend((count as u64).to_le_bytes());
        }
        trailer.extend(checksum_of(&content));
        [Encoder::header(1, group), content, seal(trailer)].concat()
    }

    /// Number of names.
    pub(crate) fn len(&self) -> usize {
        self.parts.entries
    }

    /// Packs whose names are all here, or in a newer place.
    pub(crate) fn covers(&self) -> &[PackId] {
        &self.ids
    }

    /// Numbers of the packs that its places are in.
    pub(super) fn packs(&self) -> impl Iterator<Item = u32> {
        self.packs.iter().copied().filter(|pack| *pack != NONE)
    }

    /// Memory that the run takes, apart from its mapping.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.ids.len() * size_of::<PackId>() + self.packs.len() * size_of::<u32>()
    }

    /// Place of a name, in a pack that was there when the run was opened.
    pub(crate) fn get(&self, name: Fingerprint) -> Option<Place> {
        let bucket = bucket(name, self.parts.bits);
        let starts = self.bytes.get(self.parts.buckets_at + bucket * BUCKET..)?;
        let (from, rest) = starts.split_first_chunk::<BUCKET>()?;
        let to = rest.first_chunk::<BUCKET>()?;
        let (from, to) = (u32::from_le_bytes(*from) as usize, u32::from_le_bytes(*to) as usize);
        let entries = self.bytes.get(HEADER + from * ENTRY..HEADER + to * ENTRY)?;
        let entry = entries.as_chunks::<ENTRY>().0.iter().find(|entry| entry.starts_with(&name.0))?;
        self.place(entry)
    }

    /// All names and places in order, but for packs that are not there.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Fingerprint, Place)> {
        let entries = self.bytes.get(HEADER..HEADER + self.parts.entries * ENTRY).unwrap_or_default();
        entries.as_chunks::<ENTRY>().0.iter().filter_map(|entry| {
            let (name, _) = entry.split_first_chunk()?;
            Some((Fingerprint(*name), self.place(entry)?))
        })
    }

    fn place(&self, entry: &[u8; ENTRY]) -> Option<Place> {
        let (_, place) = entry.split_first_chunk::<16>()?;
        let (pack, at) = place.split_first_chunk::<4>()?;
        let pack = *self.packs.get(u32::from_le_bytes(*pack) as usize).filter(|pack| **pack != NONE)?;
        let at = At::from_raw(u32::from_le_bytes(*at.first_chunk()?));
        Some(Place { pack, at })
    }
}

/// The bucket of a name: its first bits.
fn bucket(name: Fingerprint, bits: u32) -> usize {
    let [a, b, c, d, ..] = name.0;
    (u64::from(u32::from_be_bytes([a, b, c, d])) >> (32 - bits)) as usize
}

/// On all cores: of a large store it is a gigabyte.
fn checksum_of(content: &[u8]) -> [u8; 32] {
    let parts: Vec<&[u8]> = content.chunks(PART).collect();
    let sums = crate::threads::side_by_side(parts.into_iter(), |part| *blake3::hash(part).as_bytes());
    *blake3::hash(sums.as_flattened()).as_bytes()
}

/// Bytes that are hashed by themselves; the checksum is the hash of their hashes.
const PART: usize = 1 << 20;

/// Makes the bytes of a run, a piece at a time.
pub(super) struct Encoder {
    packs: HashMap<u32, u32>,
    ids: Vec<PackId>,
    bits: u32,
    entries: u64,
    buckets: Vec<u32>,
    /// Since the last whole part.
    open_part: blake3::Hasher,
    open_bytes: usize,
    sums: Vec<u8>,
}

impl Encoder {
    /// For at most `most` names in these packs.
    pub(super) fn new(most: usize, packs: &[(PackId, u32)]) -> Self {
        let bits = (most / PER_BUCKET).max(1).next_power_of_two().trailing_zeros().min(31);
        let numbers = (0..).zip(packs).map(|(ordinal, (_, number))| (*number, ordinal)).collect();
        Self {
            packs: numbers,
            ids: packs.iter().map(|(id, _)| *id).collect(),
            bits,
            entries: 0,
            buckets: vec![0; (1 << bits) + 1],
            open_part: blake3::Hasher::new(),
            open_bytes: 0,
            sums: Vec::new(),
        }
    }

    pub(super) fn header(number: u64, group: &[u8; 16]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        out.extend(number.to_le_bytes());
        out.extend(group);
        out.resize(HEADER - 32, 0);
        seal(out)
    }

    /// Appends an entry, in order.
    ///
    /// # Errors
    /// Its pack is not listed: without it the run would say that it has all names of a pack and lack some.
    pub(super) fn entry(&mut self, (name, place): (Fingerprint, Place), out: &mut Vec<u8>) -> io::Result<()> {
        let Some(pack) = self.packs.get(&place.pack) else {
            return Err(io::Error::other("a name of a pack that is not listed"));
        };
        out.extend(name.0);
        out.extend(pack.to_le_bytes());
        out.extend(place.at.raw().to_le_bytes());
        self.entries += 1;
        if let Some(count) = self.buckets.get_mut(bucket(name, self.bits) + 1) {
            *count += 1;
        }
        Ok(())
    }

    /// Counts bytes that are written.
    pub(super) fn hash(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(PART - self.open_bytes));
            self.open_part.update(part);
            self.open_bytes += part.len();
            bytes = rest;
            if self.open_bytes == PART {
                self.close_part();
            }
        }
    }

    fn close_part(&mut self) {
        self.sums.extend(self.open_part.finalize().as_bytes());
        self.open_part = blake3::Hasher::new();
        self.open_bytes = 0;
    }

    /// What comes behind the entries: buckets, packs, trailer.
    pub(super) fn end(mut self) -> Vec<u8> {
        let mut sum = 0_u32;
        let mut out = Vec::with_capacity(self.buckets.len() * BUCKET + self.ids.len() * ID + TRAILER);
        for count in &self.buckets {
            sum = sum.saturating_add(*count);
            out.extend(sum.to_le_bytes());
        }
        self.ids.iter().for_each(|id| out.extend(id.0.to_le_bytes()));
        self.hash(&out);
        if self.open_bytes > 0 {
            self.close_part();
        }
        let mut trailer = END_MAGIC.to_vec();
        trailer.extend(self.entries.to_le_bytes());
        trailer.extend(u64::from(self.bits).to_le_bytes());
        trailer.extend((self.ids.len() as u64).to_le_bytes());
        trailer.extend(blake3::hash(&self.sums).as_bytes());
        out.extend(seal(trailer));
        out
    }
}
