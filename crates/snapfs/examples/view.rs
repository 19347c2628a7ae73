//! Serves a view, or stands by: what the subcommand `view` of Spinney does, for this crate's tests.

fn main() {
    if let Err(error) = snapfs::process::run(std::path::Path::new("/proc/self/exe")) {
        eprintln!("{}: {error}", std::process::id());
    }
}
