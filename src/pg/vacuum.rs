//! VACUUM from a background worker, which is outside of any transaction.

use std::ffi::CString;

use pgrx::pg_sys;

use super::error::{PgError, Result};
use super::{spi, xact};

/// Runs `VACUUM` on a table of schema rakam_internal, unless somebody else has it locked. Not inside a transaction.
pub fn table(name: &str) -> Result<()> {
    let text = format!(
        "VACUUM (SKIP_LOCKED, TRUNCATE false) rakam_internal.{}",
        spi::quote_ident(name)
    );
    let text = CString::new(text).map_err(|_| PgError::internal("NUL byte in a name"))?;
    // SAFETY: a memory context of its own, since VACUUM ends the transaction that it is called in; it is removed below,
    // outside of any transaction.
    let memory = unsafe {
        pg_sys::AllocSetContextCreateInternal(
            pg_sys::TopMemoryContext,
            c"rakam vacuum".as_ptr(),
            pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
            pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
            pg_sys::ALLOCSET_SMALL_MAXSIZE as usize,
        )
    };
    let outcome = xact::catch(|| {
        // SAFETY: a utility statement run as from a client, outside of a transaction block; its parse tree lives in
        // the context above.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::MemoryContextSwitchTo(memory);
            let parsed = pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
            let analysed = pg_sys::pg_analyze_and_rewrite_fixedparams(
                pg_sys::list_nth(parsed, 0).cast(),
                text.as_ptr(),
                std::ptr::null(),
                0,
                std::ptr::null_mut(),
            );
            let planned = pg_sys::pg_plan_queries(analysed, text.as_ptr(), 0, std::ptr::null_mut());
            pg_sys::ProcessUtility(
                pg_sys::list_nth(planned, 0).cast(),
                text.as_ptr(),
                false,
                pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                pg_sys::CreateDestReceiver(pg_sys::CommandDest::DestNone),
                std::ptr::null_mut(),
            );
            pg_sys::CommitTransactionCommand();
        }
    });
    if outcome.is_err() {
        xact::abort();
    }
    // SAFETY: nothing points into it any more.
    unsafe { pg_sys::MemoryContextDelete(memory) };
    outcome
}
