//! One record decoded again, in the transaction of who asks for it: what it needs is not registered here, its events go through
//! the inbox, whose digest does that.

use rakam_event::batch::EventStamp;
use rakam_event::print;
use rakam_event::schema::{Field, Schema};
use rakam_files::convert::Converter;
use rakam_files::csv_record;
use rakam_sources::batch::Batch;
use rakam_sources::columns::Rules;
use rakam_sources::decode::{DecodeError, Decoded, Route};
use rakam_sources::framed;

use super::{Stream, limits, reason, schemas};
use crate::catalog::dead_letter::Letter;
use crate::catalog::projects::Project;
use crate::catalog::registry;
use crate::ingest::admission::Admission;
use crate::ingest::mapper::Shape;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PgError, Result};

/// An event of a record.
pub struct Again {
    pub collection: String,
    pub line: String,
    pub shape: Shape,
}

type Decode = std::result::Result<Vec<Again>, DecodeError>;

impl Stream {
    /// Decodes the record of a dead letter; `Err` within is why it still is none.
    pub fn decode_again(
        &mut self,
        project: &Project,
        letter: &Letter,
    ) -> Result<std::result::Result<Vec<Again>, String>> {
        if let Some(columns) = &letter.columns {
            let again = self.csv_again(project, letter, columns)?;
            return match again {
                Ok(event) => admitted(project, vec![event]),
                Err(error) => Ok(Err(reason(&error))),
            };
        }
        let batch = Batch::of_record(
            letter.split.as_deref().unwrap_or_default(),
            letter.written_at_us.map(|us| us.div_euclid(1_000)),
            &letter.payload,
            letter.collection.as_deref().map(str::as_bytes),
        );
        self.decoder.set_limits(limits());
        let latest = Registered::latest();
        let view = View::Under(latest.get());
        self.learn(view, &self.decoder.missing_schemas(&batch))?;
        let mut decoded = self.decoder.decode(&batch);
        if let Some(dead) = decoded.dead.first() {
            return Ok(Err(reason(&dead.error)));
        }
        let events = match framed_again(project, &decoded, &batch, view)? {
            Ok(events) if events.is_empty() => texts(&mut decoded),
            framed => framed,
        };
        let events = match events {
            Ok(events) => events,
            Err(error) => return Ok(Err(reason(&error))),
        };
        admitted(project, events)
    }

    /// A row of CSV with the columns of its file. Fields that nobody has seen get the types that its cells show.
    fn csv_again(
        &self,
        project: &Project,
        letter: &Letter,
        columns: &str,
    ) -> Result<std::result::Result<Again, DecodeError>> {
        let bad = |error: String| Ok(Err(DecodeError::File(error)));
        // The source of that name may have been made anew since, as one that reads no such files.
        let Route::To(name) = &self.route else {
            return bad("the source names no collection for the rows of files".to_owned());
        };
        let names: Vec<String> = serde_json::from_str(columns)
            .map_err(|e| PgError::internal(format!("malformed columns of a dead letter: {e}")))?;
        let options = match self.csv.csv(letter.split.as_deref().unwrap_or_default()) {
            Ok(options) => options,
            Err(error) => return bad(error.to_string()),
        };
        let limits = limits();
        let rows = match csv_record(&letter.payload, &names, &options) {
            Ok(rows) => rows,
            Err(error) => return bad(error),
        };
        let latest = Registered::latest();
        let view = View::Under(latest.get());
        let mut schema = match registry::collection_named(view, project.id, name.as_str())? {
            Some(found) => registry::schema(view, &found)?,
            None => Schema::new(1, Vec::new()),
        };
        let mut converter = Converter::new(&schema, limits, false);
        let next = schema
            .fields
            .iter()
            .map(|field| field.id)
            .max()
            .unwrap_or(0);
        let new = converter.new_fields(&rows, &[]).into_iter();
        // Their numbers are nobody's: the row becomes text again.
        schema
            .fields
            .extend(new.zip(next + 1..).map(|((name, ty), id)| Field {
                id,
                name,
                ty,
                added_version: schema.version,
                column_ready: false,
            }));
        converter.set_schema(&schema);
        let stamp = EventStamp {
            received_at_us: letter.received_at_us,
            ..UNBOUNDED
        };
        let (row, refused) = match converter.convert(rows, &self.source, &stamp) {
            Ok(converted) => converted,
            Err(error) => return bad(error.to_string()),
        };
        if let Some(refused) = refused.first() {
            return bad(refused.error.clone());
        }
        let mut line = String::new();
        print::write_row(&row, &schema, 0, &mut line)?;
        Ok(Ok(Again {
            collection: name.as_str().to_owned(),
            line,
            shape: Shape::Row,
        }))
    }
}

/// The events, unless the schema mode or the quota of the project refuses one of them.
fn admitted(
    project: &Project,
    events: Vec<Again>,
) -> Result<std::result::Result<Vec<Again>, String>> {
    let mut admission = Admission::new(project);
    for event in &events {
        if let Some(refusal) = admission.refusal(&event.collection, &event.line)? {
            return Ok(Err(reason(&refusal.into())));
        }
    }
    Ok(Ok(events))
}

/// The digest looks at times.
const UNBOUNDED: EventStamp = EventStamp {
    received_at_us: 0,
    shift_us: 0,
    time_min_us: i64::MIN,
    time_max_us: i64::MAX,
    xid: i64::MAX,
};

fn texts(decoded: &mut Decoded<'_>) -> Decode {
    (0..decoded.events.len())
        .map(|at| {
            decoded.check(at)?;
            let event = &decoded.events[at];
            let mut line = String::new();
            decoded.write_line(event, &mut line);
            Ok(Again {
                collection: name(decoded, event.collection),
                line,
                shape: Shape::Event,
            })
        })
        .collect()
}

fn framed_again(
    project: &Project,
    decoded: &Decoded<'_>,
    batch: &Batch,
    view: View,
) -> Result<Decode> {
    let [record] = decoded.framed[..] else {
        return Ok(Ok(Vec::new()));
    };
    let collection = name(decoded, record.collection);
    let Some(found) = registry::collection_named(view, project.id, &collection)? else {
        return Ok(Err(DecodeError::UnknownVersion {
            collection,
            version: record.version,
        }));
    };
    let schema: Schema = registry::schema(view, &found)?;
    let versions = schemas::versions(view, found.id, &[record])?;
    let failed = |error: String| PgError::internal(format!("could not decode a record: {error}"));
    let rows = framed::decode(&[record], batch, &collection, &schema, &versions)
        .map_err(|error| failed(error.to_string()))?;
    let rules = Rules {
        schema: &schema,
        limits: limits(),
        stamp: UNBOUNDED,
    };
    let rows = rows.lines(&rules, batch);
    let rows = rows.map_err(|error| failed(error.to_string()))?;
    if let Some(dead) = rows.dead.into_iter().next() {
        return Ok(Err(dead.error));
    }
    let again = |(_, line)| Again {
        collection: collection.clone(),
        line,
        shape: Shape::Row,
    };
    Ok(Ok(rows.lines.into_iter().map(again).collect()))
}

fn name(decoded: &Decoded<'_>, collection: usize) -> String {
    let names = decoded.collections.names();
    names
        .get(collection)
        .map_or_else(String::new, |name| name.as_str().to_owned())
}
