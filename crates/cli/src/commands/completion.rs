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
    if matches!(args.shell, Shell::Bash) {
        // Bash would complete what stands behind an @ as a word of its own.
        script.extend_from_slice(b"COMP_WORDBREAKS=${COMP_WORDBREAKS//@}\n");
    }
    shell
        .write_registration("COMPLETE", "spinney", "spinney", "spinney", &mut script)
        .map_err(|error| Problem::new(Code::Failed, "cannot write the completion").because(&error))?;
    session.out.line(String::from_utf8_lossy(&script).trim_end());
    Ok(())
}
