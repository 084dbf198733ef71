//! The findings of `rakam.health`, from the tables.

use crate::catalog::{
    deletion, dropping, event_store, inbox, mapper, projects, rebuild, registry, restore, sources,
    storages,
};
use crate::ingest::room;
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::{self, View};
use crate::pg::{Result, cache, guc, memory, shared};

/// An event that has waited so long for its event store is worth a look.
const SLOW_STORE_S: f64 = 60.0;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok,
    Info,
    Warning,
    Error,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Finding {
    pub check: &'static str,
    pub status: Status,
    pub detail: String,
    pub hint: Option<String>,
}

impl Finding {
    fn new(check: &'static str, status: Status, detail: impl Into<String>) -> Self {
        Self {
            check,
            status,
            detail: detail.into(),
            hint: None,
        }
    }

    pub fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(check, Status::Ok, detail)
    }

    pub fn info(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(check, Status::Info, detail)
    }

    pub fn warning(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(check, Status::Warning, detail)
    }

    pub fn error(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(check, Status::Error, detail)
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// What concerns the caller's own projects, read as the caller.
pub fn of_projects() -> Result<Vec<Finding>> {
    let view = View::Under(Snapshot::active());
    let mut findings = vec![inbox_finding(view)?];
    let (parked, dead): (i64, i64) = spi::first(
        view,
        "SELECT (SELECT count(*) FROM rakam_internal.inbox_parked), (SELECT count(*) FROM rakam_internal.dead_letter)",
        &[],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?
    .unwrap_or((0, 0));
    findings.push(if parked + dead == 0 {
        Finding::ok("events set aside", "none")
    } else {
        Finding::warning(
            "events set aside",
            format!("{parked} parked events are tried again, {dead} are dead letters"),
        )
        .hint("See rakam.dead_letter for what could not be mapped or digested, and why; rakam.replay_dead_letters tries it again.")
    });
    findings.push(source_finding(view)?);
    findings.extend(store_finding()?);
    let (mappers, dropped) = mapper::totals(view)?;
    findings.push(Finding::ok(
        "mappers",
        format!("{mappers} mappers are set, which dropped {dropped} events"),
    ));
    let (tables, columns): (i64, i64) = spi::first(
        view,
        "SELECT (SELECT count(*) FROM rakam_internal.collection WHERE ft IS NULL),
                (SELECT count(*) FROM rakam_internal.field
                 WHERE NOT column_ready AND added_at < pg_catalog.now() - interval '10 seconds')",
        &[],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?
    .unwrap_or((0, 0));
    let in_the_way = registry::obstructed(view)?;
    let dropped = registry::without_table(view)?;
    findings.push(if !dropped.is_empty() {
        Finding::warning(
            "schema",
            format!("tables that were dropped by hand: {}", dropped.join(", ")),
        )
        .hint(
            "Their events are kept, and \"_all\" has them. rakam.create_collection makes such a table again, \
             rakam.drop_collection drops its events, too.",
        )
    } else if !in_the_way.is_empty() {
        Finding::warning(
            "schema",
            format!("tables that cannot be made: {}", in_the_way.join(", ")),
        )
        .hint("Something else has the name, or the project's schema is gone; until then \"_all\" has the events.")
    } else if tables + columns == 0 {
        Finding::ok("schema", "every collection and field is there")
    } else {
        Finding::info(
            "schema",
            format!("{tables} tables and {columns} columns are still to be made"),
        )
        .hint("Long queries on a collection delay its new columns; until then values are read from \"_extra\".")
    });
    Ok(findings)
}

fn source_finding(view: View) -> Result<Finding> {
    let (count, stopped, struggling) = sources::conditions(view)?;
    Ok(if !stopped.is_empty() {
        Finding::error(
            "sources",
            format!("splits have stopped: {}", stopped.join("; ")),
        )
        .hint("rakam.seek_source lets them go on where you say.")
    } else if !struggling.is_empty() {
        Finding::warning("sources", struggling.join("; "))
            .hint("Reading goes on by itself once this is over; see rakam.stat_source.")
    } else {
        Finding::ok("sources", format!("{count} sources"))
    })
}

/// What waits for event stores, if any project of the caller's has one.
fn store_finding() -> Result<Option<Finding>> {
    let projects = match security::is_server_admin(security::current_user()) {
        true => None,
        false => Some(projects::scope()?.member.clone()),
    };
    let backlogs = event_store::backlogs(projects.as_deref())?;
    if backlogs.is_empty() {
        return Ok(None);
    }
    let shown: Vec<String> = backlogs
        .iter()
        .filter(|b| b.events > 0 || b.last_error.is_some())
        .take(5)
        .map(|b| {
            let age = b
                .oldest_s
                .map_or(String::new(), |s| format!(", the oldest for {s:.0} s"));
            let error = b
                .last_error
                .as_ref()
                .map_or(String::new(), |e| format!(": {e}"));
            format!(
                "{} events of \"{}\" wait for \"{}\"{age}{error}",
                b.events, b.project, b.server
            )
        })
        .collect();
    let finding = if backlogs
        .iter()
        .any(|b| b.events > 0 && b.last_error.is_some())
    {
        Finding::error("event stores", shown.join("; ")).hint(
            "Nothing is lost: they are sent when the service takes them again. Check its address and the user mapping of the \
             server's owner; collecting goes on up to rakam.max_hot_bytes.",
        )
    } else if backlogs
        .iter()
        .any(|b| b.oldest_s.is_some_and(|s| s > SLOW_STORE_S))
    {
        Finding::warning("event stores", shown.join("; "))
            .hint("The relay may lack a slot for a worker (max_worker_processes), or the service is slow.")
    } else {
        let events: i64 = backlogs.iter().map(|b| b.events).sum();
        Finding::ok("event stores", format!("{events} events wait to be sent"))
    };
    Ok(Some(finding))
}

fn inbox_finding(view: View) -> Result<Finding> {
    let tick = inbox::tick(view)?;
    let age_s: Option<f64> = spi::first(
        view,
        "SELECT extract(epoch FROM pg_catalog.clock_timestamp() - min(received_at))::float8 FROM (
           (SELECT received_at FROM rakam_internal.inbox_0 WHERE txid >= $1 ORDER BY txid, id LIMIT 1)
           UNION ALL (SELECT received_at FROM rakam_internal.inbox_1 WHERE txid >= $1 ORDER BY txid, id LIMIT 1)
           UNION ALL (SELECT received_at FROM rakam_internal.inbox_2 WHERE txid >= $1 ORDER BY txid, id LIMIT 1)) i",
        &[spi::xid8(tick.snapshot.xmax)],
        |row| Ok(row.get(1)),
    )?
    .flatten();
    let lagging = spi::query(
        view,
        "SELECT p.name || ' for ' || extract(epoch FROM pg_catalog.clock_timestamp() - l.since)::int8 || ' s'
         FROM rakam_internal.inbox_lag l JOIN rakam_internal.project p USING (project_id) ORDER BY l.since LIMIT 5",
        &[],
        |row| row.must::<String>(1),
    )?;
    if !lagging.is_empty() {
        return Ok(Finding::warning(
            "inbox",
            format!("more comes than is digested of: {}", lagging.join(", ")),
        )
        .hint("Queries read it all the same, and other projects do not wait; send less, or limit it by a quota."));
    }
    let limit_s = guc::digest_max_age().as_secs_f64() + 30.0;
    Ok(match age_s {
        None => Finding::ok("inbox", "everything is digested"),
        Some(age) if age <= limit_s => {
            Finding::ok("inbox", format!("the oldest event waits for {age:.0} s"))
        }
        Some(age) => Finding::warning(
            "inbox",
            format!("the oldest event has waited for {age:.0} s"),
        )
        .hint("Queries read it all the same; see rakam.stat_worker for what keeps the digest."),
    })
}

/// What concerns the server, read as the owner.
pub fn of_server() -> Result<Vec<Finding>> {
    let _owner = ActAs::owner();
    let view = View::Under(Snapshot::active());
    let mut findings = Vec::new();
    let failing = spi::query(
        view,
        "SELECT job_key || ' failed ' || failures || ' times: ' || last_error
         FROM rakam_internal.job WHERE failures > 0 ORDER BY error_at DESC LIMIT 20",
        &[],
        |row| row.must::<String>(1),
    )?;
    if failing.is_empty() {
        findings.push(Finding::ok("background work", "nothing fails"));
    }
    for detail in failing {
        findings.push(
            Finding::warning("background work", detail)
                .hint("It is tried again by itself, later each time."),
        );
    }
    if let Some(lack) = restore::lack(view)? {
        findings.push(
            Finding::error(
                "restore",
                format!(
                    "a restore is under way, or was interrupted: {lack}. Nothing is digested, written or deleted before it is through"
                ),
            )
            .hint(
                "Wait for it. If it has failed, restore what is missing, or all of it into an empty database; to go on without: \
                 DELETE FROM rakam_internal.restore.",
            ),
        );
    }
    findings.extend(storage_findings(view)?);
    findings.push(hot_finding()?);
    findings.push(deletion_finding(view)?);
    findings.push(horizon_finding(view)?);
    findings.push(memory_finding());
    findings.extend(dropping_finding(view)?);
    let missing: Vec<String> = projects::lacking_roles(view)?
        .into_iter()
        .map(|project| project.name)
        .collect();
    findings.push(if missing.is_empty() {
        Finding::ok("roles", "every project has its roles, and they their privileges")
    } else {
        Finding::error(
            "roles",
            format!("roles, or their privileges, are missing of: {}", missing.join(", ")),
        )
        .hint("rakam.repair_roles() gives them back; until then only superusers can use all of these projects.")
    });
    Ok(findings)
}

/// Which transactions have dropped a project and have not ended.
fn dropping_finding(view: View) -> Result<Option<Finding>> {
    let dropping: Vec<String> = dropping::all(view)?
        .into_iter()
        .map(|d| match (d.pid, d.prepared) {
            (Some(pid), _) => format!("{} by process {pid}", d.project),
            (None, Some(gid)) => format!("{} by prepared transaction \"{gid}\"", d.project),
            (None, None) => d.project,
        })
        .collect();
    if dropping.is_empty() {
        return Ok(None);
    }
    Ok(Some(
        Finding::warning("projects being dropped", dropping.join(", "))
            .hint("Their events wait until that transaction commits or is rolled back; other projects do not."),
    ))
}

/// How the storages stand, as the workers noted it: nothing is asked of a storage here.
fn storage_findings(view: View) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut bucket = false;
    for s in storages::conditions(view)? {
        let name = &s.name;
        bucket |= !matches!(s.kind.as_str(), "local" | "file");
        findings.push(match (s.kind.as_str(), &s.failing_since) {
            ("local", _) => Finding::ok("storage", format!("{name} is in this database")),
            (_, Some(since)) => {
                let error = s.last_error.as_deref().unwrap_or("unknown error");
                Finding::error("storage", format!("{name} fails since {since}: {error}")).hint(
                    "Collecting goes on; data files cannot be written or read until it is back.",
                )
            }
            ("file", None) => {
                Finding::info("storage", format!("{name} is a directory of this machine"))
                    .hint("A standby and a backup of the database do not carry it.")
            }
            (_, None) => Finding::ok("storage", format!("{name} was reached")),
        });
        if let Some(owner) = &s.owner {
            findings.push(
                Finding::warning(
                    "storage owner",
                    format!("{name} is not this database's, so nothing is deleted there; it belongs to {owner}"),
                )
                .hint(format!(
                    "If this database is to go on with it, and nobody else: SELECT rakam.adopt_storage({}).",
                    spi::quote_literal(name)
                )),
            );
        }
        if s.missing + s.corrupt > 0 {
            findings.push(
                Finding::error(
                    "storage contents",
                    format!(
                        "{name} lacks {} data files, and {} are corrupt",
                        s.missing, s.corrupt
                    ),
                )
                .hint("rakam.check_storage lists them; restore them from a backup of the storage."),
            );
        }
    }
    for name in rebuild::unfinished_storages(view)? {
        findings.push(
            Finding::warning(
                "rebuild",
                format!("the catalog of {name} is not rebuilt to its end, so nothing of it is compacted or deleted"),
            )
            .hint(format!(
                "Wait for it; if it was interrupted: SELECT * FROM rakam.rebuild_catalog({}).",
                spi::quote_literal(&name)
            )),
        );
    }
    if bucket {
        findings.push(cache_finding());
    }
    Ok(findings)
}

/// How full the hot tier is.
fn hot_finding() -> Result<Finding> {
    let room = room::measure()?;
    let detail = format!("{} of {} MB", room.used.div_ceil(1 << 20), room.limit >> 20);
    Ok(if room.used >= room.limit {
        Finding::error("hot tier", format!("{detail}: events are refused")).hint(
            "Data files are not written fast enough: see rakam.stat_lake; or raise rakam.max_hot_bytes.",
        )
    } else if room.used >= room.limit / 4 * 3 {
        Finding::warning("hot tier", detail)
            .hint("At rakam.max_hot_bytes events are refused: see rakam.stat_lake for what keeps data files.")
    } else {
        Finding::ok("hot tier", detail)
    })
}

/// The blocks of buckets' objects on this machine.
fn cache_finding() -> Finding {
    let Some(directory) = cache::directory() else {
        return Finding::info("cache", "no blocks of buckets are kept on this machine").hint(
            "Queries fetch from the bucket each time; see rakam.cache_dir and rakam.cache_size.",
        );
    };
    match directory.prove().and_then(|()| directory.usage()) {
        Ok(usage) => Finding::ok(
            "cache",
            format!(
                "{} of {} MB in rakam.cache_dir",
                usage.bytes.div_ceil(1 << 20),
                usage.limit >> 20
            ),
        ),
        Err(e) => Finding::warning("cache", format!("rakam.cache_dir cannot be used: {e}"))
            .hint("Queries fetch from the bucket each time; the directory must belong to the server's user, and to nobody else."),
    }
}

/// What is still stored of deleted events.
fn deletion_finding(view: View) -> Result<Finding> {
    let (events, objects, age_s, tables) = deletion::pending(view)?;
    Ok(if objects + tables == 0 {
        Finding::ok("deleted events", "nothing of them is stored")
    } else if objects == 0 {
        Finding::info(
            "deleted events",
            format!("the pages of {tables} tables are still to be wiped"),
        )
        .hint("It is done by itself; VACUUM and rakam.tick() hurry it, an old snapshot delays it.")
    } else {
        Finding::info(
            "deleted events",
            format!("{events} are hidden in {objects} chunks and files, for up to {age_s:.0} s"),
        )
        .hint("They are left out when those are written anew; rakam.flush() does it now.")
    })
}

/// What queries hold at this moment.
fn memory_finding() -> Finding {
    let (used, limit) = (memory::bytes_in_use(), guc::memory_limit_bytes());
    let whose = if shared::preloaded() {
        "the server"
    } else {
        "this session"
    };
    // Rounded up: 0 is nothing at all.
    let detail = format!(
        "{} of {} MB in use by {whose}",
        used.div_ceil(1 << 20),
        limit >> 20
    );
    if used <= limit / 10 * 9 {
        Finding::ok("engine memory", detail)
    } else {
        Finding::warning("engine memory", detail)
            .hint("Queries beyond it fail; raise rakam.memory_limit or run fewer at a time.")
    }
}

/// Who keeps inbox tables and dead rows from being emptied.
fn horizon_finding(view: View) -> Result<Finding> {
    let oldest = spi::first(
        view,
        "SELECT pid, extract(epoch FROM pg_catalog.clock_timestamp() - xact_start)::float8
         FROM pg_catalog.pg_stat_activity
         WHERE backend_xmin IS NOT NULL AND pid <> pg_catalog.pg_backend_pid()
           AND datname = pg_catalog.current_database() AND xact_start IS NOT NULL
         ORDER BY xact_start LIMIT 1",
        &[],
        |row| Ok((row.must::<i32>(1)?, row.get::<f64>(2).unwrap_or(0.0))),
    )?;
    Ok(match oldest {
        Some((pid, age)) if age > 3600.0 => Finding::warning(
            "horizon",
            format!("process {pid} holds a snapshot of {age:.0} s ago"),
        )
        .hint("The inbox cannot be emptied before it ends; end it with pg_terminate_backend if it is forgotten."),
        _ => Finding::ok("horizon", "no old snapshot is held"),
    })
}
