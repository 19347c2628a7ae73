//! Streams that QEMU wrote: `-nodefaults -m 1 -S`, a BIOS of 64 KiB of zeros, `migrate "exec:cat > FILE"`; machine
//! `pc,usb=off,smm=off,vmport=off,hpet=off` of Debian's QEMU 7.2.22 and 10.0.2, `microvm` of 10.0.2.

use crate::migration::DeviceState;

use super::*;

const PC_7_2: &[u8] = include_bytes!("data/pc-7.2.stream");
const PC_10_0: &[u8] = include_bytes!("data/pc-10.0.stream");
const MICROVM: &[u8] = include_bytes!("data/microvm-10.0.stream");

#[test]
fn they_are_read_to_their_end() {
    for (stream, machine, section, devices, blocks, pages) in [
        (PC_7_2, "pc-i440fx-7.2", 2, 28, 6, 3),
        (PC_10_0, "pc-i440fx-10.0", 1, 28, 6, 4),
        (MICROVM, "microvm", 1, 10, 5, 3),
    ] {
        let (finished, memory) = read(StaysOpen { bytes: stream, piece: 32 << 10 }).unwrap();
        let state = &finished.state;
        assert_eq!(state.header.machine(), machine);
        assert_eq!(state.ram_section, section, "{machine}");
        assert_eq!(state.tail.sections().len(), devices, "{machine}");
        assert_eq!(state.tail.run_state(), Some("prelaunch"), "{machine}");
        assert_eq!(state.blocks.len(), blocks, "{machine}");
        assert_eq!(finished.counts.pages, pages, "{machine}");
        assert_eq!(memory.pages.len() as u64 * 4096, state.blocks.total(), "{machine}: each page comes once");
        assert_eq!(finished.counts.bytes, stream.len() as u64);
        assert_eq!(&DeviceState::decode(&state.encode()).unwrap(), state);
    }
}

#[test]
fn their_tails_are_cut_out_byte_for_byte() {
    for stream in [PC_7_2, PC_10_0, MICROVM] {
        let (finished, _) = read(stream).unwrap();
        let tail = &finished.state.tail;
        let length = (tail.description().len() as u32).to_be_bytes();
        let end = [tail.bytes(), b"\x06", &length, tail.description()].concat();
        assert!(stream.ends_with(&end));
    }
}

#[test]
fn no_cut_of_a_tail_looks_complete() {
    let (finished, _) = read(MICROVM).unwrap();
    let tail = MICROVM.len() - finished.state.tail.bytes().len() - finished.state.tail.description().len();
    for length in (tail..MICROVM.len()).step_by(7) {
        assert!(read(&MICROVM[..length]).is_err(), "cut at {length}");
    }
}
