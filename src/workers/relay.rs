//! The process of the relay: one in a database, started by the resident when there is something to publish, and gone when there has
//! been nothing for a while.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgrx::{pg_guard, pg_sys};

use crate::catalog::{event_store, job};
use crate::outbox::relay::{Relay, Turn};
use crate::pg::bgworker::{self, Worker};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::shared::{self, Slot};
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, exit, wait};

/// The job in whose name errors of the relay itself are noted.
const STEP: &str = "relay";
/// How long it stays without work.
const IDLE: Duration = Duration::from_secs(60);
const WAIT: Duration = Duration::from_secs(1);
/// While a called tick waits for a relay, it looks this often.
const LOOK: Duration = Duration::from_millis(20);

/// Starts a relay if something waits for one and none runs. False: there is no free slot for a worker.
pub fn start_if_needed(slot: &Slot) -> std::result::Result<bool, Failure> {
    if slot.relay.load(Ordering::Acquire) != 0
        || !xact::worker(|| event_store::has_work(View::Current))?
    {
        return Ok(true);
    }
    let started = bgworker::start_detached(&Worker {
        kind: "rakam relay",
        name: "rakam relay",
        function: "rakam_relay_main",
        argument: pg_sys::Datum::from(bgworker::my_database()),
        extra: &[],
        notify: false,
        restart_s: None,
    });
    Ok(started.is_ok())
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_relay_main(argument: pg_sys::Datum) {
    let database = pg_sys::Oid::from(argument.value() as u32);
    bgworker::begin(Some(database));
    let Some(slot) = shared::get().and_then(|s| s.find(database)) else {
        return;
    };
    let Some(_lock) = SessionLock::try_take(LockOn::Relay) else {
        return;
    };
    slot.relay.store(bgworker::my_pid(), Ordering::Release);
    exit::on_exit(leave);
    bgworker::show(Some(c"rakam relay"));
    let mut relay = match Relay::new() {
        Ok(relay) => relay,
        Err(error) => {
            error.warn();
            return;
        }
    };
    let mut idle_since = Instant::now();
    let mut failed = false;
    while idle_since.elapsed() < IDLE {
        bgworker::reload_if_asked();
        match relay.turn(WAIT) {
            Ok(Turn::Busy) => idle_since = Instant::now(),
            Ok(Turn::Idle) => {}
            Err(Failure::ExtensionGone) => return,
            Err(Failure::Error(error)) => {
                // What concerns a store is noted there; what comes here concerns the relay itself.
                failed = true;
                if !note(Some(&error)) {
                    return;
                }
                // It begins anew: what was under way is published again.
                relay = match Relay::new() {
                    Ok(relay) => relay,
                    Err(_) => return,
                };
                wait::wait(None, WAIT);
                continue;
            }
        }
        if failed {
            failed = false;
            if !note(None) {
                return;
            }
        }
    }
    if let Err(Failure::Error(error)) = relay.end() {
        error.warn();
    }
}

/// Notes how the relay does. False: the extension is gone.
fn note(error: Option<&PgError>) -> bool {
    let noted = match error {
        Some(error) => {
            error.clone().warn();
            xact::worker(|| job::failed(STEP, 0, &error.message))
        }
        None => xact::worker(|| job::succeeded(STEP, 0)),
    };
    !matches!(noted, Err(Failure::ExtensionGone))
}

/// Before the process lets go of shared memory.
fn leave() {
    if let Some(slot) = shared::get().and_then(|s| s.find(bgworker::my_database())) {
        let me = bgworker::my_pid();
        let _ = slot
            .relay
            .compare_exchange(me, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// Publishes what was committed before the call, in this process or by waiting for the relay: until it is done, every store that
/// has work struggles, or the time is over.
pub fn drain(most: Duration) -> std::result::Result<(), Failure> {
    let until = Instant::now() + most;
    let newest = xact::worker(|| {
        let view = View::Under(Snapshot::active());
        Ok((event_store::has_work(view)?, event_store::newest(view)?))
    })?;
    let (true, newest) = newest else {
        return Ok(());
    };
    let newest = newest.unwrap_or(0);
    let is_through = || {
        xact::worker(|| event_store::is_done_or_struggles(View::Under(Snapshot::active()), newest))
    };
    while Instant::now() < until {
        let Some(_lock) = SessionLock::try_take(LockOn::Relay) else {
            if is_through()? {
                return Ok(());
            }
            wait::wait(None, LOOK);
            continue;
        };
        let mut relay = Relay::new().map_err(Failure::Error)?;
        while Instant::now() < until {
            let turn = relay.turn(LOOK)?;
            if turn == Turn::Idle || relay.is_stuck() || newest > 0 && is_through()? {
                break;
            }
        }
        return relay.end();
    }
    Ok(())
}
