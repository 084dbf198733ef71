//! The registry as one transaction of the digest sees it, read once per page of rows and not once per row: there may be
//! thousands of projects with an event each.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use rakam_event::schema::Schema;

use crate::catalog::former::{self, FormerName, Owner};
use crate::catalog::inbox::TailRow;
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::pg::Result;
use crate::pg::spi::View;

/// Where the events of a row go.
#[derive(Clone)]
pub struct Place {
    pub project: Rc<ProjectRow>,
    pub collection: Rc<Collection>,
    pub schema: Rc<Schema>,
}

/// What is known of a row's names.
pub enum Found {
    Place(Place),
    /// The project is there, a collection of this name is not.
    NoCollection(Rc<ProjectRow>),
    /// The project, or the collection that the events were sent to, was dropped: they go with it.
    Dropped,
}

pub struct Registry {
    view: View,
    projects: HashMap<i32, Option<Rc<ProjectRow>>>,
    by_id: HashMap<i32, Option<Place>>,
    by_name: HashMap<(i32, String), Option<Place>>,
    /// Asked for when the first row is met that was stored by name.
    former: Option<Vec<FormerName>>,
}

impl Registry {
    pub fn new(view: View) -> Self {
        Self {
            view,
            projects: HashMap::new(),
            by_id: HashMap::new(),
            by_name: HashMap::new(),
            former: None,
        }
    }

    /// Reads what a page of rows needs, in as few statements as its size allows.
    pub fn prepare(&mut self, page: &[TailRow]) -> Result<()> {
        let unknown: HashSet<i32> = page
            .iter()
            .map(|row| row.project_id)
            .filter(|id| !self.projects.contains_key(id))
            .collect();
        self.projects.extend(unknown.iter().map(|&id| (id, None)));
        if !unknown.is_empty() {
            let ids: Vec<i32> = unknown.into_iter().collect();
            for project in registry::projects_by_id(self.view, &ids)? {
                self.projects.insert(project.id, Some(Rc::new(project)));
            }
        }
        self.prepare_collections(page.iter().map(|row| row.collection_id).collect())
    }

    /// Reads the collections of these ids. Their projects are known.
    fn prepare_collections(&mut self, mut unknown: HashSet<i32>) -> Result<()> {
        unknown.retain(|id| *id != 0 && !self.by_id.contains_key(id));
        self.by_id.extend(unknown.iter().map(|&id| (id, None)));
        if unknown.is_empty() {
            return Ok(());
        }
        let ids: Vec<i32> = unknown.into_iter().collect();
        let collections = registry::collections_by_id(self.view, &ids)?;
        let known: Vec<&Collection> = collections.iter().collect();
        let mut schemas = registry::schemas(self.view, &known)?;
        for collection in collections {
            let place = self
                .projects
                .get(&collection.project_id)
                .cloned()
                .flatten()
                .zip(schemas.remove(&collection.id))
                .map(|(project, schema)| Place {
                    project,
                    schema: Rc::new(schema),
                    collection: Rc::new(collection.clone()),
                });
            self.by_id.insert(collection.id, place);
        }
        Ok(())
    }

    /// Where a row belongs: by its id, or by what its name meant when it was stored.
    pub fn find(&mut self, row: &TailRow) -> Result<Found> {
        if !self.projects.contains_key(&row.project_id)
            || row.collection_id != 0 && !self.by_id.contains_key(&row.collection_id)
        {
            self.prepare(std::slice::from_ref(row))?;
        }
        let Some(project) = self.projects.get(&row.project_id).cloned().flatten() else {
            return Ok(Found::Dropped);
        };
        if row.collection_id != 0 {
            return Ok(self.registered(row.collection_id));
        }
        if self.former.is_none() {
            self.former = Some(former::names(self.view, None)?);
        }
        match former::owner(self.former.as_deref().unwrap_or_default(), row) {
            Owner::Present => self.find_name(project, &row.collection),
            Owner::Nobody => Ok(Found::Dropped),
            Owner::Collection(id) => {
                self.prepare_collections(HashSet::from([id]))?;
                Ok(self.registered(id))
            }
        }
    }

    fn registered(&self, id: i32) -> Found {
        match self.by_id.get(&id) {
            Some(Some(place)) => Found::Place(place.clone()),
            _ => Found::Dropped,
        }
    }

    fn find_name(&mut self, project: Rc<ProjectRow>, name: &str) -> Result<Found> {
        let key = (project.id, name.to_owned());
        if !self.by_name.contains_key(&key) {
            let place = match registry::collection_named(self.view, key.0, &key.1)? {
                Some(collection) => Some(Place {
                    schema: Rc::new(registry::schema(self.view, &collection)?),
                    collection: Rc::new(collection),
                    project: Rc::clone(&project),
                }),
                None => None,
            };
            self.by_name.insert(key.clone(), place);
        }
        Ok(match &self.by_name[&key] {
            Some(place) => Found::Place(place.clone()),
            None => Found::NoCollection(project),
        })
    }
}
