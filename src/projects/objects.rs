//! What a project is in Postgres: its schema, roles, users table and `_all`, and the storage it uses.
//! Everything here runs as the extension's owner.

use rakam_lake::storage::StorageUrl;

use crate::catalog::projects::{self as catalog, Project};
use crate::catalog::rebuild;
use crate::pg::spi::{self, quote_ident, quote_literal};
use crate::pg::{Oid, PgError, Result, guc, relation, roles, security};

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
        if security::role_named(role).is_none() {
            spi::execute_text(&format!("CREATE ROLE {} NOLOGIN", quote_ident(role)))?;
            continue;
        }
        let made_by = rebuild::role_maker(role)?;
        let user = rebuild::role_user(role)?;
        match (made_by, user) {
            (Some(maker), None) if Some(maker.as_str()) == installation => {}
            (_, Some(database)) => {
                return Err(
                    taken(role).detail(format!("Database \"{database}\" has objects of it."))
                );
            }
            _ => {
                return Err(
                    taken(role).detail("The database that wrote the storage has not made it.")
                );
            }
        }
    }
    make(project_id, name, [&roles[0], &roles[1], &roles[2]])
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
    let [r, w, a] = [read, write, admin].map(quote_ident);
    for statement in [
        format!("CREATE SCHEMA {schema}"),
        format!("GRANT USAGE ON SCHEMA {schema} TO {r}, {w}, {a}"),
        format!("GRANT CREATE ON SCHEMA {schema} TO {a}"),
        format!(
            "CREATE TABLE {schema}.users (id text COLLATE \"C\" PRIMARY KEY, created_at timestamptz)"
        ),
        format!("GRANT SELECT ON {schema}.users TO {r}"),
        format!("GRANT INSERT ON {schema}.users TO {w}"),
        // All but TRIGGER: functions of ours write this table as its owner, and would run the trigger so.
        format!(
            "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES ON {schema}.users TO {a}"
        ),
        format!(
            "CREATE FOREIGN TABLE {schema}._all (_collection text COLLATE \"C\", _time timestamptz, \
             _user text COLLATE \"C\", _id text COLLATE \"C\", _received_at timestamptz, properties jsonb) \
             SERVER rakam OPTIONS (project {})",
            quote_literal(name)
        ),
        format!("GRANT SELECT ON {schema}._all TO {r}, {a}"),
        format!("GRANT INSERT ON {schema}._all TO {w}, {a}"),
    ] {
        spi::execute_text(&statement)?;
    }
    // Roles outlive their database: who rebuilds its catalogue finds by this which were its own.
    let mark = quote_literal(&rebuild::maker_mark()?);
    for role in [&r, &w, &a] {
        spi::execute_text(&format!("COMMENT ON ROLE {role} IS {mark}"))?;
    }
    catalog::set_roles(project_id, read, write, admin)
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

/// Drops a project's objects and roles. Its rows are gone by now.
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
pub fn storage(name: &str, caller: Oid) -> Result<i32> {
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
