//! Disk images, through `qemu-img`: what a file is, a new overlay over it, whether it is sound.
//!
//! Starting `qemu-img` takes thirty milliseconds and more, which every take and goto would wait for. So the first overlay of each
//! shape is made by it, and the next ones are copies of that with another name of the same length in the header.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::Advice;
use serde::Deserialize;
use serde_json::Value;

use crate::binary::{self, BinaryError};
use crate::qcow2;
use crate::tool::{self, ToolError};

/// Looking at an image or making an empty one.
const QUICK: Duration = Duration::from_secs(30);
/// Checking a whole one.
const SLOW: Duration = Duration::from_secs(3600);
/// How often it is looked what has come to a copy that is to be written back ...
const WRITE_BACK_EVERY: Duration = Duration::from_millis(20);
/// ... and bytes of it that the disk is given at a time: whoever ends the copy waits for so many.
const WRITE_BACK: u64 = 64 << 20;

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
    /// The caller did not want it any more.
    #[error("the copy of {path} was stopped")]
    Stopped {
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
    /// An image's header could not be read.
    #[error("the header of {path} cannot be read")]
    Header {
        /// The image.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A copy of an empty image could not be written.
    #[error("cannot make {path}")]
    Copy {
        /// The image.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A finished image could not be made durable.
    #[error("cannot sync {path}")]
    Sync {
        /// The image or its folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
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

/// `qemu-img`. Clones share what they have made.
#[derive(Clone, Debug)]
pub struct QemuImg {
    path: PathBuf,
    /// Whom it runs as, by user and group id, if that is somebody else than we are.
    user: Option<(u32, u32)>,
    /// Empty overlays to copy.
    overlays: Arc<Mutex<HashMap<Shape, Template>>>,
}

/// In what empty overlays differ, but for the name of the backing file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shape {
    size: u64,
    format: String,
    name_bytes: usize,
}

/// The bytes of an empty overlay.
#[derive(Clone, Debug)]
struct Template {
    bytes: Arc<[u8]>,
    /// Where the name of the backing file stands.
    name_at: usize,
}

/// A stretch of an image's file that holds data of the image as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataExtent {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A stretch of what an image shows, where it does not let what lies below through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where it begins, in bytes as the guest counts them.
    pub start: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// What is there.
    pub content: Content,
}

/// What an image has in a stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// What lies at this offset of its file.
    At(u64),
    /// Something that does not lie in its file as it is: compressed clusters.
    Packed,
}

/// What `qemu-img map` says of a stretch of an image.
#[derive(Deserialize)]
struct MapEntry {
    start: u64,
    length: u64,
    depth: u32,
    /// It is anywhere in the chain at all; before QEMU 6.1 nobody said.
    #[serde(default = "yes")]
    present: bool,
    data: bool,
    zero: bool,
    #[serde(default)]
    compressed: bool,
    /// Where it lies in the file, if it lies there as it is.
    offset: Option<u64>,
}

fn yes() -> bool {
    true
}

/// An empty overlay is longer only if its disk has more than 128 TiB.
const TEMPLATE_MAX: u64 = 4 << 20;
/// Templates that are kept: machines have few sizes of disks.
const TEMPLATES_MAX: usize = 16;
/// Longer than what `convert -p` writes at a time.
const PROGRESS_LINE: usize = 64;
/// What is written at a time, unless it is all zeros.
const PIECE: usize = 4096;

impl QemuImg {
    /// Uses `path`; else the one beside `qemu`; else the one on PATH.
    pub fn find(path: Option<&Path>, qemu: Option<&Path>) -> Result<Self, BinaryError> {
        if let Some(path) = path {
            return Ok(Self::at(path.to_owned()));
        }
        let beside = qemu.and_then(Path::parent).map(|folder| folder.join("qemu-img"));
        match beside.filter(|file| file.is_file()) {
            Some(path) => Ok(Self::at(path)),
            None => Ok(Self::at(binary::on_path("qemu-img")?)),
        }
    }

    fn at(path: PathBuf) -> Self {
        Self { path, user: None, overlays: Arc::default() }
    }

    /// The same, run as somebody else, by user and group id: what he writes into an image's header leads only to what he may read.
    pub fn run_as(self, user: Option<(u32, u32)>) -> Self {
        Self { user, ..self }
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

    /// Where in the file the image's own data lies, as it is, in stretches: what is compressed, encrypted, in a backing file or in another
    /// file is left out, but for what a format other than qcow2 has in others. The image may be in use, as long as nobody writes to it.
    /// `file` is the image, opened.
    ///
    /// # Errors
    /// `qemu-img` fails; its header cannot be read.
    pub fn data(&self, image: &Path, format: &str, file: &File) -> Result<Vec<DataExtent>, ImageError> {
        if format == "qcow2" && !own_data(image, format, file)? {
            return Ok(Vec::new());
        }
        let own = |entry: &MapEntry| entry.depth == 0 && entry.data && !entry.zero && !entry.compressed;
        let extents = self.map(image, format)?.into_iter().filter(own);
        Ok(extents.filter_map(|e| Some(DataExtent { offset: e.offset?, bytes: e.length })).collect())
    }

    /// What an image shows of its own: where it lets what lies below through there is no stretch. `file` is the image, opened.
    ///
    /// # Errors
    /// `qemu-img` fails; its header cannot be read.
    pub fn layout(&self, image: &Path, format: &str, file: &File) -> Result<Vec<Stretch>, ImageError> {
        let inside = own_data(image, format, file)?;
        let own = self.map(image, format)?.into_iter().filter(|entry| entry.depth == 0 && entry.present);
        let content = |entry: &MapEntry| match entry.offset {
            _ if entry.zero => Content::Zero,
            Some(offset) if inside && entry.data && !entry.compressed => Content::At(offset),
            _ => Content::Packed,
        };
        Ok(own.map(|e| Stretch { start: e.start, bytes: e.length, content: content(&e) }).collect())
    }

    /// Writes what an image shows of its own in a stretch into the file `out`, which is there, as long as the stretch and empty, and may be
    /// written to by whoever this runs as. Stretches are of whole sectors.
    ///
    /// # Errors
    /// `qemu-img` fails; the image ends before; the disk is full.
    pub fn unpack(
        &self,
        image: &Path,
        format: &str,
        start: u64,
        bytes: u64,
        out: &Path,
    ) -> Result<(), ImageError> {
        // Not `dd`, whose `count` counts what it skips too, and which does not say when nothing is left.
        let part = serde_json::json!({
            "driver": "raw", "offset": start, "size": bytes, "file": alone(image, format)?
        });
        let mut args = ["-q", "-U", "-n", "--target-is-zero", "-O", "raw", "--"].map(OsString::from).to_vec();
        args.extend([in_json(&part), out.into()]);
        self.run("convert", image, &args, SLOW).map(drop)
    }

    fn map(&self, image: &Path, format: &str) -> Result<Vec<MapEntry>, ImageError> {
        let args = ["--output=json".into(), "-U".into(), "--".into(), in_json(&alone(image, format)?)];
        let output = self.run("map", image, &args, SLOW)?;
        serde_json::from_str(&output.stdout).map_err(|error| ImageError::Failed {
            act: "map",
            path: image.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Makes an empty qcow2 image of `size` bytes over `backing` (its path as it is to stand in the header, its format),
    /// and makes the file and its folder durable.
    pub fn create(&self, image: &Path, size: u64, backing: Option<(&Path, &str)>) -> Result<(), ImageError> {
        let shape = backing.map(|(file, format)| Shape {
            size,
            format: format.to_owned(),
            name_bytes: file.as_os_str().len(),
        });
        let known = shape.as_ref().and_then(|shape| self.overlays().get(shape).cloned());
        match (backing, known) {
            (Some((file, _)), Some(template)) => {
                let copied = template.copy(image, file.as_os_str().as_bytes());
                copied.map_err(|source| ImageError::Copy { path: image.to_owned(), source })?;
            }
            _ => {
                self.create_by_tool(image, size, backing)?;
                if let (Some(shape), Some((file, _))) = (shape, backing)
                    && let Some(template) = Template::of(image, file.as_os_str().as_bytes())
                    && self.overlays().len() < TEMPLATES_MAX
                {
                    self.overlays().insert(shape, template);
                }
            }
        }
        sync(image)?;
        image.parent().map_or(Ok(()), sync)
    }

    /// Makes a qcow2 image with the content of the raw image `source`, durable.
    pub fn import(&self, source: &Path, image: &Path) -> Result<(), ImageError> {
        let mut args: Vec<OsString> =
            ["-q", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=off,compat=1.1"].map(Into::into).into();
        args.extend(["--".into(), source.into(), image.into()]);
        self.run("convert", image, &args, SLOW)?;
        sync(image)?;
        image.parent().map_or(Ok(()), sync)
    }

    /// Copies what an image shows, through everything that it lies over, into the file `to`, which is there and becomes a qcow2 image that
    /// lies over nothing, durable. `progress` gets the percentage that is done, and ends it by returning false: [`ImageError::Stopped`]. It
    /// ends when we do. On an error no file is left.
    pub fn flatten(
        &self,
        image: &Path,
        format: &str,
        to: &Path,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), ImageError> {
        // Else it would go on for as long as the copy takes, into a file that nobody knows of.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.path);
        self.give_up_rights(&mut command);
        // Through the page cache, and written back by us from the beginning: past it, each piece would wait for the one before, since the file
        // grows with each. Pieces are written as they come; more at once would only share the processors.
        let words = ["convert", "-p", "-W", "-m", "2", "-t", "unsafe", "-f", format, "-O", "qcow2"];
        command.args(words).args(["-o", "lazy_refcounts=off,compat=1.1", "--"]);
        command.arg(image).arg(to);
        let (mut percent, mut line) = (0, Vec::new());
        let mut watch = |bytes: &[u8]| {
            line.extend_from_slice(bytes);
            percent = last_percentage(&line).unwrap_or(percent);
            line.drain(..line.len().saturating_sub(PROGRESS_LINE));
            progress(percent)
        };
        // Opened before: what cannot be written back is told to whoever had the file open then.
        let copied = File::open(to)
            .map_err(|source| ImageError::Copy { path: to.to_owned(), source })
            .and_then(|made| Self::converted(command, &made, image, to, &mut watch));
        copied.inspect_err(|_| drop(fs::remove_file(to)))
    }

    /// Runs the copy of `image` into the file `made`, which is written back meanwhile, and makes it durable.
    fn converted(
        command: Command,
        made: &File,
        image: &Path,
        to: &Path,
        watch: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), ImageError> {
        let output = thread::scope(|scope| {
            let (copying, over) = channel::<()>();
            let growing = Growing { file: made, before: 0, bytes: 0 };
            // The disk may have it wait, and whoever watches is not to. It is a hint: it can do without.
            let writer = thread::Builder::new().name("write-back".into());
            let _ = writer.spawn_scoped(scope, move || growing.write_back(&over));
            let output = tool::run_watched(command, watch);
            drop(copying);
            output
        });
        match output {
            Ok(Some(output)) if output.success => {
                let synced = made.sync_all();
                synced
                    .map_err(|source| ImageError::Sync { path: to.to_owned(), source })
                    .and_then(|()| to.parent().map_or(Ok(()), sync))
            }
            Ok(Some(output)) if is_locked(&output.stderr) => {
                Err(ImageError::InUse { path: image.to_owned() })
            }
            Ok(Some(output)) => Err(ImageError::Failed {
                act: "convert",
                path: image.to_owned(),
                reason: first_line(&output.stderr, ""),
            }),
            Ok(None) => Err(ImageError::Stopped { path: image.to_owned() }),
            Err(error) => Err(error.into()),
        }
    }

    /// True if an image over another holds nothing of its own. It must not be in use.
    pub fn is_empty_overlay(&self, image: &Path) -> Result<bool, ImageError> {
        let own = |entry: &MapEntry| entry.depth == 0 && entry.present;
        Ok(!self.map(image, "qcow2")?.iter().any(own))
    }

    /// Bytes that a qcow2 file takes at most that [`Self::flatten`] makes of this image. That may be in use.
    pub fn measure(&self, image: &Path, format: &str) -> Result<u64, ImageError> {
        let mut args: Vec<OsString> =
            ["--output=json", "-U", "-f", format, "-O", "qcow2"].map(Into::into).into();
        args.extend(["--".into(), image.into()]);
        let output = self.run("measure", image, &args, SLOW)?;
        let value: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        value.get("required").and_then(Value::as_u64).ok_or_else(|| ImageError::Failed {
            act: "measure",
            path: image.to_owned(),
            reason: "no size in its answer".to_owned(),
        })
    }

    /// Writes another name of the backing file into an image's header, and makes it durable. What the image shows is the caller's care:
    /// the new one must hold what the old one does.
    pub fn rename_backing(&self, image: &Path, backing: &Path, format: &str) -> Result<(), ImageError> {
        let words = ["-u", "-f", "qcow2", "-F", format, "-b"].map(OsString::from);
        let mut words = words.to_vec();
        words.extend([backing.into(), "--".into(), image.into()]);
        self.run("rebase", image, &words, QUICK)?;
        sync(image)
    }

    fn create_by_tool(
        &self,
        image: &Path,
        size: u64,
        backing: Option<(&Path, &str)>,
    ) -> Result<(), ImageError> {
        let mut args: Vec<OsString> =
            ["-q", "-f", "qcow2", "-o", "lazy_refcounts=off,compat=1.1"].map(Into::into).into();
        if let Some((file, format)) = backing {
            // -u: the backing file may be open for writing in the machine that we are about to switch.
            args.extend(["-u".into(), "-b".into(), file.into(), "-F".into(), format.into()]);
        }
        args.extend(["--".into(), image.into(), size.to_string().into()]);
        self.run("create", image, &args, QUICK).map(drop)
    }

    fn overlays(&self) -> std::sync::MutexGuard<'_, HashMap<Shape, Template>> {
        self.overlays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a qcow2 image; `Ok(Some(words))` says what is wrong with it. Clusters that are allocated and unused do not
    /// count: a power cut leaves them and they harm nothing.
    pub fn check(&self, image: &Path) -> Result<Option<String>, ImageError> {
        let mut command = Command::new(&self.path);
        command.args(["check", "-q", "-U", "-f", "qcow2", "--"]).arg(image);
        self.give_up_rights(&mut command);
        let output = tool::run(command, SLOW)?;
        match output.code {
            // 3: leaked clusters only. 63: the format has no check.
            Some(0 | 3 | 63) => Ok(None),
            _ => Ok(Some(first_line(&output.stderr, &output.stdout))),
        }
    }

    fn give_up_rights(&self, command: &mut Command) {
        if let Some((uid, gid)) = self.user {
            // With a user id std gives up all other groups.
            command.current_dir("/").gid(gid).uid(uid);
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
        self.give_up_rights(&mut command);
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

/// An image without what it lies over, in QEMU's words: the backing file that its header names is not opened. A chain may be a thousand deep,
/// and somebody else may have written the name.
fn alone(image: &Path, format: &str) -> Result<Value, ImageError> {
    let name = image.to_str().ok_or_else(|| ImageError::Failed {
        act: "map",
        path: image.to_owned(),
        reason: "its path is not UTF-8".to_owned(),
    })?;
    let file = serde_json::json!({ "driver": "file", "filename": name });
    Ok(serde_json::json!({ "driver": format, "backing": null, "file": file }))
}

/// Such a description where a file's name is expected.
fn in_json(node: &Value) -> OsString {
    format!("json:{node}").into()
}

/// True if offsets that `qemu-img map` gives are known to be of the image's own file.
fn own_data(image: &Path, format: &str, file: &File) -> Result<bool, ImageError> {
    let read = || if format == "qcow2" { qcow2::has_own_data(file) } else { Ok(false) };
    read().map_err(|source| ImageError::Header { path: image.to_owned(), source })
}

/// A file that another program appends to.
struct Growing<'a> {
    file: &'a File,
    /// Up to where it is being written back, and up to where it was the time before that.
    bytes: u64,
    before: u64,
}

impl Growing<'_> {
    /// Has what comes to it written back, and drops what has been, until `over` has no sender: nobody reads it again soon, and the sync at
    /// the end has little left to wait for.
    fn write_back(mut self, over: &Receiver<()>) {
        loop {
            let grown = self.file.metadata().map_or(0, |meta| meta.len()).saturating_sub(self.bytes);
            let step = grown.min(WRITE_BACK);
            if let Some(more) = NonZeroU64::new(step) {
                // Linux begins to write such a range before it drops what is clean of it (mm/fadvise.c).
                let range = more.saturating_add(self.bytes - self.before);
                let _ = rustix::fs::fadvise(self.file, self.before, Some(range), Advice::DontNeed);
                (self.before, self.bytes) = (self.bytes, self.bytes + step);
            }
            let pause = if grown > step { Duration::ZERO } else { WRITE_BACK_EVERY };
            if over.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }
}

/// True if this file can be read, and so written, past the page cache.
pub fn takes_direct_io(path: &Path) -> bool {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).is_ok()
}

/// The last of what `convert -p` writes one over the other: `    (12.34/100%)`.
fn last_percentage(said: &[u8]) -> Option<u8> {
    let text = String::from_utf8_lossy(said);
    let (before, _) = text.rsplit_once("/100%)")?;
    let (whole, _) = before.rsplit_once('(')?.1.split_once('.')?;
    whole.trim().parse().ok().filter(|percent| *percent <= 100)
}

impl Template {
    /// Takes an empty overlay over a file of this name as a template; none if its header does not read as QEMU's
    /// `docs/interop/qcow2.rst` has it: bytes 8 to 15 say where the name stands, bytes 16 to 19 how long it is.
    fn of(image: &Path, name: &[u8]) -> Option<Self> {
        if fs::metadata(image).ok()?.len() > TEMPLATE_MAX {
            return None;
        }
        let bytes: Arc<[u8]> = fs::read(image).ok()?.into();
        let at = u64::from_be_bytes(*bytes.get(8..)?.first_chunk()?);
        let len = u32::from_be_bytes(*bytes.get(16..)?.first_chunk()?);
        let name_at = usize::try_from(at).ok()?;
        let found = bytes.get(name_at..name_at.checked_add(name.len())?)?;
        (bytes.starts_with(b"QFI\xfb") && len as usize == name.len() && found == name)
            .then_some(Self { bytes, name_at })
    }

    /// Writes a copy with another name of the same length; the file must not exist.
    fn copy(&self, image: &Path, name: &[u8]) -> io::Result<()> {
        let file = File::create_new(image)?;
        let written = file.set_len(self.bytes.len() as u64).and_then(|()| {
            for (number, piece) in self.bytes.chunks(PIECE).enumerate() {
                if piece.iter().any(|byte| *byte != 0) {
                    file.write_all_at(piece, (number * PIECE) as u64)?;
                }
            }
            file.write_all_at(name, self.name_at as u64)
        });
        if written.is_err() {
            let _ = fs::remove_file(image);
        }
        written
    }
}

fn sync(path: &Path) -> Result<(), ImageError> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| ImageError::Sync { path: path.to_owned(), source })
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
    fn the_second_overlay_is_what_the_tool_would_have_made() {
        let dir = tempfile::tempdir().unwrap();
        let (quick, slow) = (img(), img());
        let path = |name: &str| dir.path().join(name);
        quick.create(&path("first"), 1 << 30, Some((Path::new("aaaa.qcow2"), "qcow2"))).unwrap();
        assert_eq!(quick.overlays().len(), 1);
        quick.create(&path("copy"), 1 << 30, Some((Path::new("bbbb.qcow2"), "qcow2"))).unwrap();
        slow.create(&path("made"), 1 << 30, Some((Path::new("bbbb.qcow2"), "qcow2"))).unwrap();
        assert!(fs::read(path("copy")).unwrap() == fs::read(path("made")).unwrap());
        // Another length, size or format is another shape.
        for (size, name, format) in
            [(1 << 30, "c", "qcow2"), (1 << 20, "aaaa.qcow2", "qcow2"), (1 << 30, "aaaa.qcow2", "raw")]
        {
            quick.create(&path("other"), size, Some((Path::new(name), format))).unwrap();
            slow.create(&path("made"), size, Some((Path::new(name), format))).unwrap();
            assert!(
                fs::read(path("other")).unwrap() == fs::read(path("made")).unwrap(),
                "{size} {name} {format}"
            );
        }
        // Never over a file that is there.
        assert!(matches!(
            quick.create(&path("made"), 1 << 30, Some((Path::new("dddd.qcow2"), "qcow2"))),
            Err(ImageError::Copy { .. })
        ));
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
