//! Data files with deleted rows are written anew without them, and so are chunks that no merge or flush comes to.
//!
//! Of a file, first the old one is read, outside of any transaction if it is outside of Postgres; then the new file is made
//! in memory and (for storages outside of Postgres) announced by an intent; then it is written, outside of any transaction;
//! last, one transaction puts it in the place of the old one. A crash before that leaves the old file with its deleted rows
//! hidden, and perhaps an object with an intent.

use bytes::Bytes;

use rakam_lake::chunk;
use rakam_lake::period::{self, Period};
use rakam_lake::read::FileReader;
use rakam_lake::rows::RowSet;
use rakam_lake::write::{FileWriter, Replaces};
use uuid::Uuid;

use crate::catalog::deletion::{self, Reduced};
use crate::catalog::dropping;
use crate::catalog::manifest;
use crate::catalog::{rebuild, registry};
use crate::ingest::append::{Target, append};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, wait};
use crate::tiers::object::{self, Home, Output, Remote};
use crate::tiers::{delete, reach};

const BATCH_ROWS: usize = 8192;
/// In the background a file or chunk is rewritten once it has lost this share of its rows …
const SHARE: f64 = 0.5;
/// … or once the first of them was deleted so many seconds ago.
const AGE_S: f64 = 3600.0;

/// Which files are worth it.
#[derive(Debug, Clone, Copy)]
struct Worth {
    share: f64,
    age_s: f64,
}

/// The collections that have files to be rewritten in the background.
pub fn due() -> std::result::Result<Vec<i32>, Failure> {
    xact::worker(|| deletion::collections_with_reduced(View::Current, SHARE, AGE_S))
}

/// Rewrites the files and chunks of a collection for which it is time, unless another job has the collection. Files
/// wait while their storage is away.
pub fn try_collection(collection_id: i32) -> std::result::Result<u64, Failure> {
    let worth = Worth {
        share: SHARE,
        age_s: AGE_S,
    };
    if xact::worker(|| dropping::concerns(collection_id))? {
        return Ok(0);
    }
    match SessionLock::try_take(LockOn::CollectionJob(collection_id)) {
        Some(job) => {
            let mut chunks = 0;
            while xact::worker(|| one_chunk(collection_id, worth))? {
                chunks += 1;
            }
            if !reach::is_open(collection_id)? {
                return Ok(chunks);
            }
            Ok(chunks + all(collection_id, worth, &job)?)
        }
        None => Ok(0),
    }
}

/// Rewrites every file and chunk of a collection that has deleted rows. Waits for another job on the collection.
pub fn collection(collection_id: i32) -> std::result::Result<u64, Failure> {
    let worth = Worth {
        share: 0.0,
        age_s: 0.0,
    };
    let job = SessionLock::take(LockOn::CollectionJob(collection_id));
    let mut chunks = 0;
    while xact::worker(|| one_chunk(collection_id, worth))? {
        chunks += 1;
    }
    Ok(chunks + all(collection_id, worth, &job)?)
}

fn all(collection_id: i32, worth: Worth, _job: &SessionLock) -> std::result::Result<u64, Failure> {
    if xact::worker(|| rebuild::is_rebuilding_of(collection_id))? {
        return Ok(0);
    }
    let (mut after, mut files, mut first) = (0, 0, None);
    while let Some(found) = xact::worker(|| find(collection_id, worth, after))? {
        after = found.old.file_id;
        match one(found) {
            Ok(()) => files += 1,
            Err(failure) if object::is_of_one(&failure) => {
                first.get_or_insert(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    first.map_or(Ok(files), Err)
}

/// Writes one chunk anew, under the collection's job lock; false: there is none to be written.
fn one_chunk(collection_id: i32, worth: Worth) -> Result<bool> {
    let view = View::Current;
    dropping::lock_manifest(collection_id)?;
    let due = deletion::next_reduced_chunk(view, collection_id, worth.share, worth.age_s)?;
    let Some(chunk_id) = due else {
        return Ok(false);
    };
    let chunks = manifest::chunks(view, collection_id, None)?;
    let chunk = chunks.iter().find(|chunk| chunk.chunk_id == chunk_id);
    let (Some(chunk), Some(data)) = (chunk, manifest::chunk_data(view, chunk_id)?) else {
        return Err(PgError::internal(
            "a chunk vanished under the collection's job lock",
        ));
    };
    let collection = registry::collection_by_id(view, collection_id)?
        .ok_or_else(|| PgError::internal("the collection of a chunk is not registered"))?;
    let schema = registry::schema(view, &collection)?;
    let batch = chunk::read(chunk.format, data.into(), &schema)?;
    let batch = delete::without_deleted(collection_id, chunk_id, batch)?;
    let target = Target {
        project_id: collection.project_id,
        collection_id,
        schema_version: schema.version,
        level: chunk.level,
        since_us: Some(chunk.created_at_us),
    };
    append(target, &batch)?;
    manifest::delete_chunks(&[chunk_id])?;
    Ok(true)
}

/// A file that is worth it.
struct Found {
    home: Home,
    old: Reduced,
}

/// A file and what takes its place.
struct Step {
    home: Home,
    old: Reduced,
    new: Output,
}

fn one(found: Found) -> std::result::Result<(), Failure> {
    let bytes = match Remote::open(found.home.storage_id)? {
        Some(remote) => {
            let read = remote.get(&found.old.path);
            Some(read.map_err(|e| Failure::Error(e.into()))?)
        }
        None => None,
    };
    let step = xact::worker(|| prepare(found, bytes))?;
    failpoint::hit("rewrite.after_intent");
    step.home.put(std::slice::from_ref(&step.new))?;
    failpoint::hit("rewrite.after_upload");
    xact::worker(|| commit(&step))
}

/// The next file. Under the collection's job lock, so that what is found stays as it is.
fn find(collection_id: i32, worth: Worth, after: i64) -> Result<Option<Found>> {
    let view = View::Current;
    let Some(old) = deletion::next_reduced(view, collection_id, after, worth.share, worth.age_s)?
    else {
        return Ok(None);
    };
    let missing =
        || PgError::internal("the collection or storage of a data file is not registered");
    let collection = registry::collection_by_id(view, collection_id)?.ok_or_else(missing)?;
    let project = registry::project_by_id(view, collection.project_id)?.ok_or_else(missing)?;
    // It stays where it is, also if the project has moved to another storage since.
    let storage = manifest::storage(view, old.storage_id)?.ok_or_else(missing)?;
    let home = Home {
        project,
        collection,
        storage_id: old.storage_id,
        storage,
        op_id: Uuid::now_v7(),
    };
    Ok(Some(Found { home, old }))
}

/// Makes the new file; `bytes` is the old one where it is outside of Postgres.
fn prepare(found: Found, bytes: Option<Bytes>) -> Result<Step> {
    let (view, Found { home, old }) = (View::Current, found);
    let bytes = match bytes {
        Some(bytes) => bytes,
        None => manifest::object_range(view, &old.path, 0, old.bytes as u64)?.into(),
    };
    let schema = registry::schema(view, &home.collection)?;
    let mut reader = FileReader::open(bytes, &schema, old.schema_version, BATCH_ROWS)?;
    let deleted = RowSet::decode(old.positions.clone().into(), old.n as u64)?;
    let period: Period = old.period.parse()?;
    let mut options = home.options(period, old.first_day);
    options.replaces = Some(Replaces {
        ids: period::object_id(&old.path).into_iter().collect(),
        outputs: Some(1),
    });
    let mut writer = FileWriter::new(reader.schema(), &options, Vec::new());
    let mut row = 0;
    while let Some(batch) = reader.next().transpose()? {
        wait::check_interrupts();
        writer.write(&deleted.remove_from(&batch, row)?)?;
        row += batch.num_rows() as u32;
    }
    if i64::from(row) != old.n {
        return Err(PgError::new(
            "XX001",
            format!(
                "a data file of collection \"{}\" has {row} rows where the manifest says {}",
                home.collection.name, old.n
            ),
        ));
    }
    let mut new = home.output(period, old.first_day, writer.finish()?)?;
    new.level = old.level;
    home.announce(&new, "rewrite")?;
    Ok(Step { home, old, new })
}

/// Last transaction: the new file for the old one.
fn commit(step: &Step) -> Result<()> {
    let (old, home) = (&step.old, &step.home);
    dropping::lock_manifest(home.collection.id)?;
    if registry::collection_by_id(View::Current, home.collection.id)?.is_none() {
        // Dropped meanwhile; the object goes by its intent.
        return Ok(());
    }
    if !manifest::remove_file(old.file_id, "rewritten without deleted events")? {
        return Err(PgError::new(
            "40001",
            format!(
                "files of collection \"{}\" changed during a rewrite",
                home.collection.name
            ),
        ));
    }
    home.enter(&step.new, old.schema_version)?;
    // The deleted events have left the totals when they were hidden.
    manifest::add_to_stat(
        home.collection.id,
        home.project.id,
        0,
        step.new.file.bytes as i64 - old.bytes,
        0,
    )?;
    failpoint::hit("rewrite.before_commit");
    Ok(())
}
