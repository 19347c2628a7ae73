//! The program as people meet it: stdout, stderr and exit code, against a daemon that it starts itself.

use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A state folder of its own; its daemon ends with it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn state(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_spinney"))
            .args(line.split_whitespace())
            .env_clear()
            .env("SPINNEY_STATE", self.state())
            .env("HOME", self.state())
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .output()
            .unwrap()
    }

    /// What comes out, as a snapshot shows it.
    fn shown(&self, line: &str) -> String {
        let output = self.run(line);
        let text = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes).replace(&self.state().display().to_string(), "$STATE")
        };
        let mut shown = text(&output.stdout);
        for line in text(&output.stderr).lines() {
            shown.push_str(format!("[stderr] {line}").trim_end());
            shown.push('\n');
        }
        shown.push_str(&format!("[exit {}]", output.status.code().unwrap_or(-1)));
        shown
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.run("serve --stop");
    }
}

#[test]
fn an_empty_place() {
    let place = Place::new();
    insta::assert_snapshot!(place.shown("ls"), @r"
    [stderr] no machines; `spinney create --help` tells how to make one
    [exit 0]
    ");
    insta::assert_snapshot!(place.shown("--json ls"), @r#"
    {
      "machines": [],
      "schema": "spinney.machines/1"
    }
    [exit 0]
    "#);
    insta::assert_snapshot!(place.shown("op log"), @r"
    [stderr] nothing was done yet
    [exit 0]
    ");
    insta::assert_snapshot!(place.shown("fsck"), @r"
    read 0 packs, 0 pages, 0 disk layers, 0 snapshots
    all is whole
    [exit 0]
    ");
}

#[test]
fn errors_have_an_exit_code_and_a_hint() {
    let place = Place::new();
    insta::assert_snapshot!(place.shown("show nope"), @r#"
    [stderr] error: there is no machine called "nope"
    [stderr] hint: `spinney ls` lists the machines
    [exit 3]
    "#);
    insta::assert_snapshot!(place.shown("rm web@"), @r#"
    [stderr] error: rm does not take "web@" with nothing behind the @
    [stderr] hint: name the snapshot, or write web@~1 for the parent of here
    [exit 2]
    "#);
    insta::assert_snapshot!(place.shown("goto web"), @r"
    [stderr] error: web is a machine, not a snapshot
    [stderr] hint: write web@SNAP; `spinney tree web` shows the names
    [exit 2]
    ");
    insta::assert_snapshot!(place.shown("goto @"), @r"
    [stderr] error: @ says no machine
    [stderr] hint: write TARGET@SNAP, such as web@before; `spinney tree` shows the machines and their snapshots
    [exit 2]
    ");
    insta::assert_snapshot!(place.shown("create --file /nowhere/machine.toml"), @r"
    [stderr] error: there is no file /nowhere/machine.toml
    [exit 3]
    ");
    insta::assert_snapshot!(place.shown("create x --memory 0"), @r"
    [stderr] error: invalid value '0' for '--memory <SIZE>': it must be more than nothing
    [stderr]
    [stderr] For more information, try '--help'.
    [exit 2]
    ");
    insta::assert_snapshot!(place.shown("create x --memory 16E"), @r"
    [stderr] error: invalid value '16E' for '--memory <SIZE>': it is more than 8 EiB
    [stderr]
    [stderr] For more information, try '--help'.
    [exit 2]
    ");
    let json = place.run("--json show nope");
    let error: serde_json::Value = serde_json::from_slice(&json.stderr).unwrap();
    assert_eq!((&error["schema"], &error["code"]), (&"spinney.error/1".into(), &"not_found".into()));
    assert!(json.stdout.is_empty());
}

#[test]
fn settings_name_who_gave_them_and_long_paths_are_refused() {
    let place = Place::new();
    // Columns are as wide as the name of the folder, which differs from run to run.
    let squeezed = place
        .shown("config show --origin")
        .split(' ')
        .filter(|s| !s.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    insta::assert_snapshot!(squeezed, @r"
    KEY VALUE ORIGIN
    state $STATE SPINNEY_STATE
    qemu (looked for) default
    qemu_img (looked for) default
    accel (looked for) default
    [exit 0]
    ");
    let long = format!("--state /tmp/{} ls", "x".repeat(120));
    let output = place.run(&long);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("too long for a Unix socket"));
}

#[test]
fn several_first_commands_share_one_daemon() {
    let place = Place::new();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..5).map(|_| scope.spawn(|| place.run("ls"))).collect();
        for run in runs {
            let output = run.join().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    });
    let log = std::fs::read_to_string(place.state().join("daemon.log")).unwrap();
    assert_eq!(log.matches("listen socket=").count(), 1, "{log}");
}

#[test]
fn completion_knows_verbs_without_starting_a_daemon() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = place.run(&format!("completion {shell}"));
        assert!(output.status.success() && output.stdout.len() > 100, "{shell}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_spinney"))
        .args(["--", "spinney", "show", ""])
        .env("COMPLETE", "fish")
        .env("SPINNEY_STATE", place.state())
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(!place.state().join("daemon.log").exists());
}

#[test]
fn groups_are_made_shown_and_removed() {
    let place = Place::new();
    let owner = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
    let mut shown = String::new();
    for line in [
        "group create work",
        "group create work",
        "group create a/b",
        "group create more --owner no-such-user",
        "group show nope",
        "create m --group nope",
        "create m --group work --memory 64M --network none --disk 1M",
        "ls",
        "group rm work",
        "edit m --group work",
        "edit m@x --group work",
        "edit m --group nope",
        "edit m --group default",
        "ls",
        "undo",
        "edit m --group default",
        "group rm work",
        "group rm default --yes",
        "fsck",
    ] {
        shown.push_str(&format!("$ spinney {line}\n{}\n", place.shown(line).replace(owner.trim(), "$USER")));
    }
    let log = String::from_utf8(place.run("op log").stdout).unwrap();
    for id in log.lines().skip(1).filter_map(|line| line.split(' ').next()) {
        shown = shown.replace(id, "$ID");
    }
    insta::assert_snapshot!(shown);
    let removed = place.run("group rm work --yes");
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    let rows = String::from_utf8(place.run("group ls").stdout).unwrap();
    assert_eq!(rows.lines().count(), 2, "{rows}");
}

/// Whoever is not root can make groups for himself alone.
#[test]
fn only_root_makes_groups_for_others() {
    use std::os::unix::fs::chown;
    use std::os::unix::process::CommandExt;

    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("spinney");
    // Where cargo has put it not everybody may come.
    std::fs::copy(env!("CARGO_BIN_EXE_spinney"), &program).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    let other = if is_root { "65534" } else { "0" };
    if is_root {
        chown(folder.path(), Some(65_533), Some(65_533)).unwrap();
    }
    let run = |words: &[&str]| {
        let mut command = Command::new(&program);
        if is_root {
            command.uid(65_533).gid(65_533);
        }
        let state = folder.path().join("s");
        command.args(words).env("SPINNEY_STATE", state).env("HOME", folder.path());
        loop {
            match command.output() {
                // A child that another test is starting has the copy open for writing until its exec.
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                output => return output.unwrap(),
            }
        }
    };
    let refused = run(&["group", "create", "theirs", "--owner", other]);
    let own = run(&["group", "create", "ours"]);
    run(&["serve", "--stop"]);
    let words = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(8), "{words}");
    assert!(words.contains("only root can make a group"), "{words}");
    assert!(own.status.success(), "{}", String::from_utf8_lossy(&own.stderr));
}
