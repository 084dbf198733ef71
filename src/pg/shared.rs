//! Shared memory (with shared_preload_libraries only): one slot per database that has a resident worker, and the count
//! of the engines' memory.
//!
//! Atomics only, no locks: a reader sees each value as of some moment, which is all that waking, showing and bounding
//! need. Correctness never depends on it.

use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};

use pgrx::{PGRXSharedMemory, PgAtomic, pg_guard, pg_shmem_init, pg_sys};

/// Databases that can have a resident worker at a time.
const SLOTS: usize = 128;

/// What a resident worker can be doing; [`Slot::state`] is an index into it.
pub const STATES: [&str; 10] = [
    "idle", "digest", "merge", "flush", "ddl", "gc", "rewrite", "erase", "compact", "restore",
];

/// Consumers that a database can have at a time.
pub const CONSUMERS: usize = 16;

/// A worker that reads sources.
#[derive(Default)]
pub struct Consumer {
    /// 0: nobody.
    pub pid: AtomicI32,
    /// When its threads were seen to run, microseconds since 1970: a process that is stopped has no beat.
    pub beat_us: AtomicI64,
    pub since_us: AtomicI64,
    /// How many splits it reads.
    pub splits: AtomicU32,
}

/// One database's part.
#[derive(Default)]
pub struct Slot {
    /// The database's oid; 0 for a free slot.
    database: AtomicU32,
    /// The resident worker's process id; 0 while there is none.
    pub pid: AtomicI32,
    /// The process id of the resident's helper; 0 while there is none.
    pub helper: AtomicI32,
    /// The process id of the helper that compacts; 0 while there is none.
    pub compactor: AtomicI32,
    /// The process id of the helper that sees after the storages; 0 while there is none.
    pub carer: AtomicI32,
    /// The process id of the relay; 0 while there is none.
    pub relay: AtomicI32,
    /// Events for event stores were committed since the relay last looked.
    pub outgoing: AtomicBool,
    /// Events committed since the worker last looked.
    pub waiting: AtomicU64,
    /// Another process has registered collections or fields: tables or columns are to be made.
    pub schema_changed: AtomicBool,
    /// When the resident started, microseconds since 1970.
    pub since_us: AtomicI64,
    /// How often it was started again after it ended by itself.
    pub restarts: AtomicU32,
    pub state: AtomicU32,
    /// The database has no extension (any more): the launcher leaves it alone.
    pub absent: AtomicBool,
    /// Its worker could not be started for want of a worker slot.
    pub starved: AtomicBool,
    /// Milliseconds since 1970 before which the launcher does not start it again.
    pub not_before_ms: AtomicI64,
    /// Bytes that the hot tier may still take, and when that was measured, milliseconds since 1970: see `ingest::room`.
    pub room_bytes: AtomicI64,
    pub room_at_ms: AtomicI64,
    pub consumers: [Consumer; CONSUMERS],
    /// How many consumers there should be.
    pub consumers_wanted: AtomicU32,
    /// How often consumers ended by themselves and were started again.
    pub consumer_restarts: AtomicU32,
    /// Counts the transactions that changed which sources are read, or where.
    pub sources_changed: AtomicU64,
}

pub struct Shared {
    /// The launcher's process id.
    pub launcher: AtomicI32,
    /// Bytes that the engines of all processes have taken: see `pg::memory`.
    pub engine_bytes: AtomicUsize,
    slots: [Slot; SLOTS],
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            launcher: AtomicI32::new(0),
            engine_bytes: AtomicUsize::new(0),
            slots: std::array::from_fn(|_| Slot::default()),
        }
    }
}

// SAFETY: atomics only, no pointers.
unsafe impl PGRXSharedMemory for Shared {}

// SAFETY: the name is used once.
static SHARED: PgAtomic<Shared> = unsafe { PgAtomic::new(c"rakam") };

/// In the postmaster: asks for the memory.
pub fn init() {
    pg_shmem_init!(SHARED);
}

/// Whether the library is being loaded by shared_preload_libraries right now.
pub fn loading_in_postmaster() -> bool {
    // SAFETY: reads a backend variable.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Whether the library was loaded by shared_preload_libraries.
pub fn preloaded() -> bool {
    PRELOADED.load(Ordering::Relaxed)
}

static PRELOADED: AtomicBool = AtomicBool::new(false);

/// Said once, in the postmaster; children inherit it.
pub fn set_preloaded() {
    PRELOADED.store(true, Ordering::Relaxed);
}

/// The shared part, if there is any.
pub fn get() -> Option<&'static Shared> {
    preloaded().then(|| SHARED.get())
}

impl Shared {
    /// The slot of a database, if it has one.
    pub fn find(&self, database: pg_sys::Oid) -> Option<&Slot> {
        self.slots
            .iter()
            .find(|slot| slot.database.load(Ordering::Acquire) == u32::from(database))
    }

    /// The slot of a database, taken now if it has none. None: all are taken.
    pub fn find_or_take(&self, database: pg_sys::Oid) -> Option<&Slot> {
        self.find(database).or_else(|| {
            self.slots.iter().find(|slot| {
                slot.database
                    .compare_exchange(0, u32::from(database), Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
            })
        })
    }

    /// Gives up the slots of databases that are gone.
    pub fn keep_only(&self, databases: &[pg_sys::Oid]) {
        for slot in &self.slots {
            let oid = slot.database.load(Ordering::Acquire);
            if oid != 0
                && slot.pid.load(Ordering::Acquire) == 0
                && !databases.iter().any(|d| u32::from(*d) == oid)
            {
                slot.reset();
                slot.database.store(0, Ordering::Release);
            }
        }
    }

    /// Every taken slot with its database.
    pub fn taken(&self) -> impl Iterator<Item = (pg_sys::Oid, &Slot)> {
        self.slots.iter().filter_map(|slot| {
            let oid = slot.database.load(Ordering::Acquire);
            (oid != 0).then(|| (pg_sys::Oid::from(oid), slot))
        })
    }
}

impl Slot {
    fn reset(&self) {
        self.waiting.store(0, Ordering::Relaxed);
        self.schema_changed.store(false, Ordering::Relaxed);
        self.outgoing.store(false, Ordering::Relaxed);
        self.restarts.store(0, Ordering::Relaxed);
        self.state.store(0, Ordering::Relaxed);
        self.absent.store(false, Ordering::Relaxed);
        self.starved.store(false, Ordering::Relaxed);
        self.since_us.store(0, Ordering::Relaxed);
        self.not_before_ms.store(0, Ordering::Relaxed);
        self.room_at_ms.store(0, Ordering::Relaxed);
        self.consumers_wanted.store(0, Ordering::Relaxed);
        self.consumer_restarts.store(0, Ordering::Relaxed);
    }

    /// Sets the latch of the slot's worker, if one runs.
    pub fn wake(&self) {
        wake(&self.pid);
    }
}

impl Consumer {
    /// Sets its latch, if it runs.
    pub fn wake(&self) {
        wake(&self.pid);
    }
}

fn wake(pid: &AtomicI32) {
    let pid = pid.load(Ordering::Acquire);
    if pid != 0 {
        super::wait::set_latch_of(pid);
    }
}
