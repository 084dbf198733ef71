//! Which files on the server a caller may name by a URL.

use std::path::{Path, PathBuf};

use rakam_lake::period;
use rakam_lake::storage::StorageUrl;
use serde::{Deserialize, Serialize};

use crate::catalog::attached::Attached;
use crate::catalog::projects::Project;
use crate::catalog::{load, manifest};
use crate::pg::security::{self, ActAs};
use crate::pg::spi::View;
use crate::pg::{PgError, Result};

/// What is to be done with the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

impl Access {
    /// The role of Postgres that may do it anywhere on the server.
    fn role(self) -> &'static str {
        match self {
            Self::Read => "pg_read_server_files",
            Self::Write => "pg_write_server_files",
        }
    }
}

/// Files below a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub root: PathBuf,
    /// A relative path or pattern.
    pub pattern: String,
    /// Nothing outside of the root is meant, not even through a symbolic link.
    pub confined: bool,
}

/// The files that a URL means, if the effective user may use them: anything on the server for those to whom Postgres gives
/// that, else what lies in a storage they may use, or (a relative path) in the project's own part of its storage.
pub fn resolve(project: &Project, url: &str, access: Access) -> Result<Place> {
    permitted(project, url, access).map(|(place, _)| place)
}

/// As [`resolve`], with the storage server whose use permits it, where that is the reason.
pub fn permitted(project: &Project, url: &str, access: Access) -> Result<(Place, Option<String>)> {
    if url.contains('\0') {
        return Err(PgError::new(
            "22023",
            "a url must not contain NUL characters",
        ));
    }
    if !url.contains("://") {
        let place = in_project(View::Current, &project.name, project.storage_id, url)?;
        return Ok((place, None));
    }
    let StorageUrl::File(path) = StorageUrl::parse(url)? else {
        return Err(not_files());
    };
    let user = security::current_user();
    let role = security::role_named(access.role());
    if security::is_superuser(user) || role.is_some_and(|r| security::has_privileges_of(user, r)) {
        return Ok((anywhere(&path), None));
    }
    let storages = {
        let _owner = ActAs::owner();
        load::storage_urls(user)?
    };
    for (storage, address) in storages {
        if let Some(place) = in_storage(&path, &address)? {
            return Ok((place, Some(storage)));
        }
    }
    Err(
        PgError::new("42501", format!("permission denied for file \"{url}\"")).hint(format!(
            "Only roles with the privileges of \"{}\" may name any file of the server; others those below the url of a \
             storage on which they have USAGE, or a path relative to the project's storage.",
            access.role()
        )),
    )
}

fn not_files() -> PgError {
    PgError::new("0A000", "files in a bucket cannot be named here")
        .hint("Name a file on the server by its url, file:///path.")
}

/// The files of an attached table: `storage` is what [`permitted`] said when it was attached. Nobody's rights are asked: they
/// were the attacher's, and are not given back with the privilege.
pub fn attached(view: View, table: &Attached) -> Result<Place> {
    if !table.url.contains("://") {
        return in_project(view, &table.project, table.storage_id, &table.url);
    }
    let StorageUrl::File(path) = StorageUrl::parse(&table.url)? else {
        return Err(not_files());
    };
    let Some(storage) = &table.storage else {
        return Ok(anywhere(&path));
    };
    let address = {
        let _owner = ActAs::owner();
        load::storage_url(view, storage)?
    };
    let place = match address {
        Some(address) => in_storage(&path, &address)?,
        None => None,
    };
    place.ok_or_else(|| {
        PgError::new(
            "58030",
            format!("the attached files are not in storage \"{storage}\" any more"),
        )
        .hint("The foreign server was dropped, or has another url: attach the files again.")
    })
}

fn anywhere(path: &Path) -> Place {
    Place {
        pattern: below(path, Path::new("/")).unwrap_or_default(),
        root: PathBuf::from("/"),
        confined: false,
    }
}

/// The place of a path, if it is below the address of a storage.
fn in_storage(path: &Path, address: &str) -> Result<Option<Place>> {
    let StorageUrl::File(root) = StorageUrl::parse(address)? else {
        return Ok(None);
    };
    Ok(below(path, &root).map(|pattern| Place {
        root,
        pattern,
        confined: true,
    }))
}

/// The rest of a path below a directory.
fn below(path: &Path, root: &Path) -> Option<String> {
    let rest = path.strip_prefix(root).ok()?.to_str()?;
    (!rest.is_empty()).then(|| rest.to_owned())
}

/// A path relative to the project's storage. Projects share a storage, so each has its own part of it, where its data
/// files are as well.
fn in_project(view: View, project: &str, storage_id: i32, path: &str) -> Result<Place> {
    let storage = {
        let _owner = ActAs::owner();
        manifest::storage(view, storage_id)?
    };
    let storage =
        storage.ok_or_else(|| PgError::internal("a project's storage is not registered"))?;
    let pattern = rakam_files::locate::relative(path).map_err(|e| {
        PgError::from(e).hint("A file elsewhere on the server is named by its url, file:///path.")
    })?;
    let Some(config) = storage.config()? else {
        return Err(PgError::new(
            "0A000",
            format!(
                "storage \"{}\" of project \"{project}\" is inside Postgres and holds no other files",
                storage.name
            ),
        )
        .hint("Name a file on the server by its url, file:///path."));
    };
    let StorageUrl::File(root) = config.url else {
        return Err(not_files());
    };
    Ok(Place {
        root: root.join(period::component(project)),
        pattern: pattern.to_owned(),
        confined: true,
    })
}
