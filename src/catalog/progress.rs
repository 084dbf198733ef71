//! What this process is doing, for `rakam.stat_progress`: a row of its own, written in short transactions.

use std::time::{Duration, Instant};

use crate::pg::bgworker;
use crate::pg::spi::{self, arg};
use crate::pg::xact::{self, Failure};

/// The row is written at most so often.
const INTERVAL: Duration = Duration::from_secs(1);

/// The progress of a piece of work.
pub struct Progress {
    written: Instant,
    shown: u64,
}

/// Runs `work` with its progress shown: `what` in units of `unit`, of which there are `total`. For workers, outside of
/// any transaction.
pub fn show<T>(
    project_id: i32,
    what: &str,
    unit: &'static str,
    total: u64,
    work: impl FnOnce(&mut Progress) -> Result<T, Failure>,
) -> Result<T, Failure> {
    xact::worker(|| {
        spi::execute(
            "INSERT INTO rakam_internal.progress AS p (pid, project_id, what, total, unit)
             SELECT $1, project_id, $3, $4, $5 FROM rakam_internal.project WHERE project_id = $2
             ON CONFLICT (pid) DO UPDATE SET project_id = excluded.project_id, what = excluded.what, done = 0,
               total = excluded.total, unit = excluded.unit, started_at = pg_catalog.clock_timestamp()",
            &[
                arg(bgworker::my_pid()),
                arg(project_id),
                arg(what),
                arg(total as i64),
                arg(unit),
            ],
        )
    })?;
    let outcome = work(&mut Progress {
        written: Instant::now(),
        shown: 0,
    });
    let removed = xact::worker(|| {
        spi::execute(
            "DELETE FROM rakam_internal.progress WHERE pid = $1",
            &[arg(bgworker::my_pid())],
        )
    });
    let value = outcome?;
    removed?;
    Ok(value)
}

impl Progress {
    /// So much is done.
    pub fn set(&mut self, done: u64) -> Result<(), Failure> {
        if done == self.shown || self.written.elapsed() < INTERVAL {
            return Ok(());
        }
        self.written = Instant::now();
        self.shown = done;
        xact::worker(|| {
            spi::execute(
                "UPDATE rakam_internal.progress SET done = $2 WHERE pid = $1",
                &[arg(bgworker::my_pid()), arg(done as i64)],
            )
        })?;
        Ok(())
    }
}
