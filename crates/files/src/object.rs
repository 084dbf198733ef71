//! Files in a bucket: listed, and read as the readers of files want them.
//!
//! The readers are plain code that waits for its bytes, so they run on threads for blocking work ([`blocking`]), and wait
//! there for requests that the engine's own threads make. Each reader has a window of its file in memory and the next one
//! on its way. Somebody else may replace a file at any time: one that is not what it was when it was listed is an error.

use std::fmt;
use std::future::Future;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::path::Path;
use rakam_lake::LakeError;
use rakam_lake::cache::{BLOCK_BYTES, CachedStore, Counters, Directory, Fetcher};
use rakam_lake::storage::{ObjectInfo, Storage};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::error::FilesError;
use crate::parquet_object::GROUP_BYTES;

/// Threads that may wait at a time. The runtime needs some more for blocking work: what they wait for may need one.
pub const WAITING_THREADS: usize = 16;
/// The first window of a reader, and the largest: who wants a few rows does not fetch everything.
const WINDOW_BYTES: u64 = BLOCK_BYTES;
const WINDOW_BYTES_MAX: u64 = 4 * BLOCK_BYTES;

/// What a reader has in memory of its file, at most: windows and those that are coming.
pub const READER_BYTES: usize = 3 * GROUP_BYTES as usize;

static WAITING: Semaphore = Semaphore::const_new(WAITING_THREADS);

/// Does work that may wait for files on a thread for it.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FilesError> {
    // The semaphore is never closed.
    let turn = WAITING.acquire().await.ok();
    let done = spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    done.await
        .map_err(|_| FilesError::Arrow("the reading of a file was interrupted".to_owned()))
}

/// Tells readers to end, wherever they wait. The last of its clones need not do anything.
#[derive(Debug, Clone)]
pub struct Stop(watch::Sender<bool>);

impl Stop {
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    pub fn stop(&self) {
        self.0.send_replace(true);
    }

    pub fn is_stopped(&self) -> bool {
        *self.0.borrow()
    }

    async fn stopped(&self) {
        let mut seen = self.0.subscribe();
        // The sender is here: it does not end.
        let _ = seen.wait_for(|is_stopped| *is_stopped).await;
    }

    /// The answer, or that nobody waits for it any more.
    pub async fn or<T>(
        &self,
        answer: impl Future<Output = Result<T, FilesError>>,
    ) -> Result<T, FilesError> {
        tokio::select! {
            biased;
            () = self.stopped() => Err(FilesError::Cancelled),
            answer = answer => answer,
        }
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self::new()
    }
}

/// How the objects of a bucket are fetched.
#[derive(Clone)]
pub struct Fetching {
    /// The storage's name among those whose blocks are kept in one directory.
    pub key: String,
    pub fetcher: Arc<Fetcher>,
    /// Where blocks are kept; None: they are not.
    pub directory: Option<Arc<Directory>>,
    pub counters: Arc<Counters>,
}

/// The objects below a folder of a storage. Cloning shares them.
#[derive(Clone)]
pub struct Objects(Arc<Shared>);

struct Shared {
    storage: Storage,
    store: Arc<dyn ObjectStore>,
    /// Without slashes at its ends; empty for the whole storage.
    folder: String,
    fetching: Fetching,
    stop: Stop,
}

impl Objects {
    /// Touches nothing.
    pub fn new(
        storage: Storage,
        folder: &str,
        fetching: Fetching,
        stop: &Stop,
    ) -> Result<Self, FilesError> {
        let store = storage
            .object_store()
            .map_err(|e| FilesError::of_store("open", folder, &e))?;
        Ok(Self(Arc::new(Shared {
            storage,
            store,
            folder: folder.to_owned(),
            fetching,
            stop: stop.clone(),
        })))
    }

    fn path(&self, name: &str) -> String {
        match self.0.folder.as_str() {
            "" => name.to_owned(),
            folder => format!("{folder}/{name}"),
        }
    }

    fn found(&self, name: String, info: ObjectInfo) -> Object {
        Object {
            objects: self.clone(),
            name,
            info,
        }
    }

    /// The object of this name; None if there is none.
    pub(crate) async fn get(&self, name: &str) -> Result<Option<Object>, FilesError> {
        let head = async {
            match self.0.storage.head(&self.path(name)).await {
                Ok(info) => Ok(Some(self.found(name.to_owned(), info))),
                // What no object can be called is a pattern, or nothing.
                Err(LakeError::Missing { .. } | LakeError::InvalidPath { .. }) => Ok(None),
                Err(error) => Err(FilesError::of_store("open", name, &error)),
            }
        };
        self.0.stop.or(head).await
    }

    /// That the storage is there, where nothing was found in it.
    pub(crate) async fn check(&self) -> Result<(), FilesError> {
        let check = async {
            let checked = self.0.storage.check().await;
            checked.map_err(|e| FilesError::of_store("list", "", &e))
        };
        self.0.stop.or(check).await
    }

    /// Asks `take` about each object below a folder (empty: all), by its name; it is given those that it wants.
    pub(crate) async fn list(
        &self,
        folder: &str,
        mut take: impl FnMut(&str, u64) -> Result<bool, FilesError>,
    ) -> Result<Vec<Object>, FilesError> {
        let below = if folder.is_empty() {
            self.0.folder.clone()
        } else {
            self.path(folder)
        };
        let list = async {
            let failed = |e: LakeError| FilesError::of_store("list", folder, &e);
            let mut listed = self.0.storage.list(&below);
            let mut found = Vec::new();
            while let Some(info) = listed.try_next().await.map_err(failed)? {
                let name = match self.0.folder.as_str() {
                    "" => Some(info.path.as_str()),
                    own => info
                        .path
                        .strip_prefix(own)
                        .and_then(|p| p.strip_prefix('/')),
                };
                if let Some(name) = name
                    && take(name, info.bytes)?
                {
                    let name = name.to_owned();
                    found.push(self.found(name, info));
                }
            }
            Ok(found)
        };
        self.0.stop.or(list).await
    }
}

/// An object as it was found.
#[derive(Clone)]
pub struct Object {
    objects: Objects,
    pub(crate) name: String,
    pub(crate) info: ObjectInfo,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Object").field(&self.info).finish()
    }
}

impl Object {
    /// Opens it for reading; touches nothing.
    pub(crate) fn open(&self) -> Result<Opened, FilesError> {
        let Shared {
            store,
            fetching,
            stop,
            ..
        } = &*self.objects.0;
        let store = CachedStore::pinned(
            Arc::clone(store),
            &fetching.key,
            self.info.clone(),
            Arc::clone(&fetching.fetcher),
            fetching.directory.clone(),
            Arc::clone(&fetching.counters),
        );
        let location = Path::parse(&self.info.path).map_err(|_| FilesError::Path {
            path: self.name.clone(),
            reason: "it is not the name of an object",
        })?;
        Ok(Opened {
            store: Arc::new(store),
            location,
            name: self.name.clone(),
            bytes: self.info.bytes,
            stop: stop.clone(),
        })
    }
}

/// An object that is being read.
#[derive(Clone)]
pub(crate) struct Opened {
    store: Arc<CachedStore>,
    location: Path,
    name: String,
    pub bytes: u64,
    stop: Stop,
}

/// Parts of an object on their way.
pub(crate) struct Coming(JoinHandle<Result<Vec<Bytes>, FilesError>>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Opened {
    async fn fetch(self, ranges: Vec<Range<u64>>) -> Result<Vec<Bytes>, FilesError> {
        let fetched = self.store.get_ranges(&self.location, &ranges).await;
        fetched.map_err(|e| {
            let error = LakeError::of_store("read", &self.name, e);
            FilesError::of_store("read", &self.name, &error)
        })
    }

    /// Begins to fetch; on a thread of [`blocking`].
    pub fn begin(&self, ranges: Vec<Range<u64>>) -> Result<Coming, FilesError> {
        let task = handle()?.spawn(self.clone().fetch(ranges));
        Ok(Coming(task))
    }

    /// Waits for what was begun.
    pub fn finish(&self, mut coming: Coming) -> Result<Vec<Bytes>, FilesError> {
        let ended = async { (&mut coming.0).await.unwrap_or(Err(FilesError::Cancelled)) };
        handle()?.block_on(self.stop.or(ended))
    }

    pub fn read(&self, ranges: Vec<Range<u64>>) -> Result<Vec<Bytes>, FilesError> {
        self.finish(self.begin(ranges)?)
    }

    pub fn read_one(&self, range: Range<u64>) -> Result<Bytes, FilesError> {
        let mut found = self.read(std::iter::once(range).collect())?;
        Ok(found.pop().unwrap_or_default())
    }

    /// Its bytes from an offset to its end.
    pub fn reader(&self, from: u64) -> ObjectRead {
        let end = self.bytes;
        ObjectRead {
            lane: Lane::new(from.min(end)..end, WINDOW_BYTES, WINDOW_BYTES_MAX),
            at: from.min(end),
            object: self.clone(),
        }
    }
}

fn handle() -> Result<Handle, FilesError> {
    Handle::try_current()
        .map_err(|_| FilesError::Arrow("an object is read outside of the engine".to_owned()))
}

/// A range that is read from its front to its end.
pub(crate) struct Lane {
    pub range: Range<u64>,
    /// What is there of it, and where that begins.
    window: (u64, Bytes),
    ahead: Option<(Range<u64>, Coming)>,
    length: u64,
    length_max: u64,
}

impl Lane {
    /// The first window is of `length` bytes, each one twice the one before, up to `length_max`.
    pub fn new(range: Range<u64>, length: u64, length_max: u64) -> Self {
        Self {
            window: (range.start, Bytes::new()),
            range,
            ahead: None,
            length,
            length_max,
        }
    }

    /// The window that begins here.
    pub fn window_at(&self, at: u64) -> Range<u64> {
        // Blocks are fetched as a whole: a window ends with one.
        let end = match self.length < BLOCK_BYTES {
            true => at.saturating_add(self.length),
            false => at.saturating_add(self.length).next_multiple_of(BLOCK_BYTES),
        };
        at..end.min(self.range.end)
    }

    /// Takes what was fetched of a window.
    pub fn fill(&mut self, at: u64, bytes: Bytes) {
        self.window = (at, bytes);
    }

    /// What there is from `at`, which lies in the range, on: not empty, as much as there happens to be.
    pub fn get(&mut self, object: &Opened, at: u64) -> Result<Bytes, FilesError> {
        let (start, bytes) = &self.window;
        if let Some(part) = at.checked_sub(*start)
            && part < bytes.len() as u64
        {
            return Ok(bytes.slice(part as usize..));
        }
        let (range, bytes) = match self.ahead.take() {
            Some((range, coming)) if range.contains(&at) => {
                (range, object.finish(coming)?.pop().unwrap_or_default())
            }
            _ => {
                let range = self.window_at(at);
                (range.clone(), object.read_one(range)?)
            }
        };
        self.window = (range.start, bytes);
        self.length = (2 * self.length).min(self.length_max);
        if range.end < self.range.end {
            let next = self.window_at(range.end);
            let coming = object.begin(std::iter::once(next.clone()).collect())?;
            self.ahead = Some((next, coming));
        }
        let (start, bytes) = &self.window;
        let part = (at - start) as usize;
        if part >= bytes.len() {
            return Err(FilesError::Arrow("a part of an object is empty".to_owned()));
        }
        Ok(bytes.slice(part..))
    }
}

/// Reads an object from its front. On a thread of [`blocking`] only.
pub(crate) struct ObjectRead {
    object: Opened,
    lane: Lane,
    at: u64,
}

impl Read for ObjectRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.lane.range.end || buffer.is_empty() {
            return Ok(0);
        }
        let there = self
            .lane
            .get(&self.object, self.at)
            .map_err(io::Error::other)?;
        let n = there.len().min(buffer.len());
        buffer[..n].copy_from_slice(&there[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
