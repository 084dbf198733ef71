//! What a project is in Postgres: its schema, roles, users table and `_all`, and the storage it uses.
//! Everything here runs as the extension's owner.

use pgrx::pg_extern;
use rakam_lake::storage::StorageUrl;

use crate::catalog::projects::{self as catalog, Lacking, Project};
use crate::catalog::{places, rebuild, registry, storages};
use crate::pg::locks::{self, LockOn};
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::{self, View, quote_ident, quote_literal};
use crate::pg::{ErrorReport, Oid, PgError, Result, guc, relation, roles, security, server};

/// `rakam_local`: the default storage, inside Postgres.
pub const DEFAULT_STORAGE_ID: i32 = 1;

/// The longest identifier of Postgres, in bytes.
const NAME_BYTES_MAX: usize = 63;

/// Registers a project and makes its objects; its id.
pub fn create(name: &str, storage_id: i32) -> Result<i32> {
    ensure_new_schema(name)?;
    let [read, write, admin] = role_names(name);
    for role in [&read, &write, &admin] {
        ensure_new_role(role)?;
    }
    let project_id = catalog::insert(name, storage_id)?
        .ok_or_else(|| PgError::new("42710", format!("project \"{name}\" already exists")))?;
    for role in [&read, &write, &admin] {
        spi::execute_text(&format!("CREATE ROLE {} NOLOGIN", quote_ident(role)))?;
    }
    make(project_id, name, [&read, &write, &admin])?;
    Ok(project_id)
}

/// Makes the objects of a project that is registered already, when a catalogue is rebuilt. A role that exists is taken over
/// if `installation`, which wrote the storage, made it, and no other database has anything of it.
pub fn restore(project_id: i32, name: &str, installation: Option<&str>) -> Result<()> {
    ensure_new_schema(name)?;
    let roles = role_names(name);
    for role in &roles {
        take_over(role, |maker| Some(maker) == installation)?;
    }
    make(project_id, name, [&roles[0], &roles[1], &roles[2]])
}

/// Makes the roles that a project lacks, and gives all three their rights again; the names of those that lacked something. A role of
/// that name is taken over as in [`restore`], whichever installation made it: this one may be a restored dump.
pub fn repair(lacking: &Lacking) -> Result<Vec<String>> {
    let project =
        catalog::by_name(&lacking.name)?.ok_or_else(|| PgError::no_project(&lacking.name))?;
    let mut lost = lacking.robbed.clone();
    let present = [project.read_role, project.write_role, project.admin_role];
    let mut names = lacking.roles.clone();
    for (name, role) in names.iter_mut().zip(present) {
        match roles::name(role) {
            Some(present) => *name = present,
            None => {
                take_over(name, |_| true)?;
                lost.push(name.clone());
            }
        }
    }
    let schema = quote_ident(&project.name);
    let [r, w, a] = [0, 1, 2].map(|kind| quote_ident(&names[kind]));
    let mut statements = rights(&schema, [&r, &w, &a]);
    for collection in registry::collections(View::Current, &project.name)? {
        if let Some(table) = collection.ft.and_then(relation::qualified_name) {
            statements.push(format!("GRANT SELECT ON {table} TO {r}, {a}"));
            statements.push(format!("GRANT INSERT ON {table} TO {w}, {a}"));
        }
    }
    // One that was dropped or renamed by hand has nothing to grant on.
    for name in project
        .attached
        .iter()
        .filter(|name| relation::qualified_name(relation::oid(&project.name, name)).is_some())
    {
        let table = format!("{schema}.{}", quote_ident(name));
        statements.push(format!("GRANT SELECT ON {table} TO {r}, {a}"));
        statements.push(format!("GRANT INSERT ON {table} TO {a}"));
    }
    statements.extend(marks([&r, &w, &a])?);
    for statement in statements {
        spi::execute_text(&statement)?;
    }
    catalog::set_roles(project.id, &names[0], &names[1], &names[2])?;
    Ok(lost)
}

/// Makes a role, or takes over one of a project that no other database uses, if its maker (an installation) is `accepted`.
fn take_over(role: &str, accepted: impl FnOnce(&str) -> bool) -> Result<()> {
    if security::role_named(role).is_none() {
        return spi::execute_text(&format!("CREATE ROLE {} NOLOGIN", quote_ident(role)));
    }
    if let Some(database) = rebuild::role_user(role)? {
        return Err(taken(role).detail(format!("Database \"{database}\" has objects of it.")));
    }
    match rebuild::role_maker(role)? {
        Some(maker) if accepted(&maker) => Ok(()),
        _ => Err(taken(role).detail("It was made by somebody else.")),
    }
}

fn taken(role: &str) -> PgError {
    PgError::new("42710", format!("role \"{role}\" already exists"))
        .hint("Drop the role, or set rakam.role_prefix in this database.")
}

fn role_names(project: &str) -> [String; 3] {
    let prefix = guc::role_prefix();
    ["read", "write", "admin"].map(|kind| format!("{prefix}{project}_{kind}"))
}

fn ensure_new_schema(name: &str) -> Result<()> {
    if relation::schema_exists(name) {
        return Err(PgError::new(
            "42710",
            format!("project or schema \"{name}\" already exists"),
        )
        .hint("Choose another name."));
    }
    Ok(())
}

/// Makes schema, rights and tables of a project, whose roles exist, and notes whose roles they are.
fn make(project_id: i32, name: &str, [read, write, admin]: [&str; 3]) -> Result<()> {
    let schema = quote_ident(name);
    let quoted = [read, write, admin].map(quote_ident);
    let roles = [&quoted[0], &quoted[1], &quoted[2]].map(String::as_str);
    let tables = [
        format!("CREATE SCHEMA {schema}"),
        format!(
            "CREATE TABLE {schema}.users (id text COLLATE \"C\" PRIMARY KEY, created_at timestamptz)"
        ),
        format!(
            "CREATE FOREIGN TABLE {schema}._all (_collection text COLLATE \"C\", _time timestamptz, \
             _user text COLLATE \"C\", _id text COLLATE \"C\", _received_at timestamptz, properties jsonb) \
             SERVER rakam OPTIONS (project {})",
            quote_literal(name)
        ),
    ];
    for statement in (tables.into_iter())
        .chain(rights(&schema, roles))
        .chain(marks(roles)?)
    {
        spi::execute_text(&statement)?;
    }
    for (table, storage) in storages::without_dependency(Some(name))? {
        server::keep_for(table, &storage);
    }
    catalog::set_roles(project_id, read, write, admin)
}

/// The rights of a project's roles (for reading, writing, administration) on what every project has.
fn rights(schema: &str, [r, w, a]: [&str; 3]) -> Vec<String> {
    vec![
        format!("GRANT USAGE ON SCHEMA {schema} TO {r}, {w}, {a}"),
        format!("GRANT CREATE ON SCHEMA {schema} TO {a}"),
        format!("GRANT SELECT ON {schema}.users TO {r}"),
        format!("GRANT INSERT ON {schema}.users TO {w}"),
        // Not TRIGGER: functions of ours write this table as its owner, and would run the trigger so. Nor REFERENCES: foreign keys
        // are looked up as its owner, through casts of whoever has them. `repair` takes it from those who were given it.
        format!("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON {schema}.users TO {a}"),
        format!("REVOKE REFERENCES, TRIGGER ON {schema}.users FROM {a}"),
        format!("GRANT SELECT ON {schema}._all TO {r}, {a}"),
        format!("GRANT INSERT ON {schema}._all TO {w}, {a}"),
    ]
}

/// Comments that say which installation made the roles: they outlive their database, and who rebuilds its catalogue finds by
/// this which were its own.
fn marks(roles: [&str; 3]) -> Result<impl Iterator<Item = String>> {
    let mark = quote_literal(&rebuild::maker_mark()?);
    let statements = roles.map(|role| format!("COMMENT ON ROLE {role} IS {mark}"));
    Ok(statements.into_iter())
}

fn ensure_new_role(role: &str) -> Result<()> {
    if role.len() > NAME_BYTES_MAX {
        return Err(PgError::new(
            "42602",
            format!("role name \"{role}\" is longer than {NAME_BYTES_MAX} bytes"),
        )
        .hint("Shorten rakam.role_prefix or the name of the project."));
    }
    if security::role_named(role).is_some() {
        return Err(PgError::new("42710", format!("role \"{role}\" already exists"))
            .detail("Roles belong to the whole server, and this one may have members and rights already.")
            .hint("Drop the role, choose another name, or set rakam.role_prefix in this database."));
    }
    Ok(())
}

/// Drops a project's objects and roles, after the transactions that use them.
pub fn drop(project: &Project) -> Result<()> {
    spi::execute_text(&format!(
        "DROP SCHEMA IF EXISTS {} CASCADE",
        quote_ident(&project.name)
    ))?;
    let names: Vec<String> = [project.read_role, project.write_role, project.admin_role]
        .into_iter()
        .filter_map(roles::name)
        .map(|role| quote_ident(&role))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let list = names.join(", ");
    // Their privileges on objects elsewhere in this database would keep the roles.
    spi::execute_text(&format!("DROP OWNED BY {list}"))?;
    spi::execute_text(&format!("DROP ROLE {list}"))
}

/// Errors if there is no such storage, or the user may not use it.
pub fn ensure_usable(name: &str, user: Oid) -> Result<()> {
    usable(name, user).map(|_| ())
}

/// The id of a storage by its server's name, taking the server into use if it is new.
/// 22023: its place is, holds or lies in that of another storage in use.
pub fn storage(name: &str, caller: Oid) -> Result<i32> {
    if let Some(id) = usable(name, caller)?.id {
        return Ok(id);
    }
    // It may be in use under another name, or taken into use by somebody else meanwhile.
    locks::transaction(LockOn::Storages);
    storages::follow_renamed_servers()?;
    let storage = usable(name, caller)?;
    if let Some(id) = storage.id {
        return Ok(id);
    }
    let Some(url) = storage.url else {
        return Err(
            PgError::new("42704", format!("server \"{name}\" is not a storage"))
                .hint("A storage is a foreign server with the option url."),
        );
    };
    let url = StorageUrl::parse(&url)?;
    places::ensure_apart(View::Under(Registered::latest().get()), name)?;
    if matches!(url, StorageUrl::File(_)) {
        PgError::new(
            "00000",
            format!("storage \"{name}\" is a directory of this machine"),
        )
        .detail("Data files in it are neither replicated nor part of a base backup.")
        .notice();
    }
    catalog::insert_storage(name, url.kind())
}

/// After a server was made or changed: one that is a storage in use has a place of its own. Called by an event trigger.
#[pg_extern(schema = "rakam_internal", volatile, parallel_unsafe)]
fn ensure_server_apart(server: Oid) -> std::result::Result<(), ErrorReport> {
    Ok(server_apart(server)?)
}

fn server_apart(server: Oid) -> Result<()> {
    let _owner = ActAs::owner();
    locks::transaction(LockOn::Storages);
    storages::follow_renamed_servers()?;
    let latest = Registered::latest();
    match places::storage_of_server(View::Under(latest.get()), server)? {
        Some(name) => places::ensure_apart(View::Under(latest.get()), &name),
        None => Ok(()),
    }
}

fn usable(name: &str, user: Oid) -> Result<catalog::Storage> {
    let storage = catalog::storage(name, user)?.ok_or_else(|| {
        PgError::new("42704", format!("storage \"{name}\" does not exist")).hint(
            "Create it with CREATE SERVER ... FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://bucket/prefix').",
        )
    })?;
    if !storage.usable {
        return Err(PgError::new(
            "42501",
            format!("permission denied for foreign server \"{name}\""),
        )
        .hint(format!(
            "The role needs USAGE on the foreign server {name}."
        )));
    }
    Ok(storage)
}
