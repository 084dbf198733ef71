//! The effective user: who it is, and acting as another one for a while.

use pgrx::pg_sys;

/// The effective user of the running code.
pub fn current_user() -> pg_sys::Oid {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::GetUserId() }
}

/// Who has logged in (or become somebody else with SET SESSION AUTHORIZATION).
pub fn session_user() -> pg_sys::Oid {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::GetSessionUserId() }
}

/// Acts as `user` until dropped, with SET ROLE and SET SESSION AUTHORIZATION refused meanwhile. Restored on
/// an error too: by Drop while it unwinds, and by the (sub)transaction's abort.
pub struct ActAs {
    user: pg_sys::Oid,
    context: i32,
}

impl ActAs {
    pub fn user(user: pg_sys::Oid) -> Self {
        Self::with(user, pg_sys::SECURITY_LOCAL_USERID_CHANGE)
    }

    /// For code that the user wrote: nothing it does outlives the act, no cursor, temporary table or deferred trigger.
    pub fn restricted(user: pg_sys::Oid) -> Self {
        Self::with(
            user,
            pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION,
        )
    }

    fn with(user: pg_sys::Oid, flags: u32) -> Self {
        let mut previous = pg_sys::InvalidOid;
        let mut context = 0;
        // SAFETY: plain reads and writes of backend variables; paired with Drop.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut previous, &mut context);
            pg_sys::SetUserIdAndSecContext(user, context | flags as i32);
        }
        Self {
            user: previous,
            context,
        }
    }

    /// The owner of the extension, who writes the internal tables.
    pub fn owner() -> Self {
        Self::user(extension_owner())
    }
}

impl Drop for ActAs {
    fn drop(&mut self) {
        // SAFETY: restores what was there at construction.
        unsafe { pg_sys::SetUserIdAndSecContext(self.user, self.context) };
    }
}

/// Whether `user` holds the privileges of `role`: a superuser, or a member with inheritance.
pub fn has_privileges_of(user: pg_sys::Oid, role: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-up by two oids; unknown roles have no members.
    role != pg_sys::InvalidOid && unsafe { pg_sys::has_privs_of_role(user, role) }
}

pub fn is_superuser(user: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-up by oid.
    unsafe { pg_sys::superuser_arg(user) }
}

/// Whether `user` has the attribute CREATEDB.
pub fn may_create_databases(user: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-up by oid; the tuple is released before returning.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::AUTHOID as i32,
            pg_sys::Datum::from(user),
        );
        if tuple.is_null() {
            return false;
        }
        let may = (*(pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_authid)).rolcreatedb;
        pg_sys::ReleaseSysCache(tuple);
        may
    }
}

/// The role `rakam_admin`, if it exists.
pub fn admin_role() -> pg_sys::Oid {
    role_named("rakam_admin").unwrap_or(pg_sys::InvalidOid)
}

/// The oid of a role by name.
pub fn role_named(name: &str) -> Option<pg_sys::Oid> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: NUL-terminated text, missing_ok.
    let oid = unsafe { pg_sys::get_role_oid(name.as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Superuser or `rakam_admin`: may do what concerns the whole server.
pub fn is_server_admin(user: pg_sys::Oid) -> bool {
    is_superuser(user) || has_privileges_of(user, admin_role())
}

/// The extension's oid in this database, if it is installed.
pub fn extension_oid() -> Option<pg_sys::Oid> {
    // SAFETY: NUL-terminated text, missing_ok.
    let oid = unsafe { pg_sys::get_extension_oid(c"rakam".as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Who owns the internal tables. Looked up at each call: ALTER … OWNER is rare, a stale answer dangerous.
pub fn extension_owner() -> pg_sys::Oid {
    // SAFETY: syscache look-ups by name and oid; the tuple is released before returning.
    unsafe {
        let namespace = pg_sys::get_namespace_oid(c"rakam_internal".as_ptr(), false);
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::NAMESPACEOID as i32,
            pg_sys::Datum::from(namespace),
        );
        assert!(!tuple.is_null(), "schema rakam_internal has a catalog row");
        let form = pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_namespace;
        let owner = (*form).nspowner;
        pg_sys::ReleaseSysCache(tuple);
        owner
    }
}
