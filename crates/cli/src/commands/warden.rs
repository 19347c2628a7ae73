//! `warden`: keeps deadlines for the daemon, which starts it. Not for people.

use std::path::Path;

use server::Problem;
use server::snapshots::Code;

use crate::session::Session;

pub(crate) fn run(session: &Session) -> Result<(), Problem> {
    server::start_helper();
    let failed = |error: std::io::Error| Problem::new(Code::Failed, "the warden ended").because(&error);
    warden::process::run(Path::new("/proc/self/exe"), &session.config.state.value).map_err(failed)
}
