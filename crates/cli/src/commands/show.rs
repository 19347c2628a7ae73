//! `show`: all that is known of a machine or a snapshot.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::{DiskSource, Machine, MachineConfig, Mode, Snapshot};

use crate::draw::power;
use crate::output::{Style, bytes, plain, span};
use crate::session::Session;
use crate::{address, complete};

/// Show all that is known of a machine or a snapshot
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  spinney show web\n  spinney show web@base\n  spinney show web@    the parent of here"
)]
pub(crate) struct Args {
    /// Machine or snapshot
    #[arg(add = ArgValueCompleter::new(complete::addresses))]
    address: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let path = address::resource(&args.address)?;
    if address::is_snapshot(&args.address) {
        let snapshot: Snapshot = session.get(&path)?;
        if session.out.json {
            session.out.document("spinney.snapshot/1", &snapshot);
        } else {
            page(session, &of_snapshot(&snapshot));
        }
    } else {
        let machine: Machine = session.get(&path)?;
        if session.out.json {
            session.out.document("spinney.machine/1", &machine);
        } else {
            page(session, &of_machine(&machine));
        }
    }
    Ok(())
}

type Rows = Vec<(&'static str, String)>;

fn page(session: &Session, rows: &Rows) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in rows {
        let name = session.out.paint(Style::Dim, format_args!("{name:<width$}"));
        session.out.line(format_args!("{name}  {value}"));
    }
}

fn of_machine(m: &Machine) -> Rows {
    let mut rows =
        vec![("machine", m.name.clone()), ("id", m.id.clone()), ("state", power(m.power).to_owned())];
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add("busy", m.busy.clone());
    add("here is on", m.parent.as_ref().map(|name| format!("{}@{name}", m.name)));
    add("snapshots", Some(m.snapshots.to_string()));
    add("protected", m.protected.then(|| "yes".to_owned()));
    add("group", Some(m.group.clone()));
    add("created", Some(m.created.to_string()));
    add("process", m.pid.map(|pid| pid.to_string()));
    add("QEMU", m.qemu.clone());
    add("accelerator", m.accel.clone());
    add("console", m.console.as_ref().map(|path| path.display().to_string()));
    add("UUID", Some(m.uuid.clone()));
    add("MAC", (!m.macs.is_empty()).then(|| m.macs.join(", ")));
    rows.extend(of_config(&m.config));
    rows
}

fn of_snapshot(s: &Snapshot) -> Rows {
    let mut rows = vec![("snapshot", format!("{}@{}", s.target, s.name)), ("id", s.id.clone())];
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add(
        "note",
        (!s.note.is_empty()).then(|| s.note.lines().map(plain).collect::<Vec<_>>().join("\n            ")),
    );
    add("taken", Some(s.created.to_string()));
    add("state", Some(power(s.power).to_owned()));
    add("parent", s.parent.as_ref().map(|id| format!("id:{id}")));
    add("kind", s.undo_point.then(|| "undo point".to_owned()));
    add("protected", s.protected.then(|| "yes".to_owned()));
    add("kept", s.keep.then(|| "yes: nothing but rm removes it".to_owned()));
    add("taken by", Some(mode(s.mode).to_owned()));
    add("pause", s.pause_us.map(span));
    add("durable in", Some(span(s.took_us)));
    add("memory held", (s.memory_bytes > 0).then(|| bytes(s.memory_bytes)));
    add("stored", Some(bytes(s.stored_bytes)));
    add(
        "memory saved",
        (s.memory_bytes > 0)
            .then(|| super::du::saved([s.saved.zero, s.saved.same, s.saved.earlier, s.saved.new])),
    );
    add("disk layers", Some(s.depth.to_string()));
    rows.extend(of_config(&s.config));
    rows
}

fn of_config(c: &MachineConfig) -> Rows {
    let mut rows = vec![("memory", bytes(c.memory)), ("CPUs", c.cpus.to_string())];
    for disk in &c.disks {
        let text = match disk {
            DiskSource::File(path) => format!("over {}", path.display()),
            DiskSource::Size(size) => format!("{}, empty at first", bytes(*size)),
        };
        rows.push(("disk", text));
    }
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add("kernel", c.kernel.as_ref().map(|path| path.display().to_string()));
    add("initrd", c.initrd.as_ref().map(|path| path.display().to_string()));
    add("append", c.append.clone());
    add("network", (!c.networks.is_empty()).then(|| c.networks.join(", ")));
    add("memory in snapshots", (!c.memory_snapshots).then(|| "no".to_owned()));
    add("QEMU arguments", (!c.qemu_args.is_empty()).then(|| c.qemu_args.join(" ")));
    rows
}

/// A mode as people type it.
pub(super) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::StopCopy => "stop-copy",
        Mode::PreCopy => "pre-copy",
        Mode::Off => "off: disks only",
        Mode::DiskOnly => "disk-only",
    }
}
