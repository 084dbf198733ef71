//! How DataFusion's Parquet source gets at our files: metadata out of the manifest's footer bytes, data from the
//! store the file lies in, every fetched byte counted and reserved in the memory pool while it lives.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use datafusion_common::Result as DfResult;
use datafusion_datasource::PartitionedFile;
use datafusion_datasource_parquet::ParquetFileReaderFactory;
use datafusion_datasource_parquet::{ParquetAccessPlan, RowGroupAccess};
use datafusion_execution::memory_pool::{MemoryConsumer, MemoryPool, MemoryReservation};
use datafusion_execution::object_store::ObjectStoreUrl;
use datafusion_physical_plan::metrics::ExecutionPlanMetricsSet;
use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::ObjectStore;
use object_store::path::Path;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, RowSelection, RowSelector};
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};
use rakam_lake::footer::parse_footer;
use rakam_lake::rows::RowSet;

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
pub(crate) struct Handle {
    store: Arc<dyn ObjectStore>,
    path: Path,
    bytes: u64,
    footer: Option<Bytes>,
    /// Kept only while a partition reads the file: the metadata of a scan's thousands would be gigabytes.
    metadata: Mutex<Weak<ParquetMetaData>>,
    opened: AtomicBool,
}

impl Handle {
    pub(crate) fn new(file: FileRef) -> Result<Self, EngineError> {
        let path = Path::parse(&file.path).map_err(|_| {
            EngineError::Internal("the path of a data file is not a valid object name".to_owned())
        })?;
        Ok(Self {
            store: file.store,
            path,
            bytes: file.bytes,
            footer: file.footer,
            metadata: Mutex::new(Weak::new()),
            opened: AtomicBool::new(false),
        })
    }

    fn metadata(&self) -> MutexGuard<'_, Weak<ParquetMetaData>> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file as DataFusion wants it. Its location is only a number: locations show up in metrics and messages.
pub(crate) fn partitioned_file(number: usize, file: FileRef) -> DfResult<PartitionedFile> {
    let (bytes, access) = (file.bytes, access_plan(&file)?);
    let handle = Arc::new(Handle::new(file)?);
    let file = PartitionedFile::new(number.to_string(), bytes).with_extension(handle);
    Ok(match access {
        Some(access) => file.with_extension(access),
        None => file,
    })
}

/// Which rows of which row groups are read; None: all. Pruning by statistics and pages and the decoder's filter take
/// further rows away from it.
fn access_plan(file: &FileRef) -> Result<Option<ParquetAccessPlan>, EngineError> {
    let Some(deleted) = file.deleted.as_ref().filter(|rows| !rows.is_empty()) else {
        return Ok(None);
    };
    let footer = file.footer.clone().ok_or_else(|| {
        EngineError::Internal("a data file with deleted rows came without its footer".to_owned())
    })?;
    let metadata = parse_footer(footer).map_err(|e| EngineError::CorruptFile {
        reason: e.to_string(),
    })?;
    let mut next = 0_u32;
    let row_groups = metadata.row_groups().iter().map(|group| {
        let start = next;
        next = u32::try_from(group.num_rows())
            .ok()
            .and_then(|rows| start.checked_add(rows))
            .ok_or_else(|| EngineError::CorruptFile {
                reason: "impossible number of rows".to_owned(),
            })?;
        Ok(access(start..next, deleted))
    });
    row_groups
        .collect::<Result<Vec<_>, _>>()
        .map(|groups| Some(ParquetAccessPlan::new(groups)))
}

/// What is read of the row group with these rows of the file.
fn access(rows: Range<u32>, deleted: &RowSet) -> RowGroupAccess {
    let (mut next, mut selectors) = (rows.start, Vec::new());
    for run in deleted.within(rows.clone()) {
        if run == rows {
            return RowGroupAccess::Skip;
        }
        if run.start > next {
            selectors.push(RowSelector::select((run.start - next) as usize));
        }
        selectors.push(RowSelector::skip(run.len()));
        next = run.end;
    }
    if selectors.is_empty() {
        return RowGroupAccess::Scan;
    }
    if rows.end > next {
        selectors.push(RowSelector::select((rows.end - next) as usize));
    }
    RowGroupAccess::Selection(RowSelection::from(selectors))
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
        let reader = Reader::new(Arc::clone(handle), &self.memory, Arc::clone(&self.counters));
        Ok(Box::new(reader))
    }
}

pub(crate) struct Reader {
    handle: Arc<Handle>,
    /// Empty itself: each fetch takes a reservation of its own from it.
    memory: MemoryReservation,
    counters: Arc<Counters>,
}

impl Reader {
    pub(crate) fn new(
        handle: Arc<Handle>,
        memory: &Arc<dyn MemoryPool>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            handle,
            memory: MemoryConsumer::new("data files").register(memory),
            counters,
        }
    }

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
