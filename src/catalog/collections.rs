//! What goes with a collection, and what follows its new name. Workers only, while nothing of the collection is
//! digested, merged or flushed.

use super::former;
use super::mapper;
use super::registry::Collection;
use crate::pg::Result;
use crate::pg::spi::{self, View, arg};

/// Files that leave the manifest in one transaction, and entries that leave its log.
const FILES_AT_ONCE: i64 = 1_000;
/// Files of the default storage that are deleted in one transaction.
const OBJECTS_AT_ONCE: i64 = 16;

/// Removes every row of a collection but those of its files, which nobody looks for any more: there may be very many
/// ([`clear`]). Events that are under way under its name go with it.
pub fn delete(collection: &Collection) -> Result<()> {
    let id = [arg(collection.id)];
    for statement in [
        // Whoever stores chunks of it without its table being locked is awaited, and comes after it no more.
        "SELECT FROM rakam_internal.collection WHERE collection_id = $1 FOR UPDATE",
        "INSERT INTO rakam_internal.collection_dropped (collection_id, project_id)
         SELECT collection_id, project_id FROM rakam_internal.collection WHERE collection_id = $1",
        "DELETE FROM rakam_internal.hot_chunk WHERE collection_id = $1",
        "DELETE FROM rakam_internal.inbox_parked WHERE collection_id = $1",
        "DELETE FROM rakam_internal.invalid_value WHERE collection_id = $1",
        "DELETE FROM rakam_internal.dead_letter d USING rakam_internal.collection c
         WHERE c.collection_id = $1 AND d.project_id = c.project_id AND d.collection = c.name",
        // Its mapper stays: the next event of this name must not come in without it.
        "DELETE FROM rakam_internal.mapper_dropped d USING rakam_internal.collection c
         WHERE c.collection_id = $1 AND d.project_id = c.project_id AND d.collection = c.name",
        "DELETE FROM rakam_internal.job WHERE job_key LIKE '%/' || $1::text",
        // Its fields, statistics and counters go with it.
        "DELETE FROM rakam_internal.collection WHERE collection_id = $1",
    ] {
        spi::execute(statement, &id)?;
    }
    former::retire(collection.project_id, &collection.name, None)
}

/// Collections that were dropped and have left files in the manifest, each with its project.
pub fn dropped(view: View) -> Result<Vec<(i32, i32)>> {
    spi::query(
        view,
        "SELECT collection_id, project_id FROM rakam_internal.collection_dropped ORDER BY 1",
        &[],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}

/// Takes some files of a dropped collection out of the manifest and queues them for deletion ([`delete_objects`]); false: there
/// are none any more. Those of a project that is being dropped are left to that.
pub fn clear(collection_id: i32) -> Result<bool> {
    let some = [arg(collection_id), arg(FILES_AT_ONCE)];
    let files = spi::execute(
        "WITH due AS MATERIALIZED (
           SELECT file_id FROM rakam_internal.data_file WHERE collection_id = $1 LIMIT $2 FOR UPDATE SKIP LOCKED),
         gone AS (
           DELETE FROM rakam_internal.data_file f USING due WHERE f.file_id = due.file_id
           RETURNING f.storage_id, f.path, f.project_id),
         deferred AS (
           INSERT INTO rakam_internal.file_deferred (storage_id, path, project_id, reason)
           SELECT storage_id, path, project_id, 'collection dropped' FROM gone ON CONFLICT DO NOTHING)
         SELECT FROM gone",
        &some,
    )?;
    let entries = spi::execute(
        "DELETE FROM rakam_internal.manifest_log WHERE seq = ANY (ARRAY(
           SELECT seq FROM rakam_internal.manifest_log WHERE collection_id = $1 LIMIT $2 FOR UPDATE SKIP LOCKED))",
        &some,
    )?;
    if files + entries > 0 {
        return Ok(true);
    }
    spi::execute(
        "DELETE FROM rakam_internal.collection_dropped d WHERE d.collection_id = $1
           AND NOT EXISTS (SELECT FROM rakam_internal.data_file f WHERE f.collection_id = $1)",
        &[arg(collection_id)],
    )?;
    Ok(false)
}

/// Deletes files of the default storage that dropped collections of a project have left, a few at a time: a large one takes its
/// time, for which nobody is to be locked out. 0: there are none any more. Older snapshots see them nevertheless.
pub fn delete_objects(project_id: i32) -> Result<u64> {
    spi::execute(
        "WITH due AS MATERIALIZED (
           SELECT d.storage_id, d.path FROM rakam_internal.file_deferred d
           WHERE d.storage_id = (SELECT storage_id FROM rakam_internal.storage WHERE kind = 'local')
             AND d.project_id = $1 AND d.reason = 'collection dropped' LIMIT $2 FOR UPDATE SKIP LOCKED),
         gone AS (DELETE FROM rakam_internal.local_object o USING due WHERE o.path = due.path)
         DELETE FROM rakam_internal.file_deferred d USING due WHERE d.storage_id = due.storage_id AND d.path = due.path",
        &[arg(project_id), arg(OBJECTS_AT_ONCE)],
    )
}

/// Gives a collection another name. What is under way under the old one follows.
pub fn rename(collection: &Collection, name: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.collection SET name = $2 WHERE collection_id = $1",
        &[arg(collection.id), arg(name)],
    )?;
    spi::execute(
        "UPDATE rakam_internal.dead_letter SET collection = $3 WHERE project_id = $1 AND collection = $2",
        &[
            arg(collection.project_id),
            arg(collection.name.as_str()),
            arg(name),
        ],
    )?;
    mapper::rename(collection.project_id, &collection.name, name)?;
    former::retire(collection.project_id, &collection.name, Some(collection.id))
}

/// Removes a field: from this transaction on nobody reads what events from before have under its name.
pub fn delete_field(collection: &Collection, field_id: i32) -> Result<()> {
    let args = [arg(collection.id), arg(field_id)];
    for statement in [
        "INSERT INTO rakam_internal.dropped_field
           (collection_id, field_id, project_id, name, type, added_version, added_at, dropped_version)
         SELECT f.collection_id, f.field_id, f.project_id, f.name, f.type, f.added_version, f.added_at,
                c.schema_version + 1
         FROM rakam_internal.field f JOIN rakam_internal.collection c USING (collection_id)
         WHERE f.collection_id = $1 AND f.field_id = $2",
        "DELETE FROM rakam_internal.invalid_value v USING rakam_internal.field f
         WHERE f.collection_id = $1 AND f.field_id = $2 AND v.collection_id = $1 AND v.field = f.name",
        "DELETE FROM rakam_internal.invalid_count v USING rakam_internal.field f
         WHERE f.collection_id = $1 AND f.field_id = $2 AND v.collection_id = $1 AND v.field = f.name",
        "DELETE FROM rakam_internal.field WHERE collection_id = $1 AND field_id = $2",
    ] {
        spi::execute(statement, &args)?;
    }
    spi::execute(
        "UPDATE rakam_internal.collection SET schema_version = schema_version + 1 WHERE collection_id = $1",
        &[arg(collection.id)],
    )?;
    super::projects::announce_dropped_fields();
    Ok(())
}
