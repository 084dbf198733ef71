//! Which files a caller may name by a URL: on the server, and in the buckets of storages.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rakam_files::locate;
use rakam_files::object::{Fetching, Objects, Stop};
use rakam_lake::cache::Counters;
use rakam_lake::period;
use rakam_lake::storage::{BucketUrl, Storage, StorageUrl};
use serde::{Deserialize, Serialize};

use crate::catalog::attached::Attached;
use crate::catalog::projects::Project;
use crate::catalog::{load, manifest, store};
use crate::pg::security::{self, ActAs};
use crate::pg::spi::View;
use crate::pg::{PgError, Result, cache};

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

/// Where the files of a call are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub root: Root,
    /// A relative path or pattern.
    pub pattern: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// If confined nothing outside of the directory is meant, not even through a symbolic link.
    Directory {
        path: PathBuf,
        confined: bool,
    },
    Bucket(InBucket),
}

/// Below a folder of the bucket that a storage server names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InBucket {
    pub server: String,
    /// The server's own, when the right was checked.
    pub address: String,
    /// Empty for all that is below the address.
    pub folder: String,
}

impl InBucket {
    /// The storage, as it is defined now. An error if it is another place by now.
    pub fn open(&self) -> Result<Storage> {
        let (address, storage) = store::server(&self.server)?;
        if address == self.address {
            Ok(storage)
        } else {
            Err(moved(&self.server))
        }
    }

    /// The path of a file in the storage.
    pub fn path(&self, name: &str) -> String {
        match self.folder.as_str() {
            "" => name.to_owned(),
            folder => format!("{folder}/{name}"),
        }
    }

    /// The whole URL of a file or pattern.
    pub fn url(&self, name: &str) -> String {
        format!("{}/{}", self.address.trim_end_matches('/'), self.path(name))
    }
}

impl Place {
    /// What it is called in messages.
    pub fn called(&self) -> String {
        match &self.root {
            Root::Directory { path, .. } => locate::called(path, &path.join(&self.pattern)),
            Root::Bucket(_) => self.pattern.clone(),
        }
    }

    /// The place for listing and reading, until `stop`. Touches neither disk nor network. `counters` counts what is read of
    /// a bucket.
    pub fn open(&self, keep: Keep, counters: &Arc<Counters>, stop: &Stop) -> Result<locate::Root> {
        match &self.root {
            Root::Directory { path, confined } => Ok(locate::Root::Directory {
                path: path.clone(),
                confined: *confined,
            }),
            Root::Bucket(bucket) => {
                let fetching = Fetching {
                    key: cache::server_key(&bucket.server, &bucket.address),
                    fetcher: cache::fetcher()?,
                    directory: match keep {
                        Keep::Blocks => cache::directory(),
                        Keep::Nothing => None,
                    },
                    counters: Arc::clone(counters),
                };
                let objects = Objects::new(bucket.open()?, &bucket.folder, fetching, stop)?;
                Ok(locate::Root::Bucket(objects))
            }
        }
    }
}

/// Whether what is read of a bucket may be read again soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Blocks,
    Nothing,
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
    let target = Target::parse(url)?;
    let user = security::current_user();
    if let Target::File(path) = &target {
        let role = security::role_named(access.role());
        if security::is_superuser(user)
            || role.is_some_and(|r| security::has_privileges_of(user, r))
        {
            return Ok((anywhere(path), None));
        }
    }
    let (storages, own) = {
        let _owner = ActAs::owner();
        let own = manifest::storage(View::Current, project.storage_id)?;
        (load::storage_urls(user)?, own.map(|storage| storage.name))
    };
    let mut found: Option<(Place, String)> = None;
    let mut length = 0;
    // Those with the longest addresses first.
    for (storage, address) in storages {
        if found.is_some() && address.len() < length {
            break;
        }
        let is_own = own.as_ref() == Some(&storage);
        if (found.is_none() || is_own)
            && let Some(place) = target.in_storage(&storage, &address)?
        {
            length = address.len();
            found = Some((place, storage));
        }
    }
    if let Some((place, storage)) = found {
        return Ok((place, Some(storage)));
    }
    let denied = PgError::new("42501", format!("permission denied for file \"{url}\""));
    Err(denied.hint(match target {
        Target::File(_) => format!(
            "Only roles with the privileges of \"{}\" may name any file of the server; others those below the url of a \
             storage on which they have USAGE, or a path relative to the project's storage.",
            access.role()
        ),
        Target::Bucket(..) => {
            "A file in a bucket lies below the url of a storage on which the current role has USAGE, or is named by a \
             path relative to the project's storage."
                .to_owned()
        }
    }))
}

/// What a URL names, which may be a pattern.
enum Target {
    File(PathBuf),
    Bucket(BucketUrl, String),
}

impl Target {
    fn parse(url: &str) -> Result<Self> {
        if let Some((bucket, path)) = BucketUrl::of_objects(url)? {
            return Ok(Self::Bucket(bucket, path.to_owned()));
        }
        match StorageUrl::parse(url)? {
            StorageUrl::File(path) => Ok(Self::File(path)),
            StorageUrl::Bucket(bucket) => Ok(Self::Bucket(bucket, String::new())),
        }
    }

    /// The place, if it is below the address of a storage.
    fn in_storage(&self, server: &str, address: &str) -> Result<Option<Place>> {
        Ok(match (self, StorageUrl::parse(address)?) {
            (Self::File(path), StorageUrl::File(root)) => below(path, &root).map(|pattern| Place {
                pattern,
                root: Root::Directory {
                    path: root,
                    confined: true,
                },
            }),
            (Self::Bucket(bucket, path), StorageUrl::Bucket(root)) => {
                root.below(bucket, path).map(|pattern| Place {
                    pattern: pattern.to_owned(),
                    root: Root::Bucket(InBucket {
                        server: server.to_owned(),
                        address: address.to_owned(),
                        folder: String::new(),
                    }),
                })
            }
            _ => None,
        })
    }
}

/// The files of an attached table: `storage` is what [`permitted`] said when it was attached. Nobody's rights are asked: they
/// were the attacher's, and are not given back with the privilege.
pub fn attached(view: View, table: &Attached) -> Result<Place> {
    if !table.url.contains("://") {
        return in_project(view, &table.project, table.storage_id, &table.url);
    }
    let target = Target::parse(&table.url)?;
    let Some(storage) = &table.storage else {
        return match &target {
            Target::File(path) => Ok(anywhere(path)),
            Target::Bucket(..) => Err(PgError::internal("an attached bucket has no storage")),
        };
    };
    let address = {
        let _owner = ActAs::owner();
        load::storage_url(view, storage)?
    };
    let place = match address {
        Some(address) => target.in_storage(storage, &address)?,
        None => None,
    };
    place.ok_or_else(|| moved(storage))
}

fn moved(storage: &str) -> PgError {
    PgError::new(
        "58030",
        format!("the files are not in storage \"{storage}\" any more"),
    )
    .hint("The foreign server was dropped, or has another url: load or attach the files from where they are now.")
}

fn anywhere(path: &Path) -> Place {
    Place {
        pattern: below(path, Path::new("/")).unwrap_or_default(),
        root: Root::Directory {
            path: PathBuf::from("/"),
            confined: false,
        },
    }
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
    let pattern = locate::relative(path).map_err(|e| {
        PgError::from(e)
            .hint("A file elsewhere is named by its url, file:///path or s3://bucket/path.")
    })?;
    if storage.is_local() {
        return Err(PgError::new(
            "0A000",
            format!(
                "storage \"{}\" of project \"{project}\" is inside Postgres and holds no other files",
                storage.name
            ),
        )
        .hint("Name a file on the server by its url, file:///path, or one in a bucket that is a storage."));
    }
    let address = store::address(&storage.name)?;
    let folder = period::component(project);
    let root = match StorageUrl::parse(&address)? {
        StorageUrl::File(root) => Root::Directory {
            path: root.join(folder),
            confined: true,
        },
        StorageUrl::Bucket(_) => Root::Bucket(InBucket {
            server: storage.name,
            address,
            folder: folder.to_string(),
        }),
    };
    Ok(Place {
        root,
        pattern: pattern.trim_end_matches('/').to_owned(),
    })
}
