//! Files that are far away: while one row group is decoded others are on their way, and nobody fetches what nobody wants.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rakam_engine::{EngineContext, execute};
use rakam_event::schema::Schema;

use super::fixture::*;

/// A store that answers when as many ask as are needed, or never.
#[derive(Debug)]
struct Far {
    inner: Arc<InMemory>,
    /// So many have to ask at a time before the first is answered.
    needed: usize,
    now: AtomicUsize,
    most: AtomicUsize,
    calls: AtomicUsize,
}

impl Far {
    fn new(inner: &Arc<InMemory>, needed: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            needed,
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
        })
    }
}

impl fmt::Display for Far {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("far away")
    }
}

#[async_trait]
impl ObjectStore for Far {
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        struct Here<'a>(&'a AtomicUsize);
        impl Drop for Here<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.calls.fetch_add(1, Ordering::SeqCst);
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        let _here = Here(&self.now);
        self.most.fetch_max(now, Ordering::SeqCst);
        while self.most.load(Ordering::SeqCst) < self.needed {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.inner.get_ranges(location, ranges).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.inner.put_opts(at, payload, options).await
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, options).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

const FILES: usize = 24;
const ROWS: usize = 100;

async fn files() -> (Schema, Tiers) {
    let schema = all_types();
    let mut tiers = Tiers::default();
    let rows = rows(&schema, FILES * ROWS, &mut Rng(11));
    for part in rows.chunks(ROWS) {
        tiers.file(&schema, part, true).await;
    }
    (schema, tiers)
}

fn far(tiers: &mut Tiers, needed: usize, remote: bool) -> Arc<Far> {
    let store = Far::new(&tiers.store, needed);
    for file in &mut tiers.files {
        file.store = Arc::clone(&store) as Arc<dyn ObjectStore>;
        file.remote = remote;
    }
    store
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_row_groups_are_on_their_way_than_there_are_threads() {
    let (schema, mut tiers) = files().await;
    // Two threads: answered only when eight ask.
    let store = far(&mut tiers, 8, true);
    let (found, _) = tiers
        .scan(&schema, plan(&[N], None, None), &context())
        .await;
    assert_eq!(found.len(), FILES * ROWS);
    assert_eq!(store.most.load(Ordering::SeqCst), 8);

    let store = far(&mut tiers, 2, false);
    let (found, _) = tiers
        .scan(&schema, plan(&[N], None, None), &context())
        .await;
    assert_eq!(found.len(), FILES * ROWS);
    assert!(store.most.load(Ordering::SeqCst) <= 2);

    // Large row groups beside little memory: no more than there are threads.
    let store = far(&mut tiers, 2, true);
    let small = EngineContext::new(2, 100_000).unwrap();
    let (found, _) = tiers.scan(&schema, plan(&[N], None, None), &small).await;
    assert_eq!(found.len(), FILES * ROWS);
    assert!(store.most.load(Ordering::SeqCst) <= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_reads_little() {
    let (schema, mut tiers) = files().await;
    let store = far(&mut tiers, 0, true);
    let (found, _) = tiers
        .scan(&schema, plan(&[N], None, Some(3)), &context())
        .await;
    assert_eq!(found.len(), 3);
    assert!(store.calls.load(Ordering::SeqCst) < FILES / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_scan_ends_its_reads() {
    let (schema, mut tiers) = files().await;
    let store = far(&mut tiers, usize::MAX, true);
    let input = tiers.input(&schema, plan(&[N], None, None));
    let mut stream = execute(input, Arc::new(MemoryBroker::default()), &context()).unwrap();
    let waited = tokio::time::timeout(Duration::from_millis(50), stream.next()).await;
    assert!(waited.is_err());
    while store.now.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(stream);
    while store.now.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
