//! Projects that transactions are dropping ([`LockOn::Project`]): who works in the background passes them over, so that an open
//! transaction holds up one project and no other.

use std::time::Duration;

use crate::pg::locks::{self, LockOn, PROJECT_TAG};
use crate::pg::spi::{self, View, arg};
use crate::pg::{PgError, Result, wait};

/// Between two attempts to get a lock that somebody has for a moment.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether some transaction is dropping the project.
pub fn is_going(project_id: i32) -> bool {
    !locks::is_free(LockOn::Project(project_id))
}

/// Whether some transaction is dropping the project of a collection. Workers only.
pub fn concerns(collection_id: i32) -> Result<bool> {
    let project_id = spi::first(
        View::Current,
        "SELECT project_id FROM rakam_internal.collection WHERE collection_id = $1",
        &[arg(collection_id)],
        |row| row.must(1),
    )?;
    Ok(project_id.is_some_and(is_going))
}

/// Errors (55P03) if some transaction is dropping the project: before work that would wait for its end with locks in hand.
pub fn ensure_stays(project_id: i32) -> Result<()> {
    if is_going(project_id) {
        return Err(going());
    }
    Ok(())
}

fn going() -> PgError {
    PgError::new("55P03", "the project is being dropped by a transaction")
        .hint("Try again when that transaction has ended.")
}

/// Takes the lock under which a collection's files and chunks change, to the end of the transaction: nothing is stored for it
/// behind a drop of its project, and nobody who is in the middle of something waits for the end of one. Error: 55P03.
pub fn lock_manifest(collection_id: i32) -> Result<()> {
    while !locks::try_transaction(LockOn::Manifest(collection_id)) {
        if concerns(collection_id)? {
            return Err(going());
        }
        wait::wait(None, PAUSE);
    }
    Ok(())
}

/// A project and the transaction that is dropping it, which has not ended.
pub struct Dropping {
    pub project: String,
    /// None: it is prepared.
    pub pid: Option<i32>,
    pub prepared: Option<String>,
}

/// The projects that transactions are dropping.
pub fn all(view: View) -> Result<Vec<Dropping>> {
    spi::query(
        view,
        // Of a prepared transaction the entries have no process; that of its own id says which it is.
        "SELECT p.name, l.pid, x.gid
         FROM pg_catalog.pg_locks l
         JOIN rakam_internal.project p ON p.project_id = l.classid::int8
         LEFT JOIN pg_catalog.pg_locks t ON l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
           AND t.virtualtransaction = l.virtualtransaction
         LEFT JOIN pg_catalog.pg_prepared_xacts x ON x.transaction = t.transactionid
         WHERE l.locktype = 'advisory' AND l.objsubid = $1 AND l.granted AND l.mode = 'ExclusiveLock'
           AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
         ORDER BY p.name LIMIT 20",
        &[arg(i32::from(PROJECT_TAG))],
        |row| {
            Ok(Dropping {
                project: row.must(1)?,
                pid: row.get(2),
                prepared: row.get(3),
            })
        },
    )
}
