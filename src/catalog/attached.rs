//! Attached tables: foreign files that are read as tables of a project.

use crate::pg::spi::{self, View, arg};
use crate::pg::{Oid, Result};

/// Where the rows of an attached table are.
#[derive(Debug, Clone)]
pub struct Attached {
    /// The project, and where its own storage is.
    pub project: String,
    pub storage_id: i32,
    pub url: String,
    /// The server below whose url the files must lie; None: anywhere, or in the project's own storage.
    pub storage: Option<String>,
    pub format: Option<String>,
    /// Rows, about.
    pub n: i64,
}

/// An attached table by the names in a foreign table's options, if the view's user may read it.
pub fn find(view: View, project: &str, name: &str) -> Result<Option<Attached>> {
    spi::first(
        view,
        "SELECT p.name, p.storage_id, a.url, a.storage, a.format, a.n
         FROM rakam_internal.attached_table a JOIN rakam_internal.project p USING (project_id)
         WHERE p.name = $1 AND a.name = $2",
        &[arg(project), arg(name)],
        |row| {
            Ok(Attached {
                project: row.must(1)?,
                storage_id: row.must(2)?,
                url: row.must(3)?,
                storage: row.get(4),
                format: row.get(5),
                n: row.must(6)?,
            })
        },
    )
}

/// Whether a project has an attached table of this name. Workers only.
pub fn exists(project_id: i32, name: &str) -> Result<bool> {
    let found = spi::first(
        View::Current,
        "SELECT true FROM rakam_internal.attached_table WHERE project_id = $1 AND name = $2",
        &[arg(project_id), arg(name)],
        |row| row.must::<bool>(1),
    )?;
    Ok(found.is_some())
}

/// What is noted of a table.
#[derive(Debug)]
pub struct New<'a> {
    pub project_id: i32,
    pub name: &'a str,
    pub url: &'a str,
    pub storage: Option<&'a str>,
    pub format: Option<&'a str>,
    pub n: i64,
}

pub fn insert(new: &New<'_>) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.attached_table (project_id, name, url, storage, format, n)
         VALUES ($1, $2, $3, $4, $5, $6)",
        &[
            arg(new.project_id),
            arg(new.name),
            arg(new.url),
            arg(new.storage),
            arg(new.format),
            arg(new.n),
        ],
    )?;
    Ok(())
}

/// Returns false if there is none.
pub fn delete(project_id: i32, name: &str) -> Result<bool> {
    let deleted = spi::execute(
        "DELETE FROM rakam_internal.attached_table WHERE project_id = $1 AND name = $2",
        &[arg(project_id), arg(name)],
    )?;
    Ok(deleted == 1)
}

/// The foreign tables in the project's schema that read it: one, unless somebody has made more.
pub fn tables(project: &str, name: &str) -> Result<Vec<Oid>> {
    spi::query(
        View::Current,
        "SELECT c.oid FROM pg_catalog.pg_foreign_table t
         JOIN pg_catalog.pg_class c ON c.oid = t.ftrelid
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         JOIN pg_catalog.pg_foreign_server s ON s.oid = t.ftserver AND s.srvname = 'rakam'
         WHERE n.nspname = $1 AND t.ftoptions @> ARRAY['project=' || $1, 'attached=' || $2]
           AND c.relowner = (SELECT extowner FROM pg_catalog.pg_extension WHERE extname = 'rakam')
         ORDER BY c.oid",
        &[arg(project), arg(name)],
        |row| Ok(row.oid(1).unwrap_or(crate::pg::INVALID_OID)),
    )
}
