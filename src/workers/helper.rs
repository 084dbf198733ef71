//! The resident's helper: a worker that flushes some collections and ends, so that nobody's digest waits for files to be
//! written. It exists while there is something to flush.

use std::sync::atomic::Ordering;

use pgrx::{pg_guard, pg_sys};

use crate::catalog::job;
use crate::pg::bgworker::{self, Handle, Status, Worker};
use crate::pg::shared;
use crate::pg::xact::{self, Failure};
use crate::pg::{Result, exit};
use crate::tiers::flush;

/// The most collections that a helper is given: what fits a worker's argument block.
pub const MOST: usize = 31;

/// A helper that was started.
pub struct Helper {
    handle: Handle,
    collections: Vec<i32>,
}

impl Helper {
    /// Starts one for these collections; gives them back if there is no free slot for a worker.
    pub fn start(collections: Vec<i32>) -> std::result::Result<Self, Vec<i32>> {
        let mut extra = (collections.len() as u32).to_ne_bytes().to_vec();
        for id in &collections {
            extra.extend_from_slice(&id.to_ne_bytes());
        }
        let started = bgworker::start(&Worker {
            kind: "rakam flush",
            name: "rakam flush",
            function: "rakam_helper_main",
            argument: pg_sys::Datum::from(bgworker::my_database()),
            extra: &extra,
            notify: true,
            restart_s: None,
        });
        match started {
            Ok(handle) => Ok(Self {
                handle,
                collections,
            }),
            Err(_) => Err(collections),
        }
    }

    pub fn works_on(&self, collection_id: i32) -> bool {
        self.collections.contains(&collection_id)
    }

    /// The collections of a helper that has ended, which is taken out then.
    pub fn ended(helper: &mut Option<Self>) -> Option<Vec<i32>> {
        if helper.as_ref()?.handle.status() != Status::Stopped {
            return None;
        }
        let ended = helper.take()?;
        ended.handle.release();
        Some(ended.collections)
    }
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_helper_main(argument: pg_sys::Datum) {
    let database = pg_sys::Oid::from(argument.value() as u32);
    bgworker::begin(Some(database));
    if let Some(slot) = shared::get().and_then(|s| s.find(database)) {
        slot.helper.store(bgworker::my_pid(), Ordering::Release);
        exit::on_exit(leave);
    }
    let extra = bgworker::extra();
    let mut numbers = extra
        .chunks_exact(4)
        .map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let n = numbers.next().unwrap_or(0) as usize;
    bgworker::show(Some(c"rakam flush"));
    for id in numbers.take(n) {
        let noted = match flush::try_collection(id) {
            Ok(_) => xact::worker(|| job::succeeded("flush", id)),
            Err(Failure::ExtensionGone) => return,
            Err(Failure::Error(error)) => {
                error.clone().warn();
                xact::worker(|| -> Result<()> { job::failed("flush", id, &error.message) })
            }
        };
        match noted {
            Ok(()) => {}
            Err(Failure::ExtensionGone) => return,
            Err(Failure::Error(error)) => error.warn(),
        }
    }
}

/// Before the process lets go of shared memory.
fn leave() {
    if let Some(slot) = shared::get().and_then(|s| s.find(bgworker::my_database())) {
        let me = bgworker::my_pid();
        let _ = slot
            .helper
            .compare_exchange(me, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}
