//! Memory that many processes share: a pool for DataFusion that draws on a common budget.
//!
//! A scan reserves memory for every chunk and every piece of a file. To go to the common budget each time would make
//! all processes write one cache line, so a pool takes slices of it and gives back what it does not need. Within the
//! process the accounting is exact to the byte. What a pool holds beyond its use is at most one slice, and nothing at
//! all when no query holds memory; and a pool that cannot have a whole slice asks for just what it needs, so that only
//! the unused parts of other processes' slices can ever be missing from the limit.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use datafusion_common::DataFusionError;
use datafusion_execution::memory_pool::{
    MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation,
};

use crate::error::EngineError;

/// What one process takes of the budget at a time, at most.
const SLICE_BYTES_MAX: usize = 16 << 20;
/// And at least, however small the limit is.
const SLICE_BYTES_MIN: usize = 64 << 10;
/// Slices that a limit is worth: so many processes can hold one before the unused parts are felt.
const SLICES: usize = 256;

/// Memory that several pools, also of several processes, draw on. Called from the engine's threads.
pub trait Budget: Send + Sync {
    /// Takes all of it, or nothing.
    fn try_take(&self, bytes: usize) -> bool;
    /// Gives back what was taken.
    fn give_back(&self, bytes: usize);
    /// Bytes there are in all; may change from call to call.
    fn limit(&self) -> usize;
}

/// The part of a [`Budget`] that one process uses.
pub struct BudgetPool {
    budget: Arc<dyn Budget>,
    held: Mutex<Held>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Held {
    /// Bytes that the reservations of this pool hold.
    used: usize,
    /// Bytes taken from the budget. Less than `used` only after a `grow`, which must not fail.
    taken: usize,
}

impl BudgetPool {
    pub fn new(budget: Arc<dyn Budget>) -> Self {
        Self {
            budget,
            held: Mutex::default(),
        }
    }

    /// Memory for something of a query that is not an operator of the engine; none of it yet.
    pub fn reserve(self: &Arc<Self>, name: &str) -> Reserved {
        let pool: Arc<dyn MemoryPool> = Arc::clone(self) as _;
        Reserved(MemoryConsumer::new(name).register(&pool))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slice_bytes(&self) -> usize {
        (self.budget.limit() / SLICES).clamp(SLICE_BYTES_MIN, SLICE_BYTES_MAX)
    }

    /// Takes at least `missing` bytes: whole slices, else exactly that.
    fn take(&self, missing: usize) -> Option<usize> {
        let slices = missing.checked_next_multiple_of(self.slice_bytes());
        [slices, Some(missing)]
            .into_iter()
            .flatten()
            .find(|&bytes| self.budget.try_take(bytes))
    }
}

impl MemoryPool for BudgetPool {
    fn name(&self) -> &str {
        "rakam"
    }

    /// For operators that cannot do without: the budget may be exceeded by it, and nothing else is handed out
    /// before that is made good.
    fn grow(&self, _reservation: &MemoryReservation, additional: usize) {
        let mut held = self.held();
        held.used += additional;
        let missing = held.used.saturating_sub(held.taken);
        if missing > 0
            && let Some(bytes) = self.take(missing)
        {
            held.taken += bytes;
        }
    }

    fn shrink(&self, _reservation: &MemoryReservation, shrink: usize) {
        let mut held = self.held();
        held.used = held.used.saturating_sub(shrink);
        let spare = held.taken.saturating_sub(held.used);
        let keep = if held.used == 0 {
            0
        } else {
            self.slice_bytes()
        };
        if spare > keep {
            self.budget.give_back(spare - keep);
            held.taken -= spare - keep;
        }
    }

    fn try_grow(
        &self,
        _reservation: &MemoryReservation,
        additional: usize,
    ) -> datafusion_common::Result<()> {
        let refused = || DataFusionError::from(EngineError::OutOfMemory);
        let mut held = self.held();
        let used = held.used.checked_add(additional).ok_or_else(refused)?;
        let missing = used.saturating_sub(held.taken);
        if missing > 0 {
            held.taken += self.take(missing).ok_or_else(refused)?;
        }
        held.used = used;
        Ok(())
    }

    fn reserved(&self) -> usize {
        self.held().used
    }

    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.budget.limit())
    }
}

impl fmt::Display for BudgetPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = *self.held();
        write!(
            f,
            "{}(used: {}, taken: {}, limit: {})",
            self.name(),
            held.used,
            held.taken,
            self.budget.limit()
        )
    }
}

impl fmt::Debug for BudgetPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Memory of a pool that is given back on drop.
pub struct Reserved(MemoryReservation);

impl Reserved {
    /// Holds so many bytes from now on. Error: [`EngineError::OutOfMemory`], and what was held is kept.
    pub fn resize(&mut self, bytes: usize) -> Result<(), EngineError> {
        Ok(self.0.try_resize(bytes)?)
    }
}

/// Memory of a pool for the requests to buckets.
#[derive(Debug)]
pub struct RequestMemory(MemoryReservation);

impl RequestMemory {
    pub fn new(pool: &Arc<BudgetPool>) -> Self {
        Self(pool.reserve("requests to storages").0)
    }
}

impl rakam_lake::cache::Memory for RequestMemory {
    fn try_take(&self, bytes: usize) -> bool {
        self.0.try_grow(bytes).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.shrink(bytes);
    }
}

#[cfg(test)]
mod tests;
