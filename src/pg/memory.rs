//! The memory that engines may use: with shared_preload_libraries one count for the whole server, else one for this
//! process.
//!
//! Reservations are made on the engine's threads, so nothing here calls the server: the count is an atomic in shared
//! memory, and `rakam.memory_limit` is read on the backend's own thread when a query starts. A process that ends gives
//! everything back; one that is killed makes the postmaster set shared memory up anew. Beside that, what the C library is
//! told about the memory of workers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rakam_engine::{Budget, BudgetPool};

use super::{exit, guc, shared};

/// What the engine of this process has taken of [`common`], or [`ENDED`].
static TAKEN: AtomicUsize = AtomicUsize::new(0);
/// In place of a count: this process has given everything back and takes nothing any more.
const ENDED: usize = usize::MAX;
/// The count of a process that stands alone.
static ALONE: AtomicUsize = AtomicUsize::new(0);
/// `rakam.memory_limit` as of the start of this process' last query.
static LIMIT: AtomicUsize = AtomicUsize::new(0);

/// The pool of this process' engine, from now on under the limit that is set now. Backend's own thread only.
pub fn pool() -> Arc<BudgetPool> {
    static POOL: OnceLock<Arc<BudgetPool>> = OnceLock::new();
    exit::on_exit(end);
    LIMIT.store(guc::memory_limit_bytes(), Ordering::Relaxed);
    Arc::clone(POOL.get_or_init(|| Arc::new(BudgetPool::new(Arc::new(EngineMemory)))))
}

/// Bytes that are taken: by all engines of the server, or by this process where it stands alone.
pub fn bytes_in_use() -> usize {
    common().load(Ordering::Relaxed)
}

/// The count that the limit is for.
fn common() -> &'static AtomicUsize {
    shared::get().map_or(&ALONE, |shared| &shared.engine_bytes)
}

/// Makes this process keep the memory that it frees: for a worker that turns batches over by the gigabyte and then ends.
/// Else the C library gives back what is freed, and the system clears each page anew, a fifth of the CPU of a load.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // The most that can be set: half of the region that a thread's memory comes from.
        const LARGEST: i32 = 32 << 20;
        for (option, value) in [
            (libc::M_MMAP_THRESHOLD, LARGEST),
            (libc::M_TRIM_THRESHOLD, i32::MAX),
            (libc::M_TOP_PAD, 2 * LARGEST),
        ] {
            // SAFETY: sets a number of the allocator, which takes its own lock.
            unsafe { libc::mallopt(option, value) };
        }
    }
}

struct EngineMemory;

impl Budget for EngineMemory {
    fn try_take(&self, bytes: usize) -> bool {
        let limit = LIMIT.load(Ordering::Relaxed);
        let add = |to: &AtomicUsize, most: usize| {
            to.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                taken.checked_add(bytes).filter(|&sum| sum <= most)
            })
            .is_ok()
        };
        if !add(common(), limit) {
            return false;
        }
        // Only now it is ours: `end` on the other thread must not give back what was not taken.
        let ours = add(&TAKEN, ENDED - 1);
        if !ours {
            common().fetch_sub(bytes, Ordering::Relaxed);
        }
        ours
    }

    fn give_back(&self, bytes: usize) {
        let ours = TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            (taken != ENDED).then(|| taken - bytes)
        });
        if ours.is_ok() {
            common().fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    fn limit(&self) -> usize {
        LIMIT.load(Ordering::Relaxed)
    }
}

/// At process exit. A thread that still runs finds that there is nothing to be had, and nothing to give back.
fn end() {
    let taken = TAKEN.swap(ENDED, Ordering::Relaxed);
    if taken != ENDED {
        common().fetch_sub(taken, Ordering::Relaxed);
    }
}
