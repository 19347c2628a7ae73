//! Layers of every kind settle into what QEMU reads, or not at all.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::catalog::{Facts, SnapshotRow, now};
use crate::config::{DiskConfig, DiskSource, MachineConfig};
use crate::engine::Settings;
use crate::new_disks::new_layer;
use crate::owner::User;
use crate::types::{Mode, Power};

/// Whoever is not us.
const HIM: u32 = 65_534;

struct Bench {
    folder: tempfile::TempDir,
    engine: Arc<Engine>,
    group: Arc<OpenGroup>,
}

impl Bench {
    /// A state folder with a group, which belongs to somebody else if there is an `owner`.
    fn new(owner: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        set_mode(folder.path(), 0o711);
        let state = folder.path().join("state");
        let settings = Settings { state, qemu: None, qemu_img: None, accel: None, warden: None };
        let (engine, _) = Engine::open(settings).unwrap();
        engine.create_group(&Context::new(), "g", owner).unwrap();
        let group = engine.groups.by_name("g").unwrap();
        Self { folder, engine, group }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An image as a machine of its own has it; its layer.
    fn machine_over(&self, image: &Path) -> LayerRow {
        let disk =
            DiskConfig { id: "disk0".into(), source: DiskSource::File(image.to_owned()), read_only: true };
        let disks = self.engine.plan_new_disks(&self.group.row.id, &[disk]).unwrap();
        let target = self.machine(&crate::id::new_id());
        self.engine
            .catalog
            .write(|tx| {
                disks.insert(tx, &target.id)?;
                let (_, layer) = TargetRow::disks(tx, &target.id)?.remove(0);
                LayerRow::by_id(tx, &layer)
            })
            .unwrap()
    }

    fn machine(&self, name: &str) -> TargetRow {
        let group = (self.group.row.id.as_str(), "g");
        let target = TargetRow::new(crate::id::new_id(), name, group, "pc", MachineConfig::bare(64 << 20));
        self.engine.catalog.write(|tx| target.insert(tx)).unwrap();
        target
    }

    /// A layer of ours with a page of sevens in it, as the disk of a machine.
    fn layer(&self, machine: &TargetRow) -> LayerRow {
        let layer = new_layer(&self.group.row.id, 1 << 20);
        let file = self.engine.layer_file(&layer);
        self.engine.img().unwrap().create(&file, layer.size, None).unwrap();
        run("qemu-io", &["-c", "write -P 7 64k 4k", file.to_str().unwrap()]);
        self.group.gives(&file).unwrap();
        self.engine
            .catalog
            .write(|tx| {
                layer.insert(tx).and_then(|()| TargetRow::set_disk(tx, &machine.id, "disk0", &layer.id))
            })
            .unwrap();
        layer
    }

    fn snapshot(&self, machine: &TargetRow, layer: &LayerRow) -> SnapshotRow {
        let row = SnapshotRow {
            id: crate::id::new_id(),
            target: machine.id.clone(),
            target_name: machine.name.clone(),
            parent: None,
            name: crate::id::new_id(),
            note: String::new(),
            created: now(),
            undo_point: false,
            keep: false,
            protected: false,
            machine: machine.machine.clone(),
            config: machine.config.clone(),
            memory: None,
            facts: Facts::of_nothing(Mode::Off, Power::Off),
            removed: None,
        };
        let disks = [("disk0".to_owned(), layer.id.clone())];
        self.engine.catalog.write(|tx| row.insert(tx, &disks)).unwrap();
        row
    }

    fn settle(&self, layer: &LayerRow) -> Result<bool> {
        self.engine.settle_layer(&self.group, &layer.id, &|| true)
    }

    fn settled(&self, layer: &LayerRow) -> Option<MapRoot> {
        self.engine.catalog.read(|tx| LayerRow::by_id(tx, &layer.id)).unwrap().settled
    }

    /// What a layer has settled into.
    fn shown(&self, layer: &LayerRow) -> Vec<u8> {
        let (store, root) = (self.group.store().unwrap(), self.settled(layer).expect("it has settled"));
        let mut names = vec![PageHash::ZERO; root.pages as usize];
        store.map_range(&root, 0, &mut names).unwrap();
        let mut bytes = vec![0; names.len() * PAGE_SIZE];
        store.read(&names, &mut bytes).unwrap();
        bytes.truncate(layer.size as usize);
        bytes
    }

    /// Nothing has come into the store, and no block of any file is called a page of it.
    fn has_nothing(&self) -> bool {
        let store = self.group.store().unwrap();
        store.page_count() == 0 && store.images().iter().all(|image| image.pages == 0)
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn run(program: &str, words: &[&str]) {
    let done = Command::new(program).args(words).output().unwrap();
    assert!(done.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// What a disk has: pages that differ, zeros, and bytes in between.
fn content(bytes: usize) -> Vec<u8> {
    let mut content: Vec<u8> = (0..bytes).map(|at| (at / 512 * 31 + at % 251 + at / 70_000) as u8).collect();
    for (from, to) in [(100_000, 700_000), (1_000_448, 1_003_008), (2 << 20, 3 << 20)] {
        content.get_mut(from..to).into_iter().for_each(|part| part.fill(0));
    }
    content
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED, and nothing tested: only root can have groups of others");
    }
    root
}

/// The mistake this guards against: `qemu-img map` gives offsets in whatever file has the data, and they were taken for the image's own.
#[test]
fn images_of_every_kind_settle_into_what_qemu_reads() {
    let kinds: &[(&str, &str)] = &[
        ("raw", ""),
        ("qcow2", "compat=0.10"),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "preallocation=metadata"),
        ("qcow2", "data_file=DATA"),
        ("qcow2", "data_file=DATA,data_file_raw=on"),
        ("qcow2", "compression_type=zlib"),
        ("qcow2", "compression_type=zstd"),
        ("qed", ""),
        ("vdi", ""),
        ("vhdx", ""),
        ("vpc", "force_size=on"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vmdk", "subformat=streamOptimized"),
    ];
    // The last page of the second one is not whole.
    for bytes in [4 << 20, (4 << 20) + 1536] {
        let bench = Bench::new(None);
        let source = bench.path("source");
        let content = content(bytes);
        fs::write(&source, &content).unwrap();
        for (number, (format, options)) in kinds.iter().enumerate() {
            let image = bench.path(&format!("image-{number}.{format}"));
            let options =
                options.replace("DATA", &bench.path(&format!("data-{number}")).display().to_string());
            let mut words =
                vec!["convert", "-f", "raw", "-O", format, source.to_str().unwrap(), image.to_str().unwrap()];
            if !options.is_empty() {
                words.extend(["-o", &options]);
            }
            if options.starts_with("compression_type") {
                words.push("-c");
            }
            run("qemu-img", &words);
            let layer = bench.machine_over(&image);
            assert!(bench.settle(&layer).unwrap(), "{format} {options}");
            let shown = bench.shown(&layer);
            let (disk, rest) = shown.split_at(content.len());
            assert!(disk == content, "{format} {options} of {bytes} bytes shows something else");
            assert!(rest.iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn what_is_cut_off_does_not_settle() {
    let bench = Bench::new(None);
    let source = bench.path("source");
    fs::write(&source, content(4 << 20)).unwrap();
    let image = bench.path("image.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", source.to_str().unwrap(), image.to_str().unwrap()]);
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.set_len(file.metadata().unwrap().len() - 5000).unwrap();
    let layer = bench.machine_over(&image);
    assert!(bench.settle(&layer).is_err());
    assert_eq!(bench.settled(&layer), None);
}

#[test]
fn an_image_that_is_not_what_it_was_does_not_settle() {
    let bench = Bench::new(None);
    let (image, other) = (bench.path("image"), bench.path("other"));
    fs::write(&image, content(4 << 20)).unwrap();
    let layer = bench.machine_over(&image);
    // Changed, and then while it is read: by another file in its place, and by somebody who hides it.
    let before = fs::metadata(&image).unwrap().modified().unwrap();
    fs::File::options().write(true).open(&image).unwrap().write_all_at(b"x", 0).unwrap();
    assert_eq!(bench.settle(&layer).unwrap_err().code(), Code::Damaged);
    let back =
        |path: &Path| fs::File::options().write(true).open(path).unwrap().set_modified(before).unwrap();
    back(&image);
    fs::write(&other, vec![9; 4 << 20]).unwrap();
    back(&other);
    let calls = std::cell::Cell::new(0);
    let swap = || {
        calls.set(calls.get() + 1);
        // Hashing has looked at it by then.
        if calls.get() == 8 {
            fs::rename(&other, &image).unwrap();
        }
        true
    };
    assert!(bench.engine.settle_layer(&bench.group, &layer.id, &swap).is_err());
    assert!(calls.get() > 8, "{}", calls.get());
    assert_eq!(bench.settled(&layer), None);
}

/// In the place of an image of his he puts a link to what he may not read, which looks the same from outside.
#[test]
fn what_the_owner_may_not_read_does_not_settle() {
    if !is_root() {
        return;
    }
    let bench = Bench::new(Some("nobody"));
    let secret = content(4 << 20);
    let closed = bench.path("closed");
    fs::create_dir(&closed).unwrap();
    set_mode(&closed, 0o700);
    let (hidden, private, image) = (closed.join("hidden"), bench.path("private"), bench.path("image"));
    for (path, mode) in [(&hidden, 0o644), (&private, 0o600)] {
        fs::write(path, &secret).unwrap();
        set_mode(path, mode);
    }
    for aim in [&hidden, &private] {
        fs::write(&image, vec![1; 4 << 20]).unwrap();
        set_mode(&image, 0o644);
        let before = fs::metadata(&image).unwrap().modified().unwrap();
        fs::File::options().write(true).open(aim).unwrap().set_modified(before).unwrap();
        let layer = bench.machine_over(&image);
        fs::remove_file(&image).unwrap();
        symlink(aim, &image).unwrap();
        let refused = bench.settle(&layer).unwrap_err();
        assert!(refused.causes().iter().any(|cause| cause.contains("Permission denied")), "{refused:?}");
        assert!(bench.engine.hash_layer(&bench.group, &layer, &|| true).is_err());
        assert!(bench.has_nothing() && bench.settled(&layer).is_none());
        fs::remove_file(&image).unwrap();
    }
    // What he may read he may read through a link too.
    set_mode(&private, 0o604);
    symlink(&private, &image).unwrap();
    let layer = bench.machine_over(&image);
    assert!(bench.settle(&layer).unwrap());
    assert!(bench.shown(&layer) == secret);
}

/// He writes the name of such a file into the header of an image or a layer: as what it lies over, and as what has its data.
#[test]
fn what_a_header_names_is_read_as_the_owner() {
    if !is_root() {
        return;
    }
    let bench = Bench::new(Some("nobody"));
    let (private, image) = (bench.path("private"), bench.path("image"));
    fs::write(&private, content(1 << 20)).unwrap();
    set_mode(&private, 0o600);
    let headers = |path: &str| {
        let data = bench.path("empty-00").display().to_string();
        run(
            "qemu-img",
            &["create", "-f", "qcow2", "-o", &format!("data_file={data},data_file_raw=on"), path, "1M"],
        );
        let mut bytes = fs::read(path).unwrap();
        let at = bytes.windows(data.len()).position(|part| part == data.as_bytes()).unwrap();
        // As long as the other name.
        let name = format!("{:/>1$}", private.display().to_string(), data.len());
        bytes[at..at + data.len()].copy_from_slice(name.as_bytes());
        fs::write(path, bytes).unwrap();
    };
    // A layer of ours, which is his to write to.
    let machine = bench.machine("m");
    let layer = bench.layer(&machine);
    bench.snapshot(&machine, &layer);
    let file = bench.engine.layer_file(&layer);
    headers(file.to_str().unwrap());
    let refused = bench.settle(&layer).unwrap_err();
    assert!(refused.causes().iter().any(|cause| cause.contains("Permission denied")), "{refused:?}");
    // An image of his own, of a format that says so in words.
    fs::write(
        &image,
        format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"{}\" 0\n", private.display()),
    )
    .unwrap();
    set_mode(&image, 0o644);
    let layer = bench.machine_over(&image);
    assert_eq!((layer.format.as_str(), layer.size), ("vmdk", 1 << 20));
    let refused = bench.settle(&layer).unwrap_err();
    assert!(refused.causes().iter().any(|cause| cause.contains("Permission denied")), "{refused:?}");
    assert!(bench.has_nothing());
    // What a layer is said to lie over is never looked at.
    let layer = bench.layer(&machine);
    bench.snapshot(&machine, &layer);
    let file = bench.engine.layer_file(&layer);
    run("qemu-img", &["rebase", "-u", "-F", "raw", "-b", private.to_str().unwrap(), file.to_str().unwrap()]);
    User::by_id(HIM).owns_alone(&file).unwrap();
    assert!(bench.settle(&layer).unwrap());
    let shown = bench.shown(&layer);
    assert!(shown[65_536..69_632].iter().all(|byte| *byte == 7));
    assert_eq!(shown.iter().filter(|byte| **byte != 0).count(), 4096);
}

#[test]
fn what_may_be_written_to_does_not_settle() {
    let bench = Bench::new(None);
    let machine = bench.machine("m");
    let layer = bench.layer(&machine);
    assert!(!bench.settle(&layer).unwrap(), "no snapshot has it");
    let snapshot = bench.snapshot(&machine, &layer);
    // It goes while the layer settles.
    let remove = || {
        let _ = bench.engine.catalog.write(|tx| SnapshotRow::purge(tx, &snapshot.id));
        true
    };
    assert!(bench.engine.settle_layer(&bench.group, &layer.id, &remove).is_err());
    assert_eq!(bench.settled(&layer), None);
    // A layer below one that a snapshot has is frozen too.
    let above =
        LayerRow { below: Some(layer.id.clone()), depth: 2, ..new_layer(&bench.group.row.id, 1 << 20) };
    bench.engine.catalog.write(|tx| above.insert(tx)).unwrap();
    bench.snapshot(&machine, &above);
    assert!(bench.settle(&layer).unwrap());
    // It becomes active again: what it had settled into is what it was then.
    let before = bench.settled(&layer).unwrap();
    bench.engine.catalog.write(|tx| LayerRow::thaw(tx, &layer.id)).unwrap();
    let now = bench.engine.catalog.read(|tx| LayerRow::by_id(tx, &layer.id)).unwrap();
    assert_eq!((now.settled, now.retired), (None, vec![before]));
}

#[test]
fn stretches_are_of_whole_pages() {
    use Content::{At, Packed, Zero};
    let stretch = |(start, bytes, content)| Stretch { start, bytes, content };
    let whole = |stretches: &[(u64, u64, Content)], is_lowest| {
        let found = whole_pages(stretches.iter().copied().map(stretch).collect(), 5 * PAGE + 512, is_lowest);
        found.map(|found| found.into_iter().map(|s| (s.start, s.bytes, s.content)).collect::<Vec<_>>())
    };
    let even = vec![(0, PAGE, Zero), (PAGE, 2 * PAGE, At(7)), (3 * PAGE, PAGE, Packed)];
    assert_eq!(whole(&even, false), Some(even.clone()));
    // The disk's end, as it is.
    let last = vec![(5 * PAGE, 512, At(9))];
    assert_eq!(whole(&last, false), Some(last));
    assert_eq!(whole(&[(4 * PAGE, 9 * PAGE, At(9))], false), Some(vec![(4 * PAGE, PAGE + 512, At(9))]));
    assert_eq!(whole(&[(6 * PAGE, PAGE, Packed)], false), Some(vec![]));
    // Parts of pages: the last of a cluster, and the first.
    for part in [(0, 512, At(0)), (512, PAGE - 512, At(0)), (PAGE, PAGE + 512, Packed), (0, 512, Zero)] {
        assert_eq!(whole(&[part], false), None, "{part:?}");
    }
    let small =
        [(512, 512, At(5)), (1024, 512, Packed), (2 * PAGE - 512, 1024, At(0)), (4 * PAGE, 512, Zero)];
    assert_eq!(whole(&small, true), Some(vec![(0, 3 * PAGE, Packed)]));
}
