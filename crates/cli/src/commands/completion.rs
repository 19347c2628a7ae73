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
        Shell::Zsh => for_zsh(script.trim_end()),
        // Fish sets no space behind an @ by itself.
        Shell::Fish => script.trim_end().to_owned(),
    });
    Ok(())
}

/// Where clap's script for bash says behind what no space is set.
const BASH_OPEN: &str = "=~ [=/:]$";
/// Where clap's script for zsh adds what is no folder.
const ZSH_ADDS: &str = "        [[ -n $other ]] && _describe -V 'values' other\n";

/// Bash would complete what stands behind an @ as a word of its own, and set a space behind `web@`, where a name follows.
fn for_bash(script: &str) -> String {
    format!("COMP_WORDBREAKS=${{COMP_WORDBREAKS//@}}\n{}", script.replace(BASH_OPEN, "=~ [=/:@]$"))
}

/// Zsh would set a space behind `web@`.
fn for_zsh(script: &str) -> String {
    let apart = "        local -a open=(${(M)other:#*@})
        other=(${other:#*@})
        [[ -n $open ]] && _describe -V 'values' open -S ''\n";
    script.replace(ZSH_ADDS, &format!("{apart}{ZSH_ADDS}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(shell: &dyn EnvCompleter) -> String {
        let mut script = Vec::new();
        shell.write_registration("COMPLETE", "spinney", "spinney", "spinney", &mut script).unwrap();
        String::from_utf8(script).unwrap()
    }

    #[test]
    fn no_space_is_set_behind_an_at_sign() {
        let (bash, zsh) = (script(&Bash), script(&Zsh));
        assert_eq!(bash.matches(BASH_OPEN).count(), 1, "clap's script has changed:\n{bash}");
        assert_eq!(zsh.matches(ZSH_ADDS).count(), 1, "clap's script has changed:\n{zsh}");
        assert!(for_bash(&bash).contains("[=/:@]$"));
        assert!(for_zsh(&zsh).contains("open -S ''"));
    }
}
