//! Events become Arrow columns: one walk per event, typed builders, no tree of values.
//!
//! Read [`BatchBuilder::push`] first. What an event means is decided here and in [`crate::coerce`]; which fields
//! there are was decided before, by [`crate::discovery`].

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::{FieldRef, Schema as ArrowSchema};

use crate::coerce::{self, Value, coerce};
use crate::column::{Column, Plain};
use crate::discovery;
use crate::entry::Limits;
use crate::error::EventError;
use crate::infer::{Inferred, infer};
use crate::json::{self, Cutter, ObjectWriter};
use crate::keys::{NameKind, Walk};
use crate::schema::{self, DroppedField, Schema};
use crate::time;
use crate::types::FieldType;

mod values;

pub use values::TypedRow;

/// An Arrow text column holds less than 2 GiB.
const MAX_BATCH_BYTES: usize = i32::MAX as usize;
/// No event becomes more than so many times its own bytes: numbers in plain notation, escaped twice.
const MAX_GROWTH: usize = 32;
/// The invalid log keeps so much of a value,
const SAMPLE_BYTES: usize = 256;
/// so many values of one field and batch,
const SAMPLES_PER_FIELD: u64 = 20;
/// and so many values of one batch. All are counted.
const SAMPLES: usize = 1_000;

/// Which columns a batch gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// Those of [`Schema::arrow`]: every field, then `_xid`.
    Stored,
    /// What the foreign table shows: fields that are columns already; what is not goes to `_extra`, in the form
    /// it will have there after the digest. With a projection, the columns of these field ids in this order
    /// (also [`schema::XID_FIELD_ID`]); what nobody asked for is not parsed. Nothing is logged as invalid.
    Table { projection: Option<Vec<i32>> },
}

/// What the server knows about an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventStamp {
    pub received_at_us: i64,
    /// Added to explicit `_time`s: the client's clock skew.
    pub shift_us: i64,
    /// Bounds of `_time`, both inclusive.
    pub time_min_us: i64,
    pub time_max_us: i64,
    pub xid: i64,
}

/// A value that did not fit its field, was outside its bounds, or was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidValue {
    pub field: String,
    pub ty: String,
    /// The start of the value.
    pub value: String,
    pub error: String,
    pub event_id: Option<String>,
    pub received_at_us: i64,
}

/// How many values of a field were invalid on a day (of receipt, in days since 1970).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct InvalidCount {
    pub field: String,
    pub day: i32,
    pub n: u64,
}

/// A finished batch.
#[derive(Debug)]
pub struct Built {
    pub batch: RecordBatch,
    /// Samples.
    pub invalid: Vec<InvalidValue>,
    /// Exact, sorted.
    pub invalid_counts: Vec<InvalidCount>,
}

/// What happens to the values of a name.
#[derive(Debug, Clone, Copy)]
enum Role {
    Time,
    /// A column, or (None) one that is not asked for but whose misfits belong into `_extra`.
    Column {
        column: Option<usize>,
        ty: FieldType,
    },
    /// A field that is not a column yet: into `_extra` as the field's type prints.
    Pending(FieldType),
    /// Into `_extra`; the first typable value makes it [`Role::Pending`], as the digest will do.
    Unknown,
    /// Into `_extra` as it is.
    Keep,
    /// An object whose members go into `_extra` as they are: what an INSERT wrote there.
    Members,
    Skip,
}

/// Builds one batch.
pub struct BatchBuilder {
    walk: Walk,
    /// By slot of `walk`.
    roles: Vec<Role>,
    /// The role of names that the schema does not have.
    new_name: Role,
    room: usize,
    fields: Vec<FieldRef>,
    columns: Vec<Column>,
    time: Option<usize>,
    received_at: Option<usize>,
    xid: Option<usize>,
    extra: Option<usize>,
    extra_text: ObjectWriter,
    max_string_bytes: usize,
    dropped: Vec<DroppedField>,
    log: Option<InvalidLog>,
    rows: usize,
    bytes: usize,
    has_new_fields: bool,
    fields_known: usize,
}

impl BatchBuilder {
    /// A batch of [`Layout::Stored`] for events that nobody has checked: [`Self::push`] refuses what
    /// [`crate::entry::check_event`] refuses, but for their size.
    pub fn of_unchecked(schema: &Schema, limits: &Limits) -> Result<Self, EventError> {
        let mut builder = Self::new(schema, Layout::Stored, limits)?;
        builder.walk.refuse_extra();
        Ok(builder)
    }

    /// For events that are stored as they came: they may have come with a dump.
    pub fn of_stored(schema: &Schema, layout: Layout, limits: &Limits) -> Result<Self, EventError> {
        let mut builder = Self::new(schema, layout, limits)?;
        builder.dropped.clone_from(&schema.dropped);
        Ok(builder)
    }

    pub fn new(schema: &Schema, layout: Layout, limits: &Limits) -> Result<Self, EventError> {
        let stored = layout == Layout::Stored;
        let xid = schema::arrow_field(schema::XID_FIELD_ID, schema::XID, FieldType::Int8);
        let ready = schema.fields.iter().filter(|f| stored || f.column_ready);
        let fields: Vec<FieldRef> = match layout {
            Layout::Stored => schema.arrow().fields().to_vec(),
            Layout::Table { projection: None } => ready.map(|f| Arc::new(f.arrow())).collect(),
            Layout::Table {
                projection: Some(ids),
            } => {
                let by_id: HashMap<i32, &schema::Field> = ready.map(|f| (f.id, f)).collect();
                ids.iter()
                    .map(|id| match by_id.get(id) {
                        Some(field) => Ok(Arc::new(field.arrow())),
                        None if *id == schema::XID_FIELD_ID => Ok(Arc::new(xid.clone())),
                        None => Err(EventError::Arrow(format!("no column has field id {id}"))),
                    })
                    .collect::<Result<_, _>>()?
            }
        };
        let position = |name: &str| fields.iter().position(|f| f.name() == name);
        let extra = position(schema::EXTRA);
        let roles = schema
            .fields
            .iter()
            .map(|field| {
                let column = position(&field.name);
                match field.name.as_str() {
                    schema::TIME if column.is_some() => Role::Time,
                    schema::EXTRA if extra.is_some() => Role::Members,
                    // The server sets `_received_at`; an event that has it is refused.
                    schema::TIME | schema::RECEIVED_AT | schema::EXTRA => Role::Skip,
                    _ if !stored && !field.column_ready => match extra {
                        Some(_) => Role::Pending(field.ty),
                        None => Role::Skip,
                    },
                    _ if column.is_none() && extra.is_none() => Role::Skip,
                    _ => Role::Column {
                        column,
                        ty: field.ty,
                    },
                }
            })
            .collect();
        Ok(Self {
            walk: Walk::new(schema.fields.iter().map(|f| f.name.as_str())),
            roles,
            new_name: match extra {
                None => Role::Skip,
                Some(_) if stored => Role::Keep,
                Some(_) => Role::Unknown,
            },
            room: discovery::room(schema, limits.max_fields),
            columns: fields
                .iter()
                .map(|f| Column::new(f.data_type()))
                .collect::<Result<_, _>>()?,
            time: position(schema::TIME),
            received_at: position(schema::RECEIVED_AT),
            xid: position(schema::XID),
            extra,
            fields,
            extra_text: ObjectWriter::default(),
            max_string_bytes: limits.max_string_bytes,
            dropped: schema.dropped.iter().map(DroppedField::for_new).collect(),
            log: stored.then(InvalidLog::default),
            rows: 0,
            bytes: 0,
            has_new_fields: false,
            fields_known: schema.fields.len(),
        })
    }

    /// Appends one event. On an error nothing was appended, and the event is the caller's to park;
    /// [`EventError::BatchFull`] says that it fits into another batch.
    pub fn push(&mut self, event: &str, stamp: &EventStamp) -> Result<(), EventError> {
        self.push_record(event, stamp, None)
    }

    /// As [`Self::push`] of a record that was written at a time, in milliseconds since 1970: an event without a `_time` has
    /// that one.
    pub fn push_record(
        &mut self,
        event: &str,
        stamp: &EventStamp,
        written_ms: Option<i64>,
    ) -> Result<(), EventError> {
        let most = event.len().saturating_mul(MAX_GROWTH);
        if self.bytes.saturating_add(most) > MAX_BATCH_BYTES {
            return Err(EventError::BatchFull);
        }
        self.walk.event(event)?;
        for slot in &self.walk.slots()[self.roles.len()..] {
            self.roles.push(match (slot.kind, self.new_name) {
                (NameKind::Raw, Role::Unknown) => Role::Keep,
                (_, role) => role,
            });
        }
        // From here on nothing fails.
        self.extra_text.clear();
        let mut event_time = stamp.received_at_us;
        let mut written_ms = written_ms;
        for at in 0..self.walk.sights().len() {
            let sight = self.walk.sights()[at];
            let raw = sight.raw(event);
            if raw == "null" || self.is_dropped(&self.walk.slots()[sight.slot].name, stamp) {
                continue;
            }
            match self.roles[sight.slot] {
                Role::Skip => {}
                Role::Time => {
                    written_ms = None;
                    event_time = self.time(event, stamp, raw);
                }
                Role::Column { column, ty } => {
                    self.column_value(event, stamp, sight.slot, raw, column, ty);
                }
                Role::Pending(ty) => self.pending_value(sight.slot, raw, ty),
                Role::Unknown => match infer(raw) {
                    Inferred::Type(ty) if self.room > 0 => {
                        self.room -= 1;
                        self.roles[sight.slot] = Role::Pending(ty);
                        self.pending_value(sight.slot, raw, ty);
                    }
                    _ => {
                        self.keep(sight.slot, raw);
                    }
                },
                Role::Members => self.members(raw, stamp),
                Role::Keep => {
                    if self.room > 0 && !self.has_new_fields {
                        let is_field = self.walk.slots()[sight.slot].kind == NameKind::Field;
                        self.has_new_fields = is_field && matches!(infer(raw), Inferred::Type(_));
                    }
                    if let Some(bytes) = self.keep(sight.slot, raw) {
                        let error = self.cut_message(bytes);
                        self.log(event, stamp, schema::EXTRA, FieldType::Jsonb, raw, &error);
                    }
                }
            }
        }
        if let Some(written_ms) = written_ms {
            let micros = written_ms.saturating_mul(1_000);
            event_time = if stamp.takes(micros) {
                micros
            } else {
                self.time(event, stamp, &written_ms.to_string())
            };
        }
        self.finish_row(event_time, stamp);
        Ok(())
    }

    /// Whether some event had a field that the schema has not and has room for: [`crate::discovery`] says which.
    pub fn has_new_fields(&self) -> bool {
        self.has_new_fields
    }

    /// Whether some event had, or was refused for, a name that is not in the schema.
    pub fn has_unknown_names(&self) -> bool {
        self.walk.slots().len() > self.fields_known
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// About how many bytes of memory the values take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn finish(self) -> Result<Built, EventError> {
        let rows = self.rows;
        let columns = self.columns.into_iter().map(|c| c.finish(rows)).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let schema = Arc::new(ArrowSchema::new(self.fields));
        let batch = RecordBatch::try_new_with_options(schema, columns, &options)
            .map_err(|e| EventError::Arrow(e.to_string()))?;
        let log = self.log.unwrap_or_default();
        let mut invalid_counts: Vec<InvalidCount> = log
            .counts
            .into_iter()
            .flat_map(|(field, days)| {
                days.into_iter().map(move |(day, n)| InvalidCount {
                    field: field.clone(),
                    day,
                    n,
                })
            })
            .collect();
        invalid_counts.sort();
        Ok(Built {
            batch,
            invalid: log.samples,
            invalid_counts,
        })
    }

    /// What the server adds to a row, and what has gathered for its `_extra`.
    fn finish_row(&mut self, time_us: i64, stamp: &EventStamp) {
        for (column, value) in [
            (self.time, Plain::Timestamptz(time_us)),
            (self.received_at, Plain::Timestamptz(stamp.received_at_us)),
            (self.xid, Plain::Int8(stamp.xid)),
        ] {
            if let Some(column) = column {
                self.bytes += self.columns[column].put(self.rows, value);
            }
        }
        if let (Some(column), Some(text)) = (self.extra, self.extra_text.finish()) {
            self.bytes += self.columns[column].put_text(self.rows, text);
        }
        self.rows += 1;
    }

    /// The time that an explicit `_time` means; the time of receipt if it means none, which is logged.
    fn time(&mut self, event: &str, stamp: &EventStamp, raw: &str) -> i64 {
        checked_time(raw, stamp).unwrap_or_else(|error| {
            let ty = FieldType::Timestamptz;
            self.log(event, stamp, schema::TIME, ty, raw, &error);
            stamp.received_at_us
        })
    }

    fn append(&mut self, column: Option<usize>, value: Value<'_>) {
        if let Some(column) = column {
            self.bytes += self.columns[column].append(self.rows, value);
        }
    }

    fn column_value(
        &mut self,
        event: &str,
        stamp: &EventStamp,
        slot: usize,
        raw: &str,
        column: Option<usize>,
        ty: FieldType,
    ) {
        let mut cutter = Cutter::new(self.max_string_bytes);
        let error = match coerce(raw, ty, &mut cutter) {
            Ok(value) => {
                self.append(column, value);
                match cutter.cut_from {
                    Some(bytes) => self.cut_message(bytes),
                    None => return,
                }
            }
            Err(misfit) => {
                self.keep(slot, raw);
                misfit.to_string()
            }
        };
        if self.log.is_some() {
            let name = self.walk.slots()[slot].name.clone();
            self.log(event, stamp, &name, ty, raw, &error);
        }
    }

    fn pending_value(&mut self, slot: usize, raw: &str, ty: FieldType) {
        match coerce(raw, ty, &mut Cutter::new(self.max_string_bytes)) {
            Ok(value) => {
                let name = &self.walk.slots()[slot].name;
                value.write_json(ty, self.extra_text.key(name));
            }
            Err(_) => {
                self.keep(slot, raw);
            }
        }
    }

    /// Puts the value into `_extra`; answers the size of a string that had to be cut.
    fn keep(&mut self, slot: usize, raw: &str) -> Option<usize> {
        self.extra?;
        let mut cutter = Cutter::new(self.max_string_bytes);
        let name = &self.walk.slots()[slot].name;
        json::write_compact(raw, &mut cutter, self.extra_text.key(name));
        cutter.cut_from
    }

    /// Whether a field of this name was dropped after the event: nearly always there is none at all.
    fn is_dropped(&self, name: &str, stamp: &EventStamp) -> bool {
        self.dropped
            .iter()
            .any(|field| field.name == name && field.hides(stamp.xid, stamp.received_at_us))
    }

    /// Puts the members of an object into `_extra`.
    fn members(&mut self, raw: &str, stamp: &EventStamp) {
        let Self {
            extra_text,
            max_string_bytes,
            dropped,
            ..
        } = self;
        let put = |key: &str, value: &str| {
            if dropped
                .iter()
                .any(|field| field.name == key && field.hides(stamp.xid, stamp.received_at_us))
            {
                return;
            }
            let mut cutter = Cutter::new(*max_string_bytes);
            json::write_compact(value, &mut cutter, extra_text.key(key));
        };
        // What is no object has no members.
        let _no_object = json::object_entries(raw, put);
    }

    fn cut_message(&self, bytes: usize) -> String {
        let limit = self.max_string_bytes;
        format!("string of {bytes} bytes was cut to {limit} bytes")
    }

    fn log(
        &mut self,
        event: &str,
        stamp: &EventStamp,
        field: &str,
        ty: FieldType,
        raw: &str,
        error: &str,
    ) {
        let Some(log) = &mut self.log else {
            return;
        };
        let day = stamp.received_at_us.div_euclid(time::MICROS_PER_DAY) as i32;
        if !log.wants_sample(field, day) {
            return;
        }
        let id = self.walk.id(event).filter(|raw| *raw != "null");
        log.samples.push(InvalidValue {
            field: field.to_owned(),
            ty: ty.to_string(),
            value: sample(raw),
            error: error.to_owned(),
            event_id: id
                .and_then(|raw| coerce::text(raw, &mut Cutter::off()))
                .map(Cow::into_owned),
            received_at_us: stamp.received_at_us,
        });
    }
}

/// The time that an explicit `_time` means, or why it does not count.
fn checked_time(raw: &str, stamp: &EventStamp) -> Result<i64, String> {
    let sent = time::event_time(raw).ok_or("value is not a time")?;
    let micros = sent.saturating_add(stamp.shift_us);
    if stamp.takes(micros) {
        Ok(micros)
    } else {
        Err("time is outside the bounds of the project".to_owned())
    }
}

/// The start of a value: of a string its text, else its JSON.
fn sample(raw: &str) -> String {
    let text = json::string(raw).unwrap_or(Cow::Borrowed(raw));
    Cutter::new(SAMPLE_BYTES).cut(text).into_owned()
}

/// Samples and exact counts of invalid values.
#[derive(Default)]
struct InvalidLog {
    samples: Vec<InvalidValue>,
    /// By field, then day.
    counts: HashMap<String, HashMap<i32, u64>>,
}

impl InvalidLog {
    /// Counts the value; answers whether it is still worth a sample.
    fn wants_sample(&mut self, field: &str, day: i32) -> bool {
        // Not `entry`: most fields are there already, and the key would be copied for each value.
        let days = match self.counts.get_mut(field) {
            Some(days) => days,
            None => self.counts.entry(field.to_owned()).or_default(),
        };
        let n = days.entry(day).or_default();
        *n += 1;
        *n <= SAMPLES_PER_FIELD && self.samples.len() < SAMPLES
    }
}

#[cfg(test)]
mod tests;
