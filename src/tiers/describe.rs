//! The description of a storage, written into it (crates/lake `describe.rs`): what `rakam.rebuild_catalog` starts from.
//!
//! What changes leaves rows in `description_due`, by triggers, in its own transaction. A step takes them all, of every
//! collection, and what there is to say of them now, under one snapshot; writes one object, outside of any transaction; and
//! deletes the rows. So the background writes an object for a
//! storage when it sees after it (every ten seconds, while anything changes), however many projects do. A crash in between
//! leaves an object of which the next one says everything again.
//!
//! What was noted here of the last log may be older than what lies in the storage: the disk was set back, or another copy of
//! the database wrote under the same mark. Then, after each adoption, and where the notes are another writer's, everything is
//! said anew, behind all that is there.
//!
//! No object of a file is deleted before the storage says that the file does not count: see `manifest::deferred_due`.

use bytes::Bytes;
use rakam_lake::describe::{Header, LAST_PART, Name, PREFIX, Record, Writer};
use uuid::Uuid;

use crate::catalog::description::{self, Progress};
use crate::catalog::{rebuild, storages};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, wait};
use crate::tiers::object::Remote;
use crate::tiers::{check, owner};

/// Changes of one log.
const LOG_CHANGES: i64 = 10_000;
/// A part of a state ends behind the collection with which it is so large.
const PART_BYTES: usize = 4 << 20;
/// Everything is written anew when the logs since are as large as it was, or as this.
const LOGS_MIN_BYTES: i64 = 1 << 20;

type Outcome<T> = std::result::Result<T, Failure>;

/// Describes every storage as it is now. For called functions: whatever fails is left to the background, which tells of it.
pub fn all() -> Outcome<()> {
    for storage_id in xact::worker(|| description::due(View::Current))? {
        match storage(storage_id) {
            Err(Failure::Error(error)) => error.log(),
            outcome => outcome?,
        }
    }
    Ok(())
}

/// Before the events of a collection are written once more, after a crash: what an earlier attempt has written of them is
/// said not to count, or a catalogue made of the storage would count them twice. Under the collection's job lock.
pub fn left_behind(collection_id: i32) -> Outcome<()> {
    for storage_id in xact::worker(|| description::note_left_behind(collection_id))? {
        storage(storage_id)?;
    }
    Ok(())
}

/// Brings the description of a storage up to date. Waits for somebody else who does so.
pub fn storage(storage_id: i32) -> Outcome<()> {
    up_to_date(storage_id, &SessionLock::take(LockOn::Describe(storage_id)))
}

/// As [`storage`], unless somebody else does so.
pub fn try_storage(storage_id: i32) -> Outcome<()> {
    match SessionLock::try_take(LockOn::Describe(storage_id)) {
        Some(turn) => up_to_date(storage_id, &turn),
        None => Ok(()),
    }
}

fn up_to_date(storage_id: i32, _turn: &SessionLock) -> Outcome<()> {
    if xact::worker(|| rebuild::is_rebuilding(storage_id))? {
        return Ok(());
    }
    let Some(remote) = Remote::open(storage_id)? else {
        return Ok(());
    };
    // What a copy of the database does elsewhere is not to be told here. Where there is no fence, each has its folder.
    owner::claim(&remote)?;
    if !owner::look(&remote)? && xact::worker(|| storages::fence(storage_id))?.standing == "foreign"
    {
        return Ok(());
    }
    let writer = xact::worker(storages::writer)?.to_string();
    let mut progress = xact::worker(|| description::progress(View::Current, storage_id, &writer))?;
    let is_large = |of: &Progress| of.log_bytes > of.state_bytes.max(LOGS_MIN_BYTES);
    if progress.state.is_some()
        && !is_large(&progress)
        && !xact::worker(|| description::is_due(storage_id))?
    {
        return Ok(());
    }
    let newest = newest(&remote, &writer)?;
    if newest > progress.number {
        progress.number = newest + 1;
        progress.state = None;
    }
    if progress.state.is_none() || is_large(&progress) {
        write_state(&remote, &writer, &mut progress)?;
    }
    while let Some((log, ids)) = xact::worker(|| next_log(storage_id))? {
        wait::check_interrupts();
        progress.number += 1;
        progress.log_bytes += log.len() as i64;
        failpoint::hit("describe.before_put");
        put(&remote, &name(&writer, progress.number, None), log)?;
        failpoint::hit("describe.after_put");
        xact::worker(|| {
            description::described(&ids)?;
            description::set_progress(storage_id, &writer, &progress)
        })?;
    }
    Ok(())
}

/// The highest number in a writer's folder; 0: it has nothing.
fn newest(remote: &Remote, writer: &str) -> Outcome<i64> {
    let mut newest = 0;
    remote.list(&format!("{PREFIX}{writer}"), |page| {
        let names = page.iter().filter_map(|object| Name::parse(&object.path));
        newest = names.map(|name| name.number).fold(newest, u64::max);
        Ok(())
    })?;
    i64::try_from(newest).map_err(|_| Failure::Error(too_large()))
}

fn name(writer: &str, number: i64, part: Option<u32>) -> Name {
    Name {
        writer: writer.to_owned(),
        number: number as u64,
        id: Uuid::now_v7(),
        part,
    }
}

fn put(remote: &Remote, name: &Name, object: Bytes) -> Outcome<()> {
    remote
        .put(&name.path(), object)
        .map_err(|e| Failure::Error(e.into()))
}

fn header(view: View) -> Result<Header> {
    let (installation, next_ids) = description::identity(view)?;
    Ok(Header::new(installation, xact::now_us(), next_ids))
}

/// What has changed and what there is to say of it, with the rows that say so. None: nothing has.
fn next_log(storage_id: i32) -> Result<Option<(Bytes, Vec<i64>)>> {
    let latest = Registered::latest();
    let view = View::Under(latest.get());
    let (changes, ids) = description::changes(view, storage_id, LOG_CHANGES)?;
    if ids.is_empty() {
        return Ok(None);
    }
    let mut log = Writer::new(&header(view)?)?;
    for record in description::records(view, storage_id, &changes)? {
        log.add(&record)?;
    }
    Ok(Some((log.finish()?, ids)))
}

/// Writes everything, each collection as it is at some moment from now on: what changes meanwhile comes in the next log. That
/// includes which of our objects nobody knows, which a catalogue made of this must not take for files that came later.
/// States before the last one are deleted, and the logs before that.
fn write_state(remote: &Remote, writer: &str, progress: &mut Progress) -> Outcome<()> {
    let storage_id = remote.storage_id;
    let whole = name(writer, progress.number, None);
    let mut bytes = 0;
    let mut parts = 0..LAST_PART;
    let mut write = |part: Option<u32>, object: Bytes| {
        bytes += object.len() as i64;
        let part = part.ok_or_else(|| Failure::Error(too_large()))?;
        put(
            remote,
            &Name {
                part: Some(part),
                ..whole.clone()
            },
            object,
        )
    };
    let begin = || xact::worker(|| Ok(Writer::new(&header(View::Current)?)?));
    let mut open = begin()?;
    check::unknown(remote, |paths| {
        let none = |path| Record::File {
            path,
            collection_id: 0,
            file: None,
        };
        let records: Vec<Record> = paths.into_iter().map(none).collect();
        add(&mut open, &records)?;
        if open.len() >= PART_BYTES {
            let full = std::mem::replace(&mut open, begin()?);
            write(parts.next(), finish(full)?)?;
        }
        Ok(())
    })?;
    let projects = xact::worker(|| description::projects(View::Current, storage_id))?;
    for project in projects {
        let Record::Project { project_id, .. } = project else {
            continue;
        };
        add(&mut open, &[project])?;
        for id in xact::worker(|| description::collection_ids(View::Current, project_id))? {
            wait::check_interrupts();
            let records = xact::worker(|| {
                let latest = Registered::latest();
                description::collection(View::Under(latest.get()), storage_id, id)
            })?;
            add(&mut open, &records)?;
            if open.len() >= PART_BYTES {
                let full = std::mem::replace(&mut open, begin()?);
                write(parts.next(), finish(full)?)?;
            }
        }
    }
    add(
        &mut open,
        &xact::worker(|| description::out_of_use(View::Current, storage_id))?,
    )?;
    write(parts.next(), finish(open)?)?;
    write(Some(LAST_PART), finish(begin()?)?)?;
    let before = progress.state.replace(progress.number);
    progress.state_bytes = bytes;
    progress.log_bytes = 0;
    xact::worker(|| description::set_progress(storage_id, writer, progress))?;
    match before {
        Some(before) => delete_before(remote, writer, before as u64),
        None => Ok(()),
    }
}

fn add(writer: &mut Writer, records: &[Record]) -> Outcome<()> {
    for record in records {
        writer.add(record).map_err(|e| Failure::Error(e.into()))?;
    }
    Ok(())
}

fn finish(writer: Writer) -> Outcome<Bytes> {
    writer.finish().map_err(|e| Failure::Error(e.into()))
}

fn too_large() -> PgError {
    PgError::new("54000", "the description of a storage has too many parts")
}

/// Deletes this database's descriptions from before a state. The state itself stays until there are two newer ones.
fn delete_before(remote: &Remote, writer: &str, number: u64) -> Outcome<()> {
    let mut old = Vec::new();
    remote.list(&format!("{PREFIX}{writer}"), |page| {
        let names = page.iter().filter_map(|object| Name::parse(&object.path));
        old.extend(
            names
                .filter(|name| name.number < number)
                .map(|name| name.path()),
        );
        Ok(())
    })?;
    remote
        .delete_all(&old)
        .map_err(|e| Failure::Error(e.into()))
}
