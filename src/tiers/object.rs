//! The road of a data file: made in memory, announced, written into its storage outside of any transaction, entered in
//! the manifest by the transaction that takes out what it replaces. And [`Remote`], by which workers reach a storage.

use std::future::Future;
use std::ops::Range;

use bytes::Bytes;
use futures::StreamExt;
use rakam_lake::LakeError;
use rakam_lake::owner;
use rakam_lake::period::{self, Period};
use rakam_lake::stats;
use rakam_lake::storage::{ObjectInfo, Storage, Upload};
use rakam_lake::write::{FileOptions, WrittenFile};
use uuid::Uuid;

use crate::catalog::manifest::{self, NewFile, StorageRow};
use crate::catalog::registry::{Collection, ProjectRow};
use crate::catalog::storages;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, runtime, wait};

pub use rakam_lake::storage::{PutIf, Version};

/// Objects of a list that are handed over together, at most.
const LIST_PAGE: usize = 1000;
/// Requests on their way at a time, where many are to be made.
const AT_A_TIME: usize = 16;

/// Whether a failure is that of one object, which is missing or damaged: work on others may go on.
pub fn is_of_one(failure: &Failure) -> bool {
    matches!(failure, Failure::Error(error) if matches!(&*error.sqlstate, "58P01" | "XX001"))
}

/// Where the files of one operation go.
pub struct Home {
    pub project: ProjectRow,
    pub collection: Collection,
    pub storage_id: i32,
    pub storage: StorageRow,
    /// The operation's own id, in its files and their intents.
    pub op_id: Uuid,
}

/// A file written, not yet in the manifest.
pub struct Output {
    pub path: String,
    pub period: Period,
    pub first_day: i32,
    /// How many merges its events have been through, at most.
    pub level: i16,
    pub file: WrittenFile<Bytes>,
}

impl Output {
    /// Takes the file's bytes out and leaves what the manifest needs.
    pub fn take_bytes(&mut self) -> Bytes {
        std::mem::take(&mut self.file.sink)
    }
}

impl Home {
    /// What a file of this period says about itself. One that is made of other files says of which, too.
    pub fn options(&self, period: Period, first_day: i32) -> FileOptions {
        FileOptions {
            project: self.project.name.clone(),
            project_id: self.project.id,
            collection: self.collection.name.clone(),
            collection_id: self.collection.id,
            flush_id: self.op_id,
            period,
            first_day,
            replaces: None,
        }
    }

    /// Names a finished file.
    pub fn output(
        &self,
        period: Period,
        first_day: i32,
        file: WrittenFile<Vec<u8>>,
    ) -> Result<Output> {
        let id = owner::object_id(storages::writer()?);
        let (project, collection) = (&self.project.name, &self.collection.name);
        let file = file.map_sink(Bytes::from);
        Ok(Output {
            path: period::object_path(project, collection, period, first_day, id),
            period,
            first_day,
            level: 0,
            file,
        })
    }

    /// Leaves an intent, in a transaction before the object is written. None is needed inside of Postgres.
    pub fn announce(&self, output: &Output, purpose: &str) -> Result<()> {
        if self.storage.is_local() {
            return Ok(());
        }
        let collection_id = self.collection.id;
        manifest::add_intent(
            self.storage_id,
            &output.path,
            self.op_id,
            collection_id,
            purpose,
        )
    }

    /// Writes announced objects, outside of any transaction.
    pub fn put(&self, outputs: &[Output]) -> std::result::Result<(), Failure> {
        if self.storage.is_local() {
            return Ok(());
        }
        let remote = Remote::open(self.storage_id)?.ok_or_else(|| {
            Failure::Error(PgError::internal("a project's storage is not registered"))
        })?;
        super::owner::claim(&remote)?;
        for output in outputs {
            wait::check_interrupts();
            remote.put(&output.path, output.file.sink.clone())?;
        }
        Ok(())
    }

    /// Enters a file in the manifest, under the manifest lock: its object is there, or is put into the default storage.
    pub fn enter(&self, output: &Output, schema_version: i32) -> Result<()> {
        let file = &output.file;
        if self.storage.is_local() {
            manifest::put_object(self.project.id, &output.path, &file.sink)?;
        } else if manifest::delete_intent(self.storage_id, &output.path)? != 1 {
            return Err(PgError::new(
                "40001",
                "an announced object was collected as an orphan",
            ));
        }
        manifest::add_file(&NewFile {
            project_id: self.project.id,
            collection_id: self.collection.id,
            storage_id: self.storage_id,
            path: &output.path,
            schema_version,
            period: output.period.as_str(),
            first_day: output.first_day,
            level: output.level,
            n: file.n as i64,
            bytes: file.bytes as i64,
            min_time_us: file.min_time_us,
            max_time_us: file.max_time_us,
            min_xid: file.min_xid,
            max_xid: file.max_xid,
            has_extra: file.has_extra,
            flush_id: self.op_id,
            footer_bytes: file.footer_bytes as i32,
            footer: &file.footer,
            stats: &stats::encode(&file.stats),
        })?;
        Ok(())
    }
}

/// A storage outside Postgres, for workers: each call waits for its end with interrupts served, and is made outside of
/// transactions. How it ends is noted ([`super::reach`]). What the calls do is said at [`rakam_lake::storage`].
pub struct Remote {
    pub storage_id: i32,
    pub name: String,
    storage: Storage,
}

type Answer<T> = std::result::Result<T, LakeError>;

impl Remote {
    /// The storage as it is defined now; None for the default storage, which is a table, and for one that is not known
    /// (any more). Outside of transactions.
    pub fn open(storage_id: i32) -> std::result::Result<Option<Self>, Failure> {
        xact::worker(|| {
            let Some(row) = manifest::storage(View::Current, storage_id)? else {
                return Ok(None);
            };
            Ok(row.open()?.map(|storage| Self {
                storage_id,
                name: row.name,
                storage,
            }))
        })
    }

    pub fn check(&self) -> Answer<()> {
        self.call(|storage| async move { storage.check().await })
    }

    pub fn put(&self, path: &str, data: Bytes) -> Answer<()> {
        let path = path.to_owned();
        self.call(|storage| async move { storage.put(&path, data).await })
    }

    pub fn get(&self, path: &str) -> Answer<Bytes> {
        let path = path.to_owned();
        self.call(|storage| async move { storage.get(&path).await })
    }

    pub fn get_range(&self, path: &str, range: Range<u64>) -> Answer<Bytes> {
        let path = path.to_owned();
        self.call(|storage| async move { storage.get_range(&path, range).await })
    }

    pub fn head(&self, path: &str) -> Answer<ObjectInfo> {
        let path = path.to_owned();
        self.call(|storage| async move { storage.head(&path).await })
    }

    /// Deletes an object that may not have been written to its end, and what is left of the write.
    pub fn discard(&self, path: &str) -> Answer<()> {
        let path = path.to_owned();
        self.call(|storage| async move { storage.discard(&path).await })
    }

    /// Deletes objects, several at a time. Those that are not there are deleted.
    pub fn delete_all(&self, paths: &[String]) -> Answer<()> {
        let paths = paths.to_vec();
        self.call(|storage| async move {
            let mut deletions = futures::stream::iter(paths)
                .map(|path| {
                    let storage = storage.clone();
                    async move { storage.delete(&path).await }
                })
                .buffer_unordered(AT_A_TIME);
            while let Some(deleted) = deletions.next().await {
                deleted?;
            }
            Ok(())
        })
    }

    /// The sizes of objects; None where there is none.
    pub fn sizes(&self, paths: &[String]) -> Answer<Vec<Option<u64>>> {
        let paths = paths.to_vec();
        self.call(|storage| async move {
            let mut sizes = futures::stream::iter(paths)
                .map(|path| {
                    let storage = storage.clone();
                    async move {
                        match storage.head(&path).await {
                            Ok(info) => Ok(Some(info.bytes)),
                            Err(LakeError::Missing { .. }) => Ok(None),
                            Err(e) => Err(e),
                        }
                    }
                })
                .buffered(AT_A_TIME);
            let mut found = Vec::new();
            while let Some(size) = sizes.next().await {
                found.push(size?);
            }
            Ok(found)
        })
    }

    /// The last bytes of objects, by path, size and how many of them; None where there is no such object.
    pub fn ends(&self, objects: Vec<(String, u64, u64)>) -> Answer<Vec<Option<Bytes>>> {
        self.call(|storage| async move {
            let mut ends = futures::stream::iter(objects)
                .map(|(path, size, length)| {
                    let storage = storage.clone();
                    async move {
                        let from = size.saturating_sub(length);
                        match storage.get_range(&path, from..size).await {
                            Ok(bytes) => Ok(Some(bytes)),
                            Err(LakeError::Missing { .. }) => Ok(None),
                            Err(e) => Err(e),
                        }
                    }
                })
                .buffered(AT_A_TIME);
            let mut found = Vec::new();
            while let Some(end) = ends.next().await {
                found.push(end?);
            }
            Ok(found)
        })
    }

    /// Hands the objects below a path (empty: all) to `page`, some thousand at a time.
    pub fn list(
        &self,
        prefix: &str,
        mut page: impl FnMut(Vec<ObjectInfo>) -> std::result::Result<(), Failure>,
    ) -> std::result::Result<(), Failure> {
        let mut objects = Some(self.storage.list(prefix).ready_chunks(LIST_PAGE));
        while let Some(mut listing) = objects.take() {
            let next = self.call(|_| async move {
                let Some(found) = listing.next().await else {
                    return Ok(None);
                };
                let found = found.into_iter().collect::<Answer<Vec<_>>>()?;
                Ok(Some((found, listing)))
            });
            if let Some((found, listing)) = next.map_err(|e| Failure::Error(e.into()))? {
                page(found)?;
                objects = Some(listing);
            }
        }
        Ok(())
    }

    pub fn list_uploads(&self) -> Answer<Option<Vec<Upload>>> {
        self.call(|storage| async move { storage.list_uploads().await })
    }

    pub fn abort_upload(&self, upload: &Upload) -> Answer<()> {
        let upload = upload.clone();
        self.call(|storage| async move { storage.abort_upload(&upload).await })
    }

    pub fn get_versioned(&self, path: &str) -> Answer<Option<(Bytes, Version)>> {
        let path = path.to_owned();
        self.call(|storage| async move { storage.get_versioned(&path).await })
    }

    pub fn put_if(&self, path: &str, data: &[u8], expected: Option<&Version>) -> Answer<PutIf> {
        let (path, data) = (path.to_owned(), Bytes::copy_from_slice(data));
        let expected = expected.cloned();
        self.call(|storage| async move { storage.put_if(&path, data, expected.as_ref()).await })
    }

    pub fn writes_conditionally(&self) -> Answer<bool> {
        self.call(|storage| async move { storage.writes_conditionally().await })
    }

    fn call<T, F>(&self, call: impl FnOnce(Storage) -> F) -> Answer<T>
    where
        T: Send + 'static,
        F: Future<Output = Answer<T>> + Send + 'static,
    {
        let answer = runtime::wait_for(call(self.storage.clone())).unwrap_or_else(|e| {
            Err(LakeError::Unreachable {
                action: "use",
                path: String::new(),
                reason: e.message,
            })
        });
        super::reach::note(self.storage_id, answer.as_ref().err());
        answer
    }
}
