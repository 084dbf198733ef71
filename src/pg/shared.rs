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
pub const SLOTS: usize = 512;

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
    /// The database has the extension, or is about to; else nobody knows yet, or it has none.
    pub known: AtomicBool,
    /// The oid of a database without the extension; 0: none. If it is that of the slot, the launcher leaves the database alone and
    /// gives the slot up. Who says so late, of a slot that is another database's by then, is not believed.
    absent: AtomicU32,
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
    /// How often databases have got the extension, and (lower half) the oid of the last one.
    installed: AtomicU64,
    /// The oid of the database that has each slot; 0 for a free one. Apart, since it is looked for at each commit.
    databases: [AtomicU32; SLOTS],
    slots: [Slot; SLOTS],
}

/// What [`Shared::installed`] said at some time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Installed(pub u64);

impl Installed {
    /// The database that has got the extension since `before`; None: more than one has, or may have.
    pub fn only_since(self, before: Self) -> Option<pg_sys::Oid> {
        let count = |installed: Self| (installed.0 >> 32) as u32;
        (count(self) == count(before).wrapping_add(1)).then(|| pg_sys::Oid::from(self.0 as u32))
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            launcher: AtomicI32::new(0),
            engine_bytes: AtomicUsize::new(0),
            installed: AtomicU64::new(0),
            databases: std::array::from_fn(|_| AtomicU32::new(0)),
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
    /// Every place for a database, with its slot.
    fn places(&self) -> impl Iterator<Item = (&AtomicU32, &Slot)> {
        self.databases.iter().zip(&self.slots)
    }

    /// The slot of a database, if it has one.
    pub fn find(&self, database: pg_sys::Oid) -> Option<&Slot> {
        self.places()
            .find(|(oid, _)| oid.load(Ordering::Acquire) == u32::from(database))
            .map(|(_, slot)| slot)
    }

    /// The slot of a database, taken now if it has none. None: all are taken.
    pub fn find_or_take(&self, database: pg_sys::Oid) -> Option<&Slot> {
        self.find(database).or_else(|| {
            self.places()
                .find(|(oid, _)| {
                    oid.compare_exchange(0, database.into(), Ordering::AcqRel, Ordering::Acquire)
                        .is_ok()
                })
                .map(|(_, slot)| slot)
        })
    }

    /// Gives up the slots of databases that are gone.
    pub fn keep_only(&self, databases: &[pg_sys::Oid]) {
        for (place, slot) in self.places() {
            let oid = place.load(Ordering::Acquire);
            if oid != 0
                && slot.pid.load(Ordering::Acquire) == 0
                && !databases.iter().any(|d| u32::from(*d) == oid)
            {
                slot.reset();
                place.store(0, Ordering::Release);
            }
        }
    }

    /// Gives up the slots of databases without the extension, and tells which those are. The launcher only.
    pub fn give_up_absent(&self) -> Vec<pg_sys::Oid> {
        let mut absent = Vec::new();
        for (place, slot) in self.places() {
            let oid = place.load(Ordering::Acquire);
            if oid != 0 && slot.absent.load(Ordering::Acquire) == oid && slot.is_left() {
                absent.push(pg_sys::Oid::from(oid));
                slot.reset();
                place.store(0, Ordering::Release);
            }
        }
        absent
    }

    /// Says that a database has the extension now: the launcher starts a resident at its next look, if none runs.
    pub fn want(&self, database: pg_sys::Oid) {
        if let Some(slot) = self.find(database) {
            slot.not_before_ms.store(0, Ordering::Release);
            slot.known.store(true, Ordering::Release);
            slot.set_absent(pg_sys::InvalidOid);
            // It is expected no more: it is there.
            let _ = (slot.since_us).compare_exchange(-1, 0, Ordering::AcqRel, Ordering::Acquire);
        }
        // Last: the launcher may just have given the slot up, and is to look into the database again.
        let next = |installed: u64| {
            let count = (installed >> 32).wrapping_add(1);
            Some((count << 32) | u64::from(u32::from(database)))
        };
        let _ = (self.installed).fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// Changes whenever a database has got the extension.
    pub fn installed(&self) -> Installed {
        Installed(self.installed.load(Ordering::Acquire))
    }

    /// Whether every slot is a database's with the extension.
    pub fn is_full(&self) -> bool {
        self.places().all(|(place, slot)| {
            place.load(Ordering::Acquire) != 0 && slot.known.load(Ordering::Acquire)
        })
    }

    /// Every taken slot with its database.
    pub fn taken(&self) -> impl Iterator<Item = (pg_sys::Oid, &Slot)> {
        self.places().filter_map(|(place, slot)| {
            let oid = place.load(Ordering::Acquire);
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
        self.known.store(false, Ordering::Relaxed);
        self.absent.store(0, Ordering::Relaxed);
        self.starved.store(false, Ordering::Relaxed);
        self.since_us.store(0, Ordering::Relaxed);
        self.not_before_ms.store(0, Ordering::Relaxed);
        self.room_at_ms.store(0, Ordering::Relaxed);
        self.consumers_wanted.store(0, Ordering::Relaxed);
        self.consumer_restarts.store(0, Ordering::Relaxed);
    }

    /// Whether no process has its id here.
    fn is_left(&self) -> bool {
        let own = [
            &self.pid,
            &self.helper,
            &self.compactor,
            &self.carer,
            &self.relay,
        ];
        own.into_iter()
            .chain(self.consumers.iter().map(|consumer| &consumer.pid))
            .all(|pid| pid.load(Ordering::Acquire) == 0)
    }

    /// Notes that this database, whose slot it is, has no extension; InvalidOid: it has one, or may have.
    pub fn set_absent(&self, database: pg_sys::Oid) {
        self.absent.store(u32::from(database), Ordering::Release);
    }

    pub fn is_absent(&self, database: pg_sys::Oid) -> bool {
        self.absent.load(Ordering::Acquire) == u32::from(database)
    }

    /// Notes that the database has the extension.
    pub fn note_known(&self) {
        // Most often it is: sessions that collect do not write to what others read.
        if !self.known.load(Ordering::Relaxed) {
            self.known.store(true, Ordering::Release);
        }
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
