//! Objects of a storage that nobody knows, as a comparison finds them (src/tiers/check.rs), and their way out.

use std::collections::HashSet;

use rakam_lake::owner::file_name_of;

use super::{manifest, places, storages};
use crate::pg::Result;
use crate::pg::spi::{self, View, arg};

/// Of these objects, those that no manifest row, intent, pin or deferred deletion of this storage names; and those that are
/// queued as orphans already.
pub fn unknown(storage_id: i32, paths: &[String]) -> Result<Vec<String>> {
    spi::query(
        View::Current,
        "SELECT l.path FROM unnest($2::text[]) l(path)
         WHERE NOT EXISTS (SELECT FROM rakam_internal.data_file f
                           WHERE f.path = l.path COLLATE \"C\" AND f.storage_id = $1)
           AND NOT EXISTS (SELECT FROM rakam_internal.file_intent i
                           WHERE i.storage_id = $1 AND i.path = l.path COLLATE \"C\")
           AND NOT EXISTS (SELECT FROM rakam_internal.file_pin p
                           WHERE p.storage_id = $1 AND p.path = l.path COLLATE \"C\"
                             AND p.until > pg_catalog.clock_timestamp())
           AND NOT EXISTS (SELECT FROM rakam_internal.file_deferred d
                           WHERE d.storage_id = $1 AND d.path = l.path COLLATE \"C\" AND d.reason <> 'orphan')",
        &[arg(storage_id), arg(paths.to_vec())],
        |row| row.must(1),
    )
}

/// Of these names of files, those that another storage has: two of them may overlap in a way that their addresses do not show.
fn elsewhere(storage_id: i32, names: Vec<String>) -> Result<HashSet<String>> {
    if names.is_empty() {
        return Ok(HashSet::new());
    }
    let found = spi::query(
        View::Current,
        "SELECT l.name FROM unnest($2::text[]) l(name)
         WHERE EXISTS (SELECT FROM rakam_internal.data_file f
                       WHERE pg_catalog.right(f.path, 44) = l.name COLLATE \"C\" AND f.storage_id <> $1)
            OR EXISTS (SELECT FROM rakam_internal.file_intent i
                       WHERE pg_catalog.right(i.path, 44) = l.name COLLATE \"C\" AND i.storage_id <> $1)
            OR EXISTS (SELECT FROM rakam_internal.file_deferred d
                       WHERE pg_catalog.right(d.path, 44) = l.name COLLATE \"C\" AND d.storage_id <> $1
                         AND d.reason <> 'orphan')",
        &[arg(storage_id), arg(names)],
        |row| row.must(1),
    )?;
    Ok(found.into_iter().collect())
}

/// Of these objects, those that are nobody's: unknown to this storage and by their names to every other one, and read by no
/// attached table. Those that are queued already are among them.
pub fn among(storage_id: i32, paths: &[String]) -> Result<Vec<String>> {
    let mut found = unknown(storage_id, paths)?;
    let names = found.iter().filter_map(|path| file_name_of(path));
    let elsewhere = elsewhere(storage_id, names.map(str::to_owned).collect())?;
    found.retain(|path| file_name_of(path).is_none_or(|name| !elsewhere.contains(name)));
    // Somebody's table: a copy of our files, too.
    if !found.is_empty()
        && let Some(storage) = (places::storages(View::Current)?.into_iter())
            .find(|storage| storage.storage_id == storage_id)
    {
        let attached = places::attached()?;
        found.retain(|path| {
            let place = storage.place.below(path);
            !attached.iter().any(|table| place.lies_in(table))
        });
    }
    Ok(found)
}

/// Whether an upload of this object is announced, for whichever storage.
pub fn is_announced(storage_id: i32, path: &str) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.file_intent
         WHERE storage_id = $1 AND path = $2 OR storage_id <> $1 AND pg_catalog.right(path, 44) = $3",
        &[arg(storage_id), arg(path), arg(file_name_of(path))],
        |_| Ok(()),
    )? > 0)
}

/// Queues orphans for deletion. What we have written no snapshot has ever seen: it need not wait for the horizon. What has
/// another name may be the export of a transaction that is still to note it.
pub fn queue(storage_id: i32, paths: &[String]) -> Result<()> {
    let (ours, others): (Vec<String>, Vec<String>) =
        (paths.iter().cloned()).partition(|path| file_name_of(path).is_some());
    spi::execute(
        "INSERT INTO rakam_internal.file_deferred (storage_id, path, project_id, removed_xid, reason)
         SELECT $1, path, 0, xid, 'orphan'
         FROM (SELECT path, '3'::xid8 FROM unnest($2::text[]) o(path)
               UNION ALL SELECT path, pg_catalog.pg_current_xact_id() FROM unnest($3::text[]) o(path)) l(path, xid)
         ON CONFLICT DO NOTHING",
        &[arg(storage_id), arg(ours), arg(others)],
    )?;
    Ok(())
}

/// Takes queued orphans out of the queue that somebody knows by now.
pub fn unqueue_known(storage_id: i32) -> Result<()> {
    let mut after = String::new();
    loop {
        let queued: Vec<String> = spi::query(
            View::Current,
            "SELECT path FROM rakam_internal.file_deferred
             WHERE storage_id = $1 AND reason = 'orphan' AND path > $2 ORDER BY path LIMIT 1000",
            &[arg(storage_id), arg(after.as_str())],
            |row| row.must(1),
        )?;
        let Some(last) = queued.last() else {
            return Ok(());
        };
        after.clone_from(last);
        unqueue(storage_id, &queued)?;
    }
}

/// Of these queued orphans those that still are; the others are none any more and leave the queue.
pub fn unqueue(storage_id: i32, queued: &[String]) -> Result<Vec<String>> {
    let still = among(storage_id, queued)?;
    let kept: HashSet<&String> = still.iter().collect();
    let known: Vec<String> = (queued.iter())
        .filter(|path| !kept.contains(path))
        .cloned()
        .collect();
    if !known.is_empty() {
        manifest::delete_deferred(storage_id, &known)?;
        storages::forget_problems(storage_id, &known)?;
    }
    Ok(still)
}
