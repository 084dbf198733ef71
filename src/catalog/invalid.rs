//! The log of values that did not fit: samples, and exact counters per field and day.

use rakam_event::batch::{InvalidCount, InvalidValue};

use crate::pg::Result;
use crate::pg::spi::{self, arg};

/// Logs what a batch found. Digester only: the counters' rows have one writer.
pub fn record(
    project_id: i32,
    collection_id: i32,
    samples: &[InvalidValue],
    counts: &[InvalidCount],
) -> Result<()> {
    for sample in samples {
        spi::execute(
            "INSERT INTO rakam_internal.invalid_value (project_id, collection_id, field, type, value, error, event_id, at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            &[
                arg(project_id),
                arg(collection_id),
                arg(sample.field.as_str()),
                arg(sample.ty.as_str()),
                arg(sample.value.as_str()),
                arg(sample.error.as_str()),
                arg(sample.event_id.as_deref()),
                spi::timestamptz(sample.received_at_us),
            ],
        )?;
    }
    for count in counts {
        spi::execute(
            "INSERT INTO rakam_internal.invalid_count AS c (collection_id, project_id, field, day, n)
             VALUES ($1, $2, $3, date '1970-01-01' + $4, $5)
             ON CONFLICT (collection_id, field, day) DO UPDATE SET n = c.n + $5",
            &[
                arg(collection_id),
                arg(project_id),
                arg(count.field.as_str()),
                arg(count.day),
                arg(count.n as i64),
            ],
        )?;
    }
    Ok(())
}
