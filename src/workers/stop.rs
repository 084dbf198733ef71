//! DROP DATABASE and CREATE DATABASE … TEMPLATE need a database without connections: the resident worker leaves first.
//! If the statement then fails, the launcher starts it again.

use std::ffi::CStr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgrx::{pg_guard, pg_sys};

use crate::pg::{shared, wait, xact};

static mut PREVIOUS: pg_sys::ProcessUtility_hook_type = None;

pub fn init() {
    // SAFETY: in the postmaster, before any backend exists.
    unsafe {
        PREVIOUS = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
    }
}

#[pg_guard]
#[allow(clippy::too_many_arguments, reason = "the signature is Postgres' own")]
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const std::ffi::c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    receiver: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: Postgres passes a valid statement; the node's tag says its type; the call goes on unchanged.
    unsafe {
        let node = (*statement).utilityStmt;
        if !node.is_null() {
            let name = match (*node).type_ {
                pg_sys::NodeTag::T_DropdbStmt => (*node.cast::<pg_sys::DropdbStmt>()).dbname,
                pg_sys::NodeTag::T_CreatedbStmt => {
                    template_of(&*node.cast::<pg_sys::CreatedbStmt>())
                }
                _ => std::ptr::null_mut(),
            };
            if !name.is_null() {
                let oid = pg_sys::get_database_oid(name, true);
                if oid != pg_sys::InvalidOid && may_stop(oid) {
                    stop(oid);
                }
            }
        }
        match PREVIOUS {
            Some(previous) => previous(
                statement,
                query,
                read_only_tree,
                context,
                params,
                environment,
                receiver,
                completion,
            ),
            None => pg_sys::standard_ProcessUtility(
                statement,
                query,
                read_only_tree,
                context,
                params,
                environment,
                receiver,
                completion,
            ),
        }
    }
}

/// The template that CREATE DATABASE names, null if none.
///
/// # Safety
/// `statement` must be a live parse node.
unsafe fn template_of(statement: &pg_sys::CreatedbStmt) -> *mut std::ffi::c_char {
    // SAFETY: the options are a list of DefElem nodes.
    unsafe {
        let options = statement.options;
        if options.is_null() {
            return std::ptr::null_mut();
        }
        for i in 0..(*options).length {
            let option = (*(*options).elements.add(i as usize)).ptr_value.cast::<pg_sys::DefElem>();
            if CStr::from_ptr((*option).defname) == c"template" && !(*option).arg.is_null() {
                return pg_sys::defGetString(option);
            }
        }
        std::ptr::null_mut()
    }
}

/// Only who could drop or copy the database may send its worker away.
fn may_stop(database: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups by oid.
    unsafe {
        let user = pg_sys::GetUserId();
        #[cfg(feature = "pg15")]
        let owner = pg_sys::pg_database_ownercheck(database, user);
        #[cfg(not(feature = "pg15"))]
        let owner = pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, database, user);
        owner
    }
}

/// Sends the resident of a database away and waits (shortly) until it is gone.
fn stop(database: pg_sys::Oid) {
    let Some(slot) = shared::get().and_then(|s| s.find(database)) else {
        return;
    };
    let pid = slot.pid.load(Ordering::Acquire);
    if pid == 0 {
        return;
    }
    // Not started again before the statement had its chance.
    slot.not_before_ms
        .store(xact::now_us() / 1000 + 15_000, Ordering::Release);
    wait::terminate(pid);
    let deadline = Instant::now() + Duration::from_secs(5);
    while slot.pid.load(Ordering::Acquire) == pid && Instant::now() < deadline {
        wait::wait(None, Duration::from_millis(10));
    }
}
