//! `fork`: machines that run, copies of this one.

use clap::ValueEnum;
use clap_complete::ArgValueCompleter;
use server::Problem;
use server::client::Method;
use server::snapshots::{ForkOptions, Forked, Identity, IdentityItem, ItemState};

use crate::output::span;
use crate::session::Session;
use crate::{address, complete};

/// Make running copies of a machine, or of a snapshot
///
/// They go on from where the source is, or was, share what they do not change, and cost little more than a QEMU each. All of them
/// come to be, or none. The source is not touched, and runs on.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney fork web@before-upgrade trial     one, called trial
  spinney fork web -n 5                     of web as it runs now: web-1 to web-5
  spinney fork web@base lab -n 20           lab-1 to lab-20
  spinney back lab-3                        lab-3 as it began
  spinney undo                              after a fork: removes what it made, once that is off")]
pub(crate) struct Args {
    /// Machine, as it is now, or snapshot
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
    /// Name of the new machine; with -n, what their names begin with
    #[arg(value_name = "NEW")]
    name: Option<String>,
    /// How many
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1)]
    count: u32,
    /// What becomes of their identity
    #[arg(long, value_enum, default_value_t = Who::Isolate)]
    identity: Who,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Who {
    /// The same addresses inside, networks of their own
    Isolate,
    /// New addresses and names, as far as the guest lets them
    Renew,
    /// As after a goto
    Keep,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let identity = match args.identity {
        Who::Isolate => Identity::Isolate,
        Who::Renew => Identity::Renew,
        Who::Keep => Identity::Keep,
    };
    let options = ForkOptions { name: args.name, count: args.count, identity, throw_away: false };
    let forked: Forked = session.change(Method::POST, &address::verb(&args.address, "fork")?, &options)?;
    if session.out.json {
        session.document("spinney.fork/1", &forked);
        return Ok(());
    }
    print(session, &forked);
    Ok(())
}

/// What was made, and what became of each one's identity.
pub(super) fn print(session: &Session, forked: &Forked) {
    let names: Vec<&str> = forked.forks.iter().map(|fork| fork.machine.name.as_str()).collect();
    let paused = forked.source_pause_us.map(|us| format!(", {} paused {}", forked.from, span(us)));
    session.out.line(format_args!(
        "{} {}, forked from {} in {}{}",
        listed(&names),
        if names.len() == 1 { "runs" } else { "run" },
        forked.from,
        span(forked.took_us),
        paused.unwrap_or_default()
    ));
    // Only of a machine that boots everything is new.
    let boots = |items: &[IdentityItem]| items.iter().all(|item| item.state == ItemState::Renewed);
    if forked.forks.first().is_some_and(|fork| boots(&fork.identity)) {
        session.out.note(format_args!(
            "there is no memory to go on from: what runs boots from the disks of {}",
            forked.from
        ));
    }
    // Mostly it is the same of all of them.
    let mut said: Vec<(&[IdentityItem], Vec<&str>)> = Vec::new();
    for fork in &forked.forks {
        match said.iter_mut().find(|(items, _)| *items == fork.identity) {
            Some((_, names)) => names.push(&fork.machine.name),
            None => said.push((&fork.identity, vec![&fork.machine.name])),
        }
    }
    for (items, names) in &said {
        if said.len() > 1 {
            session.out.line(format_args!("{}:", listed(names)));
        }
        for (state, word) in [
            (ItemState::Renewed, "new"),
            (ItemState::Kept, "kept"),
            (ItemState::Pending, "pending"),
            (ItemState::Impossible, "the same"),
        ] {
            let own: Vec<String> = items.iter().filter(|item| item.state == state).map(in_words).collect();
            if !own.is_empty() {
                session.out.line(format_args!("  {word:<9} {}", own.join("; ")));
            }
        }
    }
}

fn in_words(item: &IdentityItem) -> String {
    match &item.why {
        // The warning has it.
        Some(why) if item.what != "random numbers" => format!("{} ({why})", item.what),
        _ => item.what.clone(),
    }
}

fn listed(names: &[&str]) -> String {
    match names {
        [first, _, .., last] if names.len() > 6 => format!("{first} to {last}"),
        [all @ .., last] if !all.is_empty() => format!("{} and {last}", all.join(", ")),
        _ => names.join(", "),
    }
}
