//! Files: each object under a prefix of a storage once.
//!
//! An object is a split that ends. It is read as `copy_from` reads it, by [`rakam_files::source`], piece by piece from where a
//! stored position says: from the directory itself, or from a copy of the object in a scratch folder. Objects are taken for
//! immutable: one that changes while it is read stops.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use futures::TryStreamExt;
use rakam_event::types::FieldType;
use rakam_files::format::Format;
use rakam_files::locate::Found;
use rakam_files::source::{self, Meter, Piece, Spec};
use rakam_files::{FilesError, source::Source};
use rakam_lake::storage::{ObjectInfo, Storage};
use tempfile::NamedTempFile;
use tokio::task::spawn_blocking;

use crate::batch::{Batch, FilePiece, Limits, Stop};
use crate::cursor::Cursors;
use crate::error::{SourceError, StopReason};
use crate::position::Position;
use crate::source::{Fetch, Lag, Split, Splits, Start};

/// Bytes of an object that are copied at a time.
const COPY_BYTES: u64 = 8 << 20;

/// Objects under a prefix.
#[derive(Debug, Clone)]
pub struct Objects {
    pub storage: Storage,
    /// Of the storage, if it is a directory: its files are read where they are.
    pub directory: Option<PathBuf>,
    /// A path of whole components; empty: all of the storage.
    pub prefix: String,
    pub spec: Spec,
}

impl Objects {
    async fn found(&self) -> Result<Vec<ObjectInfo>, SourceError> {
        let mut found: Vec<ObjectInfo> = self
            .storage
            .list(&self.prefix)
            .try_filter(|object| std::future::ready(self.is_data(&object.path)))
            .try_collect()
            .await?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// As when a prefix is attached: names below it that begin with a dot or an underscore are no data, but `key=value`; nor
    /// are files whose suffix is that of another format, or without a format of none.
    fn is_data(&self, path: &str) -> bool {
        let below = path.strip_prefix(&self.prefix).unwrap_or(path);
        let hidden = |name: &str| name.starts_with(['.', '_']) && !name.contains('=');
        if below.split('/').any(hidden) {
            return false;
        }
        match (self.spec.format, Format::of_name(path)) {
            (Some(format), Ok(other)) => format == other,
            (Some(_), Err(_)) => true,
            (None, other) => other.is_ok(),
        }
    }
}

impl Objects {
    /// Opens an object at a position.
    async fn begin(&self, split: &str, from: &Position, scratch: &Path) -> Result<Reading, Fault> {
        let info = match self.storage.head(split).await.map_err(SourceError::from) {
            Ok(info) => info,
            Err(SourceError::Missing { .. }) => return Err(Fault::Stop(StopReason::Gone)),
            Err(error) => return Err(Fault::Trouble(error)),
        };
        let modified_ms = info
            .modified
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64);
        let from = match *from {
            Position::Row {
                row,
                byte,
                line,
                size,
                modified_ms: then,
            } => {
                if (size, then) != (info.bytes, modified_ms) {
                    return Err(Fault::Stop(StopReason::Changed));
                }
                source::Position { row, byte, line }
            }
            _ => source::Position::default(),
        };
        let (path, copy) = match &self.directory {
            Some(root) => (root.join(split), None),
            None => {
                let copy = self.copy(split, &info, scratch).await?;
                (copy.path().to_owned(), Some(copy))
            }
        };
        let (name, spec) = (split.to_owned(), self.spec.clone());
        let source = spawn_blocking(move || {
            source::open(&Found::file(path, &name), &spec, from, &Meter::default())
        })
        .await
        .map_err(|error| Fault::Stop(StopReason::Unreadable(error.to_string())))??;
        Ok(Reading {
            split: split.to_owned(),
            declared: source.declared().into(),
            source,
            size: info.bytes,
            modified_ms,
            _copy: copy,
        })
    }

    async fn copy(
        &self,
        split: &str,
        info: &ObjectInfo,
        scratch: &Path,
    ) -> Result<NamedTempFile, Fault> {
        let failed = |error: std::io::Error| {
            Fault::Trouble(SourceError::Unreachable {
                action: "copy an object to the scratch folder",
                reason: error.to_string(),
            })
        };
        let copy = NamedTempFile::new_in(scratch).map_err(failed)?;
        let mut at = 0;
        while at < info.bytes {
            let to = (at + COPY_BYTES).min(info.bytes);
            let bytes = self.storage.get_range(split, at..to).await;
            let bytes = bytes.map_err(|error| Fault::Trouble(error.into()))?;
            if bytes.len() as u64 != to - at {
                return Err(Fault::Stop(StopReason::Changed));
            }
            let mut file = copy.as_file().try_clone().map_err(failed)?;
            spawn_blocking(move || std::io::Write::write_all(&mut file, &bytes))
                .await
                .map_err(|error| failed(std::io::Error::other(error)))?
                .map_err(failed)?;
            at = to;
        }
        Ok(copy)
    }
}

#[async_trait]
impl Splits for Objects {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        let found = self.found().await?;
        let split = |object: ObjectInfo| Split {
            id: object.path,
            parents: Vec::new(),
            closed: true,
        };
        Ok(found.into_iter().map(split).collect())
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        match start {
            Start::Earliest => Ok(vec![Position::Beginning; splits.len()]),
            _ => Err(SourceError::option(
                "files are read from their beginning",
                "Leave the option \"start\" out, or choose a narrower prefix.",
            )),
        }
    }
}

/// Reads objects, one after another.
pub struct FileFetch {
    objects: Objects,
    scratch: PathBuf,
    cursors: Cursors<()>,
    reading: Option<Reading>,
    /// A poll began whose batch nobody has got.
    undelivered: bool,
}

/// The object being read.
struct Reading {
    split: String,
    source: Box<dyn Source>,
    declared: Arc<[(String, FieldType)]>,
    size: u64,
    modified_ms: u64,
    /// Removed when the reading ends.
    _copy: Option<NamedTempFile>,
}

/// Why an object gives no piece.
enum Fault {
    Stop(StopReason),
    Trouble(SourceError),
}

impl From<FilesError> for Fault {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::Io { .. } => Self::Trouble(SourceError::Unreachable {
                action: "read an object",
                reason: error.to_string(),
            }),
            error => Self::Stop(error.into()),
        }
    }
}

impl FileFetch {
    /// Copies of objects of a bucket lie in `scratch` while they are read.
    pub fn new(objects: Objects, scratch: PathBuf) -> Self {
        Self {
            objects,
            scratch,
            cursors: Cursors::default(),
            reading: None,
            undelivered: false,
        }
    }

    /// The next piece of an object; None at its end. What a dropped call had read is read again.
    async fn piece(
        &mut self,
        split: &str,
        from: &Position,
    ) -> Result<Option<(Piece, Position)>, Fault> {
        let reading = match self.reading.take().filter(|r| r.split == split) {
            Some(reading) => reading,
            None => self.objects.begin(split, from, &self.scratch).await?,
        };
        let (reading, piece) = spawn_blocking(move || {
            let mut reading = reading;
            let piece = reading.source.next();
            (reading, piece)
        })
        .await
        .map_err(|error| Fault::Stop(StopReason::Unreadable(error.to_string())))?;
        let Some(piece) = piece? else {
            return Ok(None);
        };
        let to = Position::Row {
            row: piece.after.row,
            byte: piece.after.byte,
            line: piece.after.line,
            size: reading.size,
            modified_ms: reading.modified_ms,
        };
        self.reading = Some(reading);
        Ok(Some((piece, to)))
    }
}

#[async_trait]
impl Fetch for FileFetch {
    async fn open(&mut self, split: &str, from: Position) -> Result<(), SourceError> {
        if !matches!(from, Position::Beginning | Position::Row { .. }) {
            return Err(SourceError::Misuse(format!(
                "an object has no position {from:?}"
            )));
        }
        self.close(split).await?;
        self.cursors.open(split, from, ());
        Ok(())
    }

    async fn close(&mut self, split: &str) -> Result<(), SourceError> {
        self.cursors.close(split);
        self.reading.take_if(|reading| reading.split == split);
        Ok(())
    }

    async fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError> {
        if self.undelivered {
            self.rewind().await?;
        }
        self.undelivered = true;
        let mut batch = Batch::default();
        let next = self.cursors.iter().find(|c| !c.done && !c.paused);
        let Some((split, from)) = next.map(|c| (c.split.clone(), c.read.clone())) else {
            tokio::time::sleep(limits.wait).await;
            self.undelivered = false;
            return Ok(batch);
        };
        let piece = self.piece(&split, &from).await;
        if let Some(cursor) = self.cursors.get(&split) {
            match piece {
                Ok(Some((piece, to))) => {
                    let moved = batch.moved(&split, &from);
                    batch.moves[moved].records = piece.rows.len() as u64;
                    batch.moves[moved].to = to.clone();
                    cursor.read = to;
                    let reading = self.reading.as_ref();
                    batch.pieces.push(FilePiece {
                        split: moved,
                        piece,
                        declared: reading.map_or_else(Arc::default, |r| Arc::clone(&r.declared)),
                    });
                }
                Ok(None) => {
                    let moved = batch.moved(&split, &from);
                    batch.moves[moved].ended = true;
                    cursor.done = true;
                }
                Err(Fault::Stop(reason)) => {
                    cursor.done = true;
                    batch.stops.push(Stop { split, reason });
                }
                Err(Fault::Trouble(error)) => batch.trouble = Some(error),
            }
        }
        self.undelivered = false;
        Ok(batch)
    }

    fn ack(&mut self, batch: &Batch) {
        self.cursors.ack(batch);
    }

    async fn rewind(&mut self) -> Result<(), SourceError> {
        self.cursors.rewind();
        self.reading = None;
        self.undelivered = false;
        Ok(())
    }

    async fn pause(&mut self, split: &str, paused: bool) -> Result<(), SourceError> {
        if let Some(cursor) = self.cursors.get(split) {
            cursor.paused = paused;
        }
        Ok(())
    }

    async fn lag(&mut self, _split: &str) -> Result<Option<Lag>, SourceError> {
        // How many rows a file has, only reading tells.
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rakam_files::format::Options;
    use rakam_lake::storage::{StorageConfig, StorageUrl};
    use tempfile::TempDir;

    use super::*;
    use crate::conformance::{World, conforms};

    /// A folder, read in place or by copies.
    struct Folder {
        root: TempDir,
        copies: bool,
    }

    impl Folder {
        fn new(copies: bool) -> Self {
            let root = TempDir::new().unwrap_or_else(|e| panic!("{e}"));
            Self { root, copies }
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.root.path().join(path);
            let folder = path.parent().unwrap_or(&path);
            fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{e}"));
            fs::write(path, text).unwrap_or_else(|e| panic!("{e}"));
        }

        fn objects(&self, format: Option<Format>) -> Objects {
            let root = self.root.path().to_owned();
            let config = StorageConfig::directory(StorageUrl::File(root.clone()));
            Objects {
                storage: Storage::open(&config).unwrap_or_else(|e| panic!("{e}")),
                directory: (!self.copies).then_some(root),
                prefix: "in".to_owned(),
                spec: Spec {
                    format,
                    options: Options::default(),
                    max_record_bytes: 1 << 20,
                },
            }
        }

        fn fetch(&self) -> FileFetch {
            FileFetch::new(self.objects(None), std::env::temp_dir())
        }
    }

    #[async_trait]
    impl World for Folder {
        async fn make(&mut self, name: &str, records: &[String]) -> String {
            let path = format!("in/{name}.ndjson");
            self.write(&path, &records.join("\n"));
            path
        }

        async fn splits(&mut self) -> Box<dyn Splits> {
            Box::new(self.objects(None))
        }

        async fn fetch(&mut self) -> Box<dyn Fetch> {
            Box::new(Folder::fetch(self))
        }
    }

    #[tokio::test]
    async fn files_conform() {
        conforms(&mut Folder::new(false)).await;
        conforms(&mut Folder::new(true)).await;
    }

    #[tokio::test]
    async fn what_is_no_data_is_no_split() {
        let folder = Folder::new(false);
        for path in [
            "in/a.csv",
            "in/day=1/b.ndjson",
            "in/_day=1/c.csv",
            "in/_SUCCESS",
            "in/.a.csv.crc",
            "in/_tmp/d.csv",
            "in/e.txt",
            "other/f.csv",
        ] {
            folder.write(path, "a\n1\n");
        }
        let ids = |format| {
            let mut objects = folder.objects(format);
            async move {
                let splits = objects.list().await.unwrap_or_else(|e| panic!("{e}"));
                assert!(splits.iter().all(|split| split.closed));
                splits
                    .into_iter()
                    .map(|split| split.id)
                    .collect::<Vec<_>>()
                    .join(" ")
            }
        };
        assert_eq!(
            ids(None).await,
            "in/_day=1/c.csv in/a.csv in/day=1/b.ndjson"
        );
        assert_eq!(
            ids(Some(Format::Csv)).await,
            "in/_day=1/c.csv in/a.csv in/e.txt"
        );
        let latest = folder.objects(None).locate(&[], &Start::Latest).await;
        assert!(latest.is_err());
    }

    async fn polled(fetch: &mut FileFetch) -> Batch {
        let batch = fetch.poll(&Limits::default()).await;
        let batch = batch.unwrap_or_else(|e| panic!("{e}"));
        fetch.ack(&batch);
        batch
    }

    #[tokio::test]
    async fn an_object_ends_changes_or_goes() {
        let folder = Folder::new(false);
        folder.write("in/a.csv", "x\n1\n2\n");
        folder.write("in/bad.avro", "Obj");
        let mut fetch = folder.fetch();
        for path in ["in/a.csv", "in/bad.avro", "in/gone.csv"] {
            let opened = fetch.open(path, Position::Beginning).await;
            opened.unwrap_or_else(|e| panic!("{e}"));
        }
        let batch = polled(&mut fetch).await;
        let read = &batch.moves[0];
        assert_eq!((read.records, read.ended), (2, false));
        assert_eq!(read.to.next_offset().as_deref(), Some("2"));
        let end = polled(&mut fetch).await;
        assert_eq!((end.moves[0].ended, &end.moves[0].to), (true, &read.to));
        let stop = polled(&mut fetch).await.stops.remove(0);
        assert!(matches!(stop.reason, StopReason::Unreadable(_)), "{stop:?}");
        let stop = polled(&mut fetch).await.stops.remove(0);
        assert_eq!(stop.reason, StopReason::Gone);
        // Another file under the same name is not the one that was begun.
        folder.write("in/a.csv", "x\n1\n2\n3\n");
        let mut fetch = folder.fetch();
        let opened = fetch.open("in/a.csv", read.to.clone()).await;
        opened.unwrap_or_else(|e| panic!("{e}"));
        let stop = polled(&mut fetch).await.stops.remove(0);
        assert_eq!(stop.reason, StopReason::Changed);
        assert!(fetch.open("in/a.csv", Position::offset(1)).await.is_err());
    }
}
