//! Storages outside Postgres, where data files live: a directory (`file:///dir`) or a bucket (`s3://`, `gs://`, `az://`).
//!
//! [`Storage`] is the one way to them. Its calls are futures and wait for disk or network, so they run on the engine's
//! threads (`pg::runtime::wait_for`) and never inside a transaction that holds a lock others may want:
//!
//! | call | does | when it fails |
//! |---|---|---|
//! | [`Storage::put`] | writes an object whole, durably, under a new name | nothing is there, or (an answer was lost) all of it |
//! | [`Storage::make`] | begins an object that does not fit into memory; a bucket only | nothing is there |
//! | [`Storage::get`], [`Storage::get_range`] | reads | 58P01 if there is no such object |
//! | [`Storage::head`] | size, age and version of an object | 58P01 |
//! | [`Storage::delete`] | deletes; what is not there was deleted | may be repeated |
//! | [`Storage::list`] | objects below a path, as a stream, page by page, in no order that all kinds keep | |
//! | [`Storage::list_uploads`], [`Storage::abort_upload`] | uploads in parts that nobody completed; `None`: the store cannot tell | |
//! | [`Storage::get_versioned`], [`Storage::put_if`] | a small object that is replaced only if it has not changed | |
//! | [`Storage::writes_conditionally`] | whether the store keeps the conditions of `put_if`, by trying | |
//! | [`Storage::check`] | whether it can be reached and listed | 58030 |
//! | [`Storage::prepare`] | makes a directory, proves that it can be written | 58030 |
//! | [`Storage::object_store`] | the same place for reading through `object_store`; paths are those of the manifest | |
//!
//! Paths are relative to the storage's root, with `/`, and never lead out of it. A failure that may pass is tried again with
//! growing pauses until [`StorageConfig::timeout`]; dropping the future cancels. No error carries an address or a secret.

mod bucket;
mod directory;
mod making;
mod options;
pub mod place;
pub mod reason;
mod uploads;
mod url;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::{ObjectMeta, ObjectStore, UpdateVersion};
use uuid::Uuid;

use crate::error::LakeError;
use bucket::Bucket;
use directory::Directory;

pub use bucket::PART_BYTES;
pub use making::Making;
pub use options::{AzureSecret, CREDENTIAL_OPTIONS, Credentials, SERVER_OPTIONS, StorageOptions};
pub use uploads::Upload;
pub use url::{BucketUrl, Cloud, StorageUrl};

/// All that says where a storage is and how it is entered. Two equal ones are the same storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageConfig {
    pub url: StorageUrl,
    pub options: StorageOptions,
    pub credentials: Credentials,
    /// How long a call to a bucket is repeated before it fails.
    pub timeout: Duration,
}

impl StorageConfig {
    /// A directory, which needs nothing else.
    pub fn directory(url: StorageUrl) -> Self {
        Self {
            url,
            options: StorageOptions::default(),
            credentials: Credentials::Chain,
            timeout: Duration::ZERO,
        }
    }
}

/// What is known of an object without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    pub path: String,
    pub bytes: u64,
    pub modified: SystemTime,
    /// None in a list of a directory.
    pub version: Option<Version>,
}

impl ObjectInfo {
    /// What tells its content apart from others of the same name, if the store says so.
    pub fn tag(&self) -> Option<&str> {
        self.version.as_ref()?.0.e_tag.as_deref().map(bare)
    }

    /// Whether an answer is about the object as it was found.
    pub(crate) fn is_still(&self, meta: &ObjectMeta) -> bool {
        let same = match (self.tag(), &meta.e_tag) {
            (Some(known), Some(found)) => known == bare(found),
            // An answer has whole seconds, a list may have more.
            _ => seconds(self.modified) == seconds(meta.last_modified.into()),
        };
        same && self.bytes == meta.size
    }
}

/// A tag without what a list may leave out that an answer has.
fn bare(tag: &str) -> &str {
    tag.trim_start_matches("W/").trim_matches('"')
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Tells two contents of the same name apart, for [`Storage::put_if`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(UpdateVersion);

/// What became of a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutIf {
    Written,
    /// The object is another one than was expected, and not ours.
    Conflict,
    /// The store has no conditional writes; nothing was written.
    Unsupported,
}

/// A storage. Cloning shares it, with its connections.
#[derive(Debug, Clone)]
pub struct Storage {
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Directory(Directory),
    Bucket(Arc<Bucket>),
}

impl Storage {
    /// Touches neither disk nor network (but the file of certificates): the storage may be away for now.
    ///
    /// A bucket's connections belong to the tokio runtime that uses them first: open it anew for another one.
    pub fn open(config: &StorageConfig) -> Result<Self, LakeError> {
        let kind = match &config.url {
            StorageUrl::File(root) => Kind::Directory(Directory::new(root.clone())),
            StorageUrl::Bucket(url) => Kind::Bucket(Arc::new(Bucket::open(url, config)?)),
        };
        Ok(Self { kind })
    }

    /// Whether it is reached over a network.
    pub fn is_remote(&self) -> bool {
        matches!(self.kind, Kind::Bucket(_))
    }

    /// For the storage's creation only: makes the directory if it is missing, and proves that the storage can be written.
    /// Later a missing directory is one that is not mounted, and must not be made anew below the mount point.
    pub async fn prepare(&self) -> Result<(), LakeError> {
        match &self.kind {
            Kind::Directory(directory) => blocking(directory, |d| d.prepare()).await,
            Kind::Bucket(bucket) => {
                let probe = probe_path();
                bucket.put(&probe, Bytes::from_static(b"rakam")).await?;
                bucket.delete(&probe).await
            }
        }
    }

    /// Whether the storage is there and can be listed: 58030 if not.
    pub async fn check(&self) -> Result<(), LakeError> {
        match &self.kind {
            Kind::Directory(directory) => blocking(directory, |d| d.check()).await,
            Kind::Bucket(bucket) => bucket.check().await,
        }
    }

    /// Writes an object that does not exist yet, durably, and all of it or nothing. One of another content under this
    /// name stays and is an error (58P02); one of this content was written by an earlier attempt of the same call.
    pub async fn put(&self, path: &str, data: Bytes) -> Result<(), LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.put(&path, &data)).await
            }
            Kind::Bucket(bucket) => bucket.put(path, data).await,
        }
    }

    /// Begins an object of which nobody has the whole content yet: see [`Making`]. One that is there is 58P02. Of buckets
    /// only: a directory is written by its path.
    pub async fn make(&self, path: &str) -> Result<Making, LakeError> {
        match &self.kind {
            Kind::Directory(_) => Err(LakeError::Unsupported {
                message: "a directory does not take objects in parts".to_owned(),
                hint: "Write the file by its path.".to_owned(),
            }),
            Kind::Bucket(bucket) => Making::begin(Arc::clone(bucket), path).await,
        }
    }

    /// The whole of an object.
    pub async fn get(&self, path: &str) -> Result<Bytes, LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.read(&path)).await
            }
            Kind::Bucket(bucket) => Ok(bucket.read(path, None).await?.0),
        }
    }

    /// The bytes of a range, which must lie within the object.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.read_range(&path, range)).await
            }
            Kind::Bucket(bucket) => Ok(bucket.read(path, Some(range)).await?.0),
        }
    }

    pub async fn head(&self, path: &str) -> Result<ObjectInfo, LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.info(&path)).await
            }
            Kind::Bucket(bucket) => bucket.head(path).await,
        }
    }

    /// Deletes an object. One that is not there is deleted.
    pub async fn delete(&self, path: &str) -> Result<(), LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.delete(&path)).await
            }
            Kind::Bucket(bucket) => bucket.delete(path).await,
        }
    }

    /// Deletes an object of which nobody knows whether it was written to its end, and what an interrupted write left of it.
    /// Nobody may be writing it.
    pub async fn discard(&self, path: &str) -> Result<(), LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.discard(&path)).await
            }
            Kind::Bucket(bucket) => bucket.discard(path).await,
        }
    }

    /// Every object below a path (of whole components; empty: all), remains of interrupted writes to a directory included.
    pub fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectInfo, LakeError>> {
        match &self.kind {
            Kind::Directory(directory) => {
                let (directory, prefix) = (directory.clone(), prefix.to_owned());
                // A directory at a time: never all names of a large storage at once.
                stream::try_unfold(None, move |pending| {
                    let (directory, prefix) = (directory.clone(), prefix.clone());
                    async move {
                        let step = blocking(&directory, move |d| d.list_step(&prefix, pending));
                        Ok(step.await?.map(|(found, rest)| (found, Some(rest))))
                    }
                })
                .map_ok(|found| stream::iter(found).map(Ok))
                .try_flatten()
                .boxed()
            }
            Kind::Bucket(bucket) => bucket
                .list(prefix)
                .unwrap_or_else(|e| stream::iter([Err(e)]).boxed()),
        }
    }

    /// Uploads in parts that were begun and not completed; None: the store cannot list them. A directory has none: what
    /// an interrupted write left there is in [`Self::list`].
    pub async fn list_uploads(&self) -> Result<Option<Vec<Upload>>, LakeError> {
        match &self.kind {
            Kind::Directory(_) => Ok(Some(Vec::new())),
            Kind::Bucket(bucket) => bucket.list_uploads().await,
        }
    }

    /// Gives up an upload that [`Self::list_uploads`] has found. One that is not there any more is aborted.
    pub async fn abort_upload(&self, upload: &Upload) -> Result<(), LakeError> {
        match &self.kind {
            Kind::Directory(_) => Ok(()),
            Kind::Bucket(bucket) => bucket.abort_upload(upload).await,
        }
    }

    /// A small object with its version, for [`Self::put_if`]; None: there is none.
    pub async fn get_versioned(&self, path: &str) -> Result<Option<(Bytes, Version)>, LakeError> {
        let found = match &self.kind {
            Kind::Directory(directory) => {
                let path = path.to_owned();
                blocking(directory, move |d| d.read_versioned(&path)).await
            }
            Kind::Bucket(bucket) => bucket
                .read(path, None)
                .await
                .map(|(bytes, meta)| (bytes, bucket::version(&meta))),
        };
        match found {
            Ok(found) => Ok(Some(found)),
            Err(LakeError::Missing { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes a small object if it is still the one expected; with None, if there is none. After a lost answer the object
    /// is read: of the same content, it was written by this call, so contents should differ from writer to writer.
    pub async fn put_if(
        &self,
        path: &str,
        data: Bytes,
        expected: Option<&Version>,
    ) -> Result<PutIf, LakeError> {
        match &self.kind {
            Kind::Directory(directory) => {
                let (path, expected) = (path.to_owned(), expected.cloned());
                blocking(directory, move |d| {
                    d.put_if(&path, &data, expected.as_ref())
                })
                .await
            }
            Kind::Bucket(bucket) => bucket.put_if(path, data, expected).await,
        }
    }

    /// Whether the store keeps the conditions of [`Self::put_if`]: some take the request and ignore them.
    pub async fn writes_conditionally(&self) -> Result<bool, LakeError> {
        let probe = probe_path();
        let kept = self.keeps_conditions(&probe).await;
        self.delete(&probe).await?;
        kept
    }

    async fn keeps_conditions(&self, probe: &str) -> Result<bool, LakeError> {
        let put =
            |text: &'static [u8], expected| self.put_if(probe, Bytes::from_static(text), expected);
        if put(b"one", None).await? != PutIf::Written || put(b"two", None).await? != PutIf::Conflict
        {
            return Ok(false);
        }
        let Some((_, first)) = self.get_versioned(probe).await? else {
            return Ok(false);
        };
        Ok(put(b"two", Some(&first)).await? == PutIf::Written
            && put(b"three", Some(&first)).await? == PutIf::Conflict)
    }

    /// The storage for reading, rooted at its prefix: paths are those of the manifest.
    pub fn object_store(&self) -> Result<Arc<dyn ObjectStore>, LakeError> {
        match &self.kind {
            Kind::Directory(directory) => directory.object_store(),
            Kind::Bucket(bucket) => Ok(bucket.object_store()),
        }
    }
}

fn probe_path() -> String {
    format!("_rakam/probe-{}", Uuid::now_v7())
}

/// Refuses what is not a plain relative path.
fn check_path(path: &str) -> Result<(), LakeError> {
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    if path.contains(['\0', '\\']) || !path.split('/').all(plain) {
        return Err(LakeError::InvalidPath {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Work on files, on a thread that may block.
async fn blocking<T: Send + 'static>(
    directory: &Directory,
    work: impl FnOnce(Directory) -> Result<T, LakeError> + Send + 'static,
) -> Result<T, LakeError> {
    let directory = directory.clone();
    tokio::task::spawn_blocking(move || work(directory))
        .await
        .unwrap_or_else(|_| {
            Err(LakeError::Unreachable {
                action: "use",
                path: String::new(),
                reason: "the work was interrupted".to_owned(),
            })
        })
}

#[cfg(test)]
mod tests;
