//! Files that the description does not know: which of them count, by what they say themselves.

use super::*;
use crate::file_info::FileField;

/// A file that has not been described a day after it was begun is none: it was left behind by a crash, or an upload
/// came through after its deletion.
const LATE_US: i64 = 86_400_000_000;

impl State {
    /// The data files among the listed objects that are worth a look: neither known nor known to be gone, and not older than
    /// can be. Of a storage without description that is every data file.
    pub fn undescribed<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
        let since_us = self.header.as_ref().map_or(i64::MIN, |h| h.at_us - LATE_US);
        paths
            .filter(|path| !self.files.contains_key(*path) && !self.gone.contains(*path))
            .filter(|path| object_id(path).is_some_and(|id| begun_us(id) >= since_us))
            .collect()
    }

    /// Decides over undescribed files by what they say, and takes in those that count, with their collections and fields.
    /// `present`: every data file in the storage. Gives the paths that do not count.
    ///
    /// An operation that made files of other files counts if all of its files are there, or if one of the others is
    /// not there any more (they go once it is committed); else the others count. Two operations on the same file: the
    /// later one, for a file is replaced once; and on a file that the description does not count: none, for what replaced it is
    /// described. Files made of events straight from the database count: no events of theirs
    /// are elsewhere in the storage, because what a crash left of an attempt is described as none before the next one.
    pub fn settle(
        &mut self,
        mut found: Vec<(String, FileInfo)>,
        present: &HashSet<String>,
    ) -> Vec<String> {
        self.tidy();
        found.sort_by_key(|(path, info)| (info.flush_id, object_id(path)));
        let mut refused = Vec::new();
        let known = self.header.as_ref().map_or(0, |h| h.next_collection_id);
        found.retain(|(path, info)| {
            let is_dropped = info
                .collection_id
                .is_some_and(|id| id < known && !self.collections.contains_key(&id));
            if is_dropped || info.collection_id.is_none() {
                refused.push(path.clone());
            }
            !is_dropped && info.collection_id.is_some()
        });

        let live = self.header.is_some().then(|| {
            let paths = self.files.keys().chain(found.iter().map(|(path, _)| path));
            paths.filter_map(|path| object_id(path)).collect()
        });
        let replaced = replaced(&found, present, live);
        let is_replaced =
            |path: &str| object_id(path).is_some_and(|id| replaced.inputs.contains(&id));
        let gone = &mut self.gone;
        self.files.retain(|path, _| {
            let counts = !is_replaced(path);
            if !counts {
                gone.insert(path.clone());
            }
            counts
        });
        for (path, info) in found {
            let counts = info.replaces.is_none() || replaced.operations.contains(&info.flush_id);
            if !counts || is_replaced(&path) {
                refused.push(path);
                continue;
            }
            let collection_id = self.register(&info);
            let file = LiveFile {
                collection_id,
                described: None,
            };
            self.files.insert(path, file);
        }
        self.name_apart();
        self.gone.extend(refused.iter().cloned());
        refused
    }

    /// Data files in the storage that are known not to count: the next owner has to know that of them, too.
    pub fn out_of_use(&self, present: &HashSet<String>) -> Vec<String> {
        let mut paths: Vec<String> = self.gone.intersection(present).cloned().collect();
        paths.sort_unstable();
        paths
    }

    /// The collection of a file, with the file's fields.
    fn register(&mut self, info: &FileInfo) -> i32 {
        let (project_id, collection_id) = (
            info.project_id.unwrap_or_default(),
            info.collection_id.unwrap_or_default(),
        );
        self.projects
            .entry(project_id)
            .or_insert_with(|| Map::from_iter([("name".to_owned(), info.project.clone().into())]));
        let is_new = !self.collections.contains_key(&collection_id);
        let collection = self.collections.entry(collection_id).or_default();
        let version = number(&collection.row, "schema_version").max(info.schema_version);
        if is_new {
            collection.project_id = project_id;
            collection.row.insert("unknown".to_owned(), true.into());
        }
        // The last file has the last name: of a collection that is not described, and of one that is renamed since.
        let described_us = self.header.as_ref().map_or(i64::MIN, |h| h.at_us);
        if collection.row.contains_key("unknown") || begun_us(info.flush_id) >= described_us {
            collection
                .row
                .insert("name".to_owned(), info.collection.clone().into());
        }
        collection
            .row
            .insert("schema_version".to_owned(), version.into());
        for field in &info.fields {
            collection.add_field(field, info);
        }
        collection_id
    }

    /// Names of collections are different within a project: of two, the one with the higher id came later and has it.
    fn name_apart(&mut self) {
        let mut taken = HashSet::new();
        for (id, collection) in self.collections.iter_mut().rev() {
            let mut name = text(&collection.row, "name").to_owned();
            while !taken.insert((collection.project_id, name.clone())) {
                name = format!("{name}_{id}");
            }
            collection.row.insert("name".to_owned(), name.into());
            collection.row.remove("unknown");
        }
    }
}

impl Collection {
    fn add_field(&mut self, field: &FileField, info: &FileInfo) {
        let has = |rows: &[Map<String, Value>]| {
            rows.iter().any(|row| number(row, "field_id") == field.id)
        };
        if has(&self.fields) || has(&self.dropped_fields) {
            return;
        }
        let row = |id: i32| {
            Map::from_iter([
                ("field_id".to_owned(), Value::from(id)),
                ("name".to_owned(), field.name.clone().into()),
                ("type".to_owned(), field.ty.to_string().into()),
                ("added_version".to_owned(), info.schema_version.into()),
            ])
        };
        let namesake = self
            .fields
            .iter()
            .position(|row| text(row, "name") == field.name);
        match namesake {
            None => self.fields.push(row(field.id)),
            // The name was given anew: the field of the lower id was dropped.
            Some(place) => {
                let (mut old, new) = if number(&self.fields[place], "field_id") < field.id {
                    (
                        std::mem::replace(&mut self.fields[place], row(field.id)),
                        info.schema_version,
                    )
                } else {
                    (row(field.id), info.schema_version + 1)
                };
                old.insert("dropped_version".to_owned(), new.into());
                old.insert("dropped_xid".to_owned(), info.min_xid.to_string().into());
                self.dropped_fields.push(old);
            }
        }
    }
}

fn number(row: &Map<String, Value>, key: &str) -> i32 {
    let number = row.get(key).and_then(Value::as_i64);
    number
        .and_then(|n| i32::try_from(n).ok())
        .unwrap_or_default()
}

fn text<'a>(row: &'a Map<String, Value>, key: &str) -> &'a str {
    row.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// When an object was begun, by its name.
fn begun_us(id: Uuid) -> i64 {
    let time = id.get_timestamp().map(|t| t.to_unix());
    time.map_or(i64::MIN, |(seconds, nanos)| {
        (seconds as i64)
            .saturating_mul(1_000_000)
            .saturating_add(i64::from(nanos / 1_000))
    })
}

/// The operations on files that count, and the files that they replaced.
#[derive(Default)]
struct Replaced {
    operations: HashSet<Uuid>,
    inputs: HashSet<Uuid>,
}

/// `live`: what an operation can have replaced, where that is known.
fn replaced(
    found: &[(String, FileInfo)],
    present: &HashSet<String>,
    live: Option<HashSet<Uuid>>,
) -> Replaced {
    let ids: HashSet<Uuid> = present.iter().filter_map(|path| object_id(path)).collect();
    // Newest last, as `found` is.
    let mut operations: Vec<(Uuid, Vec<&FileInfo>)> = Vec::new();
    for (_, info) in found.iter().filter(|(_, info)| info.replaces.is_some()) {
        match operations.last_mut() {
            Some((id, files)) if *id == info.flush_id => files.push(info),
            _ => operations.push((info.flush_id, vec![info])),
        }
    }
    let mut replaced = Replaced::default();
    for (id, files) in operations.into_iter().rev() {
        let all = files.iter().flat_map(|file| &file.replaces);
        let outputs = all.clone().find_map(|replaces| replaces.outputs);
        let inputs: HashSet<Uuid> = all.flat_map(|replaces| &replaces.ids).copied().collect();
        let is_whole = outputs.is_some_and(|n| n as usize == files.len());
        let counts = is_whole || inputs.iter().any(|input| !ids.contains(input));
        let is_late = live.as_ref().is_some_and(|live| !inputs.is_subset(live));
        if counts && !is_late && replaced.inputs.is_disjoint(&inputs) {
            replaced.operations.insert(id);
            replaced.inputs.extend(inputs);
        }
    }
    replaced
}
