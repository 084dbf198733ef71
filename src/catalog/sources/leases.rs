//! Who reads which split: the leases are the rows of `source_split`.
//!
//! Whoever takes a split takes a new epoch, and a batch is stored only together with the compare-and-set of the epochs of all
//! splits that it moves. So a process that was stopped for long, or that lost the connection to everybody else, can store
//! nothing once somebody else has its splits, and nobody has to ask it.

use std::collections::HashSet;

use rakam_sources::batch::{Batch, written_us};
use rakam_sources::position::Position;
use rakam_sources::source::Lag;

use super::{position, position_text};
use crate::pg::Result;
use crate::pg::spi::{self, View, arg, timestamptz_or_null};

/// Means of rates are over about so many seconds: those of the SQL function `fade`.
const RATE_S: f64 = 10.0;

/// Splits of one source that are looked at together: objects of a prefix may be any number.
pub const SPLITS_MOST: i64 = 10_000;

/// An open split, and who reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub split: String,
    pub epoch: i64,
    pub holder: Option<i32>,
}

/// The open splits of a source in the order of their names, at most [`SPLITS_MOST`].
pub fn open(source_id: i32) -> Result<Vec<Lease>> {
    spi::query(
        View::Current,
        "SELECT split, epoch, holder FROM rakam_internal.source_split
         WHERE source_id = $1 AND state = 'open' ORDER BY split LIMIT $2",
        &[arg(source_id), arg(SPLITS_MOST)],
        |row| {
            Ok(Lease {
                split: row.must(1)?,
                epoch: row.must(2)?,
                holder: row.get(3),
            })
        },
    )
}

/// A split that this process reads from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    pub split: String,
    pub epoch: i64,
    pub position: Position,
}

/// Takes splits as they were seen; those that have changed since, or that somebody is changing, are left.
pub fn take(source_id: i32, seen: &[Lease], holder: i32) -> Result<Vec<Taken>> {
    let (splits, epochs) = columns(seen.iter().map(|lease| (&lease.split, lease.epoch)));
    spi::query(
        View::Current,
        "WITH free AS (
           SELECT s.split FROM rakam_internal.source_split s
           JOIN ROWS FROM (unnest($2::text[]), unnest($3::int8[])) n(split, epoch) ON s.split = n.split AND s.epoch = n.epoch
           WHERE s.source_id = $1 AND s.state = 'open' FOR NO KEY UPDATE OF s SKIP LOCKED)
         UPDATE rakam_internal.source_split s
         SET epoch = pg_catalog.nextval('rakam_internal.source_epoch'), holder = $4, updated_at = pg_catalog.clock_timestamp()
         FROM free WHERE s.source_id = $1 AND s.split = free.split
         RETURNING s.split, s.epoch, s.position::text",
        &[arg(source_id), arg(splits), arg(epochs), arg(holder)],
        |row| {
            Ok(Taken {
                split: row.must(1)?,
                epoch: row.must(2)?,
                position: position(&row.must::<String>(3)?)?,
            })
        },
    )
}

/// Gives splits back that this process reads no more. Those that somebody is changing stay its own: it answers the others.
pub fn release(source_id: i32, held: &[(String, i64)]) -> Result<Vec<String>> {
    let (splits, epochs) = columns(held.iter().map(|(split, epoch)| (split, *epoch)));
    spi::query(
        View::Current,
        "WITH free AS MATERIALIZED (
           SELECT s.split FROM rakam_internal.source_split s
           JOIN ROWS FROM (unnest($2::text[]), unnest($3::int8[])) n(split, epoch) ON s.split = n.split AND s.epoch = n.epoch
           WHERE s.source_id = $1 FOR NO KEY UPDATE OF s SKIP LOCKED)
         UPDATE rakam_internal.source_split s SET holder = NULL
         FROM free WHERE s.source_id = $1 AND s.split = free.split RETURNING s.split",
        &[arg(source_id), arg(splits), arg(epochs)],
        |row| row.must(1),
    )
}

fn columns<'a>(leases: impl Iterator<Item = (&'a String, i64)>) -> (Vec<String>, Vec<i64>) {
    leases.map(|(split, epoch)| (split.clone(), epoch)).unzip()
}

/// Whether a batch may be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    Ours,
    /// A split is another's, or is locked by somebody who takes it.
    Lost,
}

/// Moves the splits of a batch to where it ends, each if its epoch is still the one in `epochs` (in the order of the batch's
/// moves), and stops those that it stops. `lacks_id`, in the same order: events without an `_id` were among them. With
/// [`Claim::Lost`] nothing may be committed.
pub fn advance(
    source_id: i32,
    batch: &Batch,
    epoch: impl Fn(&str) -> Option<i64>,
    lacks_id: &[bool],
) -> Result<Claim> {
    let mut splits = Vec::new();
    let mut epochs = Vec::new();
    for split in
        (batch.moves.iter().map(|m| &m.split)).chain(batch.stops.iter().map(|stop| &stop.split))
    {
        let Some(epoch) = epoch(split) else {
            return Ok(Claim::Lost);
        };
        if !splits.contains(split) {
            splits.push(split.clone());
            epochs.push(epoch);
        }
    }
    let claimed = spi::run(
        View::Current,
        "SELECT FROM rakam_internal.source_split s
         JOIN ROWS FROM (unnest($2::text[]), unnest($3::int8[])) n(split, epoch) ON s.split = n.split AND s.epoch = n.epoch
         WHERE s.source_id = $1 AND s.state = 'open' FOR NO KEY UPDATE OF s SKIP LOCKED",
        &[arg(source_id), arg(splits.clone()), arg(epochs)],
        |_| Ok(()),
    )?;
    if claimed != splits.len() as u64 {
        return Ok(Claim::Lost);
    }
    for (at, moved) in batch.moves.iter().enumerate() {
        spi::execute(
            "UPDATE rakam_internal.source_split
             SET position = $3::text::jsonb, next_offset = coalesce($4::text::numeric, next_offset),
                 state = CASE WHEN $5 THEN 'ended' ELSE 'open' END, holder = CASE WHEN $5 THEN NULL ELSE holder END,
                 updated_at = t.now,
                 lag_records = CASE WHEN $5 THEN 0 ELSE greatest(0, lag_records - $6::int8) END,
                 lag_ms = CASE WHEN $5 THEN 0 ELSE lag_ms END,
                 since = CASE WHEN $6 > 0 THEN coalesce(since, t.now) ELSE since END, lacks_id = lacks_id OR $7,
                 record_at = coalesce($8, record_at), stored_at = CASE WHEN $6 > 0 THEN t.now ELSE stored_at END,
                 records_per_s = CASE WHEN $6 > 0 THEN records_per_s * rakam_internal.fade(stored_at) + $6 / $10
                                      ELSE records_per_s END,
                 bytes_per_s = CASE WHEN $6 > 0 THEN bytes_per_s * rakam_internal.fade(stored_at) + $9 / $10
                                    ELSE bytes_per_s END,
                 tombstones = tombstones + $11
             FROM (SELECT pg_catalog.clock_timestamp() AS now) t
             WHERE source_id = $1 AND split = $2",
            &[
                arg(source_id),
                arg(moved.split.as_str()),
                arg(position_text(&moved.to)?),
                arg(moved.to.next_offset()),
                arg(moved.ended),
                arg(moved.records as f64),
                arg(moved.records > 0 && lacks_id.get(at).copied().unwrap_or(true)),
                timestamptz_or_null(moved.timestamp_ms.and_then(written_us)),
                arg(moved.bytes as f64),
                arg(RATE_S),
                arg(moved.tombstones as i64),
            ],
        )?;
    }
    for stop in &batch.stops {
        spi::execute(
            "UPDATE rakam_internal.source_split SET state = 'stopped', holder = NULL, error = $3,
               updated_at = pg_catalog.clock_timestamp()
             WHERE source_id = $1 AND split = $2",
            &[
                arg(source_id),
                arg(stop.split.as_str()),
                arg(stop.reason.to_string()),
            ],
        )?;
    }
    Ok(Claim::Ours)
}

/// Notes how far behind their ends splits are; answers of which. Those that somebody is changing are left for the next time.
pub fn note_lag(source_id: i32, lags: &[(String, Option<Lag>)]) -> Result<HashSet<String>> {
    let (mut splits, mut records, mut ms) = (vec![], vec![], vec![]);
    for (split, lag) in lags {
        splits.push(split.clone());
        let (r, m) = match lag {
            Some(Lag::Records(n)) => (i64::try_from(*n).ok(), None),
            Some(Lag::Milliseconds(n)) => (None, i64::try_from(*n).ok()),
            None => (None, None),
        };
        records.push(r);
        ms.push(m);
    }
    let noted = spi::query(
        View::Current,
        "WITH free AS MATERIALIZED (
           SELECT s.split, n.records, n.ms FROM rakam_internal.source_split s
           JOIN ROWS FROM (unnest($2::text[]), unnest($3::int8[]), unnest($4::int8[])) n(split, records, ms)
             ON s.split = n.split
           WHERE s.source_id = $1 AND s.state = 'open' FOR NO KEY UPDATE OF s SKIP LOCKED)
         UPDATE rakam_internal.source_split s SET lag_records = free.records, lag_ms = free.ms
         FROM free WHERE s.source_id = $1 AND s.split = free.split RETURNING s.split",
        &[arg(source_id), arg(splits), arg(records), arg(ms)],
        |row| row.must(1),
    )?;
    Ok(noted.into_iter().collect())
}
