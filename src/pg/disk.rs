//! The disk under the data directory.

use std::mem::MaybeUninit;

use super::error::{PgError, Result};

/// Bytes that the server may still write.
pub fn free_bytes() -> Result<u64> {
    let mut found = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: a NUL-terminated path (every process of the server stands in the data directory) and a buffer of the right
    // type, which is all bytes of integers and valid when zeroed.
    let found = unsafe {
        if libc::statvfs(c".".as_ptr(), found.as_mut_ptr()) != 0 {
            let error = std::io::Error::last_os_error();
            return Err(PgError::new(
                "58030",
                format!("could not ask for the free space of the data directory: {error}"),
            ));
        }
        found.assume_init()
    };
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
