//! Storages outside Postgres: today a directory, `file:///dir`.
//!
//! Writing is blocking and durable (file and directories are fsynced before [`DurableFile::commit`] returns), because
//! the manifest names an object only once it cannot be lost; workers do it outside transactions. Reading goes through
//! `object_store` like any other store.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use uuid::Uuid;

use crate::error::LakeError;

/// The address of a storage, as given in `OPTIONS (url …)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorageUrl {
    /// An absolute, normalised directory.
    File(PathBuf),
}

impl StorageUrl {
    pub fn parse(url: &str) -> Result<Self, LakeError> {
        let invalid = |reason: &str| LakeError::InvalidUrl {
            reason: reason.to_owned(),
        };
        let (scheme, rest) = url
            .split_once("://")
            .ok_or_else(|| invalid("it has no scheme"))?;
        match scheme.to_ascii_lowercase().as_str() {
            "file" => {
                if !rest.starts_with('/') {
                    return Err(invalid("the path of a file url must be absolute"));
                }
                if rest.contains('\0') {
                    return Err(invalid("it contains a NUL character"));
                }
                let path = Path::new(rest);
                if path.components().any(|c| c == Component::ParentDir) {
                    return Err(invalid("the path of a file url must not contain \"..\""));
                }
                let path: PathBuf = path.components().collect();
                if path == Path::new("/") {
                    return Err(invalid("the root directory cannot be a storage"));
                }
                Ok(Self::File(path))
            }
            scheme @ ("s3" | "s3a" | "gs" | "gcs" | "az" | "azure" | "abfs" | "abfss") => {
                Err(LakeError::Unsupported {
                    message: format!(
                        "storage scheme \"{scheme}\" is not supported yet in this version"
                    ),
                    hint: "Use a directory, file:///dir, or the default storage, rakam_local."
                        .to_owned(),
                })
            }
            "hdfs" | "webhdfs" => Err(LakeError::Unsupported {
                message: "storage scheme \"hdfs\" is not supported".to_owned(),
                hint: "Mount the file system and use file:///dir.".to_owned(),
            }),
            // The url may carry a secret where the scheme should be: it is not repeated.
            _ => Err(LakeError::Unsupported {
                message: "storage scheme is not supported".to_owned(),
                hint: "Use a directory, file:///dir.".to_owned(),
            }),
        }
    }
}

impl std::fmt::Display for StorageUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
        }
    }
}

/// An object found by [`DirectoryStorage::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    pub path: String,
    pub bytes: u64,
    pub modified: SystemTime,
}

/// A directory as a storage. Paths of objects are relative, with `/`, and never lead out of it.
#[derive(Debug, Clone)]
pub struct DirectoryStorage {
    root: PathBuf,
}

impl DirectoryStorage {
    /// Whether the directory is there and can be listed: 58030 if not.
    pub fn list_root(&self) -> Result<(), LakeError> {
        std::fs::read_dir(&self.root)
            .map(drop)
            .map_err(|e| LakeError::Unreachable {
                action: "list",
                path: String::new(),
                reason: e.to_string(),
            })
    }

    /// Touches nothing: the directory may be away for now.
    pub fn new(url: &StorageUrl) -> Self {
        let StorageUrl::File(root) = url;
        Self { root: root.clone() }
    }

    /// Creates the directory if it is missing and proves that it can be written. Only for the storage's creation: later
    /// a missing directory is a storage that is not mounted, and must not be made anew below the mount point.
    pub fn prepare(&self) -> Result<(), LakeError> {
        let failed = |e: io::Error| self.unreachable("create", &e);
        fs::create_dir_all(&self.root).map_err(failed)?;
        for directory in self.root.ancestors() {
            // A parent that this user may not open existed before.
            if let Ok(directory) = File::open(directory) {
                directory.sync_all().map_err(failed)?;
            }
        }
        let probe = self.root.join(format!(".probe-{}", Uuid::now_v7()));
        File::create_new(&probe)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::remove_file(&probe))
            .map_err(|e| self.unreachable("write", &e))
    }

    /// Begins an object. It appears under its name, whole, with [`DurableFile::commit`].
    pub fn create(&self, path: &str) -> Result<DurableFile, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        let failed = |e: io::Error| LakeError::io("create", path, &e);
        let parent = target.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).map_err(failed)?;
        if target.try_exists().map_err(failed)? {
            return Err(LakeError::Exists {
                path: path.to_owned(),
            });
        }
        let mut name = target
            .file_name()
            .unwrap_or(OsStr::new("object"))
            .to_owned();
        name.push(format!(".{}.tmp", Uuid::now_v7()));
        let temp = parent.join(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temp)
            .map_err(failed)?;
        Ok(DurableFile {
            root: self.root.clone(),
            path: path.to_owned(),
            target,
            temp,
            file,
        })
    }

    /// Writes an object durably. Refuses to overwrite one.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<(), LakeError> {
        let mut file = self.create(path)?;
        file.write_all(bytes)
            .map_err(|e| LakeError::io("write", path, &e))?;
        file.commit()
    }

    /// Deletes an object; false if there was none. Directories that are empty then stay: a writer may be in them.
    pub fn delete(&self, path: &str) -> Result<bool, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        match fs::remove_file(&target) {
            Ok(()) => {
                let failed = |e: io::Error| LakeError::io("delete", path, &e);
                sync_directory(target.parent().unwrap_or(&self.root)).map_err(failed)?;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(LakeError::io("delete", path, &e)),
        }
    }

    pub fn exists(&self, path: &str) -> Result<bool, LakeError> {
        match self.size(path) {
            Ok(_) => Ok(true),
            Err(LakeError::Missing { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The whole of an object.
    pub fn read(&self, path: &str) -> Result<Bytes, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        fs::read(target)
            .map(Bytes::from)
            .map_err(|e| LakeError::io("read", path, &e))
    }

    /// The size of an object.
    pub fn size(&self, path: &str) -> Result<u64, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        let metadata = fs::metadata(target).map_err(|e| LakeError::io("read", path, &e))?;
        if metadata.is_file() {
            Ok(metadata.len())
        } else {
            Err(LakeError::Missing {
                path: path.to_owned(),
            })
        }
    }

    /// Every file below the root, remains of interrupted writes included, in the order of their paths.
    pub fn list(&self) -> Result<Vec<ObjectInfo>, LakeError> {
        self.check_root()?;
        let mut objects = Vec::new();
        let mut pending = vec![self.root.clone()];
        while let Some(directory) = pending.pop() {
            self.list_directory(&directory, &mut pending, &mut objects)
                .map_err(|e| self.unreachable("list", &e))?;
        }
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(objects)
    }

    fn list_directory(
        &self,
        directory: &Path,
        pending: &mut Vec<PathBuf>,
        objects: &mut Vec<ObjectInfo>,
    ) -> io::Result<()> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            // What is deleted while we look is not there.
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            let path = entry.path();
            if metadata.is_dir() {
                pending.push(path);
            } else if let Some(path) = path.strip_prefix(&self.root).ok().and_then(Path::to_str) {
                // Names that are not UTF-8 are none of ours.
                objects.push(ObjectInfo {
                    path: path.to_owned(),
                    bytes: metadata.len(),
                    modified: metadata.modified()?,
                });
            }
        }
        Ok(())
    }

    /// The storage for reading, rooted at the directory: paths are those of the manifest.
    pub fn reader(&self) -> Result<Arc<dyn ObjectStore>, LakeError> {
        self.check_root()?;
        LocalFileSystem::new_with_prefix(&self.root)
            .map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
            .map_err(|e| LakeError::Unreachable {
                action: "open",
                path: self.root.display().to_string(),
                reason: e.to_string(),
            })
    }

    /// The file of an object. Only plain components: nothing leads upwards or to another root.
    fn resolve(&self, path: &str) -> Result<PathBuf, LakeError> {
        let plain = |part: &str| !matches!(part, "" | "." | "..");
        if path.contains(['\0', '\\']) || !path.split('/').all(plain) {
            return Err(LakeError::InvalidPath {
                path: path.to_owned(),
            });
        }
        Ok(self.root.join(path))
    }

    /// Without its root the storage is away; its objects are not missing.
    fn check_root(&self) -> Result<(), LakeError> {
        match fs::metadata(&self.root) {
            Ok(metadata) if metadata.is_dir() => Ok(()),
            Ok(_) => Err(self.unreachable("open", &io::ErrorKind::NotADirectory.into())),
            Err(e) => Err(self.unreachable("open", &e)),
        }
    }

    fn unreachable(&self, action: &'static str, error: &io::Error) -> LakeError {
        LakeError::Unreachable {
            action,
            path: self.root.display().to_string(),
            reason: error.to_string(),
        }
    }
}

/// An object being written, under a temporary name in its directory. Dropped without [`DurableFile::commit`], it is
/// removed; after a crash its remains are listed and collected as an orphan.
#[derive(Debug)]
pub struct DurableFile {
    root: PathBuf,
    path: String,
    target: PathBuf,
    temp: PathBuf,
    file: File,
}

impl DurableFile {
    /// Makes the object durable and visible.
    pub fn commit(self) -> Result<(), LakeError> {
        let failed = |e: io::Error| LakeError::io("write", &self.path, &e);
        self.file.sync_all().map_err(failed)?;
        publish(&self.temp, &self.target).map_err(failed)?;
        // Another writer may have made a directory and not synced it yet: all of them up to the root, every time.
        for directory in self.target.ancestors().skip(1) {
            sync_directory(directory).map_err(failed)?;
            if directory == self.root {
                break;
            }
        }
        Ok(())
    }
}

/// Gives the file its name unless that is taken. A hard link is the atomic form; not every file system has it.
fn publish(temp: &Path, target: &Path) -> io::Result<()> {
    match fs::hard_link(temp, target) {
        Ok(()) => fs::remove_file(temp),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(e),
        Err(_) if target.try_exists()? => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(temp, target),
    }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

impl Write for DurableFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        // After a commit there is nothing under this name.
        let _ = fs::remove_file(&self.temp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;

    fn storage() -> (tempfile::TempDir, DirectoryStorage) {
        let dir = tempfile::tempdir().unwrap();
        let url = StorageUrl::parse(&format!("file://{}/lake", dir.path().display())).unwrap();
        let storage = DirectoryStorage::new(&url);
        (dir, storage)
    }

    #[test]
    fn urls() {
        let ok = |url: &str| StorageUrl::parse(url).map(|u| u.to_string()).unwrap();
        assert_eq!(ok("file:///var/lake"), "file:///var/lake");
        assert_eq!(ok("FILE:///var//lake/./a/"), "file:///var/lake/a");
        for (url, state) in [
            ("", "22023"),
            ("/var/lake", "22023"),
            ("file://var/lake", "22023"),
            ("file://", "22023"),
            ("file:///", "22023"),
            ("file:///a/../b", "22023"),
            ("file:///a\0", "22023"),
            ("hdfs://namenode/lake", "0A000"),
            ("s3://bucket/lake", "0A000"),
            ("gs://bucket", "0A000"),
            ("az://bucket", "0A000"),
            ("ftp://host", "0A000"),
        ] {
            let error = StorageUrl::parse(url).unwrap_err();
            assert_eq!(error.sqlstate(), state, "{url}");
            assert!(error.hint().is_some());
        }
        let secret = StorageUrl::parse("hunter2://x").unwrap_err().to_string();
        assert!(!secret.contains("hunter2"));
    }

    #[test]
    fn objects_live_and_die() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        storage.prepare().unwrap();
        assert_eq!(storage.list().unwrap(), []);
        let path = "a/b!20c/2024/x.parquet";
        storage.put(path, b"hello").unwrap();
        assert_eq!(storage.put(path, b"other").unwrap_err().sqlstate(), "58P02");
        assert_eq!(storage.size(path).unwrap(), 5);
        assert!(storage.exists(path).unwrap());
        assert!(!storage.exists("a/b!20c").unwrap());
        assert!(!storage.exists("a/none").unwrap());
        let listed = storage.list().unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].path.as_str(), listed[0].bytes), (path, 5));
        assert!(storage.delete(path).unwrap());
        assert!(!storage.delete(path).unwrap());
        assert_eq!(storage.size(path).unwrap_err().sqlstate(), "58P01");
        assert_eq!(storage.list().unwrap(), []);
    }

    #[test]
    fn an_unfinished_object_is_never_seen() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        let mut file = storage.create("a/x").unwrap();
        file.write_all(b"half").unwrap();
        assert!(!storage.exists("a/x").unwrap());
        // Its remains can be found, and deleted by what is listed.
        let remains = storage.list().unwrap();
        assert!(remains.len() == 1 && remains[0].path.ends_with(".tmp"));
        assert!(storage.delete(&remains[0].path).unwrap());
        drop(file);

        drop(storage.create("a/x").unwrap());
        assert_eq!(storage.list().unwrap(), []);

        // Two writers of one name: the second fails and leaves the first's bytes.
        let (mut one, mut two) = (
            storage.create("a/x").unwrap(),
            storage.create("a/x").unwrap(),
        );
        one.write_all(b"one").unwrap();
        two.write_all(b"two").unwrap();
        one.commit().unwrap();
        assert_eq!(two.commit().unwrap_err().sqlstate(), "58P02");
        assert_eq!(fs::read(storage.root.join("a/x")).unwrap(), b"one");
        assert_eq!(storage.list().unwrap().len(), 1);
    }

    #[test]
    fn no_path_leads_out() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        for path in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "a/",
            ".",
            "a/./b",
            "a\0b",
            "a\\b",
        ] {
            assert_eq!(
                storage.put(path, b"x").unwrap_err().sqlstate(),
                "22023",
                "{path}"
            );
            assert!(storage.delete(path).is_err() && storage.exists(path).is_err());
        }
    }

    #[test]
    fn a_storage_that_is_away_is_unreachable_and_not_made_anew() {
        let (_dir, storage) = storage();
        for error in [
            storage.put("a", b"x").unwrap_err(),
            storage.delete("a").unwrap_err(),
            storage.exists("a").unwrap_err(),
            storage.list().unwrap_err(),
            storage.reader().unwrap_err(),
        ] {
            assert_eq!(error.sqlstate(), "58030");
            assert!(error.is_retryable());
        }
        assert!(!storage.root.exists());
        fs::write(&storage.root, b"a file").unwrap();
        assert_eq!(storage.prepare().unwrap_err().sqlstate(), "58030");
        assert_eq!(storage.list().unwrap_err().sqlstate(), "58030");
    }

    #[tokio::test]
    async fn what_is_put_is_read_through_object_store() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        let path =
            crate::period::object_path("a", "ü %/..", crate::period::Period::Day, 0, Uuid::nil());
        storage.put(&path, b"0123456789").unwrap();
        let reader = storage.reader().unwrap();
        let location = object_store::path::Path::parse(&path).unwrap();
        assert_eq!(reader.get_range(&location, 3..6).await.unwrap(), "345");
        let missing = reader.get(&"a/none".into()).await.unwrap_err();
        assert_eq!(LakeError::from_store("a/none", missing).sqlstate(), "58P01");
    }

    #[test]
    fn a_data_file_streams_into_it() {
        use crate::write::{FileOptions, FileWriter};
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        let schema = crate::testing::all_types();
        let rows = crate::testing::batch(&schema, 100, &mut crate::testing::Rng::new(41));
        let options = FileOptions {
            project: "p".into(),
            collection: "c".into(),
            flush_id: Uuid::nil(),
            period: crate::period::Period::Year,
            first_day: 0,
        };
        let mut writer = FileWriter::new(&schema, &options, storage.create("p/f").unwrap());
        writer.write(&crate::sort::by_time(&rows).unwrap()).unwrap();
        let file = writer.finish().unwrap();
        file.sink.commit().unwrap();
        assert_eq!(storage.size("p/f").unwrap(), file.bytes);
    }
}
