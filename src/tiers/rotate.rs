//! Rotation of the inbox: another table takes the new rows, and a table whose rows are all digested, for every snapshot
//! there is, is emptied.
//!
//! A table that held events deleted since is switched and emptied at the next look, whatever its age.
//!
//! Switch: readers and writers go on; writers re-read which table is current after locking theirs. Seal: once nobody
//! can write a table any more and a tick covers all its rows, readers that see that tick need not open it. Truncate:
//! once that tick is past the horizon, no snapshot can miss the rows.

use crate::catalog::inbox::{self, rotation};
use crate::pg::locks::Mode;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{Result, failpoint, guc, locks, relation};

/// What a look at the rotation did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rotated {
    pub switched: bool,
    pub sealed: bool,
    pub truncated: bool,
}

/// Does whatever is due. The caller holds the digest lock, so no tick is written meanwhile.
pub fn run() -> std::result::Result<Rotated, Failure> {
    let mut done = Rotated {
        switched: xact::worker(switch)?,
        ..Rotated::default()
    };
    for k in 0..3 {
        done.sealed |= xact::worker(|| seal(k))?;
        done.truncated |= xact::worker(|| truncate(k))?;
    }
    xact::worker(|| {
        rotation::forget_ticks(xact::horizon(relation::oid("rakam_internal", "inbox_tick")))
    })?;
    Ok(done)
}

fn switch() -> Result<bool> {
    let state = rotation::state(View::Current)?;
    let age_us = xact::now_us() - state.switched_at_us;
    let next = (state.current + 1) % 3;
    let forced = state.to_empty[state.current];
    let due = forced || age_us >= guc::rotation_interval().as_micros() as i64;
    if !due || state.sealed[next] != 0 {
        return Ok(false);
    }
    if forced && relation::blocks(inbox::table_oid(state.current)) == 0 {
        rotation::is_empty(state.current)?;
        return Ok(false);
    }
    let tick = inbox::tick(View::Current)?;
    let (next_has_rows, _) = rotation::table_content(View::Current, next, &tick.snapshot)?;
    let (has_rows, _) = rotation::table_content(View::Current, state.current, &tick.snapshot)?;
    if !(has_rows || forced) || next_has_rows {
        return Ok(false);
    }
    if relation::blocks(inbox::table_oid(next)) == 0 {
        rotation::is_empty(next)?;
    }
    rotation::switch_to(next)?;
    failpoint::hit("rotate.before_switch");
    Ok(true)
}

fn seal(k: usize) -> Result<bool> {
    let state = rotation::state(View::Current)?;
    if k == state.current || state.sealed[k] != 0 {
        return Ok(false);
    }
    // Conflicts with whoever may still insert; those who come later see that the table is not current.
    if !locks::try_relation(inbox::table_oid(k), Mode::Share) {
        return Ok(false);
    }
    let latest = Registered::latest();
    let view = View::Under(latest.get());
    let tick = inbox::tick(view)?;
    let (any, uncovered) = rotation::table_content(view, k, &tick.snapshot)?;
    if !any && state.to_empty[k] && relation::blocks(inbox::table_oid(k)) == 0 {
        rotation::is_empty(k)?;
        return Ok(false);
    }
    if !(any || state.to_empty[k]) || uncovered || rotation::table_lags(view, k)? {
        return Ok(false);
    }
    rotation::seal(k, tick.id)?;
    Ok(true)
}

fn truncate(k: usize) -> Result<bool> {
    let state = rotation::state(View::Current)?;
    let tick = state.sealed[k];
    if tick == 0 || k == state.current {
        return Ok(false);
    }
    let Some((created_xid, snapshot)) = rotation::tick_by_id(View::Current, tick)? else {
        return Ok(false);
    };
    if created_xid >= xact::horizon(relation::oid("rakam_internal", "inbox_tick")) {
        return Ok(false);
    }
    if !locks::try_relation(inbox::table_oid(k), Mode::AccessExclusive) {
        return Ok(false);
    }
    // Nobody holds the table now: what is in it is all there will be.
    let latest = Registered::latest();
    let (_, uncovered) = rotation::table_content(View::Under(latest.get()), k, &snapshot)?;
    if uncovered {
        return Ok(false);
    }
    rotation::truncate(k, tick)?;
    failpoint::hit("rotate.before_truncate_commit");
    Ok(true)
}
