//! What must happen before this process exits.

use std::cell::RefCell;

use pgrx::{pg_guard, pg_sys};

thread_local! {
    static HANDLERS: RefCell<Vec<fn()>> = const { RefCell::new(Vec::new()) };
}

/// Calls `handler` once before the process gives up its shared memory, in reverse order of registration.
/// Registering the same function again changes nothing.
pub fn on_exit(handler: fn()) {
    let first = HANDLERS.with_borrow_mut(|handlers| {
        if !handlers.iter().any(|h| std::ptr::fn_addr_eq(*h, handler)) {
            handlers.push(handler);
        }
        handlers.len() == 1
    });
    thread_local! {
        static REGISTERED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if first && !REGISTERED.replace(true) {
        // SAFETY: registers a function of this library, which is never unloaded.
        unsafe { pg_sys::before_shmem_exit(Some(run_handlers), pg_sys::Datum::from(0usize)) };
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn run_handlers(_code: i32, _arg: pg_sys::Datum) {
    let handlers = HANDLERS.take();
    for handler in handlers.into_iter().rev() {
        handler();
    }
}

/// Has this process end without the cleanup of its libraries, after that of the server: theirs would run while threads of
/// other libraries still work. First thing in a worker's main function, so that it is the last to run.
pub fn without_cleanup() {
    // SAFETY: registers a function of this library, which is never unloaded.
    unsafe { pg_sys::on_proc_exit(Some(end_now), pg_sys::Datum::from(0usize)) };
}

unsafe extern "C-unwind" fn end_now(code: i32, _arg: pg_sys::Datum) {
    // SAFETY: ends the process, whose shared memory and files the server has let go of.
    unsafe { libc::_exit(code) };
}
