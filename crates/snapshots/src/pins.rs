//! Layers that are in use and that no row of the catalog needs: those that a clone is being copied from.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fault::{Fault, planted};

/// How often each layer is pinned.
#[derive(Debug, Default)]
pub(crate) struct PinnedLayers(Mutex<HashMap<String, usize>>);

/// Keeps layers, and what they lie over, from the collector until dropped.
#[derive(Debug)]
pub(crate) struct Pins<'a> {
    pinned: &'a PinnedLayers,
    layers: Vec<String>,
}

impl PinnedLayers {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins these layers, and with each all that it lies over. To be called where the catalog is read in which they are found: the collector
    /// asks while it writes there.
    pub(crate) fn pin(&self, layers: impl IntoIterator<Item = String>) -> Pins<'_> {
        let layers: Vec<String> = layers.into_iter().collect();
        let mut pinned = self.lock();
        for layer in &layers {
            *pinned.entry(layer.clone()).or_default() += 1;
        }
        Pins { pinned: self, layers }
    }

    /// The same for the top layers of disks.
    pub(crate) fn pin_disks(&self, disks: &[(String, String)]) -> Pins<'_> {
        self.pin(disks.iter().map(|(_, top)| top.clone()))
    }

    /// The layers that are pinned, without what they lie over.
    pub(crate) fn all(&self) -> Vec<String> {
        if planted(Fault::NoPins) { Vec::new() } else { self.lock().keys().cloned().collect() }
    }
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        let mut pinned = self.pinned.lock();
        for layer in &self.layers {
            if let Some(count) = pinned.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    pinned.remove(layer);
                }
            }
        }
    }
}
