//! Transactions of background workers, and facts about the current one.

use std::cell::Cell;
use std::panic::AssertUnwindSafe;

use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder};

use super::error::PgError;
use super::{locks, spi};

/// Why a worker's transaction did not commit.
#[derive(Debug)]
pub enum Failure {
    /// The extension is not installed (any more), or is another one by now: the worker has nothing to do here.
    ExtensionGone,
    /// It was rolled back.
    Error(PgError),
}

impl From<rakam_lake::LakeError> for Failure {
    fn from(error: rakam_lake::LakeError) -> Self {
        Self::Error(error.into())
    }
}

/// Runs `work` in a transaction of a background worker: search path pinned, extension locked against DROP,
/// rolled back on an error, which becomes a value.
///
/// Not usable inside somebody else's transaction.
pub fn worker<T>(work: impl FnOnce() -> Result<T, PgError>) -> Result<T, Failure> {
    let body = || -> Result<T, Failure> {
        // SAFETY: a worker outside of any transaction starts one; the snapshot is pushed for SPI.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
        }
        if !locks::extension().is_some_and(is_served) {
            // SAFETY: ends the transaction started above.
            unsafe { pg_sys::AbortCurrentTransaction() };
            return Err(Failure::ExtensionGone);
        }
        // SAFETY: inside the transaction started above.
        unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
        match work() {
            Ok(value) => {
                // SAFETY: pops what was pushed above, then commits.
                unsafe {
                    pg_sys::PopActiveSnapshot();
                    pg_sys::CommitTransactionCommand();
                }
                Ok(value)
            }
            Err(error) => {
                // SAFETY: rolls the transaction back with all its resources.
                unsafe { pg_sys::AbortCurrentTransaction() };
                Err(Failure::Error(error))
            }
        }
    };
    let outcome = catch(body).unwrap_or_else(|error| {
        // SAFETY: the error has been taken over as a value; the transaction is rolled back.
        unsafe { pg_sys::AbortCurrentTransaction() };
        Err(Failure::Error(error))
    });
    report_statistics();
    outcome
}

thread_local! {
    /// The extension that this process works for, since its first transaction.
    static SERVED: Cell<pg_sys::Oid> = const { Cell::new(pg_sys::InvalidOid) };
}

/// Whether what this process remembers is of this extension: not if it was dropped and created again meanwhile.
fn is_served(extension: pg_sys::Oid) -> bool {
    if SERVED.get() == pg_sys::InvalidOid {
        SERVED.set(extension);
    }
    SERVED.get() == extension
}

/// How long work in passing waits for a lock.
const PASSING_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '100ms'";

/// As [`worker`], for work that can as well be done later: None, and nothing is done, if somebody's lock is in its way.
pub fn in_passing<T>(work: impl FnOnce() -> Result<T, PgError>) -> Result<Option<T>, Failure> {
    let outcome = worker(|| {
        spi::execute_text(PASSING_LOCK_TIMEOUT)?;
        work()
    });
    match outcome {
        Err(Failure::Error(error)) if error.sqlstate == "55P03" => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// As [`worker`], for code of users: the transaction is read-only, and rolled back also when the work succeeds, so that
/// no setting or other state that such code changed is left in the session.
pub fn read_only<T>(work: impl FnOnce() -> Result<T, PgError>) -> Result<T, Failure> {
    let mut done = None;
    let outcome = worker(|| {
        // SAFETY: sets a backend variable of the transaction just begun, before its first statement.
        unsafe { pg_sys::XactReadOnly = true };
        done = Some(work()?);
        Err::<(), _>(PgError::internal("a read-only transaction is rolled back"))
    });
    match (done, outcome) {
        (Some(value), Err(Failure::Error(_))) => Ok(value),
        (_, Err(failure)) => Err(failure),
        (_, Ok(())) => Err(Failure::Error(PgError::internal(
            "a read-only transaction was committed",
        ))),
    }
}

/// Tells the statistics what the last transactions wrote and deleted, as a backend does when it becomes idle: else
/// autovacuum would not learn of a worker's dead rows before the worker ends.
fn report_statistics() {
    // SAFETY: outside of any transaction; without force it does something once a second at most.
    unsafe { pg_sys::pgstat_report_stat(false) };
}

/// Runs `work` in a transaction of a worker that has no database with the extension (the launcher). An error is
/// raised: see [`catch`].
pub fn plain<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: outside of any transaction one is started, and committed after the work.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
    let value = work();
    // SAFETY: pops and commits what was begun above.
    unsafe {
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
    }
    value
}

/// Rolls back whatever transaction is open, after [`catch`] has taken an error.
pub fn abort() {
    // SAFETY: harmless outside of a transaction.
    unsafe { pg_sys::AbortCurrentTransaction() };
}

/// Runs `work` and turns a Postgres error or a panic that it raises into a value. The caller must abort the
/// (sub)transaction before using the server again.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, PgError> {
    let work = AssertUnwindSafe(work);
    PgTryBuilder::new(AssertUnwindSafe(move || {
        let AssertUnwindSafe(work) = work;
        Ok(work())
    }))
    .catch_others(|caught| Err(error_of(&caught)))
    .execute()
}

/// A caught error as a value.
pub fn error_of(caught: &CaughtError) -> PgError {
    let report = match caught {
        CaughtError::PostgresError(r) | CaughtError::ErrorReport(r) => r,
        CaughtError::RustPanic { ereport, .. } => ereport,
    };
    let mut error = PgError::new(&sqlstate_text(report.sql_error_code()), report.message());
    error.detail = report.detail().map(str::to_owned);
    error.hint = report.hint().map(str::to_owned);
    error
}

/// The five characters of an error code.
fn sqlstate_text(code: PgSqlErrorCode) -> String {
    let mut packed = code as u32;
    let mut text = String::with_capacity(5);
    for _ in 0..5 {
        text.push(char::from(((packed & 0x3f) as u8) + b'0'));
        packed >>= 6;
    }
    text
}

/// Has the current transaction's commit wait for its WAL whatever `synchronous_commit` says: something outside of
/// Postgres is going to rely on it.
pub fn durable() {
    // SAFETY: sets a flag of the current transaction.
    unsafe { pg_sys::ForceSyncCommit() };
}

/// Has everything that is committed by now outlive a crash, once the current transaction is committed.
pub fn settle() {
    // A commit without an id would not wait for the WAL.
    top_xid();
    durable();
}

/// Whether the current transaction has written anything (has a transaction id).
pub fn has_xid() -> bool {
    // SAFETY: reads backend state.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// The 64-bit id of the top-level transaction, assigned now if it has none.
pub fn top_xid() -> u64 {
    // SAFETY: assigns the current transaction's id; an error in a read-only one.
    unsafe { pg_sys::GetTopFullTransactionId().value }
}

/// Whether the statements of an extension's script are being run.
pub fn is_in_extension_script() -> bool {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::creating_extension }
}

/// Whether every statement of the current transaction has the snapshot of the first one (REPEATABLE READ, SERIALIZABLE).
pub fn keeps_snapshot() -> bool {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as i32 }
}

/// Whether a COMMIT or ROLLBACK of the user's is still to come.
pub fn in_block() -> bool {
    // SAFETY: reads backend state.
    unsafe { pg_sys::IsTransactionBlock() }
}

/// Whether this server is a standby.
pub fn in_recovery() -> bool {
    // SAFETY: reads shared state.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Whether this server runs for pg_upgrade only.
pub fn in_binary_upgrade() -> bool {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::IsBinaryUpgrade }
}

/// An error for functions that write: 55000 on a standby, 25006 in a read-only transaction.
pub fn ensure_writable(what: &str) -> Result<(), PgError> {
    if in_recovery() {
        return Err(
            PgError::new("55000", format!("cannot {what} during recovery"))
                .hint("Connect to the primary server."),
        );
    }
    // SAFETY: reads a backend variable.
    if unsafe { pg_sys::XactReadOnly } {
        return Err(PgError::new(
            "25006",
            format!("cannot {what} in a read-only transaction"),
        ));
    }
    Ok(())
}

/// Ids below this (of the widened 64-bit kind) are invisible to no snapshot of this database any more:
/// whatever they removed may go for good.
pub fn horizon(relation: pg_sys::Oid) -> u64 {
    // SAFETY: the relation is opened and closed around the call; both xids are read in this backend.
    unsafe {
        let rel = pg_sys::relation_open(relation, pg_sys::AccessShareLock as i32);
        let oldest = pg_sys::GetOldestNonRemovableTransactionId(rel);
        pg_sys::relation_close(rel, pg_sys::NoLock as i32);
        let next = pg_sys::ReadNextFullTransactionId().value;
        widen(u32::from(oldest), next)
    }
}

/// The 64-bit form of a 32-bit id that is not in the future of `next`.
fn widen(xid: u32, next: u64) -> u64 {
    let epoch = next >> 32;
    let value = (epoch << 32) | u64::from(xid);
    if value > next {
        value - (1 << 32)
    } else {
        value
    }
}

/// The clock, as microseconds since 1970.
pub fn now_us() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() + super::PG_EPOCH_US }
}
