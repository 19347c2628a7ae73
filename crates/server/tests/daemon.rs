//! A daemon from start to end, over its socket, with the real engine and no machine that runs.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use server::client::{Client, Method, Until, path};
use server::operations::OperationView;
use server::snapshots::{Code, Group, GroupRemovePlan, Machine, Operation, Settings};
use server::{Options, Problem, serve};

fn settings(state: &Path) -> Settings {
    Settings { state: state.to_owned(), qemu: None, qemu_img: None, accel: None, warden: None }
}

fn daemon(state: &Path) -> (Client, JoinHandle<Result<(), Problem>>) {
    let settings = settings(state);
    let thread = std::thread::spawn(move || serve(settings, Options { detached: true }));
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(client) = Client::existing(state).unwrap() {
            return (client, thread);
        }
        assert!(Instant::now() < until && !thread.is_finished(), "it does not start");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_daemon_answers_refuses_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let (client, thread) = daemon(folder.path());

    let machines: Vec<Machine> = client.get("/v1/targets").unwrap();
    assert!(machines.is_empty());
    let problem = client.get::<Machine>(&path(&["targets", "nope"]).unwrap()).unwrap_err();
    assert_eq!((problem.code, problem.status), (Code::NotFound, 404));
    let problem = client.get::<Value>("/v1/snapshots/web").unwrap_err();
    assert_eq!(problem.code, Code::Usage);
    let document: Value = client.get("/v1/openapi.json").unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let problem = client.get::<Value>("/v1/operations/0123456789abcdef").unwrap_err();
    assert_eq!(problem.code, Code::NotFound);

    // The socket is its owner's alone, and the folder has one daemon.
    let socket = folder.path().join("spinney.sock");
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let second = serve(settings(folder.path()), Options::default()).unwrap_err();
    assert_eq!(second.code, Code::Refused);
    assert!(socket.exists(), "the refused one leaves the socket alone");

    assert!(Client::shutdown(folder.path()).unwrap());
    thread.join().unwrap().unwrap();
    assert!(!socket.exists());
    assert!(Client::existing(folder.path()).unwrap().is_none());
    assert!(!Client::shutdown(folder.path()).unwrap());
}

#[test]
fn an_operation_is_followed_to_its_result_and_to_its_problem() {
    let folder = tempfile::tempdir().unwrap();
    let (client, thread) = daemon(folder.path());

    let started: OperationView =
        client.ask(Method::POST, "/v1/gc", Some(&json!({ "dry_run": true }))).unwrap();
    assert_eq!(started.kind, "gc");
    let mut looks = 0;
    let report: Value = client.follow(started.clone(), Until::Ended, |_| looks += 1).unwrap();
    assert_eq!((&report["dry_run"], looks > 0), (&json!(true), true));
    let again: OperationView = client.get(&path(&["operations", &started.id]).unwrap()).unwrap();
    assert_eq!(again.result, Some(report));

    let started: OperationView = client.ask(Method::POST, "/v1/targets/nope/start", None::<&()>).unwrap();
    let problem = client.follow::<Machine>(started, Until::Ended, |_| {}).unwrap_err();
    assert_eq!(problem.code, Code::NotFound);
    let _: Vec<Operation> = client.get_with("/v1/operations", &[("limit", "5")]).unwrap();

    Client::shutdown(folder.path()).unwrap();
    thread.join().unwrap().unwrap();
}

#[test]
fn groups_are_made_shown_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let (client, thread) = daemon(folder.path());
    let one = path(&["groups", "work"]).unwrap();

    let body = json!({ "name": "work" });
    let started: OperationView = client.ask(Method::POST, "/v1/groups", Some(&body)).unwrap();
    assert_eq!((started.kind.as_str(), started.subject.as_str()), ("group create", "work"));
    let made: Group = client.follow(started, Until::Ended, |_| {}).unwrap();
    let shown: Group = client.get(&one).unwrap();
    assert_eq!((shown.id, shown.targets.len()), (made.id, 0));
    let all: Vec<Group> = client.get("/v1/groups").unwrap();
    assert_eq!(all.iter().map(|group| group.name.as_str()).collect::<Vec<_>>(), ["default", "work"]);
    let misspelt = json!({ "name": "x", "ower": "me" });
    let problem = client.ask::<Value>(Method::POST, "/v1/groups", Some(&misspelt)).unwrap_err();
    assert_eq!(problem.code, Code::Usage);

    let dry = format!("{one}?dry_run=true");
    let plan: GroupRemovePlan = client.ask(Method::DELETE, &dry, None::<&()>).unwrap();
    assert!(!plan.needs_confirmation, "nothing is stored in it: {plan:?}");
    let started: OperationView = client.ask(Method::DELETE, &one, None::<&()>).unwrap();
    let done: GroupRemovePlan = client.follow(started, Until::Ended, |_| {}).unwrap();
    assert_eq!((done.group.as_str(), done.bytes), ("work", 0));
    assert_eq!(client.get::<Group>(&one).unwrap_err().status, 404);
    let default = path(&["groups", "default"]).unwrap();
    let refused = client.ask::<Value>(Method::DELETE, &format!("{default}?dry_run=true"), None::<&()>);
    assert_eq!(refused.unwrap_err().status, 409);

    Client::shutdown(folder.path()).unwrap();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_daemon_that_cannot_start_is_reported_with_the_end_of_its_log() {
    let folder = tempfile::tempdir().unwrap();
    // An executable that ends at once stands for a daemon that cannot start.
    let problem = Client::start(folder.path(), Path::new("/bin/false")).unwrap_err();
    assert!(problem.detail.contains("cannot start the daemon"), "{problem:?}");
    assert!(problem.cause.first().unwrap().contains("exit status: 1"), "{problem:?}");
    assert!(problem.hint.unwrap().contains("spinney serve"));
}
