//! An object store for reading, with the requests of [`Fetcher`] and the blocks of a [`Directory`].

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use super::directory::Directory;
use super::fetch::{Fetcher, Flight, Known, Run, Source};
use super::{ObjectKey, plan};
use crate::storage::ObjectInfo;

/// Blocks that are read from disk between two moments at which the reading may end.
const BLOCKS_PER_READ: usize = 32;

/// What was read how; of one scan, or of many.
#[derive(Debug, Default)]
pub struct Counters {
    hits: AtomicU64,
    hit_bytes: AtomicU64,
    misses: AtomicU64,
    requests: AtomicU64,
    fetched_bytes: AtomicU64,
}

/// The state of [`Counters`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks that were on disk, or on their way for another reader.
    pub hits: u64,
    /// Wanted bytes of them.
    pub hit_bytes: u64,
    /// Blocks that had to be fetched.
    pub misses: u64,
    /// Requests to the bucket.
    pub requests: u64,
    pub fetched_bytes: u64,
}

impl Counters {
    pub fn get(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            hits: get(&self.hits),
            hit_bytes: get(&self.hit_bytes),
            misses: get(&self.misses),
            requests: get(&self.requests),
            fetched_bytes: get(&self.fetched_bytes),
        }
    }
}

/// A bucket, for reading objects whose sizes are known.
#[derive(Debug)]
pub struct CachedStore {
    inner: Arc<dyn ObjectStore>,
    /// Names the storage among those that share the directory.
    storage: String,
    sizes: Arc<HashMap<String, u64>>,
    /// The only object, which somebody else may replace.
    pinned: Option<Arc<ObjectInfo>>,
    fetcher: Arc<Fetcher>,
    directory: Option<Arc<Directory>>,
    counters: Arc<Counters>,
}

impl CachedStore {
    /// `sizes` are those of the manifest, by path; other objects are read from `inner` as they are. Without a directory
    /// nothing is kept.
    pub fn new(
        inner: Arc<dyn ObjectStore>,
        storage: String,
        sizes: Arc<HashMap<String, u64>>,
        fetcher: Arc<Fetcher>,
        directory: Option<Arc<Directory>>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            inner,
            storage,
            sizes,
            pinned: None,
            fetcher,
            directory,
            counters,
        }
    }

    /// For one object as it was found. It may be replaced by somebody else: blocks of it are kept under its version too,
    /// and not at all without one; an answer with another content is an error ([`crate::LakeError::Changed`]).
    pub fn pinned(
        inner: Arc<dyn ObjectStore>,
        storage: &str,
        object: ObjectInfo,
        fetcher: Arc<Fetcher>,
        directory: Option<Arc<Directory>>,
        counters: Arc<Counters>,
    ) -> Self {
        let tag = object.tag().map(str::to_owned);
        Self {
            inner,
            storage: format!("{storage}#{}", tag.as_deref().unwrap_or_default()),
            sizes: Arc::new(HashMap::from([(object.path.clone(), object.bytes)])),
            pinned: Some(Arc::new(object)),
            fetcher,
            directory: directory.filter(|_| tag.is_some()),
            counters,
        }
    }

    /// Pieces that cover the ranges.
    async fn pieces(&self, source: Source, ranges: &[Range<u64>]) -> Result<Vec<Run>> {
        let (mut pieces, flights) = match &self.directory {
            Some(directory) => self.cached(source, ranges, directory).await,
            None => {
                let flights = plan::requests(ranges)
                    .into_iter()
                    .map(|range| {
                        self.requested(range.end - range.start);
                        self.fetcher.range(source.clone(), range)
                    })
                    .collect();
                (Vec::new(), flights)
            }
        };
        pieces.extend(try_join_all(flights).await?);
        pieces.sort_unstable_by_key(|piece| piece.start);
        Ok(pieces)
    }

    /// What is there of the blocks, and the requests for the rest.
    async fn cached(
        &self,
        source: Source,
        ranges: &[Range<u64>],
        directory: &Arc<Directory>,
    ) -> (Vec<Run>, Vec<Flight>) {
        let key = ObjectKey {
            storage: self.storage.clone(),
            path: source.location.to_string(),
        };
        let (mut pieces, mut flights) = (Vec::new(), Vec::new());
        let mut take = |known: Known, wanted: &Range<u64>| {
            self.hit(wanted);
            match known {
                Known::Coming(flight) => flights.push(flight),
                Known::Here(run) => pieces.push(run),
            }
        };
        let mut on_disk = Vec::new();
        for (number, part) in plan::blocks(ranges) {
            match self.fetcher.known(&key, number) {
                Some(known) => take(known, &part),
                None => on_disk.push((number, part)),
            }
        }
        let mut found = Vec::new();
        let mut missing = Vec::new();
        for some in on_disk.chunks(BLOCKS_PER_READ) {
            let (some, of_object, bytes) = (some.to_vec(), key.clone(), source.bytes);
            let directory = Arc::clone(directory);
            let read = tokio::task::spawn_blocking(move || {
                let read = |(number, part): (u64, Range<u64>)| {
                    let piece = directory.read(&of_object, bytes, number, part.clone());
                    (number, part, piece)
                };
                some.into_iter().map(read).collect::<Vec<_>>()
            });
            // A task that ended without an answer has found nothing: then what is missing is fetched.
            let Ok(read) = read.await else { continue };
            for (number, part, piece) in read {
                match piece {
                    Some((start, bytes)) => {
                        self.hit(&part);
                        found.push(Run { start, bytes });
                    }
                    None => missing.push((number, part)),
                }
            }
        }
        // Another reader may have asked for it since.
        let mut numbers = Vec::new();
        for (number, part) in missing {
            match self.fetcher.known(&key, number) {
                Some(known) => take(known, &part),
                None => numbers.push(number),
            }
        }
        pieces.append(&mut found);
        self.counters
            .misses
            .fetch_add(numbers.len() as u64, Ordering::Relaxed);
        for run in plan::runs(&numbers) {
            let bytes =
                (run.end * super::BLOCK_BYTES).min(source.bytes) - run.start * super::BLOCK_BYTES;
            self.requested(bytes);
            let directory = Arc::clone(directory);
            flights.push(self.fetcher.blocks(source.clone(), &key, run, directory));
        }
        (pieces, flights)
    }

    fn hit(&self, part: &Range<u64>) {
        self.counters.hits.fetch_add(1, Ordering::Relaxed);
        self.counters
            .hit_bytes
            .fetch_add(part.end - part.start, Ordering::Relaxed);
    }

    fn requested(&self, bytes: u64) {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters
            .fetched_bytes
            .fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The bytes of a range out of pieces that cover it, in the order of their starts.
fn assemble(pieces: &[Run], range: &Range<u64>) -> Option<Bytes> {
    let length = (range.end - range.start) as usize;
    if length == 0 {
        return Some(Bytes::new());
    }
    let end = |piece: &Run| piece.start + piece.bytes.len() as u64;
    let mut copied = Vec::new();
    let mut at = range.start;
    // Of pieces that overlap any will do; those of one request follow each other.
    for piece in pieces {
        if piece.start > at || end(piece) <= at {
            continue;
        }
        let from = (at - piece.start) as usize;
        let to = (range.end.min(end(piece)) - piece.start) as usize;
        let part = piece.bytes.slice(from..to);
        // A small part would keep the memory of the whole piece.
        if part.len() == length && 2 * length >= piece.bytes.len() {
            return Some(part);
        }
        if copied.is_empty() {
            copied.reserve_exact(length);
        }
        copied.extend_from_slice(&part);
        at += part.len() as u64;
        if at == range.end {
            return Some(copied.into());
        }
    }
    None
}

impl fmt::Display for CachedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bucket")
    }
}

fn read_only() -> Error {
    Error::NotSupported {
        source: "a bucket is read-only here".into(),
    }
}

#[async_trait]
impl ObjectStore for CachedStore {
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let Some(&bytes) = self.sizes.get(location.as_ref()) else {
            return self.inner.get_ranges(location, ranges).await;
        };
        let outside = ranges
            .iter()
            .any(|range| range.start > range.end || range.end > bytes);
        let invalid = |reason: &str| Error::Generic {
            store: "bucket",
            source: crate::LakeError::corrupt("object", reason).into(),
        };
        if outside {
            return Err(invalid("a part beyond its end is wanted"));
        }
        let source = Source {
            store: Arc::clone(&self.inner),
            location: location.clone(),
            bytes,
            pinned: self.pinned.clone(),
        };
        let pieces = self.pieces(source, ranges).await?;
        ranges
            .iter()
            .map(|range| assemble(&pieces, range).ok_or_else(|| invalid("a part was not read")))
            .collect()
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        Err(read_only())
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(read_only())
    }

    fn delete_stream(
        &self,
        _: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        stream::iter([Err(read_only())]).boxed()
    }

    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream::iter([Err(read_only())]).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(read_only())
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(read_only())
    }
}
