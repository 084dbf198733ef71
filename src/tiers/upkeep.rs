//! Rows of ours that have served: logs beyond their age, counters to be summed up, names that nothing is under any more.

use crate::catalog::{backlog, former, inbox, logs, projects, usage};
use crate::pg::spi::View;
use crate::pg::wait;
use crate::pg::xact::{self, Failure};

/// Cleans up. The caller holds a lock that lets only one do so.
pub fn run() -> Result<(), Failure> {
    xact::worker(|| {
        usage::sum_up()?;
        projects::follow_renamed_roles()?;
        // Below the oldest transaction that ran when the tick was taken everything is digested, but for projects
        // that lag behind it.
        let mut digested_below = inbox::tick(View::Current)?.snapshot.xmin;
        for lag in backlog::lagging(View::Current)? {
            digested_below = digested_below.min(lag.snapshot.xmin);
        }
        former::forget(digested_below)
    })?;
    while xact::worker(logs::run)? {
        wait::check_interrupts();
    }
    Ok(())
}
