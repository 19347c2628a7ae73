//! `demo`: the main job on a real guest, as a person would type it; then forks of it.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use server::Problem;
use server::snapshots::Code;

use crate::session::Session;

/// Show the main job on a real guest: take, break, go back, branch, fork
///
/// Boots a small Linux guest in a state folder of its own, takes snapshots of it while it runs, breaks it, brings it back,
/// branches, forks it five times as it runs, and removes everything again. `make demo` builds the guest first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney demo
  spinney demo --guest .cache/guest --keep")]
pub(crate) struct Args {
    /// Folder with the guest's vmlinuz, initrd.img and data.img [default: $SPINNEY_CACHE/guest, else .cache/guest]
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    guest: Option<PathBuf>,
    /// Leave the machine and its state folder behind, to look around in
    #[arg(long)]
    keep: bool,
}

/// How long the guest may take to boot; emulated on a busy host it takes ten seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long a command inside the guest may take.
const GUEST_LIMIT: Duration = Duration::from_secs(20);
/// The demo's machine.
const LAB: &str = "lab";
/// Forks of it, named `lab-1` and so on.
const FORKS: usize = 5;

pub(crate) fn run(_session: &Session, args: &Args) -> Result<(), Problem> {
    let guest = guest_folder(args.guest.as_deref())?;
    let demo = Demo::new(args.keep)?;
    let file = |name: &str| guest.join(name).display().to_string();
    let append =
        std::fs::read_to_string(guest.join("cmdline")).unwrap_or_else(|_| "console=ttyS0 quiet".into());

    demo.say("A machine with 256 MiB. Its disk image is never written to: an overlay goes over it.");
    demo.spinney(&[
        "create",
        LAB,
        "--memory",
        "256M",
        "--disk",
        &file("data.img"),
        "--kernel",
        &file("vmlinuz"),
        "--initrd",
        &file("initrd.img"),
        "--append",
        append.trim(),
    ])?;
    demo.spinney(&["start", "lab"])?;
    let booted = Instant::now();
    demo.wait_for_guest()?;
    demo.say(&format!(
        "The guest answered {:.1} s later. Something on its disk, and something only in its memory:",
        booted.elapsed().as_secs_f64()
    ));
    demo.guest("echo 'chapter one' > /data/thesis; sync")?;
    demo.guest("secret=$(cat /proc/sys/kernel/random/uuid); echo $secret > /tmp/secret; echo $secret")?;

    demo.say("A snapshot while it runs: memory, devices and disk of one instant.");
    demo.spinney(&["take", "lab", "before", "-m", "all is well"])?;
    demo.say("Now break it.");
    demo.guest("rm /data/thesis /tmp/secret; secret=gone; dd if=/dev/zero of=/dev/vda bs=1M count=8 2>/dev/null; sync")?;
    demo.guest("ls /data/thesis; echo secret: $secret")?;

    demo.say("Back. What is left behind is kept as an undo point.");
    demo.spinney(&["goto", "lab@before"])?;
    demo.guest("cat /data/thesis; echo $secret; cat /tmp/secret")?;

    demo.say("Two ways on from there: each take after going back starts a branch.");
    demo.guest("echo 'chapter two, happy end' >> /data/thesis; sync")?;
    demo.spinney(&["take", "lab", "happy-end"])?;
    demo.spinney(&["goto", "lab@before", "--discard", "--yes"])?;
    demo.guest("echo 'chapter two, sad end' >> /data/thesis; sync")?;
    demo.spinney(&["take", "lab", "sad-end", "--mode", "stop-copy"])?;
    demo.spinney(&["goto", "lab@happy-end", "--discard", "--yes"])?;
    demo.guest("cat /data/thesis")?;

    demo.spinney(&["tree", "lab"])?;
    demo.say("Equal pages are stored once, whichever snapshot had them first.");
    demo.spinney(&["du", "lab"])?;
    demo.spinney(&["fsck"])?;
    demo.forks()?;
    demo.say("That was it. `spinney --help` lists the verbs.");
    Ok(())
}

fn fork_names() -> Vec<String> {
    (1..=FORKS).map(|n| format!("{LAB}-{n}")).collect()
}

fn guest_folder(given: Option<&Path>) -> Result<PathBuf, Problem> {
    let folder = match (given, std::env::var_os("SPINNEY_CACHE")) {
        (Some(folder), _) => folder.to_owned(),
        (None, Some(cache)) => PathBuf::from(cache).join("guest"),
        (None, None) => PathBuf::from(".cache/guest"),
    };
    if folder.join("vmlinuz").is_file() && folder.join("initrd.img").is_file() {
        return std::path::absolute(&folder).map_err(|e| problem(format!("{}: {e}", folder.display())));
    }
    let mut missing = Problem::new(Code::Precondition, format!("there is no guest in {}", folder.display()));
    missing.hint = Some("`make guest` in a checkout builds one; --guest names another folder".into());
    Err(missing)
}

fn problem(message: String) -> Problem {
    Problem::new(Code::Failed, message)
}

/// A state folder and a daemon of the demo's own, gone when it ends.
struct Demo {
    exe: PathBuf,
    state: PathBuf,
    keep: bool,
    /// Commands typed at the guest so far.
    asked: Cell<u32>,
}

impl Demo {
    fn new(keep: bool) -> Result<Self, Problem> {
        let exe =
            std::env::current_exe().map_err(|e| problem(format!("this program cannot be found: {e}")))?;
        let state = std::env::temp_dir().join(format!("spinney-demo-{}", std::process::id()));
        Ok(Self { exe, state, keep, asked: Cell::new(0) })
    }

    fn say(&self, words: &str) {
        println!("\n# {words}");
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.exe);
        command.arg("--state").arg(&self.state).args(args);
        command
    }

    /// Runs a command as a person would, with what it prints.
    fn spinney(&self, args: &[&str]) -> Result<(), Problem> {
        let shown: Vec<String> = args.iter().map(|word| quoted(word)).collect();
        println!("$ spinney {}", shown.join(" "));
        let status = self.command(args).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(problem(format!("`spinney {}` failed ({status})", shown.join(" ")))),
            Err(error) => Err(problem(format!("{} cannot be started: {error}", self.exe.display()))),
        }
    }

    /// Forks the machine as it runs, and shows that each is a machine of its own.
    fn forks(&self) -> Result<(), Problem> {
        self.say(
            "Five running copies of it, while it runs on. Where memory can be mapped (`spinney doctor` says so), they share what they do not write to.",
        );
        self.spinney(&["fork", LAB, "-n", &FORKS.to_string()])?;
        self.say("Each draws its own random numbers, and has a disk of its own that began as the machine's.");
        for fork in fork_names() {
            self.typed_at(&fork, &format!("echo 'chapter three, by {fork}' >> /data/thesis; sync"))?;
            self.typed_at(&fork, "head -c 8 /dev/urandom | od -An -tx1; tail -n 2 /data/thesis")?;
        }
        self.say("The machine they came from has seen nothing of it.");
        self.guest("cat /data/thesis")?;
        self.spinney(&["ls"])
    }

    fn console(&self, machine: &str) -> Result<UnixStream, Problem> {
        let output = self.command(&["--json", "show", machine]).stderr(Stdio::null()).output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let path = find(&document, "console").ok_or_else(|| problem(format!("{machine} has no console")))?;
        let socket = UnixStream::connect(path).map_err(|e| problem(format!("{path}: {e}")))?;
        let limit = socket.set_read_timeout(Some(Duration::from_millis(500)));
        limit.map_err(|e| problem(format!("{path}: {e}")))?;
        Ok(socket)
    }

    fn wait_for_guest(&self) -> Result<(), Problem> {
        let deadline = Instant::now() + BOOT_LIMIT;
        while Instant::now() < deadline {
            if let Ok(lines) = self.ask(LAB, "echo ready", Duration::from_secs(1))
                && lines.iter().any(|line| line == "ready")
            {
                return Ok(());
            }
        }
        Err(problem("the guest did not boot".into()))
    }

    /// Types a command at the guest's serial console and prints it with what it answers.
    fn guest(&self, command: &str) -> Result<(), Problem> {
        self.typed_at(LAB, command)
    }

    fn typed_at(&self, machine: &str, command: &str) -> Result<(), Problem> {
        println!("{}# {command}", if machine == LAB { "guest" } else { machine });
        for line in self.ask(machine, command, GUEST_LIMIT)? {
            println!("{line}");
        }
        Ok(())
    }

    fn ask(&self, machine: &str, command: &str, limit: Duration) -> Result<Vec<String>, Problem> {
        let io = |e: std::io::Error| problem(format!("the console of {machine}: {e}"));
        let mut console = self.console(machine)?;
        // What was typed while the guest booted is answered later, all at once: each answer is known by its number. The console echoes
        // what is typed, so the words are such as only the shell makes of it.
        let number = self.asked.replace(self.asked.get() + 1);
        let (begin, end) = (format!("begin {number}"), format!("end {number}"));
        console
            .write_all(format!("\necho be''gin {number}; {command}\necho en''d {number}\n").as_bytes())
            .map_err(io)?;
        let deadline = Instant::now() + limit;
        let (mut reader, mut line, mut lines) = (BufReader::new(console), Vec::new(), None);
        while Instant::now() < deadline {
            match reader.read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(io(error)),
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            match (text.as_str(), &mut lines) {
                (text, _) if text == begin => lines = Some(Vec::new()),
                (text, Some(_)) if text == end => return Ok(lines.unwrap_or_default()),
                // A prompt, with what was typed behind it.
                (text, Some(lines)) if !text.contains("en''d") => lines.push(text.to_owned()),
                _ => {}
            }
        }
        Err(problem(format!("the guest did not answer within {} s", limit.as_secs())))
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if self.keep {
            println!("\nleft behind: spinney --state {} tree", self.state.display());
            return;
        }
        let quietly = |args: &[&str]| {
            let _ = self.command(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
        };
        for machine in fork_names().iter().map(String::as_str).chain([LAB]) {
            quietly(&["kill", machine]);
        }
        quietly(&["serve", "--stop"]);
        let _ = std::fs::remove_dir_all(&self.state);
    }
}

/// The first string under `key`, however deep.
fn find<'a>(value: &'a serde_json::Value, key: &str) -> Option<&'a str> {
    match value {
        serde_json::Value::Object(map) => {
            map.get(key).and_then(|v| v.as_str()).or_else(|| map.values().find_map(|inner| find(inner, key)))
        }
        _ => None,
    }
}

fn quoted(word: &str) -> String {
    if word.contains(' ') { format!("'{word}'") } else { word.to_owned() }
}
