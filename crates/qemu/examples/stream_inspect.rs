//! Prints what a migration stream holds: `stream_inspect FILE`, or standard input without one.
//!
//! A stream for it: start QEMU with `-S`, then `migrate "exec:cat > FILE"` in its monitor.

use std::fs::File;
use std::io::{Read, Write};

use qemu::migration::{PAGE_SIZE, RamBlock, Sink, SinkError, read_stream};

/// Counts pages per block: those with bytes, those of zeros.
#[derive(Default)]
struct Tally(Vec<(RamBlock, u64, u64)>);

impl Sink for Tally {
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError> {
        self.0 = blocks.iter().map(|block| (block.clone(), 0, 0)).collect();
        Ok(())
    }

    fn page(&mut self, block: usize, _: u64, _: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        self.0.get_mut(block).ok_or("no such block")?.1 += 1;
        Ok(())
    }

    fn zero(&mut self, block: usize, _: u64) -> Result<(), SinkError> {
        self.0.get_mut(block).ok_or("no such block")?.2 += 1;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let input: Box<dyn Read> = match std::env::args().nth(1) {
        Some(path) => Box::new(File::open(path)?),
        None => Box::new(std::io::stdin()),
    };
    let mut tally = Tally::default();
    let finished = read_stream(input, &mut tally)?;
    let state = &finished.state;
    let mut out = std::io::stdout().lock();
    writeln!(out, "machine       {}", state.header.machine())?;
    writeln!(out, "run state     {}", state.tail.run_state().unwrap_or("not stored"))?;
    writeln!(out, "stream        {} bytes", finished.counts.bytes)?;
    writeln!(out, "device state  {} bytes", state.tail.bytes().len())?;
    writeln!(out, "description   {} bytes", state.tail.description().len())?;
    writeln!(
        out,
        "\n{:>14} {:>8} {:>8}  block (RAM section {})",
        "bytes", "pages", "zero", state.ram_section
    )?;
    for (block, pages, zero) in &tally.0 {
        writeln!(out, "{:>14} {pages:>8} {zero:>8}  {}", block.length, block.name)?;
    }
    writeln!(out, "\n{:>14}  device section", "bytes")?;
    for section in state.tail.sections() {
        writeln!(out, "{:>14}  {} ({})", section.payload.len(), section.name, section.instance)?;
    }
    Ok(())
}
