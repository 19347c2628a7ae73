//! Views that are mounted, by processes of their own: what is seen in them, and what becomes of readers when processes die.
//!
//! Where no view can be had (no FUSE, an old kernel) there is nothing to test; the tests say so.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pages::{GroupKey, HostUser, MapRoot, PAGE_SIZE, PageHash, PageStore, Store};
use snapfs::MapFile;
use snapfs::list::{Content, Listed, ListedFile};
use snapfs::view::{Setup, View};

struct Scene {
    dir: tempfile::TempDir,
    store: Store,
    view: View,
}

fn executable() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples/view")
}

fn setup(dir: &Path, owner: Option<HostUser>) -> Setup {
    Setup { executable: executable(), folder: dir.join("view"), at: None, store: dir.join("store"), owner }
}

/// None where there can be none.
fn scene(owner: Option<HostUser>) -> Option<Scene> {
    if let Err(lacks) = snapfs::mount::supported() {
        eprintln!("not tested: {lacks}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let key = GroupKey::generate().unwrap();
    let store = Store::create(dir.path().join("store"), key).unwrap();
    let view = View::open(&setup(dir.path(), owner), 1, &[]).unwrap();
    Some(Scene { dir, store, view })
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.view.folder().join("log")).unwrap_or_default());
        }
        self.view.end().unwrap();
        let gone = until(Duration::from_secs(10), || processes(self.dir.path()).is_empty());
        assert!(gone || std::thread::panicking(), "whoever served is gone as well");
    }
}

fn until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Page `number` of the test's own numbering; 0 is zero.
fn page(number: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    if number > 0 {
        page.as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(number..)
            .for_each(|(word, n)| *word = (n * 0x9e37_79b9).to_le_bytes());
    }
    page
}

fn pages(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| page(*number)).collect()
}

fn take(store: &Store, numbers: &[u64]) -> MapRoot {
    let session = store.begin().unwrap();
    let mut names = vec![PageHash::ZERO; numbers.len()];
    session.put(&pages(numbers), &mut names).unwrap();
    let root = session.put_map(&names).unwrap();
    session.commit().unwrap();
    root
}

/// Processes that have the folder's list open: those who serve and stand by.
fn processes(dir: &Path) -> HashSet<u32> {
    let list = fs::metadata(dir.join("view/list")).map(|meta| (meta.dev(), meta.ino())).unwrap();
    let mut found = HashSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let fds = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let has =
            fds.filter_map(|fd| fs::metadata(fd.path()).ok()).any(|meta| (meta.dev(), meta.ino()) == list);
        if has {
            found.insert(pid);
        }
    }
    found
}

/// The one who serves: the parent of whoever stands by.
fn serving(dir: &Path) -> u32 {
    let mut found = None;
    assert!(until(Duration::from_secs(10), || {
        let all = processes(dir);
        found = all.iter().find(|pid| all.iter().any(|other| parent(*other) == Some(**pid))).copied();
        found.is_some()
    }));
    found.unwrap()
}

/// The one who stands by, and has not been killed before.
fn standing_by(dir: &Path, not: Option<u32>) -> u32 {
    let mut found = None;
    assert!(until(Duration::from_secs(10), || {
        let all = processes(dir);
        let is_child = |pid: &&u32| parent(**pid).is_some_and(|parent| all.contains(&parent));
        found = all.iter().find(is_child).copied().filter(|pid| Some(*pid) != not);
        found.is_some()
    }));
    found.unwrap()
}

/// Sets it when dropped, also by a panic.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn files_hold_what_maps_describe() {
    let Some(Scene { store, view, .. }) = &scene(None) else { return };
    let numbers: Vec<u64> = (0..300).map(|i| i % 7 * i).collect();
    let root = take(store, &numbers);
    let file = MapFile::of(root);
    assert!(fs::read(view.ram(&file)).unwrap() == pages(&numbers));
    assert!(fs::read(view.disk(&file)).unwrap() == pages(&numbers));
    let part = MapFile { bytes: file.bytes - 3000, ..file };
    let bytes = fs::read(view.disk(&part)).unwrap();
    assert!(bytes == pages(&numbers)[..bytes.len()] && bytes.len() as u64 == part.bytes);
    let open = File::open(view.ram(&file)).unwrap();
    let mut few = [0; 10];
    open.read_exact_at(&mut few, 4090).unwrap();
    assert_eq!(few, pages(&numbers)[4090..4100]);
    assert_eq!(open.read_at(&mut few, file.bytes).unwrap(), 0);
    assert!(File::options().write(true).open(view.ram(&file)).is_err());
    let nowhere = MapFile::of(MapRoot { node: PageHash([9; 32]), pages: 1 });
    assert!(fs::read(view.ram(&nowhere)).is_err());
    assert!(
        fs::read(view.mount_point().join(".ram/x")).is_err()
            && fs::read_dir(view.mount_point()).unwrap().next().is_none()
    );
    // What came after the view was opened is there too.
    let later = take(store, &[77]);
    assert!(fs::read(view.ram(&MapFile::of(later))).unwrap() == page(77));
}

fn listed(id: &str, name: &str, root: MapRoot) -> Listed {
    let files = vec![
        ListedFile { name: "ram".into(), content: Content::Map { root, bytes: root.pages * 4096 } },
        ListedFile { name: "snapshot.json".into(), content: Content::Text(format!("{{\"name\":{name:?}}}")) },
    ];
    Listed { id: id.into(), target: "web".into(), name: name.into(), time: 1_700_000_000, files }
}

#[test]
fn what_is_listed_is_shown_and_what_is_not_is_not() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    let root = take(store, &[1, 2, 3]);
    let all = || unreachable!();
    view.list(&[listed("a", "one", root), listed("b", "two", root)], &[], all).unwrap();
    let names = |path: &str| {
        let mut names: Vec<String> = fs::read_dir(view.mount_point().join(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names.join(" ")
    };
    assert_eq!((names("").as_str(), names("web").as_str()), ("web", "one two"));
    assert_eq!(names("web/one"), "ram snapshot.json");
    let ram = view.mount_point().join("web/one/ram");
    assert!(fs::read(&ram).unwrap() == pages(&[1, 2, 3]));
    let meta = fs::metadata(&ram).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777, meta.mtime()), (12288, 0o400, 1_700_000_000));
    let text = fs::read_to_string(view.mount_point().join("web/two/snapshot.json")).unwrap();
    assert_eq!(text, "{\"name\":\"two\"}");
    // The numbers of files stay, also through the death of whoever serves.
    let open = File::open(&ram).unwrap();
    kill(serving(dir.path()));
    assert_eq!(fs::metadata(&ram).unwrap().ino(), meta.ino());
    view.list(&[listed("a", "renamed", root)], &["b".into()], all).unwrap();
    assert_eq!(names("web"), "renamed");
    let mut bytes = vec![0; 12288];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == pages(&[1, 2, 3]), "who has it open has it");
    assert!(!ram.exists());
}

/// Readers without end, while those who serve are killed, one after the other, and those who stand by as well.
#[test]
fn readers_do_not_notice_that_servers_die() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    // Many files, so that the page cache does not answer.
    let files: Vec<(MapFile, Vec<u64>)> = (0..80_u64)
        .map(|i| {
            let numbers: Vec<u64> = (0..512).map(|n| 1 + i * 1000 + n).collect();
            (MapFile::of(take(store, &numbers)), numbers)
        })
        .collect();
    let (over, read, next) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed) as usize % files.len();
                    let (file, numbers) = &files[number];
                    let open = File::open(view.ram(file)).unwrap();
                    // From the server each time.
                    rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    let mut bytes = vec![0; numbers.len() * PAGE_SIZE];
                    open.read_exact_at(&mut bytes, 0).unwrap();
                    assert!(bytes == pages(numbers), "file {number}");
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _over = Sets(&over);
        for round in 0..25 {
            let before = read.load(Ordering::Relaxed);
            if round % 3 == 2 {
                let old = standing_by(dir.path(), None);
                kill(old);
                standing_by(dir.path(), Some(old));
            }
            kill(serving(dir.path()));
            assert!(
                until(Duration::from_secs(20), || read.load(Ordering::Relaxed) > before + 12),
                "round {round}: readers go on"
            );
        }
    });
}

#[test]
fn what_cannot_be_read_is_not_answered_until_it_can() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    let numbers: Vec<u64> = (1..100).collect();
    let (root, other) = (take(store, &numbers), take(store, &[500, 501]));
    let file = MapFile::of(root);
    let pack = fs::read_dir(dir.path().join("store/packs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len());
    let packs = File::options().write(true).read(true).open(pack.unwrap()).unwrap();
    let mut good = [0; 64];
    let place = 4096 + 50 * 4096;
    packs.read_exact_at(&mut good, place).unwrap();
    packs.write_all_at(&[0x55; 64], place).unwrap();
    let answered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..12)
            .map(|_| {
                scope.spawn(|| {
                    let bytes = fs::read(view.ram(&file)).unwrap();
                    answered.store(true, Ordering::Relaxed);
                    assert!(bytes == pages(&numbers));
                })
            })
            .collect();
        assert!(until(Duration::from_secs(10), || !view.held().is_empty()));
        let held = view.held();
        assert_eq!((held[0].file, held[0].pages.as_slice()), (file, &[50][..]), "{held:?}");
        // Its neighbours, which are read ahead together with it, do not wait.
        let mut neighbours = vec![0; 49 * PAGE_SIZE];
        File::open(view.ram(&file)).unwrap().read_exact_at(&mut neighbours, 0).unwrap();
        assert!(neighbours == pages(&numbers[..49]));
        let mut next = [0; PAGE_SIZE];
        File::open(view.ram(&file)).unwrap().read_exact_at(&mut next, 51 * PAGE_SIZE as u64).unwrap();
        assert!(next == page(52));
        assert!(held[0].why.contains("damaged"), "{held:?}");
        // A disk's reader is told, after a while; at once if somebody has waited just now.
        let began = Instant::now();
        assert!(fs::read(view.disk(&file)).is_err());
        assert!(began.elapsed() > Duration::from_secs(1));
        let (disk, began) = (File::open(view.disk(&file)).unwrap(), Instant::now());
        assert!((0..5).all(|_| disk.read_exact_at(&mut next, 50 * PAGE_SIZE as u64).is_err()));
        assert!(began.elapsed() < Duration::from_secs(1));
        // Others are served; also by whoever comes next, who holds as well.
        kill(serving(dir.path()));
        assert!(fs::read(view.ram(&MapFile::of(other))).unwrap() == pages(&[500, 501]));
        assert!(until(Duration::from_secs(10), || !view.held().is_empty()));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!answered.load(Ordering::Relaxed), "nobody was answered with something else");
        packs.write_all_at(&good, place).unwrap();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    assert!(until(Duration::from_secs(5), || view.held().is_empty()));
}

#[test]
fn a_view_is_found_again_and_one_without_servers_is_made_anew() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    let file = MapFile::of(take(store, &[5, 6]));
    let before = serving(dir.path());
    let again = View::open(&setup(dir.path(), None), 2, &[listed("a", "one", file.root)]).unwrap();
    assert_eq!(serving(dir.path()), before);
    assert!(again.mount_point().join("web/one/ram").exists());
    let (one, two) = (serving(dir.path()), standing_by(dir.path(), None));
    // At once, or the one who stands by takes over.
    let stop = |pid: u32| {
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid as i32).unwrap(),
            rustix::process::Signal::STOP,
        )
        .unwrap()
    };
    stop(two);
    kill(one);
    kill(two);
    assert!(until(Duration::from_secs(5), || fs::read(view.ram(&file)).is_err()));
    let anew = View::open(&setup(dir.path(), None), 3, &[]).unwrap();
    assert!(fs::read(anew.ram(&file)).unwrap() == pages(&[5, 6]));
}

#[test]
fn who_has_a_file_mapped_keeps_it_when_it_is_unmounted() {
    let Some(scene) = scene(None) else { return };
    let numbers: Vec<u64> = (1..2000).collect();
    let open = File::open(scene.view.ram(&MapFile::of(take(&scene.store, &numbers)))).unwrap();
    scene.view.end().unwrap();
    let mut bytes = vec![0; numbers.len() * PAGE_SIZE];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == pages(&numbers));
    kill(serving(scene.dir.path()));
    rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == pages(&numbers));
    drop(open);
    assert!(until(Duration::from_secs(10), || processes(scene.dir.path()).is_empty()), "nobody is left");
    // For the scene's own end.
    let again = View::open(&setup(scene.dir.path(), None), 4, &[]).unwrap();
    assert!(again.answers());
}

/// A view for somebody else, which only root can have made. None where there can be none.
fn scene_for(owner: HostUser) -> Option<Scene> {
    use std::os::unix::fs::PermissionsExt;
    if let Err(lacks) = snapfs::mount::supported() {
        eprintln!("not tested: {lacks}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let store_dir = dir.path().join("store");
    drop(Store::create(&store_dir, GroupKey::generate().unwrap()).unwrap());
    for folder in [dir.path().to_owned(), store_dir.clone(), store_dir.join("packs"), store_dir.join("index")]
    {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o711)).unwrap();
    }
    std::os::unix::fs::chown(store_dir.join("key"), Some(owner.uid), Some(owner.gid)).unwrap();
    // Where the test's executable lies, others may not get to.
    let copy = dir.path().join("view-program");
    fs::copy(executable(), &copy).unwrap();
    let key = GroupKey::load(&store_dir.join("key")).unwrap();
    let store = Store::open_for(&store_dir, key, Some(owner)).unwrap();
    let set_up = Setup { executable: copy, ..setup(dir.path(), Some(owner)) };
    // Children of other tests may have the copy open for a moment, as it was when they were forked: "text file busy".
    let mut view = None;
    assert!(until(Duration::from_secs(5), || {
        view = View::open(&set_up, 1, &[]).ok();
        view.is_some()
    }));
    Some(Scene { view: view.unwrap(), store, dir })
}

#[test]
fn a_view_for_somebody_else_is_served_as_him_and_read_by_him_alone() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let owner = HostUser { uid: 12_345, gid: 12_346 };
    use std::os::unix::process::CommandExt;
    let Some(scene) = scene_for(owner) else { return };
    let path = scene.view.ram(&MapFile::of(take(&scene.store, &[3, 4])));
    assert_eq!(fs::metadata(format!("/proc/{}", serving(scene.dir.path()))).unwrap().uid(), owner.uid);
    let reads_as = |uid: u32| {
        let mut cat = std::process::Command::new("cat");
        cat.arg(&path).uid(uid).gid(owner.gid).current_dir("/").stderr(std::process::Stdio::null());
        cat.output().unwrap().stdout
    };
    assert!(reads_as(owner.uid) == pages(&[3, 4]));
    assert!(reads_as(owner.uid + 1).is_empty());
    // The store's files are not his: they are mapped into our memory.
    scene.store.fold().unwrap();
    for folder in ["packs", "index"] {
        let file = fs::read_dir(scene.dir.path().join("store").join(folder))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        assert_eq!(file.metadata().unwrap().uid(), 0, "{file:?}");
        let may = |what: &str, uid: u32| {
            let mut test = std::process::Command::new("test");
            test.arg(what).arg(&file).uid(uid).gid(owner.gid).current_dir("/");
            test.status().unwrap().success()
        };
        assert!(may("-r", owner.uid) && !may("-w", owner.uid), "{file:?}");
        assert!(!may("-r", owner.uid + 1), "{file:?}");
    }
    assert!(fs::read(&path).unwrap() == pages(&[3, 4]), "root may");
    kill(serving(scene.dir.path()));
    assert!(reads_as(owner.uid) == pages(&[3, 4]));
}

/// What a process may have of something from now on; as much as it may at most, if it is not said. By its owner: root may not be allowed to.
fn limit(pid: u32, what: &str, most: Option<u64>) {
    use std::os::unix::process::CommandExt;
    let meta = fs::metadata(format!("/proc/{pid}")).unwrap();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.contains(what)).unwrap();
    // Max processes             31845                31845                processes
    let hard = line.split_whitespace().nth_back(1).unwrap().to_owned();
    let option = if what == "processes" { "nproc" } else { "nofile" };
    let soft = most.map_or(hard, |most| most.to_string());
    let mut prlimit = std::process::Command::new("prlimit");
    prlimit.args([&format!("--pid={pid}"), &format!("--{option}={soft}:")]);
    prlimit.uid(meta.uid()).gid(meta.gid()).current_dir("/");
    assert!(prlimit.status().unwrap().success());
}

#[test]
fn whoever_can_start_nothing_serves_alone_until_he_can() {
    // Root may start as much as he likes.
    let owner = HostUser { uid: 23_456, gid: 23_456 };
    let scene = if rustix::process::geteuid().is_root() { scene_for(owner) } else { scene(None) };
    let Some(Scene { store, view, dir }) = &scene else { return };
    let files: Vec<(MapFile, Vec<u64>)> = (0..4)
        .map(|i| {
            let numbers: Vec<u64> = (0..300).map(|n| 1 + i * 1000 + n).collect();
            (MapFile::of(take(store, &numbers)), numbers)
        })
        .collect();
    let reads = |number: usize| {
        let (file, numbers) = &files[number];
        assert!(fs::read(view.ram(file)).unwrap() == pages(numbers), "file {number}");
    };
    let alone = standing_by(dir.path(), None);
    limit(alone, "processes", Some(0));
    kill(serving(dir.path()));
    reads(0);
    std::thread::sleep(Duration::from_millis(1500));
    reads(1);
    assert_eq!(processes(dir.path()), HashSet::from([alone]));
    limit(alone, "processes", None);
    // Also if nobody asks for anything.
    assert!(until(Duration::from_secs(10), || processes(dir.path()).len() == 2));
    reads(2);
    assert_eq!(serving(dir.path()), alone);
    kill(alone);
    reads(3);
}

#[test]
fn whoever_can_open_nothing_keeps_what_he_was_left_until_he_can() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    let file = MapFile::of(take(store, &[1, 2, 3]));
    let open = File::open(view.ram(&file)).unwrap();
    let alone = standing_by(dir.path(), None);
    limit(alone, "open files", Some(4));
    kill(serving(dir.path()));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = vec![0; 3 * PAGE_SIZE];
            open.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes == pages(&[1, 2, 3]));
        });
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!reader.is_finished() && processes(dir.path()) == HashSet::from([alone]));
        limit(alone, "open files", None);
        assert!(until(Duration::from_secs(10), || reader.is_finished()));
    });
    assert!(until(Duration::from_secs(10), || processes(dir.path()).len() == 2));
}

/// A stretch of memory that is lost as a whole, asked for by many, beside others who ask for what is there.
#[test]
fn what_is_lost_does_not_keep_others_waiting() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    let numbers: Vec<u64> = (1..1000).collect();
    let lost = MapFile::of(take(store, &numbers));
    let packs = dir.path().join("store/packs");
    let pack = fs::read_dir(&packs).unwrap().next().unwrap().unwrap().path();
    let others: Vec<(MapFile, u64)> =
        (0..60).map(|i| (MapFile::of(take(store, &[5000 + i])), 5000 + i)).collect();
    // The names of its pages are still known, and its map as well.
    let whole = fs::read(&pack).unwrap();
    let mut bytes = whole.clone();
    bytes[4096..4096 + 999 * 4096].fill(0x55);
    let file = File::options().write(true).open(&pack).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..40)
            .map(|i| {
                let open = File::open(view.ram(&lost)).unwrap();
                scope.spawn(move || {
                    let mut page = [0; PAGE_SIZE];
                    open.read_exact_at(&mut page, i * 25 * PAGE_SIZE as u64).unwrap();
                    page
                })
            })
            .collect();
        let began = Instant::now();
        for (other, number) in &others {
            assert!(fs::read(view.ram(other)).unwrap() == page(*number));
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(until(Duration::from_secs(20), || view.held().len() == 40));
        assert!(readers.iter().all(|reader| !reader.is_finished()));
        file.write_all_at(&whole, 0).unwrap();
        let began = Instant::now();
        for (reader, i) in readers.into_iter().zip(0..) {
            assert!(reader.join().unwrap() == page(1 + i * 25));
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    });
    assert!(until(Duration::from_secs(5), || view.held().is_empty()));
}

#[test]
fn a_disk_that_is_mended_soon_was_only_slow() {
    let Some(Scene { store, view, dir }) = &scene(None) else { return };
    let file = MapFile::of(take(store, &[1, 2, 3]));
    let pack = fs::read_dir(dir.path().join("store/packs")).unwrap().next().unwrap().unwrap().path();
    let disk = File::open(view.disk(&file)).unwrap();
    let pack = File::options().write(true).open(&pack).unwrap();
    let put = |number: u64| pack.write_all_at(&page(number), 4096 + 4096).unwrap();
    put(9);
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 3 * PAGE_SIZE];
        disk.read_exact_at(&mut bytes, 0).map(|()| bytes)
    });
    std::thread::sleep(Duration::from_millis(700));
    assert!(!reader.is_finished());
    put(2);
    assert!(reader.join().unwrap().unwrap() == pages(&[1, 2, 3]));
}
