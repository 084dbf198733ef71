//! How users say where their events go.

use pgrx::{default, pg_extern};
use rakam_sources::publish::StoreOptions;

use crate::catalog::audit;
use crate::catalog::event_store::{self, NewStore};
use crate::catalog::projects::{self, Right};
use crate::catalog::restore;
use crate::pg::jsonb::JsonbText;
use crate::pg::security::{self, ActAs};
use crate::pg::{ErrorReport, PgError, Result, not_null, server, xact};
use crate::sources::service;

/// Sends what is collected in a project to Kafka or Kinesis from this transaction on, or (`server` NULL) stores it in Postgres
/// again; what was collected for another store before still goes there. The same call again lets the store look at the partitions
/// of its topics anew.
/// SQL: `rakam.set_event_store(project text, server text, options jsonb DEFAULT '{}')`. Options: `topic` for Kafka; `stream`
/// (required) and `partition_key` for Kinesis.
/// Errors: 42501 no such project or not its admin, or no USAGE on the server, 42704 no such server, 22023 an option is unknown,
/// missing or malformed, or nothing can be written to such a server.
#[pg_extern(volatile, parallel_unsafe)]
fn set_event_store(
    project: Option<&str>,
    server: Option<&str>,
    options: default!(Option<JsonbText>, "'{}'"),
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("set_event_store", project, server, || {
        set(
            not_null(project, "project")?,
            server,
            options.as_ref().map(|options| options.0.as_str()),
        )
    })?)
}

fn set(project: &str, server: Option<&str>, options: Option<&str>) -> Result<()> {
    xact::ensure_writable("set an event store")?;
    let project = projects::authorize(project, Right::Admin)?;
    restore::ensure_over()?;
    let Some(name) = server else {
        if options.is_some_and(|options| options.trim() != "{}") {
            return Err(
                PgError::new("22023", "Postgres as event store has no options")
                    .hint("With NULL as server, leave the options out."),
            );
        }
        let _owner = ActAs::owner();
        return event_store::unset(project.id);
    };
    if !server::is_usable(name, security::current_user()) {
        // Whether it exists is no secret: servers are in a catalog that everybody reads.
        let (kind, _) = service::of(name)?;
        let _ = kind;
        return Err(PgError::new(
            "42501",
            format!("permission denied for foreign server \"{name}\""),
        )
        .hint("GRANT USAGE ON FOREIGN SERVER allows a role to send events there."));
    }
    let (kind, service) = service::of(name)?;
    let text = options.unwrap_or("{}");
    let options = StoreOptions::parse(kind, text)?;
    // Options of the server that would lose events or their order are refused here.
    drop(service.publisher(&options)?);
    let _owner = ActAs::owner();
    event_store::set(&NewStore {
        project_id: project.id,
        project: &project.name,
        kind,
        server: name,
        options: text,
    })?;
    Ok(())
}
