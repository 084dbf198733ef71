//! Scans that tell which stored row each of their rows is: how [`crate::workers`] finds the rows that a condition of
//! `rakam.delete_events` is true for.
//!
//! Nobody but a worker of ours can ask for one. It names the objects to be read and *arms* the process for one scan: the
//! first one opened of that table as the first relation of its query. That scan reads those objects only, chunks, data
//! files and parked events, no inbox; its rows have the object's number and the row's number in it as their ctid.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use pgrx::pg_sys;
use rakam_engine::ir::Transactions;

use crate::catalog::deletion::Object;

/// So many objects fit a scan: their numbers are the offset part of a ctid.
pub const OBJECTS_MAX: usize = 60_000;
/// What stands for parked events; their row number is the place in the list.
pub const PARKED: u16 = u16::MAX;

/// What a scan with identities reads.
#[derive(Debug, Default)]
pub struct Objects {
    numbers: HashMap<Object, u32>,
    /// The place of each parked event in the list.
    pub parked: Arc<HashMap<i64, u32>>,
    /// Events that came with these are left out.
    pub late: Option<Transactions>,
}

impl Objects {
    /// At most [`OBJECTS_MAX`] objects, numbered by their place, and parked events by id; all of their rows.
    pub fn new(objects: &[Object], parked: &[i64]) -> Self {
        let places = |n: usize| 0..n as u32;
        Self {
            numbers: objects.iter().copied().zip(places(objects.len())).collect(),
            parked: Arc::new(parked.iter().copied().zip(places(parked.len())).collect()),
            late: None,
        }
    }

    /// The number of an object; None: it is not to be read.
    pub fn number(&self, object: Object) -> Option<u32> {
        self.numbers.get(&object).copied()
    }
}

thread_local! {
    static ARMED: RefCell<Option<(pg_sys::Oid, Arc<Objects>)>> = const { RefCell::new(None) };
}

/// Has the next scan opened of this table tell its rows' identities.
pub fn arm(table: pg_sys::Oid, objects: Arc<Objects>) {
    ARMED.set(Some((table, objects)));
}

/// The next scan does so no more.
pub fn disarm() {
    ARMED.take();
}

/// For a scan being opened of the relation with this index in its query.
pub(super) fn take(table: pg_sys::Oid, index: pg_sys::Index) -> Option<Arc<Objects>> {
    ARMED.with_borrow_mut(|armed| {
        armed
            .take_if(|(of, _)| *of == table && index == 1)
            .map(|(_, objects)| objects)
    })
}

/// A row's identity as a ctid: see [`rakam_engine::rows::row`].
pub(super) fn ctid(value: i64) -> pg_sys::ItemPointerData {
    let (object, row) = rakam_engine::rows::row(value);
    pg_sys::ItemPointerData {
        ip_blkid: pg_sys::BlockIdData {
            bi_hi: (row >> 16) as u16,
            bi_lo: row as u16,
        },
        ip_posid: object as u16,
    }
}
