//! `rakam.rebuild_catalog`: projects, collections and files of an empty database, made of what lies in a storage.
//!
//! In a task worker: the storage is listed, its description read (crates/lake `describe.rs`), and the end of every file,
//! all outside of transactions; then a transaction for each project and collection, and one for some files at a time.
//! A call that was interrupted is repeated and goes on. Nothing is written to the storage, and nothing deleted there.

use std::collections::{BTreeMap, HashMap, HashSet};

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use rakam_lake::LakeError;
use rakam_lake::describe::{self, File, LiveFile, Name, State};
use rakam_lake::file_info::{self, FileInfo, Opened};
use rakam_lake::id_reader::IdReader;
use rakam_lake::owner::{self, OWNER_PATH, Owner};
use rakam_lake::period;
use serde::{Deserialize, Serialize};

use super::task::{self, Task};
use crate::catalog::deletion::{self, Object};
use crate::catalog::rebuild as catalog;
use crate::catalog::{audit, manifest};
use crate::ingest::dedupe::Deduper;
use crate::pg::locks::{self, LockOn, SessionLock};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, failpoint, guc, not_null, security, wait};
use crate::projects::objects;
use crate::tiers::ddl;
use crate::tiers::object::Remote;

/// Files that are read at a time, and entered in one transaction.
const BATCH: usize = 64;
/// What is read of a file's end at first: most metadata fits.
const END_BYTES: u64 = 64 << 10;
/// Paths that are noted in one statement.
const PATHS: usize = 10_000;
/// Problems that are told one by one.
const TOLD: usize = 20;

type Outcome<T> = std::result::Result<T, Failure>;

/// What the worker answers.
#[derive(Debug, Serialize, Deserialize)]
struct Rebuilt {
    /// Project, collection, files, events.
    rows: Vec<(String, String, i64, i64)>,
    warnings: Vec<String>,
}

/// Makes the catalogue of an empty database anew from what lies in a storage: projects with schemas and roles, collections,
/// fields, files, deleted rows. Keys and quotas are not restored, and nothing is deleted until `rakam.adopt_storage`.
/// Warnings tell what could not be restored. A call that was interrupted may be repeated.
/// SQL: `rakam.rebuild_catalog(storage text) → TABLE(project text, collection text, files bigint, events bigint)`.
/// Errors: 42501 neither superuser nor rakam_admin, 42704 no such storage, 55000 the database has projects, 42710 a schema or
/// role of a project exists, 22023 the default storage, 58030 the storage cannot be reached.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn rebuild_catalog(
    storage: Option<&str>,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(project, String),
            name!(collection, String),
            name!(files, i64),
            name!(events, i64),
        ),
    >,
    ErrorReport,
> {
    let answer = audit::at_once("rebuild_catalog", None, storage, |note| {
        if !security::is_server_admin(security::current_user()) {
            return Err(
                PgError::new("42501", "permission denied to rebuild a catalog")
                    .hint("Superusers and members of rakam_admin may do it."),
            );
        }
        let name = not_null(storage, "storage")?;
        objects::ensure_usable(name, security::current_user())?;
        let task = Task::Rebuild {
            storage: name.to_owned(),
        };
        task::run_noted(task, note)
    })?;
    let rebuilt: Rebuilt = serde_json::from_value(answer)
        .map_err(|e| PgError::internal(format!("malformed reply of a rebuild: {e}")))?;
    for warning in rebuilt.warnings {
        PgError::new("01000", warning).warn();
    }
    Ok(TableIterator::new(rebuilt.rows))
}

/// In the task worker.
pub fn perform(storage: &str) -> Outcome<serde_json::Value> {
    let storage_id = xact::worker(|| objects::storage(storage, security::current_user()))?;
    let _turn = SessionLock::take(LockOn::Rebuild(storage_id));
    let Some(remote) = Remote::open(storage_id)? else {
        return Err(Failure::Error(
            PgError::new(
                "22023",
                format!("storage \"{storage}\" is in this database"),
            )
            .hint("A catalog is rebuilt from a storage outside of it: a directory or a bucket."),
        ));
    };
    remote.check().map_err(error)?;
    {
        // Who describes the storage now ends before; later nobody begins.
        let _describing = SessionLock::take(LockOn::Describe(storage_id));
        xact::worker(|| catalog::begin_rebuild(storage_id, storage))?;
    }
    let mut rebuild = Rebuild {
        remote,
        warnings: Vec::new(),
        untold: 0,
    };
    let rows = rebuild.run()?;
    if rebuild.untold > 0 {
        let more = format!("and {} more problems of this kind", rebuild.untold);
        rebuild.warnings.push(more);
    }
    serde_json::to_value(Rebuilt {
        rows,
        warnings: rebuild.warnings,
    })
    .map_err(|e| {
        Failure::Error(PgError::internal(format!(
            "could not encode an answer: {e}"
        )))
    })
}

fn error(error: LakeError) -> Failure {
    Failure::Error(error.into())
}

/// What a storage has, by its list.
#[derive(Default)]
struct Listing {
    /// Data files, with their sizes.
    files: HashMap<String, u64>,
    names: Vec<Name>,
}

struct Rebuild {
    remote: Remote,
    warnings: Vec<String>,
    untold: usize,
}

impl Rebuild {
    fn run(&mut self) -> Outcome<Vec<(String, String, i64, i64)>> {
        let storage_id = self.remote.storage_id;
        let listing = self.list()?;
        let owner = self.owner()?;
        let mut state = self.describe(&listing, owner.as_ref())?;
        self.settle(&mut state, &listing, owner.as_ref())?;
        let installation = state.header.as_ref().map(|h| h.installation.clone());
        let last = |ids: Option<&i32>| ids.map_or(1, |id| id + 1);
        let used = (
            last(state.projects.keys().next_back()),
            last(state.collections.keys().next_back()),
        );
        let next_ids = state.header.as_ref().map_or(used, |h| {
            let (project, collection) = used;
            (
                h.next_project_id.max(project),
                h.next_collection_id.max(collection),
            )
        });
        xact::worker(|| catalog::advance_ids(next_ids))?;
        for (id, row) in &state.projects {
            xact::worker(|| match catalog::restore_project(*id, storage_id, row)? {
                Some(name) => objects::restore(*id, &name, installation.as_deref()),
                None => Ok(()),
            })?;
        }
        for (id, collection) in &state.collections {
            wait::check_interrupts();
            xact::worker(|| catalog::restore_collection(*id, collection))?;
        }
        failpoint::hit("rebuild.before_files");
        self.files(state, &listing)?;
        // Tables come last: who reads them finds everything.
        while ddl::run()?.done > 0 {}
        xact::worker(|| {
            catalog::finish_rebuild(storage_id)?;
            catalog::restored(storage_id)
        })
    }

    fn list(&mut self) -> Outcome<Listing> {
        let mut listing = Listing::default();
        self.remote.list("", |page| {
            wait::check_interrupts();
            for object in page {
                if let Some(name) = Name::parse(&object.path) {
                    listing.names.push(name);
                } else if period::object_id(&object.path).is_some() {
                    listing.files.insert(object.path, object.bytes);
                }
            }
            Ok(())
        })?;
        Ok(listing)
    }

    /// Who the storage belongs to, as far as it says.
    fn owner(&mut self) -> Outcome<Option<Owner>> {
        let found = self.remote.get_versioned(OWNER_PATH).map_err(error)?;
        match found.map(|(bytes, _)| Owner::decode(&bytes)) {
            None => Ok(None),
            Some(Ok(owner)) => Ok(Some(owner)),
            Some(Err(e)) => {
                self.warnings.push(e.to_string());
                Ok(None)
            }
        }
    }

    /// The description of the database that owns the storage, or else the newest one.
    fn describe(&mut self, listing: &Listing, owner: Option<&Owner>) -> Outcome<State> {
        let mut writers: Vec<&str> = owner
            .iter()
            .flat_map(|o| &o.writers)
            .map(String::as_str)
            .collect();
        if owner.is_none() {
            // Newest last, as the owner has them.
            let mut newest: BTreeMap<&str, uuid::Uuid> = BTreeMap::new();
            for name in &listing.names {
                let id = newest.entry(&name.writer).or_default();
                *id = name.id.max(*id);
            }
            let mut known: Vec<_> = newest.into_iter().collect();
            known.sort_by_key(|(_, id)| *id);
            writers = known.into_iter().map(|(writer, _)| writer).collect();
        }
        let mut state = State::default();
        let chain = (writers.iter().rev()).find_map(|w| describe::chain(&listing.names, w));
        if let (Some(owner), Some(of)) = (writers.last(), chain.as_ref().and_then(|c| c.first()))
            && of.writer != *owner
        {
            self.warnings.push(
                "the owner of the storage has not described it yet: what an earlier owner said is taken, and what has \
                 changed since may be missing"
                    .to_owned(),
            );
        }
        let Some(chain) = chain else {
            self.warnings.push(
                "the storage has no description: what its files say is all that is known, and events that were \
                 deleted of them are back"
                    .to_owned(),
            );
            return Ok(state);
        };
        if describe::has_gap(&chain) {
            self.warnings
                .push("a part of the storage's description is missing".to_owned());
        }
        for name in chain {
            wait::check_interrupts();
            let object = self.remote.get(&name.path()).map_err(error)?;
            if let Err(e) = state.apply(&object) {
                self.tell(format!("{}: {e}", name.path()));
            }
        }
        Ok(state)
    }

    /// Takes in the files that came after the description.
    fn settle(
        &mut self,
        state: &mut State,
        listing: &Listing,
        owner: Option<&Owner>,
    ) -> Outcome<()> {
        // A copy of the database may have written here as well.
        let writers: Option<HashSet<&str>> =
            owner.map(|o| o.writers.iter().map(String::as_str).collect());
        let is_ours = |path: &str| {
            let writer = owner::writer_of(path).map(|w| w.to_string());
            writers
                .as_ref()
                .is_none_or(|known| writer.is_some_and(|w| known.contains(w.as_str())))
        };
        let paths = listing
            .files
            .keys()
            .map(String::as_str)
            .filter(|path| is_ours(path));
        let found: Vec<(String, u64)> = (state.undescribed(paths).into_iter())
            .map(|path| (path.to_owned(), listing.files[path]))
            .collect();
        let mut infos = Vec::new();
        for part in found.chunks(BATCH) {
            for (info, (path, _)) in self.read(part)?.into_iter().zip(part) {
                match info {
                    Ok(mut info) => {
                        // They are read again when they are entered.
                        info.stats = Vec::new();
                        info.footer = bytes::Bytes::new();
                        infos.push((path.clone(), info));
                    }
                    Err(e) => self.tell(format!("{path} is left out: {e}")),
                }
            }
        }
        let present: HashSet<String> = listing.files.keys().cloned().collect();
        state.settle(infos, &present);
        let gone = state.out_of_use(&present);
        let storage_id = self.remote.storage_id;
        for part in gone.chunks(PATHS) {
            xact::worker(|| catalog::put_out_of_use(storage_id, part))?;
        }
        Ok(())
    }

    /// Enters the files in the manifest, collection by collection.
    fn files(&mut self, mut state: State, listing: &Listing) -> Outcome<()> {
        let mut by_collection: BTreeMap<i32, Vec<(String, u64, Option<File>)>> = BTreeMap::new();
        for (
            path,
            LiveFile {
                collection_id,
                described,
            },
        ) in std::mem::take(&mut state.files)
        {
            match listing.files.get(&path) {
                Some(bytes) => {
                    let files = by_collection.entry(collection_id).or_default();
                    files.push((path, *bytes, described));
                }
                None => {
                    let n = described.map_or(0, |file| file.n);
                    self.tell(format!("{path} with {n} events is missing"));
                }
            }
        }
        for (collection_id, mut files) in by_collection {
            let Some(project_id) = state.collections.get(&collection_id).map(|c| c.project_id)
            else {
                continue;
            };
            files.sort_unstable_by(|a, b| a.0.cmp(&b.0));
            for part in files.chunks(BATCH) {
                self.enter(project_id, collection_id, part)?;
                failpoint::hit("rebuild.after_files");
            }
        }
        Ok(())
    }

    fn enter(
        &mut self,
        project_id: i32,
        collection_id: i32,
        files: &[(String, u64, Option<File>)],
    ) -> Outcome<()> {
        let paths: Vec<String> = files.iter().map(|(path, ..)| path.clone()).collect();
        // Those of an earlier attempt.
        let known = xact::worker(|| catalog::known_files(self.remote.storage_id, &paths))?;
        let new: Vec<_> = files
            .iter()
            .filter(|(path, ..)| !known.contains(path))
            .collect();
        let wanted: Vec<(String, u64)> =
            new.iter().map(|(path, n, _)| (path.clone(), *n)).collect();
        let mut entries = Vec::new();
        for (info, (path, _, described)) in self.read(&wanted)?.into_iter().zip(new) {
            match info.and_then(|info| checked(info, described.as_ref())) {
                Ok(info) => {
                    let hidden = described
                        .as_ref()
                        .map_or(Ok(None), File::hidden)
                        .map_err(error)?;
                    let level = described.as_ref().map_or(0, |file| file.level);
                    entries.push((path, info, level, hidden));
                }
                Err(e) => self.tell(format!("{path} is left out: {e}")),
            }
        }
        for (path, info, ..) in &entries {
            self.remember(project_id, collection_id, path, info)?;
        }
        let storage_id = self.remote.storage_id;
        xact::worker(|| {
            locks::transaction(LockOn::Manifest(collection_id));
            let (mut events, mut bytes) = (0, 0);
            for (path, info, level, hidden) in &entries {
                let place = (storage_id, project_id, collection_id);
                let file_id = catalog::restore_file(place, path, *level, info)?;
                let gone = hidden.as_ref().map_or(0, |rows| rows.len());
                if let Some(rows) = hidden {
                    deletion::set(project_id, collection_id, Object::File(file_id), rows)?;
                }
                events += info.n as i64 - gone as i64;
                bytes += info.bytes as i64;
            }
            manifest::add_to_stat(
                collection_id,
                project_id,
                events,
                bytes,
                entries.len() as i64,
            )
        })
    }

    /// Events that were received within the window and are sent once more are to be known: their ids are read.
    fn remember(
        &mut self,
        project_id: i32,
        collection_id: i32,
        path: &str,
        info: &FileInfo,
    ) -> Outcome<()> {
        let Some(window_us) = guc::dedupe_window_us() else {
            return Ok(());
        };
        if info.max_received_us < xact::now_us() - window_us {
            return Ok(());
        }
        let reader = IdReader::open(info.footer.clone()).map_err(error)?;
        for group in 0..reader.row_groups() {
            let mut parts = Vec::new();
            for range in reader.ranges(group) {
                parts.push(self.remote.get_range(path, range).map_err(error)?);
            }
            let mut ids = reader.read(group, parts).map_err(error)?;
            ids.retain(|(_, at_us)| *at_us >= xact::now_us() - window_us);
            xact::worker(|| {
                let mut known = Deduper::open([project_id]);
                known.remember(project_id, collection_id, &ids)?;
                known.finish()
            })?;
        }
        Ok(())
    }

    /// What files say of themselves, given with their sizes.
    fn read(
        &mut self,
        files: &[(String, u64)],
    ) -> Outcome<Vec<std::result::Result<FileInfo, LakeError>>> {
        wait::check_interrupts();
        let mut infos: Vec<Option<std::result::Result<FileInfo, LakeError>>> = Vec::new();
        infos.resize_with(files.len(), || None);
        let mut wanted: Vec<(usize, u64)> = files
            .iter()
            .enumerate()
            .map(|(index, (_, size))| (index, END_BYTES.min(*size)))
            .collect();
        // The metadata, and where it is long, its beginning and the page index before it.
        while !wanted.is_empty() {
            let ends = wanted.iter().map(|&(index, bytes)| {
                let (path, size) = &files[index];
                (path.clone(), *size, bytes)
            });
            let ends = self.remote.ends(ends.collect()).map_err(error)?;
            let mut more = Vec::new();
            for ((index, _), end) in wanted.into_iter().zip(ends) {
                let (path, size) = &files[index];
                let end = end.ok_or_else(|| LakeError::Missing { path: path.clone() });
                match end.and_then(|end| file_info::open(&end, *size)) {
                    Ok(Opened::Needs(bytes)) => more.push((index, bytes)),
                    Ok(Opened::Info(info)) => infos[index] = Some(Ok(*info)),
                    Err(e) => infos[index] = Some(Err(e)),
                }
            }
            wanted = more;
        }
        Ok(infos.into_iter().flatten().collect())
    }

    fn tell(&mut self, problem: String) {
        if self.warnings.len() < TOLD {
            self.warnings.push(problem);
        } else {
            self.untold += 1;
        }
    }
}

/// The file is the one that was described.
fn checked(info: FileInfo, described: Option<&File>) -> std::result::Result<FileInfo, LakeError> {
    match described {
        Some(file) if (file.n, file.bytes) != (info.n, info.bytes) => Err(LakeError::Corrupt {
            what: "data file",
            reason: format!(
                "it has {} events and {} bytes where {} and {} were described",
                info.n, info.bytes, file.n, file.bytes
            ),
        }),
        _ => Ok(info),
    }
}
