//! A large store without its pages, for benchmarks: real packs with holes where the pages would be, and a run over all of them.

use std::path::Path;
use std::sync::Arc;

use super::run::Encoder;
use super::runs::Runs;
use crate::disk::{Disk, HostDisk};
use crate::error::{Error, Result};
use crate::group::Names;
use crate::pack::{At, Building, Entry, NewBody, PackId, Place};
use crate::store::Limits;
use crate::{Fingerprint, GroupKey, Origin, Store};

/// Name of a page, as evenly spread as hashes are and in the order of the numbers; if it is not a known one, it lies between two of them.
pub(crate) fn name(number: u64, pages: u64, known: bool) -> Fingerprint {
    let step = u64::MAX / pages.max(1);
    let low = if known { mixed(number) } else { !mixed(number) };
    let high = number * step + low % step;
    let mut bytes = [0; 16];
    let halves = high.to_be_bytes().into_iter().chain(mixed(low).to_le_bytes());
    bytes.iter_mut().zip(halves).for_each(|(byte, own)| *byte = own);
    Fingerprint(bytes)
}

/// The finalizer of SplitMix64.
fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// See [`crate::bench::make_synthetic`].
pub(crate) fn make(folder: &Path, key: &GroupKey, pages: u64) -> Result<()> {
    drop(Store::create(folder, key.clone())?);
    let (disk, group) = (Arc::new(HostDisk::default()), Names::new(key).fingerprint);
    let count = pages.div_ceil(u64::from(Limits::default().pack_pages)).max(1);
    let packs_folder = folder.join("packs");
    let mut packs: Vec<(PackId, u32)> = Vec::new();
    for number in 0..count {
        // Neighbours among names lie in different packs, as in life.
        let own = (number..pages).step_by(count as usize).zip(0..);
        let mut entries: Vec<Entry> =
            own.map(|(page, slot)| Entry::page(name(page, pages, true), slot)).collect();
        let mut pack = Building::create(&*disk, &packs_folder, group, Origin::default(), NewBody::Raw)?;
        let _holes = pack.claim(entries.len() as u32);
        let layout = pack.seal(&mut entries)?;
        pack.rename(&*disk)?;
        packs.push((layout.id, number as u32));
    }
    disk.sync_folder(&packs_folder).map_err(Error::io("sync", &packs_folder))?;
    let runs = Runs::new(disk, folder.join("index"), group);
    let place = |page: u64| Place { pack: (page % count) as u32, at: At::page((page / count) as u32) };
    let entries = (0..pages).map(|page| (name(page, pages, true), place(page)));
    runs.write(1, Encoder::new(pages as usize, &packs), entries)?;
    Ok(())
}
