//! The Avro schema of a collection's version, for the view `rakam.schema_versions`.

use pgrx::pg_extern;
use rakam_event::avro;
use rakam_event::schema::{Field, Schema};
use rakam_event::types::FieldType;

use crate::pg::jsonb::JsonbText;
use crate::pg::{ErrorReport, PgError};

/// The Avro schema of user fields (parallel arrays of ids, names and types) after the system fields.
/// Tells nothing that its arguments do not. Errors: 22023 a type that no field has.
#[pg_extern(schema = "rakam_internal", immutable, strict, parallel_safe)]
fn avro_schema(
    project: &str,
    collection: &str,
    version: i32,
    ids: Vec<i32>,
    names: Vec<String>,
    types: Vec<String>,
) -> Result<JsonbText, ErrorReport> {
    let fields = ids
        .into_iter()
        .zip(names)
        .zip(types)
        .map(|((id, name), ty)| {
            let ty = FieldType::parse(&ty).ok_or_else(|| {
                PgError::new("22023", format!("\"{ty}\" is not the type of a field"))
            })?;
            Ok(Field {
                id,
                name,
                ty,
                added_version: version,
                column_ready: true,
            })
        })
        .collect::<Result<Vec<_>, PgError>>()?;
    let schema = avro::avro_schema(project, collection, &Schema::new(version, fields));
    Ok(JsonbText(schema.to_string()))
}
