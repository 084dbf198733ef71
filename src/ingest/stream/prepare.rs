//! From a polled batch to what is stored of it: which collection each event belongs to, which of the two roads it goes, what the
//! registry has to learn before, and what is no event.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use rakam_event::batch::EventStamp;
use rakam_event::error::EventError;
use rakam_event::names;
use rakam_event::schema::{SYSTEM_FIELDS, Schema};
use rakam_event::types::FieldType;
use rakam_lake::row_chunk;
use rakam_sources::batch::Batch;
use rakam_sources::columns::{self, Columns, Rules};
use rakam_sources::decode::{DeadLetter, DecodeError, Decoded, Framed};
use rakam_sources::published::Copies;
use uuid::Uuid;

use super::{Letter, Lines, Origin, Part, Prepared, Stream, Table};
use crate::catalog::event_store;
use crate::catalog::projects::{self, Project};
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::ingest::admission::Admission;
use crate::ingest::collect::limits;
use crate::ingest::learn::{Learnt, register};
use crate::ingest::mapper::{self, Shape};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, wait, wake};

mod avro;
mod files;

type Done<T> = std::result::Result<T, Failure>;

/// Bytes of events after which there is another inbox row.
const LINES_BYTES: usize = 1 << 20;

/// What is known of a collection.
#[derive(Clone)]
struct Place {
    /// None: it is not registered.
    registered: Option<(Collection, Rc<Schema>)>,
    /// Its events go through mappers.
    is_mapped: bool,
}

/// Events of one collection.
#[derive(Default)]
struct Job {
    /// By [`Decoded::events`].
    events: Vec<usize>,
    framed: Vec<Framed>,
}

struct Preparing<'a> {
    stream: &'a Stream,
    batch: &'a Batch,
    decoded: Decoded<'a>,
    row: ProjectRow,
    project: Rc<Project>,
    stamp: EventStamp,
    /// By [`Decoded::collections`].
    places: HashMap<usize, Place>,
    /// The origins of the project's own event stores, if the batch has records of any store.
    own: HashSet<Uuid>,
    done: Prepared,
}

/// Whose records they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Of an event store of the project: collected here, through its mappers and under its quota.
    Own,
    Others,
}

/// Decodes a batch. Outside of any transaction.
pub fn prepare(stream: &Stream, batch: Arc<Batch>) -> Done<Prepared> {
    let is_published = Copies::concern(&batch);
    let (row, project, own) = xact::worker(|| {
        let (row, project) = project(stream.project_id)?;
        let own = match is_published {
            true => event_store::origins(View::Current, row.id)?,
            false => HashSet::new(),
        };
        Ok((row, project, own))
    })?;
    let received_at_us = xact::now_us();
    let shared = Arc::clone(&batch);
    let mut preparing = Preparing {
        stream,
        batch: &shared,
        decoded: stream.decoder.decode(&shared),
        stamp: EventStamp {
            received_at_us,
            shift_us: 0,
            time_min_us: received_at_us.saturating_sub(row.time_past_us),
            time_max_us: received_at_us.saturating_add(row.time_future_us),
            // Known when the events are stored; after whatever was dropped before.
            xid: i64::MAX,
        },
        places: HashMap::new(),
        own,
        done: Prepared {
            received_at_us,
            project: row.name.clone(),
            tables: BTreeMap::new(),
            lines: Vec::new(),
            letters: Vec::new(),
            is_whole: true,
            batch,
        },
        row,
        project,
    };
    preparing.records()?;
    preparing.files()?;
    Ok(preparing.done)
}

fn project(id: i32) -> Result<(ProjectRow, Rc<Project>)> {
    let gone = || PgError::new("42704", "the project was dropped");
    let row = registry::project_by_id(View::Current, id)?.ok_or_else(gone)?;
    let project = projects::by_name(&row.name)?.ok_or_else(gone)?;
    Ok((row, project))
}

impl Preparing<'_> {
    fn records(&mut self) -> Done<()> {
        let dead = std::mem::take(&mut self.decoded.dead);
        self.dead(dead);
        let mut todo: BTreeMap<usize, Job> = BTreeMap::new();
        for (at, event) in self.decoded.events.iter().enumerate() {
            todo.entry(event.collection).or_default().events.push(at);
        }
        for framed in std::mem::take(&mut self.decoded.framed) {
            let job = todo.entry(framed.collection).or_default();
            job.framed.push(framed);
        }
        // An event that turns out to belong elsewhere is checked by then, and stays where it goes.
        while !todo.is_empty() {
            let jobs = std::mem::take(&mut todo);
            self.look(jobs.keys().copied())?;
            let mut texts = Vec::new();
            for (collection, mut job) in jobs {
                wait::check_interrupts();
                if self.is_strict() {
                    job.events = self.checked(collection, job.events, &mut todo);
                }
                self.learn_declared(collection, &mut job)?;
                if !job.framed.is_empty() {
                    self.framed(collection, &job.framed)?;
                }
                if self.goes_as_text(collection, &job.events) {
                    let events = self.checked(collection, job.events, &mut todo);
                    texts.push((collection, events));
                } else {
                    self.columns(collection, job.events, &mut todo)?;
                }
            }
            self.texts(texts)?;
        }
        Ok(())
    }

    fn name(&self, collection: usize) -> &str {
        let names = self.decoded.collections.names();
        names.get(collection).map_or("", |name| name.as_str())
    }

    /// Looks collections up that are not known yet.
    fn look(&mut self, collections: impl Iterator<Item = usize>) -> Done<()> {
        let unknown: Vec<usize> = collections
            .filter(|at| !self.places.contains_key(at))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let found = xact::worker(|| {
            let place = |&at: &usize| Ok((at, place(self.row.id, self.name(at))?));
            unknown.iter().map(place).collect::<Result<Vec<_>>>()
        })?;
        self.places.extend(found);
        Ok(())
    }

    fn look_again(&mut self, collection: usize) -> Done<()> {
        self.places.remove(&collection);
        self.look(std::iter::once(collection))
    }

    fn registered(&self, collection: usize) -> Option<(Collection, Rc<Schema>)> {
        self.places.get(&collection)?.registered.clone()
    }

    /// Few events are no chunk of their own, and what goes through mappers has to be text.
    fn goes_as_text(&self, collection: usize, events: &[usize]) -> bool {
        let is_mapped = self.places.get(&collection).is_some_and(|p| p.is_mapped);
        is_mapped
            || events.len() < row_chunk::MAX_ROWS && self.bytes(events) < row_chunk::MAX_TEXT_BYTES
    }

    fn bytes(&self, events: &[usize]) -> usize {
        let events = events.iter().filter_map(|&at| self.decoded.events.get(at));
        events.map(|event| self.decoded.text(event).len()).sum()
    }

    fn dead(&mut self, dead: impl IntoIterator<Item = DeadLetter>) {
        for dead in dead {
            let letter = self.letter(&dead);
            self.done.letters.push(letter);
        }
    }

    fn letter(&self, dead: &DeadLetter) -> Letter {
        Letter::of_record(dead, self.whose(dead.record) == Whose::Own)
    }

    fn whose(&self, record: usize) -> Whose {
        let record = self.batch.records().get(record);
        match record.and_then(|record| record.mark.as_ref()) {
            Some(mark) if self.own.contains(&mark.origin) => Whose::Own,
            _ => Whose::Others,
        }
    }

    /// An event that is refused: its record, or of a record with several events the event alone.
    fn refuse(&mut self, at: usize, error: DecodeError) {
        let Some(event) = self.decoded.events.get(at) else {
            return;
        };
        let record = event.record;
        let shares = |other: Option<usize>| {
            other
                .and_then(|at| self.decoded.events.get(at))
                .is_some_and(|e| e.record == record)
        };
        let mut letter = self.letter(&DeadLetter { record, error });
        if shares(at.checked_sub(1)) || shares(at.checked_add(1)) {
            let mut line = String::new();
            self.decoded.write_line(event, &mut line);
            letter.payload = Some(line.into_bytes());
            letter.collection = Some(self.name(event.collection).to_owned());
        }
        self.done.letters.push(letter);
    }

    /// Checks events that go as text; those of other collections go back.
    fn checked(
        &mut self,
        collection: usize,
        events: Vec<usize>,
        todo: &mut BTreeMap<usize, Job>,
    ) -> Vec<usize> {
        let mut mine = Vec::with_capacity(events.len());
        for at in events {
            match self.decoded.check(at) {
                Err(error) => self.refuse(at, error),
                Ok(()) => match self.decoded.events[at].collection {
                    same if same == collection => mine.push(at),
                    other => todo.entry(other).or_default().events.push(at),
                },
            }
        }
        mine
    }

    /// Whether the project's collections or fields are bounded.
    fn is_strict(&self) -> bool {
        let quota = &self.project.quota;
        self.project.is_fixed || quota.collections.is_some() || quota.fields.is_some()
    }

    /// Takes those out that the schema mode or the quota of the project, or the name of an attached table, refuses.
    fn admit(&mut self, events: &mut [(usize, &mut Vec<usize>)]) -> Done<()> {
        let project = Rc::clone(&self.project);
        if !self.is_strict() && project.attached.is_empty() {
            return Ok(());
        }
        let refused = xact::worker(|| {
            let mut admission = Admission::new(&project);
            let mut refused = HashMap::new();
            for (collection, events) in events.iter() {
                for &at in events.iter() {
                    let text = self.decoded.text(&self.decoded.events[at]);
                    if let Some(error) = admission.refusal(self.name(*collection), text)? {
                        refused.insert(at, error);
                    }
                }
            }
            Ok(refused)
        })?;
        for (_, events) in events {
            events.retain(|at| !refused.contains_key(at));
        }
        let mut refused: Vec<(usize, EventError)> = refused.into_iter().collect();
        refused.sort_unstable_by_key(|(at, _)| *at);
        for (at, error) in refused {
            self.refuse(at, error.into());
        }
        Ok(())
    }

    /// Writes events as lines for the inbox.
    fn texts(&mut self, mut texts: Vec<(usize, Vec<usize>)>) -> Done<()> {
        let mut each: Vec<(usize, &mut Vec<usize>)> =
            texts.iter_mut().map(|(at, events)| (*at, events)).collect();
        self.admit(&mut each)?;
        for (collection, events) in texts {
            let mut lines = self.lines(collection, Shape::Event, Whose::Others);
            for at in events {
                let event = &self.decoded.events[at];
                self.decoded.write_line(event, lines.begin());
                lines.end(Origin::Record(event.record), event.has_id == Some(true));
                if lines.payload.len() >= LINES_BYTES {
                    let next = self.lines(collection, Shape::Event, Whose::Others);
                    self.done.lines.push(std::mem::replace(&mut lines, next));
                }
            }
            self.add_lines(lines);
        }
        Ok(())
    }

    fn lines(&self, collection: usize, shape: Shape, whose: Whose) -> Lines {
        Lines {
            collection: self.name(collection).to_owned(),
            shape,
            is_own: whose == Whose::Own,
            payload: String::new(),
            origins: Vec::new(),
            lacks_id: false,
        }
    }

    fn add_lines(&mut self, lines: Lines) {
        if !lines.origins.is_empty() {
            self.done.lines.push(lines);
        }
    }

    fn rules<'s>(&self, schema: &'s Schema) -> Rules<'s> {
        Rules {
            schema,
            limits: limits(),
            stamp: self.stamp,
        }
    }

    /// Makes columns of many events. What the registry has to know before, it learns.
    fn columns(
        &mut self,
        collection: usize,
        mut events: Vec<usize>,
        todo: &mut BTreeMap<usize, Job>,
    ) -> Done<()> {
        let mut has_learnt = false;
        loop {
            let Some((found, schema)) = self.registered(collection) else {
                self.admit(&mut [(collection, &mut events)])?;
                let empty = Schema::new(1, Vec::new());
                let fields =
                    columns::new_fields(&self.decoded, events.iter().copied(), &self.rules(&empty));
                if events.is_empty() {
                    return Ok(());
                }
                if !self.register(collection, fields)? {
                    let most = self.row.collections_max.unwrap_or_default();
                    for at in events {
                        self.refuse(at, EventError::TooManyCollections(most).into());
                    }
                    return Ok(());
                }
                has_learnt = true;
                continue;
            };
            let rules = self.rules(&schema);
            let built = columns::of_events(&self.decoded, &events, &rules);
            let mut built = built.map_err(|error| Failure::Error(error.into()))?;
            if !built.elsewhere.is_empty() {
                let elsewhere = std::mem::take(&mut built.elsewhere);
                let gone: HashSet<usize> = elsewhere.iter().copied().collect();
                events.retain(|at| !gone.contains(at));
                let back = self.checked(collection, elsewhere, todo);
                if !back.is_empty() {
                    // They name this very collection.
                    events.extend(back);
                    continue;
                }
            }
            let is_refused = built.has_unknown_names && self.project.is_fixed;
            if (built.has_new_fields || is_refused) && !has_learnt {
                has_learnt = true;
                let before = events.len();
                self.admit(&mut [(collection, &mut events)])?;
                let fields = columns::new_fields(&self.decoded, events.iter().copied(), &rules);
                if self.register(collection, fields)? || events.len() < before {
                    continue;
                }
            }
            let bytes = self.bytes(&events);
            self.take(found, schema, built, bytes, Whose::Others);
            return Ok(());
        }
    }

    /// Takes columns in, and what did not become any.
    fn take(
        &mut self,
        collection: Collection,
        schema: Rc<Schema>,
        built: Columns,
        bytes: usize,
        whose: Whose,
    ) {
        let Columns {
            parts,
            dead,
            invalid,
            ..
        } = built;
        self.dead(dead);
        let table = self.table(collection, schema);
        let is_own = whose == Whose::Own;
        table.bytes += bytes;
        table.own_bytes += if is_own { bytes } else { 0 };
        let (samples, counts) = { invalid }.take();
        table.invalid.extend(samples, counts);
        table.parts.extend(parts.into_iter().map(|part| Part {
            rows: part.rows,
            is_own,
            origins: part.records.into_iter().map(Origin::Record).collect(),
        }));
    }

    /// The chunks of a collection in the making, of one version of its schema: a field that came since lies in `_extra`.
    fn table(&mut self, collection: Collection, schema: Rc<Schema>) -> &mut Table {
        let key = (collection.id, schema.version);
        self.done.tables.entry(key).or_insert_with(|| Table {
            collection,
            schema,
            parts: Vec::new(),
            invalid: Default::default(),
            bytes: 0,
            own_bytes: 0,
        })
    }

    /// Registers a collection, or fields of one that is there, in a transaction of its own. Whether there is anything new;
    /// of a collection, whether it is there.
    fn register(&mut self, collection: usize, fields: Vec<(String, FieldType)>) -> Done<bool> {
        let mut learnt = Learnt::default();
        match self.registered(collection) {
            Some(_) if fields.is_empty() => return Ok(false),
            Some((found, _)) => {
                learnt.fields.insert(found.id, fields);
            }
            None => {
                let key = (self.row.id, self.name(collection).to_owned());
                learnt.collections.insert(key, fields);
            }
        }
        let is_new = xact::worker(|| register(&learnt))?;
        if is_new {
            wake::schema_changed();
        }
        self.look_again(collection)?;
        Ok(is_new && self.registered(collection).is_some())
    }

    /// Registers the fields that the schemas of the events' writers declare, with the types that they say: whichever road the
    /// events go.
    fn learn_declared(&mut self, collection: usize, job: &mut Job) -> Done<()> {
        let schemas: HashSet<usize> = (job.events.iter())
            .filter_map(|&at| self.decoded.events[at].declared)
            .collect();
        let mut declared: BTreeMap<String, FieldType> = BTreeMap::new();
        for (raw, ty) in schemas
            .iter()
            .filter_map(|&at| self.decoded.declared.get(at))
            .flatten()
        {
            let name = names::field_name(raw);
            if names::server_field(raw).is_none() && names::can_be_column(&name) {
                declared.entry(name.into_owned()).or_insert(*ty);
            }
        }
        let known = self.registered(collection);
        let schema = known.map(|(_, schema)| schema);
        if let Some(schema) = &schema {
            declared.retain(|name, _| schema.field(name).is_none());
        }
        declared.retain(|name, _| !SYSTEM_FIELDS.iter().any(|(_, system, _)| system == name));
        if declared.is_empty() {
            return Ok(());
        }
        self.admit(&mut [(collection, &mut job.events)])?;
        if job.events.is_empty() {
            return Ok(());
        }
        let user_fields = schema
            .iter()
            .flat_map(|s| &s.fields)
            .filter(|f| f.is_user());
        let room = limits().max_fields.saturating_sub(user_fields.count());
        self.register(collection, declared.into_iter().take(room).collect())?;
        Ok(())
    }
}

fn place(project_id: i32, name: &str) -> Result<Place> {
    let found = registry::collection_named(View::Current, project_id, name)?;
    Ok(Place {
        registered: match found {
            Some(collection) => {
                let schema = registry::schema(View::Current, &collection)?;
                Some((collection, Rc::new(schema)))
            }
            None => None,
        },
        is_mapped: mapper::applies(project_id, name)?,
    })
}

impl Lines {
    /// Where the next line is written.
    fn begin(&mut self) -> &mut String {
        if !self.origins.is_empty() {
            self.payload.push('\n');
        }
        &mut self.payload
    }

    fn end(&mut self, origin: Origin, has_id: bool) {
        self.origins.push(origin);
        self.lacks_id |= !has_id;
    }
}
