//! The values of a field, counted: what a filter in a user interface offers.

use pgrx::iter::TableIterator;
use pgrx::{default, name, pg_extern};
use rakam_event::names::{self, CollectionName};
use rakam_event::schema::EXTRA;

use crate::catalog::projects::{self as catalog, Right};
use crate::catalog::{audit, registry};
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::{self, View, arg, quote_ident, quote_literal};
use crate::pg::{ErrorReport, PgError, Result, not_null, relation};

/// The most frequent values of a field as text, with the number of their events; of equal numbers the smaller text
/// first. NULLs are not counted; `prefix` is taken literally.
/// SQL: `rakam.field_values(project text, collection text, field text, prefix text DEFAULT NULL, max_rows int DEFAULT
/// 10)`. Cost: a scan of that column.
/// Errors: 42501 no such project or no right to read it, 42704 no such collection, 42703 no such field, 22023 a
/// negative max_rows.
#[pg_extern(stable, parallel_unsafe)]
fn field_values(
    project: Option<&str>,
    collection: Option<&str>,
    field: Option<&str>,
    prefix: default!(Option<&str>, "NULL"),
    max_rows: default!(Option<i32>, "10"),
) -> std::result::Result<TableIterator<'static, (name!(value, String), name!(n, i64))>, ErrorReport>
{
    let object = collection.zip(field).map(|(c, f)| format!("{c}.{f}"));
    let rows = audit::read("field_values", project, object.as_deref(), || {
        count(
            not_null(project, "project")?,
            not_null(collection, "collection")?,
            not_null(field, "field")?,
            prefix,
            not_null(max_rows, "max_rows")?,
        )
    })?;
    Ok(TableIterator::new(rows))
}

fn count(
    project: &str,
    collection: &str,
    field: &str,
    prefix: Option<&str>,
    max_rows: i32,
) -> Result<Vec<(String, i64)>> {
    let project = catalog::authorize(project, Right::Read)?;
    let name = CollectionName::parse(collection)?;
    if max_rows < 0 {
        return Err(PgError::new("22023", "max_rows must not be negative"));
    }
    // As the caller, whose rights and snapshot count.
    let view = View::Under(Snapshot::active());
    let found = registry::collection(view, &project.name, name.as_str())?;
    let table = found
        .as_ref()
        .and_then(|c| c.ft)
        .and_then(relation::qualified_name);
    let (Some(found), Some(table)) = (found, table) else {
        return Err(PgError::new(
            "42704",
            format!("collection \"{}\" does not exist", name.as_str()),
        )
        .hint("The view rakam.collections lists a project's collections."));
    };
    let field = names::field_name(field);
    let schema = registry::schema(view, &found)?;
    let value = match schema.field(&field) {
        Some(known) if known.column_ready => format!("{}::text", quote_ident(&known.name)),
        // Not a column yet.
        Some(known) => format!("{EXTRA}->>{}", quote_literal(&known.name)),
        None => {
            return Err(PgError::new(
                "42703",
                format!(
                    "field \"{field}\" of collection \"{}\" does not exist",
                    found.name
                ),
            )
            .hint("The view rakam.fields lists a collection's fields."));
        }
    };
    let text = format!(
        "SELECT value, pg_catalog.count(*) FROM (SELECT {value} AS value FROM {table}) v
         WHERE value IS NOT NULL AND ($1 IS NULL OR pg_catalog.starts_with(value, $1))
         GROUP BY 1 ORDER BY 2 DESC, value COLLATE \"C\" LIMIT $2"
    );
    spi::query_text(
        view,
        &text,
        &[arg(prefix), arg(i64::from(max_rows))],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}
