//! The test guest itself: does it boot, say the truth, outlive a restore, and obey the power button? Does its agent answer?
//!
//! Runs QEMU by hand, without Spinney. `SPINNEY_TEST_QEMU` names another QEMU than the installed one.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use vm_tests::guest::{Guest, GuestError, Mix, guest_port_args};
use vm_tests::harness::{agent_initrd, cache};

const SOON: Duration = Duration::from_secs(60);

/// A QEMU with the test guest; ends with the value.
struct Vm {
    child: Child,
    monitor: BufReader<UnixStream>,
    events: VecDeque<Value>,
    port: PathBuf,
}

impl Vm {
    fn start(folder: &Path, extra: &[&str]) -> Vm {
        Vm::start_with(folder, &cache().join("guest/initrd.img"), "virtio-net-pci,netdev=net", extra)
    }

    fn start_with(folder: &Path, initrd: &Path, card: &str, extra: &[&str]) -> Vm {
        let guest = cache().join("guest");
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
            .args(["-netdev", "user,id=net", "-device", card])
            .arg("-kernel")
            .arg(guest.join("vmlinuz"))
            .arg("-initrd")
            .arg(initrd)
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
        let monitor = BufReader::new(connect(&monitor));
        let mut vm = Vm { child, monitor, events: VecDeque::new(), port };
        vm.qmp("qmp_capabilities", json!({}));
        vm
    }

    fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{line}").expect("the monitor");
        loop {
            let reply = self.line();
            assert!(reply.get("error").is_none(), "{command}: {reply}");
            if let Some(value) = reply.get("return") {
                return value.clone();
            }
            self.events.push_back(reply);
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.monitor.read_line(&mut line).expect("the monitor") > 0, "QEMU ended");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Takes a device out and waits until the guest has let go of it; how long that took.
    fn unplug(&mut self, id: &str) -> Duration {
        self.events.clear();
        let begun = Instant::now();
        self.qmp("device_del", json!({ "id": id }));
        loop {
            let event = self.events.pop_front().unwrap_or_else(|| self.line());
            if event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id {
                return begun.elapsed();
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

/// Connects to a socket of a QEMU that has just been started.
fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + SOON;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(SOON)).expect("a time-out");
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// QEMU's guest agent.
struct Agent(BufReader<UnixStream>);

impl Agent {
    /// Arguments that give a QEMU the agent's port, with its socket at `socket`.
    fn args(socket: &Path) -> [String; 6] {
        [
            "-device",
            "virtio-serial-pci,id=agent",
            "-chardev",
            &format!("socket,id=agent,path={},server=on,wait=off", socket.display()),
            "-device",
            "virtserialport,id=agent0,bus=agent.0,chardev=agent,name=org.qemu.guest_agent.0",
        ]
        .map(str::to_owned)
    }

    /// Connects, and waits for the agent.
    fn connect(socket: &Path) -> Agent {
        let mut agent = Agent(BufReader::new(connect(socket)));
        agent.sync();
        agent
    }

    /// Skips what was half said on either side; the byte 0xFF is in no JSON text.
    fn sync(&mut self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time after 1970");
        let id = now.as_micros() as u64;
        self.send(b"\xFF", "guest-sync-delimited", &json!({ "id": id }));
        self.0.read_until(0xFF, &mut Vec::new()).expect("the agent");
        assert_eq!(self.answer("guest-sync-delimited"), id);
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.send(b"", command, &arguments);
        self.answer(command)
    }

    fn send(&mut self, before: &[u8], command: &str, arguments: &Value) {
        let line = json!({ "execute": command, "arguments": arguments });
        let bytes = [before, format!("{line}\n").as_bytes()].concat();
        self.0.get_mut().write_all(&bytes).expect("the agent");
    }

    fn answer(&mut self, command: &str) -> Value {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).expect("the agent") > 0, "QEMU ended");
        let reply: Value = serde_json::from_str(&line).expect("JSON");
        reply.get("return").unwrap_or_else(|| panic!("{command}: {reply}")).clone()
    }

    /// Runs a shell command to its end; the status.
    fn shell(&mut self, command: &str) -> Value {
        let words = json!({ "path": "/bin/sh", "arg": ["-c", command], "capture-output": true });
        let pid = self.ask("guest-exec", words)["pid"].clone();
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.ask("guest-exec-status", json!({ "pid": pid }));
            if status["exited"] == true {
                return status;
            }
            assert!(Instant::now() < deadline, "{command}: {status}");
            thread::sleep(Duration::from_millis(10));
        }
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

const UUID: &str = "5914e700-0000-4000-8000-00000000000a";
/// That and a line feed, in the encoding in which the agent gives files.
const UUID_IN_BASE64: &str = "NTkxNGU3MDAtMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDBhCg==";
const CARD: &str = "virtio-net-pci,id=net0,netdev=net,addr=0x18,romfile=";

/// A guest with an agent, and a card whose address ends in `01`.
fn with_agent(folder: &Path, extra: &[&str]) -> (Vm, Guest, Agent) {
    let socket = folder.join("agent");
    // What a QEMU before left there would be connected to in place of this one's.
    let _ = std::fs::remove_file(&socket);
    let port = Agent::args(&socket);
    let mut words: Vec<&str> = port.iter().map(String::as_str).collect();
    words.extend(["-uuid", UUID]);
    words.extend(extra);
    let mut vm = Vm::start_with(folder, &agent_initrd(), &format!("{CARD},mac={}", mac(1)), &words);
    if extra.contains(&"-incoming") {
        vm.wait_for("query-status", "paused");
        vm.qmp("cont", json!({}));
    }
    let guest = Guest::connect(&vm.port, SOON).expect("the guest");
    let agent = Agent::connect(&socket);
    (vm, guest, agent)
}

fn mac(last: u8) -> String {
    format!("52:54:00:00:00:{last:02x}")
}

#[test]
fn the_agent_answers_and_does_what_it_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let begun = Instant::now();
    let (_vm, mut guest, mut agent) = with_agent(folder.path(), &[]);
    println!("booted, with an agent, in {:.1} s", begun.elapsed().as_secs_f64());
    agent.ask("guest-ping", json!({}));

    // Long before anything here was made.
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    agent.ask("guest-set-time", json!({ "time": 1_000_000_000_000_000_000_u64 }));
    let late = guest.time().unwrap().duration_since(then).expect("not before");
    assert!(late < SOON, "{late:?}");
    let (_, hardware) = guest.cmd("cat /sys/class/rtc/rtc0/since_epoch").unwrap();
    assert!(hardware.starts_with("10000000"), "the hardware's clock: {hardware}");

    let done = agent.shell("hostname other");
    assert_eq!(done["exitcode"], 0, "{done}");
    assert_eq!(guest.hostname().unwrap(), "other");
    assert_eq!(agent.ask("guest-get-host-name", json!({}))["host-name"], "other");
    assert_eq!(agent.shell("exit 3")["exitcode"], 3);

    let cards = agent.ask("guest-network-get-interfaces", json!({}));
    let card = cards.as_array().unwrap().iter().find(|card| card["name"] == "eth0").expect("a card");
    assert_eq!(card["hardware-address"], mac(1).as_str());
    assert_eq!(card["ip-addresses"][0]["ip-address"], "10.0.2.15");

    let file = agent.ask("guest-file-open", json!({ "path": "/sys/class/dmi/id/product_uuid" }));
    let read = agent.ask("guest-file-read", json!({ "handle": file }));
    assert_eq!(read["buf-b64"], UUID_IN_BASE64);
    agent.ask("guest-file-close", json!({ "handle": file }));

    // It is started again if it ends.
    let first = guest.cmd("pidof qemu-ga && killall qemu-ga").unwrap();
    assert_eq!(first.0, 0, "{first:?}");
    let deadline = Instant::now() + SOON;
    loop {
        let now = guest.cmd("pidof qemu-ga").unwrap();
        if now.0 == 0 && now != first {
            break;
        }
        assert!(Instant::now() < deadline, "{now:?}");
        thread::sleep(Duration::from_millis(50));
    }
    agent.sync();
    agent.ask("guest-ping", json!({}));
}

#[test]
fn the_agent_outlives_a_restore() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("state");
    let (mut vm, mut guest, mut agent) = with_agent(folder.path(), &[]);
    agent.shell("hostname before");
    // With a request half said.
    agent.0.get_mut().write_all(b"{ \"execute\":").unwrap();
    vm.qmp("stop", json!({}));
    vm.qmp("migrate", json!({ "uri": format!("exec:cat > {}", state.display()) }));
    vm.wait_for("query-migrate", "completed");
    drop(vm);
    assert!(guest.nonce().is_err(), "the old QEMU is gone");

    let incoming = format!("exec:cat {}", state.display());
    let (_vm, mut guest, mut agent) = with_agent(folder.path(), &["-incoming", &incoming]);
    assert_eq!(agent.ask("guest-get-host-name", json!({}))["host-name"], "before");
    agent.shell("hostname after");
    assert_eq!(guest.hostname().unwrap(), "after");
}

#[test]
fn the_guest_says_who_it_is_and_sees_a_card_that_is_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut vm, mut guest, _agent) = with_agent(folder.path(), &[]);
    assert_eq!(guest.uuid().unwrap(), UUID);
    assert_eq!(guest.macs().unwrap(), BTreeMap::from([("eth0".to_owned(), mac(1))]));
    for last in 2..5 {
        let unplugged = vm.unplug("net0");
        assert!(guest.macs().unwrap().is_empty(), "a card is left");
        let begun = Instant::now();
        vm.qmp("device_add", json!({
            "driver": "virtio-net-pci", "id": "net0", "netdev": "net", "addr": "0x18", "romfile": "", "mac": mac(last),
        }));
        let wanted = BTreeMap::from([("eth0".to_owned(), mac(last))]);
        while guest.macs().unwrap() != wanted {
            assert!(begun.elapsed() < SOON, "{:?}", guest.macs());
            thread::sleep(Duration::from_millis(5));
        }
        println!("out in {} ms, in again after {} ms", unplugged.as_millis(), begun.elapsed().as_millis());
    }
}
