//! Rows of the internal tables as types: the only place with SQL text about them.
//!
//! Readers pass a [`crate::pg::spi::View`]: a foreign table's scan reads everything under one snapshot.

pub mod attached;
pub mod audit;
pub mod backlog;
pub mod collections;
pub mod compaction;
pub mod dead_letter;
pub mod deletion;
pub mod description;
pub mod dropping;
pub mod event_store;
pub mod former;
pub mod ids;
pub mod inbox;
pub mod invalid;
pub mod job;
pub mod load;
pub mod logs;
pub mod manifest;
pub mod mapper;
pub mod monitor;
pub mod orphans;
pub mod outbox;
pub mod places;
pub mod progress;
pub mod projects;
pub mod rebuild;
pub mod registry;
pub mod restore;
pub mod restored;
pub mod retention;
pub mod session;
pub mod source_schemas;
pub mod sources;
pub mod storages;
pub mod store;
mod three;
pub mod track;
pub mod usage;
