//! The log of values that did not fit: samples, and exact counters per field and day. A flood of them leaves no more
//! rows than [`SAMPLES_A_DAY`] for each field and day.

use std::collections::HashMap;

use rakam_event::batch::{InvalidCount, InvalidValue};

use crate::pg::spi::{self, View, arg};
use crate::pg::{PgError, Result};

/// Values of one field that are kept for a day of receipt; the rest is only counted.
const SAMPLES_A_DAY: i64 = 100;
const DAY_US: i64 = 86_400_000_000;

/// Logs what a batch found. Digester only: the counters' rows have one writer.
pub fn record(
    project_id: i32,
    collection_id: i32,
    samples: &[InvalidValue],
    counts: &[InvalidCount],
) -> Result<()> {
    let mut room: HashMap<(&str, i32), i64> = HashMap::new();
    for count in counts {
        let before = add(project_id, collection_id, count)? - count.n as i64;
        room.insert((count.field.as_str(), count.day), SAMPLES_A_DAY - before);
    }
    for sample in samples {
        let day = sample.received_at_us.div_euclid(DAY_US) as i32;
        let Some(room) = room
            .get_mut(&(sample.field.as_str(), day))
            .filter(|room| **room > 0)
        else {
            continue;
        };
        *room -= 1;
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
    Ok(())
}

/// Adds to a counter; its value then.
fn add(project_id: i32, collection_id: i32, count: &InvalidCount) -> Result<i64> {
    spi::first(
        View::Current,
        "INSERT INTO rakam_internal.invalid_count AS c (collection_id, project_id, field, day, n)
         VALUES ($1, $2, $3, date '1970-01-01' + $4, $5)
         ON CONFLICT (collection_id, field, day) DO UPDATE SET n = c.n + $5 RETURNING n",
        &[
            arg(collection_id),
            arg(project_id),
            arg(count.field.as_str()),
            arg(count.day),
            arg(count.n as i64),
        ],
        |row| row.must(1),
    )?
    .ok_or_else(|| PgError::internal("a counter was not stored"))
}
