//! Maps that differ little from others: building one, and finding where two differ. Both cost what differs, not what there is.

use std::ops::Range;

use crate::error::Result;
use crate::store::Inner;
use crate::{LEAF_PAGES, MapRoot, PageHash};

use super::{FAN_OUT, Level, Node, span, top_level};

/// A leaf of a map: its number, from 0, and its name.
pub(crate) type NumberedLeaf = (u64, PageHash);

/// Names the map that has these leaves, in ascending order, and is `base` otherwise. `store` names nodes and keeps them.
pub(crate) fn change(
    read: &Inner,
    base: &MapRoot,
    leaves: &[NumberedLeaf],
    store: &mut dyn FnMut(Level) -> Result<Vec<PageHash>>,
) -> Result<PageHash> {
    change_node(read, base.node, top_level(base.pages), 0, leaves, store)
}

/// The same for a node whose first leaf has the number `first`.
fn change_node(
    read: &Inner,
    name: PageHash,
    level: u8,
    first: u64,
    leaves: &[NumberedLeaf],
    store: &mut dyn FnMut(Level) -> Result<Vec<PageHash>>,
) -> Result<PageHash> {
    let (Some(_), Some(below)) = (leaves.first(), level.checked_sub(1)) else {
        return Ok(leaves.first().map_or(name, |(_, leaf)| *leaf));
    };
    let mut children = children(read, name, level)?;
    let span = span(level) / LEAF_PAGES as u64;
    let child = |leaf: &NumberedLeaf| (leaf.0 - first) / span;
    for part in leaves.chunk_by(|a, b| child(a) == child(b)) {
        let number = part.first().map_or(0, child);
        let Some(slot) = children.get_mut(number as usize) else { continue };
        *slot = change_node(read, *slot, below, first + number * span, part, store)?;
    }
    let names = store(vec![Node::encode(level, &children)])?;
    Ok(names.first().copied().unwrap_or(PageHash::ZERO))
}

/// The stretches of pages, in ascending order and at most a leaf long, that are not the same in two maps of the same length.
pub(crate) fn differences(
    read: &Inner,
    one: &MapRoot,
    other: &MapRoot,
    each: &mut dyn FnMut(Range<u64>) -> bool,
) -> Result<bool> {
    compare(read, one.node, other.node, top_level(one.pages), 0, each)
}

/// False once `each` wants no more.
fn compare(
    read: &Inner,
    one: PageHash,
    other: PageHash,
    level: u8,
    first: u64,
    each: &mut dyn FnMut(Range<u64>) -> bool,
) -> Result<bool> {
    if one == other {
        return Ok(true);
    }
    let (ones, others) = (children(read, one, level)?, children(read, other, level)?);
    let span = span(level);
    match level.checked_sub(1) {
        Some(below) => {
            for ((one, other), number) in ones.iter().zip(&others).zip(0..) {
                if !compare(read, *one, *other, below, first + number * span, each)? {
                    return Ok(false);
                }
            }
        }
        None => {
            let differs: Vec<bool> = ones.iter().zip(&others).map(|(one, other)| one != other).collect();
            let mut at = first;
            for run in differs.chunk_by(|a, b| a == b) {
                let end = at + run.len() as u64;
                if run.first() == Some(&true) && !each(at..end) {
                    return Ok(false);
                }
                at = end;
            }
        }
    }
    Ok(true)
}

/// All children of a node, those of an empty one too.
fn children(read: &Inner, name: PageHash, level: u8) -> Result<[PageHash; FAN_OUT]> {
    let mut children = [PageHash::ZERO; FAN_OUT];
    if name != PageHash::ZERO {
        let node = read.node(&name, level)?;
        children.iter_mut().zip(0..).for_each(|(child, number)| *child = node.child(number));
    }
    Ok(children)
}
