//! What projects send, measured for their quotas: with shared_preload_libraries in one place for the whole server,
//! else by each process for itself.
//!
//! Atomics only: a collect never waits for another one. A project takes a place in the table with its first event
//! under a quota and keeps it until the server restarts, ids of projects being never used again.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};

use pgrx::{PGRXSharedMemory, PgAtomic, pg_guard, pg_shmem_init, pg_sys};

use super::error::Result;
use super::{bgworker, shared, undo, xact};

/// Projects with a quota that the server can measure in common. The others are measured by each process.
const PLACES: usize = 16_384;
/// How many places are looked at for a project.
const PROBES: usize = 64;
/// Events that may come at once, as time: the events of one second.
const BURST_NS: i128 = 1_000_000_000;
const DAY_US: i64 = 86_400_000_000;
/// How long a process that stands alone relies on what it has read of the stored bytes.
const ALONE_US: i64 = 1_000_000;
/// The stored bytes have not been read.
const UNKNOWN: i64 = -1;

/// What one project has sent.
#[derive(Default)]
pub struct Meter {
    /// Database and project; 0: free.
    owner: AtomicU64,
    /// When all events so far would have come at the allowed rate, ns since 1970.
    due_ns: AtomicI64,
    /// The UTC day of the bytes, since 1970.
    day: AtomicI32,
    /// Bytes of the day that are stored as usage, and those that are on their way there.
    stored: AtomicI64,
    pending: AtomicI64,
    /// When `stored` was read, where this is the meter of one process.
    read_at_us: AtomicI64,
}

pub struct Meters([Meter; PLACES]);

impl Default for Meters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Meter::default()))
    }
}

// SAFETY: atomics only, no pointers.
unsafe impl PGRXSharedMemory for Meters {}

// SAFETY: the name is used once.
static METERS: PgAtomic<Meters> = unsafe { PgAtomic::new(c"rakam_meters") };

thread_local! {
    static ALONE: RefCell<HashMap<i32, Rc<Meter>>> = RefCell::new(HashMap::new());
}

/// In the postmaster: asks for the memory.
pub fn init() {
    pg_shmem_init!(METERS);
}

/// The meter of a project: of the server, or of this process.
#[derive(Clone)]
pub enum Of {
    Server(&'static Meter),
    Process(Rc<Meter>),
}

impl std::ops::Deref for Of {
    type Target = Meter;

    fn deref(&self) -> &Meter {
        match self {
            Self::Server(meter) => meter,
            Self::Process(meter) => meter,
        }
    }
}

/// How bytes get into the stored usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Later, by the digest, which says so with [`digested`].
    Digest,
    /// With the commit of this transaction.
    Commit,
}

/// The meter of a project of this database.
pub fn of(project_id: i32) -> Of {
    if shared::preloaded()
        && let Some(meter) = place(&METERS.get().0, owner(project_id), true)
    {
        return Of::Server(meter);
    }
    ALONE.with_borrow_mut(|meters| Of::Process(Rc::clone(meters.entry(project_id).or_default())))
}

/// After a digest's commit: these bytes of the day are stored, and the day's sum is this.
pub fn digested(project_id: i32, day: i32, sum: i64, bytes: i64) {
    if shared::preloaded()
        && let Some(meter) = place(&METERS.get().0, owner(project_id), false)
        && meter.day.load(Ordering::Acquire) == day
    {
        meter.stored.store(sum, Ordering::Release);
        meter.pending.fetch_sub(bytes, Ordering::AcqRel);
    }
}

fn owner(project_id: i32) -> u64 {
    u64::from(u32::from(bgworker::my_database())) << 32 | u64::from(project_id as u32)
}

/// The place of an owner among these; a free one is taken for it, if it may be.
fn place(meters: &[Meter], owner: u64, take: bool) -> Option<&Meter> {
    let start = (owner.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize;
    for probe in 0..PROBES {
        let meter = &meters[(start + probe) % meters.len()];
        let found = match meter.owner.load(Ordering::Acquire) {
            0 if take => meter
                .owner
                .compare_exchange(0, owner, Ordering::AcqRel, Ordering::Acquire)
                .map_or_else(|found| found, |_| owner),
            found => found,
        };
        match found {
            0 => return None,
            found if found == owner => return Some(meter),
            _ => {}
        }
    }
    None
}

impl Of {
    /// Takes events in, if no more come than so many per second. What was taken is not given back by a rollback:
    /// the limit is for load.
    pub fn take_events(&self, events: i64, per_second: i64) -> bool {
        self.take_events_at(events, per_second, xact::now_us())
    }

    /// Takes in a batch that cannot be made smaller, if no more events came than so many per second: it may be of more than
    /// a second.
    pub fn take_batch(&self, events: i64, per_second: i64) -> bool {
        self.take_batch_at(events, per_second, xact::now_us())
    }

    /// Takes bytes in, if the day has room for them; a rollback gives them back. `stored` reads the bytes that are
    /// stored for the day.
    pub fn take_bytes(
        &self,
        bytes: i64,
        per_day: i64,
        arrival: Arrival,
        stored: impl FnOnce(i32) -> Result<i64>,
    ) -> Result<bool> {
        let now_us = xact::now_us();
        let day = today(now_us);
        self.begin_day(day);
        let is_old = matches!(self, Self::Process(_))
            && now_us - self.read_at_us.load(Ordering::Relaxed) > ALONE_US;
        let before = self.stored.load(Ordering::Acquire);
        if before == UNKNOWN || is_old {
            let sum = stored(day)?;
            self.stored.store(sum, Ordering::Release);
            self.read_at_us.store(now_us, Ordering::Relaxed);
            if is_old && before != UNKNOWN {
                // Of what others have stored some was on its way from here.
                let arrived = (sum - before).clamp(0, self.pending.load(Ordering::Acquire).max(0));
                self.pending.fetch_sub(arrived, Ordering::AcqRel);
            }
        }
        let pending = self.pending.fetch_add(bytes, Ordering::AcqRel) + bytes;
        if self.stored.load(Ordering::Acquire).saturating_add(pending) > per_day {
            self.pending.fetch_sub(bytes, Ordering::AcqRel);
            return Ok(false);
        }
        let meter = self.clone();
        undo::at_end(move |committed| {
            if meter.day.load(Ordering::Acquire) != day || committed && arrival == Arrival::Digest {
                return;
            }
            meter.pending.fetch_sub(bytes, Ordering::AcqRel);
            if committed && meter.stored.load(Ordering::Acquire) != UNKNOWN {
                meter.stored.fetch_add(bytes, Ordering::AcqRel);
            }
        });
        Ok(true)
    }
}

/// The UTC day of a moment, since 1970.
pub fn today(now_us: i64) -> i32 {
    now_us.div_euclid(DAY_US) as i32
}

impl Meter {
    fn take_events_at(&self, events: i64, per_second: i64, now_us: i64) -> bool {
        let within = |_owed: i128, next: i128| next <= BURST_NS;
        self.take(events, per_second, now_us, within)
    }

    fn take_batch_at(&self, events: i64, per_second: i64, now_us: i64) -> bool {
        self.take(events, per_second, now_us, |owed, _next| owed == 0)
    }

    /// Takes events in if `may` says so: of the time that is owed, and that would be then, in ns.
    fn take(
        &self,
        events: i64,
        per_second: i64,
        now_us: i64,
        may: impl Fn(i128, i128) -> bool,
    ) -> bool {
        if per_second <= 0 {
            return events == 0;
        }
        let now_ns = i128::from(now_us) * 1000;
        let cost_ns = i128::from(events) * 1_000_000_000 / i128::from(per_second);
        self.due_ns
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |due| {
                let owed = (i128::from(due) - now_ns).max(0);
                let next = i64::try_from(now_ns + owed + cost_ns).ok()?;
                may(owed, owed + cost_ns).then_some(next)
            })
            .is_ok()
    }

    /// The first call of a day begins it. Calls of the same moment may miss each other's bytes, once.
    fn begin_day(&self, day: i32) {
        let before = self.day.load(Ordering::Acquire);
        if before != day
            && self
                .day
                .compare_exchange(before, day, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        {
            self.pending.store(0, Ordering::Release);
            self.stored.store(UNKNOWN, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_events_may_come_at_once_and_no_more_than_the_rate_after_it() {
        let meter = Meter::default();
        let now = 1_700_000_000_000_000;
        assert!(meter.take_events_at(60, 100, now));
        assert!(
            !meter.take_events_at(41, 100, now),
            "101 events of a second"
        );
        assert!(meter.take_events_at(40, 100, now));
        assert!(!meter.take_events_at(1, 100, now));
        assert!(!meter.take_events_at(6, 100, now + 50_000));
        assert!(meter.take_events_at(5, 100, now + 50_000));
        // A pause saves up no more than a second.
        assert!(!meter.take_events_at(101, 100, now + 9_000_000));
        assert!(meter.take_events_at(100, 100, now + 9_000_000));
        assert!(!Meter::default().take_events_at(1, 0, now));
        assert!(Meter::default().take_events_at(i64::MAX, i64::MAX, now));
    }

    #[test]
    fn a_batch_is_taken_in_whole_once_nothing_is_owed() {
        let meter = Meter::default();
        let now = 1_700_000_000_000_000;
        assert!(meter.take_batch_at(250, 100, now));
        assert!(!meter.take_batch_at(1, 100, now + 2_400_000));
        assert!(!meter.take_events_at(100, 100, now + 2_400_000));
        assert!(meter.take_batch_at(1, 100, now + 2_500_000));
    }

    #[test]
    fn places_are_found_again() {
        let meters: Vec<Meter> = (0..128).map(|_| Meter::default()).collect();
        let at = |owner, take| place(&meters, owner, take).map(std::ptr::from_ref);
        assert_eq!(at(7, false), None);
        let (first, other) = (at(7, true), at(8, true));
        assert!(first.is_some() && other.is_some() && first != other);
        assert_eq!(at(7, false), first);
        assert_eq!(at(8, true), other);
    }

    #[test]
    fn ten_thousand_projects_have_a_place_each() {
        let meters: Vec<Meter> = (0..PLACES).map(|_| Meter::default()).collect();
        for project in 1..=10_000_u64 {
            assert!(
                place(&meters, 16_384 << 32 | project, true).is_some(),
                "{project}"
            );
        }
        let taken = meters
            .iter()
            .filter(|m| m.owner.load(Ordering::Relaxed) != 0);
        assert_eq!(taken.count(), 10_000);
    }
}
