//! The comparison of a storage with its manifest: what is missing, what nobody knows, what is not as it was written.
//!
//! First the storage is listed, then the manifest read, each page by page: an object that was there before its row was looked
//! for, and is still announced, in the manifest or queued for deletion, is none of an orphan. So no age need be guessed:
//! uploads announce themselves before they begin. Of what was listed, a hash of the path and the size are remembered, some
//! 20 bytes an object.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;
use rakam_lake::footer;
use rakam_lake::owner::{OWNER_PATH, Writer, is_system, is_table, writer_of};
use rakam_lake::period;
use rakam_lake::storage::ObjectInfo;

use super::object::Remote;
use super::owner;
use crate::catalog::storages::{self, File, Problem};
use crate::catalog::{manifest, orphans, rebuild};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{failpoint, wait};

type Outcome<T> = std::result::Result<T, Failure>;

/// Objects of the default storage read at a time.
const PAGE: i64 = 1_000;
/// Files of which the ends are read at a time: each has its metadata there, some ten kilobytes.
const FILES: i64 = 200;
/// Uploads that nobody completed may still go on for so long.
const UPLOAD_S: u64 = 24 * 3600;

/// How far a comparison looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// In the background: names and sizes, as listed, and of objects that nobody knows those with a name of ours.
    Listing,
    /// As called: the end of each file too, which holds its metadata, and everything that nobody knows.
    Footers,
}

/// What is being compared.
struct Check<'a> {
    storage_id: i32,
    remote: Option<&'a Remote>,
    began_us: i64,
    depth: Depth,
    /// Orphans may be deleted.
    is_owner: bool,
    /// Whose objects are this database's.
    writers: Vec<Writer>,
    /// Sizes of what was listed, by a hash of the path.
    listed: HashMap<u64, u64>,
    /// Whether a folder with something that nobody knows is another storage.
    is_storage: HashMap<String, bool>,
}

/// Compares a storage with the manifest; notes problems and queues orphans for deletion.
pub fn storage(storage_id: i32, remote: Option<&Remote>, depth: Depth) -> Outcome<()> {
    let _lock = SessionLock::take(LockOn::Check(storage_id));
    let is_owner = match remote {
        Some(remote) => owner::look(remote)?,
        None => true,
    };
    let mut check = Check {
        storage_id,
        remote,
        began_us: xact::now_us(),
        depth,
        is_owner,
        writers: writers(storage_id, is_owner)?,
        listed: HashMap::new(),
        is_storage: HashMap::new(),
    };
    match remote {
        Some(remote) => {
            remote.list("", |page| check.page(&page))?;
            if is_owner {
                check.abort_uploads(remote)?;
            }
        }
        None => check.local()?,
    }
    failpoint::hit("check.after_list");
    let mut after = 0;
    loop {
        wait::check_interrupts();
        let files = xact::worker(|| storages::files_after(storage_id, after, FILES))?;
        let Some(last) = files.last() else { break };
        after = last.file_id;
        let mut problems = check.sizes(&files)?;
        if depth == Depth::Footers {
            let sound: Vec<&File> = (files.iter())
                .filter(|f| !problems.iter().any(|p| p.path == f.path))
                .collect();
            problems.extend(check.footers(&sound)?);
        }
        if !problems.is_empty() {
            xact::worker(|| storages::note_problems(storage_id, check.began_us, &problems))?;
        }
    }
    xact::worker(|| storages::checked(storage_id, check.began_us))
}

/// Whose objects are this database's: its own and, if the storage is certainly its, those that came with the storage.
fn writers(storage_id: i32, is_owner: bool) -> Outcome<Vec<Writer>> {
    let (own, fence) = xact::worker(|| Ok((storages::writer()?, storages::fence(storage_id)?)))?;
    let mut writers = vec![own];
    if is_owner {
        let parsed = fence
            .writers
            .iter()
            .filter_map(|w| w.parse::<Writer>().ok());
        writers.extend(parsed);
    }
    Ok(writers)
}

/// Hands the data files of this database's that nobody knows to `each`, some at a time. Listed first and looked for then, as
/// by [`storage`].
pub fn unknown(remote: &Remote, mut each: impl FnMut(Vec<String>) -> Outcome<()>) -> Outcome<()> {
    let storage_id = remote.storage_id;
    let is_owner = xact::worker(|| storages::fence(storage_id))?.is_ours;
    let writers = writers(storage_id, is_owner)?;
    remote.list("", |page| {
        wait::check_interrupts();
        let is_ours = |path: &str| {
            period::object_id(path).is_some()
                && writer_of(path).is_some_and(|writer| writers.contains(&writer))
        };
        let paths: Vec<String> = (page.into_iter().map(|object| object.path))
            .filter(|path| is_ours(path))
            .collect();
        match xact::worker(|| orphans::unknown(storage_id, &paths))? {
            unknown if unknown.is_empty() => Ok(()),
            unknown => each(unknown),
        }
    })
}

impl Check<'_> {
    /// Takes a page of the list in.
    fn page(&mut self, objects: &[ObjectInfo]) -> Outcome<()> {
        wait::check_interrupts();
        let objects: Vec<(&str, u64)> = (objects.iter())
            .filter(|o| !is_system(&o.path))
            .map(|o| (o.path.as_str(), o.bytes))
            .collect();
        for (path, bytes) in &objects {
            self.listed.insert(hash(path), *bytes);
        }
        self.orphans(&objects)
    }

    /// Objects of the default storage.
    fn local(&mut self) -> Outcome<()> {
        let mut after = String::new();
        loop {
            wait::check_interrupts();
            let objects = xact::worker(|| storages::local_objects_after(&after, PAGE))?;
            let Some(last) = objects.last() else {
                return Ok(());
            };
            after.clone_from(&last.path);
            let objects: Vec<(&str, u64)> = (objects.iter())
                .map(|o| (o.path.as_str(), o.bytes as u64))
                .collect();
            for (path, bytes) in &objects {
                self.listed.insert(hash(path), *bytes);
            }
            self.orphans(&objects)?;
        }
    }

    /// Gives up uploads in parts that a crash left behind. One under way is announced.
    fn abort_uploads(&self, remote: &Remote) -> Outcome<()> {
        // None: the store cannot tell.
        for upload in remote.list_uploads()?.unwrap_or_default() {
            let age = upload.started.elapsed().unwrap_or_default();
            let abandoned = match writer_of(&upload.path) {
                Some(writer) => self.writers.contains(&writer),
                None => age.as_secs() > UPLOAD_S,
            };
            if abandoned && !xact::worker(|| orphans::is_announced(self.storage_id, &upload.path))?
            {
                remote.abort_upload(&upload)?;
            }
        }
        Ok(())
    }

    /// Finds and queues those that nobody knows.
    fn orphans(&mut self, objects: &[(&str, u64)]) -> Outcome<()> {
        let is_ours = |path: &str| match writer_of(path) {
            // What another database wrote is that one's, whatever this one knows of it.
            Some(writer) => self.writers.contains(&writer),
            // Nobody asked: what has no name of ours may have been put there by people. Tables of theirs stay anyway.
            None => self.depth == Depth::Footers && !is_table(path),
        };
        let candidates: HashMap<&str, u64> = (objects.iter().copied())
            .filter(|(path, _)| is_ours(path))
            .collect();
        let paths: Vec<String> = candidates.keys().map(|path| (*path).to_owned()).collect();
        let unknown = xact::worker(|| {
            let mut unknown = Vec::new();
            if rebuild::is_rebuilding(self.storage_id)? {
                // Its files are entered one after the other: what nobody knows yet is no orphan.
                return Ok(unknown);
            }
            for path in orphans::among(self.storage_id, &paths)? {
                // What is left of an interrupted write goes by the intent of its object while there is one.
                let whole = path
                    .split_once(".parquet.")
                    .map(|(stem, _)| format!("{stem}.parquet"));
                if let Some(whole) = whole
                    && orphans::is_announced(self.storage_id, &whole)?
                {
                    continue;
                }
                unknown.push(path);
            }
            Ok(unknown)
        })?;
        // Between the list and the look at the tables it may have been deleted, or got its final name.
        let present = self.sizes_now(&unknown)?;
        let mut orphans: Vec<String> = unknown
            .into_iter()
            .zip(present)
            .filter_map(|(path, size)| size.map(|_| path))
            .collect();
        self.leave_other_storages(&mut orphans)?;
        if orphans.is_empty() {
            return Ok(());
        }
        let problems: Vec<Problem> = (orphans.iter())
            .map(|path| Problem {
                path: path.clone(),
                problem: "orphan",
                bytes: candidates.get(path.as_str()).map_or(0, |b| *b as i64),
            })
            .collect();
        xact::worker(|| {
            if self.is_owner && !rebuild::is_rebuilding(self.storage_id)? {
                orphans::queue(self.storage_id, &orphans)?;
            }
            storages::note_problems(self.storage_id, self.began_us, &problems)
        })
    }

    /// Takes out what lies in another storage, whose address is below this one's: of whichever database.
    fn leave_other_storages(&mut self, paths: &mut Vec<String>) -> Outcome<()> {
        let Some(remote) = self.remote else {
            return Ok(());
        };
        let above = |path: &str| -> Vec<String> {
            (path.match_indices('/'))
                .map(|(end, _)| path[..end].to_owned())
                .collect()
        };
        let mut unseen: Vec<String> = (paths.iter().flat_map(|path| above(path)))
            .filter(|folder| !self.is_storage.contains_key(folder))
            .collect();
        unseen.sort_unstable();
        unseen.dedup();
        let owners: Vec<String> = (unseen.iter())
            .map(|folder| format!("{folder}/{OWNER_PATH}"))
            .collect();
        for (folder, size) in unseen.into_iter().zip(remote.sizes(&owners)?) {
            self.is_storage.insert(folder, size.is_some());
        }
        paths.retain(|path| !above(path).iter().any(|folder| self.is_storage[folder]));
        Ok(())
    }

    /// Files that are not there, or not of the size they were written with.
    fn sizes(&self, files: &[File]) -> Outcome<Vec<Problem>> {
        // Those that are not in the list may have been written after their place in it had passed.
        let unlisted: Vec<String> = (files.iter())
            .filter(|f| !self.listed.contains_key(&hash(&f.path)))
            .map(|f| f.path.clone())
            .collect();
        let mut now = unlisted
            .iter()
            .zip(self.sizes_now(&unlisted)?)
            .collect::<HashMap<_, _>>();
        let mut problems = Vec::new();
        for file in files {
            let problem = |problem, bytes| Problem {
                path: file.path.clone(),
                problem,
                bytes,
            };
            let size = match now.remove(&file.path) {
                Some(size) => size,
                None => self.listed.get(&hash(&file.path)).copied(),
            };
            match size {
                Some(bytes) if bytes as i64 == file.bytes => {}
                Some(bytes) => problems.push(problem("corrupt", bytes as i64)),
                // It may have been taken out of use and deleted meanwhile.
                None if !xact::worker(|| storages::has_file(file.file_id))? => {}
                None => problems.push(problem("missing", file.bytes)),
            }
        }
        Ok(problems)
    }

    /// What is there at this moment, by path.
    fn sizes_now(&self, paths: &[String]) -> Outcome<Vec<Option<u64>>> {
        match self.remote {
            _ if paths.is_empty() => Ok(Vec::new()),
            Some(remote) => Ok(remote.sizes(paths)?),
            None => xact::worker(|| {
                (paths.iter())
                    .map(|path| manifest::object_size(View::Current, path))
                    .collect()
            }),
        }
    }

    /// Files whose end is not what the manifest keeps of it.
    fn footers(&self, files: &[&File]) -> Outcome<Vec<Problem>> {
        let ids: Vec<i64> = files.iter().map(|f| f.file_id).collect();
        let mut kept = xact::worker(|| manifest::footers(View::Current, &ids))?;
        let mut expected = Vec::with_capacity(files.len());
        for file in files {
            // Gone from the manifest since: nothing to compare.
            if let Some(footer) = kept.remove(&file.file_id) {
                expected.push((*file, footer::kept_end(footer.into())?));
            }
        }
        let ends = self.ends(&expected)?;
        let mut problems = Vec::new();
        for ((file, end), found) in expected.iter().zip(ends) {
            if found.as_ref() == Some(end) || !xact::worker(|| storages::has_file(file.file_id))? {
                continue;
            }
            problems.push(Problem {
                path: file.path.clone(),
                problem: if found.is_some() {
                    "corrupt"
                } else {
                    "missing"
                },
                bytes: file.bytes,
            });
        }
        Ok(problems)
    }

    fn ends(&self, files: &[(&File, Bytes)]) -> Outcome<Vec<Option<Bytes>>> {
        let place =
            |(file, end): &(&File, Bytes)| (file.path.clone(), file.bytes as u64, end.len() as u64);
        match self.remote {
            Some(remote) => Ok(remote.ends(files.iter().map(place).collect())?),
            None => xact::worker(|| {
                let read = |(path, size, len): (String, u64, u64)| {
                    let from = size.saturating_sub(len);
                    manifest::object_range(View::Current, &path, from, len)
                        .map(|bytes| (!bytes.is_empty()).then(|| bytes.into()))
                };
                files.iter().map(|file| read(place(file))).collect()
            }),
        }
    }
}

fn hash(path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}
