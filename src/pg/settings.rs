//! Settings of the server pinned for a while: where the caller's own choice must not change what something means, and where
//! a worker has to understand something as its caller does.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;

use super::error::{PgError, Result};

/// What values look like as text, and what the same SQL means: the server's defaults.
const DEFAULTS: [(&CStr, &CStr); 8] = [
    (c"TimeZone", c"UTC"),
    (c"DateStyle", c"ISO, MDY"),
    (c"IntervalStyle", c"postgres"),
    (c"extra_float_digits", c"1"),
    (c"bytea_output", c"hex"),
    (c"row_security", c"on"),
    (c"transform_null_equals", c"off"),
    (c"standard_conforming_strings", c"on"),
];

/// Sets a variable until the current GUC nest level, which the caller has opened, ends.
///
/// Raises an error for a value that is not valid.
pub(super) fn save(name: &CStr, value: &CStr) {
    // SAFETY: NUL-terminated texts, copied.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
}

/// Sets a variable for the current GUC nest level if it differs: setting costs more than looking.
///
/// # Safety
/// Within a GUC nest level of the caller's.
pub unsafe fn pin(name: &CStr, value: &CStr) {
    // SAFETY: a variable that exists; the answer is a NUL-terminated text that is not kept.
    unsafe {
        let now = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        if !now.is_null() && CStr::from_ptr(now) == value {
            return;
        }
        save(name, value);
    }
}

/// Pins what [`DEFAULTS`] lists.
///
/// # Safety
/// Within a GUC nest level of the caller's.
pub unsafe fn pin_defaults() {
    for (name, value) in DEFAULTS {
        // SAFETY: as the caller promises.
        unsafe { pin(name, value) };
    }
}

/// The defaults until dropped, also when an error unwinds: then the (sub)transaction's end puts the caller's back.
pub struct Defaults {
    nest_level: i32,
}

impl Defaults {
    pub fn enter() -> Self {
        // SAFETY: a GUC nest level, closed in Drop or by the transaction's end on error.
        unsafe {
            let nest_level = pg_sys::NewGUCNestLevel();
            pin_defaults();
            Self { nest_level }
        }
    }
}

impl Drop for Defaults {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: closes the level opened in `enter`.
            unsafe { pg_sys::AtEOXact_GUC(true, self.nest_level) };
        }
    }
}

/// Settings that hold until it is dropped; an error that unwinds leaves their return to the transaction's end.
pub struct Settings {
    nest_level: i32,
}

impl Settings {
    /// Sets each name to its value, with the rights of the current user.
    pub fn set(values: &[(String, String)]) -> Result<Self> {
        // SAFETY: a GUC nest level is closed in Drop, or by the transaction's end on error.
        let nest_level = unsafe { pg_sys::NewGUCNestLevel() };
        let settings = Self { nest_level };
        for (name, value) in values {
            let (Ok(name), Ok(value)) = (CString::new(name.as_str()), CString::new(value.as_str()))
            else {
                return Err(PgError::internal("NUL byte in a setting"));
            };
            save(&name, &value);
        }
        Ok(settings)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: closes the level opened in `set`.
            unsafe { pg_sys::AtEOXact_GUC(true, self.nest_level) };
        }
    }
}

/// Has foreign keys unchecked, as a replica has them, or checked again: in the rest of the transaction. False: it is so already.
pub fn put_off_checks(off: bool) -> bool {
    let wanted = if off { c"replica" } else { c"origin" };
    // SAFETY: a variable that exists; the answer is a NUL-terminated text that is not kept. The new value is copied, and
    // taken back with the transaction. It is set for this statement, whoever the user is.
    unsafe {
        let name = c"session_replication_role";
        let now = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        if !now.is_null() && CStr::from_ptr(now) == wanted {
            return false;
        }
        pg_sys::set_config_option(
            name.as_ptr(),
            wanted.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
    true
}

/// The value of a setting as SHOW gives it; None if there is no such setting.
pub fn get(name: &CStr) -> Option<String> {
    // SAFETY: NUL-terminated text; missing_ok; the result is a string of the server's, copied at once.
    unsafe {
        let value = pg_sys::GetConfigOptionByName(name.as_ptr(), std::ptr::null_mut(), true);
        (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned())
    }
}
