//! `serve`: the daemon.

use std::path::PathBuf;

use serde_json::json;
use server::client::Client;
use server::{Options, Problem};

use crate::session::Session;

/// Run the daemon in the foreground, or end it
///
/// Other commands start it when it is not there. It logs to daemon.log in the state folder. Machines run on when it
/// ends, and it finds them when it starts again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney serve\n  spinney serve --stop")]
pub(crate) struct Args {
    /// End the daemon that runs
    #[arg(long, conflicts_with_all = ["detached", "qemu", "qemu_img", "accel"])]
    stop: bool,
    /// Leave the terminal
    #[arg(long, hide = true)]
    detached: bool,
    /// QEMU's executable [default: looked for]
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// qemu-img's executable [default: looked for]
    #[arg(long, value_name = "FILE")]
    qemu_img: Option<PathBuf>,
    /// Accelerator [default: probed]
    #[arg(long, value_parser = ["kvm", "tcg"])]
    accel: Option<String>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    if args.stop {
        let was_there = Client::shutdown(&session.config.state.value)?;
        if session.out.json {
            session.document("spinney.stop/1", &json!({ "stopped": was_there }));
        } else {
            session.out.note(if was_there {
                "the daemon has ended; machines run on"
            } else {
                "no daemon runs"
            });
        }
        return Ok(());
    }
    let mut settings = session.config.settings();
    settings.qemu = args.qemu.or(settings.qemu);
    settings.qemu_img = args.qemu_img.or(settings.qemu_img);
    settings.accel = args.accel.or(settings.accel);
    server::serve(settings, Options { detached: args.detached })
}
