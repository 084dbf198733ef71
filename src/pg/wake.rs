//! Telling at commit the resident worker that events wait, the relay that events are to be sent, and the consumers that sources
//! have changed. Nothing is sent on rollback, and nothing is
//! sent twice: only the first commit after the worker's last look wakes it.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use pgrx::{pg_guard, pg_sys};

use super::shared;

thread_local! {
    static SOURCES_CHANGED: Cell<bool> = const { Cell::new(false) };
    static COLLECTED: Cell<u64> = const { Cell::new(0) };
    static OUTGOING: Cell<bool> = const { Cell::new(false) };
    static INSTALLED: Cell<bool> = const { Cell::new(false) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Counts events of this transaction. A rolled-back savepoint leaves them counted: the worker then looks
/// for nothing, once.
pub fn at_commit(events: u32) {
    if register() {
        COLLECTED.set(COLLECTED.get() + u64::from(events));
    }
}

/// This transaction changes which sources are read, or where: the resident and the consumers look at its commit.
pub fn sources_at_commit() {
    if register() {
        SOURCES_CHANGED.set(true);
    }
}

/// This transaction has events for an event store.
pub fn relay_at_commit() {
    if register() {
        OUTGOING.set(true);
    }
}

/// This transaction creates the extension: however long it takes, its database has a resident afterwards.
pub fn resident_at_commit() {
    if register() {
        INSTALLED.set(true);
    }
}

/// Registers the callback, if there is anybody to be woken.
fn register() -> bool {
    if !shared::preloaded() {
        return false;
    }
    if !REGISTERED.replace(true) {
        // SAFETY: registers a function of this library for the life of the process.
        unsafe { pg_sys::RegisterXactCallback(Some(xact_callback), std::ptr::null_mut()) };
    }
    true
}

/// Tells the resident worker that tables or columns are to be made of what is registered now. Outside of a transaction.
pub fn schema_changed() {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    if let Some(slot) = shared::get().and_then(|s| s.find(database)) {
        slot.schema_changed.store(true, Ordering::Release);
        slot.wake();
    }
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
            if SOURCES_CHANGED.take() {
                sources_changed();
            }
            if OUTGOING.take() {
                notify_relay();
            }
            if INSTALLED.take() {
                want_resident();
            }
        }
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE => {
            COLLECTED.set(0);
            SOURCES_CHANGED.set(false);
            OUTGOING.set(false);
            INSTALLED.set(false);
        }
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

/// Has the launcher start a resident at its next look, should the one that waited for the commit have ended.
fn want_resident() {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    if let Some(shared) = shared::get() {
        shared.want(database);
    }
}

/// Has the resident and the consumers of this database look at the sources.
fn sources_changed() {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    if let Some(slot) = shared::get().and_then(|s| s.find(database)) {
        slot.sources_changed.fetch_add(1, Ordering::AcqRel);
        slot.wake();
        for consumer in &slot.consumers {
            consumer.wake();
        }
    }
}

/// Wakes the relay, or whoever starts one, if nobody has since it looked last.
fn notify_relay() {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    if let Some(slot) = shared::get().and_then(|s| s.find(database))
        && !slot.outgoing.swap(true, Ordering::AcqRel)
    {
        match slot.relay.load(Ordering::Acquire) {
            0 => slot.wake(),
            relay => super::wait::set_latch_of(relay),
        }
    }
}
