//! What `stop` and `kill` say: that the machine is off, and what was done with it then; and the question, where somebody is to be asked.

use server::Problem;
use server::api::PowerOffRequest;
use server::client::{Client, Method};
use server::snapshots::{Machine, OnPowerOff, OpState, Operation, Power, PoweredOff};

use crate::session::Session;

/// Says what became of a machine that was powered off, after asking what that is to be if its settings say so and there is somebody to
/// ask. `place` is the machine's.
pub(super) fn tell(session: &Session, client: &Client, place: &str, off: PoweredOff) -> Result<(), Problem> {
    let asks = off.machine.config.on_poweroff == OnPowerOff::Ask && off.machine.left_at_power_off.is_some();
    let off = match asks.then(|| session.ask(&question(&off.machine))).flatten() {
        None => off,
        Some(answer) => {
            let body = PowerOffRequest { then: meant(&answer) };
            session.operate(client, Method::POST, &format!("{place}/power-off"), Some(&body))?
        }
    };
    if session.out.json {
        session.document("spinney.machine/1", &off);
        return Ok(());
    }
    session.out.line(line(&off));
    if let Some(done) = off.then.filter(|then| then.undoable) {
        session.out.note(format_args!("`spinney undo {}` takes that back", done.id));
    }
    Ok(())
}

fn question(machine: &Machine) -> String {
    let name = &machine.name;
    match &machine.parent {
        Some(parent) => {
            format!(
                "{name} is off. Leave it as it is, go back to {name}@{parent}, or take a snapshot? [L/b/t] "
            )
        }
        None => format!("{name} is off. Leave it as it is, or take a snapshot? [L/t] "),
    }
}

/// Whatever is not understood changes nothing.
fn meant(answer: &str) -> OnPowerOff {
    match answer.to_lowercase().as_str() {
        "b" | "back" => OnPowerOff::Back,
        "t" | "take" => OnPowerOff::Take,
        _ => OnPowerOff::Nothing,
    }
}

fn line(off: &PoweredOff) -> String {
    let name = &off.machine.name;
    let done = off.then.as_ref().filter(|then| then.state == OpState::Done);
    let snapshot = |then: &Operation| then.subject.clone();
    match (done, off.machine.power) {
        (Some(then), Power::Suspended) => {
            format!("{name} was powered off and is back at {}, suspended", snapshot(then))
        }
        (Some(then), _) if then.kind.ends_with("goto") => {
            format!("{name} is off, back at {}", snapshot(then))
        }
        (Some(then), _) if then.kind == "throw away" => format!("{name} has stopped, and is gone"),
        (Some(then), _) => format!("{name} is off, and {} was taken of it", snapshot(then)),
        (None, _) => format!("{name} is off"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off(power: &str, kind: Option<&str>, state: &str) -> PoweredOff {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let config = serde_json::json!({ "memory": 1, "cpus": 1, "disks": [], "kernel": null, "initrd": null,
            "append": null, "networks": [], "memory_snapshots": true, "qemu_args": [] });
        let then = kind.map(|kind| {
            serde_json::json!({ "id": "3f2a", "kind": kind, "subject": "web@base", "state": state, "started": now,
                "ended": null, "error": null, "undoable": true })
        });
        let off = serde_json::json!({ "id": "0", "name": "web", "power": power, "stopped_because": null,
            "group": "default", "config": config, "uuid": "0", "macs": [], "parent": "base", "snapshots": 1,
            "protected": false, "created": now, "pid": null, "console": null, "vnc": null, "busy": null,
            "accel": null, "qemu": null, "then": then });
        serde_json::from_value(off).unwrap()
    }

    #[test]
    fn what_was_done_is_told() {
        let (goto, take) = (Some("power-off goto"), Some("power-off take"));
        let said = [
            off("off", None, ""),
            off("suspended", goto, "done"),
            off("off", goto, "done"),
            off("off", take, "done"),
            off("off", goto, "failed"),
        ];
        assert_eq!(
            said.each_ref().map(line),
            [
                "web is off",
                "web was powered off and is back at web@base, suspended",
                "web is off, back at web@base",
                "web is off, and web@base was taken of it",
                "web is off",
            ]
        );
    }

    #[test]
    fn only_a_clear_answer_changes_anything() {
        for (answer, means) in [
            ("", OnPowerOff::Nothing),
            ("l", OnPowerOff::Nothing),
            ("yes", OnPowerOff::Nothing),
            ("B", OnPowerOff::Back),
            ("back", OnPowerOff::Back),
            ("t", OnPowerOff::Take),
        ] {
            assert_eq!(meant(answer), means, "{answer:?}");
        }
        let machine = off("off", None, "").machine;
        assert!(question(&machine).contains("web@base"));
        assert!(!question(&Machine { parent: None, ..machine }).contains("back"));
    }
}
