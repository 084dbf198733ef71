//! Per-backend caches of our own rows that never serve what another session has changed.
//!
//! A change of a watched table is announced with [`announce`] in the transaction that makes it (triggers do
//! it), travels with the server's own invalidation messages and is there before that transaction's COMMIT
//! returns. Rollback, savepoints and the own uncommitted changes are covered by the same machinery.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;

use pgrx::{pg_guard, pg_sys};

thread_local! {
    static GENERATION: Cell<u64> = const { Cell::new(0) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
    static WATCHED: RefCell<HashSet<pg_sys::Oid>> = RefCell::new(HashSet::new());
}

/// Tells every session, at commit, that rows of this table have changed.
pub fn announce(table: pg_sys::Oid) {
    // SAFETY: queues a message for an existing relation; raises an error for another one.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table) };
}

/// Makes changes of this table, and of roles and their memberships, move the [`generation`].
pub fn watch(table: pg_sys::Oid) {
    WATCHED.with_borrow_mut(|watched| watched.insert(table));
    if !REGISTERED.replace(true) {
        // SAFETY: registers functions of this library for the life of the process.
        unsafe {
            let none = pg_sys::Datum::from(0usize);
            pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), none);
            for cache in [
                pg_sys::SysCacheIdentifier::AUTHMEMMEMROLE,
                pg_sys::SysCacheIdentifier::AUTHOID,
            ] {
                pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(role_changed), none);
            }
        }
    }
}

/// A number that differs after any change that was committed (or made by this transaction) before the call.
/// What is loaded after [`watch`] and a look at it is valid while it stays the same.
pub fn generation() -> u64 {
    // SAFETY: reads pending messages, as every lock of a relation does.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    GENERATION.get()
}

/// Whether a parallel query is running, in which no new snapshot can be taken.
pub fn in_parallel_mode() -> bool {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::IsInParallelMode() }
}

fn advance() {
    GENERATION.set(GENERATION.get().wrapping_add(1));
}

#[pg_guard]
unsafe extern "C-unwind" fn relation_changed(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    // A re-entrant call while the set is being written counts as a change.
    let watched = relation == pg_sys::InvalidOid
        || WATCHED.with(|set| set.try_borrow().map_or(true, |set| set.contains(&relation)));
    if watched {
        advance();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn role_changed(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    advance();
}
