use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Qmp, QmpError};

/// A monitor that greets, then hands each command to `answer` and writes what it returns.
fn monitor(answer: impl Fn(&str, u64) -> String + Send + 'static) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut socket, _): (UnixStream, _) = listener.accept().unwrap();
        socket.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").unwrap();
        for line in BufReader::new(socket.try_clone().unwrap()).lines() {
            let Ok(line) = line else { return };
            let command: Value = serde_json::from_str(&line).unwrap();
            let id = command["id"].as_u64().unwrap();
            let reply = match command["execute"].as_str() {
                Some("qmp_capabilities") => format!("{}\n", json!({ "return": {}, "id": id })),
                Some(name) => answer(name, id),
                None => return,
            };
            if socket.write_all(reply.as_bytes()).is_err() {
                return;
            }
        }
    });
    (dir, path)
}

fn connect(path: &std::path::Path) -> Qmp {
    Qmp::connect(path, false, Duration::from_secs(5)).unwrap()
}

#[test]
fn answers_find_their_question_and_events_keep_their_time() {
    let (_dir, path) = monitor(|_, id| {
        let event = json!({ "event": "STOP", "timestamp": { "seconds": 2, "microseconds": 7 } });
        format!("{event}\n{}\n{}\n", json!({ "return": 1, "id": 999 }), json!({ "return": 42, "id": id }))
    });
    let qmp = connect(&path);
    assert_eq!(qmp.execute("answer", json!({})).unwrap(), 42);
    let event = qmp.wait_event(0, Duration::from_secs(1), |e| e.name == "STOP").unwrap();
    assert_eq!((event.seq, event.micros), (1, 2_000_007));
}

#[test]
fn a_refusal_carries_qemus_words() {
    let (_dir, path) = monitor(|_, id| {
        format!("{}\n", json!({ "error": { "class": "GenericError", "desc": "no such node" }, "id": id }))
    });
    let error = connect(&path).execute("blockdev-del", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused `blockdev-del`: no such node");
}

#[test]
fn silence_is_an_error_and_a_late_answer_is_dropped() {
    let (_dir, path) = monitor(|name, id| match name {
        "slow" => String::new(),
        _ => format!(
            "{}\n{}\n",
            json!({ "return": "late", "id": id - 1 }),
            json!({ "return": "mine", "id": id })
        ),
    });
    let qmp = connect(&path);
    let error = qmp.execute_within("slow", json!({}), Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    assert_eq!(qmp.execute("next", json!({})).unwrap(), "mine");
}

#[test]
fn garbage_and_closing_fail_those_who_wait() {
    let (_dir, path) = monitor(|_, _| "this is not JSON\n".to_owned());
    let qmp = connect(&path);
    let error = qmp.execute("anything", json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    assert!(qmp.is_closed());
}
