//! The quota of what a project sends: events per second and bytes per UTC day; and the room that all of them share
//! ([`super::room`]). Every way in calls [`charge`] before it stores; what is refused is refused as a whole, so that a client knows what to send again.
//!
//! Rates are measured in shared memory (`pg::meter`). The bytes of a day are stored by the digest with the events
//! themselves, so that a restart forgets none; a rollback gives them back. Limits on collections and fields are those
//! of [`super::admission`] and of the registry.

use std::collections::HashMap;

use super::room;
use crate::catalog::inbox::TailRow;
use crate::catalog::projects::Project;
use crate::catalog::registry::ProjectRow;
use crate::catalog::usage;
use crate::pg::meter::Arrival;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, meter, xact};

/// Takes events of so many bytes of JSON in, on their way to the inbox; 53400 beyond the project's quota, 53100 if there is
/// no room for them.
pub fn charge(project: &Project, events: i64, bytes: i64) -> Result<()> {
    take(project, events, bytes, Arrival::Digest)
}

/// As [`charge`] for what is collected: on its way to an event store it has less room.
pub fn charge_collected(project: &Project, events: i64, bytes: i64) -> Result<()> {
    if project.event_store_id.is_some() {
        room::take_of_outbox(bytes)?;
    }
    charge(project, events, bytes)
}

/// As [`charge`] for events that the caller's transaction stores in the hot tier, without the digest: their bytes are
/// stored as usage here.
pub fn charge_stored(project: &Project, events: i64, bytes: i64) -> Result<()> {
    take(project, events, bytes, Arrival::Commit)?;
    note_stored(project, bytes)
}

/// A batch of a source.
#[derive(Debug, Default)]
pub struct Batch {
    pub events: usize,
    /// Of events that go straight into the hot tier, and of those that go through the inbox.
    pub stored_bytes: usize,
    pub inbox_bytes: usize,
    /// Of events that were charged when they were collected, on their way to the event store that they come back from.
    pub charged_bytes: usize,
}

/// As [`charge`] and [`charge_stored`], of a batch that cannot be made smaller: one that is of more events than a second may
/// have is taken in when nothing is owed, and what comes after it waits the longer; one that is of more bytes than a day may
/// have when it is the first of the day.
pub fn charge_batch(project: &Project, batch: &Batch) -> Result<()> {
    room::take((batch.stored_bytes + batch.inbox_bytes + batch.charged_bytes) as i64)?;
    let day = day_of(project);
    let inbox = (batch.inbox_bytes as i64).min(day);
    take_bytes(project, inbox, Arrival::Digest)?;
    take_bytes(
        project,
        (batch.stored_bytes as i64).min(day - inbox),
        Arrival::Commit,
    )?;
    if let Some(per_second) = project.quota.events_per_second.filter(|_| batch.events > 0) {
        let meter = meter::of(project.id);
        if !meter.take_batch(batch.events as i64, per_second) {
            return Err(refused(project, &format!("{per_second} events per second")));
        }
    }
    note_stored(project, batch.stored_bytes as i64)
}

/// As [`charge`], of a dead letter, which cannot be made smaller either, and for which there is room. Who is refused may go on:
/// no bytes are taken then.
pub fn charge_letter(project: &Project, events: i64, bytes: i64) -> Result<()> {
    if let Some(per_second) = project.quota.events_per_second {
        let meter = meter::of(project.id);
        let is_taken = match events > per_second {
            true => meter.take_batch(events, per_second),
            false => meter.take_events(events, per_second),
        };
        if !is_taken {
            return Err(refused(project, &format!("{per_second} events per second")));
        }
    }
    take_bytes(project, bytes.min(day_of(project)), Arrival::Digest)
}

/// What something may have of a day's bytes that cannot be made smaller.
fn day_of(project: &Project) -> i64 {
    match project.quota.bytes_per_day {
        Some(per_day) if per_day > 0 => per_day,
        _ => i64::MAX,
    }
}

fn take(project: &Project, events: i64, bytes: i64, arrival: Arrival) -> Result<()> {
    room::take(bytes)?;
    let quota = &project.quota;
    if quota.events_per_second.is_none() && quota.bytes_per_day.is_none() {
        return Ok(());
    }
    let meter = meter::of(project.id);
    if let Some(per_second) = quota.events_per_second
        && !meter.take_events(events, per_second)
    {
        return Err(
            refused(project, &format!("{per_second} events per second")).hint(
                "Send again later, and fewer events in a call than the quota allows for a second.",
            ),
        );
    }
    // Last: they are given back with the transaction only, and who is refused may go on in his.
    take_bytes(project, bytes, arrival)
}

/// Takes bytes of a day in, if the project's are bounded.
fn take_bytes(project: &Project, bytes: i64, arrival: Arrival) -> Result<()> {
    let Some(per_day) = project.quota.bytes_per_day.filter(|_| bytes > 0) else {
        return Ok(());
    };
    let stored = |day| {
        let _owner = ActAs::owner();
        let latest = Registered::latest();
        usage::of_day(View::Under(latest.get()), project.id, day)
    };
    if meter::of(project.id).take_bytes(bytes, per_day, arrival, stored)? {
        return Ok(());
    }
    Err(refused(project, &format!("{per_day} bytes per day"))
        .hint("The day ends at midnight UTC; rakam.set_quota raises the quota."))
}

/// Stores bytes as usage of today, if the project's are bounded.
fn note_stored(project: &Project, bytes: i64) -> Result<()> {
    if project.quota.bytes_per_day.is_some() && bytes > 0 {
        let _owner = ActAs::owner();
        usage::add(project.id, meter::today(xact::now_us()), bytes)?;
    }
    Ok(())
}

fn refused(project: &Project, quota: &str) -> PgError {
    PgError::new(
        "53400",
        format!(
            "project \"{}\" has reached its quota of {quota}",
            project.name
        ),
    )
    .detail("Nothing of this call was stored.")
}

/// Bytes that a digest has taken in, by project.
#[derive(Default)]
pub struct Digested {
    day: i32,
    bytes: HashMap<i32, i64>,
    /// The sums of the day, with these bytes.
    sums: HashMap<i32, i64>,
}

impl Digested {
    /// Counts a row of the inbox, if the project's bytes are counted.
    pub fn add(&mut self, project: &ProjectRow, row: &TailRow) {
        if !project.counts_bytes {
            return;
        }
        // Line breaks are ours.
        let bytes = row.payload.len() as i64 - i64::from(row.n) + 1;
        *self.bytes.entry(row.project_id).or_default() += bytes;
    }

    /// Stores the bytes, as of today, in the transaction that digests the events.
    pub fn store(&mut self) -> Result<()> {
        self.day = meter::today(xact::now_us());
        for (&project_id, &bytes) in &self.bytes {
            usage::add(project_id, self.day, bytes)?;
            let sum = usage::of_day(View::Current, project_id, self.day)?;
            self.sums.insert(project_id, sum);
        }
        Ok(())
    }

    /// After the commit: they are not on their way any more.
    pub fn tell(&self) {
        for (&project_id, &bytes) in &self.bytes {
            let sum = self.sums.get(&project_id).copied().unwrap_or(bytes);
            meter::digested(project_id, self.day, sum, bytes);
        }
    }
}
