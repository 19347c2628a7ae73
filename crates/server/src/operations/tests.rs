//! The registry, with closures in the engine's place.

use std::sync::mpsc;

use super::*;

fn request(kind: &'static str, key: Option<&str>) -> Request {
    Request { kind, subject: "web".into(), key: key.map(str::to_owned), parameters: Value::Null }
}

async fn end_of(operations: &Operations, id: &str) -> OperationView {
    for _ in 0..100 {
        let view = operations.wait(id, Duration::from_secs(1)).await.expect("known");
        if view.state != OpState::Running {
            return view;
        }
    }
    panic!("{id} does not end");
}

#[tokio::test]
async fn a_result_is_kept() {
    let operations = Arc::new(Operations::default());
    let view = operations.start(request("take", None), |_| Ok(7)).unwrap();
    assert_eq!(view.state, OpState::Running);
    let end = end_of(&operations, &view.id).await;
    assert_eq!((end.state, end.result), (OpState::Done, Some(Value::from(7))));
    assert!(end.ended.is_some());
    assert_eq!(operations.find(&view.id[..6]).expect("by prefix").id, view.id);
}

#[tokio::test]
async fn the_same_key_finds_the_same_operation() {
    let operations = Arc::new(Operations::default());
    let (count, counted) = mpsc::channel();
    let work = |count: mpsc::Sender<()>| {
        move |_: &Context| {
            count.send(()).unwrap();
            Ok(())
        }
    };
    let first = operations.start(request("take", Some("k")), work(count.clone())).unwrap();
    let second = operations.start(request("take", Some("k")), work(count.clone())).unwrap();
    assert_eq!(first.id, second.id);
    end_of(&operations, &first.id).await;
    let third = operations.start(request("take", Some("k")), work(count)).unwrap();
    assert_eq!(third.id, first.id);
    assert_eq!(counted.iter().count(), 1);

    let other = operations.start(request("rm", Some("k")), |_| Ok(())).unwrap_err();
    assert_eq!(other.code, Code::Usage);
}

#[tokio::test]
async fn cancel_sets_the_flag_and_the_state_says_so() {
    let operations = Arc::new(Operations::default());
    let view = operations
        .start(request("take", None), |cx| -> Result<(), Problem> {
            while !cx.cancel.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Problem::new(Code::Interrupted, "cancelled"))
        })
        .unwrap();
    assert_eq!(operations.running().len(), 1);
    operations.cancel(&view.id).expect("known");
    assert_eq!(end_of(&operations, &view.id).await.state, OpState::Cancelled);
    assert!(operations.running().is_empty());
    assert!(operations.cancel("0000").is_none());
}

#[tokio::test]
async fn waiting_returns_when_progress_changes() {
    let operations = Arc::new(Operations::default());
    let (go, gone) = mpsc::channel::<()>();
    let view = operations
        .start(request("take", None), move |cx| {
            std::thread::sleep(Duration::from_millis(150));
            cx.progress.done.store(5, Ordering::Relaxed);
            let _ = gone.recv();
            Ok(())
        })
        .unwrap();
    let seen = operations.wait(&view.id, Duration::from_secs(20)).await.expect("known");
    assert_eq!((seen.state, seen.progress.done), (OpState::Running, 5));
    drop(go);
    end_of(&operations, &view.id).await;
}

#[tokio::test]
async fn a_panic_becomes_a_problem() {
    let operations = Arc::new(Operations::default());
    let view =
        operations.start(request("take", None), |_| -> Result<(), Problem> { panic!("planted") }).unwrap();
    let end = end_of(&operations, &view.id).await;
    assert_eq!(end.state, OpState::Failed);
    assert!(end.problem.expect("a problem").detail.contains("take web"));
}

#[tokio::test]
async fn memory_is_bounded() {
    let operations = Arc::new(Operations::default());
    let first = operations.start(request("take", Some("first")), |_| Ok(())).unwrap();
    for n in 0..REMEMBERED + 10 {
        let view = operations.start(request("take", Some(&n.to_string())), |_| Ok(())).unwrap();
        end_of(&operations, &view.id).await;
    }
    let table = operations.table();
    assert!(table.by_id.len() <= REMEMBERED && table.by_key.len() <= REMEMBERED);
    assert!(table.find(&first.id).is_none());
}

#[tokio::test]
async fn nothing_starts_once_closed() {
    let operations = Arc::new(Operations::default());
    operations.close();
    assert_eq!(operations.start(request("take", None), |_| Ok(())).unwrap_err().code, Code::Refused);
}
