//! Rows of a query on their way to an INSERT, without being made into tuples.
//!
//! A foreign table's rows come in slots for heap tuples: for each row of INSERT … SELECT the executor forms a tuple, only for
//! its values to be taken out of it again. The slot made here takes the values over as they are, which are good until the
//! query is asked for its next row. That is longer than it takes to put them into columns, but too short for whoever else
//! looks at a row: such statements keep the executor's slot.

use pgrx::{PgMemoryContexts, pg_guard, pg_sys};

/// Has rows of this target come without tuples, from the second on; at the first one, when the executor has made its own
/// slot. There must be no triggers, and nothing that is computed from a stored row.
///
/// # Safety
/// A target of the executor state, at a call of `ExecForeignInsert`.
pub unsafe fn pass_values(estate: *mut pg_sys::EState, target: *mut pg_sys::ResultRelInfo) {
    // SAFETY: as promised. The executor asks for the slot anew for each row, and ends it with the state's others; the
    // routines live in the query's context, which outlives it.
    unsafe {
        let theirs = (*target).ri_newTupleSlot;
        // COPY and rows for partitions come in slots of their own; a projection has remembered the slot that it fills.
        if theirs.is_null()
            || !(*target).ri_projectNew.is_null()
            || !std::ptr::eq((*theirs).tts_ops, &raw const pg_sys::TTSOpsHeapTuple)
        {
            return;
        }
        let routines = pg_sys::TupleTableSlotOps {
            copyslot: Some(take_over),
            materialize: Some(keep),
            ..pg_sys::TTSOpsVirtual
        };
        let routines =
            PgMemoryContexts::For((*estate).es_query_cxt).leak_and_drop_on_delete(routines);
        (*target).ri_newTupleSlot =
            pg_sys::ExecInitExtraTupleSlot(estate, (*theirs).tts_tupleDescriptor, routines);
    }
}

/// Copies a row, but what its values point to.
#[pg_guard]
unsafe extern "C-unwind" fn take_over(
    to: *mut pg_sys::TupleTableSlot,
    from: *mut pg_sys::TupleTableSlot,
) {
    // SAFETY: both slots have the table's columns, as the executor has checked; the values are all there then.
    unsafe {
        let columns = (*(*to).tts_tupleDescriptor).natts;
        if i32::from((*from).tts_nvalid) < columns {
            pg_sys::slot_getallattrs(from);
        }
        std::ptr::copy_nonoverlapping((*from).tts_values, (*to).tts_values, columns as usize);
        std::ptr::copy_nonoverlapping((*from).tts_isnull, (*to).tts_isnull, columns as usize);
        (*to).tts_nvalid = columns as i16;
        (*to).tts_flags &= !(pg_sys::TTS_FLAG_EMPTY as u16);
    }
}

/// The row stays where it is: it is stored before the next one comes.
unsafe extern "C-unwind" fn keep(_slot: *mut pg_sys::TupleTableSlot) {}
