//! Schemas with which the records of a source are written, by their id in Confluent's framing.

use crate::pg::spi::{self, View, arg};
use crate::pg::{PgError, Result};

/// The schemas of a source of these ids, as far as they are registered.
pub fn of_ids(view: View, source_id: i32, ids: &[i32]) -> Result<Vec<(i32, String)>> {
    spi::query(
        view,
        "SELECT schema_id, avro_schema FROM rakam_internal.source_schema
         WHERE source_id = $1 AND schema_id = ANY ($2) ORDER BY schema_id",
        &[arg(source_id), arg(ids.to_vec())],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}

/// Registers a schema; the one that has the id then, which was perhaps there before.
pub fn add(project_id: i32, source_id: i32, schema_id: i32, avro_schema: &str) -> Result<String> {
    spi::execute(
        "INSERT INTO rakam_internal.source_schema (source_id, schema_id, project_id, avro_schema)
         VALUES ($1, $2, $3, $4) ON CONFLICT (source_id, schema_id) DO NOTHING",
        &[
            arg(source_id),
            arg(schema_id),
            arg(project_id),
            arg(avro_schema),
        ],
    )?;
    spi::first(
        View::Current,
        "SELECT avro_schema FROM rakam_internal.source_schema WHERE source_id = $1 AND schema_id = $2",
        &[arg(source_id), arg(schema_id)],
        |row| row.must(1),
    )?
    .ok_or_else(|| PgError::internal("a schema just registered is not there"))
}

/// The Avro schemas of versions of a collection's schema, as the view `rakam.schema_versions` shows them.
pub fn of_versions(view: View, collection_id: i32, versions: &[i32]) -> Result<Vec<(i32, String)>> {
    spi::query(
        view,
        "SELECT v.version, v.avro_schema::text
         FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         JOIN rakam.schema_versions v ON v.project = p.name AND v.collection = c.name
         WHERE c.collection_id = $1 AND v.version = ANY ($2)",
        &[arg(collection_id), arg(versions.to_vec())],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}
