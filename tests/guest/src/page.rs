//! One page of memory, pseudo-random content for it, and its hash.
//!
//! Both functions take few instructions a word and no wide registers: in an emulated guest each
//! instruction counts, and vector instructions are slow.

/// Bytes of a page.
pub(crate) const SIZE: usize = 4096;

/// Pages of a MiB.
pub(crate) const PER_MIB: usize = (1 << 20) / SIZE;

/// A page, aligned as the guest's kernel and `O_DIRECT` want it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u8; SIZE]);

/// A page of zeros.
pub(crate) const ZERO: Page = Page([0; SIZE]);

/// Mixes two numbers into one whose bits all depend on both (the finaliser of splitmix64).
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_add(b.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Fills whole words of `bytes` with incompressible content that depends on `seed` alone.
pub(crate) fn randomise(bytes: &mut [u8], seed: u64) {
    let mut state = mix(seed, 0);
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        word.copy_from_slice(&(state ^ (state >> 32)).to_le_bytes());
    }
}

/// A fast hash of whole words; it finds faults and is no defence against an opponent.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let mut hash = 0x243F_6A88_85A3_08D3_u64;
    for word in bytes.chunks_exact(8) {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        hash = (hash ^ word).wrapping_mul(0x9FB2_1C65_1E98_DF25).rotate_left(29);
    }
    mix(hash, bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_depends_on_the_seed() {
        let (mut a, mut b) = (ZERO, ZERO);
        randomise(&mut a.0, 1);
        randomise(&mut b.0, 2);
        assert_ne!(a.0, b.0);
        randomise(&mut b.0, 1);
        assert_eq!(a.0, b.0);
    }

    #[test]
    fn the_hash_sees_every_bit_and_the_order() {
        let mut page = ZERO;
        randomise(&mut page.0, 7);
        let before = hash(&page.0);
        for at in [0, 8, 2048, SIZE - 1] {
            for bit in 0..8 {
                page.0[at] ^= 1 << bit;
                assert_ne!(hash(&page.0), before, "byte {at}, bit {bit}");
                page.0[at] ^= 1 << bit;
            }
        }
        page.0.rotate_left(8);
        assert_ne!(hash(&page.0), before);
    }
}
