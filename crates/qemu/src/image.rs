//! Disk images, through `qemu-img`: what a file is, a new overlay over it, whether it is sound.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::binary::{self, BinaryError};
use crate::tool::{self, ToolError};

/// Looking at an image or making an empty one.
const QUICK: Duration = Duration::from_secs(30);
/// Checking a whole one.
const SLOW: Duration = Duration::from_secs(3600);

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// `qemu-img` is missing.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// `qemu-img` could not be run.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Another process has the image open for writing.
    #[error("{path} is in use by another process")]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// `qemu-img` failed.
    #[error("qemu-img {act} {path}: {reason}")]
    Failed {
        /// Its subcommand.
        act: &'static str,
        /// The image.
        path: PathBuf,
        /// Its words.
        reason: String,
    },
    /// A finished image could not be made durable.
    #[error("cannot sync {path}")]
    Sync {
        /// The image or its folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Format: "qcow2", "raw", "vmdk".
    pub format: String,
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// Its own backing file, if it has one.
    pub backing: Option<PathBuf>,
}

/// `qemu-img`.
#[derive(Clone, Debug)]
pub struct QemuImg {
    path: PathBuf,
}

impl QemuImg {
    /// Uses `path`; else the one beside `qemu`; else the one on PATH.
    pub fn find(path: Option<&Path>, qemu: Option<&Path>) -> Result<Self, BinaryError> {
        if let Some(path) = path {
            return Ok(Self { path: path.to_owned() });
        }
        let beside = qemu.and_then(Path::parent).map(|folder| folder.join("qemu-img"));
        match beside.filter(|file| file.is_file()) {
            Some(path) => Ok(Self { path }),
            None => Ok(Self { path: binary::on_path("qemu-img")? }),
        }
    }

    /// Looks at an image; fails with [`ImageError::InUse`] if somebody writes to it.
    pub fn info(&self, image: &Path) -> Result<ImageInfo, ImageError> {
        let output = self.run("info", image, &["--output=json".into(), "--".into(), image.into()], QUICK)?;
        let failed = |reason: &str| ImageError::Failed {
            act: "info",
            path: image.to_owned(),
            reason: reason.to_owned(),
        };
        let value: Value =
            serde_json::from_str(&output.stdout).map_err(|_| failed("no JSON in its answer"))?;
        let text = |key| value.get(key).and_then(Value::as_str);
        Ok(ImageInfo {
            format: text("format").ok_or_else(|| failed("no format in its answer"))?.to_owned(),
            virtual_size: value
                .get("virtual-size")
                .and_then(Value::as_u64)
                .ok_or_else(|| failed("no virtual size in its answer"))?,
            backing: text("full-backing-filename").or_else(|| text("backing-filename")).map(PathBuf::from),
        })
    }

    /// Makes an empty qcow2 image of `size` bytes over `backing` (its path as it is to stand in the header, its format),
    /// and makes the file and its folder durable.
    pub fn create(&self, image: &Path, size: u64, backing: Option<(&Path, &str)>) -> Result<(), ImageError> {
        let mut args: Vec<OsString> =
            ["-q", "-f", "qcow2", "-o", "lazy_refcounts=off,compat=1.1"].map(Into::into).into();
        if let Some((file, format)) = backing {
            // -u: the backing file may be open for writing in the machine that we are about to switch.
            args.extend(["-u".into(), "-b".into(), file.into(), "-F".into(), format.into()]);
        }
        args.extend(["--".into(), image.into(), size.to_string().into()]);
        self.run("create", image, &args, QUICK)?;
        let sync = |path: &Path| {
            File::open(path)
                .and_then(|file| file.sync_all())
                .map_err(|source| ImageError::Sync { path: path.to_owned(), source })
        };
        sync(image)?;
        image.parent().map_or(Ok(()), sync)
    }

    /// Checks a qcow2 image; `Ok(Some(words))` says what is wrong with it. Clusters that are allocated and unused do not
    /// count: a power cut leaves them and they harm nothing.
    pub fn check(&self, image: &Path) -> Result<Option<String>, ImageError> {
        let mut command = Command::new(&self.path);
        command.args(["check", "-q", "-U", "-f", "qcow2", "--"]).arg(image);
        let output = tool::run(command, SLOW)?;
        match output.code {
            // 3: leaked clusters only. 63: the format has no check.
            Some(0 | 3 | 63) => Ok(None),
            _ => Ok(Some(first_line(&output.stderr, &output.stdout))),
        }
    }

    fn run(
        &self,
        act: &'static str,
        image: &Path,
        args: &[OsString],
        limit: Duration,
    ) -> Result<tool::Output, ImageError> {
        let mut command = Command::new(&self.path);
        command.arg(act).args(args);
        let output = tool::run(command, limit)?;
        if output.success {
            return Ok(output);
        }
        if is_locked(&output.stderr) {
            return Err(ImageError::InUse { path: image.to_owned() });
        }
        let reason = first_line(&output.stderr, &output.stdout);
        Err(ImageError::Failed { act, path: image.to_owned(), reason })
    }
}

/// `Failed to get "write" lock`, `Failed to get shared "write" lock`.
fn is_locked(stderr: &str) -> bool {
    stderr.contains("Failed to get") && stderr.contains("lock")
}

fn first_line(stderr: &str, stdout: &str) -> String {
    let line = stderr.lines().chain(stdout.lines()).find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("it gave no reason");
    line.trim_start_matches("qemu-img: ").chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn img() -> QemuImg {
        QemuImg::find(None, None).expect("qemu-img is installed by `make setup`")
    }

    #[test]
    fn an_overlay_names_its_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.qcow2");
        img().create(&base, 1 << 20, None).unwrap();
        let top = dir.path().join("top.qcow2");
        img().create(&top, 1 << 20, Some((Path::new("base.qcow2"), "qcow2"))).unwrap();
        let info = img().info(&top).unwrap();
        assert_eq!((info.format.as_str(), info.virtual_size), ("qcow2", 1 << 20));
        assert_eq!(info.backing, Some(base));
        assert_eq!(img().check(&top).unwrap(), None);
    }

    #[test]
    fn a_broken_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let bad = dir.path().join("bad.qcow2");
        std::fs::write(&bad, b"QFI\xfb\x00\x00\x00\x03 and nothing else").unwrap();
        assert!(img().check(&bad).unwrap().is_some());
        let error = img().info(&dir.path().join("missing")).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
