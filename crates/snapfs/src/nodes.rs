//! Numbers of files and folders. They follow from what a file is, so whoever takes over a connection gives the same.

use std::collections::HashMap;
use std::sync::Arc;

use pages::{MapRoot, PAGE_SIZE, PageHash};
use serde::{Deserialize, Serialize};

use crate::list::{Content, Listed};

/// The top folder.
pub(crate) const ROOT: u64 = 1;
/// The folder of memories.
pub(crate) const RAM: u64 = 2;
/// The folder of disks.
pub(crate) const DISK: u64 = 3;
/// All others are above.
const FIRST: u64 = 16;

/// What a file of a map is for, which decides what becomes of a read that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Use {
    /// Mapped by QEMU: an error would end it, so the read waits.
    Ram,
    /// Read by QEMU: an error is one of the guest's disk.
    Disk,
    /// Read by people.
    Shown,
}

/// What a map describes, as a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MapFile {
    /// The map.
    pub root: MapRoot,
    /// Length in bytes: what the map has room for, or less by a part of its last page.
    pub bytes: u64,
}

impl MapFile {
    /// The file of a map whose length is one of whole pages.
    pub fn of(root: MapRoot) -> Self {
        Self { root, bytes: root.pages.saturating_mul(PAGE_SIZE as u64) }
    }

    /// The name: HASH-BYTES.
    pub fn file_name(&self) -> String {
        let hash: String = self.root.node.0.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{hash}-{}", self.bytes)
    }

    /// What has this name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (hash, bytes) = name.split_once('-')?;
        if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()) {
            return None;
        }
        let mut node = [0; 32];
        for (to, pair) in node.iter_mut().zip(hash.as_bytes().chunks(2)) {
            *to = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        let length: u64 = bytes.parse().ok().filter(|length: &u64| length.to_string() == bytes)?;
        if length == 0 || length > i64::MAX as u64 {
            return None;
        }
        let root = MapRoot { node: PageHash(node), pages: length.div_ceil(PAGE_SIZE as u64) };
        Some(Self { root, bytes: length })
    }

    pub(crate) fn number(&self, used: Use) -> u64 {
        number(
            match used {
                Use::Ram => "ram",
                Use::Disk => "disk",
                Use::Shown => "shown",
            },
            &self.file_name(),
        )
    }
}

/// A file or folder.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    /// A folder, with the time of the newest snapshot below.
    Folder {
        entries: Vec<(String, u64)>,
        time: i64,
    },
    Map {
        file: MapFile,
        used: Use,
        time: i64,
    },
    Text {
        text: Arc<str>,
        time: i64,
    },
}

/// Folders and files for people.
#[derive(Debug, Default)]
pub(crate) struct Tree(HashMap<u64, Node>);

impl Tree {
    /// What is listed.
    pub(crate) fn of<'a>(all: impl Iterator<Item = &'a Listed>) -> Self {
        let mut nodes: HashMap<u64, Node> = HashMap::new();
        let mut top: Vec<(String, u64)> = Vec::new();
        for one in all {
            let time = one.time;
            let mut entries = Vec::new();
            for file in &one.files {
                let (own, node) = match &file.content {
                    Content::Map { root, bytes } => {
                        let file = MapFile { root: *root, bytes: *bytes };
                        (file.number(Use::Shown), Node::Map { file, used: Use::Shown, time })
                    }
                    Content::Text(text) => {
                        let node = Node::Text { text: Arc::from(text.as_str()), time };
                        (number("text", &format!("{}/{}/{text}", one.id, file.name)), node)
                    }
                };
                nodes.entry(own).or_insert(node);
                entries.push((file.name.clone(), own));
            }
            let own = number("snapshot", &one.id);
            nodes.insert(own, Node::Folder { entries, time });
            let target = number("target", &one.target);
            if let Node::Folder { entries, time } =
                nodes.entry(target).or_insert_with(|| Node::Folder { entries: Vec::new(), time: 0 })
            {
                if entries.is_empty() {
                    top.push((one.target.clone(), target));
                }
                *time = one.time.max(*time);
                entries.push((one.name.clone(), own));
            }
        }
        let time = nodes.values().map(Node::time).max().unwrap_or(0);
        nodes.insert(ROOT, Node::Folder { entries: top, time });
        for node in nodes.values_mut() {
            if let Node::Folder { entries, .. } = node {
                entries.sort();
            }
        }
        Self(nodes)
    }

    pub(crate) fn get(&self, number: u64) -> Option<&Node> {
        self.0.get(&number)
    }
}

impl Node {
    pub(crate) fn time(&self) -> i64 {
        match self {
            Self::Folder { time, .. } | Self::Map { time, .. } | Self::Text { time, .. } => *time,
        }
    }

    /// What a folder has under a name.
    pub(crate) fn entry(&self, name: &str) -> Option<u64> {
        let Self::Folder { entries, .. } = self else { return None };
        let found = entries.binary_search_by(|(own, _)| own.as_str().cmp(name)).ok()?;
        entries.get(found).map(|(_, number)| *number)
    }
}

/// A number that nothing else has: 64 bits of a hash.
fn number(kind: &str, name: &str) -> u64 {
    let hash = blake3::hash(format!("{kind}/{name}").as_bytes());
    let mut bytes = [0; 8];
    bytes.iter_mut().zip(hash.as_bytes()).for_each(|(to, from)| *to = *from);
    // Some programs take numbers for signed ones.
    let number = u64::from_le_bytes(bytes) >> 1;
    if number < FIRST { number + FIRST } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::list::ListedFile;

    #[test]
    fn names_of_maps_are_read_back_and_others_are_not() {
        let file = MapFile { root: MapRoot { node: PageHash([0xa5; 32]), pages: 3 }, bytes: 8193 };
        assert_eq!(MapFile::parse(&file.file_name()), Some(file));
        let hash = "a5".repeat(32);
        for bad in [
            String::new(),
            hash.clone(),
            format!("{hash}-0"),
            format!("{hash}-01"),
            format!("{hash}-+1"),
            format!("{hash}-9223372036854775808"),
            format!("{}-1", hash.to_uppercase()),
            format!("{}-1", &hash[1..]),
            format!("é{}-1", &hash[2..]),
        ] {
            assert_eq!(MapFile::parse(&bad), None, "{bad:?}");
        }
        assert_ne!(file.number(Use::Ram), file.number(Use::Disk));
    }

    #[test]
    fn a_tree_has_what_is_listed() {
        let root = MapRoot { node: PageHash([7; 32]), pages: 2 };
        let listed = |id: &str, target: &str, name: &str, time| Listed {
            id: id.into(),
            target: target.into(),
            name: name.into(),
            time,
            files: vec![
                ListedFile { name: "ram".into(), content: Content::Map { root, bytes: 8192 } },
                ListedFile { name: "note".into(), content: Content::Text(name.into()) },
            ],
        };
        let all = [listed("1", "web", "b", 5), listed("2", "web", "a", 9), listed("3", "db", "a", 1)];
        let tree = Tree::of(all.iter());
        let walk = |path: &str| path.split('/').try_fold(ROOT, |at, name| tree.get(at)?.entry(name));
        let folder = |number| match tree.get(number).unwrap() {
            Node::Folder { entries, time } => {
                (entries.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>().join(" "), *time)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(folder(ROOT), ("db web".into(), 9));
        assert_eq!(folder(walk("web").unwrap()), ("a b".into(), 9));
        assert_eq!(folder(walk("web/b").unwrap()), ("note ram".into(), 5));
        assert_eq!(walk("web/a/ram"), walk("db/a/ram"), "equal content is one file");
        assert_ne!(walk("web/a/note"), walk("db/a/note"));
        assert_eq!(walk("web/c"), None);
        assert_eq!(walk("web/a/ram/x"), None);
    }
}
