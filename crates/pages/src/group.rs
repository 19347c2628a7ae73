//! A group's key, and the names that follow from it.
//!
//! Every name is a keyed hash, so equal pages of two groups have unrelated names, and nobody without the key can tell from
//! a store whether it holds a page that he knows.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::hash::{NODE, keyed_nodes, keyed_pages};
use crate::{PAGE_SIZE, PageHash};

/// The secret of one group. Two stores with one key are one circle of trust.
#[derive(Clone, PartialEq, Eq)]
pub struct GroupKey([u8; 32]);

impl GroupKey {
    /// A fresh random key. Fails if the system has no randomness to give.
    pub fn generate() -> Result<Self> {
        Ok(Self(random()?))
    }

    /// A key from bytes kept elsewhere.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Makes a fresh key and writes it to a new file that only its owner may read. Fails if the file exists.
    pub fn create_file(path: &Path) -> Result<Self> {
        let key = Self::generate()?;
        key.write_file(path)?;
        Ok(key)
    }

    /// Reads a key file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        match crate::hash_hex::parse(text.trim_end()) {
            Some(bytes) => Ok(Self(bytes)),
            None => Err(Error::BadKey { path: path.to_owned() }),
        }
    }

    /// Writes the key to a new file, durably: file, then folder.
    pub(crate) fn write_file(&self, path: &Path) -> Result<()> {
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create_new(true).mode(0o600).open(path).map_err(Error::io("create", path))?;
        file.write_all(format!("{}\n", crate::hash_hex::text(&self.0)).as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(Error::io("write", path))?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))
    }
}

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupKey(..)")
    }
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::io("read", Path::new("system randomness"))(io::Error::other(e.to_string())))?;
    Ok(bytes)
}

/// Nodes that are worth hashing side by side, though there is room for eight: fewer are faster one by one.
const FEWEST: usize = 3;

/// What is derived from a key: one naming key for pages, another for map nodes, so that the two never share a name, and
/// a fingerprint by which a pack tells whose it is.
pub(crate) struct Names {
    page: [u8; 32],
    node: [u8; 32],
    /// Written into each pack.
    pub(crate) fingerprint: [u8; 16],
}

impl Names {
    pub(crate) fn new(key: &GroupKey) -> Self {
        let mut fingerprint = [0; 16];
        blake3::Hasher::new_derive_key("Spinney page store v1, group fingerprint")
            .update(&key.0)
            .finalize_xof()
            .fill(&mut fingerprint);
        Self {
            page: blake3::derive_key("Spinney page store v1, names of pages", &key.0),
            node: blake3::derive_key("Spinney page store v1, names of map nodes", &key.0),
            fingerprint,
        }
    }

    /// Name of a page that is not all zero.
    pub(crate) fn page(&self, page: &[u8; PAGE_SIZE]) -> PageHash {
        PageHash(*blake3::keyed_hash(&self.page, page).as_bytes())
    }

    /// Calls `named` with the number and the name of each page; none is all zero. Twice as fast as one by one.
    pub(crate) fn pages<'a>(
        &self,
        pages: impl IntoIterator<Item = &'a [u8; PAGE_SIZE]>,
        mut named: impl FnMut(usize, PageHash),
    ) {
        keyed_pages(&self.page, pages, |number, name| named(number, PageHash(name)));
    }

    /// Names of encoded map nodes that may be empty. Those that are full are hashed side by side, three or more of them.
    pub(crate) fn nodes(&self, nodes: &[Option<Vec<u8>>]) -> Vec<PageHash> {
        let full = |node: &Option<Vec<u8>>| node.as_ref().is_some_and(|node| node.len() == NODE);
        let together = nodes.iter().filter(|node| full(node)).count() >= FEWEST;
        let alone = |node: &Option<Vec<u8>>| match node {
            Some(_) if together && full(node) => PageHash::ZERO,
            Some(node) => self.node(node),
            None => PageHash::ZERO,
        };
        let mut names: Vec<PageHash> = nodes.iter().map(alone).collect();
        if together {
            let both = names.iter_mut().zip(nodes).filter_map(|(name, node)| {
                let node: &[u8; NODE] = node.as_deref()?.try_into().ok()?;
                Some((name, node))
            });
            let (mut places, full): (Vec<_>, Vec<_>) = both.unzip();
            keyed_nodes(&self.node, &full, |number, name| {
                if let Some(place) = places.get_mut(number) {
                    **place = PageHash(name);
                }
            });
        }
        names
    }

    /// Name of an encoded map node.
    pub(crate) fn node(&self, node: &[u8]) -> PageHash {
        PageHash(*blake3::keyed_hash(&self.node, node).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn key_file_is_private_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = GroupKey::create_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(GroupKey::load(&path).unwrap(), key);
        assert!(GroupKey::create_file(&path).is_err(), "an existing key is never replaced");
        assert_eq!(format!("{key:?}"), "GroupKey(..)");
        fs::write(&path, "abcd").unwrap();
        assert!(matches!(GroupKey::load(&path), Err(Error::BadKey { .. })));
    }

    #[test]
    fn nodes_have_the_same_names_alone_and_together() {
        let names = Names::new(&GroupKey::from_bytes([1; 32]));
        for count in [0, 1, 2, 3, 17, 40] {
            // Full ones, with others and empty ones among them.
            let node = |i: usize| match i % 5 {
                4 => None,
                3 => Some(vec![i as u8; NODE - 32]),
                _ => Some(vec![i as u8; NODE]),
            };
            let nodes: Vec<_> = (0..count).map(node).collect();
            let alone =
                |node: &Option<Vec<u8>>| node.as_ref().map_or(PageHash::ZERO, |node| names.node(node));
            assert_eq!(names.nodes(&nodes), nodes.iter().map(alone).collect::<Vec<_>>());
        }
    }

    #[test]
    fn names_depend_on_group_and_kind() {
        let (a, b) = (GroupKey::from_bytes([1; 32]), GroupKey::from_bytes([2; 32]));
        let page = [7; PAGE_SIZE];
        assert_ne!(Names::new(&a).page(&page), Names::new(&b).page(&page));
        assert_ne!(Names::new(&a).page(&page), Names::new(&a).node(&page));
        assert_ne!(Names::new(&a).fingerprint, Names::new(&b).fingerprint);
    }
}
