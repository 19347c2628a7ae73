//! `view`: serves a group's view, or stands by, for the daemon, which starts it. Not for people.

use std::path::Path;

use server::Problem;
use server::snapshots::Code;

pub(crate) fn run() -> Result<(), Problem> {
    server::start_lasting_helper();
    let failed = |error: std::io::Error| Problem::new(Code::Failed, "the view ended").because(&error);
    snapfs::process::run(Path::new("/proc/self/exe")).map_err(failed)
}
