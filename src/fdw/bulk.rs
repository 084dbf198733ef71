//! Where the rows of an INSERT or COPY gather. Few of them go to the inbox, as those of collect do; many become chunks
//! in the statement's own transaction, without JSON and without the digest.
//!
//! To the inbox go in any case: rows with an `_id`, whose copies only the digest can find, and rows of which a value
//! will be logged as invalid, since the counters of that log have one writer. All copies of a value are the same
//! whichever way it took.
//!
//! The targets of one statement (partitions, a WITH of several INSERTs) share one bound of memory.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use rakam_event::batch::{BatchBuilder, EventStamp, Layout};
use rakam_event::entry::{self, Limits};
use rakam_event::schema::Schema;
use rakam_lake::chunk::Writer;

use super::row::{self, Datums, Filler, Row, Target};
use crate::catalog::inbox::Entry;
use crate::catalog::projects::{self, Project};
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::ingest::append::{self, CHUNK_BYTES, CHUNK_ROWS, Encoded};
use crate::ingest::mapper::{self, Shape};
use crate::ingest::quota;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, spare, wait, xact};

/// A statement that stores fewer rows leaves them to the digest, which makes one chunk of many statements.
const FIRST_ROWS: usize = 512;
/// So much JSON gathers before it goes to the inbox, or is taken for the start of a large statement.
const LINES_BYTES: usize = 1 << 20;
/// So many rows or bytes of values are put into columns before they are encoded: few enough for the processor's cache, and for
/// the allocator to use the same memory for the next ones.
const PART_ROWS: usize = 1 << 12;
const PART_BYTES: usize = 2 << 20;
/// What a chunk takes most often.
const BUFFER_BYTES: usize = 1 << 20;
/// What all buffers of a statement may hold; growing ones take up to twice as much. Above it the largest one is written.
const STATEMENT_BYTES: usize = 48 << 20;
/// What a column of a chunk in the making takes before its first value, and about what a NULL takes of it.
const COLUMN_BYTES: usize = 8 << 10;
const NULL_BYTES: usize = 4;

/// The rows of a statement for one collection.
pub struct Buffer {
    project: ProjectRow,
    collection: Collection,
    limits: Limits,
    /// The transaction, once there is a row.
    xid: Option<u64>,
    road: Road,
    /// Events that go to the inbox in any case.
    lines: Lines,
}

/// Where the other rows go.
enum Road {
    /// Undecided: too few so far.
    First(Lines),
    Chunks(Box<Chunk>),
    /// They go through a mapper, or the table's columns are not the fields of the registry.
    Inbox,
}

/// A chunk in the making.
struct Chunk {
    schema: Schema,
    /// Of the targets' fields in the schema.
    positions: Vec<usize>,
    filler: Filler,
    /// None: no row has come since the last part was encoded.
    builder: Option<BatchBuilder>,
    /// Parts before that; None: there are none since the last chunk was written.
    parts: Option<Parts>,
}

/// Encoded parts of a chunk.
struct Parts {
    writer: Writer,
    /// Of the values, before they were encoded.
    bytes: usize,
}

/// JSON of events, one a line, by their time of receipt: each time becomes an inbox row.
#[derive(Default)]
struct Lines {
    by_receipt: BTreeMap<i64, (i32, String)>,
    events: usize,
    bytes: usize,
}

impl Lines {
    fn push(&mut self, received_at_us: i64, line: &str) {
        let (n, text) = self.by_receipt.entry(received_at_us).or_default();
        if *n > 0 {
            text.push('\n');
        } else {
            self.bytes += size_of::<(i64, i32, String)>();
        }
        text.push_str(line);
        *n += 1;
        self.events += 1;
        self.bytes += line.len() + 1;
    }
}

impl Buffer {
    pub fn new(project: ProjectRow, collection: Collection, limits: Limits) -> Self {
        Self {
            project,
            collection,
            limits,
            xid: None,
            road: Road::First(Lines::default()),
            lines: Lines::default(),
        }
    }

    /// Takes a row in; answers its `_time`, which is the time of receipt where its own is missing or out of bounds.
    fn add(&mut self, datums: &Datums, targets: &mut [Target], received_at_us: i64) -> Result<i64> {
        let stamp = self.stamp(received_at_us);
        if let Road::Chunks(chunk) = &mut self.road
            && let Some(time_us) = chunk.fill(targets, datums, &stamp, &self.limits)?
        {
            if chunk.grow()? {
                self.write_chunk()?;
            }
            return Ok(time_us);
        }
        let row = row::read(targets, datums, self.limits.max_string_bytes)?;
        let time_us = row
            .time_us
            .filter(|&micros| stamp.takes(micros))
            .unwrap_or(received_at_us);
        let is_late_or_early = row.time_us.is_some_and(|micros| micros != time_us);
        if row.is_for_digest || is_late_or_early {
            self.add_line(&row, targets, received_at_us)?;
            return Ok(time_us);
        }
        match &mut self.road {
            Road::Inbox => self.add_line(&row, targets, received_at_us)?,
            Road::First(lines) => {
                let json = row.json(targets);
                lines.push(received_at_us, &entry::check_row(&json, &self.limits)?);
                if lines.events >= FIRST_ROWS || lines.bytes >= LINES_BYTES {
                    self.take_road(targets)?;
                }
            }
            Road::Chunks(chunk) => {
                row.check_size(targets, &self.limits)?;
                let row = row.typed(&chunk.positions);
                chunk.builder(&self.limits)?.push_values(row, &stamp)?;
                if chunk.grow()? {
                    self.write_chunk()?;
                }
            }
        }
        Ok(time_us)
    }

    fn add_line(&mut self, row: &Row<'_>, targets: &[Target], received_at_us: i64) -> Result<()> {
        let json = row.json(targets);
        self.lines
            .push(received_at_us, &entry::check_row(&json, &self.limits)?);
        if self.lines.bytes >= LINES_BYTES {
            self.write_lines()?;
        }
        Ok(())
    }

    /// Decides, for a statement of many rows, where the rest of them goes; the first ones go along.
    fn take_road(&mut self, targets: &[Target]) -> Result<()> {
        let schema = schema(&self.collection)?;
        let positions: Option<Vec<usize>> = targets
            .iter()
            .map(|target| {
                schema
                    .fields
                    .iter()
                    .position(|field| field.name == target.name && Some(field.ty) == target.ty)
            })
            .collect();
        // A mapper takes JSON.
        let is_mapped = mapper::applies(self.project.id, &self.collection.name)?;
        let road = match positions.filter(|_| !is_mapped) {
            None => Road::Inbox,
            Some(positions) => Road::Chunks(Box::new(Chunk {
                schema,
                filler: Filler::new(targets, &positions),
                positions,
                builder: None,
                parts: None,
            })),
        };
        let Road::First(first) = std::mem::replace(&mut self.road, road) else {
            return Ok(());
        };
        for (received_at_us, (_, text)) in first.by_receipt {
            let stamp = self.stamp(received_at_us);
            for line in text.split('\n') {
                match &mut self.road {
                    Road::Chunks(chunk) => chunk.builder(&self.limits)?.push(line, &stamp)?,
                    _ => self.lines.push(received_at_us, line),
                }
            }
        }
        Ok(())
    }

    /// Stores everything that has gathered.
    pub fn flush(&mut self) -> Result<()> {
        if let Road::First(first) = &mut self.road {
            for (received_at_us, (_, text)) in std::mem::take(first).by_receipt {
                for line in text.split('\n') {
                    self.lines.push(received_at_us, line);
                }
            }
        }
        self.write_lines()?;
        self.write_chunk()
    }

    /// The one way of this statement's rows into the inbox.
    fn write_lines(&mut self) -> Result<()> {
        wait::check_interrupts();
        let lines = std::mem::take(&mut self.lines);
        let bytes: usize = lines.by_receipt.values().map(|(_, text)| text.len()).sum();
        // Line breaks are ours.
        let breaks = lines.events - lines.by_receipt.len();
        quota::charge(
            &*self.charged()?,
            lines.events as i64,
            (bytes - breaks) as i64,
        )?;
        for (received_at_us, (n, text)) in &lines.by_receipt {
            let entry = Entry {
                project_id: self.project.id,
                collection_id: self.collection.id,
                collection: &self.collection.name,
                n: *n,
                received_at_us: *received_at_us,
                shift_us: 0,
                store_id: None,
                payload: text.as_bytes().into(),
            };
            mapper::enter(&entry, Shape::Row)?;
        }
        Ok(())
    }

    /// The one way of this statement's rows into chunks.
    fn write_chunk(&mut self) -> Result<()> {
        let Road::Chunks(chunk) = &mut self.road else {
            return Ok(());
        };
        let schema_version = chunk.schema.version;
        let Some(Parts { writer, bytes }) = chunk.finish()? else {
            return Ok(());
        };
        wait::check_interrupts();
        // There is no JSON: of these events the values count.
        quota::charge_stored(&*self.charged()?, writer.rows() as i64, bytes as i64)?;
        let _owner = ActAs::owner();
        if let Some(chunk) = Encoded::of(writer)? {
            let target = append::Target {
                project_id: self.project.id,
                collection_id: self.collection.id,
                schema_version,
                level: 0,
                since_us: None,
            };
            append::append_encoded(target, chunk)?;
        }
        Ok(())
    }

    /// The project whose quota counts.
    fn charged(&self) -> Result<Rc<Project>> {
        projects::by_name(&self.project.name)?
            .ok_or_else(|| PgError::no_project(&self.project.name))
    }

    /// What the digest would know about an event of this transaction.
    fn stamp(&mut self, received_at_us: i64) -> EventStamp {
        EventStamp {
            received_at_us,
            shift_us: 0,
            time_min_us: received_at_us.saturating_sub(self.project.time_past_us),
            time_max_us: received_at_us.saturating_add(self.project.time_future_us),
            xid: *self.xid.get_or_insert_with(xact::top_xid) as i64,
        }
    }

    /// About the bytes of memory that it takes.
    fn bytes(&self) -> usize {
        let road = match &self.road {
            Road::First(lines) => lines.bytes,
            Road::Chunks(chunk) => chunk.bytes(),
            Road::Inbox => 0,
        };
        self.lines.bytes + road
    }
}

impl Chunk {
    fn fill(
        &mut self,
        targets: &mut [Target],
        datums: &Datums,
        stamp: &EventStamp,
        limits: &Limits,
    ) -> Result<Option<i64>> {
        let builder = begun(&mut self.builder, &self.schema, limits)?;
        self.filler.fill(targets, datums, builder, stamp, limits)
    }

    fn builder(&mut self, limits: &Limits) -> Result<&mut BatchBuilder> {
        begun(&mut self.builder, &self.schema, limits)
    }

    /// Encodes what is enough for a part; whether all of it is enough for a chunk.
    fn grow(&mut self) -> Result<bool> {
        let Some(builder) = &self.builder else {
            return Ok(false);
        };
        let (rows, bytes) = (builder.rows(), builder.bytes());
        if rows < PART_ROWS && self.values_bytes(rows, bytes) < PART_BYTES {
            return Ok(false);
        }
        self.encode_part()?;
        Ok(self.parts.as_ref().is_some_and(|parts| {
            let rows = parts.writer.rows();
            rows >= CHUNK_ROWS || self.values_bytes(rows, parts.bytes) >= CHUNK_BYTES
        }))
    }

    /// All that has gathered, encoded. None: nothing has.
    fn finish(&mut self) -> Result<Option<Parts>> {
        self.encode_part()?;
        Ok(self.parts.take())
    }

    fn encode_part(&mut self) -> Result<()> {
        let Some(builder) = self.builder.take() else {
            return Ok(());
        };
        let bytes = builder.bytes();
        let built = builder.finish()?;
        if !built.invalid_counts.is_empty() {
            return Err(PgError::internal(
                "a row of a chunk has a value to be logged",
            ));
        }
        let parts = self.parts.get_or_insert_with(|| Parts {
            writer: Writer::new(spare::take(BUFFER_BYTES), self.schema.version),
            bytes: 0,
        });
        parts.writer.add(&built.batch)?;
        parts.bytes += bytes;
        Ok(())
    }

    /// About what values of so many bytes take as columns of so many rows.
    fn values_bytes(&self, rows: usize, bytes: usize) -> usize {
        bytes + self.schema.fields.len() * rows * NULL_BYTES
    }

    /// About the bytes of memory that it takes.
    fn bytes(&self) -> usize {
        let builder = self.builder.as_ref().map_or(0, |builder| {
            self.schema.fields.len() * COLUMN_BYTES
                + self.values_bytes(builder.rows(), builder.bytes())
        });
        let parts = self.parts.as_ref().map_or(0, |parts| parts.writer.bytes());
        builder + parts
    }
}

/// The builder, made now if no row has come yet.
fn begun<'a>(
    builder: &'a mut Option<BatchBuilder>,
    schema: &Schema,
    limits: &Limits,
) -> Result<&'a mut BatchBuilder> {
    Ok(match builder {
        Some(builder) => builder,
        empty => empty.insert(BatchBuilder::new(schema, Layout::Stored, limits)?),
    })
}

/// The fields as they are now, whoever asks.
fn schema(collection: &Collection) -> Result<Schema> {
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    registry::schema(View::Under(latest.get()), collection)
}

/// The buffers of a statement.
pub struct Statement {
    /// Which one: the address of its executor state.
    key: usize,
    buffers: RefCell<Vec<Rc<RefCell<Buffer>>>>,
    bytes: Cell<usize>,
}

thread_local! {
    /// Those that run: more than one where a function of a statement's query inserts, too.
    static RUNNING: RefCell<Vec<Weak<Statement>>> = const { RefCell::new(Vec::new()) };
}

impl Statement {
    /// The statement of this key. It ends with its last handle, at the latest with the executor state's memory.
    pub fn of(key: usize) -> Rc<Self> {
        RUNNING.with_borrow_mut(|running| {
            running.retain(|statement| statement.strong_count() > 0);
            let known = running
                .iter()
                .filter_map(Weak::upgrade)
                .find(|statement| statement.key == key);
            known.unwrap_or_else(|| {
                let new = Rc::new(Self {
                    key,
                    buffers: RefCell::default(),
                    bytes: Cell::new(0),
                });
                running.push(Rc::downgrade(&new));
                new
            })
        })
    }

    /// Makes a buffer part of the statement.
    pub fn join(&self, buffer: Buffer) -> Rc<RefCell<Buffer>> {
        let buffer = Rc::new(RefCell::new(buffer));
        self.buffers.borrow_mut().push(Rc::clone(&buffer));
        buffer
    }

    /// Adds a row to one of its buffers; answers the row's `_time`.
    pub fn add(
        &self,
        buffer: &RefCell<Buffer>,
        datums: &Datums,
        targets: &mut [Target],
        received_at_us: i64,
    ) -> Result<i64> {
        let mut one = buffer.borrow_mut();
        let before = one.bytes();
        let time_us = one.add(datums, targets, received_at_us)?;
        self.bytes
            .set((self.bytes.get() + one.bytes()).saturating_sub(before));
        drop(one);
        if self.bytes.get() > STATEMENT_BYTES {
            self.shrink()?;
        }
        Ok(time_us)
    }

    /// Writes the largest buffer. Buffers of other statements are left alone: a savepoint may end before they do.
    fn shrink(&self) -> Result<()> {
        let buffers = self.buffers.borrow();
        if let Some(largest) = buffers.iter().max_by_key(|buffer| buffer.borrow().bytes()) {
            largest.borrow_mut().flush()?;
        }
        let bytes = buffers.iter().map(|buffer| buffer.borrow().bytes()).sum();
        self.bytes.set(bytes);
        Ok(())
    }
}
