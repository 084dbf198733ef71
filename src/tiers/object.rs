//! The road of a data file: made in memory, announced, written into its storage outside of any transaction, entered in
//! the manifest by the transaction that takes out what it replaces.

use rakam_lake::period::{self, Period};
use rakam_lake::stats;
use rakam_lake::storage::{DirectoryStorage, StorageUrl};
use rakam_lake::write::{FileOptions, WrittenFile};
use uuid::Uuid;

use crate::catalog::manifest::{self, NewFile, StorageRow};
use crate::catalog::registry::{Collection, ProjectRow};
use crate::pg::xact::Failure;
use crate::pg::{PgError, Result, wait};

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
    pub file: WrittenFile<Vec<u8>>,
}

impl Home {
    /// What a file of this period says about itself.
    pub fn options(&self, period: Period, first_day: i32) -> FileOptions {
        FileOptions {
            project: self.project.name.clone(),
            collection: self.collection.name.clone(),
            flush_id: self.op_id,
            period,
            first_day,
        }
    }

    /// Names a finished file.
    pub fn output(&self, period: Period, first_day: i32, file: WrittenFile<Vec<u8>>) -> Output {
        let id = Uuid::now_v7();
        let (project, collection) = (&self.project.name, &self.collection.name);
        Output {
            path: period::object_path(project, collection, period, first_day, id),
            period,
            first_day,
            file,
        }
    }

    /// Leaves an intent, in a transaction before the object is written. None is needed inside of Postgres.
    pub fn announce(&self, output: &Output, purpose: &str) -> Result<()> {
        if self.storage.kind == "local" {
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
        let Some(directory) = directory(&self.storage).map_err(Failure::Error)? else {
            return Ok(());
        };
        for output in outputs {
            wait::check_interrupts();
            directory
                .put(&output.path, &output.file.sink)
                .map_err(|e| Failure::Error(e.into()))?;
        }
        Ok(())
    }

    /// Enters a file in the manifest, under the manifest lock: its object is there, or is put into the default storage.
    pub fn enter(&self, output: &Output, schema_version: i32) -> Result<()> {
        let file = &output.file;
        if self.storage.kind == "local" {
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

/// The directory behind a storage; None for the default storage, which is a table.
pub fn directory(storage: &StorageRow) -> Result<Option<DirectoryStorage>> {
    if storage.kind == "local" {
        return Ok(None);
    }
    let url = storage.url.as_deref().ok_or_else(|| {
        PgError::new("58030", format!("storage \"{}\" has no url", storage.name))
            .hint("Its foreign server must exist and have the option url.")
    })?;
    let url = StorageUrl::parse(url)?;
    Ok(Some(DirectoryStorage::new(&url)))
}
