//! Pages that are blocks of somebody else's file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::crash_disk::CrashDisk;
use super::{SMALL, check_all, names, page, pages};
use crate::disk::Disk;
use crate::planted::{Mistake, making};
use crate::*;

fn open(disk: &CrashDisk) -> Store {
    let key = GroupKey::from_bytes([5; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None).unwrap()
}

fn take(store: &Store, purpose: &Purpose, numbers: &[u64]) -> ((MapRoot, Vec<u64>), Saved) {
    let session = store.begin_for(purpose).unwrap();
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    ((root, numbers.to_vec()), session.commit().unwrap())
}

/// A file of pages 1 to 40 and a stretch of zeros, known to the store.
fn with_image(private: bool) -> (CrashDisk, Store) {
    let disk = CrashDisk::default();
    let numbers: Vec<u64> = (1..=20).chain([0; 10]).chain(21..=40).collect();
    disk.write(Path::new("/layers/a"), &pages(&numbers));
    let store = open(&disk);
    assert!(store.add_image(&image(private), &|_, _| true).unwrap());
    (disk, store)
}

fn image(private: bool) -> NewImage {
    let data = [(0, 30), (30, 999)]
        .map(|(page, count)| Extent { offset: page * PAGE_SIZE as u64, bytes: count * PAGE_SIZE as u64 })
        .to_vec();
    NewImage { label: "a".into(), path: "layers/a".into(), private, seen: None, data }
}

fn on(images: &[&str]) -> Purpose {
    Purpose { origin: Origin([1; 16]), images: images.iter().map(|label| (*label).to_owned()).collect() }
}

fn leave(store: &Store, kept: &[(MapRoot, Vec<u64>)]) -> GcDone {
    let ask = || {
        let roots = kept.iter().map(|(root, _)| *root).collect();
        Ok::<_, Error>(GcRequest { roots, leaving: vec!["a".into()], ..GcRequest::default() })
    };
    store.run_gc(&store.plan_gc_with(ask).unwrap(), &|_, _| true).unwrap()
}

#[test]
fn a_page_that_is_a_block_is_not_stored() {
    let (disk, store) = with_image(false);
    assert_eq!((store.page_count(), store.images().len()), (0, 1));
    let info = store.images().remove(0);
    assert_eq!((info.pages, info.whole, info.suspect), (40, true, false));
    let (kept, saved) = take(&store, &on(&[]), &[1, 2, 0, 40, 41]);
    assert_eq!((saved.disk, saved.new, saved.zero), (3, 1, 1));
    assert_eq!(store.usage(&[kept.0]).unwrap()[0].exclusive, 4096 + 16 + 4 * 32, "the new page and the leaf");
    for store in [store, open(&disk)] {
        check_all(&store, std::slice::from_ref(&kept)).unwrap();
        assert_eq!(store.fsck(&[(kept.0, "x".into())], &|_, _| true).unwrap().damage, []);
        // As often as anybody likes.
        assert!(
            store.add_image(&image(false), &|done, total| done == total).unwrap(),
            "nothing is read again"
        );
        store.fold().unwrap();
        check_all(&store, std::slice::from_ref(&kept)).unwrap();
    }
}

#[test]
fn an_image_that_goes_leaves_behind_what_is_needed() {
    let (disk, store) = with_image(false);
    let (kept, _) = take(&store, &on(&[]), &[1, 2, 30, 41]);
    // A collection that does not speak of it leaves it alone.
    let plan = store.plan_gc(&[]).unwrap();
    assert_eq!(plan.rewrite.len(), 0);
    let done = leave(&store, std::slice::from_ref(&kept));
    assert_eq!(done.left, ["a"]);
    assert_eq!((store.images().len(), store.page_count()), (0, 4));
    disk.replace(Path::new("/layers/a"), &[]);
    for store in [store, open(&disk)] {
        check_all(&store, std::slice::from_ref(&kept)).unwrap();
        assert_eq!(take(&store, &on(&[]), &[3]).1.new, 1, "it is not known any more");
    }
}

#[test]
fn the_check_notices_an_image_that_takes_everything_with_it() {
    let (disk, store) = with_image(false);
    let (kept, _) = take(&store, &on(&[]), &[1, 2, 30, 41]);
    let done = making(Some(Mistake::LeaveNothing), || leave(&store, std::slice::from_ref(&kept)));
    assert_eq!(done.left, ["a"]);
    disk.replace(Path::new("/layers/a"), &[]);
    let lost = check_all(&store, &[kept]).unwrap_err();
    assert!(lost.contains("is in no readable pack"), "{lost}");
}

#[test]
fn an_image_that_a_session_relies_on_stays() {
    let (disk, store) = with_image(false);
    let session = store.begin().unwrap();
    let mut name = names(1);
    session.put(&page(7), &mut name).unwrap();
    assert_eq!(leave(&store, &[]).left, [""; 0]);
    let root = session.put_map(&name).unwrap();
    session.commit().unwrap();
    let kept = [(root, vec![7])];
    assert_eq!(leave(&store, &kept).left, ["a"]);
    disk.replace(Path::new("/layers/a"), &[]);
    check_all(&store, &kept).unwrap();
}

/// The mistake this guards against: the user deletes an image with the machine that had it, and a machine of another image loses pages.
#[test]
fn nobody_comes_to_depend_on_a_private_image() {
    let (disk, store) = with_image(true);
    let (stranger, saved) = take(&store, &on(&[]), &[1, 2, 3]);
    assert_eq!((saved.disk, saved.new), (0, 3));
    let (owner, saved) = take(&store, &on(&["a"]), &[1, 2, 3, 4, 5]);
    assert_eq!((saved.disk, saved.new), (2, 0));
    for store in [store, open(&disk)] {
        let (next, saved) = take(&store, &on(&[]), &[4]);
        assert_eq!(saved.disk, 0, "{saved:?}");
        store.fold().unwrap();
        disk.replace(Path::new("/layers/a"), b"something else");
        check_all(&store, &[stranger.clone(), next]).unwrap();
        let error = check_all(&store, std::slice::from_ref(&owner)).unwrap_err();
        assert!(error.contains("/layers/a"), "{error}");
        let numbers: Vec<u64> = (1..=20).chain([0; 10]).chain(21..=40).collect();
        disk.replace(Path::new("/layers/a"), &pages(&numbers));
    }
}

#[test]
fn an_edited_image_is_noticed_and_named() {
    for private in [false, true] {
        let (disk, store) = with_image(private);
        let (kept, saved) = take(&store, &on(&["a"]), &[1, 2, 41]);
        assert_eq!(saved.disk, 2);
        let mut bytes = disk.bytes(Path::new("/layers/a"));
        bytes[PAGE_SIZE + 5] ^= 1; // page 2
        disk.replace(Path::new("/layers/a"), &bytes);
        let error = check_all(&store, std::slice::from_ref(&kept)).unwrap_err();
        assert!(error.contains("the image /layers/a is damaged: the file has changed"), "{error}");
        let report = store.fsck(&[(kept.0, "web@a".into())], &|_, _| true).unwrap();
        assert_eq!(report.damage.len(), 1, "{report:?}");
        assert_eq!(report.damage[0].what, "the image /layers/a");
        assert_eq!(report.damage[0].labels, ["web@a"]);
        // Brought again, the page is stored: a private image is not relied on any more once it has another stamp; of a shared one
        // a repair forgets what is bad.
        if !private {
            store.repair(&[kept.0], &|| true).unwrap();
        }
        let (_, saved) = take(&store, &on(&["a"]), &[2]);
        assert_eq!((saved.disk, saved.new), (0, 1));
        check_all(&store, std::slice::from_ref(&kept)).unwrap();
        assert_eq!(store.images().iter().any(|image| image.suspect), private);
    }
}

/// A repair forgets what is bad of an image; the file put back, all of it is known again.
#[test]
fn an_image_that_is_put_back_is_looked_through_anew() {
    let (disk, store) = with_image(true);
    let (kept, _) = take(&store, &on(&["a"]), &[1, 2, 3]);
    let whole = disk.bytes(Path::new("/layers/a"));
    let mut bytes = whole.clone();
    bytes[PAGE_SIZE + 5] ^= 1; // page 2
    disk.replace(Path::new("/layers/a"), &bytes);
    assert_eq!(store.repair(&[kept.0], &|| true).unwrap().lost, 1);
    assert!(check_all(&store, std::slice::from_ref(&kept)).is_err());
    disk.replace(Path::new("/layers/a"), &whole);
    assert!(store.images().iter().all(|image| image.label != "a"), "its label is free");
    assert!(store.add_image(&image(true), &|_, _| true).unwrap());
    for store in [store, open(&disk)] {
        check_all(&store, std::slice::from_ref(&kept)).unwrap();
    }
}

#[test]
fn a_copy_elsewhere_is_read_when_the_block_has_changed() {
    let (disk, store) = with_image(true);
    let (owner, _) = take(&store, &on(&["a"]), &[1, 2, 3]);
    let (_, saved) = take(&store, &on(&[]), &[2]);
    assert_eq!(saved.new, 1);
    store.fold().unwrap();
    let mut bytes = disk.bytes(Path::new("/layers/a"));
    bytes[PAGE_SIZE + 5] ^= 1;
    disk.replace(Path::new("/layers/a"), &bytes);
    check_all(&store, &[owner]).unwrap();
}

#[test]
fn naming_stops_and_goes_on() {
    let disk = CrashDisk::default();
    disk.write(Path::new("/layers/a"), &pages(&(1..600).collect::<Vec<_>>()));
    let store = open(&disk);
    assert!(!store.add_image(&image(false), &|done, _| done == 0).unwrap());
    assert_eq!(store.images(), []);
    assert!(store.add_image(&image(false), &|_, _| true).unwrap());
    assert_eq!(store.images()[0].pages, 599);
    let gone = NewImage { label: "b".into(), path: "nowhere".into(), ..image(true) };
    assert!(store.add_image(&gone, &|_, _| true).is_err());
    // A file that changes while it is read is not believed.
    let other = NewImage { label: "c".into(), ..image(false) };
    let edit = |_: u64, _: u64| {
        let mut bytes = disk.bytes(Path::new("/layers/a"));
        bytes.push(0);
        disk.replace(Path::new("/layers/a"), &bytes);
        true
    };
    assert!(store.add_image(&other, &edit).is_err());
    // Nor is one that is not what the caller looked at.
    let seen = Some((disk.bytes(Path::new("/layers/a")).len() as u64 + 1, 0));
    let other = NewImage { seen, ..other };
    assert!(matches!(store.add_image(&other, &|_, _| true), Err(Error::ImageChanges { .. })));
    assert_eq!(store.images().len(), 1);
}

/// A user's file is named as he: in its place he could put a link to what he may not read, and we may.
#[test]
fn a_users_file_is_named_as_he() {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED, and nothing tested: only root can read as somebody else");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (disk, link) = (folder.path().join("disk"), folder.path().join("link"));
    let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    set(folder.path(), 0o711);
    std::fs::write(&disk, pages(&[1, 2, 3])).unwrap();
    std::os::unix::fs::symlink(&disk, &link).unwrap();
    let him = Some(HostUser { uid: 12_345, gid: 12_346 });
    let store = Store::create_for(folder.path().join("pages"), GroupKey::from_bytes([5; 32]), him).unwrap();
    let new = NewImage { path: link, ..image(true) };
    set(&disk, 0o600);
    let refused = store.add_image(&new, &|_, _| true);
    assert!(
        matches!(&refused, Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied),
        "{refused:?}"
    );
    assert_eq!(store.images(), []);
    set(&disk, 0o644);
    assert!(store.add_image(&new, &|_, _| true).unwrap());
    let (kept, saved) = take(&store, &on(&["a"]), &[1, 2]);
    assert_eq!(saved.disk, 2);
    // What was named is ours to read: nothing is lost with his right to it. Nobody waits for what has come in its place.
    set(&disk, 0o600);
    check_all(&store, std::slice::from_ref(&kept)).unwrap();
    std::fs::remove_file(&disk).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &disk, rustix::fs::Mode::RUSR).unwrap();
    let (_, saved) = take(&store, &on(&["a"]), &[3]);
    assert_eq!((saved.disk, saved.new), (0, 1));
}

/// The mistake this guards against: the caller removes the image's file as he is told, the power fails, and the image's pack is back. A
/// session would then rely on blocks of a file that is gone.
#[test]
fn an_image_that_has_left_does_not_come_back_after_a_crash() {
    for needed in [false, true] {
        let (disk, store) = with_image(false);
        let kept: Vec<_> = needed.then(|| take(&store, &on(&[]), &[1, 2]).0).into_iter().collect();
        assert_eq!(leave(&store, &kept).left, ["a"]);
        let store = open(&disk.after_crash(super::crash_disk::Survive::Nothing));
        assert_eq!(store.images(), []);
        check_all(&store, &kept).unwrap();
    }
}

/// A copy of a user's file is no less an image: what lies on both is stored nowhere else, and read where it can be.
#[test]
fn an_image_with_the_content_of_another_is_relied_on_by_who_names_it() {
    let (disk, store) = with_image(true);
    let numbers: Vec<u64> = (1..=20).chain([0; 10]).chain(21..=40).collect();
    disk.write(Path::new("/layers/b"), &pages(&numbers));
    let copy = NewImage { label: "b".into(), path: "layers/b".into(), ..image(true) };
    assert!(store.add_image(&copy, &|_, _| true).unwrap());
    let (stranger, saved) = take(&store, &on(&[]), &[39, 40]);
    assert_eq!((saved.disk, saved.new), (0, 2), "nobody comes to depend on a file that he does not name");
    let (kept, saved) = take(&store, &on(&["b"]), &[1, 2, 0, 38, 41]);
    assert_eq!((saved.disk, saved.new, saved.zero), (3, 1, 1));
    // The other one goes.
    disk.remove(Path::new("/layers/a")).unwrap();
    for store in [store, open(&disk)] {
        check_all(&store, &[kept.clone(), stranger.clone()]).unwrap();
    }
}
