//! A directory as a storage.
//!
//! Writing is durable (file and directories are fsynced before it returns), because the manifest names an object only
//! once it cannot be lost. Everything here blocks: [`super::Storage`] does it on threads that may.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, UpdateVersion};
use siphasher::sip128::{Hasher128, SipHasher13};
use uuid::Uuid;

use super::{ObjectInfo, PutIf, Version, check_path};
use crate::error::LakeError;

/// What a step of a list found, and the directories still to be looked at.
pub(super) type ListStep = (Vec<ObjectInfo>, Vec<PathBuf>);

/// A directory as a storage. Paths of objects are relative, with `/`, and never lead out of it.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    root: PathBuf,
}

impl Directory {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn check(&self) -> Result<(), LakeError> {
        fs::read_dir(&self.root)
            .map(drop)
            .map_err(|e| self.unreachable("list", &e))
    }

    pub(super) fn prepare(&self) -> Result<(), LakeError> {
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
    fn create(&self, path: &str) -> Result<DurableFile, LakeError> {
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
        let temp = with_suffix(&target, &format!(".{}.tmp", Uuid::now_v7()));
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

    /// Writes an object durably. Refuses to overwrite one of another content.
    pub(super) fn put(&self, path: &str, data: &[u8]) -> Result<(), LakeError> {
        let written = self.create(path).and_then(|mut file| {
            file.write_all(data)
                .map_err(|e| LakeError::io("write", path, &e))?;
            file.commit()
        });
        match written {
            Err(LakeError::Exists { .. }) if self.read(path)? == data => {
                // An earlier attempt may not have come to that.
                let target = self.resolve(path)?;
                File::open(&target)
                    .and_then(|file| file.sync_all())
                    .and_then(|()| sync_above(&target, &self.root))
                    .map_err(|e| LakeError::io("write", path, &e))
            }
            written => written,
        }
    }

    /// Deletes an object. Directories that are empty then stay: a writer may be in them.
    pub(super) fn delete(&self, path: &str) -> Result<(), LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        match fs::remove_file(&target) {
            Ok(()) => {
                let failed = |e: io::Error| LakeError::io("delete", path, &e);
                sync_directory(target.parent().unwrap_or(&self.root)).map_err(failed)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(LakeError::io("delete", path, &e)),
        }
    }

    /// Deletes an object and what interrupted writes left of it.
    pub(super) fn discard(&self, path: &str) -> Result<(), LakeError> {
        let target = self.resolve(path)?;
        let failed = |e: io::Error| LakeError::io("delete", path, &e);
        let name = target
            .file_name()
            .and_then(OsStr::to_str)
            .unwrap_or_default();
        let parent = target.parent().unwrap_or(&self.root);
        let entries = match fs::read_dir(parent) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return self.delete(path),
            Err(e) => return Err(failed(e)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let left = (entry.file_name().to_str())
                .and_then(|other| {
                    other
                        .strip_prefix(name)?
                        .strip_prefix('.')?
                        .strip_suffix(".tmp")
                })
                .is_some_and(|id| Uuid::try_parse(id).is_ok());
            if left {
                fs::remove_file(entry.path())
                    .or_else(|e| match e.kind() {
                        io::ErrorKind::NotFound => Ok(()),
                        _ => Err(e),
                    })
                    .and_then(|()| sync_directory(parent))
                    .map_err(failed)?;
            }
        }
        self.delete(path)
    }

    pub(super) fn read(&self, path: &str) -> Result<Bytes, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        fs::read(target)
            .map(Bytes::from)
            .map_err(|e| LakeError::io("read", path, &e))
    }

    pub(super) fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        let failed = |e: io::Error| LakeError::io("read", path, &e);
        let wanted = range.end.saturating_sub(range.start);
        let file = File::open(target).map_err(failed)?;
        if range.end > file.metadata().map_err(failed)?.len() {
            return Err(LakeError::corrupt("object", "it ends before the range"));
        }
        let mut out = vec![0; wanted as usize];
        file.read_exact_at(&mut out, range.start).map_err(failed)?;
        Ok(out.into())
    }

    pub(super) fn info(&self, path: &str) -> Result<ObjectInfo, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        let failed = |e: io::Error| LakeError::io("read", path, &e);
        let metadata = fs::metadata(target).map_err(failed)?;
        if !metadata.is_file() {
            return Err(LakeError::Missing {
                path: path.to_owned(),
            });
        }
        Ok(ObjectInfo {
            path: path.to_owned(),
            bytes: metadata.len(),
            modified: metadata.modified().map_err(failed)?,
            version: None,
        })
    }

    pub(super) fn read_versioned(&self, path: &str) -> Result<(Bytes, Version), LakeError> {
        let bytes = self.read(path)?;
        let version = version(&bytes);
        Ok((bytes, version))
    }

    /// Compares and replaces under a lock on a file beside the object, which stays.
    pub(super) fn put_if(
        &self,
        path: &str,
        data: &[u8],
        expected: Option<&Version>,
    ) -> Result<PutIf, LakeError> {
        let target = self.resolve(path)?;
        self.check_root()?;
        let failed = |e: io::Error| LakeError::io("write", path, &e);
        let parent = target.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(with_suffix(&target, ".lock"))
            .map_err(failed)?;
        lock.lock().map_err(failed)?;
        let present = match self.read_versioned(path) {
            Ok((found, version)) => {
                if found == data {
                    return Ok(PutIf::Written);
                }
                Some(version)
            }
            Err(LakeError::Missing { .. }) => None,
            Err(e) => return Err(e),
        };
        if present.as_ref() != expected {
            return Ok(PutIf::Conflict);
        }
        let temp = with_suffix(&target, &format!(".{}.tmp", Uuid::now_v7()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temp)
            .map_err(failed)?;
        let mut file = DurableFile {
            root: self.root.clone(),
            path: path.to_owned(),
            target,
            temp,
            file,
        };
        file.file.write_all(data).map_err(failed)?;
        file.replace()?;
        Ok(PutIf::Written)
    }

    /// One step of a list of every file below a directory (empty: the root), remains of interrupted writes included: the
    /// files of the next directory in the order of their paths, and the directories still to be looked at. `pending` is
    /// what the step before gave; None at the end.
    pub(super) fn list_step(
        &self,
        prefix: &str,
        pending: Option<Vec<PathBuf>>,
    ) -> Result<Option<ListStep>, LakeError> {
        let mut pending = match pending {
            Some(pending) => pending,
            None => {
                self.check_root()?;
                vec![if prefix.is_empty() {
                    self.root.clone()
                } else {
                    self.resolve(prefix)?
                }]
            }
        };
        let Some(directory) = pending.pop() else {
            return Ok(None);
        };
        let mut objects = Vec::new();
        self.list_directory(&directory, &mut pending, &mut objects)
            .map_err(|e| self.unreachable("list", &e))?;
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Some((objects, pending)))
    }

    /// The whole list.
    #[cfg(test)]
    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, LakeError> {
        let (mut all, mut pending) = (Vec::new(), None);
        while let Some((objects, rest)) = self.list_step(prefix, pending)? {
            all.extend(objects);
            pending = Some(rest);
        }
        Ok(all)
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
            } else if metadata.is_file()
                && let Some(path) = path.strip_prefix(&self.root).ok().and_then(Path::to_str)
            {
                // Names that are not UTF-8 are none of ours, nor are links objects: what they lead to may lie anywhere.
                objects.push(ObjectInfo {
                    path: path.to_owned(),
                    bytes: metadata.len(),
                    modified: metadata.modified()?,
                    version: None,
                });
            }
        }
        Ok(())
    }

    pub(super) fn object_store(&self) -> Result<Arc<dyn ObjectStore>, LakeError> {
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
        check_path(path)?;
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
struct DurableFile {
    root: PathBuf,
    path: String,
    target: PathBuf,
    temp: PathBuf,
    file: File,
}

impl DurableFile {
    /// Makes the object durable and visible, if its name is free.
    fn commit(self) -> Result<(), LakeError> {
        self.publish_by(publish)
    }

    /// Makes the object durable and visible in the place of the one under its name.
    fn replace(self) -> Result<(), LakeError> {
        self.publish_by(|temp, target| fs::rename(temp, target))
    }

    fn publish_by(
        self,
        publish: impl FnOnce(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), LakeError> {
        let failed = |e: io::Error| LakeError::io("write", &self.path, &e);
        self.file.sync_all().map_err(failed)?;
        publish(&self.temp, &self.target).map_err(failed)?;
        sync_above(&self.target, &self.root).map_err(failed)
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

/// A name beside a file.
fn with_suffix(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target
        .file_name()
        .unwrap_or(OsStr::new("object"))
        .to_owned();
    name.push(suffix);
    target.with_file_name(name)
}

/// Files have no version of their own: it is their content.
fn version(data: &[u8]) -> Version {
    let mut hasher = SipHasher13::new();
    hasher.write(data);
    Version(UpdateVersion {
        e_tag: Some(format!("{:032x}", hasher.finish128().as_u128())),
        version: None,
    })
}

/// Syncs the directories above a file: another writer may have made one and not synced it yet, so all up to the root.
fn sync_above(target: &Path, root: &Path) -> io::Result<()> {
    for directory in target.ancestors().skip(1) {
        sync_directory(directory)?;
        if directory == root {
            break;
        }
    }
    Ok(())
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

    fn storage() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let storage = Directory::new(dir.path().join("lake"));
        (dir, storage)
    }

    #[test]
    fn objects_live_and_die() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        storage.prepare().unwrap();
        assert_eq!(storage.list("").unwrap(), []);
        let path = "a/b!20c/2024/x.parquet";
        storage.put(path, b"hello").unwrap();
        assert_eq!(storage.put(path, b"other").unwrap_err().sqlstate(), "58P02");
        assert_eq!(storage.info(path).unwrap().bytes, 5);
        storage.put(path, b"hello").unwrap();
        for other in ["a/b!20c", "a/none"] {
            assert_eq!(storage.info(other).unwrap_err().sqlstate(), "58P01");
        }
        assert_eq!(storage.read_range(path, 1..3).unwrap(), "el");
        assert!(storage.read_range(path, 3..6).is_err());
        assert_eq!(storage.list("a/b!20c").unwrap(), storage.list("").unwrap());
        assert_eq!(storage.list("b").unwrap(), []);
        let listed = storage.list("").unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].path.as_str(), listed[0].bytes), (path, 5));
        storage.delete(path).unwrap();
        storage.delete(path).unwrap();
        assert_eq!(storage.info(path).unwrap_err().sqlstate(), "58P01");
        assert_eq!(storage.list("").unwrap(), []);
    }

    #[test]
    fn an_unfinished_object_is_never_seen() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        let mut file = storage.create("a/x").unwrap();
        file.write_all(b"half").unwrap();
        assert!(storage.info("a/x").is_err());
        // Its remains can be found, and deleted by what is listed.
        let remains = storage.list("").unwrap();
        assert!(remains.len() == 1 && remains[0].path.ends_with(".tmp"));
        storage.delete(&remains[0].path).unwrap();
        drop(file);

        // And by the name that it was to have, but not those of another.
        for name in ["a/x", "a/x.y"] {
            std::mem::forget(storage.create(name).unwrap());
        }
        storage.put("a/x", b"whole").unwrap();
        storage.discard("a/x").unwrap();
        storage.discard("b/none").unwrap();
        let remains = storage.list("").unwrap();
        assert!(remains.len() == 1 && remains[0].path.starts_with("a/x.y."));
        storage.discard("a/x.y").unwrap();
        assert_eq!(storage.list("").unwrap(), []);

        drop(storage.create("a/x").unwrap());
        assert_eq!(storage.list("").unwrap(), []);

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
        assert_eq!(storage.list("").unwrap().len(), 1);
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
            assert!(storage.delete(path).is_err() && storage.info(path).is_err());
        }
    }

    #[test]
    fn a_storage_that_is_away_is_unreachable_and_not_made_anew() {
        let (_dir, storage) = storage();
        for error in [
            storage.put("a", b"x").unwrap_err(),
            storage.delete("a").unwrap_err(),
            storage.info("a").unwrap_err(),
            storage.list("").unwrap_err(),
            storage.object_store().unwrap_err(),
        ] {
            assert_eq!(error.sqlstate(), "58030");
            assert!(error.is_retryable());
        }
        assert!(!storage.root.exists());
        fs::write(&storage.root, b"a file").unwrap();
        assert_eq!(storage.prepare().unwrap_err().sqlstate(), "58030");
        assert_eq!(storage.list("").unwrap_err().sqlstate(), "58030");
    }

    #[tokio::test]
    async fn what_is_put_is_read_through_object_store() {
        let (_dir, storage) = storage();
        storage.prepare().unwrap();
        let path =
            crate::period::object_path("a", "ü %/..", crate::period::Period::Day, 0, Uuid::nil());
        storage.put(&path, b"0123456789").unwrap();
        let reader = storage.object_store().unwrap();
        let location = object_store::path::Path::parse(&path).unwrap();
        assert_eq!(reader.get_range(&location, 3..6).await.unwrap(), "345");
        let missing = reader.get(&"a/none".into()).await.unwrap_err();
        assert_eq!(
            LakeError::of_store("read", "a/none", missing).sqlstate(),
            "58P01"
        );
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
            project_id: 3,
            collection: "c".into(),
            collection_id: 7,
            flush_id: Uuid::nil(),
            period: crate::period::Period::Year,
            first_day: 0,
            replaces: None,
        };
        let mut writer = FileWriter::new(&schema, &options, storage.create("p/f").unwrap());
        writer.write(&crate::sort::by_time(&rows).unwrap()).unwrap();
        let file = writer.finish().unwrap();
        file.sink.commit().unwrap();
        assert_eq!(storage.info("p/f").unwrap().bytes, file.bytes);
    }
}
