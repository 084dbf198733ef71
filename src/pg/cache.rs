//! How this process reads buckets: the directory of blocks that `rakam.cache_dir` and `rakam.cache_size` say, and the
//! requests of its engine threads. Called on the backend's own thread.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use rakam_engine::RequestMemory;
use rakam_lake::cache::{Directory, Eviction, Fetcher, ObjectKey};

use super::error::{PgError, Result};
use super::runtime::Runtime;
use super::{guc, memory};

/// How often a worker looks through the directory though it is not full: for remains, and to set its count right.
const INSPECTION_INTERVAL: Duration = Duration::from_secs(3600);

/// A directory with the settings that it was made from.
struct Configured {
    path: PathBuf,
    limit: u64,
    directory: Arc<Directory>,
}

thread_local! {
    static DIRECTORY: RefCell<Option<Configured>> = const { RefCell::new(None) };
    static FETCHER: RefCell<Option<(u64, Arc<Fetcher>)>> = const { RefCell::new(None) };
}

/// The directory as it is set now, also if nothing may be kept in it; None: no directory is set.
fn configured() -> Option<Arc<Directory>> {
    let path = guc::cache_dir()?;
    let limit = guc::cache_bytes();
    DIRECTORY.with_borrow_mut(|known| match known {
        Some(known) if known.path == path && known.limit == limit => {
            Some(Arc::clone(&known.directory))
        }
        _ => {
            let directory = Arc::new(Directory::new(&path, limit));
            *known = Some(Configured {
                path,
                limit,
                directory: Arc::clone(&directory),
            });
            Some(directory)
        }
    })
}

/// The directory in which blocks are kept; None: none are.
pub fn directory() -> Option<Arc<Directory>> {
    configured().filter(|_| guc::cache_bytes() > 0)
}

/// The requests of the present engine threads. With these threads they end.
pub fn fetcher() -> Result<Arc<Fetcher>> {
    let runtime = Runtime::current()?.number();
    Ok(FETCHER.with_borrow_mut(|known| match known {
        Some((number, fetcher)) if *number == runtime => Arc::clone(fetcher),
        _ => {
            let requests = RequestMemory::new(&memory::pool());
            let fetcher = Arc::new(Fetcher::new(Arc::new(requests)));
            *known = Some((runtime, Arc::clone(&fetcher)));
            fetcher
        }
    }))
}

/// What a foreign server's bucket is called there, for files of others. Storages are numbers.
pub fn server_key(server: &str, address: &str) -> String {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    format!("{}/{server}/{address}", database.to_u32())
}

/// What a storage is called in the directory, which the databases of a server share.
pub fn storage_key(storage_id: i32) -> String {
    // SAFETY: reads a backend variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    format!("{}/{storage_id}", database.to_u32())
}

/// Forgets the blocks of an object that was deleted.
pub fn forget(storage_id: i32, path: &str) {
    if let Some(directory) = configured() {
        directory.forget(&ObjectKey {
            storage: storage_key(storage_id),
            path: path.to_owned(),
        });
    }
}

/// Tells the server's log, once in a process, what keeps blocks from being kept.
pub fn report() {
    if let Some(trouble) = directory().and_then(|directory| directory.trouble()) {
        PgError::new(
            "58030",
            format!("could not keep blocks in rakam.cache_dir: {trouble}"),
        )
        .hint("Queries read the storage instead.")
        .log();
    }
}

/// Makes room in the directory, a little at a time.
#[derive(Default)]
pub struct Upkeep {
    pass: Option<Eviction>,
    inspected: Option<Instant>,
}

impl Upkeep {
    /// Begins a pass over the directory if it is time for one.
    pub fn look(&mut self) {
        if self.pass.is_some() {
            return;
        }
        let Some(directory) = configured() else {
            return;
        };
        self.pass = directory.eviction();
        let due = |at: Instant| at.elapsed() >= INSPECTION_INTERVAL;
        if self.pass.is_none() && self.inspected.is_none_or(due) {
            self.inspected = Some(Instant::now());
            self.pass = directory.inspection();
        }
    }

    /// Works for about `budget`; whether there is more to do.
    pub fn step(&mut self, budget: Duration) -> bool {
        if let Some(pass) = &mut self.pass
            && !pass.step(budget)
        {
            self.pass = None;
        }
        self.pass.is_some()
    }
}
