//! What a scan reads: the collection as its user sees it, and the files and chunks that may hold wanted rows.
//!
//! All of it is read under the scan's snapshot as the scan's user; only the address of a storage, which tenants do
//! not see, is looked up as the extension's owner, after a file of that storage was visible.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;
use rakam_engine::all::{COLLECTION_FIELD_ID, PROPERTIES_FIELD_ID};
use rakam_engine::ir::TIME_FIELD_ID;
use rakam_engine::{ChunkRef, CmpOp, Expr, FileRef};
use rakam_event::schema::{SYSTEM_FIELDS, Schema};
use rakam_event::types::FieldType;
use rakam_lake::cache::{CachedStore, Counters, Counts};
use rakam_lake::parts::PartStore;
use rakam_lake::prune::{self, Predicate};
use rakam_lake::rows::RowSet;
use rakam_lake::scalar::Scalar;
use rakam_lake::stats::{self, ColumnStat};

use super::broker::{Message, ObjectSource};
use super::columns::Column;
use super::identity::Objects;
use super::options::TableOptions;
use crate::catalog::deletion::{self, Object};
use crate::catalog::inbox::{self, Tick};
use crate::catalog::manifest::{self, ChunkRow, FileRow};
use crate::catalog::registry::{self, Collection};
use crate::pg::runtime::{Runtime, Sender};
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{Oid, PgError, Result, cache, invalidation, wait, xact};

/// Footers are fetched up to so many bytes; the rest is read from the files.
const FOOTER_BYTES_MAX: i64 = 64 << 20;
/// Files whose statistics are in memory at a time: of a hundred fields each has some 5 kB.
const STATISTICS_AT_A_TIME: usize = 1000;

/// What the scan's user may read of the table's options.
pub struct Visible {
    pub project_id: i32,
    pub parts: Vec<Seen>,
    pub tick: Tick,
    pub time_past_us: i64,
    pub time_future_us: i64,
}

/// A collection and its schema; every field that is a column of the scanned table is ready.
pub struct Seen {
    pub collection: Collection,
    pub schema: Schema,
}

/// Looks the table's project and collection up. None: there is nothing that this user may read.
///
/// Names are those of the view. A transaction that keeps an old snapshot may have written into what was registered since: that
/// is looked up as it is now, and its rows are under the view all the same, so that only the transaction's own are seen.
pub fn look_up(
    view: View,
    table: Oid,
    options: &TableOptions,
    columns: &[Column],
) -> Result<Option<Visible>> {
    let latest =
        (xact::keeps_snapshot() && !invalidation::in_parallel_mode()).then(Registered::latest);
    let now = latest.as_ref().map(|latest| View::Under(latest.get()));
    let mut project = registry::project(view, &options.project)?;
    if let (None, Some(now)) = (&project, now) {
        project = registry::project(now, &options.project)?;
    }
    let Some(project) = project else {
        return Ok(None);
    };
    let tick = inbox::tick_of(view, project.id)?;
    // Collections that the view does not know.
    let mut since = Vec::new();
    let collections = if options.is_all() {
        let mut all = registry::collections(view, &options.project)?;
        if let Some(now) = now {
            for new in registry::collections(now, &options.project)? {
                if !(all.iter()).any(|known| known.id == new.id || known.name == new.name) {
                    since.push(new.id);
                    all.push(new);
                }
            }
        }
        for name in inbox::unregistered(view, &tick, project.id)? {
            if !all.iter().any(|collection| collection.name == name) {
                // Its events are there already, its table will be within a second.
                all.push(Collection {
                    id: 0,
                    project_id: project.id,
                    name,
                    ft: None,
                    schema_version: 1,
                    kept_since_us: None,
                });
            }
        }
        all
    } else {
        let mut found = named(view, table, options)?;
        if let (None, Some(now)) = (&found, now) {
            found = named(now, table, options)?;
        }
        found.into_iter().collect()
    };
    let parts = collections
        .into_iter()
        .map(|collection| {
            let mut schema = registry::schema(view, &collection)?;
            let is_new = |column: &Column| schema.field(&column.name).is_none();
            if let Some(now) = now
                && (options.is_all() && since.contains(&collection.id)
                    || !options.is_all() && columns.iter().any(is_new))
            {
                schema = registry::schema(now, &collection)?;
            }
            if !options.is_all() {
                // The table may have the column already while this snapshot's registry does not say so.
                for field in &mut schema.fields {
                    field.column_ready |= columns.iter().any(|column| column.name == field.name);
                }
            }
            Ok(Seen { collection, schema })
        })
        .collect::<Result<Vec<_>>>()?;
    if parts.is_empty() {
        return Ok(None);
    }
    Ok(Some(Visible {
        project_id: project.id,
        parts,
        tick,
        time_past_us: project.time_past_us,
        time_future_us: project.time_future_us,
    }))
}

/// The collection that a table is of.
fn named(view: View, table: Oid, options: &TableOptions) -> Result<Option<Collection>> {
    let named = registry::collection(view, &options.project, &options.collection)?;
    // To an older snapshot a collection that was renamed since has its former name.
    let renamed = match &named {
        Some(named) if named.ft == Some(table) => None,
        _ => registry::collection_of_table(view, table)?,
    };
    Ok(renamed.or(named))
}

/// The field behind each column, by attribute number; a column without one is not in the map.
///
/// Fields are found by name. A column of another type than its field is an error: nothing is reinterpreted.
pub fn fields(
    options: &TableOptions,
    visible: &Visible,
    columns: &[Column],
) -> Result<HashMap<i16, (i32, FieldType)>> {
    let mut fields = HashMap::new();
    for column in columns {
        let field = if options.is_all() {
            all_field(&column.name)
        } else {
            visible
                .parts
                .first()
                .and_then(|part| part.schema.field(&column.name))
                .map(|field| (field.id, field.ty))
        };
        let Some((id, ty)) = field else { continue };
        if column.field_type() != Some(ty) {
            return Err(PgError::new(
                "42804",
                format!("type mismatch for field \"{}\"", column.name),
            )
            .detail(format!(
                "The field is of type {ty}, the column of the foreign table is not."
            ))
            .hint("Declare the column with the type of the field."));
        }
        fields.insert(column.attnum, (id, ty));
    }
    Ok(fields)
}

/// The columns of the table of all collections.
fn all_field(name: &str) -> Option<(i32, FieldType)> {
    match name {
        "_collection" => Some((COLLECTION_FIELD_ID, FieldType::Text)),
        "properties" => Some((PROPERTIES_FIELD_ID, FieldType::Jsonb)),
        "_time" | "_user" | "_id" | "_received_at" => SYSTEM_FIELDS
            .iter()
            .find(|(_, system, _)| *system == name)
            .map(|&(id, _, ty)| (id, ty)),
        _ => None,
    }
}

/// What was skipped before anything was opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Skipped {
    pub files: i64,
    pub files_by_period: i64,
    pub files_by_statistics: i64,
    /// Deleted rows of what was opened.
    pub deleted_events: u64,
}

/// The data files and chunks of one collection that may hold rows for which the filter is true.
pub struct Stored {
    /// Each with its number for a scan that tells its rows' identities.
    files: Vec<(FileRow, u32)>,
    footers: HashMap<i64, Vec<u8>>,
    deleted: HashMap<Object, Arc<RowSet>>,
    pub chunks: Vec<ChunkRef>,
    /// No event of them is from before this time.
    pub min_time_us: i64,
}

/// Lists what has to be opened. `filter` speaks of field ids and values; with `only` other objects are left out.
pub fn stored(
    view: View,
    part: &Seen,
    filter: Option<&Expr>,
    only: Option<&Objects>,
    skipped: &mut Skipped,
) -> Result<Stored> {
    let id = part.collection.id;
    let mut conditions = Vec::new();
    if let Some(filter) = filter {
        conjuncts(filter, &mut conditions);
    }
    let range = time_range(&conditions);
    let mut files = manifest::files(view, id, range)?;
    let total = match range {
        Some(_) => manifest::file_count(view, id)?.max(files.len() as i64),
        None => files.len() as i64,
    };
    skipped.files += total;
    skipped.files_by_period += total - files.len() as i64;
    let before = files.len();
    prune(view, part, &conditions, &mut files)?;
    skipped.files_by_statistics += (before - files.len()) as i64;
    let number = |object| only.map_or(Some(0), |only| only.number(object));
    let files: Vec<(FileRow, u32)> = files
        .into_iter()
        .filter_map(|file| number(Object::File(file.file_id)).map(|number| (file, number)))
        .collect();
    let chunks: Vec<(ChunkRow, u32)> = manifest::chunks(view, id, range)?
        .into_iter()
        .filter_map(|chunk| number(Object::Chunk(chunk.chunk_id)).map(|number| (chunk, number)))
        .collect();
    let min_time_us = (files.iter().map(|(file, _)| file.min_time_us))
        .chain(chunks.iter().map(|(chunk, _)| chunk.min_time_us))
        .min()
        .unwrap_or(i64::MAX);
    let objects = files
        .iter()
        .map(|(file, _)| (Object::File(file.file_id), file.n as u64))
        .chain(
            chunks
                .iter()
                .map(|(chunk, _)| (Object::Chunk(chunk.chunk_id), chunk.n as u64)),
        )
        .collect();
    let deleted = deletion::deleted(view, id, &objects)?;
    skipped.deleted_events += deleted.values().map(|rows| rows.len()).sum::<u64>();
    let mut room = FOOTER_BYTES_MAX;
    let with_footer: Vec<i64> = files
        .iter()
        .map(|(file, _)| file)
        .filter(|file| {
            room -= i64::from(file.footer_bytes);
            // Which row groups deleted rows are in is said by the footer.
            room >= 0 || deleted.contains_key(&Object::File(file.file_id))
        })
        .map(|file| file.file_id)
        .collect();
    let footers = if with_footer.is_empty() {
        HashMap::new()
    } else {
        manifest::footers(view, &with_footer)?
    };
    let chunks = chunks
        .into_iter()
        .map(|(chunk, number)| ChunkRef {
            id: chunk.chunk_id,
            format: chunk.format,
            n: chunk.n as u32,
            bytes: chunk.bytes as u32,
            schema_version: chunk.schema_version,
            has_extra: chunk.has_extra,
            deleted: deleted.get(&Object::Chunk(chunk.chunk_id)).cloned(),
            number,
        })
        .collect();
    Ok(Stored {
        files,
        footers,
        deleted,
        chunks,
        min_time_us,
    })
}

impl Stored {
    /// The files with the stores they are read from, as the engine wants them.
    pub fn open(
        &mut self,
        view: View,
        stores: &mut Stores,
        sender: &Sender<Message>,
    ) -> Result<Vec<FileRef>> {
        let sizes: HashMap<String, u64> = self
            .files
            .iter()
            .map(|(file, _)| (file.path.clone(), file.bytes as u64))
            .collect();
        let sizes = Arc::new(sizes);
        let local = ObjectSource::new(sender.clone(), Arc::clone(&sizes));
        let local: Arc<dyn ObjectStore> = Arc::new(PartStore::new(local));
        let mut buckets: HashMap<i32, Arc<dyn ObjectStore>> = HashMap::new();
        std::mem::take(&mut self.files)
            .into_iter()
            .map(|(file, number)| {
                let (store, remote) = match stores.get(view, file.storage_id)? {
                    Place::Table => (Arc::clone(&local), false),
                    Place::Directory(store) => (store, false),
                    Place::Bucket(store) => {
                        let bucket = match buckets.get(&file.storage_id) {
                            Some(bucket) => Arc::clone(bucket),
                            None => stores.bucket(store, file.storage_id, &sizes)?,
                        };
                        buckets.insert(file.storage_id, Arc::clone(&bucket));
                        (bucket, true)
                    }
                };
                Ok(FileRef {
                    store,
                    remote,
                    path: file.path,
                    bytes: file.bytes as u64,
                    n: file.n as u64,
                    has_extra: file.has_extra,
                    footer: self.footers.remove(&file.file_id).map(Bytes::from),
                    deleted: self.deleted.get(&Object::File(file.file_id)).cloned(),
                    number,
                })
            })
            .collect()
    }
}

/// The storages that a scan has met.
#[derive(Default)]
pub struct Stores {
    opened: HashMap<i32, Place>,
    runtime: u64,
    /// What was read from buckets, and how.
    counters: Arc<Counters>,
}

/// A storage for reading.
#[derive(Clone)]
enum Place {
    /// The default one.
    Table,
    Directory(Arc<dyn ObjectStore>),
    Bucket(Arc<dyn ObjectStore>),
}

impl Stores {
    /// What was read from buckets so far.
    pub fn counts(&self) -> Counts {
        self.counters.get()
    }

    /// A bucket with the requests of this process and the blocks that are kept, for objects of these sizes.
    fn bucket(
        &self,
        store: Arc<dyn ObjectStore>,
        storage_id: i32,
        sizes: &Arc<HashMap<String, u64>>,
    ) -> Result<Arc<dyn ObjectStore>> {
        Ok(Arc::new(CachedStore::new(
            store,
            cache::storage_key(storage_id),
            Arc::clone(sizes),
            cache::fetcher()?,
            cache::directory(),
            Arc::clone(&self.counters),
        )))
    }

    fn get(&mut self, view: View, storage_id: i32) -> Result<Place> {
        // Connections end with the engine threads that made them.
        let runtime = Runtime::current()?.number();
        if self.runtime != runtime {
            self.runtime = runtime;
            self.opened.clear();
        }
        if let Some(store) = self.opened.get(&storage_id) {
            return Ok(store.clone());
        }
        let _owner = ActAs::owner();
        let missing = || {
            PgError::new(
                "58030",
                "the storage of a data file is not defined any more",
            )
        };
        let storage = manifest::storage(view, storage_id)?.ok_or_else(missing)?;
        let opened = storage.open().and_then(|opened| match opened {
            Some(opened) if opened.is_remote() => Ok(Place::Bucket(opened.object_store()?)),
            Some(opened) => Ok(Place::Directory(opened.object_store()?)),
            None => Ok(Place::Table),
        });
        let store = opened.map_err(|_| {
            // The cause names a directory or options, which a tenant need not know.
            let error = PgError::new(
                "58030",
                format!("storage \"{}\" cannot be read", storage.name),
            );
            if storage.is_defined() {
                error.hint("Check that the storage is there and that the server may read it.")
            } else {
                error.detail("There is no foreign server of this name with the option url.")
            }
        })?;
        self.opened.insert(storage_id, store.clone());
        Ok(store)
    }
}

/// Whether a collection can have rows under the filter of the table of all collections, by its name alone.
pub fn name_may_match(filter: Option<&Expr>, name: &str) -> bool {
    let mut conditions = Vec::new();
    if let Some(filter) = filter {
        conjuncts(filter, &mut conditions);
    }
    // Another column may have that name in some row.
    let is_name = |expr: &Expr| match expr {
        Expr::Literal(Scalar::Text(text)) => text == name,
        Expr::Literal(_) | Expr::Null(_) => false,
        _ => true,
    };
    conditions.into_iter().all(|condition| match condition {
        Expr::Cmp {
            op: CmpOp::Eq,
            left,
            right,
        } if **left == Expr::Column(COLLECTION_FIELD_ID) => is_name(right),
        Expr::InList {
            expr,
            list,
            negated: false,
        } if **expr == Expr::Column(COLLECTION_FIELD_ID) => list.iter().any(is_name),
        _ => true,
    })
}

/// The conditions that all have to be true.
fn conjuncts<'a>(expr: &'a Expr, out: &mut Vec<&'a Expr>) {
    match expr {
        Expr::And(list) => list.iter().for_each(|e| conjuncts(e, out)),
        other => out.push(other),
    }
}

/// A comparison as column, operator, value.
fn comparison(expr: &Expr) -> Option<(i32, CmpOp, &Scalar)> {
    let Expr::Cmp { op, left, right } = expr else {
        return None;
    };
    match (&**left, &**right) {
        (Expr::Column(id), Expr::Literal(scalar)) => Some((*id, *op, scalar)),
        (Expr::Literal(scalar), Expr::Column(id)) => Some((*id, op.flip(), scalar)),
        _ => None,
    }
}

/// The range of `_time` (both ends inclusive) outside of which the conditions cannot be true.
fn time_range(conditions: &[&Expr]) -> Option<(i64, i64)> {
    let (mut from, mut to) = (i64::MIN, i64::MAX);
    for condition in conditions {
        let Some((TIME_FIELD_ID, op, Scalar::Timestamptz(at))) = comparison(condition) else {
            continue;
        };
        match op {
            CmpOp::Eq => (from, to) = (from.max(*at), to.min(*at)),
            CmpOp::Lt => to = to.min(at.saturating_sub(1)),
            CmpOp::Le => to = to.min(*at),
            CmpOp::Gt => from = from.max(at.saturating_add(1)),
            CmpOp::Ge => from = from.max(*at),
            CmpOp::Ne => {}
        }
    }
    (from > i64::MIN || to < i64::MAX).then_some((from, to))
}

/// Drops the files whose statistics exclude a condition.
fn prune(view: View, part: &Seen, conditions: &[&Expr], files: &mut Vec<FileRow>) -> Result<()> {
    let predicates: Vec<(i32, FieldType, Predicate)> = conditions
        .iter()
        .filter_map(|condition| predicate(condition))
        // The period has been compared already, by the same bounds.
        .filter(|(id, _)| *id != TIME_FIELD_ID)
        .filter_map(|(id, predicate)| {
            let field = part.schema.fields.iter().find(|field| field.id == id)?;
            Some((id, field.ty, predicate))
        })
        .collect();
    if predicates.is_empty() {
        return Ok(());
    }
    let mut kept = Vec::with_capacity(files.len());
    for some in files.chunks(STATISTICS_AT_A_TIME) {
        wait::check_interrupts();
        let ids: Vec<i64> = some.iter().map(|file| file.file_id).collect();
        let known = manifest::stats(view, &ids)?;
        kept.extend(some.iter().map(|file| {
            // Statistics only ever skip work: a file whose statistics cannot be read is read itself.
            let Some(stats) = known
                .get(&file.file_id)
                .and_then(|bytes| stats::decode(bytes).ok())
            else {
                return true;
            };
            predicates.iter().all(|(id, ty, predicate)| {
                let absent = ColumnStat::all_null(*id, file.n);
                let stat = match stats.iter().find(|stat| stat.field_id == *id) {
                    Some(stat) => Some(stat),
                    // A value of a newer field may wait in `_extra`.
                    None if file.has_extra => None,
                    None => Some(&absent),
                };
                prune::may_match(stat, file.n, *ty, predicate)
            })
        }));
    }
    let mut kept = kept.into_iter();
    files.retain(|_| kept.next() == Some(true));
    Ok(())
}

/// What a filter says of single columns: no row that it lets through is against any of it.
pub fn predicates(filter: Option<&Expr>) -> Vec<(i32, Predicate)> {
    let mut conditions = Vec::new();
    if let Some(filter) = filter {
        conjuncts(filter, &mut conditions);
    }
    conditions.into_iter().filter_map(predicate).collect()
}

/// A condition as a predicate on one column.
fn predicate(condition: &Expr) -> Option<(i32, Predicate)> {
    if let Some((id, op, scalar)) = comparison(condition) {
        return Some((id, Predicate::Cmp(prune_op(op), scalar.clone())));
    }
    match condition {
        Expr::IsNull(e) => column(e).map(|id| (id, Predicate::IsNull)),
        Expr::IsNotNull(e) => column(e).map(|id| (id, Predicate::IsNotNull)),
        Expr::InList {
            expr,
            list,
            negated: false,
        } => {
            let scalars = list
                .iter()
                // NULL in the list makes the condition true for no row more.
                .filter(|item| !matches!(item, Expr::Null(_)))
                .map(|item| match item {
                    Expr::Literal(scalar) => Some(scalar.clone()),
                    _ => None,
                })
                .collect::<Option<Vec<_>>>()?;
            column(expr).map(|id| (id, Predicate::In(scalars)))
        }
        Expr::Column(id) => Some((*id, Predicate::Cmp(prune::CmpOp::Eq, Scalar::Bool(true)))),
        Expr::Not(e) => {
            column(e).map(|id| (id, Predicate::Cmp(prune::CmpOp::Eq, Scalar::Bool(false))))
        }
        _ => None,
    }
}

fn column(expr: &Expr) -> Option<i32> {
    match expr {
        Expr::Column(id) => Some(*id),
        _ => None,
    }
}

fn prune_op(op: CmpOp) -> prune::CmpOp {
    match op {
        CmpOp::Eq => prune::CmpOp::Eq,
        CmpOp::Ne => prune::CmpOp::Ne,
        CmpOp::Lt => prune::CmpOp::Lt,
        CmpOp::Le => prune::CmpOp::Le,
        CmpOp::Gt => prune::CmpOp::Gt,
        CmpOp::Ge => prune::CmpOp::Ge,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cmp(op: CmpOp, left: Expr, right: Expr) -> Expr {
        Expr::Cmp {
            op,
            left: Box::new(left),
            right: Box::new(right),
        }
    }

    fn at(micros: i64) -> Expr {
        Expr::Literal(Scalar::Timestamptz(micros))
    }

    #[test]
    fn the_range_of_time_is_what_all_conditions_leave() {
        let time = || Expr::Column(TIME_FIELD_ID);
        let filter = Expr::And(vec![
            cmp(CmpOp::Ge, time(), at(10)),
            Expr::And(vec![cmp(CmpOp::Gt, at(20), time())]),
            cmp(CmpOp::Ne, time(), at(15)),
            Expr::Or(vec![cmp(CmpOp::Eq, time(), at(1))]),
        ]);
        let mut conditions = Vec::new();
        conjuncts(&filter, &mut conditions);
        assert_eq!(time_range(&conditions), Some((10, 19)));
        assert_eq!(time_range(&conditions[2..]), None);
    }

    #[test]
    fn a_collection_is_skipped_by_its_name() {
        let name = || Expr::Column(COLLECTION_FIELD_ID);
        let text = |t: &str| Expr::Literal(Scalar::Text(t.to_owned()));
        let is = cmp(CmpOp::Eq, name(), text("a"));
        assert!(name_may_match(Some(&is), "a") && !name_may_match(Some(&is), "b"));
        let list = Expr::InList {
            expr: Box::new(name()),
            list: vec![text("a"), Expr::Null(FieldType::Text)],
            negated: false,
        };
        assert!(name_may_match(Some(&list), "a") && !name_may_match(Some(&list), "b"));
        assert!(name_may_match(None, "b"));
    }
}
