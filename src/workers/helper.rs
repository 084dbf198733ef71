//! The resident's helpers: workers that flush and merge some collections, write files with deleted events anew, take care of
//! the storages, or compact, and end, so that nobody's digest waits for files or for a network. They exist while there is
//! something to do: one for compaction and one for the storages, which both may take long, and one for the rest.

use std::sync::atomic::Ordering;

use pgrx::{pg_guard, pg_sys};

use crate::catalog::job;
use crate::pg::bgworker::{self, Handle, Status, Worker};
use crate::pg::exit;
use crate::pg::shared;
use crate::pg::xact::{self, Failure};
use crate::tiers::gc::{self, Asked};
use crate::tiers::hot::Work;
use crate::tiers::{compact, flush, merge, rewrite};

/// The most collections that a helper works on: what fits a worker's argument block.
pub const MOST: usize = 28;

/// A helper that was started.
pub struct Helper {
    handle: Handle,
    work: Vec<(i32, Work)>,
}

impl Helper {
    /// Starts one for this work, and to write files of some collections anew, at most [`MOST`] together; gives the work back
    /// if there is no free slot for a worker.
    pub fn start(
        work: Vec<(i32, Work)>,
        rewrites: &[i32],
    ) -> std::result::Result<Self, Vec<(i32, Work)>> {
        match launch(&work, rewrites, &[], false) {
            Some(handle) => Ok(Self { handle, work }),
            None => Err(work),
        }
    }

    /// Starts one that compacts these collections, at most [`MOST`]; None: there is no free slot for a worker.
    pub fn compact(collections: &[i32]) -> Option<Self> {
        let handle = launch(&[], &[], collections, false)?;
        Some(Self {
            handle,
            work: Vec::new(),
        })
    }

    /// Starts one that sees after the storages; None: there is no free slot for a worker.
    pub fn care() -> Option<Self> {
        let handle = launch(&[], &[], &[], true)?;
        Some(Self {
            handle,
            work: Vec::new(),
        })
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

/// Starts a worker that knows from its argument block what to do: three counts, whether there is care to be taken, then
/// the collections.
fn launch(
    work: &[(i32, Work)],
    rewrites: &[i32],
    compactions: &[i32],
    care: bool,
) -> Option<Handle> {
    let counts = [work.len(), rewrites.len(), compactions.len(), care.into()];
    let counts = counts.map(|count| count as i32);
    // Ids are positive.
    let numbers = work.iter().map(|(id, work)| match work {
        Work::Flush => *id,
        Work::Merge => -id,
    });
    let extra: Vec<u8> = (counts.into_iter().chain(numbers))
        .chain(rewrites.iter().copied())
        .chain(compactions.iter().copied())
        .flat_map(i32::to_ne_bytes)
        .collect();
    let kind = match (compactions, care) {
        (_, true) => "rakam gc",
        ([], false) => "rakam flush",
        _ => "rakam compact",
    };
    bgworker::start(&Worker {
        kind,
        name: kind,
        function: "rakam_helper_main",
        argument: pg_sys::Datum::from(bgworker::my_database()),
        extra: &extra,
        notify: true,
        restart_s: None,
    })
    .ok()
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_helper_main(argument: pg_sys::Datum) {
    let database = pg_sys::Oid::from(argument.value() as u32);
    bgworker::begin(Some(database));
    let extra = bgworker::extra();
    let mut numbers = extra
        .chunks_exact(4)
        .map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let mut count = || numbers.next().unwrap_or(0) as usize;
    let (works, rewrites, compactions, care) = (count(), count(), count(), count() > 0);
    let numbers: Vec<i32> = numbers.take(works + rewrites + compactions).collect();
    if let Some(slot) = shared::get().and_then(|s| s.find(database)) {
        let place = match (compactions, care) {
            (_, true) => &slot.carer,
            (0, false) => &slot.helper,
            _ => &slot.compactor,
        };
        place.store(bgworker::my_pid(), Ordering::Release);
        exit::on_exit(leave);
    }
    bgworker::show(Some(match compactions {
        0 => c"rakam flush",
        _ => c"rakam compact",
    }));
    for (place, number) in numbers.into_iter().enumerate() {
        let id = number.abs();
        let (step, outcome) = if place >= works + rewrites {
            ("compact", compact::try_collection(id).map(|_| ()))
        } else if place >= works {
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

/// Notes how a step ended, unless the row is that of a project which some transaction is dropping; false: the extension is gone.
fn note(step: &'static str, id: i32, outcome: Result<(), Failure>) -> bool {
    let noted = match outcome {
        Ok(()) => xact::in_passing(|| job::succeeded(step, id)),
        Err(Failure::ExtensionGone) => return false,
        Err(Failure::Error(error)) => {
            error.clone().warn();
            xact::in_passing(|| job::failed(step, id, &error.message))
        }
    };
    match noted {
        Ok(_) => true,
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
        for place in [&slot.helper, &slot.compactor, &slot.carer] {
            let _ = place.compare_exchange(me, 0, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}
