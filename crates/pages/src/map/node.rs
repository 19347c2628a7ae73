//! One node of a map: a bitmap of the children that are there, and their names.

use crate::PageHash;
use crate::codec::Reader;
use crate::error::Problem;

use super::FAN_OUT;

const KIND: u8 = 1;
const HEADER: usize = 16;
const NAME: usize = 32;

/// Bytes of the largest node.
pub(crate) const MAX_NODE: usize = HEADER + FAN_OUT * NAME;

/// A decoded node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) level: u8,
    present: u64,
    names: Vec<PageHash>,
}

impl Node {
    /// Encodes a node over up to 64 children. None if all of them are empty: then so is the subtree.
    pub(crate) fn encode(level: u8, children: &[PageHash]) -> Option<Vec<u8>> {
        debug_assert!(children.len() <= FAN_OUT);
        let there = || children.iter().take(FAN_OUT).enumerate().filter(|(_, name)| **name != PageHash::ZERO);
        let present = there().fold(0u64, |bits, (i, _)| bits | 1 << i);
        if present == 0 {
            return None;
        }
        let mut out = Vec::with_capacity(HEADER + NAME * present.count_ones() as usize);
        out.extend([KIND, level]);
        out.extend((present.count_ones() as u16).to_le_bytes());
        out.extend(0u32.to_le_bytes());
        out.extend(present.to_le_bytes());
        there().for_each(|(_, name)| out.extend(name.0));
        Some(out)
    }

    /// Decodes the node at the head of `bytes`, which may be longer, and says how many bytes it takes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, usize), Problem> {
        let mut reader = Reader::new(bytes);
        let (kind, level, count, zero) = (reader.u8()?, reader.u8()?, reader.u16()?, reader.u32()?);
        let present = reader.u64()?;
        if kind != KIND || zero != 0 {
            return Err(Problem::Field("node kind"));
        }
        if present == 0 || present.count_ones() != u32::from(count) {
            return Err(Problem::Field("node child count"));
        }
        let names: Vec<_> =
            (0..count).map(|_| reader.array().map(PageHash)).collect::<Result<_, Problem>>()?;
        if names.contains(&PageHash::ZERO) {
            return Err(Problem::Field("node child name"));
        }
        let len = HEADER + NAME * names.len();
        Ok((Self { level, present, names }, len))
    }

    /// Name of a child; `PageHash::ZERO` if it is empty.
    pub(crate) fn child(&self, i: u32) -> PageHash {
        let bit = 1u64.checked_shl(i).unwrap_or(0);
        if self.present & bit == 0 {
            return PageHash::ZERO;
        }
        let before = (self.present & (bit - 1)).count_ones();
        self.names.get(before as usize).copied().unwrap_or(PageHash::ZERO)
    }

    /// Names of the children that are there, in order.
    pub(crate) fn names(&self) -> &[PageHash] {
        &self.names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand from the document of the format, so that a mistake made in both directions shows.
    fn example() -> ([PageHash; 4], Vec<u8>) {
        let (a, b) = (PageHash([0xaa; 32]), PageHash([0xbb; 32]));
        let mut bytes = vec![1, 2, 2, 0, 0, 0, 0, 0, 0b1010, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend([0xaa; 32]);
        bytes.extend([0xbb; 32]);
        ([PageHash::ZERO, a, PageHash::ZERO, b], bytes)
    }

    #[test]
    fn encodes_the_documented_bytes() {
        let (children, bytes) = example();
        assert_eq!(Node::encode(2, &children).unwrap(), bytes);
        assert_eq!(Node::encode(0, &[PageHash::ZERO; 64]), None);
        assert_eq!(Node::encode(0, &[PageHash([1; 32]); 64]).unwrap().len(), MAX_NODE);
    }

    #[test]
    fn decodes_the_documented_bytes() {
        let (children, mut bytes) = example();
        bytes.extend([9; 5]);
        let (node, len) = Node::decode(&bytes).unwrap();
        assert_eq!((node.level, len), (2, bytes.len() - 5));
        for i in 0..64 {
            assert_eq!(node.child(i), children.get(i as usize).copied().unwrap_or(PageHash::ZERO));
        }
        assert_eq!(node.child(64), PageHash::ZERO);
    }

    #[test]
    fn every_cut_fails() {
        let (_, bytes) = example();
        for len in 0..bytes.len() {
            assert_eq!(Node::decode(&bytes[..len]), Err(Problem::TooShort), "cut to {len}");
        }
    }

    #[test]
    fn contradictions_fail() {
        for (at, value) in [(0, 2), (2, 3), (4, 1), (8, 0b1110), (8, 0)] {
            let (_, mut bytes) = example();
            bytes[at] = value;
            assert!(matches!(Node::decode(&bytes), Err(Problem::Field(_))), "byte {at} = {value}");
        }
        let (_, mut bytes) = example();
        bytes[16..48].fill(0);
        assert_eq!(Node::decode(&bytes), Err(Problem::Field("node child name")));
    }
}
