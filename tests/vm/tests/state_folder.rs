//! A state folder has one daemon, one owner, and has to be writable.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use vm_tests::harness::{Spinney, tool};
use vm_tests::small_disk::SmallDisk;

#[test]
fn a_second_daemon_is_refused_and_harms_nothing() {
    let spinney = Spinney::new();
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    let pid = spinney.ok("start m").unwrap()["pid"].clone();
    let daemon = spinney.daemon();
    let second = spinney.run(["serve"]);
    assert_eq!(second.code, Some(4), "{}", second.stderr);
    assert!(
        second.problem()["detail"].as_str().is_some_and(|d| d.contains("another Spinney uses")),
        "{}",
        second.stderr
    );
    assert_eq!(spinney.daemon(), daemon);
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid);
    spinney.ok("take m one").unwrap();
}

#[test]
fn of_many_commands_that_start_a_daemon_one_does() {
    let spinney = Spinney::new();
    for _ in 0..3 {
        let commands: Vec<_> = (0..8).map(|_| spinney.begin(&["ls"])).collect();
        for command in commands {
            let output = command.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        assert_eq!(daemons(&spinney), 1);
        spinney.kill_daemon();
    }
}

fn daemons(spinney: &Spinney) -> usize {
    let state = spinney.state().display().to_string();
    let lines = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .map(|entry| fs::read(entry.path().join("cmdline")).unwrap_or_default());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    lines.filter(|line| line.contains(&state) && line.contains("serve\0")).count()
}

#[test]
fn a_socket_that_nobody_listens_at_is_in_nobodys_way() {
    let spinney = Spinney::new();
    spinney.ok("ls").unwrap();
    spinney.kill_daemon();
    let socket = spinney.state().join("spinney.sock");
    assert!(socket.exists(), "a daemon that is killed leaves it");
    spinney.ok("ls").unwrap();
    spinney.kill_daemon();
    fs::remove_file(&socket).unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    spinney.ok("ls").unwrap();
}

#[test]
fn a_state_folder_that_cannot_be_written_to_is_named() {
    let Some(disk) = SmallDisk::new(64) else { return };
    let spinney = Spinney::at(&disk.path(), &[]);
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    spinney.ok("serve --stop").unwrap();
    let mount = |how: &str| {
        let words = [Path::new("-o"), Path::new(how), &disk.path()];
        let mounted = tool("mount", words);
        assert!(mounted.status.success(), "{mounted:?}");
    };
    mount("remount,ro");
    for words in [&["ls"][..], &["serve"]] {
        let ended = spinney.run(words);
        assert_eq!(ended.code, Some(8), "{words:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("Read-only file system"), "{}", ended.stderr);
    }
    mount("remount,rw");
    spinney.ok("take m one").unwrap();
}

#[test]
fn a_state_folder_of_somebody_elses_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let spinney = Spinney::new();
    spinney.ok("ls").unwrap();
    spinney.kill_daemon();
    chown(spinney.state(), Some(65534), None).unwrap();
    let ended = spinney.run(["ls"]);
    assert_eq!(ended.code, Some(8), "{}", ended.stderr);
    assert!(ended.problem()["detail"].as_str().is_some_and(|d| d.contains("uid 65534")), "{}", ended.stderr);
    chown(spinney.state(), Some(0), None).unwrap();
    spinney.ok("ls").unwrap();

    // And the other way round: somebody without rights to it.
    fs::set_permissions(spinney.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    spinney.kill_daemon();
    let program = std::env::var("SPINNEY_BIN").unwrap_or_default();
    if program.is_empty() {
        return;
    }
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups", &program, "ls"])
        .env("SPINNEY_STATE", spinney.state())
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(8), "{}", String::from_utf8_lossy(&output.stderr));
}
