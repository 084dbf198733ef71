//! The resident worker of a database: runs every periodic step, in cycles, and sleeps while nothing is to do.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pgrx::{pg_guard, pg_sys};

use super::cycle::Cycle;
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::shared::{self, Slot};
use crate::pg::xact::{self, Failure};
use crate::pg::{bgworker, exit, notes, security, wait, wake};

/// How long a resident waits for a CREATE EXTENSION that is not committed yet.
pub const WAIT_FOR_EXTENSION: Duration = Duration::from_secs(30);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_resident_main(argument: pg_sys::Datum) {
    let database = pg_sys::Oid::from(argument.value() as u32);
    bgworker::begin(Some(database));
    let Some(shared) = shared::get() else {
        return;
    };
    let Some(slot) = shared.find_or_take(database) else {
        return;
    };
    if !extension_comes(slot) {
        leave_alone(database, slot, || xact::worker(|| Ok(())).is_ok());
        return;
    }
    let Some(lock) = SessionLock::try_take(LockOn::Resident) else {
        return;
    };
    // The one before may have been given up meanwhile.
    let Some(slot) = shared.find_or_take(database) else {
        return;
    };
    slot.note_known();
    slot.set_absent(pg_sys::InvalidOid);
    slot.starved.store(false, Ordering::Release);
    slot.since_us.store(xact::now_us(), Ordering::Release);
    slot.pid.store(bgworker::my_pid(), Ordering::Release);
    exit::on_exit(leave);
    notes::begin();

    let mut cycle = Cycle::new(slot);
    loop {
        bgworker::reload_if_asked();
        match cycle.run() {
            Ok(pause) => wait::wait(None, pause),
            Err(Failure::ExtensionGone) => {
                drop(lock);
                follow(database, slot);
                return;
            }
            Err(Failure::Error(error)) => {
                // Each step keeps its own back-off; what comes here concerns the cycle itself.
                error.warn();
                wait::wait(None, Duration::from_secs(5));
            }
        }
    }
}

/// Nobody works on for an extension that is gone. If it was dropped and created again in one transaction, CREATE EXTENSION
/// has found this process here, which remembers the old one: another one begins anew.
fn follow(database: pg_sys::Oid, slot: &Slot) {
    let created_again = xact::catch(|| xact::plain(security::extension_oid));
    match created_again {
        Ok(Some(_)) => {
            super::launcher::start(database, slot);
        }
        Ok(None) => leave_alone(database, slot, || {
            matches!(
                xact::catch(|| xact::plain(security::extension_oid)),
                Ok(Some(_))
            )
        }),
        Err(error) => {
            // The launcher starts another one, which finds out.
            xact::abort();
            error.warn();
        }
    }
}

/// No resident is wanted, until a CREATE EXTENSION commits and says otherwise. One may just have done so: so it is looked again.
fn leave_alone(database: pg_sys::Oid, slot: &Slot, has_extension: impl Fn() -> bool) {
    slot.known.store(false, Ordering::Release);
    slot.starved.store(false, Ordering::Release);
    slot.set_absent(database);
    if has_extension()
        && let Some(shared) = shared::get()
    {
        shared.want(database);
    }
}

/// Before the process lets go of shared memory: the slot is free for another.
fn leave() {
    if let Some(slot) = shared::get().and_then(|s| s.find(bgworker::my_database())) {
        let me = bgworker::my_pid();
        let _ = slot
            .pid
            .compare_exchange(me, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// Whether the extension is installed. One started by CREATE EXTENSION waits for its commit.
fn extension_comes(slot: &Slot) -> bool {
    let expected = slot.since_us.load(Ordering::Acquire) < 0;
    let mut patience = if expected {
        WAIT_FOR_EXTENSION
    } else {
        Duration::ZERO
    };
    loop {
        if xact::worker(|| Ok(())).is_ok() {
            return true;
        }
        if patience.is_zero() {
            return false;
        }
        let pause = Duration::from_millis(100).min(patience);
        patience -= pause;
        wait::wait(None, pause);
    }
}

/// Called by CREATE EXTENSION: a resident starts now and waits for the commit. Nothing happens without preload.
pub fn start_with_extension() {
    wake::resident_at_commit();
    let database = bgworker::my_database();
    if let Some(slot) = shared::get().and_then(|s| s.find_or_take(database)) {
        slot.note_known();
        slot.set_absent(pg_sys::InvalidOid);
        slot.not_before_ms.store(0, Ordering::Release);
        if slot.pid.load(Ordering::Acquire) == 0 {
            // Marks that the extension is expected: see `extension_comes`.
            slot.since_us.store(-1, Ordering::Release);
            if super::launcher::start(database, slot) {
                super::launcher::back_off(slot, xact::now_us() / 1000);
            }
        }
    }
}
