//! How DataFusion's Parquet source gets at our files: metadata out of the manifest's footer bytes, data from the
//! store the file lies in, every fetched byte counted and reserved in the memory pool while it lives.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use datafusion::common::Result as DfResult;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::ParquetFileReaderFactory;
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryPool, MemoryReservation};
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::ObjectStore;
use object_store::path::Path;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};
use rakam_lake::footer::parse_footer;

use crate::error::EngineError;
use crate::metrics::Counters;
use crate::scan::FileRef;

/// The address every scan names. Nothing is ever read from it: [`Handle`] carries the real store, so that no
/// address of a storage enters a registry that all queries of the process share.
pub(crate) fn placeholder_url() -> ObjectStoreUrl {
    ObjectStoreUrl::local_filesystem()
}

/// A file of the scan, shared by all the partitions that read a part of it.
#[derive(Debug)]
struct Handle {
    store: Arc<dyn ObjectStore>,
    path: Path,
    bytes: u64,
    footer: Option<Bytes>,
    /// Kept only while a partition reads the file: the metadata of a scan's thousands would be gigabytes.
    metadata: Mutex<Weak<ParquetMetaData>>,
    opened: AtomicBool,
}

impl Handle {
    fn metadata(&self) -> MutexGuard<'_, Weak<ParquetMetaData>> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file as DataFusion wants it. Its location is only a number: locations show up in metrics and messages.
pub(crate) fn partitioned_file(number: usize, file: FileRef) -> DfResult<PartitionedFile> {
    let path = Path::parse(&file.path).map_err(|_| {
        EngineError::Internal("the path of a data file is not a valid object name".to_owned())
    })?;
    let handle = Handle {
        store: file.store,
        path,
        bytes: file.bytes,
        footer: file.footer,
        metadata: Mutex::new(Weak::new()),
        opened: AtomicBool::new(false),
    };
    Ok(PartitionedFile::new(number.to_string(), file.bytes).with_extension(Arc::new(handle)))
}

#[derive(Debug)]
pub(crate) struct ReaderFactory {
    pub(crate) memory: Arc<dyn MemoryPool>,
    pub(crate) counters: Arc<Counters>,
}

impl ParquetFileReaderFactory for ReaderFactory {
    fn create_reader(
        &self,
        _partition: usize,
        file: PartitionedFile,
        _metadata_size_hint: Option<usize>,
        _metrics: &ExecutionPlanMetricsSet,
    ) -> DfResult<Box<dyn AsyncFileReader + Send>> {
        let handle = file.extension::<Arc<Handle>>().ok_or_else(|| {
            EngineError::Internal("a data file came without its store".to_owned())
        })?;
        Ok(Box::new(Reader {
            handle: Arc::clone(handle),
            memory: MemoryConsumer::new("data files").register(&self.memory),
            counters: Arc::clone(&self.counters),
        }))
    }
}

struct Reader {
    handle: Arc<Handle>,
    /// Empty itself: each fetch takes a reservation of its own from it.
    memory: MemoryReservation,
    counters: Arc<Counters>,
}

impl Reader {
    /// Reserves the bytes of a fetch before it is made.
    fn reserve(&self, ranges: &[Range<u64>]) -> ParquetResult<Vec<MemoryReservation>> {
        let reserved = ranges
            .iter()
            .map(|range| {
                let part = self.memory.new_empty();
                part.try_grow((range.end - range.start) as usize)
                    .map_err(|e| external(e.into()))?;
                Ok(part)
            })
            .collect::<ParquetResult<Vec<_>>>()?;
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        self.counters.bytes_read.fetch_add(total, Ordering::Relaxed);
        Ok(reserved)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

/// Fetched bytes that give their reservation back with the last reference to them.
struct Reserved {
    bytes: Bytes,
    _memory: MemoryReservation,
}

impl AsRef<[u8]> for Reserved {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsyncFileReader for Reader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, ParquetResult<Bytes>> {
        async move {
            let mut parts = self.get_byte_ranges(vec![range]).await?;
            Ok(parts.pop().unwrap_or_default())
        }
        .boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<Range<u64>>,
    ) -> BoxFuture<'_, ParquetResult<Vec<Bytes>>> {
        async move {
            let reserved = self.reserve(&ranges)?;
            let parts = self
                .handle
                .store
                .get_ranges(&self.handle.path, &ranges)
                .await
                .map_err(|e| external(EngineError::from_store(&e)))?;
            Ok(parts
                .into_iter()
                .zip(reserved)
                .map(|(bytes, memory)| {
                    Bytes::from_owner(Reserved {
                        bytes,
                        _memory: memory,
                    })
                })
                .collect())
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, ParquetResult<Arc<ParquetMetaData>>> {
        async move {
            let handle = Arc::clone(&self.handle);
            if let Some(metadata) = handle.metadata().upgrade() {
                return Ok(metadata);
            }
            if !handle.opened.swap(true, Ordering::Relaxed) {
                self.counters.files_opened.fetch_add(1, Ordering::Relaxed);
            }
            let metadata = match &handle.footer {
                Some(footer) => parse_footer(footer.clone()).map_err(|e| {
                    let reason = e.to_string();
                    external(EngineError::CorruptFile { reason })
                })?,
                None => ParquetMetaDataReader::new()
                    .with_page_index_policy(PageIndexPolicy::Optional)
                    .load_and_finish(&mut *self, handle.bytes)
                    .await
                    .map(Arc::new)?,
            };
            *handle.metadata() = Arc::downgrade(&metadata);
            Ok(metadata)
        }
        .boxed()
    }
}

/// Our errors on their way through Parquet's.
fn external(error: EngineError) -> ParquetError {
    ParquetError::External(Box::new(error))
}
