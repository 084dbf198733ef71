//! The bytes of deleted events leave the pages of the tables that held them.
//!
//! VACUUM removes a dead row, but its bytes stay in the page. So each table that held deleted events is on a list until
//! every row that was removed of it by then is vacuumed and the free room of every page has been overwritten
//! ([`scrub`]). An old snapshot that still sees such a row only delays it. The inbox is emptied by [`super::rotate`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::catalog::deletion::{self, Erasure};
use crate::pg::scrub::{self, Scrubbed};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{Oid, relation, vacuum, wait};

/// Pages of one transaction: a few dozen milliseconds.
const STEP_PAGES: u32 = 4096;
/// Before a table is looked at again that has still to be vacuumed; longer each time.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// A walk over the pages of one table, its long values included.
#[derive(Debug)]
struct Walk {
    erasure: Erasure,
    heaps: Vec<Oid>,
    /// In the first of the heaps.
    next_page: u32,
    dirty: bool,
}

/// The background's place in its walks: it does a step at a time.
#[derive(Debug, Default)]
pub struct Eraser {
    walk: Option<Walk>,
    /// Tables that wait for a VACUUM: how often they were found so, and when to look again.
    waiting: HashMap<String, (u32, Instant)>,
}

impl Eraser {
    /// One bounded step. False: there is nothing to be done at this moment.
    pub fn step(&mut self) -> std::result::Result<bool, Failure> {
        if self.walk.is_none() {
            let now = Instant::now();
            let mut due = due()?;
            due.retain(|e| {
                self.waiting
                    .get(&e.relation)
                    .is_none_or(|(_, at)| *at <= now)
            });
            self.walk = due.into_iter().next().map(begin).transpose()?;
        }
        let Some(walk) = &mut self.walk else {
            return Ok(false);
        };
        if walk.step()? {
            return Ok(true);
        }
        let Some(walk) = self.walk.take() else {
            return Ok(false);
        };
        let table = walk.erasure.relation.clone();
        if walk.finish()? {
            self.waiting.remove(&table);
        } else {
            let (times, _) = self
                .waiting
                .get(&table)
                .copied()
                .unwrap_or((0, Instant::now()));
            let pause = (PAUSE * (1 << times.min(6))).min(PAUSE_MAX);
            self.waiting
                .insert(table, (times + 1, Instant::now() + pause));
        }
        Ok(true)
    }
}

/// Everything that can be erased now, with a VACUUM of the tables before. In a task worker.
pub fn all() -> std::result::Result<(), Failure> {
    for erasure in due()? {
        wait::check_interrupts();
        if let Err(error) = vacuum::table(&erasure.relation) {
            return Err(Failure::Error(error));
        }
        let mut walk = begin(erasure)?;
        while walk.step()? {}
        walk.finish()?;
    }
    Ok(())
}

/// The tables whose removed rows no snapshot can see any more.
fn due() -> std::result::Result<Vec<Erasure>, Failure> {
    xact::worker(|| {
        let mut due = deletion::erasures(View::Current)?;
        due.retain(|erasure| {
            let table = relation::oid("rakam_internal", &erasure.relation);
            table != crate::pg::INVALID_OID && erasure.after_xid < xact::horizon(table)
        });
        Ok(due)
    })
}

fn begin(erasure: Erasure) -> std::result::Result<Walk, Failure> {
    let heaps = xact::worker(|| {
        Ok(scrub::with_toast(relation::oid(
            "rakam_internal",
            &erasure.relation,
        )))
    })?;
    Ok(Walk {
        erasure,
        heaps,
        next_page: 0,
        dirty: false,
    })
}

impl Walk {
    /// The next pages; false at the end, or where a page has rows that VACUUM has not come to yet.
    fn step(&mut self) -> std::result::Result<bool, Failure> {
        let Some(&heap) = self.heaps.first() else {
            return Ok(false);
        };
        let done: Scrubbed = xact::worker(|| {
            Ok(scrub::pages(
                heap,
                self.next_page,
                STEP_PAGES,
                self.erasure.after_xid,
            ))
        })?;
        if done.dirty > 0 {
            self.dirty = true;
            return Ok(false);
        }
        self.next_page += done.pages;
        if done.end {
            self.heaps.remove(0);
            self.next_page = 0;
        }
        Ok(!self.heaps.is_empty())
    }

    /// Takes the table off the list if all of it is erased.
    fn finish(self) -> std::result::Result<bool, Failure> {
        if !self.dirty {
            xact::worker(|| deletion::erased(&self.erasure))?;
        }
        Ok(!self.dirty)
    }
}
