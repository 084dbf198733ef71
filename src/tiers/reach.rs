//! Whether a storage can be reached, by the last attempt of a worker: everybody else reads it from a table and waits for
//! no network. A storage that fails is left alone for a while, and its collections with it, so that it holds up nobody
//! else's.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use rakam_lake::LakeError;

use crate::catalog::storages;
use crate::pg::xact::{self, Failure};
use crate::tiers::object::Remote;
use crate::tiers::owner;

/// While a storage answers, this is noted so often by a process.
const NOTE_INTERVAL: Duration = Duration::from_secs(5);

thread_local! {
    /// When this process last noted that a storage answers.
    static ANSWERED: RefCell<HashMap<i32, Instant>> = RefCell::new(HashMap::new());
}

/// Notes how a request to a storage ended. Outside of transactions.
pub fn note(storage_id: i32, error: Option<&LakeError>) {
    let noted = match error {
        // What it says of one object is an answer, too.
        None
        | Some(
            LakeError::Missing { .. }
            | LakeError::Exists { .. }
            | LakeError::Corrupt { .. }
            | LakeError::Unsupported { .. },
        ) => {
            let recent = ANSWERED.with_borrow(|answered| {
                answered
                    .get(&storage_id)
                    .is_some_and(|at| at.elapsed() < NOTE_INTERVAL)
            });
            if recent {
                return;
            }
            ANSWERED.with_borrow_mut(|answered| answered.insert(storage_id, Instant::now()));
            xact::worker(|| storages::reached(storage_id))
        }
        Some(error) => {
            ANSWERED.with_borrow_mut(|answered| answered.remove(&storage_id));
            let told = told(error);
            xact::worker(|| storages::failed(storage_id, &told))
        }
    };
    // That the extension is gone the next step will find out.
    if let Err(Failure::Error(error)) = noted {
        error.warn();
    }
}

/// Notes that a storage cannot even be asked.
pub fn note_undefined(storage_id: i32, error: &str) -> Result<(), Failure> {
    xact::worker(|| storages::failed(storage_id, error))
}

/// The error without the name of any object: members of all projects on the storage may see it.
fn told(error: &LakeError) -> String {
    match error {
        LakeError::Unreachable { action, reason, .. } => {
            format!("could not {action}: {reason}")
        }
        LakeError::DiskFull { action, .. } => {
            format!("could not {action}: no space left on device")
        }
        other => format!("SQLSTATE {}", other.sqlstate()),
    }
}

/// Whether work on a collection's files is worth a try now. A storage that has failed is asked first, by one small
/// request: nothing is written anew in memory only to find it still away.
pub fn is_open(collection_id: i32) -> std::result::Result<bool, Failure> {
    let Some(storage_id) = xact::worker(|| storages::of_collection(collection_id))? else {
        return Ok(true);
    };
    let reach = xact::worker(|| storages::reach(storage_id))?;
    if reach.waiting {
        return Ok(false);
    }
    if reach.failing
        && let Some(remote) = Remote::open(storage_id)?
    {
        owner::look(&remote)?;
    }
    Ok(true)
}

/// Asks every storage that failed last, so that what is back is used at once.
pub fn ask_failing() -> std::result::Result<(), Failure> {
    for storage_id in xact::worker(storages::failing)? {
        let looked = match Remote::open(storage_id) {
            Ok(Some(remote)) => owner::look(&remote),
            Ok(None) => continue,
            Err(failure) => Err(failure),
        };
        // One whose server is gone stops no other, either: deleting what is out of use tells of it.
        if let Err(Failure::ExtensionGone) = looked {
            return Err(Failure::ExtensionGone);
        }
    }
    Ok(())
}
