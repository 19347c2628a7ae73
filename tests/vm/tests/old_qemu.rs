//! A short walk on QEMU 7.2, the oldest that is supported.

use vm_tests::harness::{Spinney, cache};
use vm_tests::walk::{Card, NAME, Walk};

#[test]
fn a_short_walk_on_the_oldest_qemu() {
    let program = cache().join("qemu-7.2/qemu-system-x86_64");
    if !program.is_file() {
        let system = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        let debian_12 = system.contains("ID=debian") && system.contains("VERSION_ID=\"12\"");
        assert!(!debian_12, "{} is missing: `make old-qemu` brings it", program.display());
        println!("skipped: no QEMU 7.2 on this system");
        return;
    }
    let spinney = Spinney::with(&[("SPINNEY_QEMU", &program.display().to_string())]);
    let mut walk = Walk::begin(spinney, 72, 32).unwrap();
    let machine = walk.spinney.ok(&format!("show {NAME}")).unwrap();
    assert!(machine["qemu"].as_str().is_some_and(|version| version.starts_with("7.2")), "{machine}");
    let cards = [
        Card::LogStep,
        Card::TakeStopCopy,
        Card::Writer,
        Card::LogRate,
        Card::TakePreCopy,
        Card::Mutate,
        Card::TakeLive,
        Card::Back,
        Card::TakePaused,
        Card::Goto(""),
        Card::Back,
        Card::Branch,
        Card::KillDaemon,
        Card::Goto(" --running"),
    ];
    let result = cards.into_iter().try_for_each(|card| walk.play(card)).and_then(|()| walk.end());
    println!("{}", walk.history.join("\n"));
    result.unwrap();
}
