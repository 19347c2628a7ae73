//! Building a map from the leaves up.

use crate::PageHash;

use super::{FAN_OUT, Node, top_level};

/// Children whose nodes are encoded together: half a MiB of nodes.
const PART: usize = 256 * FAN_OUT;

/// Nodes of one level that follow each other, in order; None where the subtree is empty.
pub(crate) type Level = Vec<Option<Vec<u8>>>;

/// Builds the map of `pages` level by level, leaves first. `store` names nodes of a level and keeps them. Returns the
/// name of the top node.
pub(crate) fn levels<E>(
    pages: &[PageHash],
    mut store: impl FnMut(Level) -> Result<Vec<PageHash>, E>,
) -> Result<PageHash, E> {
    let mut below = Vec::new();
    for level in 0..=top_level(pages.len() as u64) {
        let children = if level == 0 { pages } else { &below[..] };
        let mut names = Vec::with_capacity(children.len().div_ceil(FAN_OUT));
        for part in children.chunks(PART) {
            names
                .extend(store(part.chunks(FAN_OUT).map(|children| Node::encode(level, children)).collect())?);
        }
        below = names;
    }
    Ok(below.first().copied().unwrap_or(PageHash::ZERO))
}
