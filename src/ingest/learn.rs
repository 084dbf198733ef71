//! What the digest learns from events before it writes them: collections and fields that are new.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rakam_event::discovery::Discovery;
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;

use super::lookup::{Found, Registry};
use crate::catalog::inbox::TailRow;
use crate::catalog::registry;
use crate::pg::spi::View;
use crate::pg::{Result, guc};

/// What is to be registered.
#[derive(Default)]
pub struct Learnt {
    /// By project and name.
    pub collections: BTreeMap<(i32, String), Vec<(String, FieldType)>>,
    pub fields: BTreeMap<i32, Vec<(String, FieldType)>>,
}

impl Learnt {
    pub fn is_empty(&self) -> bool {
        self.collections.is_empty() && self.fields.is_empty()
    }
}

/// Learns new names from events.
pub struct Learner {
    registry: Registry,
    known: HashMap<i32, Discovery>,
    strangers: BTreeMap<(i32, String), Discovery>,
    max_fields: usize,
}

impl Learner {
    pub fn new(view: View) -> Self {
        Self {
            registry: Registry::new(view),
            known: HashMap::new(),
            strangers: BTreeMap::new(),
            max_fields: guc::max_fields(),
        }
    }

    pub fn prepare(&mut self, page: &[TailRow]) -> Result<()> {
        self.registry.prepare(page)
    }

    pub fn learn(&mut self, row: &TailRow) -> Result<()> {
        if row.payload.is_empty() {
            return Ok(());
        }
        let max_fields = self.max_fields;
        let learner = match self.registry.find(row)? {
            Found::Dropped => return Ok(()),
            Found::Place(place) => self
                .known
                .entry(place.collection.id)
                .or_insert_with(|| Discovery::new(&place.schema, max_fields)),
            Found::NoCollection(_) => {
                let key = (row.project_id, row.collection.clone());
                self.strangers
                    .entry(key)
                    .or_insert_with(|| Discovery::new(&Schema::new(1, Vec::new()), max_fields))
            }
        };
        for line in row.payload.split(|&b| b == b'\n') {
            let Ok(event) = std::str::from_utf8(line) else {
                continue;
            };
            if !event.is_empty() {
                // A panic teaches nothing; the event is parked when it is written.
                let _ = catch_unwind(AssertUnwindSafe(|| {
                    learner.observe(event, row.txid as i64, row.received_at_us);
                }));
            }
        }
        Ok(())
    }

    pub fn finish(self) -> Learnt {
        Learnt {
            collections: self
                .strangers
                .into_iter()
                .map(|(key, learner)| (key, learner.new_fields()))
                .collect(),
            fields: self
                .known
                .into_iter()
                .map(|(id, learner)| (id, learner.new_fields()))
                .filter(|(_, fields)| !fields.is_empty())
                .collect(),
        }
    }
}

/// Second transaction: names, in sorted order, before the data that uses them. What the project's quota has no room
/// for is left out. Answers whether anything was new.
pub fn register(learnt: &Learnt) -> Result<bool> {
    let mut changed = false;
    for ((project_id, name), fields) in &learnt.collections {
        if !registry::add_collection(*project_id, name)? {
            continue;
        }
        changed = true;
        if let Some(collection) = registry::collection_named(View::Current, *project_id, name)? {
            registry::add_fields(collection.id, fields, false)?;
        }
    }
    for (collection_id, fields) in &learnt.fields {
        changed |= registry::add_fields(*collection_id, fields, false)? > 0;
    }
    Ok(changed)
}
