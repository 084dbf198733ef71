//! DROP DATABASE, CREATE DATABASE (its template), ALTER DATABASE … RENAME and … SET TABLESPACE need a database without
//! connections: the resident worker leaves first. Afterwards, or if the statement fails, the launcher starts it again.
//! DROP EXTENSION says before what of it stays behind outside of Postgres.

use std::ffi::{CStr, c_char};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgrx::{pg_guard, pg_sys};

use crate::catalog::storages;
use crate::pg::error::OrRaise;
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, relation, shared, wait, xact};

static mut PREVIOUS: pg_sys::ProcessUtility_hook_type = None;

pub fn init() {
    // SAFETY: in the postmaster, before any backend exists.
    unsafe {
        PREVIOUS = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
    }
}

// Postgres' own, without pgrx' guard: that would turn an error of any utility statement into a new one, without context.
unsafe extern "C-unwind" {
    #[allow(clippy::too_many_arguments, reason = "the signature is Postgres' own")]
    fn standard_ProcessUtility(
        statement: *mut pg_sys::PlannedStmt,
        query: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        receiver: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

/// Not guarded either: an error of the statement jumps over this frame, which must hold nothing that would be dropped.
#[allow(clippy::too_many_arguments, reason = "the signature is Postgres' own")]
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    receiver: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: Postgres passes a valid statement; the call goes on unchanged.
    unsafe {
        make_way(statement);
        let next = PREVIOUS.unwrap_or(standard_ProcessUtility);
        next(
            statement,
            query,
            read_only_tree,
            context,
            params,
            environment,
            receiver,
            completion,
        );
    }
}

/// Sends the resident of the database away that the statement needs for itself.
///
/// # Safety
/// `statement` must be a utility statement.
#[pg_guard]
unsafe extern "C-unwind" fn make_way(statement: *mut pg_sys::PlannedStmt) {
    // SAFETY: as the caller promises; the node's tag says its type.
    unsafe {
        let node = (*statement).utilityStmt;
        if node.is_null() {
            return;
        }
        if drops_extension(node) {
            tell_what_stays().or_raise();
        }
        let (name, copied) = needed(node);
        if name.is_null() {
            return;
        }
        let oid = pg_sys::get_database_oid(name, true);
        if oid != pg_sys::InvalidOid && may_stop(oid, copied) {
            stop(oid);
        }
    }
}

/// Whether the statement is a DROP EXTENSION of ours.
///
/// # Safety
/// `node` must be a live parse node.
unsafe fn drops_extension(node: *mut pg_sys::Node) -> bool {
    // SAFETY: the node's tag says its type; DROP EXTENSION has a list of names as String nodes.
    unsafe {
        if (*node).type_ != pg_sys::NodeTag::T_DropStmt {
            return false;
        }
        let statement = node.cast::<pg_sys::DropStmt>();
        (*statement).removeType == pg_sys::ObjectType::OBJECT_EXTENSION
            && (*statement).objects.as_ref().is_some_and(|names| {
                (0..names.length as usize).any(|i| {
                    let name = (*names.elements.add(i)).ptr_value.cast::<pg_sys::String>();
                    CStr::from_ptr((*name).sval) == c"rakam"
                })
            })
    }
}

/// Lists the storages whose files will be nobody's, to whoever may drop the extension.
fn tell_what_stays() -> Result<()> {
    if security::extension_oid().is_none() {
        return Ok(());
    }
    let (user, owner) = (security::current_user(), security::extension_owner());
    if user != owner && !security::is_superuser(user) {
        return Ok(());
    }
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    for storage in storages::outside(View::Under(latest.get()))? {
        let place = storage
            .url
            .map(|url| format!(", {url}"))
            .unwrap_or_default();
        PgError::new(
            "00000",
            format!(
                "{} data files of {} bytes stay in storage \"{}\"{place}",
                storage.files, storage.bytes, storage.name
            ),
        )
        .hint("rakam.rebuild_catalog makes a catalog of them in an empty database.")
        .notice();
    }
    Ok(())
}

/// The name of the database that the statement needs for itself (null: none), and whether it only copies it.
///
/// # Safety
/// `node` must be a live parse node.
unsafe fn needed(node: *mut pg_sys::Node) -> (*const c_char, bool) {
    let none = (std::ptr::null(), false);
    // SAFETY: the node's tag says its type.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_DropdbStmt => (
                (*node.cast::<pg_sys::DropdbStmt>()).dbname.cast_const(),
                false,
            ),
            pg_sys::NodeTag::T_CreatedbStmt => {
                let options = (*node.cast::<pg_sys::CreatedbStmt>()).options;
                match option(options, c"template") {
                    Some(template) if !(*template).arg.is_null() => {
                        (pg_sys::defGetString(template).cast_const(), true)
                    }
                    _ => (c"template1".as_ptr(), true),
                }
            }
            pg_sys::NodeTag::T_AlterDatabaseStmt => {
                let statement = node.cast::<pg_sys::AlterDatabaseStmt>();
                match option((*statement).options, c"tablespace") {
                    Some(_) => ((*statement).dbname.cast_const(), false),
                    None => none,
                }
            }
            pg_sys::NodeTag::T_RenameStmt => {
                let statement = node.cast::<pg_sys::RenameStmt>();
                if (*statement).renameType == pg_sys::ObjectType::OBJECT_DATABASE {
                    ((*statement).subname.cast_const(), false)
                } else {
                    none
                }
            }
            _ => none,
        }
    }
}

/// The option of this name.
///
/// # Safety
/// `options` must be null or a list of DefElem nodes.
unsafe fn option(options: *mut pg_sys::List, name: &CStr) -> Option<*mut pg_sys::DefElem> {
    // SAFETY: as the caller promises; a list has `length` elements.
    unsafe {
        let options = options.as_ref()?;
        (0..options.length as usize)
            .map(|i| {
                (*options.elements.add(i))
                    .ptr_value
                    .cast::<pg_sys::DefElem>()
            })
            .find(|&option| CStr::from_ptr((*option).defname) == name)
    }
}

/// Only who could drop or rename the database, or copy it where that is all, may send its worker away.
fn may_stop(database: pg_sys::Oid, copied: bool) -> bool {
    let user = security::current_user();
    // SAFETY: catalog look-up by oid.
    let owner = unsafe {
        #[cfg(feature = "pg15")]
        let owner = pg_sys::pg_database_ownercheck(database, user);
        #[cfg(not(feature = "pg15"))]
        let owner = pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, database, user);
        owner
    };
    owner || copied && relation::is_template(database) && security::may_create_databases(user)
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
    let helpers: Vec<_> = ([&slot.helper, &slot.compactor, &slot.carer, &slot.relay].into_iter())
        .chain(slot.consumers.iter().map(|consumer| &consumer.pid))
        .map(|place| (place, place.load(Ordering::Acquire)))
        .collect();
    for (_, helper) in helpers.iter().filter(|(_, helper)| *helper != 0) {
        wait::terminate(*helper);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    let here = || {
        slot.pid.load(Ordering::Acquire) == pid
            || (helpers.iter())
                .any(|(place, helper)| *helper != 0 && place.load(Ordering::Acquire) == *helper)
    };
    while here() && Instant::now() < deadline {
        wait::wait(None, Duration::from_millis(10));
    }
}
