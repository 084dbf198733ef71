//! Snapshots: the executor's own, a latest one, and their `pg_snapshot` form.

use pgrx::pg_sys;
use serde::{Deserialize, Serialize};

use super::error::{PgError, Result};
use super::spi::{self, View};

/// A snapshot that stays valid while its owner (an executor state, or a [`Registered`]) lives.
#[derive(Clone, Copy)]
pub struct Snapshot(pg_sys::Snapshot);

impl Snapshot {
    /// # Safety
    /// `ptr` must stay registered or active for as long as the value is used.
    pub unsafe fn from_ptr(ptr: pg_sys::Snapshot) -> Self {
        Self(ptr)
    }

    /// The active snapshot of the running statement; an error where there is none.
    pub fn active() -> Self {
        Self(active())
    }

    pub fn as_ptr(self) -> pg_sys::Snapshot {
        self.0
    }

    /// Whether it was taken while this server was a standby.
    pub fn is_of_recovery(self) -> bool {
        // SAFETY: valid, as whoever made the value has promised.
        unsafe { (*self.0).takenDuringRecovery }
    }
}

fn active() -> pg_sys::Snapshot {
    // SAFETY: asked first, because GetActiveSnapshot follows a null pointer where there is none.
    unsafe {
        if !pg_sys::ActiveSnapshotSet() {
            PgError::internal("no snapshot is active").raise();
        }
        pg_sys::GetActiveSnapshot()
    }
}

/// A snapshot that is registered with the current resource owner and released on drop.
pub struct Registered(pg_sys::Snapshot);

impl Registered {
    /// What is committed now, whatever the transaction's isolation level.
    pub fn latest() -> Self {
        // SAFETY: registered at once, so it outlives the call; released in Drop or by the resource owner.
        Self(unsafe { pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()) })
    }

    /// The transaction's snapshot for a new statement.
    pub fn transaction() -> Self {
        // SAFETY: as above.
        Self(unsafe { pg_sys::RegisterSnapshot(pg_sys::GetTransactionSnapshot()) })
    }

    /// The current statement's snapshot, kept beyond it.
    pub fn active() -> Self {
        // SAFETY: as above.
        Self(unsafe { pg_sys::RegisterSnapshot(active()) })
    }

    pub fn get(&self) -> Snapshot {
        Snapshot(self.0)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: registered by us with the owner that is still current.
            unsafe { pg_sys::UnregisterSnapshot(self.0) };
        }
    }
}

/// A `pg_snapshot` as values: everything below `xmax` is finished, except `xip`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct XidSnapshot {
    pub xmin: u64,
    pub xmax: u64,
    /// In progress when it was taken; ascending.
    pub xip: Vec<u64>,
}

impl XidSnapshot {
    /// The view's snapshot; of [`View::Current`] the one that a statement gets.
    pub fn of(view: View) -> Result<Self> {
        let text: String = spi::first(
            view,
            "SELECT pg_catalog.pg_current_snapshot()::text",
            &[],
            |row| row.must(1),
        )?
        .unwrap_or_default();
        Self::parse(&text).ok_or_else(|| PgError::internal("the current snapshot is malformed"))
    }

    /// Reads the text form `xmin:xmax:xip,…`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let xmin = parts.next()?.parse().ok()?;
        let xmax = parts.next()?.parse().ok()?;
        let list = parts.next()?;
        let xip = if list.is_empty() {
            Vec::new()
        } else {
            list.split(',')
                .map(|x| x.parse().ok())
                .collect::<Option<_>>()?
        };
        Some(Self { xmin, xmax, xip })
    }

    /// The same snapshot cut at `xmax`: valid because every id below is either finished or in `xip`.
    pub fn cut(&self, xmax: u64) -> Self {
        let xmax = xmax.min(self.xmax);
        let xip: Vec<u64> = self.xip.iter().copied().filter(|&x| x < xmax).collect();
        Self {
            xmin: xip.first().copied().unwrap_or(xmax),
            xmax,
            xip,
        }
    }

    /// Whether every transaction that is finished in the other one is finished in this one.
    pub fn covers(&self, other: &Self) -> bool {
        self.xmax >= other.xmax
            && self
                .xip
                .iter()
                .all(|x| *x >= other.xmax || other.xip.contains(x))
    }
}

impl std::fmt::Display for XidSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (i, x) in self.xip.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{x}")?;
        }
        Ok(())
    }
}
