//! rakam: event analytics inside PostgreSQL. See ARCHITECTURE.md for the picture, the road of an event and of a query.

#![allow(
    clippy::result_large_err,
    reason = "pgrx's ErrorReport is large, and is made on the way out only"
)]

use pgrx::{extension_sql_file, pg_guard};

pub mod catalog;
pub mod fdw;
pub mod files;
pub mod ingest;
pub mod outbox;
pub mod pg;
pub mod projects;
pub mod sources;
#[cfg(any(test, feature = "pg_test"))]
mod tests;
pub mod tiers;
pub mod workers;

#[cfg(test)]
pub use tests::pg_test;

::pgrx::pg_module_magic!(name, version);

/// Lets functions be declared in this schema; bootstrap.sql makes it. Functions that name no schema are made in
/// `rakam`, the extension's own.
#[pgrx::pg_schema]
mod rakam_internal {}

// The SQL objects, in this order; functions come from `#[pg_extern]` beside their code, before those that name them.
extension_sql_file!("../sql/bootstrap.sql", name = "bootstrap", bootstrap);
extension_sql_file!(
    "../sql/catalog.sql",
    name = "catalog",
    requires = ["bootstrap"]
);
extension_sql_file!(
    "../sql/sources.sql",
    name = "sources",
    requires = ["catalog"]
);
extension_sql_file!("../sql/outbox.sql", name = "outbox", requires = ["sources"]);
extension_sql_file!(
    "../sql/mappers.sql",
    name = "mappers",
    requires = ["catalog"]
);
extension_sql_file!(
    "../sql/access.sql",
    name = "access",
    requires = [
        "outbox",
        "mappers",
        readable_projects,
        member_projects,
        announce_change
    ]
);
extension_sql_file!(
    "../sql/restore.sql",
    name = "restore",
    requires = ["access", note_restore]
);
extension_sql_file!(
    "../sql/views.sql",
    name = "views",
    requires = [
        "access",
        "restore",
        key_sets,
        storages,
        data_files,
        collection_sizes,
        lake,
        avro_schema,
        is_running
    ]
);
extension_sql_file!(
    "../sql/fdw.sql",
    name = "fdw",
    requires = [
        "catalog",
        fdw::options::fdw_validator,
        projects::objects::ensure_server_apart,
        sources::validator::source_validator
    ]
);
extension_sql_file!(
    "../sql/workers.sql",
    name = "workers",
    requires = ["views", installed, workers]
);
extension_sql_file!("../sql/finalize.sql", name = "finalize", finalize);

/// Called by Postgres when the library is loaded: in the postmaster with shared_preload_libraries, else in the
/// backend that first needs it.
#[allow(non_snake_case, reason = "the name is Postgres' own")]
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::guc::init();
    pg::analyzed::init();
    if pg::shared::loading_in_postmaster() {
        workers::init();
    }
}
