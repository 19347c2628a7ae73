//! What is looked at before a disk is used, and what is not read for it.

use std::sync::Arc;

use pages::{MapRoot, PAGE_SIZE, PageHash};

use super::*;
use crate::config::MachineConfig;
use crate::engine::Settings;
use crate::new_disks::new_layer;

const SIZE: u64 = 1 << 20;

/// A machine's disk: a user's image, and layers over it.
struct Bench {
    _folder: tempfile::TempDir,
    engine: Arc<Engine>,
    target: String,
    /// Base first.
    chain: Vec<LayerRow>,
}

impl Bench {
    /// Of so many layers, the image included, those at the depths `settled` have settled.
    fn new(depth: u32, settled: &[u32]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let settings = Settings { state, qemu: None, qemu_img: None, accel: None, warden: None };
        let (engine, _) = Engine::open(settings).unwrap();
        engine.create_group(&crate::context::Context::new(), "g", None).unwrap();
        let group = engine.groups.by_name("g").unwrap().row.id.clone();
        let image = folder.path().join("image");
        fs::write(&image, vec![1; SIZE as usize]).unwrap();
        let mut chain = vec![LayerRow {
            file: image.to_str().unwrap().into(),
            format: "raw".into(),
            stamp: Some(stamp(&image).unwrap()),
            ..new_layer(&group, SIZE)
        }];
        for depth in 2..=depth {
            let below = chain.last().map(|layer| layer.id.clone());
            let layer = LayerRow { below, depth, format: "raw".into(), ..new_layer(&group, SIZE) };
            fs::write(engine.layer_file(&layer), []).unwrap();
            chain.push(layer);
        }
        let target = TargetRow::new("m".into(), "m", (&group, "g"), "pc", MachineConfig::bare(64 << 20));
        let written = engine.catalog.write(|tx| {
            target.insert(tx)?;
            chain.iter().try_for_each(|layer| layer.insert(tx))?;
            let map = MapRoot { node: PageHash::ZERO, pages: SIZE / PAGE_SIZE as u64 };
            let mut settled = chain.iter().filter(|layer| settled.contains(&layer.depth));
            settled.try_for_each(|layer| LayerRow::set_settled(tx, &layer.id, &map))?;
            TargetRow::set_disk(tx, "m", "disk0", &chain.last().unwrap().id)
        });
        written.unwrap();
        Self { _folder: folder, engine, target: target.id, chain }
    }

    fn file(&self, depth: usize) -> PathBuf {
        self.engine.layer_file(&self.chain[depth - 1])
    }

    fn check(&self) -> Result<()> {
        self.engine.catalog.read(|tx| self.engine.check_chains(tx, "m", &self.disks(tx)?))
    }

    fn disks(&self, tx: &Transaction<'_>) -> Result<Vec<(String, String)>> {
        TargetRow::disks(tx, &self.target)
    }

    fn depths_opened(&self) -> Vec<u32> {
        let opened = self.engine.catalog.read(|tx| Engine::opened(tx, &self.disks(tx)?)).unwrap();
        opened[0].1.iter().map(|layer| layer.depth).collect()
    }
}

#[test]
fn a_users_image_is_looked_at_however_deep_it_lies_and_whatever_has_settled_over_it() {
    for settled in [&[][..], &[1, 2, 3, 20], &[20, 30]] {
        let bench = Bench::new(30, settled);
        bench.check().unwrap();
        fs::File::options().append(true).open(bench.file(1)).unwrap().set_len(SIZE + 1).unwrap();
        let changed = bench.check().unwrap_err();
        assert!(changed.to_string().contains("changed behind our back"), "{changed}");
        fs::remove_file(bench.file(1)).unwrap();
        let missing = bench.check().unwrap_err();
        assert!(missing.to_string().contains("the image under disk0 of m is missing"), "{missing}");
    }
}

#[test]
fn layers_are_looked_at_down_to_the_highest_that_has_settled() {
    let bench = Bench::new(30, &[5, 20]);
    assert_eq!(bench.depths_opened(), (20..=30).collect::<Vec<_>>());
    fs::remove_file(bench.file(20)).unwrap();
    bench.check().unwrap();
    fs::remove_file(bench.file(21)).unwrap();
    assert_eq!(bench.check().unwrap_err().code(), Code::Damaged);
}

#[test]
fn a_shallow_chain_is_opened_and_looked_at_as_it_is() {
    let bench = Bench::new(SHALLOW as u32, &[1, 2, 3, 4]);
    assert_eq!(bench.depths_opened(), (1..=SHALLOW as u32).collect::<Vec<_>>());
    fs::remove_file(bench.file(2)).unwrap();
    assert_eq!(bench.check().unwrap_err().code(), Code::Damaged);
}

#[test]
fn without_a_view_every_layer_is_opened_after_a_look_at_it() {
    let bench = Bench::new(30, &[20]);
    let specs = || {
        let opened = bench.engine.catalog.read(|tx| Engine::opened(tx, &bench.disks(tx)?))?;
        bench.engine.disk_specs("m", &opened)
    };
    let opened: Vec<PathBuf> = specs().unwrap()[0].layers.iter().map(|layer| layer.file.clone()).collect();
    assert_eq!(opened, (1..=30).map(|depth| bench.file(depth)).collect::<Vec<_>>());
    fs::remove_file(bench.file(10)).unwrap();
    assert_eq!(specs().unwrap_err().code(), Code::Damaged);
}

#[test]
fn what_was_written_since_a_snapshot_lies_above_what_it_shares() {
    let bench = Bench::new(12, &[]);
    let shared = |tx: &Transaction<'_>, other: Option<&LayerRow>| {
        let top = bench.chain.last().unwrap();
        let above = above_what_is_shared(tx, &top.id, other.map(|row| row.id.as_str()))?;
        Ok::<_, Error>(above.iter().map(|layer| layer.depth).collect::<Vec<_>>())
    };
    bench
        .engine
        .catalog
        .write(|tx| {
            assert_eq!(shared(tx, Some(&bench.chain[9]))?, [12, 11]);
            assert_eq!(shared(tx, bench.chain.last())?, [0; 0]);
            // A snapshot that branched off, and went further.
            let mut other = bench.chain[4].clone();
            for depth in 6..20 {
                let below = Some(other.id.clone());
                other = LayerRow { below, depth, ..new_layer(&other.group, SIZE) };
                other.insert(tx)?;
            }
            assert_eq!(shared(tx, Some(&other))?, (6..=12).rev().collect::<Vec<_>>());
            assert_eq!(shared(tx, None)?, (1..=12).rev().collect::<Vec<_>>());
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_chain_in_disorder_is_damage_and_never_shorter_than_it_was() {
    // A depth that is another, a layer over itself, and one that is not there.
    for harm in [
        "UPDATE layers SET depth = 17 WHERE id = ?1",
        "UPDATE layers SET below = id WHERE id = ?1",
        "UPDATE layers SET below = 'nothing' WHERE id = ?1",
    ] {
        let bench = Bench::new(12, &[]);
        let done = bench.engine.catalog.write(|tx| {
            tx.execute_batch("PRAGMA defer_foreign_keys = ON")?;
            tx.execute(harm, [&bench.chain[5].id])?;
            let top = &bench.chain.last().unwrap().id;
            assert_eq!(LayerRow::chain(tx, top).unwrap_err().code(), Code::Damaged, "{harm}");
            assert_eq!(Engine::opened(tx, &bench.disks(tx)?).unwrap_err().code(), Code::Damaged, "{harm}");
            assert_eq!(above_what_is_shared(tx, top, None).unwrap_err().code(), Code::Damaged, "{harm}");
            Err::<(), _>(Error::new(Code::Refused, "taken back"))
        });
        assert_eq!(done.unwrap_err().code(), Code::Refused);
        bench.check().unwrap();
    }
}
