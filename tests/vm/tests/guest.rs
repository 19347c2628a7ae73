//! The test guest itself: does it boot, say the truth, outlive a restore, and obey the power button?
//!
//! Runs QEMU by hand, without Spinney. `SPINNEY_TEST_QEMU` names another QEMU than the installed one.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm_tests::guest::{Guest, GuestError, Mix, guest_port_args};

const SOON: Duration = Duration::from_secs(60);

/// A QEMU with the test guest; ends with the value.
struct Vm {
    child: Child,
    monitor: BufReader<UnixStream>,
    port: PathBuf,
}

impl Vm {
    fn start(folder: &Path, extra: &[&str]) -> Vm {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let cache = std::env::var_os("SPINNEY_CACHE").map_or_else(|| root.join(".cache"), PathBuf::from);
        let guest = cache.join("guest");
        let (port, monitor, disk) = (folder.join("port"), folder.join("qmp"), folder.join("data.img"));
        if !disk.exists() {
            std::fs::copy(guest.join("data.img"), &disk).expect("the test guest (scripts/guest.sh)");
        }
        // What a QEMU before left there would be connected to in place of this one's.
        let _ = (std::fs::remove_file(&port), std::fs::remove_file(&monitor));
        let program = std::env::var_os("SPINNEY_TEST_QEMU").unwrap_or("qemu-system-x86_64".into());
        let child = Command::new(program)
            .args(["-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-device", "vmgenid,guid=auto", "-device", "virtio-rng-pci"])
            .args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"])
            .arg("-kernel")
            .arg(guest.join("vmlinuz"))
            .arg("-initrd")
            .arg(guest.join("initrd.img"))
            .arg("-append")
            .arg(std::fs::read_to_string(guest.join("cmdline")).expect("cmdline").trim())
            .arg("-serial")
            .arg(format!("file:{}", folder.join("console").display()))
            .arg("-drive")
            .arg(format!("if=none,id=data,format=raw,file={}", disk.display()))
            .args(["-device", "virtio-blk-pci,drive=data"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .args(guest_port_args(&port))
            .args(extra)
            .stderr(File::create(folder.join("stderr")).expect("stderr"))
            .spawn()
            .expect("QEMU");
        let deadline = Instant::now() + SOON;
        let stream = loop {
            match UnixStream::connect(&monitor) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "no monitor: {error}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        let mut vm = Vm { child, monitor: BufReader::new(stream), port };
        vm.qmp("qmp_capabilities", json!({}));
        vm
    }

    fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{line}").expect("the monitor");
        loop {
            let mut line = String::new();
            assert!(self.monitor.read_line(&mut line).expect("the monitor") > 0, "QEMU ended");
            let reply: Value = serde_json::from_str(&line).expect("JSON");
            assert!(reply.get("error").is_none(), "{command}: {reply}");
            if let Some(value) = reply.get("return") {
                return value.clone();
            }
        }
    }

    fn wait_for(&mut self, command: &str, status: &str) {
        let deadline = Instant::now() + SOON;
        while self.qmp(command, json!({}))["status"] != status {
            assert!(Instant::now() < deadline, "{command} never said {status}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

#[test]
fn the_workload_outlives_a_restore() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("state");
    let begun = Instant::now();
    let mut vm = Vm::start(folder.path(), &[]);
    let mut guest = Guest::connect(&vm.port, SOON).expect("the guest");
    println!("booted in {:.1} s", begun.elapsed().as_secs_f64());

    let hello = guest.hello().unwrap();
    assert!(hello.data);
    assert_eq!(guest.genid().unwrap(), "bound");
    assert_eq!(guest.cmd("echo one two; exit 3").unwrap(), (3, "one two\n".to_owned()));
    assert!(matches!(guest.ask("dance"), Err(GuestError::Refused { .. })));
    assert_eq!(guest.fill(64, Mix::default()).unwrap(), 64 * 256);
    let hash = guest.hash().unwrap();
    assert_eq!(guest.page_hashes(5000, 5000).unwrap().len(), 5000);
    guest.writer_start(2000, 2048).unwrap();
    guest.log_start(200).unwrap();
    guest.disk_write(4).unwrap();
    guest.stamp(Duration::from_millis(1)).unwrap();
    assert!(guest.stamps(Duration::from_millis(500)).unwrap().len() > 10);

    // While stamps are on their way, so that the restored guest is in the middle of a line.
    vm.qmp("stop", json!({}));
    vm.qmp("migrate", json!({ "uri": format!("exec:cat > {}", state.display()) }));
    vm.wait_for("query-migrate", "completed");
    drop(vm);

    let mut vm = Vm::start(folder.path(), &["-incoming", &format!("exec:cat {}", state.display())]);
    vm.wait_for("query-status", "paused");
    vm.qmp("cont", json!({}));
    assert!(matches!(guest.nonce(), Err(GuestError::Connection { .. })), "the old connection is dead");
    guest.reconnect(SOON).expect("the restored guest");
    guest.stamp(Duration::ZERO).unwrap();
    assert_eq!(guest.nonce().unwrap(), hello.nonce);
    assert_eq!(guest.hash().unwrap(), hash);
    let (counter, written, logged) =
        (guest.counter().unwrap(), guest.writer_check().unwrap(), guest.log_check().unwrap());
    thread::sleep(Duration::from_millis(300));
    assert_eq!((written.bad, written.first_bad), (0, None));
    assert!(written.steps > 0 && logged.ok && logged.mem > 0, "{written:?} {logged:?}");
    assert!(guest.counter().unwrap() > counter);
    assert!(guest.writer_check().unwrap().steps > written.steps);
    assert!(guest.log_check().unwrap().mem > logged.mem);

    let pressed = Instant::now();
    vm.qmp("system_powerdown", json!({}));
    while vm.child.try_wait().expect("QEMU").is_none() {
        assert!(pressed.elapsed() < SOON, "the guest ignores the power button");
        thread::sleep(Duration::from_millis(20));
    }
    println!("off in {:.1} s", pressed.elapsed().as_secs_f64());
    let checked =
        Command::new("/sbin/e2fsck").arg("-fn").arg(folder.path().join("data.img")).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[test]
fn a_disk_of_another_instant_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("state");
    let disk = folder.path().join("data.img");
    let mut vm = Vm::start(folder.path(), &[]);
    let mut guest = Guest::connect(&vm.port, SOON).expect("the guest");
    guest.log_step(5).unwrap();
    guest.sync().unwrap();
    std::fs::copy(&disk, folder.path().join("before")).unwrap();
    guest.log_step(5).unwrap();
    vm.qmp("stop", json!({}));
    vm.qmp("migrate", json!({ "uri": format!("exec:cat > {}", state.display()) }));
    vm.wait_for("query-migrate", "completed");
    drop(vm);

    std::fs::rename(folder.path().join("before"), &disk).unwrap();
    let mut vm = Vm::start(folder.path(), &["-incoming", &format!("exec:cat {}", state.display())]);
    vm.wait_for("query-status", "paused");
    vm.qmp("cont", json!({}));
    guest.reconnect(SOON).expect("the restored guest");
    let checked = guest.log_check().unwrap();
    assert!(!checked.ok && checked.mem == 10 && checked.cached == 10, "{checked:?}");
}
