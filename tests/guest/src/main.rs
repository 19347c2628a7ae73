//! The program that runs inside the test guest and makes the guest's state checkable from outside.
//!
//! It keeps state in memory (a nonce, a counter, filled pages, a log's last entry) and state on the
//! disk `/data`, both with rules that can be checked at any moment, so that a test can say after a
//! snapshot, a restore or a fork which byte is not what it should be.
//!
//! # Protocol
//!
//! Text lines over the virtio-serial port named `spinney.test`, or `/dev/ttyS1` where there is none.
//!
//! ```text
//! request:  ID VERB ARGUMENTS... .        ends in a word that is a single full stop
//! reply:    ID ok KEY=VALUE...            one line, preceded by an empty one
//!           ID error TEXT
//! stamp:    T SEQ COUNTER MICROSECONDS    between replies, while stamps are switched on
//! ```
//!
//! `ID` is any word; the reply repeats it. Values have no spaces: text is percent-encoded
//! ([`text`]). Both ends may lose the other in the middle of a line, at a restore for example. So a
//! request without its full stop is ignored, empty lines are ignored, and a client begins with an
//! empty line and drops replies whose `ID` is not the one it waits for.
//!
//! | request | reply |
//! |---|---|
//! | `hello` | `nonce` (from `/dev/urandom` at start, in memory only), `release`, `memory_kib`, `data` (is `/data` mounted) |
//! | `nonce` | `nonce` |
//! | `counter` | `counter` (+1 about every ms), `uptime_ms` |
//! | `fill MIB [unique=40 dup=20 disk=20 zero=20 seed=1]` | `pages`, `ms`. Percentages; 0 MiB frees the memory |
//! | `hash` | `hash` over all filled memory, read afresh; `pages`, `ms` |
//! | `pages FIRST N` | `hashes`, one for each 4 KiB page, with commas; at most 4096 |
//! | `mutate SEED N` | rewrites N pages; `pages` |
//! | `walk SEED STEPS [write]` | looks at STEPS words anywhere in filled memory, each found by the last, and changes them; `end`, `us` |
//! | `writer start RATE [pages=1024]`, `writer stop` | dirties RATE pages a second in an area of its own |
//! | `writer check` | `steps`, `bad` (pages that are not what that number of steps leaves), `first_bad` or `-` |
//! | `log start RATE`, `log step N`, `log stop` | synced lines to `/data/log`; `step` replies `mem` |
//! | `log check` | `mem`, `disk`, `cached` (last entry in memory, on disk, in the page cache), `valid`, `ok` |
//! | `diskwrite RATE`, `diskwrite stop` | RATE MiB a second to `/data/scratch`, never synced |
//! | `stamp MS`, `stamp stop` | stamps every MS milliseconds |
//! | `random N` | `bytes` from the kernel, in hex; at most 4096 |
//! | `genid` | `genid`: `bound`, `unbound` or `absent` |
//! | `time` | `unix_ns`, the wall clock (`CLOCK_REALTIME`) |
//! | `macs` | `macs`, `INTERFACE/ADDRESS` of every network card, with commas |
//! | `uuid` | `uuid` of the machine, as DMI has it |
//! | `hostname` | `hostname` (percent-encoded) |
//! | `cmd TEXT` | runs `sh -c TEXT` (percent-encoded); `status`, `output` (at most 64 KiB) |
//! | `sync` | after `sync(2)` |
//! | `poweroff` | the reply, then the machine goes off |
//!
//! `workload known FILE MIB`, run on the host, writes the file whose blocks `fill` copies.

mod disk;
mod log;
mod machine;
mod memory;
mod page;
mod port;
mod scratch;
mod serve;
mod text;
mod ticks;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => serve::run(),
        ["known", file, mib] => match mib.parse().map(|mib| disk::write_known(file.as_ref(), mib)) {
            Ok(Ok(())) => ExitCode::SUCCESS,
            Ok(Err(error)) => {
                eprintln!("workload: {file}: {error}");
                ExitCode::FAILURE
            }
            Err(_) => {
                eprintln!("workload: {mib}: not a number of MiB");
                ExitCode::from(2)
            }
        },
        _ => {
            eprintln!("usage: workload [known FILE MIB]");
            ExitCode::from(2)
        }
    }
}
