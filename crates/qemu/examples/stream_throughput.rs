//! Measures reader and writer: `cargo run --release -p spinney-qemu --example stream_throughput [MEBIBYTES]`.
//!
//! Each figure is the best of five rounds over the same memory, in bytes of guest memory per second.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use qemu::migration::{
    DeviceTail, PAGE_SIZE, RamBlock, RamBlocks, RestoreStream, Sink, SinkError, StreamHeader, read_stream,
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Counts pages, and touches nothing.
struct Counting;

impl Sink for Counting {
    fn blocks(&mut self, _: &[RamBlock]) -> Result<(), SinkError> {
        Ok(())
    }
    fn page(&mut self, _: usize, _: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        std::hint::black_box(bytes);
        Ok(())
    }
    fn zero(&mut self, _: usize, _: u64) -> Result<(), SinkError> {
        Ok(())
    }
}

/// Collects pages into batches of 1 MiB, as one who stores them does.
struct Batching(Vec<u8>);

impl Sink for Batching {
    fn blocks(&mut self, _: &[RamBlock]) -> Result<(), SinkError> {
        Ok(())
    }
    fn page(&mut self, _: usize, _: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        if self.0.len() == 1 << 20 {
            std::hint::black_box(&self.0);
            self.0.clear();
        }
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn zero(&mut self, _: usize, _: u64) -> Result<(), SinkError> {
        Ok(())
    }
}

fn write_stream<W: Write>(out: W, memory: &[u8]) -> Outcome<W> {
    let header = StreamHeader::decode(b"QEVM\0\0\0\x03\x07\0\0\0\x02pc")?;
    let blocks = RamBlocks::new(vec![RamBlock { name: "pc.ram".into(), length: memory.len() as u64 }])?;
    let tail = DeviceTail::new(
        b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02\x2a\x7e\0\0\0\x02\0".to_vec(),
        br#"{"devices":[{"name":"timer","instance_id":0,"fields":[{"size":1}]}]}"#.to_vec(),
    )?;
    let mut stream = RestoreStream::new(out, &header, &blocks, 1)?;
    let mut offset = 0;
    for run in memory.chunks(1 << 20) {
        stream.pages(0, offset, run)?;
        offset += run.len() as u64;
    }
    Ok(stream.finish(&tail)?)
}

fn measure(what: &str, bytes: usize, mut act: impl FnMut() -> Outcome) -> Outcome {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        act()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{:>6.2} GB/s  {what}", bytes as f64 / best / 1e9);
    Ok(())
}

fn through_socket(memory: &[u8], sink: &mut dyn Sink) -> Outcome {
    let (ours, theirs) = UnixStream::pair()?;
    std::thread::scope(|scope| {
        // The writer hands its end back, so that it stays open: the reader must find the end by itself.
        let writer = scope.spawn(|| write_stream(theirs, memory));
        let read = read_stream(&ours, sink);
        drop(ours);
        writer.join().map_err(|_| "the writer panicked")??;
        read.map(drop).map_err(Into::into)
    })
}

fn main() -> Outcome {
    let mebibytes: usize = std::env::args().nth(1).map_or(Ok(600), |text| text.parse())?;
    let bytes = mebibytes << 20;
    let mut memory = vec![0u8; bytes];
    for (i, word) in memory.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes();
    }
    let stream = write_stream(Vec::with_capacity(bytes + bytes / 256), &memory)?;

    measure("write, to nowhere", bytes, || write_stream(io::sink(), &memory).map(drop))?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    measure("write, to /dev/null", bytes, || write_stream(&null, &memory).map(drop))?;
    measure("read from memory, count", bytes, || {
        Ok(read_stream(stream.as_slice(), &mut Counting).map(drop)?)
    })?;
    let mut batching = Batching(Vec::with_capacity(1 << 20));
    measure("read from memory, copy into batches", bytes, || {
        Ok(read_stream(stream.as_slice(), &mut batching).map(drop)?)
    })?;
    measure("write, socket, read, count", bytes, || through_socket(&memory, &mut Counting))?;
    measure("write, socket, read, copy into batches", bytes, || through_socket(&memory, &mut batching))
}
