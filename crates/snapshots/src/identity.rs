//! What becomes of a copy's identity: what a running guest takes itself for changes only as far as it can be told.
//!
//! | part | how it becomes new |
//! |---|---|
//! | VM generation id | always: QEMU tells the guest, whose kernel draws new random numbers if it has the driver |
//! | MAC address | the card is taken out and another put in |
//! | UUID | with the next power cycle |
//! | clock, host name | through the guest agent |

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use qemu::command::{Card, replaced_card};
use qemu::guest_agent::GuestAgent;
use qemu::qmp::Event;
use serde_json::json;

use crate::catalog::TargetRow;
use crate::error::Result;
use crate::fault::{Fault, planted};
use crate::id::random_number;
use crate::running::Running;
use crate::types::{Identity, IdentityItem, ItemState};

/// How long a guest agent may take to answer. One that is there takes some milliseconds; an emulated guest on a busy host more.
const AGENT_LIMIT: Duration = Duration::from_millis(1500);
/// How long QEMU may take to say that a guest that was loaded has its port open.
const PORT_LIMIT: Duration = Duration::from_millis(100);
/// How long a guest may take to let go of a card.
const CARD_LIMIT: Duration = Duration::from_secs(3);
/// How often it is seen whether a guest that has not done so yet is still there.
const LATE_LIMIT: Duration = Duration::from_secs(10);
/// Exits with 0 if the guest's kernel has the driver of the generation id.
const HAS_DRIVER: &str = "test -e /sys/bus/acpi/drivers/vmgenid -o -e /sys/bus/platform/drivers/vmgenid";

fn item(what: &str, state: ItemState, why: Option<&str>) -> IdentityItem {
    IdentityItem { what: what.to_owned(), state, why: why.map(str::to_owned) }
}

/// Makes new what is to be new of a copy that runs, and says what became of each part. `booted`: it was not copied with its memory.
pub(crate) fn renew(
    row: &TargetRow,
    running: &Arc<Running>,
    identity: Identity,
    booted: bool,
) -> Vec<IdentityItem> {
    if booted {
        let all = ["VM generation id", "random numbers", "MAC address", "UUID", "clock"];
        return all.map(|what| item(what, ItemState::Renewed, None)).to_vec();
    }
    let mut items = vec![item("VM generation id", ItemState::Renewed, None)];
    let mut agent = row.config.guest_agent.then(|| connect(row, running)).flatten();
    items.push(random_numbers(agent.as_mut()));
    if !row.macs.is_empty() {
        items.push(mac_address(row, running, identity));
    }
    if identity == Identity::Keep {
        items.push(item("UUID", ItemState::Kept, None));
        return items;
    }
    items.push(item("UUID", ItemState::Pending, Some("from its next power cycle on")));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    items.push(told("clock", agent.as_mut().map(|agent| agent.set_time(now))));
    if identity == Identity::Renew {
        items.push(told("host name", agent.as_mut().map(|agent| name_host(agent, &row.name))));
    }
    items
}

fn connect(row: &TargetRow, running: &Running) -> Option<GuestAgent> {
    if !listens(running) {
        return None;
    }
    let number = u32::try_from(random_number() >> 33).unwrap_or_default();
    let agent = GuestAgent::connect(&running.run.agent(), number, AGENT_LIMIT);
    agent.inspect_err(|error| tracing::info!(target = row.name, %error, "no guest agent")).ok()
}

/// True if something in the guest has the agent's port open.
fn listens(running: &Running) -> bool {
    let deadline = Instant::now() + PORT_LIMIT;
    loop {
        let devices = running.qmp.execute("query-chardev", json!({})).unwrap_or_default();
        let mut devices = devices.as_array().into_iter().flatten();
        let port = devices.find(|device| device.get("label").is_some_and(|label| label == "agent0"));
        if port.is_some_and(|port| port.get("frontend-open") == Some(&true.into())) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// What became of something that the guest agent was told.
fn told(what: &str, done: Option<io::Result<()>>) -> IdentityItem {
    match done {
        Some(Ok(())) => item(what, ItemState::Renewed, None),
        Some(Err(error)) => item(what, ItemState::Impossible, Some(&error.to_string())),
        None => item(what, ItemState::Impossible, Some("no guest agent answers")),
    }
}

/// A machine's name has no character that a shell would care about.
fn name_host(agent: &mut GuestAgent, name: &str) -> io::Result<()> {
    let words = format!("hostname {name} && if [ -e /etc/hostname ]; then echo {name} > /etc/hostname; fi");
    match agent.shell(&words)? {
        0 => Ok(()),
        code => Err(io::Error::other(format!("the guest's shell ended with {code}"))),
    }
}

/// Whether the guest's kernel hears of the new generation id, and so draws other random numbers than its copies.
fn random_numbers(agent: Option<&mut GuestAgent>) -> IdentityItem {
    let what = "random numbers";
    match agent.map(|agent| agent.shell(HAS_DRIVER)) {
        Some(Ok(0)) => item(what, ItemState::Renewed, None),
        Some(Ok(_)) => {
            let why = "its kernel does not know the VM generation id: they are the same in every fork";
            item(what, ItemState::Impossible, Some(why))
        }
        Some(Err(_)) | None => {
            let why = "nobody in the guest says whether its kernel knows the VM generation id; if it does not, they are the same \
                       in every fork";
            item(what, ItemState::Pending, Some(why))
        }
    }
}

fn mac_address(row: &TargetRow, running: &Arc<Running>, identity: Identity) -> IdentityItem {
    let what = "MAC address";
    if identity != Identity::Renew {
        let why = (identity == Identity::Isolate).then_some("each is on a network of its own");
        return item(what, ItemState::Kept, why);
    }
    match replace_cards(row, running) {
        Ok(()) => item(what, ItemState::Renewed, None),
        Err(error) => {
            tracing::info!(target = row.name, %error, causes = ?error.causes(), "a card stays");
            let why = "the guest has not let go of its card yet: as soon as it does, or from its next power cycle on";
            item(what, ItemState::Pending, Some(why))
        }
    }
}

/// Puts other cards in the place of those that are there. What a guest lets go of later is replaced then.
fn replace_cards(row: &TargetRow, running: &Arc<Running>) -> Result<()> {
    let limit = if planted(Fault::HastyCard) { Duration::ZERO } else { CARD_LIMIT };
    let mut replaced = Ok(());
    for (index, mac) in row.macs.iter().enumerate() {
        let card = Card { id: card_id(index), mac: mac.clone() };
        let mark = running.qmp.last_event();
        running.qmp.execute("device_del", json!({ "id": card.id }))?;
        let gone = running.qmp.wait_event(mark, limit, |event| is_gone(event, &card));
        match gone {
            Ok(_) => drop(running.qmp.execute("device_add", replaced_card(index, &card))?),
            Err(error) => {
                replaced = Err(error.into());
                replace_late(running, index, card, mark);
            }
        }
    }
    replaced
}

/// Waits in a thread of its own, for as long as the guest runs, until it lets go of a card: without another it would have none.
fn replace_late(running: &Arc<Running>, index: usize, card: Card, mark: u64) {
    let running = Arc::clone(running);
    let wait = move || {
        while running.process.is_alive() && !running.qmp.is_closed() {
            if running.qmp.wait_event(mark, LATE_LIMIT, |event| is_gone(event, &card)).is_ok() {
                let added = running.qmp.execute("device_add", replaced_card(index, &card));
                tracing::info!(card = card.id, ?added, "a card was let go of late");
                return;
            }
        }
    };
    let _ = thread::Builder::new().name("late-card".into()).spawn(wait);
}

/// Puts cards in the place of those that a guest has let go of while there was nobody to do it.
pub(crate) fn put_missing_cards(row: &TargetRow, running: &Running) -> Result<()> {
    if row.macs.is_empty() {
        return Ok(());
    }
    let there = running.qmp.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
    let has = |id: &str| there.as_array().into_iter().flatten().any(|device| device["name"] == id);
    for (index, mac) in row.macs.iter().enumerate() {
        let card = Card { id: card_id(index), mac: mac.clone() };
        if !has(&card.id) {
            running.qmp.execute("device_add", replaced_card(index, &card))?;
        }
    }
    Ok(())
}

fn card_id(index: usize) -> String {
    format!("net{index}")
}

fn is_gone(event: &Event, card: &Card) -> bool {
    event.name == "DEVICE_DELETED" && event.data.get("device").is_some_and(|device| *device == card.id)
}
