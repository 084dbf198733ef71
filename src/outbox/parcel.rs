//! Rows of the outbox become records: JSON → columns of the collection's present schema → Avro in our framing.
//!
//! Each event has its place in the batch by the rows before it, whatever becomes of them: made anew after a crash, with fields
//! that have come since, an event has the same mark. What cannot be a record is left out and told, for the dead letters.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::DataType;
use rakam_event::avro::Encoder;
use rakam_event::batch::{BatchBuilder, InvalidCount, InvalidValue, Layout};
use rakam_event::error::EventError;
use rakam_lake::row_chunk::{Origin, Rules};
use rakam_sources::publish::{self, Outgoing, Parcel, StoreOptions};

use crate::catalog::event_store::{Assigned, EventStore};
use crate::catalog::inbox::TailRow;
use crate::catalog::invalid;
use crate::ingest::collect::limits;
use crate::ingest::lookup::{Found, Place, Registry};
use crate::ingest::quota;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, guc};

/// A keyless event goes with so many of its neighbours to a partition: they make one batch of the broker.
const NEIGHBOURS: u32 = 1000;
const CRASHED: &str = "the event crashed its parser";

thread_local! {
    /// Events (outbox row, line) that crashed the parser in this process.
    static CRASHERS: RefCell<HashSet<(i64, usize)>> = RefCell::new(HashSet::new());
}

/// An event that cannot be published.
pub struct Dead {
    pub place: u32,
    pub error: String,
}

/// Invalid values of a collection.
struct Invalid {
    collection_id: i32,
    samples: Vec<InvalidValue>,
    counts: Vec<InvalidCount>,
}

/// A batch, ready to be published, and what is to be noted when it is.
pub struct Packed {
    pub parcel: Arc<Parcel>,
    pub dead: Vec<Dead>,
    invalid: Vec<Invalid>,
    usage: quota::Digested,
    project_id: i32,
}

impl Packed {
    /// Notes what was found while the records were made, in the transaction that notes them as published.
    pub fn note(&mut self) -> Result<()> {
        // In the order in which the digest does it, so that neither waits for the other in a circle.
        self.invalid.sort_by_key(|found| found.collection_id);
        for found in &self.invalid {
            let Invalid {
                collection_id,
                samples,
                counts,
            } = found;
            invalid::record(self.project_id, *collection_id, samples, counts)?;
        }
        self.usage.store()
    }

    /// After the commit.
    pub fn tell(&self) {
        self.usage.tell();
    }
}

/// How many partitions each topic has; what is missing is left to be asked for.
pub type Topics = HashMap<Arc<str>, i32>;

/// The topics to which the events of rows go. Events that cannot go anywhere have none.
pub fn topics(store: &EventStore, rows: &[TailRow]) -> Result<Vec<Arc<str>>> {
    let mut registry = Registry::new(View::Current);
    registry.prepare(rows)?;
    let mut topics: Vec<Arc<str>> = Vec::new();
    for row in rows {
        if let Found::Place(place) = registry.find(row)?
            && let Ok(topic) = store.options.topic(&store.project, &place.collection.name)
            && !topics.contains(&topic)
        {
            topics.push(topic);
        }
    }
    Ok(topics)
}

/// Makes records of the rows of a batch.
pub fn pack(
    store: &EventStore,
    batch: &Assigned,
    rows: &[TailRow],
    topics: &Topics,
) -> Result<Packed> {
    loop {
        let mut packing = Packing::new(store, batch, topics);
        match packing.all(rows)? {
            Some(crasher) => {
                CRASHERS.with_borrow_mut(|known| known.insert(crasher));
            }
            None => return packing.finish(),
        }
    }
}

/// The events of a batch with their places, row by row: those that are there.
pub fn events<'a>(
    batch: &'a Assigned,
    rows: &'a [TailRow],
) -> impl Iterator<Item = (u32, usize, &'a TailRow, &'a [u8])> {
    let by_id: HashMap<i64, &TailRow> = rows.iter().map(|row| (row.id, row)).collect();
    let mut next = 0u32;
    batch.rows.iter().flat_map(move |head| {
        let first = next;
        next += u32::try_from(head.n).unwrap_or(0);
        by_id
            .get(&head.id)
            .copied()
            .into_iter()
            .flat_map(move |row| {
                let lines = row.payload.split(|&b| b == b'\n').filter(|l| !l.is_empty());
                lines
                    .enumerate()
                    .map(move |(line, event)| (first + line as u32, line, row, event))
            })
    })
}

/// The records of one collection in the making.
struct Making {
    place: Place,
    rules: Rules,
    topic: Arc<str>,
    collection: Arc<str>,
    builder: BatchBuilder,
    /// Place and time of each row of the builder.
    rows: Vec<(u32, i64)>,
}

struct Packing<'a> {
    store: &'a EventStore,
    batch: &'a Assigned,
    topics: &'a Topics,
    registry: Registry,
    making: BTreeMap<i32, Making>,
    records: Vec<Outgoing>,
    dead: Vec<Dead>,
    invalid: Vec<Invalid>,
    usage: quota::Digested,
}

impl<'a> Packing<'a> {
    fn new(store: &'a EventStore, batch: &'a Assigned, topics: &'a Topics) -> Self {
        Self {
            store,
            batch,
            topics,
            registry: Registry::new(View::Current),
            making: BTreeMap::new(),
            records: Vec::new(),
            dead: Vec::new(),
            invalid: Vec::new(),
            usage: quota::Digested::default(),
        }
    }

    /// Adds all events. An event that crashed the parser ends it: what was made is of no use.
    fn all(&mut self, rows: &[TailRow]) -> Result<Option<(i64, usize)>> {
        self.registry.prepare(rows)?;
        let mut counted = 0;
        for (place, line, row, event) in events(self.batch, rows) {
            let found = self.registry.find(row)?;
            if counted != row.id {
                counted = row.id;
                match &found {
                    Found::Place(known) => self.usage.add(&known.project, row),
                    Found::NoCollection(project) => self.usage.add(project, row),
                    Found::Dropped => {}
                }
            }
            match found {
                Found::Dropped => {}
                Found::NoCollection(project) => {
                    let why = match project.collections_max {
                        Some(most) => EventError::TooManyCollections(most).to_string(),
                        None => "collection could not be registered".to_owned(),
                    };
                    self.refuse(place, why);
                }
                Found::Place(known) => {
                    let source = (row.id, line);
                    if CRASHERS.with_borrow(|known| known.contains(&source)) {
                        self.refuse(place, CRASHED);
                    } else if !self.add(known, place, row, event)? {
                        return Ok(Some(source));
                    }
                }
            }
        }
        for (_, making) in std::mem::take(&mut self.making) {
            self.write(making)?;
        }
        self.records.sort_unstable_by_key(|record| record.place);
        Ok(None)
    }

    fn refuse(&mut self, place: u32, error: impl Into<String>) {
        let error = error.into();
        self.dead.push(Dead { place, error });
    }

    /// False: the event crashed the parser.
    fn add(&mut self, place: Place, number: u32, row: &TailRow, event: &[u8]) -> Result<bool> {
        let Ok(event) = std::str::from_utf8(event) else {
            self.refuse(number, "event is not valid UTF-8 text");
            return Ok(true);
        };
        let id = place.collection.id;
        let mut making = match self.making.remove(&id) {
            Some(making) => making,
            None => {
                let name = &place.collection.name;
                match self.store.options.topic(&self.store.project, name) {
                    Ok(topic) => Making::new(place, topic)?,
                    Err(why) => {
                        self.refuse(number, why);
                        return Ok(true);
                    }
                }
            }
        };
        let stamp = Origin {
            received_at_us: row.received_at_us,
            shift_us: row.shift_us,
            xid: row.txid as i64,
            rules: making.rules,
        }
        .stamp();
        let pushed = catch_unwind(AssertUnwindSafe(|| making.builder.push(event, &stamp)));
        match pushed {
            Err(_) => return Ok(false),
            Ok(Ok(())) => making.rows.push((number, row.received_at_us)),
            Ok(Err(EventError::BatchFull)) if !making.rows.is_empty() => {
                let place = making.place.clone();
                self.write(making)?;
                return self.add(place, number, row, event.as_bytes());
            }
            Ok(Err(error)) => self.refuse(number, error.to_string()),
        }
        self.making.insert(id, making);
        Ok(true)
    }

    fn write(&mut self, making: Making) -> Result<()> {
        if making.rows.is_empty() {
            return Ok(());
        }
        let Making {
            place,
            topic,
            collection,
            builder,
            rows,
            ..
        } = making;
        let done = builder.finish()?;
        let could_not = |error: rakam_event::avro::AvroError| {
            PgError::internal(format!("could not encode events as Avro: {error}"))
        };
        let mut encoder = Encoder::new(&place.schema).map_err(could_not)?;
        let values = encoder.encode(&done.batch).map_err(could_not)?;
        let keys = match self.store.options.key_field() {
            None => None,
            Some(field) => {
                let column = place.schema.fields.iter().position(|f| f.name == field);
                column
                    .and_then(|at| done.batch.columns().get(at))
                    .map(|column| arrow::compute::cast(column, &DataType::Utf8))
                    .transpose()
                    .map_err(|error| {
                        PgError::internal(format!("could not read the key of events: {error}"))
                    })?
            }
        };
        let keys = keys.as_ref().map(|keys| keys.as_string::<i32>());
        let by_collection = matches!(
            self.store.options,
            StoreOptions::Kinesis {
                key: publish::PartitionKey::Collection,
                ..
            }
        );
        let partitions = self.topics.get(&topic).copied().unwrap_or(1);
        for (at, (value, (number, received_us))) in values.into_iter().zip(rows).enumerate() {
            let key = match keys {
                _ if by_collection => Some(collection.to_string()),
                Some(keys) if keys.is_valid(at) => Some(keys.value(at).to_owned()),
                _ => None,
            };
            let partition = match &key {
                Some(key) => publish::partition_of(key, partitions),
                None => {
                    let turn = self.batch.publish_seq + i64::from(number / NEIGHBOURS);
                    (turn % i64::from(partitions.max(1))) as i32
                }
            };
            self.records.push(Outgoing {
                place: number,
                topic: Arc::clone(&topic),
                partition,
                collection: Arc::clone(&collection),
                key,
                value,
                timestamp_ms: received_us.div_euclid(1000),
            });
        }
        self.invalid.push(Invalid {
            collection_id: place.collection.id,
            samples: done.invalid,
            counts: done.invalid_counts,
        });
        Ok(())
    }

    fn finish(self) -> Result<Packed> {
        Ok(Packed {
            parcel: Arc::new(Parcel {
                origin: self.batch.origin,
                publish_seq: self.batch.publish_seq,
                records: self.records,
            }),
            dead: self.dead,
            invalid: self.invalid,
            usage: self.usage,
            project_id: self.store.project_id,
        })
    }
}

impl Making {
    fn new(place: Place, topic: Arc<str>) -> Result<Self> {
        let rules = Rules {
            time_past_us: place.project.time_past_us,
            time_future_us: place.project.time_future_us,
            max_string_bytes: guc::max_string_bytes(),
        };
        Ok(Self {
            rules,
            topic,
            collection: Arc::from(place.collection.name.as_str()),
            builder: BatchBuilder::new(&place.schema, Layout::Stored, &limits())?,
            rows: Vec::new(),
            place,
        })
    }
}
