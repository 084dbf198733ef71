//! The text of one collection's events as columns, in the one walk that also checks it.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::array::RecordBatch;
use rakam_event::batch::{BatchBuilder, EventStamp};
use rakam_event::discovery::Discovery;
use rakam_event::entry::Limits;
use rakam_event::error::EventError;
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;
use rakam_files::log::Log;

use crate::decode::{DeadLetter, DecodeError, Decoded};

/// A part is closed at this size or number of rows.
const PART_BYTES: usize = 8 << 20;
const PART_ROWS: usize = 100_000;

/// How events become columns.
pub struct Rules<'a> {
    pub schema: &'a Schema,
    pub limits: Limits,
    /// Of every event. The transaction that stores them is not known yet.
    pub stamp: EventStamp,
}

/// Rows of the stored layout ([`Schema::arrow`]).
#[derive(Debug, Clone)]
pub struct Part {
    pub rows: RecordBatch,
    /// Of each row: an index into [`Batch::records`].
    pub records: Vec<usize>,
}

/// What became of events.
#[derive(Debug, Default)]
pub struct Columns {
    pub parts: Vec<Part>,
    pub dead: Vec<DeadLetter>,
    /// Events (by [`Decoded::events`]) that name a collection in themselves: [`Decoded::check`] says which.
    pub elsewhere: Vec<usize>,
    /// Some event has a field that the schema has not and has room for.
    pub has_new_fields: bool,
    /// Some event had a name that the schema has not, whatever its value.
    pub has_unknown_names: bool,
    pub invalid: Log,
}

/// Makes columns of events, given by their places in [`Decoded::events`].
pub fn of_events(
    decoded: &Decoded<'_>,
    events: &[usize],
    rules: &Rules<'_>,
) -> Result<Columns, EventError> {
    let mut crashers = HashSet::new();
    loop {
        let mut making = Making::new(rules)?;
        match making.events(decoded, events, &crashers) {
            Ok(()) => return making.finish(),
            Err(Stop::Failed(error)) => return Err(error),
            // The builder cannot be trusted any more, and there may be more such events.
            Err(Stop::Crashed(at)) => {
                crashers.insert(at);
                for at in events {
                    let mut alone = Making::new(rules)?;
                    if alone
                        .events(decoded, std::slice::from_ref(at), &crashers)
                        .is_err()
                    {
                        crashers.insert(*at);
                    }
                }
            }
        }
    }
}

/// The fields that events have and the schema has not, as many as it has room for.
pub fn new_fields(
    decoded: &Decoded<'_>,
    events: impl Iterator<Item = usize>,
    rules: &Rules<'_>,
) -> Vec<(String, FieldType)> {
    let mut discovery = Discovery::new(rules.schema, rules.limits.max_fields);
    for event in events.filter_map(|at| decoded.events.get(at)) {
        // An event that crashes teaches nothing. It is no event later either.
        let _crashed = catch_unwind(AssertUnwindSafe(|| {
            discovery.observe(
                decoded.text(event),
                rules.stamp.xid,
                rules.stamp.received_at_us,
            );
        }));
    }
    discovery.new_fields()
}

enum Stop {
    Failed(EventError),
    /// Of the event at this place.
    Crashed(usize),
}

struct Making<'a> {
    rules: &'a Rules<'a>,
    builder: BatchBuilder,
    records: Vec<usize>,
    done: Columns,
}

impl<'a> Making<'a> {
    fn new(rules: &'a Rules<'a>) -> Result<Self, EventError> {
        Ok(Self {
            rules,
            builder: BatchBuilder::of_unchecked(rules.schema, &rules.limits)?,
            records: Vec::new(),
            done: Columns::default(),
        })
    }

    fn events(
        &mut self,
        decoded: &Decoded<'_>,
        events: &[usize],
        crashers: &HashSet<usize>,
    ) -> Result<(), Stop> {
        for &at in events {
            let Some(event) = decoded.events.get(at) else {
                continue;
            };
            let (record, text) = (event.record, decoded.text(event));
            if crashers.contains(&at) {
                let error = DecodeError::Crashed;
                self.done.dead.push(DeadLetter { record, error });
                continue;
            }
            loop {
                let builder = &mut self.builder;
                let push = || builder.push_record(text, &self.rules.stamp, event.written_ms);
                match catch_unwind(AssertUnwindSafe(push)) {
                    Err(_) => return Err(Stop::Crashed(at)),
                    Ok(Err(EventError::BatchFull)) if self.builder.rows() > 0 => {
                        self.part().map_err(Stop::Failed)?;
                        continue;
                    }
                    Ok(Ok(())) => self.records.push(record),
                    Ok(Err(EventError::ReservedField(field)))
                        if field == "_collection" && event.has_id.is_none() =>
                    {
                        self.done.elsewhere.push(at);
                    }
                    Ok(Err(error)) => {
                        let error = error.into();
                        self.done.dead.push(DeadLetter { record, error });
                    }
                }
                break;
            }
            if self.builder.bytes() >= PART_BYTES || self.builder.rows() >= PART_ROWS {
                self.part().map_err(Stop::Failed)?;
            }
        }
        Ok(())
    }

    /// Closes a part and begins the next one.
    fn part(&mut self) -> Result<(), EventError> {
        let next = BatchBuilder::of_unchecked(self.rules.schema, &self.rules.limits)?;
        let builder = std::mem::replace(&mut self.builder, next);
        self.done.has_new_fields |= builder.has_new_fields();
        self.done.has_unknown_names |= builder.has_unknown_names();
        let records = std::mem::take(&mut self.records);
        if records.is_empty() {
            return Ok(());
        }
        let built = builder.finish()?;
        self.done.parts.push(Part {
            rows: built.batch,
            records,
        });
        self.done
            .invalid
            .extend(built.invalid, built.invalid_counts);
        Ok(())
    }

    fn finish(mut self) -> Result<Columns, EventError> {
        self.part()?;
        Ok(self.done)
    }
}

#[cfg(test)]
pub(crate) mod tests;
