//! The resident's helper: a worker that flushes and merges some collections, writes files with deleted events anew, takes
//! care of the storages, and ends, so that nobody's digest waits for files or for a network. It exists while there is something to do.

use std::sync::atomic::Ordering;

use pgrx::{pg_guard, pg_sys};

use crate::catalog::job;
use crate::pg::bgworker::{self, Handle, Status, Worker};
use crate::pg::exit;
use crate::pg::shared;
use crate::pg::xact::{self, Failure};
use crate::tiers::gc::{self, Asked};
use crate::tiers::hot::Work;
use crate::tiers::{flush, merge, rewrite};

/// The most collections that a helper works on: what fits a worker's argument block.
pub const MOST: usize = 30;

/// A helper that was started.
pub struct Helper {
    handle: Handle,
    work: Vec<(i32, Work)>,
}

impl Helper {
    /// Starts one for this work, and to write files of some collections anew, at most [`MOST`] together, and with `care`
    /// to see after the storages; gives the work back if there is no free slot for a worker.
    pub fn start(
        work: Vec<(i32, Work)>,
        rewrites: &[i32],
        care: bool,
    ) -> std::result::Result<Self, Vec<(i32, Work)>> {
        // The sign of the first number says whether there is care to be taken.
        let works = work.len() as i32;
        let mut extra = (if care { -1 - works } else { works })
            .to_ne_bytes()
            .to_vec();
        extra.extend_from_slice(&(rewrites.len() as i32).to_ne_bytes());
        // Ids are positive.
        let numbers = work.iter().map(|(id, work)| match work {
            Work::Flush => *id,
            Work::Merge => -id,
        });
        for number in numbers.chain(rewrites.iter().copied()) {
            extra.extend_from_slice(&number.to_ne_bytes());
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
            Ok(handle) => Ok(Self { handle, work }),
            Err(_) => Err(work),
        }
    }

    pub fn works_on(&self, collection_id: i32) -> bool {
        self.work.iter().any(|(id, _)| *id == collection_id)
    }

    /// The work of a helper that has ended, which is taken out then.
    pub fn ended(helper: &mut Option<Self>) -> Option<Vec<(i32, Work)>> {
        if helper.as_ref()?.handle.status() != Status::Stopped {
            return None;
        }
        let ended = helper.take()?;
        ended.handle.release();
        Some(ended.work)
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
    let mut count = || numbers.next().unwrap_or(0);
    let (works, rewrites) = (count(), count() as usize);
    let care = works < 0;
    let works = if care { -1 - works } else { works } as usize;
    let numbers: Vec<i32> = numbers.take(works + rewrites).collect();
    bgworker::show(Some(c"rakam flush"));
    for (place, number) in numbers.into_iter().enumerate() {
        let id = number.abs();
        let (step, outcome) = if place >= works {
            ("rewrite", rewrite::try_collection(id).map(|_| ()))
        } else if number > 0 {
            ("flush", flush::try_collection(id).map(|_| ()))
        } else {
            ("merge", merge::collection(id).map(|_| ()))
        };
        if !note(step, id, outcome) {
            return;
        }
    }
    if care {
        bgworker::show(Some(c"rakam gc"));
        note("gc", 0, gc::storages(Asked::ByTime).map(|_| ()));
    }
}

/// Notes how a step ended; false: the extension is gone.
fn note(step: &'static str, id: i32, outcome: Result<(), Failure>) -> bool {
    let noted = match outcome {
        Ok(()) => xact::worker(|| job::succeeded(step, id)),
        Err(Failure::ExtensionGone) => return false,
        Err(Failure::Error(error)) => {
            error.clone().warn();
            xact::worker(|| job::failed(step, id, &error.message))
        }
    };
    match noted {
        Ok(()) => true,
        Err(Failure::ExtensionGone) => false,
        Err(Failure::Error(error)) => {
            error.warn();
            true
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
