//! What other sessions see of this one.

use std::ffi::CStr;

use pgrx::pg_sys;

/// Takes a secret out of pg_stat_activity: sessions of one shared login role see each other's query texts.
/// Nothing happens where it came as a bind parameter, which is not shown.
pub fn hide(secret: &str) {
    // SAFETY: NULL or the NUL-terminated text of the running client command; the replacement is a literal.
    unsafe {
        if !pg_sys::debug_query_string.is_null()
            && CStr::from_ptr(pg_sys::debug_query_string)
                .to_string_lossy()
                .contains(secret)
        {
            pg_sys::pgstat_report_activity(
                pg_sys::BackendState::STATE_RUNNING,
                c"<a call with a key>".as_ptr(),
            );
        }
    }
}
