//! Which options exist: `project` and `collection` or `attached` of a foreign table, those of a storage's server and of the
//! user mapping with its credentials. What is wrong with a value is said without the value: it may be a secret.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{pg_extern, pg_sys};
use rakam_lake::storage::{
    CREDENTIAL_OPTIONS, Credentials, SERVER_OPTIONS, StorageOptions, StorageUrl,
};

use crate::pg::{PgError, Result, security, server};

/// The collection of a foreign table without option `collection`: all collections of its project.
pub const ALL: &str = "_all";

const TABLE_OPTIONS: [&str; 3] = ["project", "collection", "attached"];

/// What a foreign table reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableOptions {
    pub project: String,
    /// Empty for attached files.
    pub collection: String,
    /// The name under which foreign files are attached.
    pub attached: Option<String>,
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
    let options = unsafe { server::definitions((*pg_sys::GetForeignTable(relation)).options) };
    let value = |name: &str| {
        options
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    };
    let attached = value("attached");
    TableOptions {
        // A table made before the validator had its say reads a project that does not exist.
        project: value("project").unwrap_or_default(),
        collection: match (value("collection"), &attached) {
            (Some(name), _) => name,
            (None, Some(_)) => String::new(),
            (None, None) => ALL.to_owned(),
        },
        attached,
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
        let given = |option: &str| options.iter().any(|(name, _)| *name == option);
        if given("collection") && given("attached") {
            return Err(PgError::new(
                "22023",
                "options \"collection\" and \"attached\" exclude each other",
            ));
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
        let valid: Vec<&str> = std::iter::once("url").chain(SERVER_OPTIONS).collect();
        known(options, &valid)?;
        match options.iter().find(|(name, _)| *name == "url") {
            Some((_, url)) => storage(url, options),
            None if options.is_empty() => Ok(()),
            None => Err(PgError::new("HV00J", "option \"url\" is required").hint(
                "A storage looks like OPTIONS (url 's3://bucket/prefix', region 'eu-central-1').",
            )),
        }
    } else if catalog == pg_sys::UserMappingRelationId {
        known(options, &CREDENTIAL_OPTIONS)?;
        Credentials::parse(options)?;
        Ok(())
    } else {
        known(options, &[])
    }
}

/// The address of a storage server and how it is spoken to: what that may be, and who may say it.
fn storage(url: &str, options: &[(&str, &str)]) -> Result<()> {
    let url = StorageUrl::parse(url)?;
    StorageOptions::parse(&url, options)?;
    let user = security::current_user();
    if !security::is_server_admin(user) {
        return Err(
            PgError::new("42501", "permission denied to set the address of a storage")
                .hint("Only superusers and members of rakam_admin may do that."),
        );
    }
    if matches!(url, StorageUrl::File(_)) {
        PgError::new(
            "00000",
            "a file:// storage is not replicated: its files are on this machine only",
        )
        .hint("Standbys, base backups and dumps do not contain them; the default storage, rakam_local, is in Postgres itself.")
        .notice();
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
