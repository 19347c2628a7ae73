//! Reading a stretch of a map.

use crate::error::{Error, Result};
use crate::store::Inner;
use crate::{MapRoot, PageHash};

use super::{FAN_OUT, span, top_level};

impl Inner {
    /// See [`crate::PageStore::map_range`].
    pub(crate) fn map_range(&self, root: &MapRoot, first: u64, out: &mut [PageHash]) -> Result<()> {
        let end = first.saturating_add(out.len() as u64);
        if end > root.pages {
            return Err(Error::PastEnd { first, end, pages: root.pages });
        }
        self.fill(root.node, top_level(root.pages), first, out)
    }

    /// Fills `out` with the names from `first` on, counted from the start of this subtree.
    fn fill(&self, name: PageHash, level: u8, first: u64, out: &mut [PageHash]) -> Result<()> {
        if name == PageHash::ZERO || out.is_empty() {
            out.fill(PageHash::ZERO);
            return Ok(());
        }
        let node = self.node(&name, level)?;
        let span = span(level);
        let (mut child, mut skip, mut rest) = (first / span, first % span, out);
        while !rest.is_empty() && child < FAN_OUT as u64 {
            let len = rest.len().min(usize::try_from(span - skip).unwrap_or(usize::MAX));
            let (part, behind) = rest.split_at_mut(len);
            let below = node.child(child as u32);
            match level.checked_sub(1) {
                None => part.fill(below),
                Some(lower) => self.fill(below, lower, skip, part)?,
            }
            (child, skip, rest) = (child + 1, 0, behind);
        }
        Ok(())
    }
}
