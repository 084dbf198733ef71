//! Rows of ours that have served: logs beyond their age, counters to be summed up, names that nothing is under any more.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::catalog::{
    backlog, collections, dropping, event_store, former, inbox, logs, mapper, projects, storages,
    usage,
};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{server, wait};

/// How long a round removes what dropped collections have left.
const CLEARING: Duration = Duration::from_millis(300);

thread_local! {
    /// Whether the servers of storages were looked at: a process does so once, for the sake of a dump just restored.
    static KEPT: Cell<bool> = const { Cell::new(false) };
}

/// Cleans up; later, if somebody is changing some of it. The caller holds a lock that lets only one do so.
pub fn run() -> Result<(), Failure> {
    let done = xact::in_passing(|| {
        backlog::forget_dropped()?;
        usage::sum_up()?;
        storages::forget_gone()?;
        if !KEPT.get() {
            for (table, storage) in storages::without_dependency(None)? {
                server::keep_for(table, &storage);
            }
        }
        // Below the oldest transaction that ran when the tick was taken everything is digested, but for projects
        // that lag behind it.
        let mut digested_below = inbox::tick(View::Current)?.snapshot.xmin;
        for lag in backlog::lagging(View::Current)? {
            digested_below = digested_below.min(lag.snapshot.xmin);
        }
        former::forget(digested_below)
    })?;
    if done.is_some() {
        KEPT.set(true);
    }
    Ok(())
}

/// Takes over new names of roles, servers and functions, and drops what is old in the logs. Several may do so at once: each leaves
/// to the others what they are at.
pub fn names_and_logs() -> Result<(), Failure> {
    xact::in_passing(|| {
        projects::follow_renamed_roles()?;
        event_store::follow_renamed_servers()?;
        storages::follow_renamed_servers()?;
        mapper::keep_functions()
    })?;
    while xact::in_passing(logs::run)? == Some(true) {
        wait::check_interrupts();
    }
    Ok(())
}

/// Goes on with removing what dropped collections have left in the manifest, where whoever dropped them did not come to it.
pub fn dropped_collections() -> Result<(), Failure> {
    let began = Instant::now();
    for (collection_id, project_id) in xact::worker(|| collections::dropped(View::Current))? {
        if dropping::is_going(project_id) {
            continue;
        }
        // Else somebody is at it.
        let Some(_job) = SessionLock::try_take(LockOn::CollectionJob(collection_id)) else {
            continue;
        };
        while xact::in_passing(|| collections::clear(collection_id))? == Some(true) {
            wait::check_interrupts();
            if began.elapsed() >= CLEARING {
                return Ok(());
            }
        }
    }
    Ok(())
}
