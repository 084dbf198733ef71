//! Task workers: what a called function cannot do in the caller's own transaction.
//!
//! In the caller's transaction a digest would lose events (one's own running transaction counts as finished in one's own
//! snapshot), and an upload would hold locks. So the call starts a worker, hands it the task in a block of shared
//! memory, and waits; cancelling the call ends the worker.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use pgrx::{pg_guard, pg_sys};
use serde::{Deserialize, Serialize};

use super::delete::Deletion;
use super::{attach, definitions, functions};
use crate::catalog::audit::{self, Note};
use crate::catalog::retention::Keep;
use crate::files::load;
use crate::pg::bgworker::{self, Handle, Status, Worker};
use crate::pg::dsm::Block;
use crate::pg::security::ActAs;
use crate::pg::spi::{self, View, arg};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, exit, failpoint, wait};
use crate::sources::seek;

/// What a task worker can be asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// One round of all background work; errors are told of these projects (None: of all).
    Tick {
        projects: Option<Vec<i32>>,
    },
    /// Digest, then write everything of these collections to data files.
    Flush {
        scope: Scope,
    },
    /// Merge the data files of these collections.
    Compact {
        scope: Scope,
    },
    /// Set for how long events of a collection are kept; None: all are.
    Keep {
        project_id: i32,
        collection: String,
        keep: Option<Keep>,
    },
    /// Digest, then make the tables of what is new.
    CreateTables,
    /// Hide the events for which a condition is true.
    Delete(Deletion),
    CreateCollection {
        project_id: i32,
        name: String,
    },
    AddField {
        project_id: i32,
        collection: String,
        field: String,
        ty: String,
    },
    /// Drops or renames a definition.
    Change(definitions::Change),
    /// Make a table of foreign files.
    Attach(attach::Request),
    /// Take it away.
    Detach(attach::Detach),
    /// Compare a storage with the manifest.
    CheckStorage {
        storage_id: i32,
    },
    /// Make a storage this database's.
    AdoptStorage {
        storage_id: i32,
    },
    /// Make the catalogue anew from a storage.
    Rebuild {
        storage: String,
    },
    /// Load files into a collection.
    CopyFrom(load::Request),
    /// Let a source go on elsewhere.
    Seek(seek::Request),
}

/// The collections a task is about.
#[derive(Debug, Serialize, Deserialize)]
pub struct Scope {
    /// None: of every project.
    pub projects: Option<Vec<i32>>,
    /// None: every collection.
    pub collection: Option<String>,
}

/// Tells who is inside a transaction block that this call, which takes something away, was not part of it.
pub fn tell_at_once(call: &str) {
    if xact::in_block() {
        PgError::new(
            "00000",
            format!("rakam.{call} takes effect at once; ROLLBACK does not undo it"),
        )
        .notice();
    }
}

/// What a worker is handed.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    task: Task,
    note: Note,
}

/// A task's answer: a value, or the error to raise in the caller.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Done(serde_json::Value),
    Failed {
        sqlstate: String,
        message: String,
        detail: Option<String>,
        hint: Option<String>,
    },
}

/// How often the caller looks whether it stands in its worker's way.
const BLOCKED_INTERVAL: Duration = Duration::from_millis(250);

/// Runs a task in a worker and waits for it.
pub fn run(task: Task) -> Result<serde_json::Value> {
    run_noted(task, Note::default())
}

/// As [`run`]; the worker notes the call that the task is for.
pub fn run_noted(task: Task, note: Note) -> Result<serde_json::Value> {
    xact::ensure_writable("run background work")?;
    let request = serde_json::to_vec(&Request { task, note })
        .map_err(|e| PgError::internal(format!("could not encode a task: {e}")))?;
    let block = Block::create(&request)?;
    let mut extra = [0; 8];
    extra[..4].copy_from_slice(&block.number().to_ne_bytes());
    extra[4..].copy_from_slice(&bgworker::my_pid().to_ne_bytes());
    let mut running = Running::of(start(&extra)?);
    let mut last_look = Instant::now();
    loop {
        match running.handle.status() {
            Status::Stopped => {
                running.ended = true;
                break;
            }
            Status::Running(pid) if last_look.elapsed() >= BLOCKED_INTERVAL => {
                last_look = Instant::now();
                ensure_not_in_the_way(pid)?;
            }
            Status::Running(_) | Status::NotStarted => {}
        }
        wait::wait(None, Duration::from_millis(50));
    }
    if !block.is_done() {
        return Err(
            PgError::new("57P01", "the background worker ended before it was done")
                .hint("The server log says why; the call may be repeated."),
        );
    }
    match serde_json::from_slice(&block.read()) {
        Ok(Reply::Done(value)) => Ok(value),
        Ok(Reply::Failed {
            sqlstate,
            message,
            detail,
            hint,
        }) => Err(PgError {
            sqlstate,
            message,
            detail,
            hint,
        }),
        Err(e) => Err(PgError::internal(format!(
            "malformed reply of a worker: {e}"
        ))),
    }
}

/// The worker, ended when the call is (also by an error or a cancel, or because this process ends).
struct Running {
    handle: Rc<Handle>,
    ended: bool,
}

thread_local! {
    /// The worker that this process waits for. A process that is terminated unwinds nothing.
    static RUNNING: RefCell<Option<Rc<Handle>>> = const { RefCell::new(None) };
}

impl Running {
    fn of(handle: Handle) -> Self {
        let handle = Rc::new(handle);
        RUNNING.replace(Some(Rc::clone(&handle)));
        exit::on_exit(|| {
            if let Some(handle) = RUNNING.take() {
                handle.terminate();
            }
        });
        Self {
            handle,
            ended: false,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.take();
        if !self.ended {
            self.handle.terminate();
        }
    }
}

fn start(extra: &[u8]) -> Result<Handle> {
    // Others do not see what workers are.
    let owner = ActAs::owner();
    let tasks: i64 = spi::first(
        View::Current,
        "SELECT count(*) FROM pg_catalog.pg_stat_activity
         WHERE datid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
           AND backend_type = 'rakam task'",
        &[],
        |row| row.must(1),
    )?
    .unwrap_or(0);
    drop(owner);
    if tasks as usize >= bgworker::max_tasks() {
        return Err(
            PgError::new("53000", "too many background tasks of rakam are running")
                .hint("Try again later, or raise rakam.max_workers."),
        );
    }
    bgworker::start(&Worker {
        kind: "rakam task",
        name: "rakam task",
        function: "rakam_task_main",
        argument: pg_sys::Datum::from(bgworker::my_database()),
        extra,
        notify: true,
        restart_s: None,
    })
}

/// The worker cannot finish while this session holds what it waits for.
fn ensure_not_in_the_way(worker: i32) -> Result<()> {
    let blocked = spi::first(
        View::Current,
        "SELECT $2 = ANY (pg_catalog.pg_blocking_pids($1))",
        &[arg(worker), arg(bgworker::my_pid())],
        |row| row.must(1),
    )?
    .unwrap_or(false);
    if blocked {
        return Err(in_the_way());
    }
    Ok(())
}

/// The caller holds what its task needs.
pub fn in_the_way() -> PgError {
    PgError::new(
        "55P03",
        "the current transaction holds a lock that the background work needs",
    )
    .hint("Commit or roll back first, then call it in a transaction of its own.")
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_task_main(argument: pg_sys::Datum) {
    bgworker::begin(Some(pg_sys::Oid::from(argument.value() as u32)));
    let extra = bgworker::extra();
    let number = u32::from_ne_bytes([extra[0], extra[1], extra[2], extra[3]]);
    let Some(block) = xact::plain(|| Block::attach(number).inspect(Block::pin)) else {
        // The caller has given up already.
        return;
    };
    bgworker::show(Some(c"rakam task"));
    let reply = match serde_json::from_slice::<Request>(&block.read()) {
        Ok(Request { task, note }) => match perform(&task, note) {
            Ok(value) => Reply::Done(value),
            Err(Failure::ExtensionGone) => failed(PgError::new("55000", "the extension rakam is not installed")
                .hint("It was created in a transaction that has not committed yet, or has been dropped.")),
            Err(Failure::Error(error)) => failed(error),
        },
        Err(e) => failed(PgError::internal(format!("malformed task: {e}"))),
    };
    let bytes = serde_json::to_vec(&reply).unwrap_or_default();
    if !block.reply(&bytes) {
        let short = failed(PgError::new(
            "54000",
            "the answer of a background task is too large",
        ));
        block.reply(&serde_json::to_vec(&short).unwrap_or_default());
    }
    failpoint::hit("task.after_reply");
}

fn perform(task: &Task, note: Note) -> std::result::Result<serde_json::Value, Failure> {
    audit::expect(note);
    let value = functions::perform(task)?;
    // Unless the transaction that took effect has noted it.
    xact::worker(audit::store_expected)?;
    Ok(value)
}

fn failed(error: PgError) -> Reply {
    Reply::Failed {
        sqlstate: error.sqlstate,
        message: error.message,
        detail: error.detail,
        hint: error.hint,
    }
}
