//! Building a map from the leaves up.

use crate::PageHash;

use super::{FAN_OUT, Node, top_level};

/// Nodes of one level, in order; None where the subtree is empty.
pub(crate) type Level = Vec<Option<Vec<u8>>>;

/// Builds the map of `pages` level by level, leaves first. `store` names the nodes of a level and keeps them. Returns the
/// name of the top node.
pub(crate) fn levels<E>(
    pages: &[PageHash],
    mut store: impl FnMut(Level) -> Result<Vec<PageHash>, E>,
) -> Result<PageHash, E> {
    let mut below = pages.to_vec();
    for level in 0..=top_level(pages.len() as u64) {
        below = store(below.chunks(FAN_OUT).map(|children| Node::encode(level, children)).collect())?;
    }
    Ok(below.first().copied().unwrap_or(PageHash::ZERO))
}
