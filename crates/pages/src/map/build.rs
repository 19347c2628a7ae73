//! Building a map: leaves, then level by level up to the top.

use crate::PageHash;

use super::{FAN_OUT, Node, top_level};

/// Children whose nodes are encoded together: half a MiB of nodes.
const PART: usize = 256 * FAN_OUT;

/// Nodes of one level that follow each other, in order; None where the subtree is empty.
pub(crate) type Level = Vec<Option<Vec<u8>>>;

/// Encodes the nodes of a level over their children, a part at a time; `store` names nodes and keeps them. Returns the names.
pub(crate) fn level<E>(
    level: u8,
    children: &[PageHash],
    mut store: impl FnMut(Level) -> Result<Vec<PageHash>, E>,
) -> Result<Vec<PageHash>, E> {
    let mut names = Vec::with_capacity(children.len().div_ceil(FAN_OUT));
    for part in children.chunks(PART) {
        names.extend(store(part.chunks(FAN_OUT).map(|children| Node::encode(level, children)).collect())?);
    }
    Ok(names)
}

/// Builds the map of `pages` pages over its leaves, level by level. Returns the name of the top node.
pub(crate) fn levels<E>(
    leaves: &[PageHash],
    pages: u64,
    mut store: impl FnMut(Level) -> Result<Vec<PageHash>, E>,
) -> Result<PageHash, E> {
    let mut below = leaves.to_vec();
    for number in 1..=top_level(pages) {
        below = level(number, &below, &mut store)?;
    }
    Ok(below.first().copied().unwrap_or(PageHash::ZERO))
}
