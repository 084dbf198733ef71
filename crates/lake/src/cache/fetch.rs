//! Requests to buckets: bounded together for a process, each driven by a task of its own.
//!
//! A request is a task so that it goes on when the query that waits for it does something else for a while: what it holds
//! of the bounds is given back in any case. When nobody waits for it any more, it ends.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, GetResultPayload, ObjectStore, Result};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::directory::Directory;
use super::plan::REQUEST_BYTES_MAX;
use super::{BLOCK_BYTES, ObjectKey};
use crate::error::LakeError;
use crate::storage::ObjectInfo;

/// Bytes that are fetched, or wait to be kept, at a time in a process.
const IN_FLIGHT_BYTES: u64 = 64 << 20;
/// What the bound is counted in.
const UNIT_BYTES: u64 = 64 << 10;
/// A small request counts as this much: so many are under way at a time at most.
const REQUEST_UNITS_MIN: u64 = IN_FLIGHT_BYTES / UNIT_BYTES / 64;
/// How soon memory is asked for again.
const MEMORY_PAUSE: Duration = Duration::from_millis(5);
/// An answer of the wrong length is asked for once more.
const ATTEMPTS: usize = 2;

/// Where the memory of requests is accounted.
pub trait Memory: fmt::Debug + Send + Sync {
    /// Takes all of it, or nothing.
    fn try_take(&self, bytes: usize) -> bool;
    /// Gives back what was taken.
    fn give_back(&self, bytes: usize);
}

/// The requests of a process.
#[derive(Debug)]
pub struct Fetcher {
    room: Arc<Semaphore>,
    memory: Arc<dyn Memory>,
    /// Requests that have memory.
    claims: Arc<AtomicUsize>,
    next_flight: AtomicU64,
    flights: Mutex<HashMap<(ObjectKey, u64), Entry>>,
}

/// A run of blocks, or a range, as it came.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub start: u64,
    pub bytes: Bytes,
}

/// A request that several may wait for. With the last of them it ends.
pub(super) type Flight = Shared<BoxFuture<'static, std::result::Result<Run, SharedError>>>;

#[derive(Debug)]
struct Entry {
    flight: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Fetching(WeakShared<BoxFuture<'static, std::result::Result<Run, SharedError>>>),
    /// It has come and is being kept.
    Keeping(Run),
}

/// What is known of a block besides the directory.
pub(super) enum Known {
    Coming(Flight),
    Here(Run),
}

/// The object of a request.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub store: Arc<dyn ObjectStore>,
    pub location: Path,
    pub bytes: u64,
    /// Of an object that somebody else may replace: what it must still be.
    pub pinned: Option<Arc<ObjectInfo>>,
}

impl Fetcher {
    /// What is fetched takes its memory from `memory`, while there is some; a request alone goes without.
    pub fn new(memory: Arc<dyn Memory>) -> Self {
        Self {
            room: Arc::new(Semaphore::new((IN_FLIGHT_BYTES / UNIT_BYTES) as usize)),
            memory,
            claims: Arc::default(),
            next_flight: AtomicU64::new(0),
            flights: Mutex::default(),
        }
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<(ObjectKey, u64), Entry>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is under way or being kept.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.flights().is_empty() && self.claims.load(Ordering::Relaxed) == 0
    }

    /// The block, if it is on its way or has just come.
    pub(super) fn known(&self, key: &ObjectKey, number: u64) -> Option<Known> {
        match &self.flights().get(&(key.clone(), number))?.state {
            State::Fetching(flight) => flight.upgrade().map(Known::Coming),
            State::Keeping(run) => Some(Known::Here(run.clone())),
        }
    }

    /// Fetches a range that is not kept.
    pub(super) fn range(self: &Arc<Self>, source: Source, range: Range<u64>) -> Flight {
        let fetcher = Arc::clone(self);
        shared(tokio::spawn(async move {
            let (run, _room) = fetcher.fetch(&source, range).await?;
            Ok(run)
        }))
    }

    /// Fetches blocks and keeps them. Who asks for one of them meanwhile waits for the same request.
    pub(super) fn blocks(
        self: &Arc<Self>,
        source: Source,
        key: &ObjectKey,
        numbers: Range<u64>,
        directory: Arc<Directory>,
    ) -> Flight {
        let range = numbers.start * BLOCK_BYTES..(numbers.end * BLOCK_BYTES).min(source.bytes);
        let landing = Landing {
            fetcher: Arc::clone(self),
            flight: self.next_flight.fetch_add(1, Ordering::Relaxed),
            key: key.clone(),
            numbers,
        };
        let (numbers, flight) = (landing.numbers.clone(), landing.flight);
        // The task must not find its entries missing.
        let mut flights = self.flights();
        let task = tokio::spawn(async move {
            let (run, room) = landing.fetcher.fetch(&source, range).await?;
            landing.keeping(&run);
            let kept = run.clone();
            tokio::task::spawn_blocking(move || {
                for number in landing.numbers.clone() {
                    let start = (number * BLOCK_BYTES - kept.start) as usize;
                    let end = (start + BLOCK_BYTES as usize).min(kept.bytes.len());
                    directory.store(&landing.key, source.bytes, number, &kept.bytes[start..end]);
                }
                drop((kept, landing, room));
            });
            Ok(run)
        });
        let shared = shared(task);
        if let Some(weak) = shared.downgrade() {
            for number in numbers {
                let state = State::Fetching(weak.clone());
                flights.insert((key.clone(), number), Entry { flight, state });
            }
        }
        shared
    }

    /// A range of an object that is as large as the manifest says, with what it holds of the bounds.
    async fn fetch(
        &self,
        source: &Source,
        range: Range<u64>,
    ) -> std::result::Result<(Run, Room), SharedError> {
        let bytes = (range.end - range.start).min(2 * REQUEST_BYTES_MAX);
        let units = bytes.div_ceil(UNIT_BYTES).max(REQUEST_UNITS_MIN) as u32;
        // The semaphore is never closed.
        let permit = Arc::clone(&self.room).acquire_many_owned(units).await.ok();
        let claim = self.claim(bytes as usize).await;
        let mut attempt = 1;
        let bytes = loop {
            match get(source, range.clone()).await {
                Err(Problem::Length) if attempt < ATTEMPTS => attempt += 1,
                Err(problem) => return Err(SharedError::from(problem.into_error(source))),
                Ok(bytes) => break bytes,
            }
        };
        let start = range.start;
        Ok((
            Run { start, bytes },
            Room {
                _permit: permit,
                _claim: claim,
            },
        ))
    }

    /// Memory for a request. When others have it, they are waited for; when nobody has, the request does without.
    async fn claim(&self, bytes: usize) -> Option<Claim> {
        loop {
            // Counted before it is asked for: of two requests that find nothing one goes on.
            let others = self.claims.fetch_add(1, Ordering::Relaxed);
            if self.memory.try_take(bytes) {
                return Some(Claim {
                    memory: Arc::clone(&self.memory),
                    claims: Arc::clone(&self.claims),
                    bytes,
                });
            }
            if others == 0 {
                return Some(Claim {
                    memory: Arc::clone(&self.memory),
                    claims: Arc::clone(&self.claims),
                    bytes: 0,
                });
            }
            self.claims.fetch_sub(1, Ordering::Relaxed);
            tokio::time::sleep(MEMORY_PAUSE).await;
        }
    }
}

/// What a request holds until its bytes are kept.
struct Room {
    _permit: Option<OwnedSemaphorePermit>,
    _claim: Option<Claim>,
}

struct Claim {
    memory: Arc<dyn Memory>,
    claims: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.fetch_sub(1, Ordering::Relaxed);
        self.memory.give_back(self.bytes);
    }
}

/// The entries of a request among the flights; they go with it.
struct Landing {
    fetcher: Arc<Fetcher>,
    flight: u64,
    key: ObjectKey,
    numbers: Range<u64>,
}

impl Landing {
    fn keeping(&self, run: &Run) {
        let mut flights = self.fetcher.flights();
        for number in self.numbers.clone() {
            let state = State::Keeping(run.clone());
            let flight = self.flight;
            flights.insert((self.key.clone(), number), Entry { flight, state });
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut flights = self.fetcher.flights();
        for number in self.numbers.clone() {
            let entry = (self.key.clone(), number);
            if flights.get(&entry).is_some_and(|e| e.flight == self.flight) {
                flights.remove(&entry);
            }
        }
    }
}

/// A task that ends when the last one who waits for it has gone.
fn shared(task: JoinHandle<std::result::Result<Run, SharedError>>) -> Flight {
    struct Task(JoinHandle<std::result::Result<Run, SharedError>>);
    impl Drop for Task {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let mut task = Task(task);
    async move {
        (&mut task.0)
            .await
            .unwrap_or_else(|e| Err(SharedError::from(Error::JoinError { source: e })))
    }
    .boxed()
    .shared()
}

enum Problem {
    /// Not as many bytes as asked for.
    Length,
    /// The object is not as large as the manifest says.
    Size,
    /// The object is another one than it was.
    Changed,
    Store(Error),
}

impl Problem {
    fn into_error(self, source: &Source) -> Error {
        let corrupt = |reason: &str| Error::Generic {
            store: "bucket",
            source: LakeError::corrupt("object", reason).into(),
        };
        match self {
            Self::Length => Error::Generic {
                store: "bucket",
                source: LakeError::Unreachable {
                    action: "read",
                    path: source.location.to_string(),
                    reason: "an answer was cut short".to_owned(),
                }
                .into(),
            },
            Self::Size => corrupt("it is not as large as the manifest says"),
            Self::Changed => Error::Generic {
                store: "bucket",
                source: LakeError::Changed {
                    path: source.location.to_string(),
                }
                .into(),
            },
            Self::Store(error) => error,
        }
    }
}

async fn get(source: &Source, range: Range<u64>) -> std::result::Result<Bytes, Problem> {
    let options = GetOptions {
        range: Some(GetRange::Bounded(range.clone())),
        ..GetOptions::default()
    };
    let answer = source
        .store
        .get_opts(&source.location, options)
        .await
        .map_err(Problem::Store)?;
    match &source.pinned {
        // Not every store keeps the condition of a request: each answer is looked at.
        Some(pinned) if !pinned.is_still(&answer.meta) => return Err(Problem::Changed),
        None if answer.meta.size != source.bytes => return Err(Problem::Size),
        _ => {}
    }
    if answer.range != range {
        return Err(Problem::Length);
    }
    let expected = (range.end - range.start) as usize;
    let bytes = match answer.payload {
        GetResultPayload::Stream(stream) => collect(stream, expected).await?,
        // A directory in the place of a bucket: only tests have one.
        _ => answer.bytes().await.map_err(Problem::Store)?,
    };
    if bytes.len() == expected {
        Ok(bytes)
    } else {
        Err(Problem::Length)
    }
}

/// The bytes of a stream, one piece of memory that is no larger than it has to be.
async fn collect(
    mut stream: futures::stream::BoxStream<'static, Result<Bytes>>,
    expected: usize,
) -> std::result::Result<Bytes, Problem> {
    let first = stream
        .try_next()
        .await
        .map_err(Problem::Store)?
        .unwrap_or_default();
    if first.len() == expected {
        return Ok(first);
    }
    let mut all = BytesMut::with_capacity(expected);
    all.extend_from_slice(&first);
    while let Some(part) = stream.next().await {
        let part = part.map_err(Problem::Store)?;
        if all.len() + part.len() > expected {
            return Err(Problem::Length);
        }
        all.extend_from_slice(&part);
    }
    Ok(all.freeze())
}

/// An error of the store for all who wait for a request.
#[derive(Debug, Clone)]
pub(super) struct SharedError(Arc<Error>);

impl From<Error> for SharedError {
    fn from(error: Error) -> Self {
        Self(Arc::new(error))
    }
}

impl fmt::Display for SharedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for SharedError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl From<SharedError> for Error {
    /// The same kind of error, as far as readers tell kinds apart.
    fn from(error: SharedError) -> Self {
        match &*error.0 {
            Self::NotFound { path, .. } => Self::NotFound {
                path: path.clone(),
                source: error.into(),
            },
            Self::PermissionDenied { path, .. } => Self::PermissionDenied {
                path: path.clone(),
                source: error.into(),
            },
            Self::Unauthenticated { path, .. } => Self::Unauthenticated {
                path: path.clone(),
                source: error.into(),
            },
            _ => Self::Generic {
                store: "bucket",
                source: error.into(),
            },
        }
    }
}
