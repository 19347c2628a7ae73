//! Page maps: radix trees over page names, content-addressed node by node (`docs/formats/pages.md`, "Maps").
//!
//! A node has 64 children, so a leaf covers 256 KiB of guest memory. Why 64 is in `docs/decisions/0002-map-fan-out.md`.

mod build;
mod cache;
mod change;
mod forest;
mod node;
mod range;

pub(crate) use build::{Level, level, levels};
pub(crate) use cache::NodeCache;
pub(crate) use change::{NumberedLeaf, change, differences};
pub(crate) use forest::{Child, Forest};
pub(crate) use node::{MAX_NODE, Node};

/// Children of a node.
pub(crate) const FAN_OUT: usize = 64;

/// Level of the top node of a map of `pages` pages; a leaf has level 0.
pub(crate) fn top_level(pages: u64) -> u8 {
    let mut level = 0;
    while span(level + 1) < pages {
        level += 1;
    }
    level
}

/// Pages under one child of a node of this level; `u64::MAX` if that does not fit.
pub(crate) fn span(level: u8) -> u64 {
    1u64.checked_shl(6 * u32::from(level)).filter(|_| level <= 10).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_grows_with_the_image() {
        for (pages, level) in [
            (0, 0),
            (1, 0),
            (64, 0),
            (65, 1),
            (4096, 1),
            (4097, 2),
            (262_144, 2),
            (262_145, 3),
            (u64::MAX, 10),
        ] {
            assert_eq!(top_level(pages), level, "{pages} pages");
        }
    }
}
