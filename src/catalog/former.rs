//! Names that collections had before they were renamed or dropped.
//!
//! Collect stores by name what is not registered yet, without looking at anybody's lock. An event may so be in flight
//! under a name while the name comes to mean something else. The rows here say, for such an event, what its name
//! meant when it was sent; they are few, and gone soon.

use crate::catalog::inbox::TailRow;
use crate::pg::Result;
use crate::pg::spi::{self, View, arg, xid8};

/// What a name meant until a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormerName {
    project_id: i32,
    name: String,
    until_xid: u64,
    until_at_us: i64,
    /// None: the collection was dropped.
    collection_id: Option<i32>,
}

/// To whom a row belongs that was stored by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Whoever has the name now.
    Present,
    Collection(i32),
    /// A collection that was dropped since.
    Nobody,
}

/// The former names of a project, or (None) of all, oldest first.
pub fn names(view: View, project_id: Option<i32>) -> Result<Vec<FormerName>> {
    spi::query(
        view,
        "SELECT project_id, name, until_xid, until_at, collection_id FROM rakam_internal.former_name
         WHERE $1 IS NULL OR project_id = $1 ORDER BY until_xid",
        &[arg(project_id)],
        |row| {
            Ok(FormerName {
                project_id: row.must(1)?,
                name: row.must(2)?,
                until_xid: row.xid8(3).unwrap_or(0),
                until_at_us: row.timestamptz(4).unwrap_or(i64::MIN),
                collection_id: row.get(5),
            })
        },
    )
}

/// Whose a row is that was stored by name, by the first change of that name after it.
pub fn owner(names: &[FormerName], row: &TailRow) -> Owner {
    // Both marks count: a transaction that began before the change may still send events after it.
    let before = |name: &&FormerName| {
        name.project_id == row.project_id
            && name.name == row.collection
            && row.txid < name.until_xid
            && row.received_at_us <= name.until_at_us
    };
    match names.iter().find(before) {
        None => Owner::Present,
        Some(name) => name.collection_id.map_or(Owner::Nobody, Owner::Collection),
    }
}

/// Notes that from this transaction on the name is not that of the collection any more, or (None) that what it
/// named is dropped. Nothing of the project is digested meanwhile.
pub fn retire(project_id: i32, name: &str, collection_id: Option<i32>) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.former_name (project_id, name, collection_id) VALUES ($1, $2, $3)",
        &[arg(project_id), arg(name), arg(collection_id)],
    )?;
    Ok(())
}

/// Forgets names that no un-digested event can be under, nor one that is still to be published: every transaction below
/// `digested_below` is digested.
pub fn forget(digested_below: u64) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.former_name f WHERE until_xid <= $1
           AND NOT EXISTS (SELECT FROM rakam_internal.outbox_0 o WHERE o.project_id = f.project_id AND o.collection_id = 0)
           AND NOT EXISTS (SELECT FROM rakam_internal.outbox_1 o WHERE o.project_id = f.project_id AND o.collection_id = 0)
           AND NOT EXISTS (SELECT FROM rakam_internal.outbox_2 o WHERE o.project_id = f.project_id AND o.collection_id = 0)",
        &[xid8(digested_below)],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, txid: u64, received_at_us: i64) -> TailRow {
        TailRow {
            id: 1,
            project_id: 1,
            collection_id: 0,
            collection: name.to_owned(),
            txid,
            n: 1,
            received_at_us,
            shift_us: 0,
            payload: Vec::new(),
        }
    }

    #[test]
    fn a_row_belongs_to_what_its_name_meant_when_it_was_sent() {
        let former = |name: &str, until_xid, collection_id| FormerName {
            project_id: 1,
            name: name.to_owned(),
            until_xid,
            until_at_us: until_xid as i64 * 100,
            collection_id,
        };
        let names = [former("a", 10, Some(7)), former("a", 20, None)];
        for (row, expected) in [
            (row("a", 9, 900), Owner::Collection(7)),
            (row("a", 11, 1_100), Owner::Nobody),
            (row("a", 21, 2_100), Owner::Present),
            // Of an older transaction, sent between the changes, and after both.
            (row("a", 9, 1_500), Owner::Nobody),
            (row("a", 9, 2_500), Owner::Present),
            (row("b", 9, 900), Owner::Present),
        ] {
            assert_eq!(owner(&names, &row), expected, "{row:?}");
        }
        let mut other = row("a", 9, 900);
        other.project_id = 2;
        assert_eq!(owner(&names, &other), Owner::Present);
    }
}
