//! `completion`: what a shell needs to complete verbs and live names.

use clap::ValueEnum;
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};
use server::Problem;
use server::snapshots::Code;

use crate::session::Session;

/// Print the completion for a shell, with live names of machines and snapshots
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  source <(spinney completion bash)          in ~/.bashrc
  source <(spinney completion zsh)           in ~/.zshrc, after compinit
  spinney completion fish | source           in ~/.config/fish/config.fish")]
pub(crate) struct Args {
    /// Shell
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let shell: &dyn EnvCompleter = match args.shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut script = Vec::new();
    shell
        .write_registration("COMPLETE", "spinney", "spinney", "spinney", &mut script)
        .map_err(|error| Problem::new(Code::Failed, "cannot write the completion").because(&error))?;
    let script = String::from_utf8_lossy(&script);
    session.out.line(match args.shell {
        Shell::Bash => for_bash(script.trim_end()),
        Shell::Zsh | Shell::Fish => script.trim_end().to_owned(),
    });
    Ok(())
}

/// Bash would complete what stands behind an @ as a word of its own, and set a space behind `web@`, where a name follows.
/// Fish and zsh know that nothing is over at an @.
fn for_bash(script: &str) -> String {
    format!("COMP_WORDBREAKS=${{COMP_WORDBREAKS//@}}\n{}", script.replace(NO_SPACE_BEHIND, "=~ [=/:@]$"))
}

/// Where clap's script for bash says behind what no space is set.
const NO_SPACE_BEHIND: &str = "=~ [=/:]$";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bash_sets_no_space_behind_an_at_sign() {
        let mut script = Vec::new();
        Bash.write_registration("COMPLETE", "spinney", "spinney", "spinney", &mut script).unwrap();
        let script = String::from_utf8(script).unwrap();
        assert_eq!(script.matches(NO_SPACE_BEHIND).count(), 1, "clap's script has changed:\n{script}");
        assert!(for_bash(&script).contains("[=/:@]$"));
    }
}
