//! Long random walks, each with a seed of its own: printed as they end, and written to a file with all that is known of them.
//!
//! `scripts/soak.sh` says by environment variables what is to be done. A walk that fails does not end the others: the file has
//! its seed and its history, the exit code says that there was one.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use vm_tests::harness::{Spinney, tool};
use vm_tests::walk::{FILL, Played, Random, Walk};

/// What was asked for.
struct Wanted {
    walks: u64,
    steps: u64,
    /// No walk begins later.
    limit: Duration,
    seed: u64,
    file: String,
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).unwrap_or_default();
    if text.is_empty() {
        default
    } else {
        text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    }
}

fn text(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn main() -> ExitCode {
    let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let wanted = Wanted {
        walks: number("SOAK_WALKS", 10),
        steps: number("SOAK_STEPS", 100),
        limit: Duration::from_secs(60 * number("SOAK_MINUTES", 24 * 60)),
        seed: number("SOAK_SEED", now),
        file: text("SOAK_FILE"),
    };
    let walks = soak(&wanted);
    let failed = walks.iter().filter(|walk| walk["violation"] != Value::Null).count();
    println!("{} walks, {failed} failed", walks.len());
    if failed == 0 && !walks.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// All walks, oldest first. What is known is in the file after each.
fn soak(wanted: &Wanted) -> Vec<Value> {
    let first = |program: &str, words: &[&str]| {
        let output = tool(program, words).stdout;
        String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
    };
    let mut about = json!({
        "schema": "spinney.soak/1",
        "begun": first("date", &["-u", "+%FT%TZ"]),
        "commit": text("SOAK_COMMIT"),
        "version": first(&text("SPINNEY_BIN"), &["--version"]),
        "qemu": first("qemu-system-x86_64", &["--version"]),
        "host": first("uname", &["-srm"]),
        "processors": first("nproc", &[]),
        "seed": wanted.seed,
        "steps": wanted.steps,
    });
    println!("soak of {}, {}", text("SOAK_COMMIT"), about["qemu"].as_str().unwrap_or_default());
    println!("SOAK_SEED={} SOAK_WALKS={} SOAK_STEPS={}", wanted.seed, wanted.walks, wanted.steps);
    let mut random = Random::new(wanted.seed);
    let begun = Instant::now();
    let mut walks = Vec::new();
    let mut sum = BTreeMap::new();
    for number in 1..=wanted.walks {
        if begun.elapsed() >= wanted.limit {
            println!("no time for walk {number} and those after it");
            break;
        }
        let walk = walk(random.below(1 << 32), wanted.steps, &mut sum);
        let outcome = if walk["violation"].is_null() { "passed" } else { "FAILED" };
        println!(
            "walk {number} of {}: SPINNEY_WALK_SEED={} SPINNEY_WALK_STEPS={}, {outcome} after {} steps, {} s",
            wanted.walks, walk["seed"], wanted.steps, walk["played"], walk["seconds"]
        );
        if let Some(violation) = walk["violation"].as_str() {
            println!("{violation}");
        }
        walks.push(walk);
        about["seconds"] = seconds(begun.elapsed());
        about["failed"] = walks.iter().filter(|walk| walk["violation"] != Value::Null).count().into();
        about["kinds"] = kinds(&sum);
        about["walks"] = walks.clone().into();
        write(&wanted.file, &about);
    }
    table(&sum);
    walks
}

/// One walk, whatever becomes of it. Adds what it played to `sum`.
fn walk(seed: u64, steps: u64, sum: &mut BTreeMap<String, Played>) -> Value {
    let begun = Instant::now();
    let mut walk = match Walk::begin(Spinney::new(), seed, FILL) {
        Ok(walk) => walk,
        Err(violation) => {
            let seconds = seconds(begun.elapsed());
            return json!({ "seed": seed, "played": 0, "seconds": seconds, "violation": violation.to_string() });
        }
    };
    // A mistake of the walk's own must not take the other walks with it.
    let result = catch_unwind(AssertUnwindSafe(|| walk.wander(steps as usize).and_then(|()| walk.end())));
    let violation = match result {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        Err(_) => Some("the walk itself panicked; stderr says where".to_owned()),
    };
    for (kind, played) in &walk.played {
        let all = sum.entry(kind.clone()).or_default();
        all.count += played.count;
        all.total += played.total;
        all.longest = all.longest.max(played.longest);
    }
    let mut report = json!({
        "seed": seed,
        "played": walk.played.values().map(|played| played.count).sum::<u64>(),
        "seconds": seconds(begun.elapsed()),
        "checks_seconds": seconds(walk.checked),
        "kinds": kinds(&walk.played),
        "violation": violation,
    });
    if violation.is_some() {
        report["history"] = walk.history.clone().into();
        report["daemon_log"] = walk.spinney.log().lines().collect();
    }
    report
}

fn kinds(played: &BTreeMap<String, Played>) -> Value {
    let kind = |p: &Played| json!({ "count": p.count, "seconds": seconds(p.total), "longest_seconds": seconds(p.longest) });
    played.iter().map(|(name, played)| (name.clone(), kind(played))).collect::<serde_json::Map<_, _>>().into()
}

fn table(sum: &BTreeMap<String, Played>) {
    println!("{:<18}{:>7}{:>12}{:>12}", "step", "count", "mean s", "longest s");
    for (kind, played) in sum {
        let mean = played.total.as_secs_f64() / played.count.max(1) as f64;
        println!("{kind:<18}{:>7}{mean:>12.2}{:>12.2}", played.count, played.longest.as_secs_f64());
    }
}

/// Seconds with three places behind the point.
fn seconds(time: Duration) -> Value {
    ((time.as_secs_f64() * 1000.0).round() / 1000.0).into()
}

fn write(file: &str, about: &Value) {
    let folder = Path::new(file).parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).expect("the folder of SOAK_FILE");
    std::fs::write(file, format!("{about:#}\n")).expect("SOAK_FILE");
}
