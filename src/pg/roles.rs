//! Roles: what one inherits, and becoming one on purpose.

use std::collections::HashSet;
use std::ffi::{CStr, CString};

use pgrx::pg_sys;

use super::error::{PgError, Result};
use super::security;

/// Columns of pg_auth_members, as the catalog's header numbers them.
#[cfg(feature = "pg15")]
const ROLEID: pg_sys::AttrNumber = 1;
#[cfg(not(feature = "pg15"))]
const ROLEID: pg_sys::AttrNumber = 2;
#[cfg(not(feature = "pg15"))]
const INHERIT_OPTION: pg_sys::AttrNumber = 6;

/// The role and every role whose privileges it has by inheritance, as `has_privs_of_role` sees it (of a
/// superuser only what was granted).
///
/// Walks upwards through the cached memberships: the cost is that of the role's own memberships.
pub fn inherited(user: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let mut roles = vec![user];
    let mut seen = HashSet::from([user]);
    let mut next = 0;
    while let Some(&member) = roles.get(next) {
        next += 1;
        granted_to(member, |role| {
            if seen.insert(role) {
                roles.push(role);
            }
        });
    }
    roles
}

/// The roles granted to a member directly, with inheritance.
fn granted_to(member: pg_sys::Oid, mut found: impl FnMut(pg_sys::Oid)) {
    // Up to 15 inheritance belongs to the member, from 16 on to each grant.
    #[cfg(feature = "pg15")]
    if !has_inherit(member) {
        return;
    }
    // SAFETY: the list and its tuples stay pinned until ReleaseCatCacheList; `members` has n_members entries.
    unsafe {
        let list = pg_sys::SearchSysCacheList(
            pg_sys::SysCacheIdentifier::AUTHMEMMEMROLE as i32,
            1,
            pg_sys::Datum::from(member),
            pg_sys::Datum::from(0usize),
            pg_sys::Datum::from(0usize),
        );
        for &entry in (*list).members.as_slice((*list).n_members as usize) {
            let attribute = |number| {
                let mut is_null = false;
                pg_sys::SysCacheGetAttr(
                    pg_sys::SysCacheIdentifier::AUTHMEMMEMROLE as i32,
                    &raw mut (*entry).tuple,
                    number,
                    &mut is_null,
                )
                .value()
            };
            #[cfg(not(feature = "pg15"))]
            if attribute(INHERIT_OPTION) == 0 {
                continue;
            }
            found(pg_sys::Oid::from(attribute(ROLEID) as u32));
        }
        pg_sys::ReleaseCatCacheList(list);
    }
}

#[cfg(feature = "pg15")]
fn has_inherit(role: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-up by oid; the tuple is released before returning.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::AUTHOID as i32,
            pg_sys::Datum::from(role),
        );
        if tuple.is_null() {
            return false;
        }
        let inherit = (*(pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_authid)).rolinherit;
        pg_sys::ReleaseSysCache(tuple);
        inherit
    }
}

/// Whether row-level security does not apply to the role: a superuser or BYPASSRLS.
pub fn bypasses_rls(user: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-up by oid.
    unsafe { pg_sys::has_bypassrls_privilege(user) }
}

/// A role's name; None if it is gone.
pub fn name(role: pg_sys::Oid) -> Option<String> {
    // SAFETY: noerr gives NULL for an unknown role, else a NUL-terminated copy.
    unsafe {
        let name = pg_sys::GetUserNameFromId(role, true);
        (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

/// Does what SET ROLE (SET LOCAL ROLE with `local`) does, without asking for membership: the caller has
/// checked something better. Undone as SET ROLE is: by RESET ROLE, DISCARD ALL, rollback.
///
/// The server's check asks whether the *session* user may become the role, so for its duration the session
/// user is the extension's owner. Refused where SET ROLE is: inside SECURITY DEFINER functions and
/// security-restricted operations, since the role would outlive them.
pub fn set(role: &str, local: bool) -> Result<()> {
    // SAFETY: reads backend variables.
    if unsafe { pg_sys::InLocalUserIdChange() || pg_sys::InSecurityRestrictedOperation() } {
        return Err(PgError::new(
            "42501",
            "cannot change the role within a security-definer function or a security-restricted operation",
        )
        .hint("Call rakam.authenticate outside of such functions, where SET ROLE is allowed too."));
    }
    let value = CString::new(role).map_err(|_| PgError::internal("NUL byte in a role's name"))?;
    let _session = SessionAs::owner();
    // SAFETY: NUL-terminated texts; an error is raised as for SET ROLE.
    unsafe {
        pg_sys::set_config_option(
            c"role".as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            if local {
                pg_sys::GucAction::GUC_ACTION_LOCAL
            } else {
                pg_sys::GucAction::GUC_ACTION_SET
            },
            true,
            0,
            false,
        );
    }
    Ok(())
}

/// The session user replaced until dropped, also while an error unwinds.
struct SessionAs {
    user: pg_sys::Oid,
}

impl SessionAs {
    fn owner() -> Self {
        let owner = security::extension_owner();
        // SAFETY: plain reads and writes of backend variables; paired with Drop. Without an active SET ROLE it
        // also moves the current user, which is the session user here: user id changes were refused before.
        let user = unsafe {
            let user = pg_sys::GetSessionUserId();
            pg_sys::SetSessionAuthorization(owner, pg_sys::superuser_arg(owner));
            user
        };
        Self { user }
    }
}

impl Drop for SessionAs {
    fn drop(&mut self) {
        // SAFETY: restores what was there at construction.
        unsafe {
            pg_sys::SetSessionAuthorization(self.user, pg_sys::superuser_arg(self.user));
        }
    }
}
