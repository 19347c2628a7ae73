//! `doctor`: what this host has of what Spinney needs.

use std::fs;

use qemu::accel::{self, Accel};
use qemu::binary::{Qemu, Version};
use qemu::image::QemuImg;

use crate::engine::{Engine, Settings};
use crate::types::{Check, CheckLevel};

/// Free space below which a take of a middling machine may not fit.
const ROOM: u64 = 4 << 30;

impl Engine {
    /// Looks at the host. Works without a state folder, and changes nothing.
    pub fn doctor(settings: &Settings) -> Vec<Check> {
        let mut checks = Vec::new();
        match Qemu::find(settings.qemu.as_deref()) {
            Ok(qemu) => {
                checks.push(qemu_check(&qemu));
                checks.push(accel_check(settings, &qemu));
            }
            Err(error) => checks.push(check(
                "QEMU",
                CheckLevel::Missing,
                error.to_string(),
                Some("install it (Debian: apt install qemu-system-x86)"),
            )),
        }
        checks.push(match QemuImg::find(settings.qemu_img.as_deref(), settings.qemu.as_deref()) {
            Ok(_) => check("qemu-img", CheckLevel::Good, "found".into(), None),
            Err(error) => check(
                "qemu-img",
                CheckLevel::Missing,
                error.to_string(),
                Some("install it (Debian: apt install qemu-utils)"),
            ),
        });
        checks.push(live_check());
        checks.push(view_check());
        checks.push(state_check(settings));
        checks
    }
}

fn check(name: &str, level: CheckLevel, found: String, hint: Option<&str>) -> Check {
    Check { name: name.into(), level, found, hint: hint.map(str::to_owned) }
}

/// What QEMU's background-snapshot needs of the host: to write-protect memory, and to hear of what the kernel itself writes.
fn live_check() -> Check {
    let allowed =
        fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|text| text.trim() == "1");
    let device = fs::File::options().read(true).write(true).open("/dev/userfaultfd").is_ok();
    if allowed || device || rustix::process::geteuid().is_root() {
        return check("live takes", CheckLevel::Good, "userfaultfd may be used".into(), None);
    }
    let hint = "allow it for your group: `chgrp kvm /dev/userfaultfd; chmod 660 /dev/userfaultfd` (kernel 6.1, QEMU 8.0), or sysctl \
                vm.unprivileged_userfaultfd=1; without it machines are taken by pre-copy";
    check("live takes", CheckLevel::Limited, "userfaultfd is not allowed for this user".into(), Some(hint))
}

/// What it takes that a machine comes back before its memory is loaded.
fn view_check() -> Check {
    match snapfs::mount::supported() {
        Ok(()) => check("instant restore", CheckLevel::Good, "snapshots can be mapped (FUSE)".into(), None),
        Err(lacks) => check(
            "instant restore",
            CheckLevel::Limited,
            lacks.to_string(),
            Some(
                "without it memory is loaded before a machine goes on, and disks are at most 200 layers deep",
            ),
        ),
    }
}

fn qemu_check(qemu: &Qemu) -> Check {
    let found = format!("{} ({}), new machines are {}", qemu.version, qemu.path.display(), qemu.machine);
    if qemu.version >= Version::at(8, 1) {
        return check("QEMU", CheckLevel::Good, found, None);
    }
    let hint = "8.1 and later also take a paused machine without letting it run for an instant";
    check("QEMU", CheckLevel::Limited, found, Some(hint))
}

fn accel_check(settings: &Settings, qemu: &Qemu) -> Check {
    let wanted = settings.accel.as_deref();
    match wanted.map(|word| (word, Accel::parse(word))) {
        Some((word, None)) => {
            let found = format!("{word:?}, as configured, is not an accelerator");
            return check(
                "accelerator",
                CheckLevel::Missing,
                found,
                Some("write kvm or tcg, or leave it out"),
            );
        }
        Some((_, Some(Accel::Tcg))) => {
            return check("accelerator", CheckLevel::Good, "tcg (emulation), as configured".into(), None);
        }
        Some((_, Some(Accel::Kvm))) | None => {}
    }
    match accel::probe(qemu) {
        (Accel::Tcg, why) if wanted.is_some() => check(
            "accelerator",
            CheckLevel::Missing,
            format!("kvm, as configured, cannot be used: {why}"),
            Some("leave it out, or write tcg"),
        ),
        (Accel::Kvm, why) => check("accelerator", CheckLevel::Good, format!("kvm: {why}"), None),
        (Accel::Tcg, why) => check(
            "accelerator",
            CheckLevel::Limited,
            format!("tcg (emulation): {why}"),
            Some(
                "guests run several times slower; KVM takes virtualization (the firmware's setting, or nesting on the host of this one) and \
                  access to /dev/kvm (group kvm)",
            ),
        ),
    }
}

fn state_check(settings: &Settings) -> Check {
    // The folder may not be there yet: the nearest one above it tells the file system.
    let existing = settings.state.ancestors().find(|p| p.is_dir());
    let Some(folder) = existing else {
        return check("state folder", CheckLevel::Missing, settings.state.display().to_string(), None);
    };
    let shown = settings.state.display();
    let Ok(space) = rustix::fs::statvfs(folder) else {
        return check("state folder", CheckLevel::Limited, format!("{shown}: cannot be looked at"), None);
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let kind = file_system(folder);
    let found = format!("{shown} on {kind}, {} MiB free", free >> 20);
    if free < ROOM {
        return check(
            "state folder",
            CheckLevel::Limited,
            found,
            Some("a snapshot needs up to the machine's memory"),
        );
    }
    if kind == "tmpfs" {
        return check(
            "state folder",
            CheckLevel::Limited,
            found,
            Some("it is gone after a restart of the host"),
        );
    }
    check("state folder", CheckLevel::Good, found, None)
}

fn file_system(folder: &std::path::Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let best = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            Some((words.next()?, words.next()?))
        })
        .filter(|(point, _)| folder.starts_with(point))
        .max_by_key(|(point, _)| point.len());
    best.map_or("an unknown file system", |(_, kind)| kind).to_owned()
}
