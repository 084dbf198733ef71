//! Background workers: each runs steps of `ingest` and `tiers`, none has logic of its own about events.
//!
//! A launcher (with shared_preload_libraries) keeps one resident worker per database that has the extension. A
//! called function that needs several transactions runs in a task worker, preload or not. State machine of a
//! resident: start → extension there? → lock taken? → cycles → extension gone: exit 0, error: back-off and go on,
//! crash: the launcher starts it again, later each time.

pub mod attach;
pub mod consumer;
pub mod cycle;
pub mod declare;
mod definitions;
pub mod delete;
mod files;
pub mod functions;
mod health;
pub mod helper;
pub mod launcher;
mod rebuild;
pub mod relay;
pub mod resident;
mod restore;
mod sources;
pub mod status;
pub mod stop;
mod storages;
pub mod task;

use crate::pg::{meter, notes, shared, xact};

/// In the postmaster: registers what starts with the server.
pub fn init() {
    shared::set_preloaded();
    shared::init();
    meter::init();
    notes::init();
    // What pg_upgrade copies has to be at rest, and what it has not copied yet is no catalogue.
    if !xact::in_binary_upgrade() {
        launcher::init();
    }
    stop::init();
}
