//! `config show`: settings, and who gave them.

use std::fmt::Display;

use serde_json::json;
use server::Problem;

use crate::config::Setting;
use crate::session::Session;

/// Show the configuration
///
/// A flag comes before SPINNEY_STATE, SPINNEY_QEMU, SPINNEY_QEMU_IMG and SPINNEY_ACCEL; these before
/// ~/.config/spinney/config.toml; that before /etc/spinney/config.toml. The files have the keys state, qemu, qemu_img
/// and accel.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show all settings
    #[command(after_help = "Example:\n  spinney config show --origin")]
    Show {
        /// Say who gave each of them
        #[arg(long)]
        origin: bool,
    },
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let Command::Show { origin } = args.command;
    let config = &session.config;
    let state = &config.state;
    let settings = [
        ("state", Some((state.value.display().to_string(), state.origin.clone()))),
        ("qemu", config.qemu.as_ref().map(|setting| shown(setting, setting.value.display()))),
        ("qemu_img", config.qemu_img.as_ref().map(|setting| shown(setting, setting.value.display()))),
        ("accel", config.accel.as_ref().map(|setting| shown(setting, &setting.value))),
    ];
    if session.out.json {
        let values = settings.map(|(key, setting)| {
            let (value, origin) = setting.unzip();
            json!({ "key": key, "value": value, "origin": origin.unwrap_or_else(|| "default".to_owned()) })
        });
        session.document("spinney.config/1", &json!({ "settings": values }));
        return Ok(());
    }
    let mut rows = vec![vec!["KEY".to_owned(), "VALUE".to_owned()]];
    if origin {
        rows.iter_mut().for_each(|row| row.push("ORIGIN".to_owned()));
    }
    for (key, setting) in settings {
        let (value, from) = setting.unwrap_or_else(|| ("(looked for)".to_owned(), "default".to_owned()));
        let mut row = vec![key.to_owned(), value];
        if origin {
            row.push(from);
        }
        rows.push(row);
    }
    session.out.table(&rows);
    Ok(())
}

fn shown<T>(setting: &Setting<T>, value: impl Display) -> (String, String) {
    (value.to_string(), setting.origin.clone())
}
