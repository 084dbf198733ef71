//! Sources, their splits and how far each is stored.

use rakam_sources::options::{Kind, SourceOptions};

use crate::pg::spi::{self, Row, View, arg};
use crate::pg::{PgError, Result};

/// A source as it is noted.
#[derive(Debug, Clone)]
pub struct Source {
    pub id: i32,
    pub project_id: i32,
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

/// The source of this name.
pub fn named(view: View, project_id: i32, name: &str) -> Result<Option<Source>> {
    spi::first(
        view,
        "SELECT s.source_id, s.project_id, s.name, s.kind, f.srvname::text, s.options::text, s.is_paused, s.created_at,
                s.begun_at IS NOT NULL
         FROM rakam_internal.source s
         LEFT JOIN pg_catalog.pg_foreign_table t ON t.ftrelid = s.anchor
         LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver
         WHERE s.project_id = $1 AND s.name = $2",
        &[arg(project_id), arg(name)],
        of_row,
    )
}

fn of_row(row: &Row) -> Result<Source> {
    let kind = Kind::parse(&row.must::<String>(4)?)?;
    let options_text: String = row.must(6)?;
    Ok(Source {
        id: row.must(1)?,
        project_id: row.must(2)?,
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
