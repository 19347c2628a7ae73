//! The daemon from start to end: log, lock, socket, requests, signals.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshots::{Code, Context, Engine, OpState, Settings};
use tokio::signal::unix::{SignalKind, signal};

use crate::api::{App, router};
use crate::{Problem, allocator, log, socket};

/// How long the end waits for operations, and then for answers under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often what nothing needs is looked for.
const COLLECT_EVERY: Duration = Duration::from_secs(600);

/// How often it is looked whether an operation has ended.
const TEND_EVERY: Duration = Duration::from_millis(200);

/// How often it is looked whether a guest that had no room has some.
const RESUME_EVERY: Duration = Duration::from_secs(2);

/// When it is tried again to do what is to be done at a power-off, if no operation could be started.
const PUT_OFF: Duration = Duration::from_secs(1);

/// How often the daemon sees whether its socket is still there.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How to serve.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Leave the caller's session and terminal, and log to the file alone.
    pub detached: bool,
}

/// Serves the state folder until SIGTERM, SIGINT or `POST /v1/shutdown`. Machines run on afterwards.
///
/// # Errors
/// The state folder cannot be used or belongs to another daemon; the socket cannot be bound.
pub fn serve(settings: Settings, options: Options) -> Result<(), Problem> {
    let path = socket::path(&settings.state)?;
    // Nothing that is made here is for others, whoever may pass through the folder.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    socket::make_folder(&settings.state)?;
    let file = log::open(&settings.state)
        .map_err(|error| Problem::new(socket::class(&error), "cannot open daemon.log").because(&error))?;
    if options.detached {
        // Fails only for the leader of a process group, who has nothing to leave.
        let _ = rustix::process::setsid();
    }
    log::start(file, !options.detached);
    allocator::give_back();
    // The caller prints what goes wrong; detached, its stderr is the log.
    run(settings, &path)
}

fn run(settings: Settings, path: &std::path::Path) -> Result<(), Problem> {
    let (engine, notes) = Engine::open(settings.clone())?;
    tracing::info!(version = crate::VERSION, state = %settings.state.display(), "open");
    for note in &notes {
        tracing::warn!("{note}");
    }
    let starter = Arc::clone(&engine);
    std::thread::Builder::new()
        .name("autostart".into())
        .spawn(move || starter.autostart())
        .map_err(|error| Problem::new(Code::Failed, "cannot start a thread").because(&error))?;
    collect_in_background(&engine)
        .and_then(|()| resume_in_background(&engine))
        .and_then(|()| tend_in_background(&engine))
        .and_then(|()| expire_in_background(&engine))
        .map_err(|error| Problem::new(Code::Failed, "cannot start a thread").because(&error))?;
    let app = App::new(Arc::clone(&engine), settings, notes);
    watch_in_background(&app)
        .map_err(|error| Problem::new(Code::Failed, "cannot start a thread").because(&error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::new(Code::Failed, "cannot start the runtime").because(&error))?;
    let result = runtime.block_on(listen(app, path));
    engine.close();
    // What still reads must not hold up the end.
    runtime.shutdown_background();
    result
}

/// Frees now and then what nothing needs and undo no longer pins, and sees to the copy of the catalog. It is journalled only when there
/// is something to free.
fn collect_in_background(engine: &Arc<Engine>) -> std::io::Result<()> {
    let engine = Arc::downgrade(engine);
    let collect = move || {
        // What could not be freed the last time will not be this time.
        let mut in_vain = 0;
        loop {
            std::thread::sleep(COLLECT_EVERY);
            let Some(engine) = engine.upgrade() else { return };
            let planned = engine.gc(&Context::new(), false, true).map_or(0, |report| report.bytes);
            if planned > in_vain {
                in_vain = match engine.gc(&Context::new(), false, false) {
                    Ok(report) => planned.saturating_sub(report.bytes),
                    Err(error) => {
                        tracing::warn!(%error, "gc in the background");
                        0
                    }
                };
            }
            engine.keep_copy_of_catalog();
        }
    };
    std::thread::Builder::new().name("gc".into()).spawn(collect).map(drop)
}

/// Lets guests go on that the host had no room for, when it has some again.
fn resume_in_background(engine: &Arc<Engine>) -> std::io::Result<()> {
    let engine = Arc::downgrade(engine);
    let resume = move || {
        loop {
            std::thread::sleep(RESUME_EVERY);
            let Some(engine) = engine.upgrade() else { return };
            engine.let_full_disks_go_on();
        }
    };
    std::thread::Builder::new().name("resume".into()).spawn(resume).map(drop)
}

/// Tends the page stores after every operation, and compresses what is cold now and then, when there is nothing else to do.
fn tend_in_background(engine: &Arc<Engine>) -> std::io::Result<()> {
    let engine = Arc::downgrade(engine);
    let tend = move || {
        // Whatever else there is to do comes first. As far as the system lets us.
        let _ = rustix::process::setpriority_process(None, 19);
        let (mut tended, mut compressed) = (None, Instant::now());
        loop {
            std::thread::sleep(TEND_EVERY);
            let Some(strong) = engine.upgrade() else { return };
            let ended = strong.operations_ended();
            let compress = compressed.elapsed() > COLLECT_EVERY;
            if compress || tended != Some(ended) {
                // Our own hold on the engine is one: with no other it has ended.
                let done = strong.tend(compress, &|| Arc::strong_count(&strong) == 1);
                tended = done.then_some(ended);
                compressed = if compress && done { Instant::now() } else { compressed };
            }
        }
    };
    std::thread::Builder::new().name("tend".into()).spawn(tend).map(drop)
}

/// Removes what has expired, at the start and whenever something does.
fn expire_in_background(engine: &Arc<Engine>) -> std::io::Result<()> {
    let alarm = engine.expiry_alarm();
    let engine = Arc::downgrade(engine);
    let expire = move || {
        loop {
            let Some(strong) = engine.upgrade() else { return };
            let next = strong.expire();
            drop(strong);
            alarm.wait(next);
        }
    };
    std::thread::Builder::new().name("expire".into()).spawn(expire).map(drop)
}

/// Waits for the ends of machines, and has done what is to be done with those that were powered off, each as an operation like any other.
fn watch_in_background(app: &Arc<App>) -> std::io::Result<()> {
    let ends = app.engine.ends();
    let app = Arc::downgrade(app);
    let watch = move || {
        // Operations by machine: one that waits for its turn is not started twice.
        let mut started: HashMap<String, String> = HashMap::new();
        loop {
            let Some(app) = app.upgrade() else { return };
            let mut watch = app.engine.look_for_ends();
            started
                .retain(|_, id| app.operations.find(id).is_some_and(|view| view.state == OpState::Running));
            for (target, name) in std::mem::take(&mut watch.due) {
                if started.contains_key(&target) {
                    continue;
                }
                match app.see_to_power_off(target.clone(), name) {
                    Ok(view) => _ = started.insert(target, view.id),
                    Err(problem) => {
                        tracing::warn!(target, "{} is put off", problem.detail);
                        watch.limit = watch.limit.min(PUT_OFF);
                    }
                }
            }
            drop(app);
            ends.wait(&watch.processes, watch.limit);
        }
    };
    std::thread::Builder::new().name("watch".into()).spawn(watch).map(drop)
}

async fn listen(app: Arc<App>, path: &std::path::Path) -> Result<(), Problem> {
    let cannot = |error: std::io::Error| {
        Problem::new(Code::Failed, format!("cannot serve {}", path.display())).because(&error)
    };
    let ended = end(&app).map_err(cannot)?;
    let listener = socket::bind(path)?;
    let bound = socket::Bound::new(path);
    tracing::info!(socket = %path.display(), "listen");
    let mut stop = app.stop.subscribe();
    let graceful = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let server = axum::serve(listener, router(Arc::clone(&app))).with_graceful_shutdown(graceful);
    let mut server = tokio::spawn(server.into_future());
    let result = tokio::select! {
        // First of all: the server may notice the same wish to end in the same moment.
        biased;
        () = ended => {
            // Nothing new starts; whoever follows an operation may see its end.
            app.operations.close();
            drain(&app).await;
            // From here on new clients find no socket, and start the next daemon as soon as our lock is gone.
            bound.remove();
            app.stop.send_replace(true);
            match tokio::time::timeout(PATIENCE, &mut server).await {
                Ok(Ok(result)) => result.map_err(cannot),
                // A reader that does not go away is left behind.
                Ok(Err(_)) | Err(_) => Ok(()),
            }
        }
        () = gone(&bound) => {
            tracing::error!("the state folder is gone from under the daemon");
            app.operations.close();
            drain(&app).await;
            Ok(())
        }
        result = &mut server => match result {
            Ok(result) => result.map_err(cannot),
            Err(error) => Err(Problem::new(Code::Failed, "the server died").because(&error)),
        },
    };
    // Still ours: nobody else serves this folder before the engine lets go of its lock.
    bound.remove();
    tracing::info!("end");
    result
}

/// Comes when nobody finds our socket any more: somebody has removed or moved the state folder.
async fn gone(bound: &socket::Bound) {
    while bound.is_there() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Comes when somebody wants the daemon to end, by signal or by request.
fn end(app: &Arc<App>) -> std::io::Result<impl Future<Output = ()> + use<>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let app = Arc::clone(app);
    Ok(async move {
        let mut stop = app.stop.subscribe();
        tokio::select! {
            _ = term.recv() => tracing::info!("SIGTERM"),
            _ = int.recv() => tracing::info!("SIGINT"),
            _ = stop.wait_for(|stop| *stop) => tracing::info!("asked to end"),
        }
    })
}

/// Waits a moment for what is under way. Nothing is cancelled: what does not make it is rolled back or finished by the
/// next daemon, from the journal.
async fn drain(app: &App) {
    let until = tokio::time::Instant::now() + PATIENCE;
    while !app.operations.running().is_empty() {
        if tokio::time::Instant::now() >= until {
            let left = app.operations.running().len();
            tracing::warn!(left, "operations are left to the next start");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
