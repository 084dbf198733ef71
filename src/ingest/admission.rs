//! Whether a single event may enter: the schema mode of the project, its quota of collections and fields, and names that
//! are those of attached tables.
//!
//! An open project without such a quota pays for none of this. Otherwise names are compared with the registry as it is
//! now, through a cache of the backend; what is not digested yet is not known, so what gets past the quota here is
//! bounded again when the registry learns of it.

use std::collections::HashSet;

use rakam_event::entry;
use rakam_event::error::EventError;

use crate::catalog::projects::{self, Project};
use crate::catalog::registry;
use crate::pg::Result;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;

/// Judges the events of one call.
pub struct Admission<'a> {
    project: &'a Project,
    /// New collections, and new fields by collection, that events of this call have brought.
    collections: HashSet<String>,
    fields: HashSet<(String, String)>,
    /// Collections and fields of the project, once asked for.
    counts: Option<(i64, i64)>,
}

impl<'a> Admission<'a> {
    pub fn new(project: &'a Project) -> Self {
        Self {
            project,
            collections: HashSet::new(),
            fields: HashSet::new(),
            counts: None,
        }
    }

    /// Why this event is refused; None if it is not. An error concerns the whole call.
    pub fn refusal(&mut self, collection: &str, properties: &str) -> Result<Option<EventError>> {
        if self.project.attached.contains(collection) {
            return Ok(Some(EventError::AttachedTable(collection.to_owned())));
        }
        let quota = &self.project.quota;
        if !self.project.is_fixed && quota.collections.is_none() && quota.fields.is_none() {
            return Ok(None);
        }
        let id = projects::collection_id(self.project.id, collection)?;
        if id == 0
            && let Some(refusal) = self.new_collection(collection)?
        {
            return Ok(Some(refusal));
        }
        if (self.project.is_fixed || quota.fields.is_some())
            && let Some(refusal) = self.new_fields(id, collection, properties)?
        {
            return Ok(Some(refusal));
        }
        // Only an event that enters brings one.
        if id == 0 && quota.collections.is_some() && !self.collections.contains(collection) {
            self.collections.insert(collection.to_owned());
        }
        Ok(None)
    }

    fn new_collection(&mut self, collection: &str) -> Result<Option<EventError>> {
        if self.project.is_fixed {
            return Ok(Some(EventError::UnknownCollection(collection.to_owned())));
        }
        let Some(most) = self.project.quota.collections else {
            return Ok(None);
        };
        if self.collections.contains(collection) {
            return Ok(None);
        }
        let (known, _) = self.counts()?;
        if known + self.collections.len() as i64 >= i64::from(most) {
            return Ok(Some(EventError::TooManyCollections(most)));
        }
        Ok(None)
    }

    fn new_fields(
        &mut self,
        id: i32,
        collection: &str,
        properties: &str,
    ) -> Result<Option<EventError>> {
        let mut known = projects::fields(id)?;
        let mut new = entry::new_names(properties, |name| known.contains(name))?;
        if new.unknown.is_empty() {
            return Ok(None);
        }
        // What was added since the cache was filled.
        known = projects::fields_now(id)?;
        new = entry::new_names(properties, |name| known.contains(name))?;
        if self.project.is_fixed {
            return Ok(new
                .unknown
                .into_iter()
                .next()
                .map(|field| EventError::UnknownField {
                    collection: collection.to_owned(),
                    field,
                }));
        }
        let Some(most) = self.project.quota.fields else {
            return Ok(None);
        };
        let new: Vec<(String, String)> = new
            .fields
            .into_iter()
            .map(|field| (collection.to_owned(), field))
            .filter(|field| !self.fields.contains(field))
            .collect();
        let (_, have) = self.counts()?;
        if !new.is_empty() && have + (self.fields.len() + new.len()) as i64 > i64::from(most) {
            return Ok(Some(EventError::TooManyFields(most)));
        }
        self.fields.extend(new);
        Ok(None)
    }

    fn counts(&mut self) -> Result<(i64, i64)> {
        if let Some(counts) = self.counts {
            return Ok(counts);
        }
        let _owner = ActAs::owner();
        let latest = Registered::latest();
        let counts = registry::counts(View::Under(latest.get()), self.project.id)?;
        self.counts = Some(counts);
        Ok(counts)
    }
}
