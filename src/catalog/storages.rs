//! Storages: which there are, what the workers know of each, and what was found in them.

use std::cell::RefCell;
use std::collections::HashSet;

use rakam_lake::owner::{Identity, Writer};

use crate::pg::spi::{self, View, arg, xid8};
use crate::pg::{INVALID_OID, Oid, PgError, Result};

/// `rakam_local`: the default storage, inside Postgres.
pub const LOCAL: i32 = 1;

/// The id of a storage that is in use, by its name.
pub fn named(name: &str) -> Result<Option<i32>> {
    spi::first(
        View::Current,
        "SELECT storage_id FROM rakam_internal.storage WHERE name = $1",
        &[arg(name)],
        |row| row.must(1),
    )
}

/// Every storage that is in use.
pub fn all(view: View) -> Result<Vec<i32>> {
    spi::query(
        view,
        "SELECT storage_id FROM rakam_internal.storage ORDER BY 1",
        &[],
        |row| row.must(1),
    )
}

/// A storage outside of Postgres, and what lies in it.
pub struct Outside {
    pub name: String,
    /// None: its server is gone.
    pub url: Option<String>,
    pub files: i64,
    pub bytes: i64,
}

/// The storages outside of Postgres.
pub fn outside(view: View) -> Result<Vec<Outside>> {
    spi::query(
        view,
        "SELECT s.name, o.option_value, count(f.file_id), coalesce(sum(f.bytes), 0)::int8
         FROM rakam_internal.storage s
         LEFT JOIN rakam_internal.data_file f USING (storage_id)
         LEFT JOIN pg_catalog.pg_foreign_server v ON v.srvname = s.name
         LEFT JOIN LATERAL pg_catalog.pg_options_to_table(v.srvoptions) o ON o.option_name = 'url'
         WHERE s.kind <> 'local' GROUP BY 1, 2 ORDER BY 1",
        &[],
        |row| {
            Ok(Outside {
                name: row.must(1)?,
                url: row.get(2),
                files: row.must(3)?,
                bytes: row.must(4)?,
            })
        },
    )
}

/// The tables of all collections that do not depend on the server of their project's storage, and that server's name. By
/// the dependency a server in use is not dropped by mistake, and found again under another name; a dump does not carry it.
/// `project` NULL: of every project.
pub fn without_dependency(project: Option<&str>) -> Result<Vec<(Oid, String)>> {
    spi::query(
        View::Current,
        "SELECT c.oid, s.name
         FROM rakam_internal.project p JOIN rakam_internal.storage s USING (storage_id)
         JOIN pg_catalog.pg_foreign_server f ON f.srvname = s.name
         JOIN pg_catalog.pg_namespace n ON n.nspname = p.name
         JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = '_all' AND c.relkind = 'f'
         WHERE s.kind <> 'local' AND ($1 IS NULL OR p.name = $1) AND NOT EXISTS (
           SELECT FROM pg_catalog.pg_depend d
           WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid
             AND d.refclassid = 'pg_catalog.pg_foreign_server'::regclass AND d.refobjid = f.oid)",
        &[arg(project)],
        |row| Ok((row.oid(1).unwrap_or(INVALID_OID), row.must(2)?)),
    )
}

/// Takes over the new names of servers that were renamed.
pub fn follow_renamed_servers() -> Result<()> {
    spi::execute(
        // What somebody else is at is left for the next time.
        "WITH renamed AS MATERIALIZED (
           SELECT s.storage_id, f.srvname
           FROM rakam_internal.storage s JOIN rakam_internal.project p USING (storage_id)
           JOIN pg_catalog.pg_namespace n ON n.nspname = p.name
           JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = '_all'
           JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid
             AND d.refclassid = 'pg_catalog.pg_foreign_server'::regclass
           JOIN pg_catalog.pg_foreign_server f ON f.oid = d.refobjid AND f.srvname <> 'rakam'
           WHERE s.kind <> 'local'
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_foreign_server old WHERE old.srvname = s.name)
             AND NOT EXISTS (SELECT FROM rakam_internal.storage other WHERE other.name = f.srvname)
           FOR UPDATE OF s SKIP LOCKED)
         UPDATE rakam_internal.storage s SET name = r.srvname FROM renamed r WHERE s.storage_id = r.storage_id",
        &[],
    )?;
    Ok(())
}

/// Forgets the storages whose servers were dropped and of which nothing is left to be read or deleted.
pub fn forget_gone() -> Result<()> {
    let without_server: Vec<i32> = spi::query(
        View::Current,
        "SELECT storage_id FROM rakam_internal.storage s
         WHERE s.kind <> 'local' AND NOT EXISTS (SELECT FROM pg_catalog.pg_foreign_server f WHERE f.srvname = s.name)",
        &[],
        |row| row.must(1),
    )?;
    if without_server.is_empty() {
        return Ok(());
    }
    let gone: Vec<i32> = spi::query(
        View::Current,
        "DELETE FROM rakam_internal.storage s
         WHERE s.storage_id = ANY ($1)
           AND NOT EXISTS (SELECT FROM rakam_internal.project p WHERE p.storage_id = s.storage_id)
           AND NOT EXISTS (SELECT FROM rakam_internal.data_file f WHERE f.storage_id = s.storage_id)
           AND NOT EXISTS (SELECT FROM rakam_internal.file_deferred d WHERE d.storage_id = s.storage_id)
           AND NOT EXISTS (SELECT FROM rakam_internal.file_intent i WHERE i.storage_id = s.storage_id)
           AND NOT EXISTS (SELECT FROM rakam_internal.rebuild r
                           WHERE r.storage_id = s.storage_id AND r.finished_at IS NULL)
         RETURNING s.storage_id",
        &[arg(without_server)],
        |row| row.must(1),
    )?;
    if gone.is_empty() {
        return Ok(());
    }
    for statement in [
        "DELETE FROM rakam_internal.file_pin WHERE storage_id = ANY ($1)",
        "DELETE FROM rakam_internal.description_due WHERE storage_id = ANY ($1)",
    ] {
        spi::execute(statement, &[arg(gone.clone())])?;
    }
    Ok(())
}

/// Where a collection's files go, if its project has a storage outside of Postgres.
pub fn of_collection(collection_id: i32) -> Result<Option<i32>> {
    spi::first(
        View::Current,
        "SELECT p.storage_id FROM rakam_internal.collection c
         JOIN rakam_internal.project p USING (project_id) JOIN rakam_internal.storage s USING (storage_id)
         WHERE c.collection_id = $1 AND s.kind <> 'local'",
        &[arg(collection_id)],
        |row| row.must(1),
    )
}

thread_local! {
    static IDENTITY: RefCell<Option<(Identity, String)>> = const { RefCell::new(None) };
}

/// Which database this is, and its name. The same for the life of a process: a timeline begins with a promotion, and
/// what asks this runs on primaries only.
pub fn identity() -> Result<(Identity, String)> {
    if let Some(known) = IDENTITY.with_borrow(Clone::clone) {
        return Ok(known);
    }
    let found = spi::first(
        View::Current,
        "SELECT i.installation::text, c.system_identifier::text,
                ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int8, d.oid, d.datname::text
         FROM rakam_internal.installation i, pg_catalog.pg_control_system() c, pg_catalog.pg_database d
         WHERE d.datname = pg_catalog.current_database()",
        &[],
        |row| {
            let timeline: i64 = row.must(3)?;
            let oid = row.oid(4).unwrap_or(crate::pg::INVALID_OID);
            let identity = Identity {
                installation: row.must(1)?,
                system_identifier: row.must(2)?,
                timeline: timeline as u32,
                database_oid: u32::from(oid),
            };
            Ok((identity, row.must::<String>(5)?))
        },
    )?
    .ok_or_else(|| PgError::internal("the table of the installation is empty"))?;
    IDENTITY.set(Some(found.clone()));
    Ok(found)
}

/// The mark that names of this database's objects carry.
pub fn writer() -> Result<Writer> {
    Ok(identity()?.0.writer())
}

/// What is known of a storage's owner.
#[derive(Debug, Clone, Default)]
pub struct Fence {
    pub nonce: Option<String>,
    pub next_nonces: Vec<String>,
    pub epoch: i64,
    pub writers: Vec<String>,
    /// `new`, `ours`, `foreign` or `unfenced`, as was seen last.
    pub standing: String,
    /// The storage was seen to be this database's, and nothing has been seen since that speaks against it.
    pub is_ours: bool,
    /// Seconds since the owner object was written.
    pub age_s: Option<f64>,
    /// The manifest has files in it.
    pub has_files: bool,
}

impl Fence {
    /// What the owner object may hold if it is ours.
    pub fn nonces(&self) -> Vec<String> {
        self.nonce
            .iter()
            .chain(&self.next_nonces)
            .cloned()
            .collect()
    }
}

/// What is known of the owner of a storage; made if there is no row yet.
pub fn fence(storage_id: i32) -> Result<Fence> {
    ensure_row(storage_id)?;
    spi::first(
        View::Current,
        "SELECT nonce, next_nonces::text[], epoch, writers::text[], standing,
                extract(epoch FROM pg_catalog.clock_timestamp() - renewed_at)::float8,
                EXISTS (SELECT FROM rakam_internal.data_file f WHERE f.storage_id = s.storage_id)
         FROM rakam_internal.storage_state s WHERE storage_id = $1",
        &[arg(storage_id)],
        |row| {
            let standing: String = row.must(5)?;
            Ok(Fence {
                nonce: row.get(1),
                next_nonces: row.get(2).unwrap_or_default(),
                epoch: row.must(3)?,
                writers: row.get(4).unwrap_or_default(),
                is_ours: standing == "ours",
                standing,
                age_s: row.get(6),
                has_files: row.must(7)?,
            })
        },
    )
    .map(Option::unwrap_or_default)
}

fn ensure_row(storage_id: i32) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.storage_state (storage_id)
         SELECT storage_id FROM rakam_internal.storage WHERE storage_id = $1 ON CONFLICT DO NOTHING",
        &[arg(storage_id)],
    )?;
    Ok(())
}

/// Attempts to write the owner object that are remembered. Each waited for its answer, or its sender was killed.
const ATTEMPTS_KEPT: i32 = 100;

/// Notes the nonce that is about to be written, in a transaction before.
pub fn intend(storage_id: i32, next_nonce: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.storage_state
         SET next_nonces = next_nonces[pg_catalog.cardinality(next_nonces) + 2 - $3 :] || $2 WHERE storage_id = $1",
        &[arg(storage_id), arg(next_nonce), arg(ATTEMPTS_KEPT)],
    )?;
    Ok(())
}

/// The owner object names this database, and was written with this nonce. Attempts before that one depended on an older
/// version: they fail whenever they arrive.
pub fn owned(storage_id: i32, nonce: &str, epoch: i64, writers: &[String]) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.storage_state
         SET nonce = $2, epoch = $3, writers = $4, standing = 'ours', owner = NULL,
             next_nonces = next_nonces[coalesce(pg_catalog.array_position(next_nonces, $2), 0) + 1 :],
             renewed_at = pg_catalog.clock_timestamp()
         WHERE storage_id = $1",
        &[
            arg(storage_id),
            arg(nonce),
            arg(epoch),
            arg(writers.to_vec()),
        ],
    )?;
    Ok(())
}

/// The storage is somebody else's (`foreign`), or nobody can be sure (`unfenced`); `owner` says why.
pub fn not_owned(storage_id: i32, standing: &'static str, owner: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.storage_state SET standing = $2, owner = $3
         WHERE storage_id = $1 AND (standing, owner) IS DISTINCT FROM ($2, $3)",
        &[arg(storage_id), arg(standing), arg(owner)],
    )?;
    Ok(())
}

/// After an adoption of a storage that came with a dump: transaction ids of another server mean nothing here.
pub fn restamp_deferred(storage_id: i32) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.file_deferred SET removed_xid = pg_catalog.pg_current_xact_id()
         WHERE storage_id = $1 AND removed_xid > pg_catalog.pg_current_xact_id()",
        &[arg(storage_id)],
    )?;
    Ok(())
}

/// The storage answered.
pub fn reached(storage_id: i32) -> Result<()> {
    ensure_row(storage_id)?;
    spi::execute(
        "UPDATE rakam_internal.storage_state
         SET reached_at = pg_catalog.clock_timestamp(), failures = 0, failing_since = NULL, last_error = NULL,
             retry_at = NULL
         WHERE storage_id = $1
           AND (failures > 0 OR (reached_at BETWEEN pg_catalog.clock_timestamp() - interval '5 seconds'
                                              AND pg_catalog.clock_timestamp()) IS NOT TRUE)",
        &[arg(storage_id)],
    )?;
    Ok(())
}

/// The longest pause between two attempts on a storage that fails, seconds: one small request each. A time to wait for
/// that is later than this was noted before the clock was set back, and means nothing.
const PAUSE_MAX_S: f64 = 15.0;

/// The storage did not do what was asked. It is left alone for a while, longer each time.
pub fn failed(storage_id: i32, error: &str) -> Result<()> {
    ensure_row(storage_id)?;
    spi::execute(
        "UPDATE rakam_internal.storage_state
         SET failures = failures + 1, failing_since = coalesce(failing_since, pg_catalog.clock_timestamp()),
             last_error = $2, retry_at = pg_catalog.clock_timestamp()
               + pg_catalog.make_interval(secs => least($3, pg_catalog.power(2, least(failures, 10))))
         WHERE storage_id = $1",
        &[arg(storage_id), arg(error), arg(PAUSE_MAX_S)],
    )?;
    Ok(())
}

/// How a storage stands: whether it failed last, and whether it is to be left alone for now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    pub failing: bool,
    pub waiting: bool,
}

pub fn reach(storage_id: i32) -> Result<Reach> {
    spi::first(
        View::Current,
        "SELECT failures > 0, coalesce(retry_at > t.now AND retry_at <= t.now + pg_catalog.make_interval(secs => $2), false)
         FROM rakam_internal.storage_state, (SELECT pg_catalog.clock_timestamp()) t(now) WHERE storage_id = $1",
        &[arg(storage_id), arg(PAUSE_MAX_S)],
        |row| {
            Ok(Reach {
                failing: row.must(1)?,
                waiting: row.must(2)?,
            })
        },
    )
    .map(Option::unwrap_or_default)
}

/// Storages that failed last.
pub fn failing() -> Result<Vec<i32>> {
    spi::query(
        View::Current,
        "SELECT storage_id FROM rakam_internal.storage_state WHERE failures > 0 ORDER BY 1",
        &[],
        |row| row.must(1),
    )
}

/// Collections whose files go to a storage that is to be left alone for now.
pub fn collections_held_up() -> Result<HashSet<i32>> {
    let found = spi::query(
        View::Current,
        "SELECT c.collection_id FROM rakam_internal.storage_state s
         JOIN rakam_internal.project p USING (storage_id) JOIN rakam_internal.collection c USING (project_id)
         WHERE s.retry_at > pg_catalog.clock_timestamp()
           AND s.retry_at <= pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => $1)",
        &[arg(PAUSE_MAX_S)],
        |row| row.must(1),
    )?;
    Ok(found.into_iter().collect())
}

/// Whether there is something to be done for storages: garbage, one that was not reached for `idle_s` seconds, or one not
/// compared with the manifest for `check_s`.
pub fn need_care(horizon: u64, retention_s: f64, idle_s: f64, check_s: f64) -> Result<bool> {
    Ok(spi::first(
        View::Current,
        "SELECT EXISTS (SELECT FROM rakam_internal.storage s LEFT JOIN rakam_internal.storage_state t USING (storage_id)
           WHERE s.kind <> 'local' AND (t.retry_at > n.now AND t.retry_at <= n.latest) IS NOT TRUE
             AND ((t.reached_at BETWEEN n.now - pg_catalog.make_interval(secs => $3) AND n.now) IS NOT TRUE
               OR t.checked_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $4)
               OR EXISTS (SELECT FROM rakam_internal.description_due c WHERE c.storage_id = s.storage_id)
                  AND coalesce(t.standing <> 'foreign', true)
               OR EXISTS (SELECT FROM rakam_internal.file_intent i WHERE i.storage_id = s.storage_id
                            AND i.created_at < pg_catalog.clock_timestamp() - interval '10 seconds')))
         OR EXISTS (SELECT FROM rakam_internal.file_deferred d
           LEFT JOIN rakam_internal.storage_state t USING (storage_id)
           WHERE d.removed_xid < $1 AND (t.retry_at > n.now AND t.retry_at <= n.latest) IS NOT TRUE
             AND coalesce(t.standing IN ('new', 'ours'), true)
             AND d.removed_at <= n.now - pg_catalog.make_interval(secs => $2))
         FROM (SELECT pg_catalog.clock_timestamp(),
                      pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => $5)) n(now, latest)",
        &[
            xid8(horizon),
            arg(retention_s),
            arg(idle_s),
            arg(check_s),
            arg(PAUSE_MAX_S),
        ],
        |row| row.must(1),
    )?
    .unwrap_or(false))
}

/// Whether a storage was not compared with the manifest for so long.
pub fn check_is_due(storage_id: i32, check_s: f64) -> Result<bool> {
    Ok(spi::first(
        View::Current,
        "SELECT checked_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
         FROM rakam_internal.storage_state WHERE storage_id = $1",
        &[arg(storage_id), arg(check_s)],
        |row| row.must(1),
    )?
    .unwrap_or(false))
}

/// An object as a storage lists it, or as the manifest has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub path: String,
    pub bytes: i64,
}

/// A data file as a comparison needs it.
#[derive(Debug, Clone)]
pub struct File {
    pub file_id: i64,
    pub path: String,
    pub bytes: i64,
}

/// Files of a storage, by id, some at a time. Of `rakam_local` with the size that is stored of each object.
pub fn files_after(storage_id: i32, file_id: i64, limit: i64) -> Result<Vec<File>> {
    spi::query(
        View::Current,
        "SELECT file_id, path, bytes FROM rakam_internal.data_file
         WHERE storage_id = $1 AND file_id > $2 ORDER BY file_id LIMIT $3",
        &[arg(storage_id), arg(file_id), arg(limit)],
        |row| {
            Ok(File {
                file_id: row.must(1)?,
                path: row.must(2)?,
                bytes: row.must(3)?,
            })
        },
    )
}

/// Objects of the default storage with paths after this one, and their sizes.
pub fn local_objects_after(path: &str, limit: i64) -> Result<Vec<Listed>> {
    spi::query(
        View::Current,
        "SELECT o.path, (SELECT sum(octet_length(p.data)) FROM rakam_internal.local_object p WHERE p.path = o.path)::int8
         FROM rakam_internal.local_object o WHERE o.path > $1 AND o.part = 0 ORDER BY o.path LIMIT $2",
        &[arg(path), arg(limit)],
        |row| {
            Ok(Listed {
                path: row.must(1)?,
                bytes: row.must(2)?,
            })
        },
    )
}

/// Whether a file is (still) in the manifest.
pub fn has_file(file_id: i64) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.data_file WHERE file_id = $1",
        &[arg(file_id)],
        |_| Ok(()),
    )? > 0)
}

/// What was found of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub path: String,
    pub problem: &'static str,
    pub bytes: i64,
}

/// Notes problems, found by the comparison that began at `began_us`.
pub fn note_problems(storage_id: i32, began_us: i64, problems: &[Problem]) -> Result<()> {
    for problem in problems {
        spi::execute(
            "INSERT INTO rakam_internal.storage_problem (storage_id, path, problem, bytes, found_at)
             VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (storage_id, path) DO UPDATE SET problem = $3, bytes = $4, found_at = $5",
            &[
                arg(storage_id),
                arg(problem.path.as_str()),
                arg(problem.problem),
                arg(problem.bytes),
                spi::timestamptz(began_us),
            ],
        )?;
    }
    Ok(())
}

/// A comparison is through: what it did not find again is no problem any more.
pub fn checked(storage_id: i32, began_us: i64) -> Result<()> {
    ensure_row(storage_id)?;
    spi::execute(
        "DELETE FROM rakam_internal.storage_problem WHERE storage_id = $1 AND found_at < $2",
        &[arg(storage_id), spi::timestamptz(began_us)],
    )?;
    spi::execute(
        "UPDATE rakam_internal.storage_state SET checked_at = pg_catalog.clock_timestamp() WHERE storage_id = $1",
        &[arg(storage_id)],
    )?;
    Ok(())
}

/// What the last comparison found: path, problem, bytes.
pub fn problems(view: View, storage_id: i32) -> Result<Vec<(String, String, i64)>> {
    spi::query(
        view,
        "SELECT path, problem, bytes FROM rakam_internal.storage_problem WHERE storage_id = $1 ORDER BY problem, path",
        &[arg(storage_id)],
        |row| Ok((row.must(1)?, row.must(2)?, row.must(3)?)),
    )
}

/// An object that was an orphan is gone.
pub fn forget_problems(storage_id: i32, paths: &[String]) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.storage_problem
         WHERE storage_id = $1 AND problem = 'orphan' AND path = ANY ($2)",
        &[arg(storage_id), arg(paths.to_vec())],
    )?;
    Ok(())
}

/// How a storage stands, for people.
#[derive(Debug, Clone)]
pub struct Condition {
    pub name: String,
    pub kind: String,
    pub failing_since: Option<String>,
    pub last_error: Option<String>,
    /// Whose it is, where that is somebody else.
    pub owner: Option<String>,
    pub missing: i64,
    pub corrupt: i64,
}

pub fn conditions(view: View) -> Result<Vec<Condition>> {
    spi::query(
        view,
        "SELECT s.name, s.kind, to_char(t.failing_since, 'YYYY-MM-DD HH24:MI:SS TZ'), t.last_error,
                CASE WHEN t.standing IN ('foreign', 'unfenced') THEN t.owner END,
                (SELECT count(*) FROM rakam_internal.storage_problem p
                 WHERE p.storage_id = s.storage_id AND p.problem = 'missing'),
                (SELECT count(*) FROM rakam_internal.storage_problem p
                 WHERE p.storage_id = s.storage_id AND p.problem = 'corrupt')
         FROM rakam_internal.storage s LEFT JOIN rakam_internal.storage_state t USING (storage_id)
         ORDER BY s.storage_id",
        &[],
        |row| {
            Ok(Condition {
                name: row.must(1)?,
                kind: row.must(2)?,
                failing_since: row.get(3),
                last_error: row.get(4),
                owner: row.get(5),
                missing: row.must(6)?,
                corrupt: row.must(7)?,
            })
        },
    )
}
