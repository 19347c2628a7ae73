//! Images: files of others that never change, whose blocks are pages. Such a pack has their names and no body.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::codec::Reader;
use crate::error::Problem;

/// Bytes before label and path.
const FIXED: usize = 32;
/// Bytes of a label or a path at most.
const TEXT: usize = 4096;
const PRIVATE: u32 = 1;

/// The file whose blocks are the pages of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// What the caller calls it.
    pub(crate) label: String,
    /// Relative to the store's folder, or absolute.
    pub(crate) path: PathBuf,
    /// Length in bytes when it was hashed.
    pub(crate) bytes: u64,
    /// When it was last changed, in nanoseconds since 1970, when it was hashed.
    pub(crate) modified: i128,
    /// Only who says so relies on it: a file that its owner may change or take away. See [`crate::Purpose`].
    pub(crate) private: bool,
    /// A large file is several packs: which of them this is, from 0 ...
    pub(crate) part: u32,
    /// ... and how many there are.
    pub(crate) parts: u32,
}

impl Image {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (label, path) = (self.label.as_bytes(), self.path.as_os_str().as_bytes());
        let mut out = self.bytes.to_le_bytes().to_vec();
        out.extend((self.modified as i64).to_le_bytes());
        out.extend(if self.private { PRIVATE } else { 0 }.to_le_bytes());
        out.extend((label.len() as u16).to_le_bytes());
        out.extend((path.len() as u16).to_le_bytes());
        out.extend(self.part.to_le_bytes());
        out.extend(self.parts.to_le_bytes());
        out.extend(label);
        out.extend(path);
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Problem> {
        let impossible = Problem::Field("description of an image");
        let mut reader = Reader::new(bytes);
        let (len, modified, flags) = (reader.u64()?, reader.u64()? as i64, reader.u32()?);
        let (label, path) = (usize::from(reader.u16()?), usize::from(reader.u16()?));
        let (part, parts) = (reader.u32()?, reader.u32()?);
        let text = bytes.get(FIXED..).ok_or(Problem::TooShort)?;
        let (label, path) = match text.split_at_checked(label) {
            Some((label, rest)) if rest.len() == path => (label, rest),
            _ => return Err(impossible),
        };
        if flags > PRIVATE || part >= parts || label.len() > TEXT || path.is_empty() || path.len() > TEXT {
            return Err(impossible);
        }
        Ok(Self {
            label: String::from_utf8(label.to_vec()).map_err(|_| impossible)?,
            path: PathBuf::from(OsStr::from_bytes(path)),
            bytes: len,
            modified: modified.into(),
            private: flags & PRIVATE != 0,
            part,
            parts,
        })
    }

    /// Where the file is, for a store in `folder`.
    pub(crate) fn file(&self, folder: &Path) -> PathBuf {
        // People read it.
        match (self.path.strip_prefix(".."), folder.parent()) {
            (Ok(beside), Some(parent)) => parent.join(beside),
            _ => folder.join(&self.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand from the document of the format.
    fn example() -> (Image, Vec<u8>) {
        let image = Image {
            label: "ab".into(),
            path: "../x".into(),
            bytes: 0x0102,
            modified: 0x0304,
            private: true,
            part: 5,
            parts: 7,
        };
        let mut bytes = vec![2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0];
        bytes.extend([1, 0, 0, 0, 2, 0, 4, 0, 5, 0, 0, 0, 7, 0, 0, 0]);
        bytes.extend(b"ab../x");
        (image, bytes)
    }

    #[test]
    fn is_the_documented_bytes() {
        let (image, bytes) = example();
        assert_eq!(image.encode(), bytes);
        assert_eq!(Image::decode(&bytes), Ok(image));
    }

    #[test]
    fn cuts_and_contradictions_fail() {
        let (_, bytes) = example();
        for len in 0..bytes.len() {
            assert!(Image::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        for (at, value) in [(16, 2), (20, 3), (22, 9), (24, 7), (32, 0xff)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(Image::decode(&bad).is_err(), "byte {at} = {value}");
        }
    }
}
