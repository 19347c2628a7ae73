//! Random ids: of targets, snapshots, layers, operations, and the addresses that a guest sees.

/// Sixteen hex digits.
pub(crate) fn new_id() -> String {
    hex(&random::<8>())
}

/// A random (version 4) UUID.
pub(crate) fn new_uuid() -> String {
    let mut b = random::<16>();
    b[6] = (b[6] & 0x0F) | 0x40;
    b[8] = (b[8] & 0x3F) | 0x80;
    let h = hex(&b);
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// A MAC address in the range that QEMU's users expect.
pub(crate) fn new_mac() -> String {
    let b = random::<3>();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2])
}

/// A number.
pub(crate) fn random_number() -> u64 {
    u64::from_le_bytes(random())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel always has random bytes once it is up");
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_forms_and_differ() {
        assert_eq!(new_id().len(), 16);
        assert_ne!(new_id(), new_id());
        let uuid = new_uuid();
        assert_eq!((uuid.len(), uuid.as_bytes()[14]), (36, b'4'));
        assert!(new_mac().starts_with("52:54:00:"));
    }
}
