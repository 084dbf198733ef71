//! The SQL function about sources that works in a task worker.

use pgrx::default;
use pgrx::prelude::*;
use rakam_sources::options::seek_target;

use super::task::{self, Task};
use crate::catalog::projects::{self, Right};
use crate::catalog::{audit, sources};
use crate::pg::security::ActAs;
use crate::pg::spi::View;
use crate::pg::{ErrorReport, PgError, not_null, xact};
use crate::sources::functions::unknown;
use crate::sources::seek::Request;

/// Lets a source go on elsewhere: at `earliest`, `latest`, a timestamp, or for single splits at the offsets of a JSON object. Splits
/// that have stopped go on as well.
/// SQL: `rakam.seek_source(project text, name text, target text, force boolean DEFAULT false)`.
/// Errors: 42501 no such project or not its admin, 42704 no such source or split, 22023 not a target, 55000 events could count twice,
/// 58030 the service cannot be reached, 53000 no worker slot.
#[pg_extern(sql = "
CREATE FUNCTION rakam.seek_source(project text, name text, target text, force boolean DEFAULT false) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn seek_source(
    project: Option<&str>,
    name: Option<&str>,
    target: Option<&str>,
    force: default!(Option<bool>, "false"),
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::at_once("seek_source", project, name, |note| {
        xact::ensure_writable("seek a source")?;
        let project = projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
        let name = sources::name_of(not_null(name, "name")?)?;
        let target = not_null(target, "target")?;
        let force = not_null(force, "force")?;
        let source = {
            let _owner = ActAs::owner();
            sources::named(View::Current, project.id, &name)?
        };
        let source = source.ok_or_else(|| unknown(&name))?;
        seek_target(source.kind, target).map_err(PgError::from)?;
        let task = Task::Seek(Request {
            project_id: project.id,
            name,
            target: target.to_owned(),
            force,
        });
        task::run_noted(task, note)?;
        Ok(())
    })?)
}
