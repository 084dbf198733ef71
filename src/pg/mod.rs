//! The one audited unsafe layer over the server: everything else in the extension calls these safe
//! wrappers. Outside of it, `pg_sys` is named only by the callbacks of `fdw` and `workers`.

pub mod activity;
pub mod analyzed;
pub mod bgworker;
pub mod bytea;
pub mod cache;
pub mod condition;
pub mod cursor;
pub mod disk;
pub mod dsm;
pub mod error;
pub mod exit;
pub mod failpoint;
pub mod function;
pub mod guc;
pub mod heap;
pub mod invalidation;
pub mod jsonb;
pub mod locks;
pub mod mapped_file;
pub mod memory;
pub mod meter;
pub mod notes;
pub mod record;
pub mod relation;
pub mod roles;
pub mod runtime;
pub mod scratch;
pub mod scrub;
pub mod security;
pub mod server;
pub mod settings;
pub mod shared;
pub mod snapshot;
pub mod spare;
pub mod spi;
pub mod tenant;
pub mod transition;
pub mod types;
pub mod undo;
pub mod vacuum;
pub mod wait;
pub mod wake;
pub mod xact;

/// Microseconds from 1970-01-01 to 2000-01-01, the epoch of Postgres.
pub const PG_EPOCH_US: i64 = 946_684_800_000_000;

pub use error::{PgError, Result, not_null};
pub use pgrx::pg_sys::panic::ErrorReport;
pub use pgrx::pg_sys::{Datum, InvalidOid as INVALID_OID, Oid};
