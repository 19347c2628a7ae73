//! Every blow at every step of every act, in a random order, round after round: counts by act, victim, step and outcome.
//!
//! `scripts/soak.sh` says by environment variables what is to be done. A blow after which something is wrong does not end the
//! others: the file has what it was, the exit code says that there was one.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use vm_tests::crash::{Act, RECOVERY, ROWS, Scene, Stage, Stroke, Victim};
use vm_tests::harness::{Spinney, tool};
use vm_tests::walk::Random;

/// Everybody who is killed at a step.
const VICTIMS: &[Victim] = &[
    Victim::Daemon,
    Victim::Stopped,
    Victim::Warden,
    Victim::WardenThenDaemon,
    Victim::Both,
    Victim::Qemu,
    Victim::Incoming,
    Victim::Power,
];

/// One blow that can be dealt.
#[derive(Clone, Copy)]
struct Blow {
    act: Act,
    step: &'static str,
    victim: Victim,
}

fn text(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn number(name: &str, default: u64) -> u64 {
    let text = text(name);
    if text.is_empty() {
        default
    } else {
        text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    }
}

fn main() -> ExitCode {
    let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let seed = number("SOAK_SEED", now);
    let limit = Duration::from_secs(60 * number("SOAK_CRASH_MINUTES", 60));
    let mut report = Report::new(seed);
    let (mut random, begun) = (Random::new(seed), Instant::now());
    println!("blows at steps: SOAK_SEED={seed}, for {} minutes", limit.as_secs() / 60);
    while begun.elapsed() < limit {
        report.rounds += 1;
        for stage in [Stage::Cold, Stage::GuestWithPort, Stage::Guest] {
            let mut blows = all_blows(stage, report.power);
            random.shuffle(&mut blows);
            // The few of a stage must not eat the time of the many.
            let share = if stage == Stage::Guest { limit } else { limit / 6 };
            let until = (Instant::now() + share).min(begun + limit);
            while !blows.is_empty() && Instant::now() < until {
                report.strike(stage, &mut blows, begun, until);
                report.write(begun.elapsed());
            }
        }
    }
    report.say();
    if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn all_blows(stage: Stage, power: bool) -> Vec<Blow> {
    let mut blows = Vec::new();
    for row in ROWS.iter().filter(|row| row.act.stage() == stage) {
        for step in row.steps.iter().chain(row.more) {
            let victims = VICTIMS.iter().filter(|victim| power || **victim != Victim::Power);
            let struck = victims.filter(|victim| victim.strikes_at(row.act, step));
            blows.extend(struck.map(|victim| Blow { act: row.act, step, victim: *victim }));
        }
    }
    let twice = RECOVERY.iter().filter(|(act, ..)| act.stage() == stage);
    blows.extend(twice.map(|(act, step, then)| Blow { act: *act, step, victim: Victim::Successor(then) }));
    blows
}

/// What came of everything.
struct Report {
    about: Value,
    rounds: u64,
    /// There are disks whose power can be cut.
    power: bool,
    /// Had happened, were taken back.
    counts: BTreeMap<(String, String, String), (u64, u64)>,
    wrong: Vec<Value>,
}

impl Report {
    fn new(seed: u64) -> Self {
        let first = |program: &str, words: &[&str]| {
            let output = tool(program, words).stdout;
            String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
        };
        let power = Spinney::on_a_disk().inspect_err(|why| println!("the power is not cut: {why}")).is_ok();
        let about = json!({
            "schema": "spinney.crash/1",
            "begun": first("date", &["-u", "+%FT%TZ"]),
            "commit": text("SOAK_COMMIT"),
            "version": first(&text("SPINNEY_BIN"), &["--version"]),
            "qemu": first("qemu-system-x86_64", &["--version"]),
            "host": first("uname", &["-srm"]),
            "processors": first("nproc", &[]),
            "seed": seed,
            "power": power,
        });
        Self { about, rounds: 0, power, counts: BTreeMap::new(), wrong: Vec::new() }
    }

    /// Deals the blows on one machine, until one of them goes wrong.
    fn strike(&mut self, stage: Stage, blows: &mut Vec<Blow>, begun: Instant, until: Instant) {
        let spinney = if self.power { Spinney::on_a_disk().unwrap_or_default() } else { Spinney::new() };
        let mut scene = match Scene::begin(spinney, stage) {
            Ok(scene) => scene,
            Err(violation) => {
                blows.clear();
                return self.wrong.push(json!({ "blow": "none", "violation": violation.to_string() }));
            }
        };
        while let Some(Blow { act, step, victim }) = blows.pop_if(|_| Instant::now() < until) {
            if let Err(violation) = scene.strike(act, step, victim) {
                let log: Vec<String> = scene.spinney.log().lines().map(str::to_owned).collect();
                println!("WRONG: {violation}");
                let blow = format!("{act:?}, {victim:?} at {step}");
                self.wrong
                    .push(json!({ "blow": blow, "violation": violation.to_string(), "daemon_log": log }));
                return;
            }
            for Stroke { act, victim, step, happened } in scene.strokes.drain(..) {
                let (done, back) = self.counts.entry((act, victim, step)).or_default();
                *(if happened { done } else { back }) += 1;
            }
            self.write(begun.elapsed());
        }
        if let Err(violation) = scene.end() {
            self.wrong.push(json!({ "blow": "the end", "violation": violation.to_string() }));
        }
    }

    fn write(&mut self, spent: Duration) {
        let count = |((act, victim, step), (happened, back)): (&(String, String, String), &(u64, u64))| json!({ "act": act, "victim": victim, "step": step, "happened": happened, "taken_back": back });
        self.about["rounds"] = self.rounds.into();
        self.about["seconds"] = spent.as_secs().into();
        self.about["kills"] = self.kills().into();
        self.about["victims"] = self.by_victim();
        self.about["counts"] = self.counts.iter().map(count).collect();
        self.about["wrong"] = self.wrong.clone().into();
        let file = text("SOAK_CRASH_FILE");
        let folder = Path::new(&file).parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).expect("the folder of SOAK_CRASH_FILE");
        std::fs::write(&file, format!("{:#}\n", self.about)).expect("SOAK_CRASH_FILE");
    }

    fn kills(&self) -> u64 {
        self.counts.values().map(|(happened, back)| happened + back).sum()
    }

    /// For each victim: how many kills at how many steps of acts, and what had become of the act.
    fn by_victim(&self) -> Value {
        let mut sums: BTreeMap<&str, [u64; 3]> = BTreeMap::new();
        for ((_, victim, _), (happened, back)) in &self.counts {
            let victim = victim.split('(').next().unwrap_or_default();
            let sum = sums.entry(victim).or_default();
            (sum[0], sum[1], sum[2]) = (sum[0] + 1, sum[1] + happened, sum[2] + back);
        }
        let line = |[steps, happened, back]: [u64; 3]| json!({ "steps": steps, "kills": happened + back, "happened": happened, "taken_back": back });
        sums.into_iter()
            .map(|(victim, sum)| (victim.to_owned(), line(sum)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    fn say(&self) {
        println!("{} kills in {} rounds, {} went wrong", self.kills(), self.rounds, self.wrong.len());
        println!("{:#}", self.by_victim());
    }
}
