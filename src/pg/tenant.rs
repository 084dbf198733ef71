//! Code that a tenant supplies, run inside somebody else's statement: as a role of the tenant, unable to become
//! another one, with pinned settings and a time limit, in a subtransaction that takes back whatever it did when it
//! fails.
//!
//! The operation is security-restricted until the subtransaction ends. That refuses SET ROLE and SET SESSION
//! AUTHORIZATION, prepared statements and temporary tables that would outlive it, and a trigger whose event is
//! deferred: it would run at commit, as whoever commits. Settings that the code changes are put back.

use std::ffi::{CStr, CString, c_int};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder};

use super::error::{PgError, Result};
use super::{settings, xact};

/// Who runs it, where its names resolve, and how long it may take.
pub struct Tenant<'a> {
    pub user: pg_sys::Oid,
    /// The schema between pg_catalog and pg_temp on the search path.
    pub schema: &'a str,
    /// Zero: as long as the statement around it.
    pub timeout: Duration,
}

/// Why the tenant's code gave no result.
#[derive(Debug)]
pub enum Failure {
    /// It failed by itself; what it did is rolled back.
    Tenant(PgError),
    /// It took longer than it may; what it did is rolled back.
    TimedOut(PgError),
    /// The statement around it was cancelled or ran out of its own time: not the tenant's error to keep.
    Cancelled(PgError),
}

/// The time limit of the running code. Code that such code calls runs within the limit of the outermost.
pub struct Timer {
    /// None: no limit, or the limit is somebody else's.
    timeout: Option<Duration>,
    statement_timeout_was_active: bool,
}

/// Runs `work`, which calls the tenant's functions, in a subtransaction. `Err` of `work` rolls it back too.
///
/// A snapshot is active meanwhile; memory that `work` allocates in the current context stays.
pub fn attempt<T>(
    tenant: &Tenant<'_>,
    work: impl FnOnce(&Timer) -> Result<T>,
) -> std::result::Result<T, Failure> {
    let path = CString::new(format!(
        "pg_catalog, {}, pg_temp",
        super::spi::quote_ident(tenant.schema)
    ))
    .map_err(|_| Failure::Tenant(PgError::internal("NUL byte in a schema's name")))?;
    // SAFETY: as PL/pgSQL does for a block with an exception handler: memory context and resource owner are put
    // back after the subtransaction has ended, whichever way.
    let (memory, owner) = unsafe {
        let saved = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(saved.0);
        saved
    };
    let timer = Timer::start(tenant.timeout);
    let outcome = catch(|| {
        let restricted = Restricted::enter(tenant.user, &path);
        let value = {
            let _snapshot = ActiveSnapshot::ensure();
            work(&timer)
        };
        restricted.leave();
        value
    });
    let timed_out = timer.stop();
    // SAFETY: ends the subtransaction begun above; after an error its abort restores user, settings and snapshots.
    unsafe {
        match &outcome {
            Ok(Ok(_)) => pg_sys::ReleaseCurrentSubTransaction(),
            _ => pg_sys::RollbackAndReleaseCurrentSubTransaction(),
        }
        pg_sys::MemoryContextSwitchTo(memory);
        pg_sys::CurrentResourceOwner = owner;
    }
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Failure::Tenant(error)),
        Err(caught) if caught.is_cancel => Err(match timed_out {
            true => Failure::TimedOut(PgError::new(
                "57014",
                format!("canceled after {} ms", tenant.timeout.as_millis()),
            )),
            false => Failure::Cancelled(caught.error),
        }),
        Err(caught) => Err(Failure::Tenant(caught.error)),
    }
}

struct Caught {
    error: PgError,
    /// The server's own cancel, not an error that the code raised with the same SQLSTATE.
    is_cancel: bool,
}

fn catch<T>(work: impl FnOnce() -> T) -> std::result::Result<T, Caught> {
    let work = std::panic::AssertUnwindSafe(work);
    PgTryBuilder::new(std::panic::AssertUnwindSafe(move || {
        let std::panic::AssertUnwindSafe(work) = work;
        Ok(work())
    }))
    .catch_others(|caught| {
        let report = match &caught {
            CaughtError::PostgresError(r) | CaughtError::ErrorReport(r) => r,
            CaughtError::RustPanic { ereport, .. } => ereport,
        };
        let is_cancel = report.sql_error_code() == PgSqlErrorCode::ERRCODE_QUERY_CANCELED
            && report.function_name() != Some("exec_stmt_raise");
        Err(Caught {
            error: xact::error_of(&caught),
            is_cancel,
        })
    })
    .execute()
}

/// Another user and pinned settings. Left by [`Self::leave`]; after an error the subtransaction's abort does it.
struct Restricted {
    user: pg_sys::Oid,
    context: c_int,
    nest_level: c_int,
}

impl Restricted {
    fn enter(user: pg_sys::Oid, path: &CStr) -> Self {
        let mut previous = pg_sys::InvalidOid;
        let mut context = 0;
        // SAFETY: plain reads and writes of backend variables; a GUC nest level of the subtransaction.
        unsafe {
            let nest_level = pg_sys::NewGUCNestLevel();
            settings::pin(c"search_path", path);
            settings::pin_defaults();
            // What the session was given by the server's configuration, not what the caller has set.
            let memory = pg_sys::GetConfigOptionResetString(c"work_mem".as_ptr());
            if !memory.is_null() {
                let memory = CStr::from_ptr(memory).to_owned();
                settings::pin(c"work_mem", &memory);
            }
            pg_sys::GetUserIdAndSecContext(&mut previous, &mut context);
            pg_sys::SetUserIdAndSecContext(
                user,
                context
                    | (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION)
                        as i32,
            );
            Self {
                user: previous,
                context,
                nest_level,
            }
        }
    }

    fn leave(self) {
        // SAFETY: restores what was there; `false` also undoes settings that the code itself has changed.
        unsafe {
            pg_sys::AtEOXact_GUC(false, self.nest_level);
            pg_sys::SetUserIdAndSecContext(self.user, self.context);
        }
    }
}

/// A snapshot where none is active (the end of an INSERT … RETURNING). After an error the subtransaction pops it.
struct ActiveSnapshot {
    pushed: bool,
}

impl ActiveSnapshot {
    fn ensure() -> Self {
        // SAFETY: inside a transaction; popped in Drop.
        unsafe {
            let pushed = !pg_sys::ActiveSnapshotSet();
            if pushed {
                pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            }
            Self { pushed }
        }
    }
}

impl Drop for ActiveSnapshot {
    fn drop(&mut self) {
        if self.pushed && !std::thread::panicking() {
            // SAFETY: pops what was pushed; whoever pushed above it has popped.
            unsafe { pg_sys::PopActiveSnapshot() };
        }
    }
}

/// Of `TimeoutId`: the first that an extension may take.
#[cfg(any(feature = "pg15", feature = "pg16"))]
const USER_TIMEOUT: c_int = 12;
#[cfg(any(feature = "pg17", feature = "pg18"))]
const USER_TIMEOUT: c_int = 13;
const STATEMENT_TIMEOUT: c_int = 3;

// utils/timeout.h, which pgrx does not bind. None of these raises an error.
unsafe extern "C" {
    fn RegisterTimeout(id: c_int, handler: Option<unsafe extern "C" fn()>) -> c_int;
    fn enable_timeout_after(id: c_int, delay_ms: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
    fn get_timeout_active(id: c_int) -> bool;
    fn SetLatch(latch: *mut pg_sys::Latch);
}

static TIMEOUT_ID: AtomicI32 = AtomicI32::new(-1);
static EXPIRED: AtomicBool = AtomicBool::new(false);
static RUNNING: AtomicBool = AtomicBool::new(false);

/// In the signal handler of the server's timers: asks for what a cancel asks for, and notes that it was us.
unsafe extern "C" fn expired() {
    EXPIRED.store(true, Ordering::SeqCst);
    // SAFETY: what the server's own StatementCancelHandler does; all of it may be done in a signal handler.
    unsafe {
        pg_sys::InterruptPending = 1;
        pg_sys::QueryCancelPending = 1;
        SetLatch(pg_sys::MyLatch);
    }
}

impl Timer {
    fn start(timeout: Duration) -> Self {
        let timeout = (!timeout.is_zero() && !RUNNING.load(Ordering::Relaxed)).then_some(timeout);
        let timer = Self {
            timeout,
            // SAFETY: reads backend state.
            statement_timeout_was_active: unsafe { get_timeout_active(STATEMENT_TIMEOUT) },
        };
        if timer.timeout.is_some() {
            if TIMEOUT_ID.load(Ordering::Relaxed) < 0 {
                // SAFETY: once per process, after the server has set its timers up.
                let id = unsafe { RegisterTimeout(USER_TIMEOUT, Some(expired)) };
                TIMEOUT_ID.store(id, Ordering::Relaxed);
            }
            RUNNING.store(true, Ordering::Relaxed);
            EXPIRED.store(false, Ordering::SeqCst);
            timer.restart();
        }
        timer
    }

    /// The limit counts from now: called before each of several calls.
    pub fn restart(&self) {
        if let Some(timeout) = self.timeout {
            let delay_ms = timeout.as_millis().min(i32::MAX as u128) as c_int;
            // SAFETY: a registered timeout; setting it again replaces it.
            unsafe { enable_timeout_after(TIMEOUT_ID.load(Ordering::Relaxed), delay_ms) };
        }
    }

    /// Ends the limit; whether it was what cancelled the code.
    ///
    /// A cancel by the user in the moment between the expiry and its being served cannot be told from it.
    fn stop(&self) -> bool {
        if self.timeout.is_none() {
            return false;
        }
        RUNNING.store(false, Ordering::Relaxed);
        // SAFETY: a registered timeout; backend variables.
        let statement_expired = unsafe {
            disable_timeout(TIMEOUT_ID.load(Ordering::Relaxed), false);
            self.statement_timeout_was_active && !get_timeout_active(STATEMENT_TIMEOUT)
        };
        let expired = EXPIRED.swap(false, Ordering::SeqCst);
        if expired && !statement_expired {
            // Expired and not served, because the code ended in the same moment: the request goes with it.
            // SAFETY: as above.
            unsafe { pg_sys::QueryCancelPending = 0 };
        }
        expired && !statement_expired
    }
}
