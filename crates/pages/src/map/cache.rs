//! Decoded nodes that were used lately.

use std::collections::HashMap;
use std::sync::Arc;

use super::Node;
use crate::PageHash;
use crate::sync::{Mutex, lock};

/// Nodes in one generation; two generations of full nodes take about 1 MiB.
const GENERATION: usize = 256;

/// Two generations: what is used moves to the young one; when that is full, the old one goes.
#[derive(Default)]
pub(crate) struct NodeCache(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    young: HashMap<PageHash, Arc<Node>>,
    old: HashMap<PageHash, Arc<Node>>,
}

impl NodeCache {
    pub(crate) fn get(&self, name: &PageHash) -> Option<Arc<Node>> {
        let mut cache = lock(&self.0);
        if let Some(node) = cache.young.get(name) {
            return Some(node.clone());
        }
        let node = cache.old.remove(name)?;
        cache.put(*name, node.clone());
        Some(node)
    }

    pub(crate) fn put(&self, name: PageHash, node: Arc<Node>) {
        lock(&self.0).put(name, node);
    }
}

impl Generations {
    fn put(&mut self, name: PageHash, node: Arc<Node>) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(name, node);
    }
}
