//! Whatever happens to the directory or the bucket, what is read is what was stored, or an error.
#![allow(clippy::single_range_in_vec_init)] // one range is what is meant

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result,
};

use super::*;
use crate::LakeError;
use crate::testing::Rng;

mod processes;

const MIB: u64 = 1 << 20;

/// A bucket that counts, waits and fails as told.
#[derive(Debug, Default)]
struct Bucket {
    objects: HashMap<String, Bytes>,
    delay: Option<Duration>,
    requests: AtomicUsize,
    now: AtomicUsize,
    most_at_a_time: AtomicUsize,
    ended: AtomicUsize,
    /// So many answers to come are cut short.
    short: AtomicUsize,
    /// Said of objects' sizes that is not true.
    too_large: AtomicBool,
    ranges: Mutex<Vec<Range<u64>>>,
}

impl Bucket {
    fn with(objects: &[(&str, &Bytes)]) -> Self {
        let objects = objects
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), (*bytes).clone()));
        Self {
            objects: objects.collect(),
            ..Self::default()
        }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a bucket")
    }
}

fn unused<T>() -> Result<T> {
    Err(Error::NotImplemented {
        operation: String::new(),
        implementer: String::new(),
    })
}

#[async_trait]
impl ObjectStore for Bucket {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        struct Here<'a>(&'a AtomicUsize);
        impl Drop for Here<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
        let _here = Here(&self.now);
        self.most_at_a_time.fetch_max(now, Ordering::Relaxed);
        if let Some(delay) = self.delay {
            tokio::time::sleep(delay).await;
        }
        let object = self
            .objects
            .get(location.as_ref())
            .ok_or_else(|| Error::NotFound {
                path: location.to_string(),
                source: "gone".into(),
            })?;
        let Some(GetRange::Bounded(range)) = options.range else {
            return unused();
        };
        self.ranges.lock().unwrap().push(range.clone());
        let mut body = object.slice(range.start as usize..range.end as usize);
        let less = |n: usize| n.checked_sub(1);
        if self
            .short
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
        {
            body.truncate(body.len() / 2);
        }
        self.ended.fetch_add(1, Ordering::Relaxed);
        let size = object.len() as u64 + u64::from(self.too_large.load(Ordering::Relaxed));
        // Bodies come in pieces.
        let pieces: Vec<_> = body
            .chunks(100_000)
            .map(|c| Ok(Bytes::copy_from_slice(c)))
            .collect();
        Ok(GetResult {
            payload: GetResultPayload::Stream(stream::iter(pieces).boxed()),
            meta: ObjectMeta {
                location: location.clone(),
                last_modified: chrono::DateTime::UNIX_EPOCH,
                size,
                e_tag: None,
                version: None,
            },
            range,
            attributes: Attributes::new(),
        })
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        unused()
    }
    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        unused()
    }
    fn delete_stream(
        &self,
        _: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        stream::empty().boxed()
    }
    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream::empty().boxed()
    }
    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        unused()
    }
    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        unused()
    }
}

/// Memory with a bound, that remembers the most that was taken.
#[derive(Debug)]
struct Budget {
    limit: u64,
    taken: AtomicU64,
    most: AtomicU64,
}

impl Budget {
    fn of(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            taken: AtomicU64::new(0),
            most: AtomicU64::new(0),
        })
    }
}

impl Memory for Budget {
    fn try_take(&self, bytes: usize) -> bool {
        let more = |taken: u64| Some(taken + bytes as u64).filter(|&sum| sum <= self.limit);
        let taken = self
            .taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        if let Ok(before) = taken {
            self.most.fetch_max(before + bytes as u64, Ordering::SeqCst);
        }
        taken.is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.taken.fetch_sub(bytes as u64, Ordering::SeqCst);
    }
}

fn object(bytes: u64, seed: u64) -> Bytes {
    // No two kilobytes are alike, and it costs little without optimisation.
    let mut data = vec![seed as u8; bytes as usize];
    for (index, part) in data.chunks_mut(1024).enumerate() {
        let mark = (seed << 32 | index as u64).to_le_bytes();
        let length = part.len().min(8);
        part[..length].copy_from_slice(&mark[..length]);
    }
    data.into()
}

fn fetcher() -> Arc<Fetcher> {
    Arc::new(Fetcher::new(Budget::of(u64::MAX)))
}

struct Reader {
    store: CachedStore,
    counters: Arc<Counters>,
}

fn reader(
    bucket: &Arc<Bucket>,
    fetcher: &Arc<Fetcher>,
    directory: Option<&Arc<Directory>>,
) -> Reader {
    let sizes = bucket
        .objects
        .iter()
        .map(|(path, b)| (path.clone(), b.len() as u64));
    let mut sizes: HashMap<String, u64> = sizes.collect();
    sizes.insert("missing".to_owned(), 10 * MIB);
    let counters = Arc::new(Counters::default());
    let store = CachedStore::new(
        Arc::clone(bucket) as Arc<dyn ObjectStore>,
        "lake".to_owned(),
        Arc::new(sizes),
        Arc::clone(fetcher),
        directory.cloned(),
        Arc::clone(&counters),
    );
    Reader { store, counters }
}

impl Reader {
    async fn get(&self, path: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.store.get_ranges(&Path::from(path), ranges).await
    }
}

/// Waits until nothing is being kept any more.
async fn settled(fetcher: &Fetcher) {
    while !fetcher.is_idle() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn files(directory: &FilePath) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if path
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .parse::<u64>()
                .is_ok()
            {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn random_ranges(rng: &mut Rng, bytes: u64) -> Vec<Range<u64>> {
    (0..rng.below(6))
        .map(|_| {
            let start = rng.below(bytes + 1);
            let longest = [10, 70_000, 3 * MIB][rng.below(3) as usize];
            start..(start + rng.below(longest)).min(bytes)
        })
        .collect()
}

fn expect(data: &Bytes, ranges: &[Range<u64>], read: &[Bytes]) {
    assert_eq!(ranges.len(), read.len());
    for (range, bytes) in ranges.iter().zip(read) {
        assert!(
            data[range.start as usize..range.end as usize] == bytes[..],
            "{range:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cache_changes_nothing_but_the_number_of_requests() {
    let home = tempfile::tempdir().unwrap();
    let bytes = 11 * MIB + 4321;
    let data = object(bytes, 1);
    let bucket = Arc::new(Bucket::with(&[("a/x", &data)]));
    let fetcher = fetcher();
    let directory = Arc::new(Directory::new(home.path(), 1 << 30));
    let (with, without) = (
        reader(&bucket, &fetcher, Some(&directory)),
        reader(&bucket, &fetcher, None),
    );
    let mut rng = Rng::new(2);
    for _ in 0..60 {
        let ranges = random_ranges(&mut rng, bytes);
        expect(&data, &ranges, &with.get("a/x", &ranges).await.unwrap());
        expect(&data, &ranges, &without.get("a/x", &ranges).await.unwrap());
    }
    settled(&fetcher).await;
    let all = [0..bytes];
    expect(&data, &all, &with.get("a/x", &all).await.unwrap());
    settled(&fetcher).await;
    // From now on the bucket is not needed, also not by a server that has just started.
    let before = bucket.requests();
    let again = Arc::new(Directory::new(home.path(), 1 << 30));
    let warm = reader(&bucket, &self::fetcher(), Some(&again));
    for _ in 0..60 {
        let ranges = random_ranges(&mut rng, bytes);
        expect(&data, &ranges, &warm.get("a/x", &ranges).await.unwrap());
    }
    let counts = warm.counters.get();
    assert_eq!(
        (bucket.requests(), counts.misses, counts.requests),
        (before, 0, 0)
    );
    assert!(counts.hits > 0 && counts.hit_bytes > 0);
    assert_eq!(files(home.path()).len(), 12);
    // Another storage, or another size, is another object.
    let sizes = Arc::new(HashMap::from([("a/x".to_owned(), bytes)]));
    let other = CachedStore::new(
        Arc::clone(&bucket) as Arc<dyn ObjectStore>,
        "other".to_owned(),
        sizes,
        fetcher,
        Some(again),
        Arc::default(),
    );
    other.get_ranges(&Path::from("a/x"), &[0..1]).await.unwrap();
    assert_eq!(bucket.requests(), before + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_harmed_block_is_fetched_again() {
    let home = tempfile::tempdir().unwrap();
    let bytes = 5 * MIB + 70_000;
    let data = object(bytes, 3);
    let bucket = Arc::new(Bucket::with(&[("x", &data)]));
    let fetcher = fetcher();
    let directory = Arc::new(Directory::new(home.path(), 1 << 30));
    let reader = reader(&bucket, &fetcher, Some(&directory));
    let all = [0..bytes];
    reader.get("x", &all).await.unwrap();
    settled(&fetcher).await;
    let blocks = files(home.path());
    assert_eq!(blocks.len(), 6);
    let sound: Vec<Vec<u8>> = blocks.iter().map(|path| fs::read(path).unwrap()).collect();
    let mut rng = Rng::new(4);
    for round in 0..8 {
        for (index, path) in blocks.iter().enumerate() {
            let mut bad = sound[index].clone();
            match round {
                0 => bad.truncate(0),
                1 => bad.truncate(rng.below(bad.len() as u64) as usize),
                // As a file system may leave it that crashed: of the right length, empty.
                2 => bad.fill(0),
                // Another block of the same object.
                3 => bad = sound[(index + 1) % sound.len()].clone(),
                4 => bad = b"something else".to_vec(),
                _ => {
                    let at = rng.below(bad.len() as u64) as usize;
                    bad[at] ^= 1 << rng.below(8);
                }
            }
            fs::write(path, bad).unwrap();
        }
        let before = reader.counters.get().misses;
        expect(&data, &all, &reader.get("x", &all).await.unwrap());
        assert_eq!(reader.counters.get().misses - before, 6, "round {round}");
        settled(&fetcher).await;
        // And it is good again.
        expect(&data, &all, &reader.get("x", &all).await.unwrap());
        assert_eq!(reader.counters.get().misses - before, 6);
    }
    // A directory in the place of a block, an object's blocks gone: misses like others.
    fs::remove_file(&blocks[0]).unwrap();
    fs::create_dir(&blocks[0]).unwrap();
    expect(&data, &all, &reader.get("x", &all).await.unwrap());
    settled(&fetcher).await;
    fs::remove_dir_all(blocks[0].parent().unwrap()).unwrap();
    expect(&data, &all, &reader.get("x", &all).await.unwrap());
    settled(&fetcher).await;
    fs::remove_dir_all(home.path()).unwrap();
    expect(&data, &all, &reader.get("x", &all).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_readers_of_a_block_make_one_request() {
    let home = tempfile::tempdir().unwrap();
    let data = object(8 * MIB, 5);
    let mut bucket = Bucket::with(&[("x", &data)]);
    bucket.delay = Some(Duration::from_millis(30));
    let bucket = Arc::new(bucket);
    let fetcher = fetcher();
    let directory = Arc::new(Directory::new(home.path(), 1 << 30));
    let (one, two) = (
        reader(&bucket, &fetcher, Some(&directory)),
        reader(&bucket, &fetcher, Some(&directory)),
    );
    let (a, b) = ([0..6 * MIB], [100..200, 2 * MIB..8 * MIB]);
    let (first, second) = tokio::join!(one.get("x", &a), two.get("x", &b));
    expect(&data, &a, &first.unwrap());
    expect(&data, &b, &second.unwrap());
    let fetched: u64 = bucket
        .ranges
        .lock()
        .unwrap()
        .iter()
        .map(|r| r.end - r.start)
        .sum();
    assert_eq!(fetched, 8 * MIB);
    settled(&fetcher).await;
    assert_eq!(files(home.path()).len(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_waits_for_ends() {
    let home = tempfile::tempdir().unwrap();
    let data = object(8 * MIB, 6);
    let mut bucket = Bucket::with(&[("x", &data)]);
    bucket.delay = Some(Duration::from_secs(3600));
    let bucket = Arc::new(bucket);
    let budget = Budget::of(u64::MAX);
    let fetcher = Arc::new(Fetcher::new(Arc::clone(&budget) as Arc<dyn Memory>));
    let directory = Arc::new(Directory::new(home.path(), 1 << 30));
    for directory in [Some(&directory), None] {
        let reader = Arc::new(reader(&bucket, &fetcher, directory));
        let before = bucket.requests();
        let task = tokio::spawn({
            let reader = Arc::clone(&reader);
            async move { reader.get("x", &[0..8 * MIB]).await.map(drop) }
        });
        while bucket.requests() < before + 2 {
            tokio::task::yield_now().await;
        }
        task.abort();
        let _ = task.await;
        while bucket.now.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        settled(&fetcher).await;
    }
    assert_eq!(bucket.ended.load(Ordering::Relaxed), 0);
    assert_eq!(budget.taken.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_parallel_within_bounds() {
    let data = object(96 * MIB, 7);
    let mut bucket = Bucket::with(&[("x", &data)]);
    bucket.delay = Some(Duration::from_millis(20));
    let bucket = Arc::new(bucket);
    let all = [0..96 * MIB];
    // Enough memory, some, and none at all: slower, but not wrong.
    for (limit, most) in [(u64::MAX, 64), (9 * MIB, 9), (1, 0)] {
        let budget = Budget::of(limit);
        let fetcher = Arc::new(Fetcher::new(Arc::clone(&budget) as Arc<dyn Memory>));
        let reader = reader(&bucket, &fetcher, None);
        bucket.most_at_a_time.store(0, Ordering::Relaxed);
        expect(&data, &all, &reader.get("x", &all).await.unwrap());
        assert_eq!(reader.counters.get().fetched_bytes, 96 * MIB);
        assert!(budget.most.load(Ordering::SeqCst) <= most * MIB);
        let at_a_time = bucket.most_at_a_time.load(Ordering::Relaxed);
        match limit {
            u64::MAX => assert!(at_a_time > 4 && at_a_time <= 16, "{at_a_time}"),
            1 => assert_eq!(at_a_time, 1),
            _ => assert!(at_a_time <= 3),
        }
        while budget.taken.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_answers_are_errors_and_are_not_kept() {
    let home = tempfile::tempdir().unwrap();
    let data = object(3 * MIB, 8);
    let bucket = Arc::new(Bucket::with(&[("x", &data)]));
    let fetcher = fetcher();
    let directory = Arc::new(Directory::new(home.path(), 1 << 30));
    for directory in [None, Some(&directory)] {
        let reader = reader(&bucket, &fetcher, directory);
        let state = |e: Error| LakeError::of_store("read", "x", e).sqlstate();
        let missing = reader
            .get("missing", &[0..9, MIB..MIB + 1])
            .await
            .unwrap_err();
        assert_eq!(state(missing), "58P01");
        bucket.short.store(2, Ordering::Relaxed);
        assert_eq!(state(reader.get("x", &[0..9]).await.unwrap_err()), "58030");
        bucket.too_large.store(true, Ordering::Relaxed);
        assert_eq!(state(reader.get("x", &[0..9]).await.unwrap_err()), "XX001");
        bucket.too_large.store(false, Ordering::Relaxed);
        assert_eq!(
            state(reader.get("x", &[0..3 * MIB + 1]).await.unwrap_err()),
            "XX001"
        );
        settled(&fetcher).await;
        assert!(files(home.path()).is_empty());
        // One answer that is cut short is asked for again.
        bucket.short.store(1, Ordering::Relaxed);
        let all = [0..3 * MIB];
        expect(&data, &all, &reader.get("x", &all).await.unwrap());
        settled(&fetcher).await;
    }
    let reader = reader(&bucket, &fetcher, None);
    assert!(
        reader
            .store
            .put_opts(&Path::from("x"), "y".into(), Default::default())
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_directory_stays_within_its_bound() {
    let home = tempfile::tempdir().unwrap();
    let data = object(MIB, 9);
    let limit = 8 * MIB;
    let directory = Directory::new(home.path(), limit);
    let key = |n: u64| ObjectKey {
        storage: "s".to_owned(),
        path: format!("p/{n}"),
    };
    let bytes = || -> u64 {
        files(home.path())
            .iter()
            .map(|path| fs::metadata(path).unwrap().len())
            .sum()
    };
    let old = |n: u64, age: u64| {
        for path in files(&directory.object_path(&key(n))) {
            let file = fs::File::open(path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age))
                .unwrap();
        }
    };
    for n in 0..7 {
        directory.store(&key(n), MIB, 0, &data);
        old(n, 10_000 - n * 1000);
    }
    assert_eq!(files(home.path()).len(), 7);
    assert_eq!(directory.usage().unwrap().bytes, 7 * 17 * (64 << 10));
    // Read again: it is the youngest from now on.
    assert!(directory.read(&key(0), MIB, 0, 5..9).is_some());
    for n in 7..40 {
        directory.store(&key(n), MIB, 0, &data);
        assert!(
            bytes() <= limit && directory.usage().unwrap().bytes <= limit,
            "{n}"
        );
        old(n, 4000 - 100 * n);
        directory.forget_pause();
    }
    assert!(directory.read(&key(0), MIB, 0, 5..9).is_some());
    assert!(directory.read(&key(1), MIB, 0, 5..9).is_none());
    assert!(directory.read(&key(39), MIB, 0, 5..9).is_some());
    // A smaller bound, and a pass in the smallest steps.
    let limit = 6 * MIB;
    let smaller = Directory::new(home.path(), limit);
    let mut eviction = smaller.eviction().unwrap();
    assert!(smaller.eviction().is_none(), "one at a time");
    while eviction.step(Duration::ZERO) {}
    assert!(eviction.removed() > 0);
    drop(eviction);
    assert!(bytes() <= 4 * MIB && bytes() > 0);
    assert!(smaller.usage().unwrap().bytes <= 4 * MIB);
    assert!(smaller.eviction().is_none());
    // Objects that are gone leave nothing; remains of writers are removed when they are old.
    let before = files(home.path()).len();
    smaller.forget(&key(39));
    smaller.forget(&key(39));
    assert_eq!(files(home.path()).len(), before - 1);
    let remains = smaller.root().join("tmp").join("1");
    fs::write(&remains, b"half").unwrap();
    let mut pass = smaller.inspection().unwrap();
    while pass.step(Duration::ZERO) {}
    drop(pass);
    assert!(remains.exists());
    let file = fs::File::open(&remains).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(7200))
        .unwrap();
    let mut pass = smaller.inspection().unwrap();
    while pass.step(Duration::ZERO) {}
    assert!(!remains.exists());
    // Nothing is stored where nothing may be.
    let none = Directory::new(home.path(), 0);
    none.store(&key(50), MIB, 0, &data);
    assert!(none.read(&key(50), MIB, 0, 0..1).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_cannot_be_used_is_in_nobodys_way() {
    let home = tempfile::tempdir().unwrap();
    let data = object(2 * MIB, 10);
    let bucket = Arc::new(Bucket::with(&[("x", &data)]));
    let fetcher = fetcher();
    let a_file = home.path().join("file");
    fs::write(&a_file, b"x").unwrap();
    // Somebody else's doing.
    let open = home.path().join("open");
    let blocks = Directory::new(&open, 1 << 30).root().to_owned();
    fs::create_dir_all(&blocks).unwrap();
    fs::set_permissions(&blocks, fs::Permissions::from_mode(0o777)).unwrap();
    for path in [a_file.join("below"), open] {
        let directory = Arc::new(Directory::new(&path, 1 << 30));
        let reader = reader(&bucket, &fetcher, Some(&directory));
        for _ in 0..2 {
            let all = [0..2 * MIB];
            expect(&data, &all, &reader.get("x", &all).await.unwrap());
            settled(&fetcher).await;
        }
        assert!(directory.prove().is_err());
        assert!(directory.trouble().is_some());
        assert_eq!(directory.trouble(), None);
        assert_eq!(reader.counters.get().hits, 0);
    }
    let fine = Directory::new(&home.path().join("new"), 1 << 30);
    fine.prove().unwrap();
    assert_eq!(fs::metadata(fine.root()).unwrap().mode_bits(), 0o700);
}

trait ModeBits {
    fn mode_bits(&self) -> u32;
}

impl ModeBits for fs::Metadata {
    fn mode_bits(&self) -> u32 {
        self.permissions().mode() & 0o777
    }
}
