//! Machines that have a process: starting one, finding it again, seeing that it is gone.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qemu::accel::Accel;
use qemu::command::{BootFirst, Card, CdDrive, Disk, MachineSpec, RunFolder, UEFI_DISK, Uefi};
use qemu::image::takes_direct_io;
use qemu::process::Process;
use qemu::qmp::{Qmp, QmpError};

use crate::catalog::{ProcessRow, TargetRow};
use crate::check::{existing_file, size};
use crate::config::{Boot, Display, Firmware, MachineConfig};
use crate::engine::{Engine, Tools};
use crate::error::{Code, Error, Result};
use crate::id::{new_id, new_uuid};
use crate::new_disks::uefi_files;
use crate::owner::read_of_others;
use crate::types::Power;
use crate::views::RamImage;

/// How long QEMU may take until its monitor answers.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long looking at a machine may take.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// How long a QEMU that does not answer is waited for in case it is just ending: its connection closes first, then its memory is
/// given back, which takes its time for a large guest on a busy host.
const ENDING: Duration = Duration::from_secs(1);
/// What hardware acceleration needs.
const KVM: &str = "/dev/kvm";
/// Longest path of a Unix socket.
const SOCKET_PATH_LIMIT: usize = 107;

/// A machine's QEMU, with the daemon's monitor.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Process,
    pub(crate) qmp: Qmp,
    pub(crate) run: RunFolder,
    pub(crate) row: ProcessRow,
}

impl Running {
    /// Ends a process that did not become a machine's.
    pub(crate) fn give_up(&self) {
        self.process.kill();
        let _ = fs::remove_dir_all(&self.run.0);
    }
}

/// What became of a process that the catalog names.
#[derive(Debug)]
pub(crate) enum Adopted {
    /// It answers.
    Running(Running),
    /// It is there and does not answer: stuck, or busy.
    Silent(Process, QmpError),
    /// It has ended.
    Gone,
}

/// How a process is to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin<'a> {
    /// Boot.
    Boot,
    /// Boot, with the CPUs standing still until `cont`.
    BootPaused,
    /// Wait for a state to load.
    Incoming,
    /// The same, with RAM mapped from an image, so that it need not be loaded.
    Mapped(&'a RamImage),
}

impl Engine {
    /// The folder of a run.
    pub(crate) fn run_folder(&self, name: &str) -> RunFolder {
        RunFolder(self.settings.state.join("run").join(name))
    }

    /// Starts QEMU for a machine with these settings and disks, and waits until its monitor answers. It is not in the
    /// catalog yet.
    pub(crate) fn launch(
        &self,
        target: &TargetRow,
        config: &MachineConfig,
        machine: &str,
        disks: Vec<Disk>,
        begin: Begin<'_>,
    ) -> Result<Running> {
        let launched = self.launch_anywhere(target, config, machine, disks, begin);
        // On a full disk it has no log in which it could say why.
        launched.map_err(|error| {
            let vague = matches!(error.code(), Code::Failed | Code::Precondition) && !error.is_in_the_way();
            match self.check_not_out_of_room() {
                Err(full) if vague => full.because(error),
                _ => error,
            }
        })
    }

    fn launch_anywhere(
        &self,
        target: &TargetRow,
        config: &MachineConfig,
        machine: &str,
        mut disks: Vec<Disk>,
        begin: Begin<'_>,
    ) -> Result<Running> {
        let Tools { qemu, accel, .. } = self.tools()?;
        let group = self.group_of(target)?;
        self.check_readable_by_owner(&group, config)?;
        let user = group.runs_as();
        let device = (accel == Accel::Kvm).then_some(Path::new(KVM));
        let ids = user.as_ref().map(|user| user.ids(device)).transpose()?;
        let cdrom = cd_spec(&target.name, config)?;
        let uefi = uefi_spec(config, &mut disks)?;
        // They boot in the order of the settings, in which one that was added comes last.
        disks.sort_by_key(|disk| config.disks.iter().position(|known| known.id == disk.id));
        let name = new_id().chars().take(8).collect::<String>();
        let run = self.run_folder(&name);
        check_socket_path(&run.console())?;
        let made = fs::create_dir(&run.0);
        made.map_err(|e| Error::new(Code::Failed, format!("cannot make {}", run.0.display())).because(e))?;
        let cards = target.macs.iter().enumerate();
        let image = if let Begin::Mapped(image) = begin { Some(image) } else { None };
        let spec = MachineSpec {
            name: target.name.clone(),
            machine: machine.to_owned(),
            accel,
            memory: config.memory,
            memory_image: image.map(|image| image.path.clone()),
            cpus: config.cpus,
            uuid: target.uuid.clone(),
            generation: new_uuid(),
            disks,
            cdrom,
            boot: match config.boot {
                None | Some(Boot::Disk) => BootFirst::Disk,
                Some(Boot::Cd) => BootFirst::Cd,
                Some(Boot::Net) => BootFirst::Net,
            },
            uefi,
            vnc: config.display == Display::Vnc,
            cards: cards.map(|(i, mac)| Card { id: format!("net{i}"), mac: mac.clone() }).collect(),
            guest_agent: config.guest_agent,
            kernel: config.kernel.clone().map(|k| (k, config.initrd.clone(), config.append.clone())),
            only_migratable: config.memory_snapshots,
            direct: self.direct_io(&target.group),
            incoming: matches!(begin, Begin::Incoming | Begin::Mapped(_)),
            stopped: begin != Begin::Boot,
            extra: config.qemu_args.clone(),
        };
        let args = spec.arguments(&run);
        let given = user.as_ref().map_or(Ok(()), |user| user.owns(&run.0));
        let process = given.and_then(|()| {
            Process::spawn_as(ids, &qemu.path, &args, &run.log()).map_err(|error| {
                Error::new(Code::Precondition, format!("{} cannot be started", qemu.path.display()))
                    .because(error)
            })
        });
        let process = process.inspect_err(|_| drop(fs::remove_dir_all(&run.0)))?;
        let row = ProcessRow {
            id: process.id(),
            run: name,
            accel: accel.to_string(),
            version: qemu.version.to_string(),
            boot: boot_id(),
            ram: image.map(|image| image.root),
        };
        match wait_for_monitor(&process, &run) {
            Ok(qmp) => Ok(Running { process, qmp, run, row }),
            Err(error) => {
                process.kill();
                let words = log_tail(&run);
                let _ = fs::remove_dir_all(&run.0);
                Err(start_error(&target.name, config, error, &words))
            }
        }
    }

    /// Finds the process of a catalog entry again.
    pub(crate) fn adopt(&self, row: &ProcessRow) -> Adopted {
        let process = if row.boot == boot_id() { Process::find(row.id) } else { None };
        let Some(process) = process else { return Adopted::Gone };
        let run = self.run_folder(&row.run);
        match Qmp::connect(&run.monitor(), false, LOOK_LIMIT) {
            Ok(qmp) => Adopted::Running(Running { process, qmp, run, row: row.clone() }),
            Err(_) if !process.is_alive() => Adopted::Gone,
            Err(error) => Adopted::Silent(process, error),
        }
    }

    /// For the holder of a target's lock: a process that the catalog names and that no command has at hand is found again, or
    /// written down as gone. One that does not answer is left alone, unless `ending` it is what is wanted.
    pub(crate) fn find_again(&self, target: TargetRow, ending: bool) -> Result<TargetRow> {
        self.forget_deaf(&target.id);
        let Some(row) = target.process.as_ref().filter(|_| !self.running_map().contains_key(&target.id))
        else {
            return Ok(target);
        };
        match self.adopt(row) {
            Adopted::Running(running) => {
                self.recover_late(&target, &running)?;
                self.enlist(&target.id, Arc::new(running));
                return Ok(target);
            }
            Adopted::Silent(process, _) if ending => process.kill(),
            Adopted::Silent(_, error) => {
                let name = &target.name;
                return Err(Error::new(Code::TimedOut, format!("the QEMU of {name} does not answer"))
                    .because(error)
                    .hint(format!(
                        "try again when the host is less busy; `spinney kill {name}` cuts its power"
                    )));
            }
            Adopted::Gone => {}
        }
        let power = self.power_after(row);
        let row = self.catalog.write(|tx| {
            TargetRow::set_ended(tx, &target.id, power)?;
            TargetRow::by_id(tx, &target.id)
        })?;
        self.ends.ring();
        Ok(row)
    }

    /// Puts a machine's process where commands find it, and where its end is waited for.
    pub(crate) fn enlist(&self, target: &str, running: Arc<Running>) {
        self.running_map().insert(target.to_owned(), running);
        self.ends.ring();
    }

    /// A QEMU that has closed our monitor and lives (seen in 10.0, when a background-snapshot failed in its set-up) is connected to
    /// anew by whoever looks next.
    fn forget_deaf(&self, target: &str) {
        let running = self.running_map().get(target).filter(|running| running.qmp.is_closed()).cloned();
        let Some(deaf) = running.filter(|running| !running.process.wait(ENDING)) else { return };
        let mut map = self.running_map();
        if map.get(target).is_some_and(|now| Arc::ptr_eq(now, &deaf)) {
            tracing::warn!(target, "QEMU has closed its monitor");
            map.remove(target);
        }
    }

    /// How a process that is gone must have ended.
    pub(crate) fn power_after(&self, row: &ProcessRow) -> Power {
        if row.boot == boot_id() { power_after_end(&self.run_folder(&row.run)) } else { Power::LostPower }
    }

    /// A machine's power state at this moment, and its process if it has one. A process that is gone is noticed here.
    pub(crate) fn look(&self, target: &TargetRow) -> Result<(Power, Option<Arc<Running>>)> {
        let Some(running) = self.running_map().get(&target.id).cloned() else {
            return Ok((target.power, None));
        };
        if !running.process.is_alive() {
            let power = self.forget(target, &running)?;
            return Ok((power, None));
        }
        let state = running.qmp.execute_within("query-status", serde_json::json!({}), LOOK_LIMIT);
        let power = match state.as_ref().ok().and_then(|s| s.get("status")?.as_str()) {
            Some("running" | "finish-migrate") => Power::Running,
            Some(_) => Power::Paused,
            None if running.process.wait(ENDING) => self.forget(target, &running)?,
            None => target.power,
        };
        let process = running.process.is_alive().then_some(running);
        Ok((power, process))
    }

    /// Writes down that a machine's process has ended, and how.
    fn forget(&self, target: &TargetRow, running: &Arc<Running>) -> Result<Power> {
        let power = power_after_end(&running.run);
        let mut map = self.running_map();
        if map.get(&target.id).is_some_and(|now| Arc::ptr_eq(now, running)) {
            map.remove(&target.id);
            self.catalog.write(|tx| {
                // Unless a goto has just given the machine another process.
                if TargetRow::by_id(tx, &target.id)?.process.as_ref() == Some(&running.row) {
                    TargetRow::set_ended(tx, &target.id, power)?;
                }
                Ok(())
            })?;
            self.ends.ring();
            let _ = fs::remove_dir_all(&running.run.0);
        }
        Ok(power)
    }

    /// Ends the process of a machine that another one has taken the place of. At once: asked politely, QEMU would remove the
    /// sockets of its chardevs by their paths, and these may by now be the successor's.
    pub(crate) fn replace_process(&self, id: &str, running: &Running) {
        self.running_map().remove(id);
        running.process.kill();
        let _ = fs::remove_dir_all(&running.run.0);
    }

    /// Ends a machine's process: politely first, so that its images are closed, then for certain. The catalog is the
    /// caller's business.
    pub(crate) fn end_process(&self, id: &str, running: &Running) {
        // Out of the map first: whoever looks meanwhile must not take this for a power cut.
        self.running_map().remove(id);
        let quit = running.qmp.execute_within("quit", serde_json::json!({}), LOOK_LIMIT);
        if quit.is_err() || !running.process.wait(LOOK_LIMIT) {
            running.process.kill();
        }
        let _ = fs::remove_dir_all(&running.run.0);
    }
}

/// What QEMU is told of the CD drive, after a look at the disc.
fn cd_spec(name: &str, config: &MachineConfig) -> Result<Option<CdDrive>> {
    let Some(drive) = &config.cdrom else { return Ok(None) };
    let Some(image) = &drive.image else { return Ok(Some(CdDrive { image: None, direct: false })) };
    let image = existing_file("disc", image).map_err(|error| {
        error.hint(format!("put it back where it was, or `spinney set {name} --cdrom none` takes it out"))
    })?;
    let direct = takes_direct_io(&image);
    Ok(Some(CdDrive { image: Some(image), direct }))
}

/// Takes UEFI's variables out of the disks: they hang on the board.
fn uefi_spec(config: &MachineConfig, disks: &mut Vec<Disk>) -> Result<Option<Uefi>> {
    let (variables, others): (Vec<Disk>, Vec<Disk>) = disks.drain(..).partition(|disk| disk.id == UEFI_DISK);
    *disks = others;
    if config.firmware == Firmware::Bios {
        return Ok(None);
    }
    let missing = || Error::new(Code::Damaged, "the machine has no store for UEFI's variables");
    let variables = variables.into_iter().next().ok_or_else(missing)?.layers;
    Ok(Some(Uefi { code: uefi_files()?.code, variables }))
}

/// QEMU removes its pid file when it ends in order. That is also so when somebody ended it with a signal, which the guest had no
/// say in; then its log says so.
fn power_after_end(run: &RunFolder) -> Power {
    let by_signal = log_tail(run).contains("terminating on signal");
    if by_signal || run.pid_file().exists() { Power::LostPower } else { Power::Off }
}

/// The kernel's id of this boot of the host.
pub(crate) fn boot_id() -> String {
    if let Some(other) = crate::fault::boot() {
        return other;
    }
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn wait_for_monitor(process: &Process, run: &RunFolder) -> Result<Qmp, QmpError> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match Qmp::connect(&run.monitor(), false, Duration::from_millis(20)) {
            Ok(qmp) => return Ok(qmp),
            Err(error) if Instant::now() >= deadline || !process.is_alive() => return Err(error),
            Err(_) => {}
        }
    }
}

/// The last lines that QEMU wrote.
pub(crate) fn log_tail(run: &RunFolder) -> String {
    let text = read_of_others(&run.log());
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = lines.iter().rev().take(3).rev().copied().collect::<Vec<_>>();
    last.join("; ").chars().take(600).collect()
}

fn start_error(name: &str, config: &MachineConfig, error: QmpError, words: &str) -> Error {
    let failed = |code, message: String| {
        if words.is_empty() {
            Error::new(code, message).because(error)
        } else {
            Error::new(code, message).because(words.to_owned())
        }
    };
    if let Some(device) = not_migratable(words) {
        return failed(
            Code::Precondition,
            format!("{name} has a device that cannot be snapshotted: {device}"),
        )
        .hint(
            "leave the device out, or make the machine with --no-memory and take it off or with --disk-only",
        );
    }
    if words.contains("Failed to get") && words.contains("lock") {
        return failed(Code::Refused, format!("a disk of {name} is in use by another process")).in_the_way();
    }
    if words.contains("annot allocate memory") || words.contains("cannot set up guest memory") {
        return failed(Code::Precondition, format!("this host has not enough memory for {name}"))
            .in_the_way();
    }
    // A port, a device of the host's.
    let taken = ["ddress already in use", "Could not set up host forwarding rule", "resource busy"];
    if taken.iter().any(|taken| words.contains(taken)) {
        return failed(Code::Refused, format!("something of the host's that {name} needs is in use"))
            .in_the_way();
    }
    if words.contains("failed to find romfile") {
        return failed(Code::Precondition, format!("{name} has a card without a boot ROM"))
            .hint("install it (Debian: apt install ipxe-qemu), or do not boot from the network");
    }
    let error = failed(Code::Failed, format!("QEMU could not start {name}"));
    if words.to_lowercase().contains("kvm") {
        return error
            .hint("`spinney doctor` says whether KVM can be used here; the accelerator `tcg` does without");
    }
    match &config.kernel {
        _ if !config.qemu_args.is_empty() => error.hint("it has words of --qemu-arg: look there first"),
        Some(kernel) if words.contains("kernel") => error.hint(format!("its kernel is {}", kernel.display())),
        _ => error,
    }
}

/// `Device nvme is not migratable, but --only-migratable was specified`.
fn not_migratable(words: &str) -> Option<String> {
    let (before, _) = words.split_once(" is not migratable")?;
    let device = before.rsplit(['\'', ' ', ':']).find(|word| !word.is_empty())?;
    Some(device.to_owned())
}

fn check_socket_path(path: &Path) -> Result<()> {
    if path.as_os_str().len() <= SOCKET_PATH_LIMIT {
        return Ok(());
    }
    Err(Error::new(
        Code::Precondition,
        format!("the state folder's path is too long for a Unix socket: {}", path.display()),
    )
    .hint("choose a shorter one with --state or SPINNEY_STATE"))
}

/// Bytes of memory that the host can give without swapping; none if it does not say.
pub(crate) fn available_memory() -> Option<u64> {
    meminfo("MemAvailable:")
}

/// Sees to it that the host has this much memory to give, `coming` included: what a process has that ends first.
pub(crate) fn check_host_memory(bytes: u64, coming: u64) -> Result<()> {
    let Some(available) = available_memory() else { return Ok(()) };
    if bytes <= available.saturating_add(coming) {
        return Ok(());
    }
    Err(Error::new(
        Code::Precondition,
        format!(
            "the machine wants {} MiB of memory; this host has {} MiB left",
            bytes >> 20,
            available >> 20
        ),
    )
    .hint("end another machine first, or make this one with less --memory")
    .in_the_way())
}

/// What a QEMU takes beside its guest's memory, and then some.
const QEMU_ITSELF: u64 = 64 << 20;
/// The part of its memory, one in so many bytes, that a fork comes to write, for all we know.
const WRITTEN_PART: u64 = 4;

/// Sees to it that the host has memory for so many forks with so much each. If it is `mapped`, they share what they do not write to.
pub(crate) fn check_memory_for_forks(count: u32, bytes: u64, mapped: bool) -> Result<()> {
    let Some(available) = available_memory() else { return Ok(()) };
    let (own, how) = match mapped {
        true => (bytes / WRITTEN_PART, "a quarter of its memory, which it may come to write"),
        false => (bytes, "its memory"),
    };
    let each = QEMU_ITSELF.saturating_add(own);
    let room = available / each;
    if u64::from(count) <= room {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    Err(Error::new(
        Code::Precondition,
        format!(
            "{count} forks take {} MiB of memory, and this host has {} MiB left: room for {room}",
            mib(each.saturating_mul(count.into())),
            mib(available),
        ),
    )
    .because(format!("each takes {} MiB: {} for QEMU, and {how}, {}", mib(each), mib(QEMU_ITSELF), mib(own)))
    .hint("make fewer, or end other machines first"))
}

/// Sees to it that a machine with this much memory can be started on this host at all, whatever else runs there.
pub(crate) fn check_ever_fits(name: &str, bytes: u64) -> Result<()> {
    match meminfo("MemTotal:") {
        Some(total) if bytes > total => Err(Error::new(
            Code::Precondition,
            format!(
                "{name} with {} of memory could never start: this host has {} MiB",
                size(bytes),
                total >> 20
            ),
        )
        .hint("give it less --memory")),
        _ => Ok(()),
    }
}

/// A line of the kernel's, in bytes; none if it cannot be read, and then nothing is refused for it.
fn meminfo(line: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let rest = text.lines().find_map(|l| l.strip_prefix(line))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_that_cannot_be_migrated_is_named() {
        let words = "qemu-system-x86_64: -device nvme,serial=1: Device nvme is not migratable, but --only-migratable was specified";
        assert_eq!(not_migratable(words).as_deref(), Some("nvme"));
        let words = "qemu: State blocked by non-migratable device '0000:00:04.0/nvme'";
        assert_eq!(not_migratable(words), None);
    }
}
