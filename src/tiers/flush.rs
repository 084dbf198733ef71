//! Flush: a collection's chunks become data files.
//!
//! First transaction: which chunks, and (for storages outside of Postgres) an intent per object. Then the objects are
//! written, outside of any transaction. Last transaction: chunks out, files in, intents gone. A crash before
//! it leaves the chunks and perhaps objects that have an intent, which [`super::gc`] deletes.

use std::collections::BTreeMap;

use arrow::array::RecordBatch;
use rakam_event::schema::Schema;
use rakam_lake::period::{self, PeriodFile};
use rakam_lake::sort::{SortedRows, count_days};
use rakam_lake::storage::{DirectoryStorage, StorageUrl};
use rakam_lake::write::{FileOptions, FileWriter, WrittenFile};
use rakam_lake::{chunk, stats};
use uuid::Uuid;

use crate::catalog::manifest::{self, NewFile, StorageRow};
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::pg::locks::{self, LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, wait};
use crate::tiers::delete;

const BATCH_ROWS: usize = 8192;

/// What a flush wrote.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flushed {
    pub events: u64,
    pub files: u64,
    pub bytes: u64,
}

/// Writes all chunks that a collection has when called. Waits for another job on the collection.
pub fn collection(collection_id: i32) -> std::result::Result<Flushed, Failure> {
    let job = SessionLock::take(LockOn::CollectionJob(collection_id));
    flush_locked(collection_id, job)
}

/// As [`collection`], unless another job has the collection.
pub fn try_collection(collection_id: i32) -> std::result::Result<Flushed, Failure> {
    match SessionLock::try_take(LockOn::CollectionJob(collection_id)) {
        Some(job) => flush_locked(collection_id, job),
        None => Ok(Flushed::default()),
    }
}

fn flush_locked(collection_id: i32, _job: SessionLock) -> std::result::Result<Flushed, Failure> {
    let mut total = Flushed::default();
    // Chunks digested meanwhile are left for the next flush, so that a busy collection ends, too.
    let last = xact::worker(|| {
        let chunks = manifest::chunks(View::Current, collection_id, None)?;
        Ok(chunks.iter().map(|c| c.chunk_id).max())
    })?;
    let Some(last) = last else {
        return Ok(total);
    };
    while let Some(done) = step(collection_id, last)? {
        total.events += done.events;
        total.files += done.files;
        total.bytes += done.bytes;
    }
    Ok(total)
}

/// A file written, not yet in the manifest.
struct Output {
    path: String,
    period: PeriodFile,
    file: WrittenFile<Vec<u8>>,
}

/// One bounded part of a flush: as many chunks as fit the flush size.
struct Step {
    project: ProjectRow,
    collection: Collection,
    storage: StorageRow,
    schema: Schema,
    chunk_ids: Vec<i64>,
    outputs: Vec<Output>,
    flush_id: Uuid,
}

fn step(collection_id: i32, last: i64) -> std::result::Result<Option<Flushed>, Failure> {
    let Some(step) = xact::worker(|| prepare(collection_id, last))? else {
        return Ok(None);
    };
    failpoint::hit("flush.after_intent");
    if let Some(directory) = directory(&step.storage).map_err(Failure::Error)? {
        for output in &step.outputs {
            wait::check_interrupts();
            directory
                .put(&output.path, &output.file.sink)
                .map_err(|e| Failure::Error(e.into()))?;
        }
    }
    failpoint::hit("flush.after_upload");
    xact::worker(|| commit(&step)).map(Some)
}

/// The directory behind a storage; None for the default storage, which is a table.
pub fn directory(storage: &StorageRow) -> Result<Option<DirectoryStorage>> {
    if storage.kind == "local" {
        return Ok(None);
    }
    let url = storage.url.as_deref().ok_or_else(|| {
        PgError::new("58030", format!("storage \"{}\" has no url", storage.name))
            .hint("Its foreign server must exist and have the option url.")
    })?;
    let url = StorageUrl::parse(url)?;
    Ok(Some(DirectoryStorage::new(&url)))
}

/// First transaction: reads the chunks and makes the files in memory; announces the objects.
fn prepare(collection_id: i32, last: i64) -> Result<Option<Step>> {
    let view = View::Current;
    let Some(collection) = registry::collection_by_id(view, collection_id)? else {
        return Ok(None);
    };
    let Some(project) = registry::project_by_id(view, collection.project_id)? else {
        return Ok(None);
    };
    let storage = manifest::storage(view, project.storage_id)?
        .ok_or_else(|| PgError::internal("a project's storage is not registered"))?;
    let schema = registry::schema(view, &collection)?;
    let mut chunk_ids = Vec::new();
    let mut batches = Vec::new();
    let mut bytes = 0;
    for chunk in manifest::chunks(view, collection_id, None)? {
        wait::check_interrupts();
        if chunk.chunk_id > last
            || (bytes > 0 && bytes + i64::from(chunk.bytes) > guc::flush_size_bytes())
        {
            break;
        }
        bytes += i64::from(chunk.bytes);
        let data = manifest::chunk_data(view, chunk.chunk_id)?
            .ok_or_else(|| PgError::internal("a chunk vanished under the collection's job lock"))?;
        let batch = chunk::read(chunk.format, data.into(), &schema)?;
        batches.push(delete::without_deleted(
            collection_id,
            chunk.chunk_id,
            batch,
        )?);
        chunk_ids.push(chunk.chunk_id);
    }
    if chunk_ids.is_empty() {
        return Ok(None);
    }
    let flush_id = Uuid::now_v7();
    let outputs = write_files(&project, &collection, &schema, &batches, flush_id)?;
    if storage.kind != "local" {
        for output in &outputs {
            manifest::add_intent(
                project.storage_id,
                &output.path,
                flush_id,
                collection_id,
                "flush",
            )?;
        }
    }
    Ok(Some(Step {
        project,
        collection,
        storage,
        schema,
        chunk_ids,
        outputs,
        flush_id,
    }))
}

fn write_files(
    project: &ProjectRow,
    collection: &Collection,
    schema: &Schema,
    batches: &[RecordBatch],
    flush_id: Uuid,
) -> Result<Vec<Output>> {
    let mut counts = BTreeMap::new();
    for batch in batches {
        count_days(batch, &mut counts)?;
    }
    let plan = period::plan(&counts, guc::min_file_events());
    let target = guc::target_file_bytes() as u64;
    let mut outputs = Vec::new();
    for (index, period) in plan.files().iter().enumerate() {
        let options = FileOptions {
            project: project.name.clone(),
            collection: collection.name.clone(),
            flush_id,
            period: period.period,
            first_day: period.first_day,
        };
        let mut finish = |writer: FileWriter<Vec<u8>>| -> Result<()> {
            let path = period::object_path(
                &project.name,
                &collection.name,
                period.period,
                period.first_day,
                Uuid::now_v7(),
            );
            outputs.push(Output {
                path,
                period: *period,
                file: writer.finish()?,
            });
            Ok(())
        };
        let mut writer = FileWriter::new(schema, &options, Vec::new());
        let mut rows = 0;
        for batch in SortedRows::of_file(batches, BATCH_ROWS, &plan, index)? {
            wait::check_interrupts();
            if writer.estimated_bytes() >= target {
                finish(std::mem::replace(
                    &mut writer,
                    FileWriter::new(schema, &options, Vec::new()),
                ))?;
                rows = 0;
            }
            let batch = batch?;
            rows += batch.num_rows();
            writer.write(&batch)?;
        }
        if rows > 0 {
            finish(writer)?;
        }
    }
    Ok(outputs)
}

/// Last transaction: the same rows leave the chunks and enter the manifest.
fn commit(step: &Step) -> Result<Flushed> {
    locks::transaction(LockOn::Manifest(step.collection.id));
    let deleted = manifest::delete_chunks(&step.chunk_ids)?;
    if deleted != step.chunk_ids.len() as u64 {
        return Err(PgError::new(
            "40001",
            format!(
                "chunks of collection \"{}\" changed during a flush",
                step.collection.name
            ),
        ));
    }
    let mut flushed = Flushed::default();
    for output in &step.outputs {
        wait::check_interrupts();
        let file = &output.file;
        if step.storage.kind == "local" {
            manifest::put_object(step.project.id, &output.path, &file.sink)?;
        } else if manifest::delete_intent(step.project.storage_id, &output.path)? != 1 {
            return Err(PgError::new(
                "40001",
                "an announced object was collected as an orphan",
            ));
        }
        manifest::add_file(&NewFile {
            project_id: step.project.id,
            collection_id: step.collection.id,
            storage_id: step.project.storage_id,
            path: &output.path,
            schema_version: step.schema.version,
            period: output.period.period.as_str(),
            first_day: output.period.first_day,
            n: file.n as i64,
            bytes: file.bytes as i64,
            min_time_us: file.min_time_us,
            max_time_us: file.max_time_us,
            min_xid: file.min_xid,
            max_xid: file.max_xid,
            has_extra: file.has_extra,
            flush_id: step.flush_id,
            footer_bytes: file.footer_bytes as i32,
            footer: &file.footer,
            stats: &stats::encode(&file.stats),
        })?;
        flushed.events += file.n;
        flushed.bytes += file.bytes;
        flushed.files += 1;
    }
    manifest::add_to_stat(
        step.collection.id,
        step.project.id,
        flushed.events as i64,
        flushed.bytes as i64,
        flushed.files as i64,
    )?;
    failpoint::hit("flush.before_commit");
    Ok(flushed)
}
