//! The mappers that come with rakam: SQL functions over `rakam_mappers`, and what sessions remember.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgrx::pg_extern;
use rakam_mappers::geoip::Places;
use rakam_mappers::session::{self as sessions, Actor, Visit};
use rakam_mappers::{referrer, user_agent, with};

use super::mapper;
use crate::catalog::session;
use crate::pg::jsonb::{JsonbText, JsonbTexts};
use crate::pg::mapped_file::MappedFile;
use crate::pg::{ErrorReport, PgError, Result, guc, xact};

/// Adds `browser`, `browser_version`, `os`, `device` by `_user_agent`. SQL: `rakam.map_user_agent(jsonb)`.
/// Errors, of all of these: 22023 not a JSON object.
#[pg_extern(immutable, strict, parallel_safe)]
fn map_user_agent(event: JsonbText) -> std::result::Result<JsonbText, ErrorReport> {
    let mapped = user_agent::map(&event.0).map_err(PgError::from)?;
    Ok(JsonbText(mapped.into_owned()))
}

/// Adds `referrer_host`, `referrer_medium`, `referrer_term` by `_referrer`. SQL: `rakam.map_referrer(jsonb)`.
#[pg_extern(immutable, strict, parallel_safe)]
fn map_referrer(event: JsonbText) -> std::result::Result<JsonbText, ErrorReport> {
    let mapped = referrer::map(&event.0).map_err(PgError::from)?;
    Ok(JsonbText(mapped.into_owned()))
}

/// Adds `country`, `region`, `city` by `_ip`, from the file `rakam.geoip_database`. Without a file that can be read
/// events stay as they are, and the session is warned once. SQL: `rakam.map_geoip(jsonb)`.
#[pg_extern(stable, strict, parallel_safe)]
fn map_geoip(event: JsonbText) -> std::result::Result<JsonbText, ErrorReport> {
    Ok(JsonbText(locate(&event.0)?))
}

/// Adds `_session_id` where it is missing, by `_user` or else `_device_id`: a pause longer than `rakam.session_gap`
/// begins a session. As a mapper it goes on with the sessions of the batches before; called by hand it knows only the
/// events it is given. SQL: `rakam.map_session(jsonb[])`.
#[pg_extern(volatile, strict, parallel_unsafe)]
fn map_session(events: JsonbTexts) -> std::result::Result<JsonbTexts, ErrorReport> {
    Ok(JsonbTexts(with_sessions(events.0)?))
}

/// The database of places, and the path at which it was found; None: it could not be read, and that was said.
struct Found {
    path: PathBuf,
    file: Option<(Places<Shared>, Shared)>,
    looked_at: std::time::Instant,
}

/// The mapped file, held by the reader and by who asks whether it has changed.
#[derive(Clone)]
struct Shared(std::rc::Rc<MappedFile>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// How often the path is looked at for another file.
const RELOAD: Duration = Duration::from_secs(5);

thread_local! {
    static PLACES: RefCell<Option<Found>> = const { RefCell::new(None) };
}

fn locate(event: &str) -> Result<String> {
    let path = guc::geoip_database();
    PLACES.with_borrow_mut(|found| {
        let is_current = found.as_ref().is_some_and(|found| found.is_current(&path));
        if !is_current {
            // The old one goes first: two databases need not be in memory.
            let warned = found
                .take()
                .is_some_and(|found| found.file.is_none() && found.path == path);
            *found = Some(Found::open(&path, warned));
        }
        match found.as_ref().and_then(|found| found.file.as_ref()) {
            Some((places, _)) => Ok(places.map(event)?.into_owned()),
            None => Ok(event.to_owned()),
        }
    })
}

impl Found {
    fn open(path: &Path, warned: bool) -> Self {
        let opened = match path.as_os_str().is_empty() {
            true => Err("no file is set".to_owned()),
            false => MappedFile::open(path)
                .map_err(|e| e.to_string())
                .and_then(|file| {
                    let file = Shared(std::rc::Rc::new(file));
                    let places = Places::new(file.clone()).map_err(|e| e.to_string())?;
                    Ok((places, file))
                }),
        };
        let file = match opened {
            Ok(file) => Some(file),
            Err(reason) => {
                if !warned {
                    PgError::new("01000", format!("events are not located: {reason}"))
                        .hint("rakam.geoip_database must be the path of a city database in MaxMind's format.")
                        .warn();
                }
                None
            }
        };
        Self {
            path: path.to_owned(),
            file,
            looked_at: std::time::Instant::now(),
        }
    }

    /// Whether it is still what the path leads to. What is in memory is looked at each time, since a file that is
    /// overwritten in place must not be read any more; the path every few seconds.
    fn is_current(&self, path: &Path) -> bool {
        if self.path != path {
            return false;
        }
        let is_recent = self.looked_at.elapsed() < RELOAD;
        match &self.file {
            Some((_, file)) if is_recent => file.0.is_unchanged(),
            Some((_, file)) => file.0.is_at(path),
            None => is_recent || path.as_os_str().is_empty(),
        }
    }
}

fn with_sessions(events: Vec<Option<String>>) -> Result<Vec<Option<String>>> {
    let around = mapper::surroundings();
    let (project_id, received_at_us, shift_us) = around.map_or_else(
        || (0, xact::now_us(), 0),
        |around| (around.project_id, around.received_at_us, around.shift_us),
    );
    let mut visits = Vec::with_capacity(events.len());
    for event in &events {
        visits.push(match event {
            Some(event) => Some(Visit::of(event, received_at_us, shift_us)?),
            None => None,
        });
    }
    let has_own: Vec<bool> = visits
        .iter()
        .map(|visit| visit.as_ref().is_some_and(|visit| visit.session.is_some()))
        .collect();
    // In the order of the hashes: two batches with the same users write in the same order.
    let mut by_actor: BTreeMap<Actor, Vec<&mut Visit>> = BTreeMap::new();
    for visit in visits.iter_mut().flatten() {
        if let Some(actor) = visit.actor {
            by_actor.entry(actor).or_default().push(visit);
        }
    }
    let gap_us = guc::session_gap().as_micros() as i64;
    for (actor, mut of_actor) in by_actor {
        let times = || of_actor.iter().map(|visit| visit.at_us);
        let (first_us, last_us) = (times().min().unwrap_or(0), times().max().unwrap_or(0));
        let known = match around {
            Some(_) => session::spans(
                project_id,
                &actor,
                first_us.saturating_sub(gap_us),
                last_us.saturating_add(gap_us),
            )?,
            None => Vec::new(),
        };
        let grown = sessions::assign(project_id, &actor, gap_us, known, &mut of_actor);
        if around.is_some() {
            for span in grown {
                session::append(project_id, &actor, &span)?;
            }
        }
    }
    Ok(events
        .into_iter()
        .zip(visits)
        .zip(has_own)
        .map(|((event, visit), has_own)| {
            let event = event?;
            match visit.and_then(|visit| visit.session) {
                Some(session) if !has_own => {
                    Some(with(&event, &[("_session_id", &session)]).into_owned())
                }
                _ => Some(event),
            }
        })
        .collect())
}
