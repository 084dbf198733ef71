//! Heavyweight locks of our own, on tags that SQL users cannot take.
//!
//! `pg_advisory_lock` uses advisory tags with field4 1 or 2; ours start at 100, so no tenant can stop a worker.

use std::time::Duration;

use pgrx::pg_sys;

use super::error::Result;
use super::spi::{self, View, arg};

/// What a lock is on. The discriminant is the tag's field4: the compiler lets no two have the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum LockOn {
    /// The one resident worker of this database.
    Resident = 100,
    /// A project that a transaction is dropping. Taken before everything else and kept to its end; who works on projects in the
    /// background asks whether it [`is_free`] and passes the project over while it is not, so that nobody waits for that end.
    Project(i32) = PROJECT_TAG,
    /// Digest, seal and truncate of the inbox.
    Digest = 101,
    /// Chunk merge and flush of a collection exclude each other.
    CollectionJob(i32) = 102,
    /// Compaction of a collection: taken before [`LockOn::CollectionJob`], which it needs at its end only.
    Compaction(i32) = 108,
    /// The manifest of a collection: held only while a transaction writes it.
    Manifest(i32) = 103,
    /// Creation of columns and tables.
    Ddl = 104,
    /// Deletion of objects in a storage.
    Gc(i32) = 105,
    /// Writers of event ids: projects share [`ID_SLOTS`] of them.
    Ids(i32) = 120,
    /// Merging the runs of ids of a project.
    IdMerge(i32) = 121,
    /// The comparison of a storage with the manifest.
    Check(i32) = 107,
    /// The owner object of a storage: this database's sessions change it one after the other.
    Owner(i32) = 112,
    /// The description of a storage: it is written.
    Describe(i32) = 109,
    /// Which places are storages: changed by one transaction at a time.
    Storages = 116,
    /// Orphans of a storage: they are deleted, or files among them attached.
    Orphans(i32) = 114,
    /// Making the catalogue of a storage anew.
    Rebuild(i32) = 115,
    /// Reading of sources by a called tick, where there are no consumers.
    Consume = 111,
    /// The relay of the event stores.
    Relay = 110,
    /// A load of files, by a hash of its key: the same call runs once at a time.
    Load(i32) = 106,
}

/// How many locks the writers of event ids share: few enough that one transaction may take all of them.
pub const ID_SLOTS: i32 = 64;

/// The fourth field of [`LockOn::Project`]: `pg_locks` shows it as `objsubid`, and the project's id as `classid`.
pub const PROJECT_TAG: u16 = 113;

impl LockOn {
    fn tag(self) -> pg_sys::LOCKTAG {
        // SAFETY: the enum is `repr(u16)`: a value begins with its discriminant.
        let field4 = unsafe { *std::ptr::from_ref(&self).cast::<u16>() };
        let key = match self {
            Self::Project(id)
            | Self::CollectionJob(id)
            | Self::Manifest(id)
            | Self::Gc(id)
            | Self::Ids(id)
            | Self::IdMerge(id)
            | Self::Load(id)
            | Self::Check(id)
            | Self::Compaction(id)
            | Self::Describe(id)
            | Self::Owner(id)
            | Self::Orphans(id)
            | Self::Rebuild(id) => id,
            Self::Resident
            | Self::Digest
            | Self::Ddl
            | Self::Relay
            | Self::Consume
            | Self::Storages => 0,
        };
        pg_sys::LOCKTAG {
            // SAFETY: reads a backend variable.
            locktag_field1: u32::from(unsafe { pg_sys::MyDatabaseId }),
            locktag_field2: key as u32,
            locktag_field3: 0x7261_6b61,
            locktag_field4: field4,
            locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
            locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
        }
    }
}

/// The strengths in which relations are locked here, by Postgres' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    RowExclusive = pg_sys::RowExclusiveLock,
    Share = pg_sys::ShareLock,
    ShareRowExclusive = pg_sys::ShareRowExclusiveLock,
    AccessExclusive = pg_sys::AccessExclusiveLock,
}

/// Takes the exclusive lock to the end of the transaction, without waiting. False: somebody has it.
pub fn try_transaction(on: LockOn) -> bool {
    acquire(on, false, true)
}

/// Takes the exclusive lock to the end of the transaction, waiting for it (cancellable, deadlocks detected).
pub fn transaction(on: LockOn) {
    acquire(on, false, false);
}

/// An exclusive lock of the session, released on drop: it outlives the transactions inside.
pub struct SessionLock(LockOn);

impl SessionLock {
    /// None: somebody else has it.
    pub fn try_take(on: LockOn) -> Option<Self> {
        acquire(on, true, true).then(|| Self(on))
    }

    /// Waits for it (cancellable).
    pub fn take(on: LockOn) -> Self {
        acquire(on, true, false);
        Self(on)
    }
}

impl Drop for SessionLock {
    fn drop(&mut self) {
        let tag = self.0.tag();
        // SAFETY: releases the session lock taken by us; a lock that is gone already gives a warning only.
        unsafe {
            pg_sys::LockRelease(&tag, pg_sys::ExclusiveLock as i32, true);
        }
    }
}

/// Whether nobody has it at this moment (nor waits for it).
pub fn is_free(on: LockOn) -> bool {
    let tag = on.tag();
    // SAFETY: the tag is a plain value; what was taken is given back at once. Shared, so that those who ask do not meet.
    unsafe {
        let mode = pg_sys::ShareLock as i32;
        let taken = pg_sys::LockAcquire(&tag, mode, true, true);
        taken != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
            && pg_sys::LockRelease(&tag, mode, true)
    }
}

fn acquire(on: LockOn, session: bool, no_wait: bool) -> bool {
    let tag = on.tag();
    // SAFETY: the tag is a plain value that LockAcquire copies.
    let result =
        unsafe { pg_sys::LockAcquire(&tag, pg_sys::ExclusiveLock as i32, session, no_wait) };
    result != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
}

/// How long this session waits for a lock at most (`lock_timeout`); None: as long as it takes.
pub fn timeout() -> Option<Duration> {
    // SAFETY: reads a backend variable.
    let ms = unsafe { pg_sys::LockTimeout };
    u64::try_from(ms)
        .ok()
        .filter(|ms| *ms > 0)
        .map(Duration::from_millis)
}

/// Locks a relation to the end of the transaction, waiting for it.
pub fn relation(relation: pg_sys::Oid, mode: Mode) {
    // SAFETY: lock by oid.
    unsafe { pg_sys::LockRelationOid(relation, mode as i32) };
}

/// Locks a relation to the end of the transaction, without waiting.
pub fn try_relation(relation: pg_sys::Oid, mode: Mode) -> bool {
    // SAFETY: lock by oid; false when it would have to wait.
    unsafe { pg_sys::ConditionalLockRelationOid(relation, mode as i32) }
}

/// Whether this session has some lock on a relation.
pub fn held_here(relation: pg_sys::Oid) -> Result<bool> {
    let held = spi::first(
        View::Current,
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.locktype = 'relation' AND l.relation = $1
           AND l.pid = pg_catalog.pg_backend_pid() AND l.database =
             (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))",
        &[arg(relation)],
        |row| row.must(1),
    )?;
    Ok(held.unwrap_or(false))
}

/// Locks the extension's own catalog row in share mode, so that DROP EXTENSION and this transaction exclude
/// each other. Its oid; None: the extension is not there (any more).
pub fn extension() -> Option<pg_sys::Oid> {
    let oid = super::security::extension_oid()?;
    // SAFETY: lock by oid; waits for a DROP EXTENSION in progress.
    unsafe {
        pg_sys::LockDatabaseObject(
            pg_sys::ExtensionRelationId,
            oid,
            0,
            pg_sys::AccessShareLock as i32,
        );
    }
    (super::security::extension_oid() == Some(oid)).then_some(oid)
}
