//! Projects, collections and fields.

use std::collections::HashMap;

use rakam_event::schema::{DroppedField, FIRST_USER_FIELD_ID, Field, Schema};
use rakam_event::types::FieldType;

use crate::pg::spi::{self, View, arg};
use crate::pg::{INVALID_OID, Oid, PgError, Result};

/// A project, as far as moving its events needs it.
#[derive(Debug, Clone)]
pub struct ProjectRow {
    pub id: i32,
    pub name: String,
    pub storage_id: i32,
    pub read_role: Oid,
    pub write_role: Oid,
    pub admin_role: Oid,
    /// Bounds of `_time` relative to the time of receipt.
    pub time_past_us: i64,
    pub time_future_us: i64,
    /// Parts of its quota; None: no limit.
    pub collections_max: Option<i32>,
    pub fields_max: Option<i32>,
    /// Whether its bytes are counted, for a quota of them.
    pub counts_bytes: bool,
}

#[derive(Debug, Clone)]
pub struct Collection {
    pub id: i32,
    pub project_id: i32,
    pub name: String,
    /// The registered foreign table; None while it is still to be made.
    pub ft: Option<Oid>,
    pub schema_version: i32,
    /// Events from before this time are kept no longer, as seen from the start of the transaction; microseconds since 1970.
    pub kept_since_us: Option<i64>,
}

fn project_row(row: &spi::Row) -> Result<ProjectRow> {
    Ok(ProjectRow {
        id: row.must(1)?,
        name: row.must(2)?,
        storage_id: row.must(3)?,
        read_role: row.oid(4).unwrap_or(INVALID_OID),
        write_role: row.oid(5).unwrap_or(INVALID_OID),
        admin_role: row.oid(6).unwrap_or(INVALID_OID),
        time_past_us: row.must(7)?,
        time_future_us: row.must(8)?,
        collections_max: row.get(9),
        fields_max: row.get(10),
        counts_bytes: row.must(11)?,
    })
}

/// The project of this name, if the view's user may see it.
pub fn project(view: View, name: &str) -> Result<Option<ProjectRow>> {
    spi::first(
        view,
        "SELECT project_id, name, storage_id, read_role, write_role, admin_role,
                (extract(epoch FROM time_past) * 1000000)::int8, (extract(epoch FROM time_future) * 1000000)::int8,
                collections_max, fields_max, bytes_per_day IS NOT NULL
         FROM rakam_internal.project WHERE name = $1",
        &[arg(name)],
        project_row,
    )
}

/// The project of this id. Workers only.
pub fn project_by_id(view: View, id: i32) -> Result<Option<ProjectRow>> {
    spi::first(
        view,
        "SELECT project_id, name, storage_id, read_role, write_role, admin_role,
                (extract(epoch FROM time_past) * 1000000)::int8, (extract(epoch FROM time_future) * 1000000)::int8,
                collections_max, fields_max, bytes_per_day IS NOT NULL
         FROM rakam_internal.project WHERE project_id = $1",
        &[arg(id)],
        project_row,
    )
}

/// The projects of these ids. Workers only.
pub fn projects_by_id(view: View, ids: &[i32]) -> Result<Vec<ProjectRow>> {
    spi::query(
        view,
        "SELECT project_id, name, storage_id, read_role, write_role, admin_role,
                (extract(epoch FROM time_past) * 1000000)::int8, (extract(epoch FROM time_future) * 1000000)::int8,
                collections_max, fields_max, bytes_per_day IS NOT NULL
         FROM rakam_internal.project WHERE project_id = ANY ($1)",
        &[arg(ids.to_vec())],
        project_row,
    )
}

fn collection_row(row: &spi::Row) -> Result<Collection> {
    Ok(Collection {
        id: row.must(1)?,
        project_id: row.must(2)?,
        name: row.must(3)?,
        ft: row.oid(4),
        schema_version: row.must(5)?,
        kept_since_us: row.timestamptz(6),
    })
}

/// A collection by the names in a foreign table's options, if the view's user may read it.
pub fn collection(view: View, project: &str, name: &str) -> Result<Option<Collection>> {
    spi::first(
        view,
        "SELECT c.collection_id, c.project_id, c.name, c.ft, c.schema_version,
                rakam_internal.kept_since(c.retention, pg_catalog.now())
         FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         WHERE p.name = $1 AND c.name = $2",
        &[arg(project), arg(name)],
        collection_row,
    )
}

/// The collection whose registered table this is, under whatever name the view knows it, if its user may read it.
pub fn collection_of_table(view: View, table: Oid) -> Result<Option<Collection>> {
    spi::first(
        view,
        "SELECT collection_id, project_id, name, ft, schema_version, rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection WHERE ft = $1",
        &[arg(table)],
        collection_row,
    )
}

/// What has the name of a collection's table that is still to be made: a relation or a type. Workers only.
pub fn obstacle(view: View, collection: &Collection) -> Result<Option<String>> {
    let found = spi::first(
        view,
        "SELECT CASE
           WHEN EXISTS (SELECT FROM pg_catalog.pg_class r WHERE r.relnamespace = n.oid AND r.relname = $2) THEN 'relation'
           WHEN EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.typnamespace = n.oid AND t.typname = $2) THEN 'type' END
         FROM rakam_internal.project p JOIN pg_catalog.pg_namespace n ON n.nspname = p.name WHERE p.project_id = $1",
        &[arg(collection.project_id), arg(collection.name.as_str())],
        |row| Ok(row.get(1)),
    )?;
    Ok(found.flatten())
}

/// The first few collections without a table whose name something else has, or whose schema is gone; as the view's user
/// may see them.
pub fn obstructed(view: View) -> Result<Vec<String>> {
    spi::query(
        view,
        "SELECT p.name || '.' || c.name
         FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = p.name
         WHERE c.ft IS NULL AND (n.oid IS NULL
           OR EXISTS (SELECT FROM pg_catalog.pg_class r WHERE r.relnamespace = n.oid AND r.relname = c.name)
           OR EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.typnamespace = n.oid AND t.typname = c.name))
         ORDER BY 1 LIMIT 10",
        &[],
        |row| row.must(1),
    )
}

/// The first few collections whose table somebody has dropped by hand; as the view's user may see them.
pub fn without_table(view: View) -> Result<Vec<String>> {
    spi::query(
        view,
        "SELECT p.name || '.' || c.name
         FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         WHERE c.ft IS NOT NULL AND NOT EXISTS (SELECT FROM pg_catalog.pg_class r WHERE r.oid = c.ft)
         ORDER BY 1 LIMIT 10",
        &[],
        |row| row.must(1),
    )
}

/// All collections of a project that the view's user may read, by name.
pub fn collections(view: View, project: &str) -> Result<Vec<Collection>> {
    spi::query(
        view,
        "SELECT c.collection_id, c.project_id, c.name, c.ft, c.schema_version,
                rakam_internal.kept_since(c.retention, pg_catalog.now())
         FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         WHERE p.name = $1 ORDER BY c.name",
        &[arg(project)],
        collection_row,
    )
}

/// A collection by id. Workers only.
pub fn collection_by_id(view: View, id: i32) -> Result<Option<Collection>> {
    spi::first(
        view,
        "SELECT collection_id, project_id, name, ft, schema_version, rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection WHERE collection_id = $1",
        &[arg(id)],
        collection_row,
    )
}

/// The collections of these ids. Workers only.
pub fn collections_by_id(view: View, ids: &[i32]) -> Result<Vec<Collection>> {
    spi::query(
        view,
        "SELECT collection_id, project_id, name, ft, schema_version, rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection WHERE collection_id = ANY ($1)",
        &[arg(ids.to_vec())],
        collection_row,
    )
}

/// As [`collections_by_id`]; until the end of the transaction they are neither dropped nor renamed. 55P03: somebody is just
/// doing that, or has done it in a transaction that stays open.
pub fn keep_collections(ids: &[i32]) -> Result<Vec<Collection>> {
    spi::query(
        View::Current,
        "SELECT collection_id, project_id, name, ft, schema_version, rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection WHERE collection_id = ANY ($1) ORDER BY collection_id FOR KEY SHARE NOWAIT",
        &[arg(ids.to_vec())],
        collection_row,
    )
}

/// The collection of this name in a project given by id. Workers only.
pub fn collection_named(view: View, project_id: i32, name: &str) -> Result<Option<Collection>> {
    spi::first(
        view,
        "SELECT collection_id, project_id, name, ft, schema_version, rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection WHERE project_id = $1 AND name = $2",
        &[arg(project_id), arg(name)],
        collection_row,
    )
}

/// The fields of a collection, as they are read.
#[derive(Default)]
struct Fields {
    present: Vec<Field>,
    dropped: Vec<DroppedField>,
}

impl Fields {
    /// Adds a row: id, name, type (NULL: dropped), version, whether it is a column, when it was dropped, and since when events are
    /// certainly of this server.
    fn add(&mut self, row: &spi::Row) -> Result<()> {
        let name = row.must(2)?;
        match row.get::<String>(3) {
            Some(ty) => self.present.push(Field {
                id: row.must(1)?,
                name,
                ty: FieldType::parse(&ty)
                    .ok_or_else(|| PgError::internal(format!("unknown field type \"{ty}\"")))?,
                added_version: row.must(4)?,
                column_ready: row.must(5)?,
            }),
            None => self.dropped.push(DroppedField {
                name,
                xid: row.xid8(6).unwrap_or(0) as i64,
                at_us: row.timestamptz(7).unwrap_or(i64::MIN),
                own_since_us: row.timestamptz(8).unwrap_or(i64::MIN),
            }),
        }
        Ok(())
    }

    fn schema(self, version: i32) -> Schema {
        Schema::new(version, self.present).with_dropped(self.dropped)
    }
}

/// What was received before this time may have come from another server, with its transaction ids.
pub fn own_since_us(view: View) -> Result<i64> {
    let own_since = spi::first(
        view,
        "SELECT coalesce((SELECT max(at) FROM rakam_internal.restore), own_since) FROM rakam_internal.installation",
        &[],
        |row| Ok(row.timestamptz(1)),
    )?;
    Ok(own_since.flatten().unwrap_or(i64::MIN))
}

/// The fields of a collection.
pub fn schema(view: View, collection: &Collection) -> Result<Schema> {
    schemas(view, &[collection])?
        .remove(&collection.id)
        .ok_or_else(|| PgError::internal("the fields of a collection were not read"))
}

/// The fields of many collections, by collection.
pub fn schemas(view: View, collections: &[&Collection]) -> Result<HashMap<i32, Schema>> {
    let ids: Vec<i32> = collections.iter().map(|c| c.id).collect();
    let mut fields: HashMap<i32, Fields> = HashMap::new();
    spi::run(
        view,
        "SELECT field_id, name, type, added_version, column_ready, NULL::xid8, NULL::timestamptz, NULL::timestamptz,
                collection_id
         FROM rakam_internal.field WHERE collection_id = ANY ($1)
         UNION ALL SELECT field_id, name, NULL, 0, false, dropped_xid, dropped_at,
                          (SELECT coalesce((SELECT max(at) FROM rakam_internal.restore), own_since)
                           FROM rakam_internal.installation), collection_id
         FROM rakam_internal.dropped_field WHERE collection_id = ANY ($1)",
        &[arg(ids)],
        |row| fields.entry(row.must(9)?).or_default().add(row),
    )?;
    Ok(collections
        .iter()
        .map(|c| {
            let own = fields.remove(&c.id).unwrap_or_default();
            (c.id, own.schema(c.schema_version))
        })
        .collect())
}

/// The collections of the given projects (None: all) with the given name (None: any). Workers only.
pub fn in_scope(projects: Option<&[i32]>, name: Option<&str>) -> Result<Vec<Collection>> {
    spi::query(
        View::Current,
        "SELECT collection_id, project_id, name, ft, schema_version, rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection
         WHERE ($1 IS NULL OR project_id = ANY ($1)) AND ($2 IS NULL OR name = $2) ORDER BY project_id, name",
        &[arg(projects.map(<[i32]>::to_vec)), arg(name)],
        collection_row,
    )
}

/// Registers a collection; nothing happens if it is there, or (false) if the project may have no more of them.
/// Workers, in a transaction of their own.
pub fn add_collection(project_id: i32, name: &str) -> Result<bool> {
    let added = spi::execute(
        "INSERT INTO rakam_internal.collection (project_id, name)
         SELECT $1, $2 FROM rakam_internal.project p WHERE p.project_id = $1
           AND (p.collections_max IS NULL OR p.collections_max >
                (SELECT count(*) FROM rakam_internal.collection c WHERE c.project_id = $1))
         ON CONFLICT (project_id, name) DO NOTHING",
        &[arg(project_id), arg(name)],
    )?;
    Ok(added > 0 || collection_named(View::Current, project_id, name)?.is_some())
}

/// How many collections and fields a project has, all collections together.
pub fn counts(view: View, project_id: i32) -> Result<(i64, i64)> {
    Ok(spi::first(
        view,
        "SELECT (SELECT count(*) FROM rakam_internal.collection WHERE project_id = $1),
                (SELECT count(*) FROM rakam_internal.field WHERE project_id = $1)",
        &[arg(project_id)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?
    .unwrap_or_default())
}

/// Registers fields under the next schema version, skipping names that exist, and what is beyond the project's
/// quota. Returns how many were new.
///
/// The collection's row lock orders concurrent callers, so ids and versions are dense and never reused, not even
/// after a field was dropped.
pub fn add_fields(
    collection_id: i32,
    fields: &[(String, FieldType)],
    declared: bool,
) -> Result<usize> {
    let Some(project_id) = spi::first(
        View::Current,
        "SELECT project_id FROM rakam_internal.collection WHERE collection_id = $1 FOR UPDATE",
        &[arg(collection_id)],
        |row| row.must::<i32>(1),
    )?
    else {
        return Ok(0);
    };
    let mut added = 0;
    for (name, ty) in fields {
        added += spi::execute(
            "INSERT INTO rakam_internal.field (collection_id, field_id, project_id, name, type, declared, added_version)
             SELECT $1, greatest((SELECT max(field_id) FROM rakam_internal.field WHERE collection_id = $1) + 1,
                                 (SELECT max(field_id) FROM rakam_internal.dropped_field WHERE collection_id = $1) + 1,
                                 $2),
                    $3, $4, $5, $6,
                    (SELECT schema_version + 1 FROM rakam_internal.collection WHERE collection_id = $1)
             FROM rakam_internal.project p WHERE p.project_id = $3
               AND (p.fields_max IS NULL OR p.fields_max >
                    (SELECT count(*) FROM rakam_internal.field f WHERE f.project_id = $3))
             ON CONFLICT (collection_id, name) DO NOTHING",
            &[
                arg(collection_id),
                arg(FIRST_USER_FIELD_ID),
                arg(project_id),
                arg(name.as_str()),
                arg(ty.to_string()),
                arg(declared),
            ],
        )?;
    }
    if added > 0 {
        spi::execute(
            "UPDATE rakam_internal.collection SET schema_version = schema_version + 1 WHERE collection_id = $1",
            &[arg(collection_id)],
        )?;
    }
    Ok(added as usize)
}
