//! Telling the resident worker, at commit, that events wait. Nothing is sent on rollback, and nothing is
//! sent twice: only the first commit after the worker's last look wakes it.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use pgrx::{pg_guard, pg_sys};

use super::shared;

thread_local! {
    static COLLECTED: Cell<u64> = const { Cell::new(0) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Counts events of this transaction. A rolled-back savepoint leaves them counted: the worker then looks
/// for nothing, once.
pub fn at_commit(events: u32) {
    if !shared::preloaded() {
        return;
    }
    if !REGISTERED.replace(true) {
        // SAFETY: registers a function of this library for the life of the process.
        unsafe { pg_sys::RegisterXactCallback(Some(xact_callback), std::ptr::null_mut()) };
    }
    COLLECTED.set(COLLECTED.get() + u64::from(events));
}

#[pg_guard]
unsafe extern "C-unwind" fn xact_callback(
    event: pg_sys::XactEvent::Type,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_COMMIT => {
            let n = COLLECTED.take();
            if n > 0 {
                notify(n);
            }
        }
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE => COLLECTED.set(0),
        _ => {}
    }
}

/// Adds to the waiting events of this database, and wakes the worker if it had none.
fn notify(events: u64) {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    if let Some(slot) = shared::get().and_then(|s| s.find(database))
        && slot.waiting.fetch_add(events, Ordering::AcqRel) == 0
    {
        slot.wake();
    }
}
