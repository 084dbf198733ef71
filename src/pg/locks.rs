//! Heavyweight locks of our own, on tags that SQL users cannot take.
//!
//! `pg_advisory_lock` uses advisory tags with field4 1 or 2; ours start at 100, so no tenant can stop a worker.

use std::time::Duration;

use pgrx::pg_sys;

/// What a lock is on. The discriminant is the tag's field4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockOn {
    /// The one resident worker of this database.
    Resident,
    /// Digest, seal and truncate of the inbox.
    Digest,
    /// Chunk merge and flush of a collection exclude each other.
    CollectionJob(i32),
    /// Compaction of a collection: taken before [`LockOn::CollectionJob`], which it needs at its end only.
    Compaction(i32),
    /// The manifest of a collection: held only while a transaction writes it.
    Manifest(i32),
    /// Creation of columns and tables.
    Ddl,
    /// Deletion of objects in a storage.
    Gc(i32),
    /// Writers of event ids: projects share [`ID_SLOTS`] of them.
    Ids(i32),
    /// Merging the runs of ids of a project.
    IdMerge(i32),
    /// The comparison of a storage with the manifest.
    Check(i32),
    /// The owner object of a storage: this database's sessions change it one after the other.
    Owner(i32),
    /// The description of a storage: it is written.
    Describe(i32),
    /// Making the catalogue of a storage anew.
    Rebuild(i32),
    /// Reading of sources by a called tick, where there are no consumers.
    Consume,
    /// The relay of the event stores.
    Relay,
    /// A load of files, by a hash of its key: the same call runs once at a time.
    Load(i32),
}

/// How many locks the writers of event ids share: few enough that one transaction may take all of them.
pub const ID_SLOTS: i32 = 64;

impl LockOn {
    fn tag(self) -> pg_sys::LOCKTAG {
        let (field4, key) = match self {
            Self::Resident => (100, 0),
            Self::Digest => (101, 0),
            Self::CollectionJob(id) => (102, id),
            Self::Manifest(id) => (103, id),
            Self::Ddl => (104, 0),
            Self::Gc(storage_id) => (105, storage_id),
            Self::Ids(slot) => (120, slot),
            Self::IdMerge(project_id) => (121, project_id),
            Self::Load(key) => (106, key),
            Self::Relay => (110, 0),
            Self::Check(storage_id) => (107, storage_id),
            Self::Compaction(id) => (108, id),
            Self::Describe(storage_id) => (109, storage_id),
            Self::Consume => (111, 0),
            Self::Owner(storage_id) => (112, storage_id),
            Self::Rebuild(storage_id) => (113, storage_id),
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

/// Locks the extension's own catalog row in share mode, so that DROP EXTENSION and this transaction exclude
/// each other. False: the extension is not there (any more).
pub fn extension() -> bool {
    let Some(oid) = super::security::extension_oid() else {
        return false;
    };
    // SAFETY: lock by oid; waits for a DROP EXTENSION in progress.
    unsafe {
        pg_sys::LockDatabaseObject(
            pg_sys::ExtensionRelationId,
            oid,
            0,
            pg_sys::AccessShareLock as i32,
        );
    }
    super::security::extension_oid() == Some(oid)
}
