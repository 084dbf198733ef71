//! Relations by name.

use std::ffi::CString;

use pgrx::{IntoDatum, pg_sys};

use super::spi::quote_ident;

/// The oid of a relation of ours; InvalidOid if it is not there.
pub fn oid(schema: &str, name: &str) -> pg_sys::Oid {
    let (Ok(schema), Ok(name)) = (CString::new(schema), CString::new(name)) else {
        return pg_sys::InvalidOid;
    };
    // SAFETY: syscache look-ups by NUL-terminated names, missing_ok.
    unsafe {
        let namespace = pg_sys::get_namespace_oid(schema.as_ptr(), true);
        if namespace == pg_sys::InvalidOid {
            return pg_sys::InvalidOid;
        }
        pg_sys::get_relname_relid(name.as_ptr(), namespace)
    }
}

/// The name of a relation as SQL text, with its schema. None: it is not there (any more).
pub fn qualified_name(relation: pg_sys::Oid) -> Option<String> {
    // SAFETY: syscache look-ups by oid; both results are NULL or NUL-terminated copies.
    unsafe {
        let name = pg_sys::get_rel_name(relation);
        let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation));
        if name.is_null() || schema.is_null() {
            return None;
        }
        let text = |name: *mut std::ffi::c_char| {
            quote_ident(&std::ffi::CStr::from_ptr(name).to_string_lossy())
        };
        Some(format!("{}.{}", text(schema), text(name)))
    }
}

/// The pages of a relation.
pub fn blocks(relation: pg_sys::Oid) -> u32 {
    // SAFETY: the relation is opened and closed around the call.
    unsafe {
        let rel = pg_sys::relation_open(relation, pg_sys::AccessShareLock as i32);
        let blocks = pg_sys::RelationGetNumberOfBlocksInFork(rel, pg_sys::ForkNumber::MAIN_FORKNUM);
        pg_sys::relation_close(rel, pg_sys::AccessShareLock as i32);
        blocks
    }
}

/// What a table takes on disk, with its indexes and everything that is dead in it.
pub fn disk_bytes(relation: pg_sys::Oid) -> u64 {
    // SAFETY: a built-in function with its one argument; NULL for a table that is gone.
    let bytes: Option<i64> = unsafe {
        pgrx::direct_function_call(pg_sys::pg_total_relation_size, &[relation.into_datum()])
    };
    bytes
        .and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(0)
}

/// Pages that an estimate of free room looks at.
const SAMPLE_PAGES: u32 = 512;

/// About how much of a table's pages can take new rows, those of its long values too: what vacuum has noted, in a sample.
pub fn free_bytes(relation: pg_sys::Oid) -> u64 {
    // SAFETY: each relation is opened and closed around the calls; pages asked for are below its end.
    unsafe {
        let rel = pg_sys::relation_open(relation, pg_sys::AccessShareLock as i32);
        let toast = (*(*rel).rd_rel).reltoastrelid;
        let blocks = pg_sys::RelationGetNumberOfBlocksInFork(rel, pg_sys::ForkNumber::MAIN_FORKNUM);
        let step = blocks.div_ceil(SAMPLE_PAGES).max(1);
        let free: u64 = (0..blocks)
            .step_by(step as usize)
            .map(|block| pg_sys::GetRecordedFreeSpace(rel, block) as u64)
            .sum();
        pg_sys::relation_close(rel, pg_sys::AccessShareLock as i32);
        let of_toast = if toast == pg_sys::InvalidOid {
            0
        } else {
            free_bytes(toast)
        };
        free * u64::from(step) + of_toast
    }
}

/// Whether policies say which of its rows the effective user sees.
pub fn is_bound_by_policies(relation: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups by oid; no error is asked for.
    let standing = unsafe { pg_sys::check_enable_rls(relation, pg_sys::InvalidOid, true) };
    standing == pg_sys::CheckEnableRlsResult::RLS_ENABLED as i32
}

/// Whether a schema of this name exists.
pub fn schema_exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else {
        return false;
    };
    // SAFETY: syscache look-up by a NUL-terminated name, missing_ok.
    unsafe { pg_sys::get_namespace_oid(name.as_ptr(), true) != pg_sys::InvalidOid }
}

/// `datconnlimit` of a database whose DROP was interrupted: nobody can connect to it any more.
const INVALID_DATABASE: i32 = -2;

/// The databases that take connections, from the shared catalog: works without a database of one's own.
pub fn databases() -> Vec<pg_sys::Oid> {
    let mut found = Vec::new();
    // SAFETY: a sequential scan of pg_database inside a transaction with a snapshot; rows are copied out.
    unsafe {
        let relation =
            pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let row = pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_database;
            if (*row).datallowconn && (*row).datconnlimit != INVALID_DATABASE {
                found.push((*row).oid);
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
    }
    found
}

/// Whether a database may be copied by everybody with CREATEDB.
pub fn is_template(database: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-up by oid; the tuple is released before returning.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::DATABASEOID as i32,
            pg_sys::Datum::from(database),
        );
        if tuple.is_null() {
            return false;
        }
        let template = (*(pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_database)).datistemplate;
        pg_sys::ReleaseSysCache(tuple);
        template
    }
}

/// The name of a database.
pub fn database_name(database: pg_sys::Oid) -> Option<String> {
    // SAFETY: catalog look-up by oid; the result is palloc'd and copied.
    unsafe {
        let name = pg_sys::get_database_name(database);
        (!name.is_null()).then(|| {
            std::ffi::CStr::from_ptr(name)
                .to_string_lossy()
                .into_owned()
        })
    }
}

/// `schema.name` of a relation as SQL text; None: it is gone.
pub fn sql_name(relation: pg_sys::Oid) -> Option<String> {
    let text = |pointer: *mut std::ffi::c_char| {
        // SAFETY: NULL, or a NUL-terminated copy.
        (!pointer.is_null()).then(|| unsafe {
            super::spi::quote_ident(&std::ffi::CStr::from_ptr(pointer).to_string_lossy())
        })
    };
    // SAFETY: syscache look-ups by oid that give NULL for what is not there.
    unsafe {
        let name = text(pg_sys::get_rel_name(relation))?;
        let schema = text(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(
            relation,
        )))?;
        Some(format!("{schema}.{name}"))
    }
}

/// Whether it is an ordinary or a partitioned table; other kinds of relations and unknown oids are not.
pub fn is_table(relation: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-up by oid; NUL for an unknown one.
    let kind = unsafe { pg_sys::get_rel_relkind(relation) } as u8;
    matches!(
        kind,
        pg_sys::RELKIND_RELATION | pg_sys::RELKIND_PARTITIONED_TABLE
    )
}

/// Whether the user owns the relation, by membership too; superusers own everything.
pub fn is_owned_by(relation: pg_sys::Oid, user: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-up by oid of a relation that the caller has locked.
    unsafe {
        #[cfg(feature = "pg15")]
        let answer = pg_sys::pg_class_ownercheck(relation, user);
        #[cfg(not(feature = "pg15"))]
        let answer = pg_sys::object_ownercheck(pg_sys::RelationRelationId, relation, user);
        answer
    }
}
