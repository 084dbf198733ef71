//! The registry as one transaction of the digest sees it, read once per page of rows and not once per row: there may be
//! thousands of projects with an event each.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use rakam_event::schema::Schema;

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
    NoCollection,
    /// The project was dropped.
    NoProject,
}

pub struct Registry {
    view: View,
    projects: HashMap<i32, Option<Rc<ProjectRow>>>,
    by_id: HashMap<i32, Option<Place>>,
    by_name: HashMap<(i32, String), Option<Place>>,
}

impl Registry {
    pub fn new(view: View) -> Self {
        Self {
            view,
            projects: HashMap::new(),
            by_id: HashMap::new(),
            by_name: HashMap::new(),
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
        let unknown: HashSet<i32> = page
            .iter()
            .map(|row| row.collection_id)
            .filter(|id| *id != 0 && !self.by_id.contains_key(id))
            .collect();
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

    /// Where a row belongs, by id or by name.
    pub fn find(&mut self, row: &TailRow) -> Result<Found> {
        if !self.projects.contains_key(&row.project_id)
            || row.collection_id != 0 && !self.by_id.contains_key(&row.collection_id)
        {
            self.prepare(std::slice::from_ref(row))?;
        }
        let Some(project) = self.projects.get(&row.project_id).cloned().flatten() else {
            return Ok(Found::NoProject);
        };
        if let Some(Some(place)) = self.by_id.get(&row.collection_id) {
            return Ok(Found::Place(place.clone()));
        }
        let key = (row.project_id, row.collection.clone());
        if !self.by_name.contains_key(&key) {
            let place = match registry::collection_named(self.view, key.0, &key.1)? {
                Some(collection) => Some(Place {
                    schema: Rc::new(registry::schema(self.view, &collection)?),
                    collection: Rc::new(collection),
                    project,
                }),
                None => None,
            };
            self.by_name.insert(key.clone(), place);
        }
        Ok(match &self.by_name[&key] {
            Some(place) => Found::Place(place.clone()),
            None => Found::NoCollection,
        })
    }
}
