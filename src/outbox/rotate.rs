//! Space of the outbox is given back: another table takes the new rows, and one that has none left is emptied.
//!
//! Nobody reads the outbox under a snapshot but the relay, and a dump, whose lock on the table holds this up. So a table without
//! rows may be emptied whatever old snapshots there are.

use std::time::Duration;

use crate::catalog::outbox;
use crate::pg::locks::Mode;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{Result, failpoint, locks, relation};

/// A table takes no more rows at this size, or at this age if it has any.
const BYTES: u64 = 16 << 20;
const AGE: Duration = Duration::from_secs(60);

/// Does whatever is due. One process at a time.
pub fn run() -> std::result::Result<(), Failure> {
    xact::worker(switch)?;
    for k in 0..3 {
        xact::worker(|| empty(k))?;
    }
    Ok(())
}

fn switch() -> Result<()> {
    let (current, switched_at_us) = outbox::state(View::Current)?;
    let is_old = xact::now_us() - switched_at_us >= AGE.as_micros() as i64;
    let next = (current + 1) % 3;
    let is_free = |k: usize| relation::blocks(outbox::table_oid(k)) == 0;
    // Long events are in the TOAST table.
    if relation::disk_bytes(outbox::table_oid(current)) >= BYTES || is_old && !is_free(current) {
        // One of the others may be held by a long transaction that has written it.
        if let Some(free) = [next, (next + 1) % 3].into_iter().find(|&k| is_free(k)) {
            outbox::switch_to(free)?;
        }
    }
    Ok(())
}

fn empty(k: usize) -> Result<()> {
    let table = outbox::table_oid(k);
    if outbox::state(View::Current)?.0 == k || relation::blocks(table) == 0 {
        return Ok(());
    }
    outbox::delete_orphans(k)?;
    if !locks::try_relation(table, Mode::AccessExclusive) {
        return Ok(());
    }
    // Nobody holds the table now, no transaction that has written it is open: what is in it is all there will be.
    let latest = Registered::latest();
    if !outbox::has_rows(View::Under(latest.get()), k)? {
        outbox::truncate(k)?;
        failpoint::hit("outbox.before_truncate_commit");
    }
    Ok(())
}
