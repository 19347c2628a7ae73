//! What the guest is asked about itself: identity, clock, random numbers, commands, going off.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

/// `count` bytes from the kernel's generator, in hex.
pub(crate) fn random(count: usize) -> io::Result<String> {
    let mut bytes = vec![0; count];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether the machine has a VM generation id (`absent` if not), and the kernel a driver for it.
pub(crate) fn genid() -> &'static str {
    // An ACPI driver until Linux 6.9, a platform driver since.
    let bound = ["/sys/bus/acpi/drivers/vmgenid", "/sys/bus/platform/drivers/vmgenid"]
        .iter()
        .any(|driver| names(driver).iter().any(|name| name.contains(':')));
    let there = names("/sys/bus/acpi/devices").iter().any(|name| {
        name.starts_with("QEMUVGID")
            || fs::read_to_string(format!("/sys/bus/acpi/devices/{name}/modalias"))
                .is_ok_and(|alias| alias.to_ascii_uppercase().contains("VM_GEN_COUNTER"))
    });
    match (bound, there) {
        (true, _) => "bound",
        (false, true) => "unbound",
        (false, false) => "absent",
    }
}

/// The network cards' interfaces and hardware addresses, `eth0/52:54:00:12:34:56`, with commas.
pub(crate) fn macs() -> String {
    let mut cards = names("/sys/class/net");
    cards.retain(|card| card != "lo");
    cards.sort();
    let with_address = cards.iter().filter_map(|card| {
        // A card may be pulled while it is looked at.
        let address = fs::read_to_string(format!("/sys/class/net/{card}/address")).ok()?;
        Some(format!("{card}/{}", address.trim()))
    });
    with_address.collect::<Vec<_>>().join(",")
}

/// The machine's UUID, as the firmware's tables have it.
pub(crate) fn uuid() -> io::Result<String> {
    Ok(fs::read_to_string("/sys/class/dmi/id/product_uuid")?.trim().to_owned())
}

/// The host name, `(none)` if nobody set one.
pub(crate) fn hostname() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned())
}

/// The wall clock, in nanoseconds since 1970.
pub(crate) fn unix_nanoseconds() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}

/// The kernel's release.
pub(crate) fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// The memory that the kernel manages, in KiB.
pub(crate) fn memory_kib() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

/// Runs a shell command; its exit status (128 and the signal's number if one ended it) and what it
/// wrote to both outputs.
pub(crate) fn run(command: &str) -> io::Result<(i32, Vec<u8>)> {
    use std::os::unix::process::ExitStatusExt;
    let wrapped = format!("exec 2>&1\n{command}");
    let output = Command::new("sh").arg("-c").arg(wrapped).stdin(Stdio::null()).output()?;
    let status = output.status;
    Ok((status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)), output.stdout))
}

/// Writes everything back and switches the machine off.
pub(crate) fn power_off() {
    // When the disk is still in use it is at least made read-only.
    for command in
        ["sync", "umount /data 2>/dev/null || mount -o remount,ro /data 2>/dev/null", "poweroff -f"]
    {
        if let Err(error) = run(command) {
            eprintln!("workload: {command}: {error}");
        }
    }
}

/// Calls `pressed` when the power button is pressed (ACPI).
pub(crate) fn watch_power_button(pressed: impl Fn() + Clone + Send + 'static) {
    for name in names("/dev/input").into_iter().filter(|name| name.starts_with("event")) {
        let pressed = pressed.clone();
        thread::spawn(move || {
            let Ok(mut device) = File::open(Path::new("/dev/input").join(name)) else { return };
            // An input_event of 64-bit Linux: two words of time, u16 type, u16 code, i32 value.
            let mut event = [0; 24];
            while device.read_exact(&mut event).is_ok() {
                // EV_KEY, KEY_POWER (116), pressed.
                if event.ends_with(&[1, 0, 116, 0, 1, 0, 0, 0]) {
                    pressed();
                }
            }
        });
    }
}

fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
