//! Records in our own Avro framing. Those that come back from an event store of the project are what its mappers made of them, and
//! were charged: they are stored as they are.

use std::rc::Rc;

use rakam_event::entry;
use rakam_event::schema::Schema;
use rakam_lake::row_chunk;
use rakam_sources::decode::{DeadLetter, DecodeError, Framed};
use rakam_sources::framed::{self, Versions};

use super::super::schemas;
use super::{Done, LINES_BYTES, Origin, Preparing, Whose};
use crate::catalog::registry::Collection;
use crate::ingest::mapper::Shape;
use crate::pg::PgError;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};

impl Preparing<'_> {
    /// Rows of records in our own framing.
    pub(super) fn framed(&mut self, collection: usize, records: &[Framed]) -> Done<()> {
        let name = self.name(collection).to_owned();
        let Some((found, schema)) = self.registered(collection) else {
            self.dead(records.iter().map(|framed| DeadLetter {
                record: framed.record,
                error: DecodeError::UnknownVersion {
                    collection: name.clone(),
                    version: framed.version,
                },
            }));
            return Ok(());
        };
        let versions = xact::worker(|| schemas::versions(View::Current, found.id, records))?;
        let (own, others): (Vec<Framed>, Vec<Framed>) =
            (records.iter()).partition(|framed| self.whose(framed.record) == Whose::Own);
        for (records, whose) in [(own, Whose::Own), (others, Whose::Others)] {
            if !records.is_empty() {
                let registered = (found.clone(), Rc::clone(&schema));
                self.rows(collection, registered, &records, &versions, whose)?;
            }
        }
        Ok(())
    }

    /// Rows of records in our own framing that are all of these or those.
    fn rows(
        &mut self,
        collection: usize,
        (found, schema): (Collection, Rc<Schema>),
        records: &[Framed],
        versions: &Versions,
        whose: Whose,
    ) -> Done<()> {
        let name = found.name.clone();
        let failed = |error: String| {
            Failure::Error(PgError::internal(format!(
                "could not decode Avro records: {error}"
            )))
        };
        let rows = framed::decode(records, self.batch, &name, &schema, versions)
            .map_err(|error| failed(error.to_string()))?;
        let values = |record: usize| {
            self.batch
                .records()
                .get(record)
                .and_then(|r| self.batch.value(r))
        };
        let bytes = rows
            .records
            .iter()
            .filter_map(|&r| values(r))
            .map(<[u8]>::len)
            .sum();
        let rules = self.rules(&schema);
        let are_many = rows.records.len() >= row_chunk::MAX_ROWS;
        let go_as_columns = match whose {
            // What goes through the inbox is counted by the digest: these bytes were when they were published.
            Whose::Own => are_many || self.row.counts_bytes,
            Whose::Others => {
                let place = self.places.get(&collection);
                are_many && !place.is_some_and(|place| place.is_mapped)
            }
        };
        if go_as_columns {
            let built = rows.columns(&rules, self.batch);
            let built = built.map_err(|error| Failure::Error(error.into()))?;
            self.take(found, schema, built, bytes, whose);
            return Ok(());
        }
        let rows = rows.lines(&rules, self.batch);
        let rows = rows.map_err(|error| Failure::Error(error.into()))?;
        self.dead(rows.dead);
        let mut lines = self.lines(collection, Shape::Row, whose);
        for (record, line) in rows.lines {
            lines.begin().push_str(&line);
            lines.end(Origin::Record(record), entry::has_id(&line));
            if lines.payload.len() >= LINES_BYTES {
                let next = self.lines(collection, Shape::Row, whose);
                self.done.lines.push(std::mem::replace(&mut lines, next));
            }
        }
        self.add_lines(lines);
        Ok(())
    }
}
