//! The directory in which blocks are kept: shared by all processes of the server without a lock, bounded, and never
//! in anybody's way.
//!
//! A block is written under a temporary name and renamed, so it is there as a whole or not at all; what a crash of the
//! machine leaves of it is told by its checksums. How full the directory is, is the length of the file `ledger`, to
//! which every process appends a byte for each [`LEDGER_UNIT`] that it stores: an atomic counter without a lock. It is
//! set right by every pass of the [`Eviction`]. Whatever fails here is a miss; what keeps blocks from being stored is
//! tried again after a while.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use siphasher::sip128::SipHasher13;
use uuid::Uuid;

use super::block::{self, Wanted};
use super::evict::{self, Eviction};
use super::{BLOCK_BYTES, ObjectKey};

/// Below the configured directory. What begins like this is left out of base backups and by pg_rewind.
const BLOCKS: &str = "pgsql_tmp.blocks.1";
pub(super) const LEDGER: &str = "ledger";
pub(super) const TEMPORARY: &str = "tmp";
const LOCK: &str = "lock";
/// Stored bytes that a byte of the ledger stands for.
pub(super) const LEDGER_UNIT: u64 = 64 << 10;
/// What is left of the file system for others, as a part of its size.
const RESERVE_SHARE: u64 = 20;
/// The free space of the file system is asked for after so many stored bytes.
const SPACE_CHECK_BYTES: u64 = 16 << 20;
/// A block read again within this time keeps its place in the order of eviction.
const TOUCH_AFTER: Duration = Duration::from_secs(60);
/// How long nothing is stored after a failure, and the least time between two evictions by one process.
const PAUSE: Duration = Duration::from_secs(30);
const EVICTION_PAUSE: Duration = Duration::from_secs(2);

/// A directory of blocks with a bound. Cheap to make: nothing is touched before the first block.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Made, and found to be nobody else's.
    ready: bool,
    stored_since_check: u64,
    not_before: Option<Instant>,
    evict_after: Option<Instant>,
    trouble: Option<String>,
    reported: bool,
}

/// How full a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// About.
    pub bytes: u64,
    pub limit: u64,
}

impl Directory {
    /// `directory` is the setting; `limit` the bytes that the blocks in it may take.
    pub fn new(directory: &Path, limit: u64) -> Self {
        Self {
            root: directory.join(BLOCKS),
            limit,
            state: Mutex::default(),
        }
    }

    /// The part of a block, at least the bytes `part` (offsets of the object), with the offset of the first; None: it
    /// is to be fetched. A block that is harmed is deleted.
    pub(super) fn read(
        &self,
        key: &ObjectKey,
        object_bytes: u64,
        number: u64,
        part: Range<u64>,
    ) -> Option<(u64, Bytes)> {
        let path = self.object(key).join(number.to_string());
        let file = File::open(&path).ok()?;
        let start = number * BLOCK_BYTES;
        let key = key.bytes();
        let wanted = wanted(&key, object_bytes, number);
        let within = (part.start - start) as usize..(part.end - start) as usize;
        match block::read(&file, &wanted, within) {
            Ok((offset, bytes)) => {
                touch(&file);
                Some((start + offset as u64, bytes))
            }
            Err(_) => {
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Keeps the bytes of a whole block, if there is room. Blocking.
    pub(super) fn store(&self, key: &ObjectKey, object_bytes: u64, number: u64, payload: &[u8]) {
        let now = Instant::now();
        if self.state().not_before.is_some_and(|until| now < until) {
            return;
        }
        let outcome = self
            .prepare()
            .and_then(|()| self.room(payload.len() as u64))
            .and_then(|room| match room {
                true => self.write(key, object_bytes, number, payload),
                false => Ok(()),
            });
        let mut state = self.state();
        match outcome {
            Ok(()) => state.not_before = None,
            // The object, or all of the directory, was removed in this moment.
            Err(e) if e.kind() == io::ErrorKind::NotFound => state.ready = false,
            Err(e) => {
                state.ready = false;
                state.not_before = Some(now + PAUSE);
                state.trouble = Some(e.to_string());
            }
        }
    }

    /// Forgets all blocks of an object.
    pub fn forget(&self, key: &ObjectKey) {
        let _ = fs::remove_dir_all(self.object(key));
    }

    /// What has kept blocks from being stored, once in the life of this value.
    pub fn trouble(&self) -> Option<String> {
        let mut state = self.state();
        let trouble = state.trouble.take().filter(|_| !state.reported);
        state.reported |= trouble.is_some();
        trouble
    }

    /// How full it is; an error: it cannot be used.
    pub fn usage(&self) -> io::Result<Usage> {
        let bytes = match fs::metadata(self.root.join(LEDGER)) {
            Ok(ledger) => ledger.len() * LEDGER_UNIT,
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(e),
        };
        Ok(Usage {
            bytes,
            limit: self.limit,
        })
    }

    /// Makes the directory where it is missing and proves that it can be written.
    pub fn prove(&self) -> io::Result<()> {
        self.prepare()?;
        let probe = self.temporary();
        File::create_new(&probe).and_then(|_| fs::remove_file(&probe))
    }

    /// A pass that makes room, if it is time for one; None: there is room, or another process makes it.
    pub fn eviction(&self) -> Option<Eviction> {
        let usage = self.usage().ok()?;
        let full = usage.bytes > evict::high_water(self.limit) || self.free_space().ok()? == 0;
        if full { self.begin_eviction() } else { None }
    }

    /// A pass over the directory whether it is full or not: it sets the ledger right and removes remains.
    pub fn inspection(&self) -> Option<Eviction> {
        self.begin_eviction()
    }

    fn begin_eviction(&self) -> Option<Eviction> {
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.root.join(LOCK))
            .ok()?;
        lock.try_lock().ok()?;
        Some(Eviction::new(self.root.clone(), self.limit, lock))
    }

    #[cfg(test)]
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    #[cfg(test)]
    pub(super) fn object_path(&self, key: &ObjectKey) -> PathBuf {
        self.object(key)
    }

    /// As if time had passed since the last eviction.
    #[cfg(test)]
    pub(super) fn forget_pause(&self) {
        self.state().evict_after = None;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory of an object's blocks, in one of 256: by a hash, since names of objects may be long.
    fn object(&self, key: &ObjectKey) -> PathBuf {
        let hash = SipHasher13::new().hash(&key.bytes()).as_u128();
        let name = format!("{hash:032x}");
        self.root.join(&name[..2]).join(&name[2..])
    }

    fn temporary(&self) -> PathBuf {
        self.root.join(TEMPORARY).join(Uuid::now_v7().to_string())
    }

    fn prepare(&self) -> io::Result<()> {
        if self.state().ready {
            return Ok(());
        }
        let temporary = self.root.join(TEMPORARY);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&temporary)?;
        let probe = self.temporary();
        let owner = create(&probe)?.metadata()?.uid();
        fs::remove_file(&probe)?;
        // Who else may write here could have blocks read that are none.
        let root = fs::metadata(&self.root)?;
        if root.uid() != owner || root.mode() & 0o077 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "others have access to the cache directory",
            ));
        }
        self.state().ready = true;
        Ok(())
    }

    /// Whether a block may be stored. Makes room where no worker has done so in time.
    fn room(&self, bytes: u64) -> io::Result<bool> {
        let check_space = {
            let mut state = self.state();
            state.stored_since_check += bytes;
            let due = state.stored_since_check >= SPACE_CHECK_BYTES || state.not_before.is_some();
            if due {
                state.stored_since_check = 0;
            }
            due
        };
        let fits = || -> io::Result<bool> {
            let usage = self.usage()?;
            Ok(usage.bytes + bytes <= usage.limit && !(check_space && self.free_space()? == 0))
        };
        if fits()? {
            return Ok(true);
        }
        let now = Instant::now();
        {
            let mut state = self.state();
            if state.evict_after.is_some_and(|after| now < after) {
                return Ok(false);
            }
            state.evict_after = Some(now + EVICTION_PAUSE);
        }
        let Some(mut eviction) = self.begin_eviction() else {
            return Ok(false);
        };
        while eviction.step(Duration::MAX) {}
        fits()
    }

    /// Bytes that the file system has for the cache, beside what is kept for others.
    fn free_space(&self) -> io::Result<u64> {
        free_space(&self.root)
    }

    fn write(
        &self,
        key: &ObjectKey,
        object_bytes: u64,
        number: u64,
        payload: &[u8],
    ) -> io::Result<()> {
        let object = self.object(key);
        let key = key.bytes();
        let header = block::header(&wanted(&key, object_bytes, number), payload);
        let temporary = self.temporary();
        let written = create(&temporary)
            .and_then(|mut file| {
                file.write_all(&header)?;
                file.write_all(payload)
            })
            .and_then(|()| {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&object)
            })
            .and_then(|()| fs::rename(&temporary, object.join(number.to_string())));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written?;
        let units = (header.len() + payload.len()) as u64;
        let mut ledger = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.root.join(LEDGER))?;
        ledger.write_all(&vec![0; units.div_ceil(LEDGER_UNIT) as usize])
    }
}

/// The space that is free and above the reserve of the file system that `path` is on.
pub(super) fn free_space(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    let (size, free) = (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize);
    Ok(free.saturating_sub(size / RESERVE_SHARE))
}

fn wanted<'a>(key: &'a [u8], object_bytes: u64, number: u64) -> Wanted<'a> {
    let start = number * BLOCK_BYTES;
    Wanted {
        key,
        object_bytes,
        number,
        payload_bytes: object_bytes.saturating_sub(start).min(BLOCK_BYTES) as usize,
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Notes that a block was of use. Its time of modification is the order of eviction: that of access is not kept by
/// every file system.
fn touch(file: &File) {
    let now = SystemTime::now();
    let old = file
        .metadata()
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > TOUCH_AFTER));
    if old {
        let _ = file.set_modified(now);
    }
}
