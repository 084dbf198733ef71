//! Code that a tenant supplies, run inside somebody else's statement: as a role of the tenant, unable to become
//! another one, with pinned settings and a time limit, in a subtransaction that takes back whatever it did when it
//! fails.
//!
//! The operation is security-restricted until the subtransaction ends. That refuses SET ROLE and SET SESSION
//! AUTHORIZATION, prepared statements and temporary tables that would outlive it, and a trigger whose event is
//! deferred: it would run at commit, as whoever commits. Settings that the code changes are put back.

use std::ffi::{CStr, CString, c_int};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
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
            Ok(Ok(_)) if !timed_out => pg_sys::ReleaseCurrentSubTransaction(),
            _ => pg_sys::RollbackAndReleaseCurrentSubTransaction(),
        }
        pg_sys::MemoryContextSwitchTo(memory);
        pg_sys::CurrentResourceOwner = owner;
    }
    match outcome {
        // Whatever the code has made of the cancel.
        _ if timed_out => Err(Failure::TimedOut(PgError::new(
            "57014",
            format!("canceled after {} ms", tenant.timeout.as_millis()),
        ))),
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Failure::Tenant(error)),
        Err(caught) if caught.is_cancel => Err(Failure::Cancelled(caught.error)),
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
    fn enable_timeout_every(id: c_int, first_at: pg_sys::TimestampTz, delay_ms: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
    fn get_timeout_active(id: c_int) -> bool;
    fn SetLatch(latch: *mut pg_sys::Latch);
}

static TIMEOUT_ID: AtomicI32 = AtomicI32::new(-1);
static EXPIRED: AtomicBool = AtomicBool::new(false);
static RUNNING: AtomicBool = AtomicBool::new(false);
/// Cancels that were served since the limit was over, and caught by the code.
static CAUGHT: AtomicU32 = AtomicU32::new(0);

/// Once the limit is over the code is cancelled again and again: an exception handler may catch a cancel.
const AGAIN_MS: c_int = 100;
/// Code that catches so many cancels ends with its process: nothing else ends it.
const CAUGHT_MAX: u32 = 50;

/// In the signal handler of the server's timers: asks for what a cancel asks for, and notes that it was us.
unsafe extern "C" fn expired() {
    // SAFETY: what the server's own StatementCancelHandler and die() do, and stores to variables of the process; all of it may
    // be done in a signal handler.
    unsafe {
        let is_first = !EXPIRED.swap(true, Ordering::SeqCst);
        if is_first {
            CAUGHT.store(0, Ordering::Relaxed);
        } else if pg_sys::QueryCancelPending == 0
            && CAUGHT.fetch_add(1, Ordering::Relaxed) >= CAUGHT_MAX
        {
            pg_sys::ProcDiePending = 1;
        }
        plpgsql::refuse_statements();
        pg_sys::InterruptPending = 1;
        pg_sys::QueryCancelPending = 1;
        SetLatch(pg_sys::MyLatch);
    }
}

/// PL/pgSQL lets a plugin look at each statement before it runs. Once the limit is over ours cancels there: a block whose handler
/// catches the cancel is such a statement too, and an error before it begins is not its own to catch.
mod plpgsql {
    use std::cell::UnsafeCell;
    use std::ffi::c_void;
    use std::sync::atomic::{AtomicPtr, Ordering};

    use pgrx::{check_for_interrupts, pg_guard, pg_sys};

    type OfStatement = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void);

    /// `PLpgSQL_plugin`: five functions of the plugin, then those that PL/pgSQL tells it.
    #[repr(C)]
    struct Plugin {
        func_setup: *mut c_void,
        func_beg: *mut c_void,
        func_end: *mut c_void,
        stmt_beg: Option<OfStatement>,
        stmt_end: *mut c_void,
        /// More than any version writes.
        told: [*mut c_void; 16],
    }

    struct Own(UnsafeCell<Plugin>);
    // SAFETY: used by the one thread of a backend that runs PL/pgSQL.
    unsafe impl Sync for Own {}

    static OWN: Own = Own(UnsafeCell::new(Plugin {
        func_setup: std::ptr::null_mut(),
        func_beg: std::ptr::null_mut(),
        func_end: std::ptr::null_mut(),
        stmt_beg: Some(cancel),
        stmt_end: std::ptr::null_mut(),
        told: [std::ptr::null_mut(); 16],
    }));

    /// Where PL/pgSQL looks for a plugin.
    static PLACE: AtomicPtr<*mut c_void> = AtomicPtr::new(std::ptr::null_mut());

    pub(super) fn find() {
        // SAFETY: a name that PL/pgSQL uses; the place is there for the life of the process.
        let place = unsafe { pg_sys::find_rendezvous_variable(c"PLpgSQL_plugin".as_ptr()) };
        PLACE.store(place, Ordering::Relaxed);
    }

    /// From now on. A debugger that is there already stays.
    pub(super) fn refuse_statements() {
        let place = PLACE.load(Ordering::Relaxed);
        // SAFETY: null or PL/pgSQL's place, a pointer that only this thread reads and writes.
        unsafe {
            if !place.is_null() && (*place).is_null() {
                *place = OWN.0.get().cast();
            }
        }
    }

    pub(super) fn allow_statements() {
        let place = PLACE.load(Ordering::Relaxed);
        // SAFETY: as above.
        unsafe {
            if !place.is_null() && *place == OWN.0.get().cast() {
                *place = std::ptr::null_mut();
            }
        }
    }

    #[pg_guard]
    unsafe extern "C-unwind" fn cancel(_state: *mut c_void, _statement: *mut c_void) {
        // SAFETY: asks for a cancel as the server's own handlers do.
        unsafe {
            pg_sys::InterruptPending = 1;
            pg_sys::QueryCancelPending = 1;
        }
        check_for_interrupts!();
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
                plpgsql::find();
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
            unsafe {
                let first_at = pg_sys::GetCurrentTimestamp() + i64::from(delay_ms) * 1_000;
                enable_timeout_every(TIMEOUT_ID.load(Ordering::Relaxed), first_at, AGAIN_MS);
            }
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
        plpgsql::allow_statements();
        let expired = EXPIRED.swap(false, Ordering::SeqCst);
        if expired && !statement_expired {
            // Expired and not served, because the code ended in the same moment: the request goes with it.
            // SAFETY: as above.
            unsafe { pg_sys::QueryCancelPending = 0 };
        }
        expired && !statement_expired
    }
}
