//! What failed last in the background, for `rakam.stat_worker` and `rakam.health`.

use crate::pg::Result;
use crate::pg::spi::{self, arg};

fn key(step: &str, collection_id: i32) -> String {
    if collection_id == 0 {
        step.to_owned()
    } else {
        format!("{step}/{collection_id}")
    }
}

pub fn failed(step: &str, collection_id: i32, error: &str) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.job AS j (job_key, failures, last_error, error_at)
         VALUES ($1, 1, $2, pg_catalog.clock_timestamp())
         ON CONFLICT (job_key) DO UPDATE SET failures = j.failures + 1, last_error = $2,
           error_at = pg_catalog.clock_timestamp()",
        &[arg(key(step, collection_id)), arg(error)],
    )?;
    Ok(())
}

pub fn succeeded(step: &str, collection_id: i32) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.job SET failures = 0, last_ok = pg_catalog.clock_timestamp() WHERE job_key = $1",
        &[arg(key(step, collection_id))],
    )?;
    Ok(())
}
