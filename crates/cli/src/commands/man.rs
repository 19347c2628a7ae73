//! `man`: manual pages from the same words as `--help`.

use std::path::PathBuf;

use clap::CommandFactory;
use server::Problem;
use server::snapshots::Code;

use super::Cli;
use crate::session::Session;

/// Write the manual pages to a folder
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder
    folder: PathBuf,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let cannot = |error: std::io::Error| {
        Problem::new(Code::Failed, format!("cannot write to {}", args.folder.display())).because(&error)
    };
    std::fs::create_dir_all(&args.folder).map_err(cannot)?;
    clap_mangen::generate_to(Cli::command(), &args.folder).map_err(cannot)?;
    session.out.note(format_args!("written to {}", args.folder.display()));
    Ok(())
}
