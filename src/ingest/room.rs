//! `rakam.max_hot_bytes`: events are refused before the disk is full, when they cannot become data files as fast as they
//! come, for instance because their storage is away.
//!
//! What counts is the size on disk, dead rows included: a snapshot that keeps them keeps the disk full. Room in pages that is
//! free again does not count, since new events go there. Measured once a second at most, for the whole server where it is
//! preloaded; what comes in between is subtracted.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use crate::catalog::{inbox, outbox};
use crate::pg::{Oid, PgError, Result, bgworker, disk, guc, relation, shared, xact};

/// A measurement is good for so long.
const FRESH_MS: i64 = 1_000;
/// The share of the disk's free space that the hot tier takes at most, by default.
const SHARE: f64 = 0.8;

/// How full the hot tier is, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub used: u64,
    pub limit: u64,
}

thread_local! {
    /// Without shared memory: bytes left, and when that was measured.
    static ALONE: Cell<(i64, i64)> = const { Cell::new((0, 0)) };
}

/// Takes so many bytes of events in; 53100 if there is no room for them.
pub fn take(bytes: i64) -> Result<()> {
    let slot = shared::get().and_then(|s| s.find_or_take(bgworker::my_database()));
    if let Some(slot) = slot {
        slot.note_known();
    }
    let (mut left, mut at_ms) = match slot {
        Some(slot) => (
            slot.room_bytes.load(Ordering::Relaxed),
            slot.room_at_ms.load(Ordering::Acquire),
        ),
        None => ALONE.get(),
    };
    let now_ms = xact::now_us() / 1000;
    if !(0..FRESH_MS).contains(&(now_ms - at_ms)) || left <= bytes {
        let room = measure()?;
        left = i64::try_from(room.limit.saturating_sub(room.used)).unwrap_or(i64::MAX);
        at_ms = now_ms;
        if let Some(slot) = slot {
            slot.room_bytes.store(left, Ordering::Relaxed);
            slot.room_at_ms.store(at_ms, Ordering::Release);
        }
    }
    if left <= bytes {
        return Err(PgError::new("53100", "the hot tier is full")
            .detail(
                "Events wait in Postgres until they are written to data files, up to rakam.max_hot_bytes. Nothing of \
                 this call was stored.",
            )
            .hint("Send again later. rakam.stat_lake says which storage cannot be reached, rakam.health() says more."));
    }
    match slot {
        Some(slot) => {
            slot.room_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        None => ALONE.set((left - bytes, at_ms)),
    }
    Ok(())
}

/// The outbox takes this share of the room at most: a broker that is away leaves the rest to those whose events stay here.
const OUTBOX_SHARE: u64 = 2;

thread_local! {
    /// Bytes that the outbox may still take, and when that was measured.
    static OUTBOX: Cell<(i64, i64)> = const { Cell::new((0, 0)) };
}

/// Takes so many bytes of events in that are on their way to an event store; 53100 if there is no room for them.
pub fn take_of_outbox(bytes: i64) -> Result<()> {
    let (mut left, mut at_ms) = OUTBOX.get();
    let now_ms = xact::now_us() / 1000;
    if !(0..FRESH_MS).contains(&(now_ms - at_ms)) || left <= bytes {
        let tables: Vec<_> = (0..3).map(outbox::table_oid).collect();
        let used = used(&tables, u64::MAX);
        let limit = match guc::max_hot_bytes() {
            Some(limit) => limit,
            None => ((disk::free_bytes()? + used) as f64 * SHARE) as u64,
        };
        let used = self::used(&tables, limit / OUTBOX_SHARE);
        left = i64::try_from((limit / OUTBOX_SHARE).saturating_sub(used)).unwrap_or(i64::MAX);
        at_ms = now_ms;
    }
    if left <= bytes {
        OUTBOX.set((left, at_ms));
        return Err(PgError::new("53100", "the outbox of the event stores is full")
            .detail(
                "Events wait in Postgres until the event store takes them, up to half of rakam.max_hot_bytes. Nothing of this \
                 call was stored.",
            )
            .hint("Send again later. rakam.health() says which event store cannot be reached."));
    }
    OUTBOX.set((left - bytes, at_ms));
    Ok(())
}

/// The bytes that tables take. Where that is as much as `limit`, without the room in their pages that is free again.
fn used(tables: &[Oid], limit: u64) -> u64 {
    let sum = |bytes: fn(Oid) -> u64| tables.iter().map(|table| bytes(*table)).sum::<u64>();
    match sum(relation::disk_bytes) {
        physical if physical >= limit => physical.saturating_sub(sum(relation::free_bytes)),
        physical => physical,
    }
}

/// Measures the hot tier and its limit.
pub fn measure() -> Result<Room> {
    let tables: Vec<_> = (0..3)
        .flat_map(|k| [inbox::table_oid(k), outbox::table_oid(k)])
        .chain(["inbox_parked", "hot_chunk"].map(|name| relation::oid("rakam_internal", name)))
        .collect();
    let physical = used(&tables, u64::MAX);
    let limit = match guc::max_hot_bytes() {
        Some(limit) => limit,
        None => ((disk::free_bytes()? + physical) as f64 * SHARE) as u64,
    };
    Ok(Room {
        used: used(&tables, limit),
        limit,
    })
}
