//! Compaction: small data files of a collection become few large ones, and events that are kept no longer go.
//!
//! What to merge is decided by [`rakam_lake::compaction`], pass by pass. A merge reads its inputs into scratch files, and
//! writes its outputs into the project's present storage, outside of transactions and without the collection's job lock:
//! flushes and deletions go on. Its last transaction takes the inputs out of the manifest and puts the outputs in, under
//! that lock, if the inputs are as they were read. Else (events of them were deleted meanwhile, or they were written anew) it
//! is done once more, with the lock from its beginning. A crash leaves the inputs, and perhaps objects with an intent.
//!
//! Memory: that of [`rakam_lake::merge`], and at most three files of the target size that are being written. Disk: the
//! inputs of one merge and, for the default storage, its outputs (no more than `temp_file_limit` together).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::AddAssign;
use std::sync::Arc;

use bytes::Bytes;
use rakam_event::schema::Schema;
use rakam_lake::compaction::{self, Bounds, Extent, Merge};
use rakam_lake::merge::{Finished, Input, MergedRows, PlanWriter};
use rakam_lake::period::{self, Period, Plan, plan_inside};
use rakam_lake::read;
use rakam_lake::rows::RowSet;
use rakam_lake::write::Replaces;
use uuid::Uuid;

use crate::catalog::compaction::{self as candidates, Candidate};
use crate::catalog::deletion::{self, Object};
use crate::catalog::dropping;
use crate::catalog::progress::{self, Progress};
use crate::catalog::{manifest, rebuild, registry, retention};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, scratch, wait};
use crate::tiers::object::{self, Home, Output, Remote};
use crate::tiers::reach;

/// Bytes that are fetched at once.
const FETCH_BYTES: u64 = 8 << 20;
/// Rows of which only the day is read at once.
const DAY_ROWS: usize = 65_536;
/// In the background a file is written anew without expired events once this share of its time is over: the bytes written
/// for it, over its life, are at most three times its own.
const EXPIRED_SHARE: f64 = 0.25;
/// Planning ends by itself. Should sizes turn out otherwise than planned for, the rest is for the next call.
const MAX_PASSES: usize = 64;

type Outcome<T> = std::result::Result<T, Failure>;

/// What a compaction wrote.
#[derive(Debug, Clone, Copy, Default)]
pub struct Compacted {
    pub events: u64,
    pub files: u64,
    pub bytes: u64,
}

impl AddAssign for Compacted {
    fn add_assign(&mut self, more: Self) {
        self.events += more.events;
        self.files += more.files;
        self.bytes += more.bytes;
    }
}

/// Merges all small files of a collection, and removes what is kept no longer. Waits for another compaction of it.
pub fn collection(collection_id: i32) -> Outcome<Compacted> {
    let _compaction = SessionLock::take(LockOn::Compaction(collection_id));
    let before_us = xact::worker(|| {
        rebuild::ensure_over_of(collection_id)?;
        retention::removable_before(View::Current, collection_id)
    })?;
    expire(collection_id, before_us)?;
    merge_all(collection_id, Extent::All, (before_us, 0.0))
}

/// Merges what the bound of small files over a day needs, unless another compaction has the collection. What is to be read and
/// written waits while the storage is away.
pub fn try_collection(collection_id: i32) -> Outcome<Compacted> {
    if xact::worker(|| dropping::concerns(collection_id))? {
        return Ok(Compacted::default());
    }
    let Some(_compaction) = SessionLock::try_take(LockOn::Compaction(collection_id)) else {
        return Ok(Compacted::default());
    };
    if xact::worker(|| rebuild::is_rebuilding_of(collection_id))? {
        return Ok(Compacted::default());
    }
    let before_us = xact::worker(|| retention::removable_before(View::Current, collection_id))?;
    expire(collection_id, before_us)?;
    if !reach::is_open(collection_id)? {
        return Ok(Compacted::default());
    }
    merge_all(collection_id, Extent::Bound, (before_us, EXPIRED_SHARE))
}

/// Removes the events of files from before a time, every one.
pub fn remove_before(collection_id: i32, before_us: i64) -> Outcome<()> {
    let _compaction = SessionLock::take(LockOn::Compaction(collection_id));
    xact::worker(|| rebuild::ensure_over_of(collection_id))?;
    expire(collection_id, Some(before_us))?;
    let files = xact::worker(|| candidates::files(View::Current, collection_id))?;
    let merges = partly_expired(&files, Some(before_us), 0.0);
    each(collection_id, &merges, &files, Some(before_us), |_| Ok(())).map(drop)
}

/// The collections for which the background may have something to do: those with many small files, of those that got files
/// since an entry of the manifest's log (None: of all), and those with expired events. With the entry from which to look on
/// the next time. What there is to do of each, [`try_collection`] finds out, by all of its files.
pub fn due(after: Option<i64>) -> Outcome<(Vec<i32>, i64)> {
    let bounds = bounds();
    xact::worker(|| {
        let view = View::Current;
        let newest = candidates::newest_entry(view)?;
        // A day has files of three periods at most.
        let least = (bounds.max_files_per_day + 1).div_ceil(3);
        let mut due = candidates::crowded(view, bounds.target_bytes / 2, least, after)?;
        for id in retention::collections_with_expired(view, EXPIRED_SHARE)? {
            if !due.contains(&id) {
                due.push(id);
            }
        }
        Ok((due, newest))
    })
}

fn bounds() -> Bounds {
    Bounds {
        target_bytes: guc::target_file_bytes() as u64,
        min_file_events: guc::min_file_events(),
        max_files_per_day: guc::max_files_per_day(),
    }
}

fn spans(files: &[Candidate]) -> Vec<compaction::FileSpan> {
    files.iter().map(|file| file.span).collect()
}

/// Takes files and chunks out of which every event is from before a time.
fn expire(collection_id: i32, before_us: Option<i64>) -> Outcome<()> {
    let Some(before_us) = before_us else {
        return Ok(());
    };
    let _job = SessionLock::take(LockOn::CollectionJob(collection_id));
    xact::worker(|| {
        let view = View::Current;
        let Some(collection) = registry::collection_by_id(view, collection_id)? else {
            return Ok(());
        };
        dropping::lock_manifest(collection_id)?;
        let (mut events, mut bytes, mut files) = (0, 0, 0);
        for file in candidates::files_before(view, collection_id, before_us)? {
            wait::check_interrupts();
            if manifest::remove_file(file.span.id, "kept no longer")? {
                events -= file.span.n as i64;
                bytes -= file.span.bytes as i64;
                files -= 1;
            }
        }
        if files != 0 {
            manifest::add_to_stat(collection_id, collection.project_id, events, bytes, files)?;
        }
        let chunks: Vec<i64> = manifest::chunks(view, collection_id, None)?
            .into_iter()
            .filter(|chunk| chunk.max_time_us < before_us)
            .map(|chunk| chunk.chunk_id)
            .collect();
        manifest::delete_chunks(&chunks)?;
        failpoint::hit("compact.before_expiry");
        Ok(())
    })
}

/// Files of which at least this share of the time is over, each to be written anew.
fn partly_expired(files: &[Candidate], before_us: Option<i64>, share: f64) -> Vec<Merge> {
    let Some(before_us) = before_us else {
        return Vec::new();
    };
    files
        .iter()
        .filter(|file| {
            let over = before_us.saturating_sub(file.min_time_us);
            let span = file.max_time_us.saturating_sub(file.min_time_us);
            over > 0 && over as f64 >= share * span as f64
        })
        .map(|file| Merge {
            inputs: vec![file.span.id],
            period: file.span.period,
            first_day: file.span.first_day,
        })
        .collect()
}

fn merge_all(
    collection_id: i32,
    extent: Extent,
    (before_us, share): (Option<i64>, f64),
) -> Outcome<Compacted> {
    let mut total = Compacted::default();
    let mut shown = None;
    for _ in 0..MAX_PASSES {
        let files = xact::worker(|| candidates::files(View::Current, collection_id))?;
        let mut merges = compaction::plan(&spans(&files), bounds(), extent);
        let merged: HashSet<i64> = merges.iter().flat_map(|m| m.inputs.clone()).collect();
        let expired = partly_expired(&files, before_us, share);
        merges.extend(
            expired
                .into_iter()
                .filter(|m| !merged.contains(&m.inputs[0])),
        );
        if merges.is_empty() {
            break;
        }
        if shown.is_none() {
            let project =
                xact::worker(|| registry::collection_by_id(View::Current, collection_id))?;
            let Some(project) = project else { break };
            let bytes = merges.iter().flat_map(|m| &m.inputs);
            let sizes: HashMap<i64, u64> =
                files.iter().map(|f| (f.span.id, f.span.bytes)).collect();
            shown = Some((
                project.project_id,
                bytes.filter_map(|id| sizes.get(id)).sum::<u64>(),
            ));
        }
        let (project_id, bytes) = shown.unwrap_or_default();
        total += progress::show(project_id, "compact", "bytes", bytes, |shown| {
            pass(collection_id, &merges, &files, before_us, shown)
        })?;
    }
    Ok(total)
}

fn pass(
    collection_id: i32,
    merges: &[Merge],
    files: &[Candidate],
    before_us: Option<i64>,
    shown: &mut Progress,
) -> Outcome<Compacted> {
    let mut read = 0;
    each(collection_id, merges, files, before_us, |bytes| {
        read += bytes;
        shown.set(read)
    })
}

/// Does some merges, telling after each how much it has read. One whose inputs are missing or damaged stops no other; its error
/// comes at the end.
fn each(
    collection_id: i32,
    merges: &[Merge],
    files: &[Candidate],
    before_us: Option<i64>,
    mut tell: impl FnMut(u64) -> Outcome<()>,
) -> Outcome<Compacted> {
    let (mut total, mut first) = (Compacted::default(), None);
    let by_id = by_id(files);
    for merge in merges {
        wait::check_interrupts();
        match merge_once(collection_id, merge, &by_id, before_us) {
            Ok(compacted) => total += compacted,
            Err(failure) if object::is_of_one(&failure) => {
                first.get_or_insert(failure);
            }
            Err(failure) => return Err(failure),
        }
        let inputs = merge.inputs.iter().filter_map(|id| by_id.get(id));
        tell(inputs.map(|file| file.span.bytes).sum())?;
    }
    first.map_or(Ok(total), Err)
}

type ById<'a> = HashMap<i64, &'a Candidate>;

fn by_id(files: &[Candidate]) -> ById<'_> {
    files.iter().map(|file| (file.span.id, file)).collect()
}

/// Does one merge. What it was to merge may not be there any more: then nothing is done.
fn merge_once(
    collection_id: i32,
    merge: &Merge,
    files: &ById<'_>,
    before_us: Option<i64>,
) -> Outcome<Compacted> {
    let mut inputs: Vec<&Candidate> = (merge.inputs.iter())
        .filter_map(|id| files.get(id).copied())
        .collect();
    inputs.sort_by_key(|file| file.span.id);
    match attempt(collection_id, merge, &inputs, before_us, None) {
        Err(Failure::Error(error)) if error.sqlstate == CHANGED => {}
        outcome => return outcome,
    }
    let job = SessionLock::take(LockOn::CollectionJob(collection_id));
    match attempt(collection_id, merge, &inputs, before_us, Some(job)) {
        // Gone before the lock was there.
        Err(Failure::Error(error)) if error.sqlstate == CHANGED => Ok(Compacted::default()),
        outcome => outcome,
    }
}

/// The inputs are not what they were.
const CHANGED: &str = "40001";

fn changed() -> PgError {
    PgError::new(CHANGED, "data files changed during a compaction")
}

/// What a merge is made of.
struct Step<'a> {
    home: Home,
    schema: Schema,
    inputs: &'a [&'a Candidate],
    /// What was deleted of the inputs when they were read.
    deleted: HashMap<Object, Arc<RowSet>>,
    outputs: Vec<Made>,
}

/// A file made; its bytes are in its storage or, for the default one, in a scratch file.
struct Made {
    output: Output,
    scratch: Option<File>,
}

fn attempt(
    collection_id: i32,
    merge: &Merge,
    inputs: &[&Candidate],
    before_us: Option<i64>,
    job: Option<SessionLock>,
) -> Outcome<Compacted> {
    let Some(mut step) = xact::worker(|| prepare(collection_id, inputs))? else {
        return Ok(Compacted::default());
    };
    let bytes: u64 = inputs.iter().map(|file| file.span.bytes).sum();
    scratch::ensure_room(2 * bytes).map_err(Failure::Error)?;
    let staged = match stage(inputs) {
        Ok(staged) => staged,
        Err(failure) => {
            // Perhaps somebody has written it anew, and it was deleted since.
            return Err(match xact::worker(|| are_present(inputs))? {
                true => failure,
                false => Failure::Error(changed()),
            });
        }
    };
    write(&mut step, merge, staged, before_us)?;
    failpoint::hit("compact.after_upload");
    let _job = job.unwrap_or_else(|| SessionLock::take(LockOn::CollectionJob(collection_id)));
    xact::worker(|| commit(&mut step))
}

/// First transaction: what there is to read. None: the collection is gone, or some of the files.
fn prepare<'a>(collection_id: i32, inputs: &'a [&'a Candidate]) -> Result<Option<Step<'a>>> {
    let view = View::Current;
    let Some(collection) = registry::collection_by_id(view, collection_id)? else {
        return Ok(None);
    };
    let Some(project) = registry::project_by_id(view, collection.project_id)? else {
        return Ok(None);
    };
    let storage = manifest::storage(view, project.storage_id)?
        .ok_or_else(|| PgError::internal("a project's storage is not registered"))?;
    if !are_present(inputs)? {
        return Ok(None);
    }
    let schema = registry::schema(view, &collection)?;
    Ok(Some(Step {
        deleted: deletion::deleted(view, collection_id, &objects(inputs))?,
        home: Home {
            storage_id: project.storage_id,
            project,
            collection,
            storage,
            op_id: Uuid::now_v7(),
        },
        schema,
        inputs,
        outputs: Vec::new(),
    }))
}

/// Whether all of these are still in the manifest.
fn are_present(inputs: &[&Candidate]) -> Result<bool> {
    let ids: Vec<i64> = inputs.iter().map(|file| file.span.id).collect();
    Ok(candidates::present(View::Current, &ids)? == ids.len())
}

fn objects(inputs: &[&Candidate]) -> HashMap<Object, u64> {
    inputs
        .iter()
        .map(|file| (Object::File(file.span.id), file.stored as u64))
        .collect()
}

/// The inputs as local files.
fn stage(inputs: &[&Candidate]) -> Outcome<Vec<File>> {
    let mut storages = HashMap::new();
    let mut staged = Vec::with_capacity(inputs.len());
    for input in inputs {
        let remote = match storages.entry(input.storage_id) {
            std::collections::hash_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                new.insert(Remote::open(input.storage_id)?)
            }
        };
        let mut file = scratch::create().map_err(Failure::Error)?;
        let size = input.span.bytes;
        let mut at = 0;
        while at < size {
            wait::check_interrupts();
            let end = size.min(at + FETCH_BYTES);
            let part = match remote {
                Some(remote) => {
                    let part = remote.get_range(&input.path, at..end);
                    part.map_err(|e| Failure::Error(e.into()))?
                }
                None => xact::worker(|| {
                    manifest::object_range(View::Current, &input.path, at, end - at)
                        .map(Bytes::from)
                })?,
            };
            if part.len() as u64 != end - at {
                return Err(Failure::Error(missing(&input.path)));
            }
            file.write_all(&part)
                .map_err(|e| Failure::Error(scratch_failed(&e)))?;
            at = end;
        }
        staged.push(file);
    }
    Ok(staged)
}

fn missing(path: &str) -> PgError {
    PgError::new(
        "58P01",
        format!("object \"{path}\" is missing or too short"),
    )
    .hint("Try again; rakam.check_storage lists what is wrong with a storage.")
}

fn scratch_failed(error: &std::io::Error) -> PgError {
    PgError::new("58030", format!("could not use a temporary file: {error}"))
        .hint("The data directory of the server must be writable and have room.")
}

/// Where the rows go: into the finest periods of the merge's own that are worth a file.
fn spread(merge: &Merge, step: &Step<'_>, staged: &[File]) -> Outcome<Plan> {
    let min_file_events = guc::min_file_events();
    let events: u64 = step.inputs.iter().map(|file| file.span.n).sum();
    // A file that is only rid of events stays what it is.
    if merge.period == Period::Day || merge.inputs.len() < 2 || events < min_file_events {
        return Ok(Plan::whole(merge.period, merge.first_day));
    }
    let mut counts = BTreeMap::new();
    for file in staged {
        wait::check_interrupts();
        let days = file
            .try_clone()
            .map_err(|e| Failure::Error(scratch_failed(&e)))
            .and_then(|file| read::days(file, DAY_ROWS).map_err(|e| Failure::Error(e.into())))?;
        for (day, n) in days {
            *counts.entry(day).or_default() += n;
        }
    }
    Ok(plan_inside(merge.period, &counts, min_file_events))
}

/// Reads the inputs in order and writes the outputs, each as soon as it is complete.
fn write(
    step: &mut Step<'_>,
    merge: &Merge,
    staged: Vec<File>,
    before_us: Option<i64>,
) -> Outcome<()> {
    let plan = spread(merge, step, &staged)?;
    let target = guc::target_file_bytes() as u64;
    let bytes: u64 = step.inputs.iter().map(|file| file.span.bytes).sum();
    let mut options = step.home.options(merge.period, merge.first_day);
    options.replaces = Some(Replaces {
        ids: (step.inputs.iter())
            .filter_map(|file| period::object_id(&file.path))
            .collect(),
        // No file ends below half of the target.
        outputs: (plan.files().len() == 1 && bytes < target / 4).then_some(1),
    });
    let inputs = (step.inputs.iter().zip(staged))
        .map(|(input, file)| Input {
            file,
            schema_version: input.schema_version,
            n: input.stored as u64,
            deleted: step.deleted.get(&Object::File(input.span.id)).cloned(),
        })
        .collect();
    let failed = |e: rakam_lake::LakeError| Failure::Error(e.into());
    let rows = MergedRows::open(inputs, &step.schema, before_us).map_err(failed)?;
    let level = step.inputs.iter().map(|file| file.level).max().unwrap_or(0);
    let level = match merge.inputs.len() {
        1 => level,
        _ => level.saturating_add(1),
    };
    let mut writer = PlanWriter::<Vec<u8>>::new(&step.schema, &options, plan, target);
    for batch in rows {
        wait::check_interrupts();
        let sink = || Ok::<_, PgError>(Vec::new());
        let finished = writer
            .write(&batch.map_err(failed)?, sink)
            .map_err(Failure::Error)?;
        keep(step, finished, level)?;
    }
    let rest = writer.finish().map_err(failed)?;
    keep(step, rest, level)
}

/// Brings finished files to where they are kept until the last transaction.
fn keep(step: &mut Step<'_>, finished: Vec<Finished<Vec<u8>>>, level: i16) -> Outcome<()> {
    for (place, file) in finished {
        let output = xact::worker(|| {
            let mut output = step.home.output(place.period, place.first_day, file)?;
            output.level = level;
            step.home.announce(&output, "compact")?;
            Ok(output)
        });
        let mut output = output?;
        failpoint::hit("compact.after_intent");
        step.home.put(std::slice::from_ref(&output))?;
        let bytes = output.take_bytes();
        let scratch = match step.home.storage.is_local() {
            true => {
                let mut file = scratch::create().map_err(Failure::Error)?;
                file.write_all(&bytes)
                    .map_err(|e| Failure::Error(scratch_failed(&e)))?;
                Some(file)
            }
            false => None,
        };
        step.outputs.push(Made { output, scratch });
    }
    Ok(())
}

/// Last transaction: the outputs for the inputs, if those are what was read.
fn commit(step: &mut Step<'_>) -> Result<Compacted> {
    let (view, id) = (View::Current, step.home.collection.id);
    dropping::lock_manifest(id)?;
    if registry::collection_by_id(view, id)?.is_none() {
        return Err(changed());
    }
    let now = deletion::deleted(view, id, &objects(step.inputs))?;
    // Rows are only ever added to a set.
    let len = |sets: &HashMap<Object, Arc<RowSet>>, input: &Candidate| {
        let set = sets.get(&Object::File(input.span.id));
        set.map_or(0, |rows| rows.len())
    };
    let same = |input: &&&Candidate| len(&now, input) == len(&step.deleted, input);
    if step.inputs.iter().filter(same).count() != step.inputs.len() {
        return Err(changed());
    }
    let (mut events, mut bytes, mut files) = (0, 0, 0);
    for input in step.inputs {
        wait::check_interrupts();
        if !manifest::remove_file(input.span.id, "compacted")? {
            return Err(changed());
        }
        let deleted = len(&step.deleted, input);
        events -= input.stored - deleted as i64;
        bytes -= input.span.bytes as i64;
        files -= 1;
    }
    let mut compacted = Compacted::default();
    for made in &mut step.outputs {
        wait::check_interrupts();
        if let Some(scratch) = &mut made.scratch {
            let mut data = Vec::with_capacity(made.output.file.bytes as usize);
            scratch
                .seek(SeekFrom::Start(0))
                .and_then(|_| scratch.read_to_end(&mut data))
                .map_err(|e| scratch_failed(&e))?;
            made.output.file.sink = data.into();
        }
        step.home.enter(&made.output, step.schema.version)?;
        made.output.take_bytes();
        compacted += Compacted {
            events: made.output.file.n,
            files: 1,
            bytes: made.output.file.bytes,
        };
    }
    manifest::add_to_stat(
        id,
        step.home.project.id,
        events + compacted.events as i64,
        bytes + compacted.bytes as i64,
        files + compacted.files as i64,
    )?;
    failpoint::hit("compact.before_commit");
    Ok(compacted)
}
