//! Type names.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;

use super::error::{PgError, Result};

/// The canonical spelling of a type name as in CREATE TABLE; an unknown one raises Postgres' own error.
pub fn canonical_name(text: &str) -> Result<String> {
    let text = CString::new(text)
        .map_err(|_| PgError::new("22023", "a type name must not contain NUL characters"))?;
    let (mut oid, mut typmod) = (pg_sys::InvalidOid, -1);
    // SAFETY: NUL-terminated text; the result of format_type is palloc'd and copied.
    unsafe {
        #[cfg(feature = "pg15")]
        pg_sys::parseTypeString(text.as_ptr(), &mut oid, &mut typmod, false);
        #[cfg(not(feature = "pg15"))]
        pg_sys::parseTypeString(text.as_ptr(), &mut oid, &mut typmod, std::ptr::null_mut());
        let name = pg_sys::format_type_with_typemod(oid, typmod);
        Ok(CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

/// Microseconds since 1970 as a timestamptz; None for 0, which stands for unknown.
pub fn timestamptz(unix_us: i64) -> Option<pgrx::datum::TimestampWithTimeZone> {
    (unix_us > 0)
        .then(|| pgrx::datum::TimestampWithTimeZone::try_from(unix_us - super::PG_EPOCH_US).ok())
        .flatten()
}
