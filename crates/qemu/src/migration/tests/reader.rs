//! The whole way through a stream.

use super::*;

#[test]
fn the_sample_is_read_to_its_end() {
    let (finished, memory) = read(sample().as_slice()).unwrap();
    let state = finished.state;
    assert_eq!(state.header.raw(), HEADER);
    assert_eq!(state.header.machine(), "pc");
    assert_eq!(state.ram_section, 5);
    assert_eq!(
        *state.blocks,
        [
            RamBlock { name: "pc.ram".into(), length: 0x3000 },
            RamBlock { name: "bios".into(), length: 0x1000 }
        ]
    );
    assert_eq!(state.blocks.total(), 0x4000);
    assert_eq!(state.tail.bytes(), tail_bytes());
    assert_eq!(state.tail.description(), DESCRIPTION.as_bytes());
    assert_eq!((finished.counts.pages, finished.counts.zero_pages), (4, 1));
    assert_eq!(finished.counts.bytes, sample().len() as u64);

    assert_eq!(memory.blocks, *state.blocks);
    assert_eq!((memory.ends, memory.pings), (1, vec![42]));
    let pages: Vec<_> = memory.pages.iter().map(|(at, page)| (*at, page.as_ref().map(|p| p[0]))).collect();
    assert_eq!(
        pages,
        [((0, 0), Some(0x44)), ((0, 0x1000), None), ((0, 0x2000), Some(0x33)), ((1, 0), Some(0x55))]
    );
}

#[test]
fn pieces_of_any_size_give_the_same_and_nothing_is_read_beyond_the_end() {
    let sample = sample();
    let whole = read(sample.as_slice()).unwrap();
    for piece in [1, 2, 3, 7, 4096, 5000, usize::MAX] {
        assert_eq!(read(StaysOpen { bytes: &sample, piece }).unwrap(), whole, "in pieces of {piece}");
    }
}

#[test]
fn a_background_snapshot_has_no_end_of_ram() {
    let stream =
        [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, PART_RAM, &first_pages(), END_PAYLOAD, &whole_tail()]
            .concat();
    let (finished, memory) = read(stream.as_slice()).unwrap();
    assert_eq!((finished.counts.pages, memory.ends), (1, 1));
}

#[test]
fn continue_goes_on_across_sections() {
    let stream = [
        HEADER,
        START_RAM,
        BLOCK_LIST,
        END_PAYLOAD,
        PART_RAM,
        b"\0\0\0\0\0\0\0\x02\x04bios\0",
        END_PAYLOAD,
        END_RAM,
        b"\0\0\0\0\0\0\0\x22\0",
        END_PAYLOAD,
        &whole_tail(),
    ]
    .concat();
    assert_eq!(read(stream.as_slice()).unwrap().1.pages, BTreeMap::from([((1, 0), None)]));
}

#[test]
fn an_error_of_the_sink_comes_back_with_its_cause() {
    struct Full;
    impl Sink for Full {
        fn blocks(&mut self, _: &[RamBlock]) -> Result<(), SinkError> {
            Ok(())
        }
        fn page(&mut self, _: usize, _: u64, _: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
            Err("no space left".into())
        }
        fn zero(&mut self, _: usize, _: u64) -> Result<(), SinkError> {
            Ok(())
        }
    }
    let error = read_stream(sample().as_slice(), &mut Full).unwrap_err();
    assert_eq!(error.to_string(), "the receiver of the pages failed (byte 100 of the input)");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "no space left");
}

#[test]
fn an_error_of_the_input_comes_back_with_its_cause() {
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::TimedOut.into())
        }
    }
    let error = read(sample()[..20].chain(Fails)).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the migration bytes (byte 20 of the input)");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "timed out");
}
