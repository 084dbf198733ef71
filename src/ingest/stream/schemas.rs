//! Schemas that records were written with: Confluent's, which are registered by their ids, and our own, which are the versions of
//! a collection's schema.

use std::collections::BTreeSet;

use pgrx::pg_extern;
use rakam_event::avro;
use rakam_files::avro_records::RecordSchema;
use rakam_sources::batch::Batch;
use rakam_sources::decode::Framed;
use rakam_sources::framed::Versions;
use rakam_sources::options::{Format, Framing};
use serde_json::Value;

use super::Stream;
use crate::catalog::projects::{self, Right};
use crate::catalog::{audit, source_schemas, sources};
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{ErrorReport, PgError, Result, not_null};

/// Registers the schema that a source's Avro records in Confluent's framing were written with, by the id that they carry. It
/// may be registered again, but not changed. Records that came before it are dead letters, which
/// `rakam.replay_dead_letters` tries again.
/// SQL: `rakam.register_avro_schema(project text, source text, schema_id int, avro_schema text)`.
/// Errors: 42501 no such project or not its admin, 42704 no such source, 22023 no such schema is possible, 42710 the id has
/// another schema, 55000 the source reads no such records.
#[pg_extern(volatile, parallel_unsafe)]
fn register_avro_schema(
    project: Option<&str>,
    source: Option<&str>,
    schema_id: Option<i32>,
    avro_schema: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call(
        "register_avro_schema",
        project,
        source,
        || {
            register(
                not_null(project, "project")?,
                not_null(source, "source")?,
                not_null(schema_id, "schema_id")?,
                not_null(avro_schema, "avro_schema")?,
            )
        },
    )?)
}

fn register(project: &str, name: &str, schema_id: i32, text: &str) -> Result<()> {
    xact::ensure_writable("register an Avro schema")?;
    let project = projects::authorize(project, Right::Admin)?;
    let name = &sources::name_of(name)?;
    let _owner = ActAs::owner();
    let source = {
        let latest = Registered::latest();
        sources::named(View::Under(latest.get()), project.id, name)?
    };
    let source = source.ok_or_else(|| unknown_source(name))?;
    if source.options.format != Format::Avro(Framing::Confluent) {
        return Err(PgError::new(
            "55000",
            format!("source \"{name}\" reads no records that name a schema"),
        )
        .hint("Sources with the options {\"format\": \"avro\", \"framing\": \"confluent\"} do."));
    }
    if schema_id < 0 {
        return Err(PgError::new("22023", "schema_id must not be negative"));
    }
    if let Err(reason) = RecordSchema::parse(text.as_bytes()) {
        return Err(
            PgError::new("22023", format!("invalid Avro schema: {reason}"))
                .hint("It is the JSON of a schema of type record."),
        );
    }
    let there = source_schemas::add(project.id, source.id, schema_id, text)?;
    let parsed = |text: &str| serde_json::from_str::<Value>(text).ok();
    if there != text && parsed(&there) != parsed(text) {
        return Err(PgError::new(
            "42710",
            format!("Avro schema {schema_id} of source \"{name}\" is another one already"),
        )
        .hint("The id of a schema never changes its meaning: register the new schema under its own id."));
    }
    Ok(())
}

/// There is no source of this name.
pub fn unknown_source(name: &str) -> PgError {
    PgError::new("42704", format!("source \"{name}\" does not exist"))
}

impl Stream {
    /// Learns the schemas that records of a batch name, as far as they are registered. Outside of any transaction.
    pub(super) fn learn_schemas(&mut self, batch: &Batch) -> std::result::Result<(), Failure> {
        let missing = self.decoder.missing_schemas(batch);
        if missing.is_empty() {
            return Ok(());
        }
        xact::worker(|| self.learn(View::Current, &missing))
    }

    /// Learns these schemas, as far as they are registered.
    pub(crate) fn learn(&mut self, view: View, missing: &[u32]) -> Result<()> {
        // An id beyond those of integers is nobody's.
        let ids: Vec<i32> = (missing.iter())
            .filter_map(|&id| i32::try_from(id).ok())
            .collect();
        for (id, text) in source_schemas::of_ids(view, self.source_id, &ids)? {
            // It was one when it was registered.
            if let (Ok(id), Ok(schema)) = (u32::try_from(id), RecordSchema::parse(text.as_bytes()))
            {
                self.decoder.register(id, schema);
            }
        }
        Ok(())
    }
}

/// The versions of a collection's schema that records name.
pub fn versions(view: View, collection_id: i32, records: &[Framed]) -> Result<Versions> {
    let named: BTreeSet<i32> = (records.iter())
        .filter_map(|framed| i32::try_from(framed.version).ok())
        .collect();
    let named: Vec<i32> = named.into_iter().collect();
    let mut versions = Versions::new();
    for (version, text) in source_schemas::of_versions(view, collection_id, &named)? {
        let malformed = |reason: String| {
            PgError::internal(format!(
                "version {version} of a schema is malformed: {reason}"
            ))
        };
        let schema: Value = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        let fields = avro::parse_schema(&schema).map_err(|e| malformed(e.to_string()))?;
        if let Ok(version) = u32::try_from(version) {
            versions.insert(version, fields);
        }
    }
    Ok(versions)
}
