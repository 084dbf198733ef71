//! The launcher: knows which databases have the extension, and keeps a resident worker in each.
//!
//! It connects to no database: after a start of the server it lets a resident look into each once, some at a time; a resident
//! that finds no extension says so in its slot and ends, and the slot is another database's. A CREATE EXTENSION that commits
//! says which database is to be looked into again.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pgrx::{pg_guard, pg_sys};

use super::resident::WAIT_FOR_EXTENSION;
use crate::pg::bgworker::{self, Worker};
use crate::pg::shared::{self, Installed, SLOTS, Shared, Slot};
use crate::pg::{PgError, notes, relation, wait, xact};

const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// The same while there are databases that nobody has looked into, and into how many a look has one looked.
const SOON: Duration = Duration::from_millis(500);
const PROBES: usize = 16;
/// The same while there is no free worker slot for that.
const STARVED: Duration = Duration::from_secs(2);
/// How soon a resident that ended by itself is started again: the wait doubles up to the maximum.
const RESTART_MIN_MS: i64 = 1_000;
const RESTART_MAX_MS: i64 = 600_000;
const EXTENSION_MS: i64 = WAIT_FOR_EXTENSION.as_millis() as i64;
/// One that lived so long starts the count anew.
const HEALTHY_MS: i64 = 300_000;

/// What the launcher remembers from look to look.
#[derive(Default)]
struct Memory {
    /// Databases without the extension: they have no slot.
    without: HashSet<pg_sys::Oid>,
    /// Up to which CREATE EXTENSION that is so.
    installed: Installed,
    /// The log says that there are more databases than slots.
    told: bool,
}

impl Memory {
    /// Databases may have got the extension.
    fn look_again(&mut self, installed: Installed) {
        if installed == self.installed {
            return;
        }
        match installed.only_since(self.installed) {
            Some(database) => {
                self.without.remove(&database);
            }
            None => self.without.clear(),
        }
        self.installed = installed;
    }
}

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
    let mut memory = Memory::default();
    loop {
        bgworker::reload_if_asked();
        let pause = look(shared, &mut memory);
        wait::wait(None, pause);
    }
}

/// Starts what is missing; when to look again.
fn look(shared: &Shared, memory: &mut Memory) -> Duration {
    // Before the slots: one that is given up now may just have been wanted again.
    memory.look_again(shared.installed());
    let databases = match xact::catch(databases) {
        Ok(databases) => databases,
        Err(error) => {
            xact::abort();
            error.log();
            return LOOK_INTERVAL;
        }
    };
    shared.keep_only(&databases);
    notes::keep_only(&databases);
    memory.without.extend(shared.give_up_absent());
    memory
        .without
        .retain(|database| databases.contains(database));
    let now_ms = xact::now_us() / 1000;
    // Those that need a worker come first.
    let mut others = Vec::new();
    for database in databases {
        match shared.find(database) {
            Some(slot) if slot.known.load(Ordering::Acquire) => {
                start_if_due(database, slot, now_ms);
            }
            None if memory.without.contains(&database) => {}
            _ => others.push(database),
        }
    }
    let mut probes = 0;
    for database in others {
        if probes == PROBES {
            return SOON;
        }
        let Some(slot) = shared.find_or_take(database) else {
            return no_slot(shared, memory);
        };
        match start_if_due(database, slot, now_ms) {
            None => {}
            Some(true) => probes += 1,
            // No free worker slot. Those that have got one are soon through.
            Some(false) if probes > 0 => return SOON,
            Some(false) => return STARVED,
        }
    }
    LOOK_INTERVAL
}

/// Every slot is taken: soon some are given up, unless all are of databases with rakam.
fn no_slot(shared: &Shared, memory: &mut Memory) -> Duration {
    if !shared.is_full() {
        return SOON;
    }
    if !std::mem::replace(&mut memory.told, true) {
        PgError::new(
            "53000",
            format!("{SLOTS} databases have rakam: in further ones it has no worker"),
        )
        .hint("Call rakam.tick() there now and then.")
        .warn();
    }
    LOOK_INTERVAL
}

/// Starts a resident where none runs and one may be started; whether that succeeded. None: nothing was to be done.
fn start_if_due(database: pg_sys::Oid, slot: &Slot, now_ms: i64) -> Option<bool> {
    let idle = slot.pid.load(Ordering::Acquire) == 0;
    let wanted = !slot.is_absent(database);
    let not_before_ms = slot.not_before_ms.load(Ordering::Acquire);
    if !idle || !wanted || is_early(now_ms, not_before_ms) {
        return None;
    }
    back_off(slot, now_ms);
    Some(start(database, slot))
}

/// Whether a start is to wait. No wait is as long as one that a clock set back would make.
fn is_early(now_ms: i64, not_before_ms: i64) -> bool {
    (1..=RESTART_MAX_MS).contains(&(not_before_ms - now_ms))
}

/// Counts a start after the first, and says when the next may be.
pub fn back_off(slot: &Slot, now_ms: i64) {
    let since_us = slot.since_us.load(Ordering::Acquire);
    if since_us <= 0 {
        let wait_ms = match since_us {
            0 => RESTART_MIN_MS,
            // One waits for a CREATE EXTENSION to commit.
            _ => EXTENSION_MS,
        };
        slot.not_before_ms
            .store(now_ms + wait_ms, Ordering::Release);
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

/// Starts a resident for a database; one that finds another there ends at once. Without a free worker slot (false) it is
/// tried again at the next look; the log says so once, of a database that has the extension.
pub fn start(database: pg_sys::Oid, slot: &Slot) -> bool {
    let started = bgworker::start_detached(&Worker {
        kind: "rakam resident",
        name: "rakam resident",
        function: "rakam_resident_main",
        argument: pg_sys::Datum::from(database),
        extra: &[],
        notify: false,
        restart_s: None,
    });
    let Err(error) = started else { return true };
    if slot.known.load(Ordering::Acquire) && !slot.starved.swap(true, Ordering::AcqRel) {
        PgError {
            message: format!("{}: a database with rakam has no worker", error.message),
            ..error
        }
        .warn();
    }
    false
}

/// The databases that take connections. The launcher's own transaction: no extension is locked here.
fn databases() -> Vec<pg_sys::Oid> {
    xact::plain(relation::databases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_gets_the_extension_is_looked_into_again() {
        let oid = |n: u32| pg_sys::Oid::from(n);
        let mut memory = Memory::default();
        memory.without.extend([1, 2, 3].map(oid));
        let installed = |count: u64, n: u64| Installed((count << 32) | n);
        memory.look_again(installed(0, 0));
        assert_eq!(memory.without.len(), 3);
        memory.look_again(installed(1, 2));
        assert_eq!(memory.without, HashSet::from([1, 3].map(oid)));
        memory.look_again(installed(1, 2));
        assert_eq!(memory.without.len(), 2);
        // Two at once: the first of them may be any.
        memory.look_again(installed(3, 3));
        assert!(memory.without.is_empty());
    }

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
