//! A QEMU with the arguments of one that Spinney started, and nothing to load: what a fork costs at least.
//!
//! The same words but for these: its memory is its own instead of an image's, its sockets lie in a folder of its own, and what its guest
//! would write to is a new overlay over the same layers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use qemu::command::{RAM_ID, RunFolder};
use qemu::image::QemuImg;
use qemu::process::Process;
use qemu::qmp::Qmp;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::error::{Error, Result, system};
use crate::settings::Bench;
use crate::watched::resumed;

/// How long QEMU may take until its monitor answers.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How to start such processes.
pub(crate) struct Empty {
    program: PathBuf,
    words: Vec<String>,
    /// The folder of sockets in them.
    run: String,
    overlays: Vec<Overlay>,
    img: QemuImg,
    folder: TempDir,
    starts: u32,
}

/// A file that the model writes to.
struct Overlay {
    file: String,
    below: PathBuf,
    below_format: String,
    bytes: u64,
}

/// How long it took until CPUs ran that have nothing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    /// From before its overlays were made.
    pub(crate) with_overlays: Duration,
    /// From before its process was started.
    pub(crate) alone: Duration,
}

/// One that stands still. Ended when dropped.
pub(crate) struct Standing {
    pub(crate) process: Process,
    _folder: TempDir,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.process.kill();
    }
}

impl Empty {
    /// As the process with this run folder was started.
    pub(crate) fn like(bench: &Bench, model: &Path) -> Result<Self> {
        let line = command_line(model)?;
        let (program, words) = line.split_first().ok_or(Error::Lacks("command line"))?;
        let img = QemuImg::find(None, Some(&bench.qemu.path))?;
        let folder = folder(bench)?;
        Ok(Self {
            program: program.into(),
            words: words.to_vec(),
            run: model.display().to_string(),
            overlays: overlays(&img, words)?,
            img,
            folder,
            starts: 0,
        })
    }

    /// The same without a kernel: what is given to QEMU that way it copies into memory at every start, unless a state is to come.
    pub(crate) fn without_kernel(&mut self) {
        for option in ["-kernel", "-initrd", "-append"] {
            drop_pair(&mut self.words, option);
        }
    }

    /// Makes overlays and a process, lets its CPUs run, and ends it.
    pub(crate) fn run(&mut self) -> Result<Took> {
        self.starts += 1;
        let run = RunFolder(self.folder.path().join(self.starts.to_string()));
        let mut words = self.words.clone();
        drop_pair(&mut words, "-incoming");
        let began = SystemTime::now();
        let files = self.make_overlays()?;
        let made = SystemTime::now();
        let process = self.spawn(&words, &run, &files)?;
        let ran = Qmp::connect(&run.monitor(), false, START_LIMIT).map_err(Error::from).and_then(|qmp| {
            qmp.execute("cont", json!({}))?;
            resumed(&qmp)
        });
        process.kill();
        files.iter().for_each(|file| drop(fs::remove_file(file)));
        let ran = ran?;
        let since = |then| ran.duration_since(then).map_err(|_| Error::Lacks("steady clock"));
        Ok(Took { with_overlays: since(began)?, alone: since(made)? })
    }

    /// Starts one that waits for a state, which never comes.
    pub(crate) fn stand(&self, bench: &Bench) -> Result<Standing> {
        let folder = folder(bench)?;
        let run = RunFolder(folder.path().join("run"));
        let files = self.make_overlays_in(folder.path())?;
        let process = self.spawn(&self.words, &run, &files)?;
        let standing = Standing { process, _folder: folder };
        Qmp::connect(&run.monitor(), false, START_LIMIT)?.execute("query-status", json!({}))?;
        Ok(standing)
    }

    fn make_overlays(&self) -> Result<Vec<PathBuf>> {
        self.make_overlays_in(self.folder.path())
    }

    fn make_overlays_in(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let make = |(number, overlay): (usize, &Overlay)| -> Result<PathBuf> {
            let file = folder.join(format!("{}-{number}.qcow2", self.starts));
            self.img.create(&file, overlay.bytes, Some((&overlay.below, &overlay.below_format)))?;
            Ok(file)
        };
        self.overlays.iter().enumerate().map(make).collect()
    }

    fn spawn(&self, words: &[String], run: &RunFolder, files: &[PathBuf]) -> Result<Process> {
        fs::create_dir(&run.0).map_err(system("make", &run.0))?;
        let own = run.0.display().to_string();
        let of_its_own = |word: &String| {
            let mut word = word.replace(&self.run, &own);
            for (overlay, file) in self.overlays.iter().zip(files) {
                word = word.replace(&overlay.file, &file.display().to_string());
            }
            own_memory(&word).unwrap_or(word)
        };
        let words: Vec<String> = words.iter().map(of_its_own).collect();
        Process::spawn(&self.program, &words, &run.log()).map_err(system("start", &self.program))
    }
}

fn folder(bench: &Bench) -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("spinney-bench-").tempdir_in(&bench.disk);
    made.map_err(system("make a folder in", &bench.disk))
}

/// The process of a run folder.
pub(crate) fn process_of(run: &Path) -> Result<Process> {
    let path = RunFolder(run.to_owned()).pid_file();
    let text = fs::read_to_string(&path).map_err(system("read", &path))?;
    let pid = text.trim().parse().map_err(|_| Error::Lacks("process id"))?;
    Process::open(pid).map_err(system("find the process of", run))
}

/// The words that a process was started with.
fn command_line(run: &Path) -> Result<Vec<String>> {
    let path = PathBuf::from(format!("/proc/{}/cmdline", process_of(run)?.id().pid));
    let bytes = fs::read(&path).map_err(system("read", &path))?;
    let words = bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let mut words: Vec<String> = words.collect();
    words.pop();
    Ok(words)
}

/// The files that a QEMU writes to, and what lies below them.
fn overlays(img: &QemuImg, words: &[String]) -> Result<Vec<Overlay>> {
    let values = words.iter().zip(words.iter().skip(1)).filter(|(option, _)| *option == "-blockdev");
    let nodes: Vec<Value> = values.filter_map(|(_, value)| serde_json::from_str(value).ok()).collect();
    let text = |node: &Value, place: &str| node.pointer(place).and_then(Value::as_str).map(str::to_owned);
    let mut overlays = Vec::new();
    for node in nodes.iter().filter(|node| node.get("read-only") == Some(&Value::Bool(false))) {
        let below = text(node, "/backing").ok_or(Error::Lacks("backing node"))?;
        let below = nodes.iter().find(|node| text(node, "/node-name").as_deref() == Some(&below));
        let below = below.ok_or(Error::Lacks("backing node"))?;
        let file = text(node, "/file/filename").ok_or(Error::Lacks("file of a disk"))?;
        let below_file = PathBuf::from(text(below, "/file/filename").ok_or(Error::Lacks("file of a disk"))?);
        overlays.push(Overlay {
            file,
            // Nobody but its QEMU may look into what is written to.
            bytes: img.info(&below_file)?.virtual_size,
            below: below_file,
            below_format: text(below, "/driver").ok_or(Error::Lacks("format of a disk"))?,
        });
    }
    Ok(overlays)
}

/// The memory backend as one with memory of its own, if the word is that of one with an image's.
fn own_memory(word: &str) -> Option<String> {
    let options = word.strip_prefix("memory-backend-file,")?;
    let size = options.split(',').find(|option| option.starts_with("size="))?;
    Some(format!("memory-backend-ram,id={RAM_ID},{size}"))
}

fn drop_pair(words: &mut Vec<String>, option: &str) {
    if let Some(at) = words.iter().position(|word| word == option) {
        words.drain(at..words.len().min(at + 2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_an_image_becomes_one_of_own_memory() {
        let word =
            "memory-backend-file,id=ram0,size=1073741824,mem-path=/a,,b/.ram/x,share=off,readonly=on,rom=off";
        assert_eq!(own_memory(word).as_deref(), Some("memory-backend-ram,id=ram0,size=1073741824"));
        assert_eq!(own_memory("memory-backend-ram,id=ram0,size=1"), None);
    }

    #[test]
    fn an_option_goes_with_its_value() {
        let mut words: Vec<String> = ["-S", "-incoming", "defer", "-x"].map(str::to_owned).to_vec();
        drop_pair(&mut words, "-incoming");
        drop_pair(&mut words, "-kernel");
        assert_eq!(words, ["-S", "-x"]);
    }
}
