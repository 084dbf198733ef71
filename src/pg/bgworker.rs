//! Background workers: registration, start-up and signals.
//!
//! SIGTERM is Postgres' own `die`: it interrupts a long statement, which a flag alone would not.

use std::ffi::{CStr, c_int};

use pgrx::pg_sys;
#[cfg(not(feature = "pg18"))]
use pgrx::pg_sys::pqsignal;
#[cfg(feature = "pg18")]
use pgrx::pg_sys::pqsignal_be as pqsignal;

use super::error::{PgError, Result};
use super::guc;

// The server's handlers by address: pgrx wraps functions for calls, not for use as signal handlers.
unsafe extern "C-unwind" {
    #[link_name = "die"]
    fn server_die(signal: c_int);
    #[link_name = "StatementCancelHandler"]
    fn server_cancel(signal: c_int);
    #[link_name = "SignalHandlerForConfigReload"]
    fn server_reload(signal: c_int);
}

/// What kind of worker to register.
pub struct Worker<'a> {
    /// Shown as backend_type in pg_stat_activity.
    pub kind: &'a str,
    pub name: &'a str,
    /// The exported function of this library.
    pub function: &'a str,
    pub argument: pg_sys::Datum,
    /// Copied to the worker, at most 128 bytes.
    pub extra: &'a [u8],
    /// Whether this process is told when the worker starts and stops.
    pub notify: bool,
    /// Seconds after which the postmaster restarts it; None never.
    pub restart_s: Option<i32>,
}

fn describe(worker: &Worker<'_>) -> pg_sys::BackgroundWorker {
    let mut bgw = pg_sys::BackgroundWorker {
        bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION)
            as c_int,
        bgw_start_time: pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished,
        bgw_restart_time: worker.restart_s.unwrap_or(pg_sys::BGW_NEVER_RESTART),
        bgw_main_arg: worker.argument,
        bgw_notify_pid: if worker.notify { my_pid() } else { 0 },
        ..Default::default()
    };
    copy_text(&mut bgw.bgw_name, worker.name.as_bytes());
    copy_text(&mut bgw.bgw_type, worker.kind.as_bytes());
    copy_text(&mut bgw.bgw_library_name, b"rakam");
    copy_text(&mut bgw.bgw_function_name, worker.function.as_bytes());
    for (to, from) in bgw.bgw_extra.iter_mut().zip(worker.extra) {
        *to = *from as std::ffi::c_char;
    }
    bgw
}

fn copy_text(to: &mut [std::ffi::c_char], text: &[u8]) {
    let room = to.len() - 1;
    for (to, from) in to[..room].iter_mut().zip(text) {
        *to = *from as std::ffi::c_char;
    }
}

/// Registers a worker that the postmaster starts with the server. In the postmaster only.
pub fn register_static(worker: &Worker<'_>) {
    let mut bgw = describe(worker);
    // SAFETY: the structure is copied by the postmaster.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut bgw) };
}

/// A worker started from this process.
pub struct Handle(*mut pg_sys::BackgroundWorkerHandle);

/// Whether a worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    NotStarted,
    Running(i32),
    Stopped,
}

/// Starts a worker; 53000 when every slot of max_worker_processes is taken.
pub fn start(worker: &Worker<'_>) -> Result<Handle> {
    let mut bgw = describe(worker);
    let mut handle = std::ptr::null_mut();
    // SAFETY: the structure is copied; the handle lives in the current memory context, at least as long as
    // the statement that waits for it (workers use the process-long context, see `start_detached`).
    let started = unsafe { pg_sys::RegisterDynamicBackgroundWorker(&mut bgw, &mut handle) };
    if started {
        Ok(Handle(handle))
    } else {
        Err(
            PgError::new("53000", "no free slot for a background worker")
                .hint("Raise max_worker_processes and restart the server."),
        )
    }
}

/// Starts a worker that nobody waits for.
pub fn start_detached(worker: &Worker<'_>) -> Result<()> {
    start(worker).map(|_| ())
}

impl Handle {
    pub fn status(&self) -> Status {
        let mut pid = 0;
        // SAFETY: the handle came from RegisterDynamicBackgroundWorker and is alive.
        match unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut pid) } {
            pg_sys::BgwHandleStatus::BGWH_STARTED => Status::Running(pid),
            pg_sys::BgwHandleStatus::BGWH_NOT_YET_STARTED => Status::NotStarted,
            _ => Status::Stopped,
        }
    }

    /// Forgets about the worker, where the handle lives as long as the process: in workers.
    pub fn release(self) {
        // SAFETY: allocated by RegisterDynamicBackgroundWorker in a context that is still there.
        unsafe { pg_sys::pfree(self.0.cast()) };
    }

    pub fn terminate(&self) {
        // SAFETY: as above; a worker that has ended is left alone.
        unsafe { pg_sys::TerminateBackgroundWorker(self.0) };
    }
}

/// What ALTER DATABASE and ALTER ROLE may have set for everybody, and would change what a worker does, as autovacuum
/// pins its own.
const PINNED: &[(&CStr, &CStr)] = &[
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    (c"statement_timeout", c"0"),
    (c"lock_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    (c"transaction_timeout", c"0"),
    (c"session_replication_role", c"origin"),
    (c"row_security", c"on"),
    (c"transform_null_equals", c"off"),
    (c"TimeZone", c"UTC"),
    (c"DateStyle", c"ISO"),
];

/// First thing in a worker's main function: signals, then the database (None: shared catalogs only), as the
/// bootstrap superuser.
pub fn begin(database: Option<pg_sys::Oid>) {
    // SAFETY: installs the server's own handlers, then lets signals in; connects this fresh process.
    unsafe {
        pqsignal(pg_sys::SIGTERM as c_int, Some(server_die));
        pqsignal(pg_sys::SIGINT as c_int, Some(server_cancel));
        pqsignal(pg_sys::SIGHUP as c_int, Some(server_reload));
        pg_sys::BackgroundWorkerUnblockSignals();
        match database {
            Some(oid) => {
                pg_sys::BackgroundWorkerInitializeConnectionByOid(oid, pg_sys::InvalidOid, 0);
            }
            None => {
                pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0)
            }
        }
        for (name, value) in PINNED {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

/// Applies a configuration reload, if one was asked for.
pub fn reload_if_asked() {
    // SAFETY: a flag set by the signal handler; the configuration is read on this process' own thread.
    unsafe {
        if pg_sys::ConfigReloadPending != 0 {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// The same in the middle of something, where this process is a worker: a session does it between its commands.
pub fn reload_in_worker() {
    // SAFETY: reads a backend variable.
    if unsafe { !pg_sys::MyBgworkerEntry.is_null() } {
        reload_if_asked();
    }
}

/// What pg_stat_activity shows of this worker.
pub fn show(activity: Option<&CStr>) {
    let (state, text) = match activity {
        Some(text) => (pg_sys::BackendState::STATE_RUNNING, text.as_ptr()),
        None => (pg_sys::BackendState::STATE_IDLE, std::ptr::null()),
    };
    // SAFETY: the text is copied.
    unsafe { pg_sys::pgstat_report_activity(state, text) };
}

/// The argument block of this worker.
pub fn extra() -> [u8; 128] {
    // SAFETY: MyBgworkerEntry is set in every background worker.
    let extra = unsafe { (*pg_sys::MyBgworkerEntry).bgw_extra };
    extra.map(|b| b as u8)
}

/// Whether a process of this server has this id.
pub fn is_running(pid: i32) -> bool {
    // SAFETY: looks the id up in the server's own table; zero is never in it.
    pid > 0 && unsafe { !pg_sys::BackendPidGetProc(pid).is_null() }
}

pub fn my_pid() -> i32 {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::MyProcPid }
}

pub fn my_database() -> pg_sys::Oid {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::MyDatabaseId }
}

/// How many task workers may run at a time in this database.
pub fn max_tasks() -> usize {
    guc::max_workers()
}
