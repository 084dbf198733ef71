//! Three tables of which one takes new rows: those of the inbox and of the outbox.

use std::cell::Cell;
use std::thread::LocalKey;

use crate::pg::locks::Mode;
use crate::pg::snapshot::Registered;
use crate::pg::{Oid, PgError, Result, heap, locks, relation};

/// Tables of the schema `rakam_internal`.
pub struct Three {
    pub tables: [&'static str; 3],
    /// The table whose one row says, in its second column, which of them takes new rows.
    pub state: &'static str,
    /// In messages.
    pub what: &'static str,
    /// Where the last row of this session went: most often the next one goes there too.
    pub last: &'static LocalKey<Cell<usize>>,
}

impl Three {
    pub fn oid(&self, k: usize) -> Oid {
        relation::oid("rakam_internal", self.tables[k])
    }

    /// The table that takes new rows, locked for writing to the end of the transaction.
    ///
    /// It is locked before the second look at which one is current: once locked it cannot be sealed for readers, or emptied,
    /// before this transaction ends.
    pub fn lock_current(&self) -> Result<Oid> {
        let mut k = self.last.get();
        loop {
            let table = self.oid(k);
            locks::relation(table, Mode::RowExclusive);
            let now = self.current()?;
            if now == k {
                self.last.set(k);
                return Ok(table);
            }
            k = now;
        }
    }

    /// Which of them takes new rows, as of now (not of the caller's snapshot).
    fn current(&self) -> Result<usize> {
        let latest = Registered::latest();
        let state = relation::oid("rakam_internal", self.state);
        heap::only_int4(state, 2, latest.get())
            .and_then(|k| usize::try_from(k).ok())
            .filter(|&k| k < 3)
            .ok_or_else(|| PgError::internal(format!("the {} has no state", self.what)))
    }
}
