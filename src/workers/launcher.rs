//! The launcher: knows which databases have the extension, and keeps a resident worker in each.
//!
//! It connects to no database: after a start of the server it lets a resident look into each once; a resident
//! that finds no extension says so in its slot and ends. CREATE EXTENSION takes the mark away and wakes the
//! launcher.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pgrx::{pg_guard, pg_sys};

use crate::pg::bgworker::{self, Worker};
use crate::pg::shared::{self, Shared, Slot};
use crate::pg::{PgError, notes, relation, wait, xact};

const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How soon a resident that ended by itself is started again: the wait doubles up to the maximum.
const RESTART_MIN_MS: i64 = 1_000;
const RESTART_MAX_MS: i64 = 600_000;
/// One that lived so long starts the count anew.
const HEALTHY_MS: i64 = 300_000;

pub fn init() {
    bgworker::register_static(&Worker {
        kind: "rakam launcher",
        name: "rakam launcher",
        function: "rakam_launcher_main",
        argument: pg_sys::Datum::from(0usize),
        extra: &[],
        notify: false,
        restart_s: Some(5),
    });
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_launcher_main(_argument: pg_sys::Datum) {
    bgworker::begin(None);
    let Some(shared) = shared::get() else {
        return;
    };
    shared.launcher.store(bgworker::my_pid(), Ordering::Release);
    loop {
        bgworker::reload_if_asked();
        look(shared);
        wait::wait(None, LOOK_INTERVAL);
    }
}

/// Starts what is missing.
fn look(shared: &Shared) {
    let databases = match xact::catch(databases) {
        Ok(databases) => databases,
        Err(error) => {
            xact::abort();
            error.log();
            return;
        }
    };
    shared.keep_only(&databases);
    notes::keep_only(&databases);
    let now_ms = xact::now_us() / 1000;
    for database in databases {
        let Some(slot) = shared.find_or_take(database) else {
            continue;
        };
        let idle = slot.pid.load(Ordering::Acquire) == 0;
        let wanted = !slot.absent.load(Ordering::Acquire);
        let not_before_ms = slot.not_before_ms.load(Ordering::Acquire);
        if !idle || !wanted || is_early(now_ms, not_before_ms) {
            continue;
        }
        back_off(slot, now_ms);
        start(database, slot);
    }
}

/// Whether a start is to wait. No wait is as long as one that a clock set back would make.
fn is_early(now_ms: i64, not_before_ms: i64) -> bool {
    (1..=RESTART_MAX_MS).contains(&(not_before_ms - now_ms))
}

/// Counts a start after the first, and says when the next may be.
fn back_off(slot: &Slot, now_ms: i64) {
    let since_us = slot.since_us.load(Ordering::Acquire);
    if since_us <= 0 {
        slot.not_before_ms
            .store(now_ms + RESTART_MIN_MS, Ordering::Release);
        return;
    }
    if now_ms - since_us / 1000 > HEALTHY_MS {
        slot.restarts.store(0, Ordering::Release);
    }
    let restarts = slot.restarts.fetch_add(1, Ordering::AcqRel).min(20);
    let wait_ms = (RESTART_MIN_MS << restarts).min(RESTART_MAX_MS);
    slot.not_before_ms
        .store(now_ms + wait_ms, Ordering::Release);
}

/// Starts a resident for a database; one that finds another there ends at once. Without a free worker slot it is
/// tried again at the next look; the log says so once.
pub fn start(database: pg_sys::Oid, slot: &Slot) {
    let started = bgworker::start_detached(&Worker {
        kind: "rakam resident",
        name: "rakam resident",
        function: "rakam_resident_main",
        argument: pg_sys::Datum::from(database),
        extra: &[],
        notify: false,
        restart_s: None,
    });
    match started {
        Ok(()) => {}
        Err(error) if !slot.starved.swap(true, Ordering::AcqRel) => {
            PgError {
                message: format!("{}: a database with rakam has no worker", error.message),
                ..error
            }
            .warn();
        }
        Err(_) => {}
    }
}

/// The databases that take connections. The launcher's own transaction: no extension is locked here.
fn databases() -> Vec<pg_sys::Oid> {
    xact::plain(relation::databases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_stops_no_worker() {
        let now_ms = 1_800_000_000_000;
        assert!(is_early(now_ms, now_ms + 1));
        assert!(is_early(now_ms, now_ms + RESTART_MAX_MS));
        assert!(!is_early(now_ms, now_ms));
        assert!(!is_early(now_ms, 0));
        assert!(!is_early(now_ms - 3_600_000, now_ms + RESTART_MIN_MS));
    }
}
