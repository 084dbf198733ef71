//! Event stores: where projects send their events, how far they have come, and what is on its way.

use std::collections::HashSet;

use rakam_sources::options::Kind;
use rakam_sources::publish::StoreOptions;
use rakam_sources::published::Seen;
use uuid::Uuid;

use super::outbox::Head;
use super::storages;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::{self, Row, View, arg, quote_ident};
use crate::pg::{PgError, Result, xact};

/// A store as it is noted.
#[derive(Debug, Clone)]
pub struct EventStore {
    pub id: i32,
    pub project_id: i32,
    pub project: String,
    pub kind: Kind,
    /// The name of its foreign server; None: it was dropped.
    pub server: Option<String>,
    pub options: StoreOptions,
}

/// A new definition of where a project's events go.
pub struct NewStore<'a> {
    pub project_id: i32,
    pub project: &'a str,
    pub kind: Kind,
    pub server: &'a str,
    /// As the call had them: a JSON object.
    pub options: &'a str,
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Kafka => "kafka",
        Kind::Kinesis => "kinesis",
        Kind::Files => "files",
    }
}

/// A store that a project has or had.
struct Former {
    id: i32,
    kind: String,
    server: String,
    options: String,
    is_present: bool,
    /// Whether it has an anchor, and that one its server.
    is_tied: bool,
    has_server: bool,
}

/// Has a project's events go to a store from now on. A store that the project had before with this definition is taken again, so
/// that nothing overtakes what still waits for it; if it is the present one, it looks at its topics anew.
pub fn set(store: &NewStore<'_>) -> Result<i32> {
    let wanted = StoreOptions::parse(store.kind, store.options)?;
    let former: Vec<Former> = spi::query(
        View::Current,
        "SELECT s.store_id, s.kind, coalesce(f.srvname::text, s.server), s.options::text,
                s.store_id IS NOT DISTINCT FROM p.event_store_id, s.anchor IS NOT NULL, f.oid IS NOT NULL
         FROM rakam_internal.event_store s JOIN rakam_internal.project p USING (project_id)
         LEFT JOIN pg_catalog.pg_foreign_table t ON t.ftrelid = s.anchor
         LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver
         WHERE s.project_id = $1 ORDER BY 5 DESC, 1 DESC FOR NO KEY UPDATE OF s",
        &[arg(store.project_id)],
        |row| {
            Ok(Former {
                id: row.must(1)?,
                kind: row.must(2)?,
                server: row.must(3)?,
                options: row.must(4)?,
                is_present: row.must(5)?,
                is_tied: row.must(6)?,
                has_server: row.must(7)?,
            })
        },
    )?;
    let same = former.into_iter().find(|former| {
        former.kind == kind_name(store.kind)
            && former.server == store.server
            && StoreOptions::parse(store.kind, &former.options).is_ok_and(|own| own == wanted)
    });
    let id = match same {
        Some(former) => {
            // What was tied to a server that is gone may be on another cluster now.
            if former.is_present || former.is_tied && !former.has_server {
                spi::execute(
                    "DELETE FROM rakam_internal.event_store_topic WHERE store_id = $1",
                    &[arg(former.id)],
                )?;
            }
            if former.is_present && former.has_server {
                follow_renamed_servers()?;
            } else {
                untie(store.project_id)?;
                tie(former.id, store)?;
            }
            former.id
        }
        None => {
            untie(store.project_id)?;
            let id: i32 = spi::first(
                View::Current,
                "INSERT INTO rakam_internal.event_store (project_id, kind, server, options)
                 VALUES ($1, $2, $3, $4::text::jsonb) RETURNING store_id",
                &[
                    arg(store.project_id),
                    arg(kind_name(store.kind)),
                    arg(store.server),
                    arg(store.options),
                ],
                |row| row.must(1),
            )?
            .ok_or_else(|| PgError::internal("an event store was not stored"))?;
            tie(id, store)?;
            id
        }
    };
    spi::execute(
        "UPDATE rakam_internal.project SET event_store_id = $2,
           event_store = pg_catalog.jsonb_build_object('server', $3::text) || $4::text::jsonb
         WHERE project_id = $1",
        &[
            arg(store.project_id),
            arg(id),
            arg(store.server),
            arg(store.options),
        ],
    )?;
    Ok(id)
}

/// Has a project's events stay in Postgres from now on.
pub fn unset(project_id: i32) -> Result<()> {
    untie(project_id)?;
    spi::execute(
        "UPDATE rakam_internal.project SET event_store_id = NULL, event_store = NULL WHERE project_id = $1",
        &[arg(project_id)],
    )?;
    Ok(())
}

/// Ties a store to its server, which is not dropped by mistake then, and found again under another name.
fn tie(store_id: i32, store: &NewStore<'_>) -> Result<()> {
    // What Postgres names when somebody tries to drop the server. Names of projects have 40 bytes at most.
    let anchor = format!("event store {store_id} {}", store.project);
    spi::execute_text(&format!(
        "CREATE FOREIGN TABLE rakam_internal.{} () SERVER {}",
        quote_ident(&anchor),
        quote_ident(store.server)
    ))?;
    spi::execute(
        "UPDATE rakam_internal.event_store
         SET anchor = ('rakam_internal.' || pg_catalog.quote_ident($2))::regclass, server = $3
         WHERE store_id = $1",
        &[arg(store_id), arg(anchor.as_str()), arg(store.server)],
    )?;
    Ok(())
}

/// Takes over the new names of servers that were renamed: what a store waits for, once its server is dropped, is one of that name.
pub fn follow_renamed_servers() -> Result<()> {
    spi::execute(
        // What somebody else is at is left for the next time.
        "WITH renamed AS MATERIALIZED (
           SELECT s.store_id, f.srvname
           FROM rakam_internal.event_store s JOIN pg_catalog.pg_foreign_table t ON t.ftrelid = s.anchor
           JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver
           WHERE s.server <> f.srvname FOR NO KEY UPDATE OF s SKIP LOCKED)
         UPDATE rakam_internal.event_store s SET server = r.srvname FROM renamed r WHERE s.store_id = r.store_id",
        &[],
    )?;
    Ok(())
}

/// Unties a project's stores from their servers: nothing more is collected for them. What they still have goes to the servers of
/// the names that these have now.
pub fn untie(project_id: i32) -> Result<()> {
    let anchors: Vec<Option<String>> = spi::query(
        View::Current,
        "SELECT pg_catalog.quote_ident(c.relname) FROM rakam_internal.event_store s
         LEFT JOIN pg_catalog.pg_class c ON c.oid = s.anchor AND c.relnamespace = 'rakam_internal'::regnamespace
         WHERE s.project_id = $1 AND s.anchor IS NOT NULL",
        &[arg(project_id)],
        |row| Ok(row.get(1)),
    )?;
    spi::execute(
        "UPDATE rakam_internal.event_store s SET anchor = NULL, server = coalesce((
           SELECT f.srvname FROM pg_catalog.pg_foreign_table t JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver
           WHERE t.ftrelid = s.anchor), s.server)
         WHERE project_id = $1 AND anchor IS NOT NULL",
        &[arg(project_id)],
    )?;
    for anchor in anchors.iter().flatten() {
        spi::execute_text(&format!("DROP FOREIGN TABLE rakam_internal.{anchor}"))?;
    }
    Ok(())
}

fn of_row(row: &Row) -> Result<EventStore> {
    let kind = Kind::parse(&row.must::<String>(4)?)?;
    Ok(EventStore {
        id: row.must(1)?,
        project_id: row.must(2)?,
        project: row.must(3)?,
        kind,
        server: row.get(5),
        options: StoreOptions::parse(kind, &row.must::<String>(6)?)?,
    })
}

/// The stores for which something waits. A definition that is of no use is an error of its own, which hinders no other.
pub fn with_work(view: View) -> Result<Vec<(i32, Result<EventStore>)>> {
    spi::query(
        view,
        "SELECT s.store_id, s.project_id, p.name, s.kind,
                CASE WHEN s.anchor IS NULL THEN s.server ELSE f.srvname::text END, s.options::text
         FROM rakam_internal.event_store s JOIN rakam_internal.project p USING (project_id)
         LEFT JOIN pg_catalog.pg_foreign_table t ON t.ftrelid = s.anchor
         LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver
         WHERE EXISTS (SELECT FROM rakam_internal.outbox_0 o WHERE o.store_id = s.store_id)
            OR EXISTS (SELECT FROM rakam_internal.outbox_1 o WHERE o.store_id = s.store_id)
            OR EXISTS (SELECT FROM rakam_internal.outbox_2 o WHERE o.store_id = s.store_id)
            OR EXISTS (SELECT FROM rakam_internal.outbox_batch b WHERE b.store_id = s.store_id)
         ORDER BY s.published_at NULLS FIRST",
        &[],
        |row| Ok((row.must(1)?, of_row(row))),
    )
}

/// Whether anything waits for any store, or came with a dump.
pub fn has_work(view: View) -> Result<bool> {
    Ok(spi::first(
        view,
        "SELECT EXISTS (SELECT FROM rakam_internal.outbox_0) OR EXISTS (SELECT FROM rakam_internal.outbox_1)
             OR EXISTS (SELECT FROM rakam_internal.outbox_2) OR EXISTS (SELECT FROM rakam_internal.outbox_batch)
             OR EXISTS (SELECT FROM rakam_internal.outbox_restored r JOIN rakam_internal.event_store s USING (store_id)
                        WHERE r.collection_id = 0
                           OR EXISTS (SELECT FROM rakam_internal.collection c WHERE c.collection_id = r.collection_id))",
        &[],
        |row| row.must(1),
    )?
    .unwrap_or(false))
}

/// The newest row of the outbox.
pub fn newest(view: View) -> Result<Option<i64>> {
    Ok(spi::first(
        view,
        "SELECT max(id) FROM (SELECT max(id) AS id FROM rakam_internal.outbox_0
           UNION ALL SELECT max(id) FROM rakam_internal.outbox_1 UNION ALL SELECT max(id) FROM rakam_internal.outbox_2) o",
        &[],
        |row| Ok(row.get(1)),
    )?
    .flatten())
}

/// Whether nothing up to this row waits for any store but those whose last attempt failed.
pub fn is_done_or_struggles(view: View, newest: i64) -> Result<bool> {
    Ok(spi::first(
        view,
        "SELECT NOT EXISTS (
           SELECT FROM rakam_internal.event_store s WHERE s.last_error IS NULL
             AND (EXISTS (SELECT FROM rakam_internal.outbox_0 o WHERE o.store_id = s.store_id AND o.id <= $1)
               OR EXISTS (SELECT FROM rakam_internal.outbox_1 o WHERE o.store_id = s.store_id AND o.id <= $1)
               OR EXISTS (SELECT FROM rakam_internal.outbox_2 o WHERE o.store_id = s.store_id AND o.id <= $1)))",
        &[arg(newest)],
        |row| row.must(1),
    )?
    .unwrap_or(true))
}

/// A batch that has its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    pub origin: Uuid,
    pub publish_seq: i64,
    pub rows: Vec<Head>,
}

impl Assigned {
    pub fn ids(&self) -> Vec<i64> {
        self.rows.iter().map(|row| row.id).collect()
    }
}

/// The batch of a store that is not noted as published.
pub fn under_way(view: View, store_id: i32) -> Result<Option<Assigned>> {
    spi::first(
        view,
        "SELECT origin, publish_seq, ids, ns FROM rakam_internal.outbox_batch WHERE store_id = $1",
        &[arg(store_id)],
        |row| {
            let ids: Vec<i64> = row.must(3)?;
            let ns: Vec<i32> = row.must(4)?;
            Ok(Assigned {
                origin: uuid_of(row, 1)?,
                publish_seq: row.must(2)?,
                rows: ids
                    .into_iter()
                    .zip(ns)
                    .map(|(id, n)| Head { id, n })
                    .collect(),
            })
        },
    )
}

fn uuid_of(row: &Row, column: usize) -> Result<Uuid> {
    Ok(Uuid::from_bytes(
        *row.must::<pgrx::Uuid>(column)?.as_bytes(),
    ))
}

/// Locks a store to the end of the transaction, for who writes what belongs to it. False: somebody else is about to change it, or
/// it is gone. Nobody waits: a transaction of one project's admin, who sets its store, must not hold up the others.
pub fn try_lock(store_id: i32) -> Result<bool> {
    let locked = spi::run(
        View::Current,
        "SELECT FROM rakam_internal.event_store WHERE store_id = $1 FOR NO KEY UPDATE SKIP LOCKED",
        &[arg(store_id)],
        |_| Ok(()),
    )?;
    Ok(locked > 0)
}

/// Locks all stores of a project that is about to go.
pub fn lock_all(project_id: i32) -> Result<()> {
    spi::run(
        View::Current,
        "SELECT FROM rakam_internal.event_store WHERE project_id = $1 ORDER BY store_id FOR UPDATE",
        &[arg(project_id)],
        |_| Ok(()),
    )?;
    Ok(())
}

/// Gives a batch of these rows the store's next number. It is there after any crash once the transaction is committed. The caller
/// has locked the store.
pub fn assign(store: &EventStore, rows: Vec<Head>) -> Result<Assigned> {
    let (identity, _) = storages::identity()?;
    let cluster = format!(
        "{}/{}/{}",
        identity.system_identifier, identity.timeline, identity.database_oid
    );
    let (origin, publish_seq) = spi::first(
        View::Current,
        "UPDATE rakam_internal.event_store SET
           origin = CASE WHEN cluster IS DISTINCT FROM $2 AND publish_seq > 0 THEN pg_catalog.gen_random_uuid() ELSE origin END,
           former_origins = CASE WHEN cluster IS DISTINCT FROM $2 AND publish_seq > 0 THEN former_origins || origin
                                 ELSE former_origins END,
           publish_seq = CASE WHEN cluster IS DISTINCT FROM $2 THEN 1 ELSE publish_seq + 1 END,
           cluster = $2
         WHERE store_id = $1 RETURNING origin, publish_seq",
        &[arg(store.id), arg(cluster.as_str())],
        |row| Ok((uuid_of(row, 1)?, row.must::<i64>(2)?)),
    )?
    .ok_or_else(|| PgError::internal("an event store is gone"))?;
    let (ids, ns): (Vec<i64>, Vec<i32>) = rows.iter().map(|row| (row.id, row.n)).unzip();
    spi::execute(
        "INSERT INTO rakam_internal.outbox_batch (store_id, project_id, origin, publish_seq, ids, ns)
         VALUES ($1, $2, $3, $4, $5, $6)",
        &[
            arg(store.id),
            arg(store.project_id),
            arg(pgrx::Uuid::from_bytes(*origin.as_bytes())),
            arg(publish_seq),
            arg(ids),
            arg(ns),
        ],
    )?;
    xact::durable();
    Ok(Assigned {
        origin,
        publish_seq,
        rows,
    })
}

/// Notes a batch as published; whoever calls this has locked the store, and removes its rows as well. False: somebody has done so
/// already.
pub fn published(store_id: i32, batch: &Assigned, events: i64) -> Result<bool> {
    let origin = pgrx::Uuid::from_bytes(*batch.origin.as_bytes());
    let removed = spi::execute(
        "DELETE FROM rakam_internal.outbox_batch WHERE store_id = $1 AND origin = $2 AND publish_seq = $3",
        &[arg(store_id), arg(origin), arg(batch.publish_seq)],
    )?;
    if removed == 0 {
        return Ok(false);
    }
    spi::execute(
        "UPDATE rakam_internal.event_store SET published = published + $2, published_at = pg_catalog.clock_timestamp(),
           last_error = NULL, error_at = NULL WHERE store_id = $1",
        &[arg(store_id), arg(events)],
    )?;
    Ok(true)
}

/// Notes what a store struggles with; None: with nothing any more. The caller has locked the store.
pub fn note_error(store_id: i32, error: Option<&str>) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.event_store SET last_error = $2,
           error_at = CASE WHEN $2 IS NULL THEN NULL WHEN last_error = $2 THEN error_at ELSE pg_catalog.clock_timestamp() END
         WHERE store_id = $1 AND last_error IS DISTINCT FROM $2",
        &[arg(store_id), arg(error)],
    )?;
    Ok(())
}

/// The origins under which a project's stores have published: what has one of them was collected in this project.
pub fn origins(view: View, project_id: i32) -> Result<HashSet<Uuid>> {
    let origins = spi::query(
        view,
        "SELECT pg_catalog.unnest(former_origins || origin) FROM rakam_internal.event_store WHERE project_id = $1",
        &[arg(project_id)],
        |row| uuid_of(row, 1),
    )?;
    Ok(origins.into_iter().collect())
}

/// How many partitions of these topics a store spreads keys among, as far as that is noted.
pub fn topics(view: View, store_id: i32) -> Result<Vec<(String, i32)>> {
    spi::query(
        view,
        "SELECT topic, partitions FROM rakam_internal.event_store_topic WHERE store_id = $1",
        &[arg(store_id)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}

/// Notes that for good. The caller has locked the store.
pub fn note_topic(store_id: i32, topic: &str, partitions: i32) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.event_store_topic (store_id, topic, project_id, partitions)
         SELECT store_id, $2, project_id, $3 FROM rakam_internal.event_store WHERE store_id = $1
         ON CONFLICT (store_id, topic) DO UPDATE SET partitions = excluded.partitions",
        &[arg(store_id), arg(topic), arg(partitions)],
    )?;
    Ok(())
}

/// The newest error of a store that the caller may see and that still struggles.
pub fn last_error() -> Result<Option<String>> {
    spi::first(
        View::Current,
        "SELECT last_error FROM rakam_internal.event_store WHERE last_error IS NOT NULL ORDER BY error_at DESC LIMIT 1",
        &[],
        |row| row.must(1),
    )
}

/// What waits for the stores of projects, for `rakam.health`.
pub struct Backlog {
    pub project: String,
    pub server: String,
    pub events: i64,
    pub oldest_s: Option<f64>,
    pub last_error: Option<String>,
}

/// The stores of these projects (None: of all) that have events waiting, or are in use. Acts as the owner: the outbox is nobody's
/// to read.
pub fn backlogs(projects: Option<&[i32]>) -> Result<Vec<Backlog>> {
    let _owner = ActAs::owner();
    spi::query(
        View::Under(Snapshot::active()),
        "SELECT p.name, s.server, coalesce(b.n, 0)::int8, b.oldest_s, s.last_error
         FROM rakam_internal.event_store s JOIN rakam_internal.project p USING (project_id)
         LEFT JOIN (SELECT store_id, sum(n) AS n,
                           extract(epoch FROM pg_catalog.clock_timestamp() - min(received_at))::float8 AS oldest_s
                    FROM (SELECT store_id, n, received_at FROM rakam_internal.outbox_0
                          UNION ALL SELECT store_id, n, received_at FROM rakam_internal.outbox_1
                          UNION ALL SELECT store_id, n, received_at FROM rakam_internal.outbox_2) o
                    GROUP BY store_id) b ON b.store_id = s.store_id
         WHERE ($1 IS NULL OR s.project_id = ANY ($1)) AND (s.store_id = p.event_store_id OR b.n > 0)
         ORDER BY p.name, s.store_id",
        &[arg(projects.map(<[i32]>::to_vec))],
        |row| {
            Ok(Backlog {
                project: row.must(1)?,
                server: row.must(2)?,
                events: row.must(3)?,
                oldest_s: row.get(4),
                last_error: row.get(5),
            })
        },
    )
}

/// What splits have brought of each origin, as stored; of several splits together.
pub fn seen(source_id: i32, splits: &[String]) -> Result<Vec<(Uuid, Seen)>> {
    let mut joined: Vec<(Uuid, Seen)> = Vec::new();
    spi::run(
        View::Current,
        "SELECT origin, publish_seq, places FROM rakam_internal.origin_seen WHERE source_id = $1 AND split = ANY ($2)",
        &[arg(source_id), arg(splits.to_vec())],
        |row| {
            let origin = uuid_of(row, 1)?;
            let seen = Seen::new(row.must(2)?, row.bytes(3).unwrap_or_default());
            match joined.iter_mut().find(|(known, _)| *known == origin) {
                Some((_, known)) => known.join(&seen),
                None => joined.push((origin, seen)),
            }
            Ok(())
        },
    )?;
    Ok(joined)
}

/// Forgets what a split has brought of an origin.
pub fn forget_seen(source_id: i32, split: &str, origin: Uuid) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.origin_seen WHERE source_id = $1 AND split = $2 AND origin = $3",
        &[
            arg(source_id),
            arg(split),
            arg(pgrx::Uuid::from_bytes(*origin.as_bytes())),
        ],
    )
    .map(drop)
}

/// Stores what a split has brought of an origin, in the transaction that stores the events.
pub fn note_seen(
    source_id: i32,
    project_id: i32,
    split: &str,
    origin: Uuid,
    seen: &Seen,
) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.origin_seen (source_id, split, origin, project_id, publish_seq, places)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (source_id, split, origin) DO UPDATE SET publish_seq = excluded.publish_seq, places = excluded.places",
        &[
            arg(source_id),
            arg(split),
            arg(pgrx::Uuid::from_bytes(*origin.as_bytes())),
            arg(project_id),
            arg(seen.publish_seq),
            arg(seen.places()),
        ],
    )?;
    Ok(())
}
