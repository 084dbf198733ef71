//! Heap tables of ours without the executor: for the row that every collect writes, the one it reads, and for chunks.

use pgrx::pg_sys;

use super::snapshot::Snapshot;

/// Inserts a row with all its index entries, as the executor would into a table without triggers, defaults,
/// generated columns, partial or expression indexes: every column has to be given. Visible to the next command.
///
/// The caller has locked the relation for writing.
pub fn insert(relation: pg_sys::Oid, values: &[pg_sys::Datum]) {
    let mut values = values.to_vec();
    // SAFETY: the relation is opened for the call; the values are one per column, as the caller promises and the
    // assertion holds; the tuple is a copy that is freed.
    unsafe {
        let rel = pg_sys::table_open(relation, pg_sys::RowExclusiveLock as i32);
        let desc = (*rel).rd_att;
        assert_eq!((*desc).natts as usize, values.len(), "one value per column");
        let mut nulls = vec![false; values.len()];
        let tuple = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
        pg_sys::CatalogTupleInsert(rel, tuple);
        pg_sys::heap_freetuple(tuple);
        pg_sys::table_close(rel, pg_sys::NoLock as i32);
        pg_sys::CommandCounterIncrement();
    }
}

/// A not-NULL int4 column (from 1) of the only row of a table, under a snapshot. None: there is no row.
pub fn only_int4(relation: pg_sys::Oid, column: i16, snapshot: Snapshot) -> Option<i32> {
    // SAFETY: a sequential scan that ends here; the value is copied out before.
    unsafe {
        let rel = pg_sys::table_open(relation, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::table_beginscan(rel, snapshot.as_ptr(), 0, std::ptr::null_mut());
        let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
        let mut value = None;
        if !tuple.is_null() {
            let mut is_null = false;
            let datum = pg_sys::heap_getattr(tuple, i32::from(column), (*rel).rd_att, &mut is_null);
            value = (!is_null).then(|| datum.value() as i32);
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(rel, pg_sys::AccessShareLock as i32);
        value
    }
}

/// The next value of a sequence that the current user may use.
pub fn nextval(sequence: pg_sys::Oid) -> i64 {
    // SAFETY: a direct call of the server's function with its one argument; it never gives NULL.
    unsafe {
        pgrx::direct_function_call::<i64>(pg_sys::nextval_oid, &[Some(sequence.into())])
            .unwrap_or_default()
    }
}
