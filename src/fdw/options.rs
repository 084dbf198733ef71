//! Which options exist: `project` and `collection` of a foreign table, `url` of a storage server.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{pg_extern, pg_sys};
use rakam_lake::storage::StorageUrl;

use super::node;
use crate::pg::{PgError, Result, security};

/// The collection of a foreign table without option `collection`: all collections of its project.
pub const ALL: &str = "_all";

const TABLE_OPTIONS: [&str; 2] = ["project", "collection"];
const SERVER_OPTIONS: [&str; 1] = ["url"];
/// Of storages in buckets, which come with a later version.
const BUCKET_OPTIONS: [&str; 4] = ["region", "endpoint", "allow_http", "sse"];

/// What a foreign table reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableOptions {
    pub project: String,
    pub collection: String,
}

impl TableOptions {
    pub fn is_all(&self) -> bool {
        self.collection == ALL
    }
}

/// The options of a foreign table.
pub fn of_table(relation: pg_sys::Oid) -> TableOptions {
    // SAFETY: a catalog look-up by oid, which raises an error for anything but a foreign table; the list of
    // DefElem nodes is in the current memory context.
    let options = unsafe { node::definitions((*pg_sys::GetForeignTable(relation)).options) };
    let value = |name: &str| {
        options
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    };
    TableOptions {
        // A table made before the validator had its say reads a project that does not exist.
        project: value("project").unwrap_or_default(),
        collection: value("collection").unwrap_or_else(|| ALL.to_owned()),
    }
}

/// Checks the options of a foreign table, server, user mapping, column or of the wrapper itself.
#[pg_extern(schema = "rakam_internal")]
fn fdw_validator(
    options: Vec<String>,
    catalog: pg_sys::Oid,
) -> std::result::Result<(), ErrorReport> {
    let options: Vec<(&str, &str)> = options
        .iter()
        .map(|option| option.split_once('=').unwrap_or((option, "")))
        .collect();
    Ok(validate(&options, catalog)?)
}

fn validate(options: &[(&str, &str)], catalog: pg_sys::Oid) -> Result<()> {
    if catalog == pg_sys::ForeignTableRelationId {
        known(options, &TABLE_OPTIONS)?;
        if !options.iter().any(|(name, _)| *name == "project") {
            return Err(PgError::new("HV00J", "option \"project\" is required")
                .hint("Name the project and the collection: OPTIONS (project 'acme', collection 'pageview')."));
        }
        for (name, value) in options {
            if value.is_empty() {
                return Err(PgError::new(
                    "22023",
                    format!("option \"{name}\" must not be empty"),
                ));
            }
        }
        Ok(())
    } else if catalog == pg_sys::ForeignServerRelationId {
        if let Some((name, _)) = options
            .iter()
            .find(|(name, _)| BUCKET_OPTIONS.contains(name))
        {
            return Err(PgError::new(
                "0A000",
                format!("option \"{name}\" is not supported in this version"),
            )
            .hint("A storage is a directory so far: OPTIONS (url 'file:///path')."));
        }
        known(options, &SERVER_OPTIONS)?;
        options.iter().try_for_each(|(_, url)| storage_url(url))
    } else {
        known(options, &[])
    }
}

/// The address of a storage server: what it may be, and who may name it.
fn storage_url(url: &str) -> Result<()> {
    let url = StorageUrl::parse(url)?;
    let user = security::current_user();
    if !security::is_server_admin(user) {
        return Err(
            PgError::new("42501", "permission denied to set the address of a storage")
                .hint("Only superusers and members of rakam_admin may do that."),
        );
    }
    match url {
        StorageUrl::File(_) => PgError::new(
            "00000",
            "a file:// storage is not replicated: its files are on this machine only",
        )
        .hint("Standbys, base backups and dumps do not contain them; the default storage, rakam_local, is in Postgres itself.")
        .notice(),
    }
    Ok(())
}

fn known(options: &[(&str, &str)], valid: &[&str]) -> Result<()> {
    let Some((name, _)) = options.iter().find(|(name, _)| !valid.contains(name)) else {
        return Ok(());
    };
    let hint = if valid.is_empty() {
        "There are no valid options in this context.".to_owned()
    } else {
        format!("Valid options in this context are: {}.", valid.join(", "))
    };
    Err(PgError::new("HV00D", format!("invalid option \"{name}\"")).hint(hint))
}
