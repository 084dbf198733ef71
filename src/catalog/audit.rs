//! The audit log: who called what, when, in which project, and how it ended.
//!
//! What a call did is noted in its own transaction, or (what works in a worker) in the worker's that takes effect: the row is
//! there exactly when the change is. What was refused, or was rolled back later, goes through a queue in shared memory to the
//! resident worker; where there is none, to the server's log. Nobody waits for either. Rows name things, they never contain
//! values of events.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use crate::pg::guc::{self, Audit};
use crate::pg::security::{self, ActAs};
use crate::pg::spi::{self, arg};
use crate::pg::{PgError, Result, notes, roles, undo, xact};

/// What kind of call it is, by what `rakam.audit` must be for it to be noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Changes or exports something: noted unless the setting is `off`.
    Write,
    /// Reads only: noted if the setting is `all`.
    Read,
}

/// An entry of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    at_us: i64,
    role: String,
    session_role: String,
    project: Option<String>,
    call: String,
    object: Option<String>,
    outcome: String,
}

/// Texts are cut to so many bytes: an entry has to fit a note.
const TEXT_BYTES: usize = 64;
const ROLLED_BACK: &str = "rolled back";

/// Runs a call that changes or exports something, and notes it with its outcome. `object` names what it is about: no
/// values, every member of the project reads it. An error that the server raises comes back as a value, to be raised
/// again at once.
pub fn call<T>(
    name: &'static str,
    project: Option<&str>,
    object: Option<&str>,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    noted(Kind::Write, name, project, object, work)
}

/// As [`call`], for one that only reads.
pub fn read<T>(
    name: &'static str,
    project: Option<&str>,
    object: Option<&str>,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    noted(Kind::Read, name, project, object, work)
}

fn noted<T>(
    kind: Kind,
    name: &'static str,
    project: Option<&str>,
    object: Option<&str>,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    // Before the work: it may change who the user is, and after an error nothing can be looked up.
    let Some(entry) = entry(kind, name, project, object) else {
        return work();
    };
    let outcome = xact::catch(work).and_then(|outcome| outcome);
    match &outcome {
        Ok(_) => succeeded(entry)?,
        Err(error) => failed(entry, error),
    }
    outcome
}

/// The entry of a call that succeeds; None: such calls are not noted.
fn entry(kind: Kind, name: &str, project: Option<&str>, object: Option<&str>) -> Option<Entry> {
    let wanted = match guc::audit() {
        Audit::Off => false,
        Audit::Write => kind == Kind::Write,
        Audit::All => true,
    };
    wanted.then(|| Entry {
        at_us: xact::now_us(),
        role: role_name(security::current_user()),
        session_role: role_name(security::session_user()),
        project: project.map(|name| cut(&name.to_ascii_lowercase())),
        call: name.to_owned(),
        object: object.map(cut),
        outcome: "ok".to_owned(),
    })
}

fn failed(entry: Entry, error: &PgError) {
    leave(&Entry {
        outcome: format!("error {}", error.sqlstate),
        ..entry
    });
}

/// What a worker notes of a call once its work takes effect; nothing, if such calls are not noted.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Note(Option<Entry>);

thread_local! {
    /// In a worker: what is to be noted.
    static EXPECTED: RefCell<Note> = RefCell::default();
}

/// As [`call`], for one whose work takes effect in a worker, whatever becomes of the caller's transaction: `work` hands the
/// note over to the worker, which notes the call itself. What fails is noted here.
pub fn at_once<T>(
    name: &'static str,
    project: Option<&str>,
    object: Option<&str>,
    work: impl FnOnce(Note) -> Result<T>,
) -> Result<T> {
    let entry = entry(Kind::Write, name, project, object);
    let note = Note(entry.clone());
    let outcome = xact::catch(|| work(note)).and_then(|outcome| outcome);
    if let (Err(error), Some(entry)) = (&outcome, entry) {
        failed(entry, error);
    }
    outcome
}

/// In a worker, before its work: what [`store_expected`] is to note.
pub fn expect(note: Note) {
    EXPECTED.set(note);
}

/// In a worker's transaction that takes effect, or in one at the end of all the work: notes the call, once.
pub fn store_expected() -> Result<()> {
    let Some(entry) = EXPECTED.with_borrow(|note| note.0.clone()) else {
        return Ok(());
    };
    insert(&entry)?;
    undo::at_end(|committed| {
        if committed {
            EXPECTED.take();
        }
    });
    Ok(())
}

fn succeeded(entry: Entry) -> Result<()> {
    if xact::ensure_writable("write").is_err() {
        leave(&entry);
        return Ok(());
    }
    {
        let _owner = ActAs::owner();
        insert(&entry)?;
    }
    undo::at_end(move |committed| {
        if !committed {
            leave(&Entry {
                outcome: ROLLED_BACK.to_owned(),
                ..entry
            });
        }
    });
    Ok(())
}

/// Stores an entry. The project's id is that of its name now; a project that is gone has none.
fn insert(entry: &Entry) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.audit_log (at, role, session_role, project_id, project, call, object, outcome)
         VALUES ($1, $2, $3, (SELECT project_id FROM rakam_internal.project WHERE name = $4), $4, $5, $6, $7)",
        &[
            spi::timestamptz(entry.at_us),
            arg(entry.role.as_str()),
            arg(entry.session_role.as_str()),
            arg(entry.project.as_deref()),
            arg(entry.call.as_str()),
            arg(entry.object.as_deref()),
            arg(entry.outcome.as_str()),
        ],
    )?;
    Ok(())
}

/// Leaves an entry to the worker; else it is in the server's log at least. Also while a transaction aborts.
fn leave(entry: &Entry) {
    let note = serde_json::to_vec(entry).unwrap_or_default();
    if note.len() > notes::BYTES || !notes::leave(&note) {
        PgError::new("00000", format!("audit: {}", entry.line())).log();
    }
}

/// Stores what was left to the worker. In the resident worker's transaction.
pub fn store(left: &[Vec<u8>]) -> Result<()> {
    for note in left {
        match serde_json::from_slice(note) {
            Ok(entry) => insert(&entry)?,
            Err(e) => PgError::internal(format!("unreadable audit entry: {e}")).log(),
        }
    }
    Ok(())
}

impl Entry {
    fn line(&self) -> String {
        format!(
            "role \"{}\" (session \"{}\") called {} for project \"{}\", object \"{}\": {}",
            self.role,
            self.session_role,
            self.call,
            self.project.as_deref().unwrap_or_default(),
            self.object.as_deref().unwrap_or_default(),
            self.outcome
        )
    }
}

fn role_name(role: crate::pg::Oid) -> String {
    roles::name(role).unwrap_or_else(|| format!("{}", u32::from(role)))
}

/// The start of a text, on a character boundary, without what JSON would have to escape at length.
fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end]
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
