//! What is listed for people: written by whoever has the catalog, read by whoever serves. A file of lines, to which is only ever added;
//! when most of it has become void it is begun anew, under a new mark in its first line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use pages::MapRoot;
use serde::{Deserialize, Serialize};

/// Longest list that is read: a line of some kilobytes for each of a hundred thousand snapshots.
const LIMIT: u64 = 1 << 30;
/// Length of the first line, which is the mark.
const MARK: usize = 17;

/// A snapshot as people see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its id, which never changes.
    pub id: String,
    /// Name of its target: the folder above.
    pub target: String,
    /// Its name: the folder.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub time: i64,
    /// What is in the folder.
    pub files: Vec<ListedFile>,
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedFile {
    /// Name.
    pub name: String,
    /// What it holds.
    pub content: Content,
}

/// What a listed file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// The first `bytes` of what a map describes.
    Map {
        /// The map.
        root: MapRoot,
        /// Length in bytes.
        bytes: u64,
    },
    /// These words.
    Text(String),
}

/// A line.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// This snapshot is there, in this form.
    Is(Listed),
    /// This one is not there any more.
    Gone(String),
}

/// Writes a list.
#[derive(Debug)]
pub struct ListWriter {
    file: File,
    end: u64,
    /// Bytes of lines that later ones have made void.
    void: u64,
    /// Length of each snapshot's last line, by id.
    known: BTreeMap<String, u64>,
}

impl ListWriter {
    /// Begins a list anew in a file that is open for writing. `mark` tells it from what was there before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(file: File, mark: u64, all: &[Listed]) -> io::Result<Self> {
        let mut writer = Self { file, end: 0, void: 0, known: BTreeMap::new() };
        writer.rewrite(mark, all)?;
        Ok(writer)
    }

    fn rewrite(&mut self, mark: u64, all: &[Listed]) -> io::Result<()> {
        let mut bytes = format!("{mark:016x}\n").into_bytes();
        self.known.clear();
        for one in all {
            let from = bytes.len();
            line(&mut bytes, &Line::Is(one.clone()))?;
            self.known.insert(one.id.clone(), (bytes.len() - from) as u64);
        }
        // Whoever reads meanwhile finds a mark that he does not know, and begins anew.
        self.file.set_len(0)?;
        self.file.write_all_at(&bytes, 0)?;
        (self.end, self.void) = (bytes.len() as u64, 0);
        Ok(())
    }

    /// Adds what has changed: snapshots in the form that they have now, and ids of those that are gone.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, now: &[Listed], gone: &[String]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for one in now {
            let from = bytes.len();
            line(&mut bytes, &Line::Is(one.clone()))?;
            let old = self.known.insert(one.id.clone(), (bytes.len() - from) as u64);
            self.void += old.unwrap_or(0);
        }
        for id in gone {
            let from = bytes.len();
            line(&mut bytes, &Line::Gone(id.clone()))?;
            self.void += self.known.remove(id).unwrap_or(0) + (bytes.len() - from) as u64;
        }
        self.file.write_all_at(&bytes, self.end)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// More than half of it is void: it should be begun anew.
    pub fn is_mostly_void(&self) -> bool {
        self.void > 1 << 20 && self.void > self.end / 2
    }

    /// Ids of what is listed.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.known.keys().map(String::as_str)
    }

    /// The file, to begin anew with.
    pub fn into_file(self) -> File {
        self.file
    }
}

fn line(bytes: &mut Vec<u8>, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *bytes, line)?;
    bytes.write_all(b"\n")
}

/// Reads a list, and what is added to it later.
#[derive(Debug)]
pub struct ListReader {
    file: File,
    mark: [u8; MARK],
    read: u64,
    rest: Vec<u8>,
    all: BTreeMap<String, Listed>,
}

impl ListReader {
    /// Reads from a file that is open for reading.
    pub fn new(file: File) -> Self {
        Self { file, mark: [0; MARK], read: 0, rest: Vec::new(), all: BTreeMap::new() }
    }

    /// Looks what has been added. True if anything has.
    ///
    /// # Errors
    /// The file cannot be read, or is impossibly long.
    pub fn look(&mut self) -> io::Result<bool> {
        let mut mark = [0; MARK];
        match self.file.read_exact_at(&mut mark, 0) {
            // It is being begun anew just now.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            read => read?,
        }
        let mut changed = false;
        if mark != self.mark {
            (self.mark, self.read, changed) = (mark, MARK as u64, true);
            self.rest.clear();
            self.all.clear();
        }
        let len = self.file.metadata()?.len();
        if len > LIMIT {
            return Err(io::Error::other("the list is impossibly long"));
        }
        let Some(more) = len.checked_sub(self.read).filter(|more| *more > 0) else { return Ok(changed) };
        let from = self.rest.len();
        self.rest.resize(from + more as usize, 0);
        let Some(new) = self.rest.get_mut(from..) else { return Ok(changed) };
        self.file.read_exact_at(new, self.read)?;
        self.read += more;
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let lines: Vec<u8> = self.rest.drain(..whole).collect();
        for text in lines.split(|byte| *byte == b'\n').filter(|text| !text.is_empty()) {
            match serde_json::from_slice(text) {
                Ok(Line::Is(one)) => drop(self.all.insert(one.id.clone(), one)),
                Ok(Line::Gone(id)) => drop(self.all.remove(&id)),
                Err(error) => tracing::warn!(%error, "a line of the list is not understood"),
            }
        }
        Ok(changed || whole > 0)
    }

    /// All that is listed.
    pub fn all(&self) -> impl Iterator<Item = &Listed> {
        self.all.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(id: &str, name: &str) -> Listed {
        let files = vec![ListedFile { name: "snapshot.json".into(), content: Content::Text(name.into()) }];
        Listed { id: id.into(), target: "web".into(), name: name.into(), time: 5, files }
    }

    fn names(reader: &ListReader) -> Vec<String> {
        reader.all().map(|one| one.name.clone()).collect()
    }

    #[test]
    fn what_is_added_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        let open =
            || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let mut reader = ListReader::new(open());
        assert!(!reader.look().unwrap(), "nothing yet");
        let mut writer = ListWriter::begin(open(), 1, &[listed("a", "one")]).unwrap();
        assert!(reader.look().unwrap());
        assert_eq!(names(&reader), ["one"]);
        assert!(!reader.look().unwrap());
        writer.add(&[listed("b", "two"), listed("a", "renamed")], &[]).unwrap();
        assert!(reader.look().unwrap());
        assert_eq!(names(&reader), ["renamed", "two"]);
        writer.add(&[], &["a".into(), "nobody".into()]).unwrap();
        reader.look().unwrap();
        assert_eq!(names(&reader), ["two"]);
        let writer = ListWriter::begin(writer.into_file(), 2, &[listed("c", "three")]).unwrap();
        reader.look().unwrap();
        assert_eq!(names(&reader), ["three"]);
        assert_eq!(writer.ids().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn a_list_that_is_cut_or_spoilt_harms_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        let file =
            || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        ListWriter::begin(file(), 1, &[listed("a", "one"), listed("b", "two")]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let mut reader = ListReader::new(file());
            reader.look().unwrap();
            assert!(reader.all().count() <= 2);
            std::fs::write(&path, &whole).unwrap();
            reader.look().unwrap();
            assert_eq!(names(&reader), ["one", "two"], "cut to {len} for a moment");
        }
        let mut spoilt = whole.clone();
        spoilt[20..30].fill(b'x');
        std::fs::write(&path, &spoilt).unwrap();
        let mut reader = ListReader::new(file());
        reader.look().unwrap();
        assert_eq!(names(&reader), ["two"]);
    }
}
