//! The figures of `make bench`: printed as a table, written to `results/`.
//!
//! Everything is measured from outside, through the executable and real guests, as a user would. Comparisons are made
//! by turns within a round, because a disk's speed changes within minutes. A figure that cannot be measured is left out
//! with a line that says why; none is ever estimated.
//!
//! `SPINNEY_BENCH_QUICK=1` is a short run for development. Arguments choose questions by a part of their names. Both print
//! what a whole run writes to files.

mod baseline;
mod cold;
mod debian;
mod disk;
mod empty;
mod error;
mod figures;
mod forks;
mod machine;
mod memory_images;
mod memory_watch;
mod page_count;
mod report;
mod settings;
mod spinney;
mod stats;
mod tool;
mod warm;
mod watched;

use std::error::Error as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::report::Figure;
use crate::settings::Bench;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {}", in_words(&error));
            ExitCode::FAILURE
        }
    }
}

/// Measures, prints and writes; false if a figure is missing that this host could have.
fn run() -> Result<bool> {
    let bench = Bench::from_environment()?;
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    println!("{} with QEMU {}", bench.spinney.display(), bench.qemu.version);
    let began = Instant::now();
    let mut measured: Vec<Figure> = Vec::new();
    let mut whole = true;
    for (name, measure) in figures::ALL {
        if !chosen.is_empty() && !chosen.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let at = began.elapsed().as_secs();
        println!("{:>3}:{:02}  {name}", at / 60, at % 60);
        match measure(&bench) {
            Ok(figures) => {
                report::table(&figures).iter().skip(1).for_each(|line| println!("        {line}"));
                measured.extend(figures);
            }
            Err(error @ Error::Interrupted) => return Err(error),
            Err(Error::Unavailable(reason)) => println!("        left out: {reason}"),
            Err(error) => {
                whole = false;
                println!("        left out: {}", in_words(&error));
            }
        }
        bench.check()?;
    }
    println!();
    report::table(&measured).iter().for_each(|line| println!("{line}"));
    if bench.quick || !chosen.is_empty() {
        println!("\n{}", report::document(&measured)?);
    } else {
        report::write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("results"), &measured)?;
    }
    Ok(whole)
}

/// An error with its causes.
fn in_words(error: &Error) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        words.push_str(": ");
        words.push_str(&cause.to_string());
        next = cause.source();
    }
    words
}
