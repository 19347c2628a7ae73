//! `show`: all that is known of a machine or a snapshot.

use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use server::Problem;
use server::client::Client;
use server::snapshots::{
    Boot, CdDrive, DiskSource, Display, Firmware, Forward, Machine, MachineConfig, Mode, OnPowerOff,
    Snapshot, SnapshotState,
};

use crate::draw::{power, state};
use crate::output::{Style, ago, bytes, left, plain, room, span, wrap};
use crate::session::Session;
use crate::{address, complete};

/// Show all that is known of a machine or a snapshot
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  spinney show web\n  spinney show web@base\n  spinney show web@    the parent of here"
)]
pub(crate) struct Args {
    /// Machine or snapshot
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let path = address::resource(&args.address)?;
    if address::is_snapshot(&args.address) {
        let client = session.client()?;
        let snapshot: Snapshot = client.get(&path)?;
        if session.out.json {
            session.document("spinney.snapshot/1", &snapshot);
        } else {
            page(session, &of_snapshot(&snapshot, parent(&client, &snapshot)));
        }
    } else {
        let machine: Machine = session.get(&path)?;
        if session.out.json {
            session.document("spinney.machine/1", &machine);
        } else {
            page(session, &of_machine(&machine));
        }
    }
    Ok(())
}

/// The group of whoever names none, which is not worth a word.
pub(super) const DEFAULT_GROUP: &str = "default";

pub(super) type Rows = Vec<(&'static str, String)>;

pub(super) fn page(session: &Session, rows: &Rows) {
    // Prose is broken between words; what somebody may want to copy is left to the terminal.
    const PROSE: [&str; 4] = ["note", "memory found", "as it was", "powered off"];
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (mut name, value) in rows.iter().map(|(name, value)| (*name, value)) {
        let lines = match session.out.width {
            Some(fit) if PROSE.contains(&name) => {
                value.lines().flat_map(|line| wrap(line, room(fit, width + 2))).collect()
            }
            _ => value.lines().map(str::to_owned).collect::<Vec<_>>(),
        };
        for line in lines {
            let painted = session.out.paint(Style::Dim, format_args!("{name:<width$}"));
            session.out.line(format_args!("{painted}  {line}").to_string().trim_end());
            name = "";
        }
    }
}

/// Address of the snapshot above; by id should it have gone meanwhile.
fn parent(client: &Client, snapshot: &Snapshot) -> Option<String> {
    let by_id = format!("{}@id:{}", snapshot.target, snapshot.parent.as_ref()?);
    let above = address::resource(&by_id).and_then(|path| client.get::<Snapshot>(&path));
    Some(above.map_or(by_id, |above| format!("{}@{}", above.target, above.name)))
}

fn of_machine(m: &Machine) -> Rows {
    let mut rows =
        vec![("machine", m.name.clone()), ("id", m.id.clone()), ("state", power(m.power).to_owned())];
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add(
        "because",
        m.stopped_because.as_ref().map(|why| format!("{why}; it goes on by itself when there is some")),
    );
    add(
        "held",
        m.held_because.as_ref().map(|why| {
            format!(
                "{why}; it goes on when `spinney fsck --repair` has mended it, `spinney kill {}` ends it",
                m.name
            )
        }),
    );
    add("powered off", m.left_at_power_off.as_ref().map(|why| format!("left as it is: {why}")));
    add("busy", m.busy.clone());
    let back = m.brought_back_by.as_ref();
    add(
        "as it was",
        back.map(|point| format!("`spinney goto {point}` brings it back: a goto ended it and could not")),
    );
    add("here is on", m.parent.as_ref().map(|name| format!("{}@{name}", m.name)));
    add("snapshots", Some(m.snapshots.to_string()));
    add("kind", m.throw_away.then(|| "throw-away: gone when it stops".to_owned()));
    add("protected", m.protected.then(|| "yes: rm refuses, and `start` starts a throw-away fork".to_owned()));
    add("group", Some(m.group.clone()));
    add("unusable", m.group_problem.as_ref().map(|why| format!("its group cannot be used: {why}")));
    add("created", Some(moment(Timestamp::now(), m.created)));
    add("process", m.pid.map(|pid| pid.to_string()));
    add("QEMU", m.qemu.clone());
    add("accelerator", m.accel.clone());
    add("screen (VNC)", m.vnc.as_ref().map(|path| format!("unix:{}", path.display())));
    add("console", m.console.as_ref().map(|path| path.display().to_string()));
    add("UUID", Some(m.uuid.clone()));
    add("MAC", (!m.macs.is_empty()).then(|| m.macs.join(", ")));
    rows.extend(of_config(&m.config));
    rows
}

fn of_snapshot(s: &Snapshot, parent: Option<String>) -> Rows {
    let mut rows = vec![("snapshot", format!("{}@{}", s.target, s.name)), ("id", s.id.clone())];
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add("note", (!s.note.is_empty()).then(|| s.note.lines().map(plain).collect::<Vec<_>>().join("\n")));
    add("taken", Some(moment(Timestamp::now(), s.created)));
    add("state", Some(state(s).to_owned()));
    add("saving", (s.state == SnapshotState::Saving).then(|| "yes: it is on its way to the disk".to_owned()));
    add("damaged", (s.state == SnapshotState::Damaged).then(|| "yes: `spinney fsck` says what".to_owned()));
    add("parent", parent);
    add("kind", s.undo_point.then(|| "undo point".to_owned()));
    add("protected", s.protected.then(|| "yes".to_owned()));
    add("expires", s.expires.map(|then| expiry(Timestamp::now(), then, s.protected)));
    add("kept", s.keep.then(|| "yes: nothing but rm removes it".to_owned()));
    add("taken by", Some(mode(s.mode).to_owned()));
    add("pause", s.pause_us.map(span));
    add("durable in", Some(span(s.took_us)));
    add("memory held", (s.memory_bytes > 0).then(|| bytes(s.memory_bytes)));
    add("stored", Some(bytes(s.stored_bytes)));
    add("memory", (s.memory_bytes > 0).then(|| super::du::saved(&s.saved)));
    add("disk layers", Some(s.depth.to_string()));
    add(
        "disks written",
        (s.disk_bytes > 0).then(|| format!("{} since the snapshot before", bytes(s.disk_bytes))),
    );
    rows.extend(of_config(&s.config));
    rows
}

fn of_config(c: &MachineConfig) -> Rows {
    let mut rows = vec![("memory", bytes(c.memory)), ("CPUs", c.cpus.to_string())];
    for disk in &c.disks {
        let text = match &disk.source {
            DiskSource::File(path) if disk.read_only => format!("{}, read-only", path.display()),
            DiskSource::File(path) => format!("over {}", path.display()),
            DiskSource::Size(size) => format!("{}, empty at first", bytes(*size)),
        };
        rows.push(("disk", format!("{}: {text}", disk.id)));
    }
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    let disc =
        |drive: &CdDrive| drive.image.as_ref().map_or("empty".into(), |path| path.display().to_string());
    add("CD drive", c.cdrom.as_ref().map(disc));
    add("firmware", (c.firmware == Firmware::Uefi).then(|| "UEFI".to_owned()));
    add("boots first from", c.boot.map(|boot| boot_word(boot).to_owned()));
    add("kernel", c.kernel.as_ref().map(|path| path.display().to_string()));
    add("initrd", c.initrd.as_ref().map(|path| path.display().to_string()));
    add("append", c.append.clone());
    add("network", (!c.networks.is_empty()).then(|| c.networks.join(", ")));
    add("forwards", (!c.forwards.is_empty()).then(|| lines(&c.forwards)));
    add("display", (c.display == Display::Vnc).then(|| "VNC".to_owned()));
    add("autostart", c.autostart.then(|| "yes".to_owned()));
    add(
        "at power-off",
        (c.on_poweroff != OnPowerOff::Nothing).then(|| at_power_off(c.on_poweroff).to_owned()),
    );
    add("memory in snapshots", (!c.memory_snapshots).then(|| "no".to_owned()));
    add("QEMU arguments", (!c.qemu_args.is_empty()).then(|| c.qemu_args.join(" ")));
    rows
}

/// What is done at power-off, by the word that people type.
fn at_power_off(what: OnPowerOff) -> &'static str {
    match what {
        OnPowerOff::Nothing => "nothing",
        OnPowerOff::Back => "back: it goes back to the snapshot that it comes from",
        OnPowerOff::Take => "take: a snapshot of it is taken",
        OnPowerOff::Ask => "ask: `spinney stop` and `spinney kill` ask on a terminal",
    }
}

/// Where firmware looks first, as people type it.
fn boot_word(boot: Boot) -> &'static str {
    match boot {
        Boot::Cd => "cd",
        Boot::Disk => "disk",
        Boot::Net => "net",
    }
}

fn lines(forwards: &[Forward]) -> String {
    forwards.iter().map(Forward::to_string).collect::<Vec<_>>().join("\n")
}

/// `2026-03-01 09:30:00 UTC (2 h ago)`
pub(super) fn moment(now: Timestamp, then: Timestamp) -> String {
    format!("{} ({})", then.strftime("%Y-%m-%d %H:%M:%S UTC"), ago(now, then))
}

/// `2026-03-08 09:30:00 UTC (in 7 d)`
fn expiry(now: Timestamp, then: Timestamp, protected: bool) -> String {
    let left = left(now, then).map_or_else(|| "now".to_owned(), |left| format!("in {left}"));
    let but = if protected { ", but not while it is protected" } else { "" };
    format!("{} ({left}{but})", then.strftime("%Y-%m-%d %H:%M:%S UTC"))
}

/// A mode as people type it.
pub(super) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::StopCopy => "stop-copy",
        Mode::PreCopy => "pre-copy",
        Mode::Live => "live",
        Mode::Off => "off: disks only",
        Mode::Suspended => "suspended: its memory was kept already",
        Mode::DiskOnly => "disk-only",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_said_twice() {
        let then = Timestamp::from_second(1_800_000_000).unwrap();
        let now = Timestamp::from_second(1_800_007_200).unwrap();
        assert_eq!(moment(now, then), "2027-01-15 08:00:00 UTC (2 h ago)");
        assert_eq!(expiry(then, now, false), "2027-01-15 10:00:00 UTC (in 2 h)");
        assert_eq!(expiry(now, then, true), "2027-01-15 08:00:00 UTC (now, but not while it is protected)");
    }
}
