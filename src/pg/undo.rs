//! What has to follow the end of the running transaction, or of the savepoint it happened in: counts and notes in shared
//! memory, which no rollback of the server takes back.

use std::cell::{Cell, RefCell};

use pgrx::{pg_guard, pg_sys};

type Action = Box<dyn FnOnce(bool)>;

thread_local! {
    /// With the nesting level of the (sub)transaction each belongs to.
    static ACTIONS: RefCell<Vec<(i32, Action)>> = const { RefCell::new(Vec::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Calls `action` when what runs now is committed (true) or rolled back (false). It runs while the transaction ends: it
/// must not fail, and must not ask the server for anything. A prepared transaction counts as committed.
pub fn at_end(action: impl FnOnce(bool) + 'static) {
    if !REGISTERED.replace(true) {
        // SAFETY: registers functions of this library for the life of the process.
        unsafe {
            pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut());
            pg_sys::RegisterSubXactCallback(Some(subtransaction_ends), std::ptr::null_mut());
        }
    }
    // SAFETY: reads backend state.
    let level = unsafe { pg_sys::GetCurrentTransactionNestLevel() };
    ACTIONS.with_borrow_mut(|actions| actions.push((level, Box::new(action))));
}

#[pg_guard]
unsafe extern "C-unwind" fn transaction_ends(
    event: pg_sys::XactEvent::Type,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_COMMIT | XACT_EVENT_PREPARE => run(ACTIONS.take(), true),
        XACT_EVENT_ABORT => run(ACTIONS.take(), false),
        _ => {}
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn subtransaction_ends(
    event: pg_sys::SubXactEvent::Type,
    _my: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::SubXactEvent::*;
    // SAFETY: reads backend state; the level is still that of the subtransaction that ends.
    let level = unsafe { pg_sys::GetCurrentTransactionNestLevel() };
    match event {
        SUBXACT_EVENT_COMMIT_SUB => ACTIONS.with_borrow_mut(|actions| {
            for (of, _) in actions.iter_mut().filter(|(of, _)| *of >= level) {
                *of = level - 1;
            }
        }),
        SUBXACT_EVENT_ABORT_SUB => {
            let (kept, undone) = ACTIONS.take().into_iter().partition(|(of, _)| *of < level);
            ACTIONS.set(kept);
            run(undone, false);
        }
        _ => {}
    }
}

fn run(actions: Vec<(i32, Action)>, committed: bool) {
    for (_, action) in actions {
        action(committed);
    }
}
