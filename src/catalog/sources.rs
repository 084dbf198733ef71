//! Sources, their splits and how far each is stored. Who reads which split is in [`leases`].

pub mod leases;

use std::collections::HashMap;

use rakam_sources::options::{Kind, SourceOptions};
use rakam_sources::plan::Progress;
use rakam_sources::position::Position;

use crate::pg::spi::{self, Row, View, arg, quote_ident};
use crate::pg::{PgError, Result};

/// The longest name of a source, in bytes.
const NAME_BYTES_MAX: usize = 63;

/// The name of a source as it is noted: ASCII letters small, as those of collections.
pub fn name_of(name: &str) -> Result<String> {
    let refused = |why: &str| {
        Err(PgError::new(
            "42602",
            format!("\"{name}\" cannot be the name of a source"),
        )
        .detail(why.to_owned()))
    };
    let name = name.trim();
    if name.is_empty() {
        return refused("It is empty.");
    }
    if name.len() > NAME_BYTES_MAX {
        return refused("A name has up to 63 bytes.");
    }
    if name.chars().any(char::is_control) {
        return refused("It has control characters.");
    }
    Ok(name.to_ascii_lowercase())
}

/// A source as it is noted.
#[derive(Debug, Clone)]
pub struct Source {
    pub id: i32,
    pub project_id: i32,
    pub project: String,
    pub name: String,
    pub kind: Kind,
    /// The name of its foreign server; None: it was dropped.
    pub server: Option<String>,
    /// As `create_source` took them.
    pub options_text: String,
    pub options: SourceOptions,
    pub is_paused: bool,
    pub created_at_us: i64,
    /// Its first splits have been found.
    pub has_begun: bool,
}

/// What makes the columns of [`of_row`].
macro_rules! select_sources {
    ($condition:literal) => {
        concat!(
            "SELECT s.source_id, s.project_id, s.name, s.kind, f.srvname::text, s.options::text, s.is_paused, s.created_at,
                    s.begun_at IS NOT NULL, p.name
             FROM rakam_internal.source s JOIN rakam_internal.project p USING (project_id)
             LEFT JOIN pg_catalog.pg_foreign_table t ON t.ftrelid = s.anchor
             LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver ",
            $condition
        )
    };
}

/// The source of this name.
pub fn named(view: View, project_id: i32, name: &str) -> Result<Option<Source>> {
    spi::first(
        view,
        select_sources!("WHERE s.project_id = $1 AND s.name = $2"),
        &[arg(project_id), arg(name)],
        of_row,
    )
}

/// The source of this id.
pub fn by_id(view: View, id: i32) -> Result<Option<Source>> {
    spi::first(
        view,
        select_sources!("WHERE s.source_id = $1"),
        &[arg(id)],
        of_row,
    )
}

/// Every source that is to be read.
pub fn active(view: View) -> Result<Vec<Source>> {
    spi::query(
        view,
        select_sources!("WHERE NOT s.is_paused ORDER BY s.source_id"),
        &[],
        of_row,
    )
}

/// How many consumers have something to read, at most `most`: one for each open split, and for each source that may get some.
pub fn demand(most: i64) -> Result<i64> {
    let demand = spi::first(
        View::Current,
        "SELECT coalesce(pg_catalog.sum(greatest(1, (
           SELECT pg_catalog.count(*) FROM (
             SELECT FROM rakam_internal.source_split t WHERE t.source_id = s.source_id AND t.state = 'open' LIMIT $1) o))), 0)::int8
         FROM rakam_internal.source s WHERE NOT s.is_paused",
        &[arg(most)],
        |row| row.must::<i64>(1),
    )?;
    Ok(demand.unwrap_or(0).min(most))
}

fn of_row(row: &Row) -> Result<Source> {
    let kind = Kind::parse(&row.must::<String>(4)?)?;
    let options_text: String = row.must(6)?;
    Ok(Source {
        id: row.must(1)?,
        project_id: row.must(2)?,
        project: row.must(10)?,
        name: row.must(3)?,
        kind,
        server: row.get(5),
        options: SourceOptions::parse(kind, &options_text)?,
        options_text,
        is_paused: row.must(7)?,
        created_at_us: row
            .timestamptz(8)
            .ok_or_else(|| PgError::internal("a source has no time of creation"))?,
        has_begun: row.must(9)?,
    })
}

/// Notes a source and ties it to its server; false: the project has one of this name. `project` is the project's name, for people
/// who try to drop the server.
pub fn create(
    (project_id, project): (i32, &str),
    name: &str,
    kind: Kind,
    server: &str,
    options: &str,
) -> Result<bool> {
    let id: Option<i32> = spi::first(
        View::Current,
        "INSERT INTO rakam_internal.source (project_id, name, kind, options) VALUES ($1, $2, $3, $4::text::jsonb)
         ON CONFLICT (project_id, name) DO NOTHING RETURNING source_id",
        &[arg(project_id), arg(name), arg(kind_name(kind)), arg(options)],
        |row| row.must(1),
    )?;
    let Some(id) = id else {
        return Ok(false);
    };
    let anchor = anchor_name(id, project, name);
    spi::execute_text(&format!(
        "CREATE FOREIGN TABLE rakam_internal.{} () SERVER {}",
        quote_ident(&anchor),
        quote_ident(server)
    ))?;
    spi::execute(
        "UPDATE rakam_internal.source
         SET anchor = ('rakam_internal.' || pg_catalog.quote_ident($2))::regclass
         WHERE source_id = $1",
        &[arg(id), arg(anchor.as_str())],
    )?;
    Ok(true)
}

/// What Postgres names when somebody tries to drop the server of a source.
fn anchor_name(id: i32, project: &str, name: &str) -> String {
    const MOST: usize = 63;
    let mut anchor = format!("source {id} {project}.{name}");
    let mut end = anchor.len().min(MOST);
    while !anchor.is_char_boundary(end) {
        end -= 1;
    }
    anchor.truncate(end);
    anchor
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Kafka => "kafka",
        Kind::Kinesis => "kinesis",
        Kind::Files => "files",
    }
}

/// Drops a source of a project, or all of them; how many there were. Nobody who reads it can store anything afterwards.
pub fn drop(project_id: i32, name: Option<&str>) -> Result<usize> {
    let anchors: Vec<Option<String>> = spi::query(
        View::Current,
        "DELETE FROM rakam_internal.source s WHERE project_id = $1 AND ($2 IS NULL OR name = $2)
         RETURNING (SELECT pg_catalog.quote_ident(c.relname) FROM pg_catalog.pg_class c
                    WHERE c.oid = s.anchor AND c.relnamespace = 'rakam_internal'::regnamespace)",
        &[arg(project_id), arg(name)],
        |row| Ok(row.get(1)),
    )?;
    for anchor in anchors.iter().flatten() {
        spi::execute_text(&format!("DROP FOREIGN TABLE rakam_internal.{anchor}"))?;
    }
    Ok(anchors.len())
}

/// Lets a source be read, or not; false: there is none. Who reads it cannot store anything any more once it is paused.
pub fn pause(project_id: i32, name: &str, paused: bool) -> Result<bool> {
    let id: Option<i32> = spi::first(
        View::Current,
        "UPDATE rakam_internal.source SET is_paused = $3, last_error = NULL, error_at = NULL
         WHERE project_id = $1 AND name = $2 RETURNING source_id",
        &[arg(project_id), arg(name), arg(paused)],
        |row| row.must(1),
    )?;
    let Some(id) = id else {
        return Ok(false);
    };
    if paused {
        spi::execute(
            "UPDATE rakam_internal.source_split
             SET epoch = pg_catalog.nextval('rakam_internal.source_epoch'), holder = NULL
             WHERE source_id = $1 AND state = 'open'",
            &[arg(id)],
        )?;
    }
    Ok(true)
}

/// What the source struggles with now; None: with nothing. False: it is gone, or somebody is changing it.
pub fn note_trouble(source_id: i32, error: Option<&str>) -> Result<bool> {
    let noted = spi::execute(
        "WITH free AS MATERIALIZED (
           SELECT source_id FROM rakam_internal.source WHERE source_id = $1 FOR NO KEY UPDATE SKIP LOCKED)
         UPDATE rakam_internal.source s
         SET last_error = $2, error_at = CASE WHEN $2 IS NOT NULL THEN pg_catalog.clock_timestamp() END
         FROM free WHERE s.source_id = free.source_id",
        &[arg(source_id), arg(error)],
    )?;
    Ok(noted > 0)
}

/// Tells who listens on `rakam_alert` that a split has stopped. A notification has less than 8000 bytes, and a character takes
/// up to six of them as JSON: long texts are cut.
pub fn alarm(source: &Source, split: &str, reason: &str) -> Result<()> {
    spi::execute(
        "SELECT pg_catalog.pg_notify('rakam_alert', pg_catalog.json_build_object(
           'project', $1::text, 'source', $2::text, 'split', pg_catalog.left($3::text, 500),
           'error', pg_catalog.left($4::text, 600))::text)",
        &[
            arg(source.project.as_str()),
            arg(source.name.as_str()),
            arg(split),
            arg(reason),
        ],
    )?;
    Ok(())
}

/// How many sources the view's user may see, which of their splits have stopped and which of them struggle, in words.
pub fn conditions(view: View) -> Result<(i64, Vec<String>, Vec<String>)> {
    let found = spi::first(
        view,
        "SELECT (SELECT pg_catalog.count(*) FROM rakam_internal.source),
                ARRAY(SELECT p.name || '.' || s.name || ' ' || t.split || ': ' || coalesce(t.error, '')
                      FROM rakam_internal.source_split t JOIN rakam_internal.source s USING (source_id)
                      JOIN rakam_internal.project p ON p.project_id = s.project_id
                      WHERE t.state = 'stopped' ORDER BY t.updated_at DESC LIMIT 10),
                ARRAY(SELECT p.name || '.' || s.name || ': ' || s.last_error
                      FROM rakam_internal.source s JOIN rakam_internal.project p USING (project_id)
                      WHERE s.last_error IS NOT NULL ORDER BY s.error_at DESC LIMIT 10)",
        &[],
        |row| {
            Ok((
                row.must(1)?,
                row.get(2).unwrap_or_default(),
                row.get(3).unwrap_or_default(),
            ))
        },
    )?;
    Ok(found.unwrap_or_default())
}

/// The splits that are noted, and whether each is at its end.
pub fn noted(source_id: i32) -> Result<HashMap<String, Progress>> {
    let splits = spi::query(
        View::Current,
        "SELECT split, state = 'ended' FROM rakam_internal.source_split WHERE source_id = $1",
        &[arg(source_id)],
        |row| {
            let progress = match row.must(2)? {
                true => Progress::Ended,
                false => Progress::Open,
            };
            Ok((row.must(1)?, progress))
        },
    )?;
    Ok(splits.into_iter().collect())
}

/// A split to be noted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSplit {
    pub split: String,
    pub position: Position,
    /// Counted as read.
    pub is_ended: bool,
}

/// Notes splits; those that are noted already stay as they are. The source has begun with them; false: it is gone, or somebody
/// is changing it.
pub fn add_splits(source_id: i32, splits: &[NewSplit]) -> Result<bool> {
    let found: Option<i32> = spi::first(
        View::Current,
        "WITH free AS MATERIALIZED (
           SELECT source_id FROM rakam_internal.source WHERE source_id = $1 FOR NO KEY UPDATE SKIP LOCKED)
         UPDATE rakam_internal.source s SET begun_at = coalesce(begun_at, pg_catalog.clock_timestamp())
         FROM free WHERE s.source_id = free.source_id RETURNING s.project_id",
        &[arg(source_id)],
        |row| row.must(1),
    )?;
    let Some(project_id) = found else {
        return Ok(false);
    };
    insert(source_id, project_id, splits)?;
    Ok(true)
}

fn insert(source_id: i32, project_id: i32, splits: &[NewSplit]) -> Result<()> {
    let (mut names, mut positions, mut offsets, mut ended) = (vec![], vec![], vec![], vec![]);
    for split in splits {
        names.push(split.split.clone());
        positions.push(position_text(&split.position)?);
        offsets.push(split.position.next_offset());
        ended.push(split.is_ended);
    }
    spi::execute(
        "INSERT INTO rakam_internal.source_split (source_id, project_id, split, position, next_offset, state)
         SELECT $1, $2, n.split, n.position::jsonb, n.next_offset::numeric, CASE WHEN n.ended THEN 'ended' ELSE 'open' END
         FROM ROWS FROM (unnest($3::text[]), unnest($4::text[]), unnest($5::text[]), unnest($6::bool[]))
              n(split, position, next_offset, ended)
         ON CONFLICT (source_id, split) DO NOTHING",
        &[
            arg(source_id),
            arg(project_id),
            arg(names),
            arg(positions),
            arg(offsets),
            arg(ended),
        ],
    )?;
    Ok(())
}

fn position_text(position: &Position) -> Result<String> {
    serde_json::to_string(position)
        .map_err(|e| PgError::internal(format!("could not encode a position: {e}")))
}

/// A position as it is noted.
fn position(text: &str) -> Result<Position> {
    serde_json::from_str(text)
        .map_err(|e| PgError::new("XX001", format!("malformed position of a split: {e}")))
}

/// A split, for who moves it by hand.
#[derive(Debug, Clone)]
pub struct Standing {
    pub split: String,
    pub position: Position,
    /// Of the last record stored, by its own time, microseconds since 1970.
    pub record_at_us: Option<i64>,
}

/// All splits of a source, locked to the end of the transaction.
pub fn lock_splits(source_id: i32) -> Result<Vec<Standing>> {
    // Splits are only added, also by `reposition`, where nobody else is changing the source.
    spi::execute(
        "SELECT FROM rakam_internal.source WHERE source_id = $1 FOR NO KEY UPDATE",
        &[arg(source_id)],
    )?;
    spi::query(
        View::Current,
        "SELECT split, position::text, record_at FROM rakam_internal.source_split
         WHERE source_id = $1 ORDER BY split FOR UPDATE",
        &[arg(source_id)],
        |row| {
            Ok(Standing {
                split: row.must(1)?,
                position: position(&row.must::<String>(2)?)?,
                record_at_us: row.timestamptz(3),
            })
        },
    )
}

/// Of these splits, those of which events could count twice if they were read again from these offsets on (NULL: from their
/// beginning): some of what was stored behind it had no `_id`, or was stored longer than `window_s` seconds ago. `window_s` 0:
/// nothing is ever found to be a copy.
pub fn not_repeatable(
    source_id: i32,
    splits: Vec<String>,
    offsets: Vec<Option<String>>,
    window_s: f64,
) -> Result<Vec<String>> {
    spi::query(
        View::Current,
        "SELECT n.split
         FROM ROWS FROM (unnest($2::text[]), unnest($3::text[])) n(split, next_offset)
         WHERE EXISTS (
           SELECT FROM (
             SELECT m.next_offset, m.since, m.lacks_id FROM rakam_internal.source_mark m
             WHERE m.source_id = $1 AND m.split = n.split
             UNION ALL
             SELECT s.next_offset, s.since, s.lacks_id FROM rakam_internal.source_split s
             WHERE s.source_id = $1 AND s.split = n.split AND s.since IS NOT NULL) m
           WHERE (n.next_offset IS NULL OR m.next_offset > n.next_offset::numeric)
             AND (m.lacks_id OR m.since <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $4)))
         ORDER BY 1",
        &[arg(source_id), arg(splits), arg(offsets), arg(window_s)],
        |row| row.must(1),
    )
}

/// Splits that are noted from now on begin there, as `start` of the options says.
pub fn set_start(source_id: i32, start: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.source SET options = options || pg_catalog.jsonb_build_object('start', $2::text)
         WHERE source_id = $1",
        &[arg(source_id), arg(start)],
    )?;
    Ok(())
}

/// Puts splits to other places and lets them be read from there, whoever reads them now; the others are forgotten with
/// `only` false. What was stored of them stays noted.
pub fn reposition(source_id: i32, splits: &[NewSplit], only: bool) -> Result<()> {
    roll_marks(source_id, 0.0)?;
    let names: Vec<String> = splits.iter().map(|split| split.split.clone()).collect();
    // Of a split that is read again the records are no copies of an event store's.
    let offsets: Vec<Option<String>> = (splits.iter())
        .map(|split| split.position.next_offset())
        .collect();
    spi::execute(
        "DELETE FROM rakam_internal.origin_seen o WHERE o.source_id = $1 AND (NOT $2 OR o.split = ANY ($3)) AND NOT EXISTS (
           SELECT FROM rakam_internal.source_split s
           JOIN ROWS FROM (unnest($3::text[]), unnest($4::text[])) n(split, next_offset) ON n.split = s.split
           WHERE s.source_id = $1 AND s.split = o.split AND n.next_offset::numeric >= s.next_offset)",
        &[
            arg(source_id),
            arg(only),
            arg(names.clone()),
            arg(offsets),
        ],
    )?;
    spi::execute(
        "DELETE FROM rakam_internal.source_split WHERE source_id = $1 AND (NOT $2 OR split = ANY ($3))",
        &[arg(source_id), arg(only), arg(names)],
    )?;
    match add_splits(source_id, splits)? {
        true => Ok(()),
        false => Err(PgError::new(
            "40001",
            "the source was changed by somebody else",
        )),
    }
}

/// Begins a new mark for splits whose newest one is older than so many seconds, and forgets marks that tell nothing more than
/// another one.
pub fn roll_marks(source_id: i32, age_s: f64) -> Result<()> {
    let rolled = spi::execute(
        "WITH due AS (
           SELECT split FROM rakam_internal.source_split
           WHERE source_id = $1 AND since <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
             AND next_offset IS NOT NULL
           FOR UPDATE SKIP LOCKED),
         kept AS (
           INSERT INTO rakam_internal.source_mark (source_id, split, project_id, next_offset, since, lacks_id)
           SELECT source_id, split, project_id, next_offset, since, lacks_id
           FROM rakam_internal.source_split JOIN due USING (split) WHERE source_id = $1
           ON CONFLICT (source_id, split, since, next_offset) DO NOTHING)
         UPDATE rakam_internal.source_split s SET since = NULL, lacks_id = false FROM due
         WHERE s.source_id = $1 AND s.split = due.split",
        &[arg(source_id), arg(age_s)],
    )?;
    if rolled > 0 {
        // One that was stored earlier, reaches less far and does not lack more than another says nothing of its own.
        spi::execute(
            "DELETE FROM rakam_internal.source_mark m WHERE source_id = $1 AND EXISTS (
               SELECT FROM rakam_internal.source_mark o
               WHERE o.source_id = m.source_id AND o.split = m.split AND o.next_offset >= m.next_offset AND o.since <= m.since
                 AND o.lacks_id >= m.lacks_id
                 AND (o.next_offset, o.since, o.lacks_id) <> (m.next_offset, m.since, m.lacks_id))",
            &[arg(source_id)],
        )?;
    }
    Ok(())
}
