//! Memory that is on a disk already is not stored again: layers of ours, users' images, and what becomes of it when they go or change.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use vm_tests::guest::Guest;
use vm_tests::harness::{Spinney, cache};

const MIB: u64 = 160;
/// Pages of a file of 8 MiB.
const FILE_PAGES: u64 = 2048;
/// Most of them: some are evicted, or lie across blocks.
const MOST: u64 = FILE_PAGES * 9 / 10;

fn guest(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("a port");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

fn shell(spinney: &Spinney, name: &str, command: &str) -> String {
    let (status, said) = guest(spinney, name).cmd(command).unwrap();
    assert_eq!(status, 0, "{command}: {said}");
    said
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

const MAKE: &str = "dd if=/dev/urandom of=/data/big bs=1M count=8 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches; md5sum < /data/big; echo 3 > /proc/sys/vm/drop_caches";
const READ: &str = "md5sum < /data/big";

/// A guest that has read a file of a layer that the store knows. Returns what the file's sum is, and the take.
fn read_from_a_layer(spinney: &Spinney) -> (String, Value) {
    spinney.create_guest("m", MIB).unwrap();
    spinney.ok("start m").unwrap();
    let sum = shell(spinney, "m", MAKE);
    let first = spinney.ok("take m written --mode stop-copy").unwrap();
    assert!(number(&first["saved"]["disk"]) < FILE_PAGES / 2, "it is in nobody's memory: {first}");
    spinney.settle().unwrap();
    assert_eq!(shell(spinney, "m", READ), sum);
    let second = spinney.ok("take m read --mode stop-copy").unwrap();
    (sum, second)
}

#[test]
fn pages_on_a_layer_are_not_stored() {
    let spinney = Spinney::new();
    let (sum, second) = read_from_a_layer(&spinney);
    let saved = &second["saved"];
    assert!(number(&saved["disk"]) > MOST, "the file is on the layer: {saved}");
    assert!(number(&saved["new"]) < FILE_PAGES / 2, "and nothing of it is stored: {saved}");
    spinney.ok("goto m@read --discard --yes").unwrap();
    assert_eq!(shell(&spinney, "m", READ), sum);
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], Value::Array(Vec::new()));
}

/// What only the memory of another branch needs of a layer is moved to a pack before the layer goes.
#[test]
fn a_layer_that_goes_leaves_behind_what_memory_needs() {
    const LINES: &str = "seq 1000001 2050000"; // 8 MiB
    let spinney = Spinney::new();
    spinney.create_guest("m", MIB).unwrap();
    spinney.ok("start m").unwrap();
    shell(&spinney, "m", "true");
    spinney.ok("take m before --mode stop-copy").unwrap();
    let sum = shell(&spinney, "m", &format!("{LINES} > /data/big; sync; md5sum < /data/big"));
    spinney.ok("take m branch --disk-only").unwrap();
    spinney.settle().unwrap();
    spinney.ok("goto m@before --discard --yes").unwrap();
    shell(&spinney, "m", &format!("{LINES} > /tmp/big"));
    let taken = spinney.ok("take m other --mode stop-copy").unwrap();
    assert!(number(&taken["saved"]["disk"]) > MOST, "it is on the other branch's layer: {taken}");
    let (packs, layers) = (spinney.packs(), spinney.layers().len());
    spinney.ok("rm m@branch").unwrap();
    let report = spinney.ok("gc --now").unwrap();
    assert!(number(&report["layers"]) > 0, "{report}");
    assert!(spinney.layers().len() < layers);
    let is_new = |pack: &PathBuf| !packs.contains(pack);
    assert!(spinney.packs().iter().any(is_new), "the pages have a pack of their own now");
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], Value::Array(Vec::new()));
    spinney.ok("goto m@other --discard --yes").unwrap();
    assert_eq!(shell(&spinney, "m", "md5sum < /tmp/big"), sum);
}

/// A user's image: shared by the machines over it, relied on by no other, and named when it was edited.
#[test]
fn a_base_image_is_for_the_machines_over_it() {
    let spinney = Spinney::new();
    let files = tempfile::tempdir().unwrap();
    for name in ["cmdline", "initrd.img", "vmlinuz", "data.img"] {
        fs::copy(cache().join("guest").join(name), files.path().join(name)).unwrap();
    }
    // The file is put into the image by a machine that is gone then.
    let image = files.path().join("data.img");
    let sum = {
        let maker = Spinney::new();
        maker.create_guest_in(None, "maker", MIB, files.path()).unwrap();
        maker.ok("start maker").unwrap();
        let sum = shell(&maker, "maker", MAKE);
        shell(&maker, "maker", "sync");
        maker.ok("kill maker").unwrap();
        let top = maker.layers().pop().expect("an overlay");
        let flat = files.path().join("flat");
        let words = ["convert", "-U", "-O", "raw", top.to_str().unwrap(), flat.to_str().unwrap()];
        assert!(vm_tests::harness::tool("qemu-img", words).status.success());
        fs::rename(&flat, &image).unwrap();
        sum
    };
    for name in ["a", "b"] {
        spinney.create_guest_in(None, name, MIB, files.path()).unwrap();
    }
    spinney.create_guest("stranger", MIB).unwrap();
    spinney.settle().unwrap();
    let take = |name: &str, command: &str| {
        spinney.ok(&format!("start {name}")).unwrap();
        assert_eq!(shell(&spinney, name, command), sum);
        let taken = spinney.ok(&format!("take {name} t --mode stop-copy")).unwrap();
        taken["saved"].clone()
    };
    for name in ["a", "b"] {
        let saved = take(name, READ);
        assert!(number(&saved["disk"]) > MOST, "{name}: {saved}");
    }
    // A byte of the file's first block is changed in the image, behind everybody's back.
    spinney.ok("kill a").unwrap();
    spinney.ok("kill b").unwrap();
    let bytes = fs::read(&image).unwrap();
    let at = bytes.chunks(4096).position(|block| block.iter().any(|b| *b != 0) && is_random(block)).unwrap();
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[bytes[at * 4096] ^ 1], at as u64 * 4096).unwrap();
    let named = spinney.run(["fsck"]);
    assert_eq!(named.code, Some(6), "{}", named.stderr);
    assert!(named.document["damage"].to_string().contains("data.img"), "{}", named.document);
    let ended = spinney.run(["goto", "a@t", "--discard", "--yes"]);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("data.img"), "{}", ended.stderr);
    // Put back as it was, everything is.
    file.write_all_at(&[bytes[at * 4096]], at as u64 * 4096).unwrap();
    drop(file);
    spinney.ok("edit a --accept-disks").unwrap();
    spinney.ok("goto a@t --discard --yes").unwrap();
    assert_eq!(shell(&spinney, "a", READ), sum);
}

/// Looks like what /dev/urandom gives.
fn is_random(block: &[u8]) -> bool {
    let mut counts = [0_u32; 256];
    block.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    counts.iter().all(|count| *count < 60) && counts.iter().filter(|count| **count > 0).count() > 250
}
