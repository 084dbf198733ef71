//! Projects, collections and fields.

use std::collections::HashMap;

use rakam_event::schema::{FIRST_USER_FIELD_ID, Field, Schema};
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
}

#[derive(Debug, Clone)]
pub struct Collection {
    pub id: i32,
    pub project_id: i32,
    pub name: String,
    /// The registered foreign table; None while it is still to be made.
    pub ft: Option<Oid>,
    pub schema_version: i32,
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
    })
}

/// The project of this name, if the view's user may see it.
pub fn project(view: View, name: &str) -> Result<Option<ProjectRow>> {
    spi::first(
        view,
        "SELECT project_id, name, storage_id, read_role, write_role, admin_role,
                (extract(epoch FROM time_past) * 1000000)::int8, (extract(epoch FROM time_future) * 1000000)::int8
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
                (extract(epoch FROM time_past) * 1000000)::int8, (extract(epoch FROM time_future) * 1000000)::int8
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
                (extract(epoch FROM time_past) * 1000000)::int8, (extract(epoch FROM time_future) * 1000000)::int8
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
    })
}

/// A collection by the names in a foreign table's options, if the view's user may read it.
pub fn collection(view: View, project: &str, name: &str) -> Result<Option<Collection>> {
    spi::first(
        view,
        "SELECT c.collection_id, c.project_id, c.name, c.ft, c.schema_version
         FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         WHERE p.name = $1 AND c.name = $2",
        &[arg(project), arg(name)],
        collection_row,
    )
}

/// All collections of a project that the view's user may read, by name.
pub fn collections(view: View, project: &str) -> Result<Vec<Collection>> {
    spi::query(
        view,
        "SELECT c.collection_id, c.project_id, c.name, c.ft, c.schema_version
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
        "SELECT collection_id, project_id, name, ft, schema_version
         FROM rakam_internal.collection WHERE collection_id = $1",
        &[arg(id)],
        collection_row,
    )
}

/// The collections of these ids. Workers only.
pub fn collections_by_id(view: View, ids: &[i32]) -> Result<Vec<Collection>> {
    spi::query(
        view,
        "SELECT collection_id, project_id, name, ft, schema_version
         FROM rakam_internal.collection WHERE collection_id = ANY ($1)",
        &[arg(ids.to_vec())],
        collection_row,
    )
}

/// The collection of this name in a project given by id. Workers only.
pub fn collection_named(view: View, project_id: i32, name: &str) -> Result<Option<Collection>> {
    spi::first(
        view,
        "SELECT collection_id, project_id, name, ft, schema_version
         FROM rakam_internal.collection WHERE project_id = $1 AND name = $2",
        &[arg(project_id), arg(name)],
        collection_row,
    )
}

fn field_row(row: &spi::Row) -> Result<Field> {
    let ty: String = row.must(3)?;
    Ok(Field {
        id: row.must(1)?,
        name: row.must(2)?,
        ty: FieldType::parse(&ty)
            .ok_or_else(|| PgError::internal(format!("unknown field type \"{ty}\"")))?,
        added_version: row.must(4)?,
        column_ready: row.must(5)?,
    })
}

/// The fields of a collection.
pub fn schema(view: View, collection: &Collection) -> Result<Schema> {
    let fields = spi::query(
        view,
        "SELECT field_id, name, type, added_version, column_ready
         FROM rakam_internal.field WHERE collection_id = $1 ORDER BY field_id",
        &[arg(collection.id)],
        field_row,
    )?;
    Ok(Schema::new(collection.schema_version, fields))
}

/// The fields of many collections, by collection.
pub fn schemas(view: View, collections: &[&Collection]) -> Result<HashMap<i32, Schema>> {
    let ids: Vec<i32> = collections.iter().map(|c| c.id).collect();
    let mut fields: HashMap<i32, Vec<Field>> = HashMap::new();
    spi::run(
        view,
        "SELECT field_id, name, type, added_version, column_ready, collection_id
         FROM rakam_internal.field WHERE collection_id = ANY ($1)",
        &[arg(ids)],
        |row| {
            fields
                .entry(row.must(6)?)
                .or_default()
                .push(field_row(row)?);
            Ok(())
        },
    )?;
    Ok(collections
        .iter()
        .map(|c| {
            let own = fields.remove(&c.id).unwrap_or_default();
            (c.id, Schema::new(c.schema_version, own))
        })
        .collect())
}

/// The collections of the given projects (None: all) with the given name (None: any). Workers only.
pub fn in_scope(projects: Option<&[i32]>, name: Option<&str>) -> Result<Vec<Collection>> {
    spi::query(
        View::Current,
        "SELECT collection_id, project_id, name, ft, schema_version FROM rakam_internal.collection
         WHERE ($1 IS NULL OR project_id = ANY ($1)) AND ($2 IS NULL OR name = $2) ORDER BY project_id, name",
        &[arg(projects.map(<[i32]>::to_vec)), arg(name)],
        collection_row,
    )
}

/// Registers a collection; nothing happens if it is there. Workers, in a transaction of their own.
pub fn add_collection(project_id: i32, name: &str) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.collection (project_id, name) VALUES ($1, $2)
         ON CONFLICT (project_id, name) DO NOTHING",
        &[arg(project_id), arg(name)],
    )?;
    Ok(())
}

/// Registers fields under the next schema version, skipping names that exist. Returns how many were new.
///
/// The collection's row lock orders concurrent callers, so ids and versions are dense and never reused.
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
             SELECT $1, greatest((SELECT max(field_id) FROM rakam_internal.field WHERE collection_id = $1) + 1, $2),
                    $3, $4, $5, $6,
                    (SELECT schema_version + 1 FROM rakam_internal.collection WHERE collection_id = $1)
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
