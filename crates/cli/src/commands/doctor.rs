//! `doctor`: what this host has and lacks.

use serde_json::json;
use server::Problem;
use server::client::Client;
use server::snapshots::{Check, CheckLevel, Code, Engine};

use crate::output::{Output, Style, room, wrap};
use crate::session::Session;

/// Look at what this host has and lacks
///
/// Needs no daemon. The exit code is 5 if something is missing that Spinney cannot do without.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney doctor")]
pub(crate) struct Args {}

pub(crate) fn run(session: &Session, _: &Args) -> Result<(), Problem> {
    let mut checks = Engine::doctor(&session.config.settings());
    checks.push(daemon(session));
    if session.out.json {
        session.document("spinney.doctor/1", &json!({ "checks": checks }));
    } else {
        print(session.out, &checks);
    }
    match checks.iter().find(|check| check.level == CheckLevel::Missing) {
        None => Ok(()),
        Some(check) => Err(Problem::new(Code::Precondition, format!("{}: {}", check.name, check.found))),
    }
}

fn daemon(session: &Session) -> Check {
    let name = "daemon".to_owned();
    let state = session.config.state.value.display();
    match Client::existing(&session.config.state.value) {
        Ok(Some(_)) => {
            Check { name, level: CheckLevel::Good, found: format!("answers in {state}"), hint: None }
        }
        Ok(None) => {
            let found = format!("does not run in {state}; the next command starts it");
            Check { name, level: CheckLevel::Good, found, hint: None }
        }
        Err(problem) => Check { name, level: CheckLevel::Limited, found: problem.detail, hint: problem.hint },
    }
}

/// Columns of the word that says how it stands.
const MARK: usize = "limited".len();

fn print(out: Output, checks: &[Check]) {
    let width = checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    for check in checks {
        let mark = match check.level {
            CheckLevel::Good => out.paint(Style::Good, "good   "),
            CheckLevel::Limited => out.paint(Style::Warning, "limited"),
            CheckLevel::Missing => out.paint(Style::Bad, "missing"),
        };
        let room = out.width.map_or(usize::MAX, |fit| room(fit, MARK + 2 + width + 2));
        let mut lines = wrap(&check.found, room).into_iter();
        let found = lines.next().unwrap_or_default();
        out.line(format_args!("{mark}  {:<width$}  {found}", check.name));
        let hint = check.hint.iter().flat_map(|hint| wrap(&format!("hint: {hint}"), room));
        for line in lines.chain(hint) {
            out.line(format_args!("{:MARK$}  {:<width$}  {line}", "", ""));
        }
    }
}
