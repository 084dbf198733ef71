//! This server; and foreign servers as they are now: what a running transaction's snapshot says of them may be out of date, as
//! credentials are changed while somebody reads.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;

/// What `pg_control_system()` reads from a file, as the server remembers it.
pub fn system_identifier() -> i64 {
    // SAFETY: reads shared memory that is never changed.
    unsafe { pg_sys::GetSystemIdentifier() as i64 }
}

/// Names and values of options.
pub type Options = Vec<(String, String)>;

/// A foreign server's options, and those in the user mapping of its owner. Not `Debug`: they hold secrets.
pub struct Server {
    /// Its TYPE.
    pub kind: Option<String>,
    pub owner: pg_sys::Oid,
    pub options: Options,
    /// Those of PUBLIC where the owner has none; empty without any.
    pub mapping: Options,
}

/// Whether there is a server of this name, of whatever wrapper.
pub fn exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else {
        return false;
    };
    // SAFETY: a catalog look-up, missing_ok.
    unsafe { pg_sys::get_foreign_server_oid(name.as_ptr(), true) != pg_sys::InvalidOid }
}

/// The server of this name, if it is one of `wrapper`'s.
pub fn named(name: &str, wrapper: &str) -> Option<Server> {
    let (name, wrapper) = (CString::new(name).ok()?, CString::new(wrapper).ok()?);
    // SAFETY: catalog look-ups, missing_ok; what they return is in the current memory context.
    unsafe {
        let server = pg_sys::GetForeignServerByName(name.as_ptr(), true);
        if server.is_null()
            || (*server).fdwid != pg_sys::get_foreign_data_wrapper_oid(wrapper.as_ptr(), true)
        {
            return None;
        }
        let mapping = mapping((*server).serverid, (*server).owner)
            .or_else(|| mapping((*server).serverid, pg_sys::InvalidOid));
        let kind = (*server).servertype;
        Some(Server {
            kind: (!kind.is_null()).then(|| CStr::from_ptr(kind).to_string_lossy().into_owned()),
            owner: (*server).owner,
            options: definitions((*server).options),
            mapping: mapping.unwrap_or_default(),
        })
    }
}

/// Whether a user has USAGE on a server.
pub fn is_usable(name: &str, user: pg_sys::Oid) -> bool {
    let Ok(name) = CString::new(name) else {
        return false;
    };
    // SAFETY: catalog look-ups, missing_ok; the names of the functions differ by version, their meaning does not.
    unsafe {
        let server = pg_sys::get_foreign_server_oid(name.as_ptr(), true);
        if server == pg_sys::InvalidOid {
            return false;
        }
        let usage = pg_sys::ACL_USAGE as pg_sys::AclMode;
        #[cfg(feature = "pg15")]
        let result = pg_sys::pg_foreign_server_aclcheck(server, user, usage);
        #[cfg(not(feature = "pg15"))]
        let result = pg_sys::object_aclcheck(pg_sys::ForeignServerRelationId, server, user, usage);
        result == pg_sys::AclResult::ACLCHECK_OK
    }
}

/// Whose options a validator is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionsOf {
    Server,
    Mapping,
    Other,
}

impl OptionsOf {
    /// By the catalog that a validator is called with.
    pub fn catalog(catalog: pg_sys::Oid) -> Self {
        match catalog {
            pg_sys::ForeignServerRelationId => Self::Server,
            pg_sys::UserMappingRelationId => Self::Mapping,
            _ => Self::Other,
        }
    }
}

/// Has a foreign table depend on a server besides its own, so that this one cannot be dropped under it. Nothing happens where
/// there is no such server.
pub fn keep_for(table: pg_sys::Oid, server: &str) {
    let Ok(name) = CString::new(server) else {
        return;
    };
    let object = |class: pg_sys::Oid, id: pg_sys::Oid| pg_sys::ObjectAddress {
        classId: class,
        objectId: id,
        objectSubId: 0,
    };
    // SAFETY: a catalog look-up, missing_ok; two plain values that are copied into a row of pg_depend.
    unsafe {
        let server = pg_sys::GetForeignServerByName(name.as_ptr(), true);
        if !server.is_null() {
            pg_sys::recordDependencyOn(
                &object(pg_sys::RelationRelationId, table),
                &object(pg_sys::ForeignServerRelationId, (*server).serverid),
                pg_sys::DependencyType::DEPENDENCY_NORMAL,
            );
        }
    }
}

/// The options of a user's mapping; those of PUBLIC have no user.
fn mapping(server: pg_sys::Oid, user: pg_sys::Oid) -> Option<Options> {
    // SAFETY: a syscache look-up; the tuple is released after its options were copied out of it.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::USERMAPPINGUSERSERVER as i32;
        let tuple = pg_sys::SearchSysCache2(cache, user.into(), server.into());
        if tuple.is_null() {
            return None;
        }
        let mut is_null = false;
        let datum = pg_sys::SysCacheGetAttr(
            cache,
            tuple,
            pg_sys::Anum_pg_user_mapping_umoptions as i16,
            &mut is_null,
        );
        let options = if is_null {
            Vec::new()
        } else {
            definitions(pg_sys::untransformRelOptions(datum))
        };
        pg_sys::ReleaseSysCache(tuple);
        Some(options)
    }
}

/// The definitions in a list of DefElem nodes, as names and values.
///
/// # Safety
/// `list` is NIL or a list of DefElem nodes whose argument, if any, is a string.
pub unsafe fn definitions(list: *mut pg_sys::List) -> Options {
    // SAFETY: names and values are NUL-terminated texts in the list's memory context.
    unsafe {
        let length = if list.is_null() { 0 } else { (*list).length };
        (0..length)
            .map(|n| {
                let definition: *mut pg_sys::DefElem = pg_sys::list_nth(list, n).cast();
                let text = |chars: *const std::ffi::c_char| {
                    CStr::from_ptr(chars).to_string_lossy().into_owned()
                };
                let value = pg_sys::defGetString(definition);
                (text((*definition).defname), text(value))
            })
            .collect()
    }
}
