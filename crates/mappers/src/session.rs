//! Sessions: events of one user or device with no longer pause between them than the gap.

use rakam_event::error::EventError;
use rakam_event::json::{self, Kind};
use rakam_event::time;
use sha2::{Digest, Sha256};

use crate::fields;

/// Whose session it is: a hash of the user, or where there is none of the device.
pub type Actor = [u8; 16];

/// One event, as far as its session depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    /// None: neither user nor device.
    pub actor: Option<Actor>,
    /// Microseconds since 1970.
    pub at_us: i64,
    /// The `_session_id` that the event has.
    pub session: Option<String>,
}

impl Visit {
    /// Reads an event that came in at `received_at_us`; an explicit `_time` is shifted by `shift_us`.
    pub fn of(event: &str, received_at_us: i64, shift_us: i64) -> Result<Self, EventError> {
        let [user, device, session, at] =
            fields(event, ["_user", "_device_id", "_session_id", "_time"])?;
        let actor = match (user.and_then(text), device.and_then(text)) {
            (Some(user), _) => Some(actor("user", &user)),
            (None, Some(device)) => Some(actor("device", &device)),
            (None, None) => None,
        };
        Ok(Self {
            actor,
            at_us: at
                .and_then(time::event_time)
                .map_or(received_at_us, |us| us.saturating_add(shift_us)),
            session: session.and_then(text),
        })
    }
}

/// A raw value that is a name: text or number.
fn text(raw: &str) -> Option<String> {
    match json::kind(raw) {
        Kind::String => json::string(raw).map(|text| text.into_owned()),
        Kind::Number => Some(raw.to_owned()),
        _ => None,
    }
    .filter(|text| !text.is_empty())
}

fn actor(kind: &str, name: &str) -> Actor {
    hash(&[kind.as_bytes(), name.as_bytes()])
}

fn hash(parts: &[&[u8]]) -> [u8; 16] {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    let whole: [u8; 32] = digest.finalize().into();
    let mut half = [0; 16];
    half.copy_from_slice(&whole[..16]);
    half
}

/// The id of a session: the same wherever it is computed from the same first event.
fn session_id(project_id: i32, actor: &Actor, first_us: i64) -> String {
    use std::fmt::Write;
    let id = hash(&[&project_id.to_be_bytes(), actor, &first_us.to_be_bytes()]);
    id.iter().fold(String::with_capacity(32), |mut out, byte| {
        let _infallible = write!(out, "{byte:02x}");
        out
    })
}

/// A session, as far as it is known: first and last event, in microseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub session: String,
    pub first_us: i64,
    pub last_us: i64,
}

impl Span {
    fn distance(&self, at_us: i64) -> i64 {
        (self.first_us.saturating_sub(at_us))
            .max(at_us.saturating_sub(self.last_us))
            .max(0)
    }

    fn extend(&mut self, at_us: i64) -> bool {
        let grows = at_us < self.first_us || at_us > self.last_us;
        self.first_us = self.first_us.min(at_us);
        self.last_us = self.last_us.max(at_us);
        grows
    }
}

/// Gives each visit of one actor its session, by `known` spans and the visits themselves, in the order of their
/// times. Returns the spans that are new or have grown, to be remembered.
pub fn assign(
    project_id: i32,
    actor: &Actor,
    gap_us: i64,
    known: Vec<Span>,
    visits: &mut [&mut Visit],
) -> Vec<Span> {
    let mut spans: Vec<(Span, bool)> = Vec::new();
    for span in known {
        match spans.iter_mut().find(|(s, _)| s.session == span.session) {
            Some((whole, _)) => {
                whole.extend(span.first_us);
                whole.extend(span.last_us);
            }
            None => spans.push((span, false)),
        }
    }
    visits.sort_by_key(|visit| visit.at_us);
    for visit in visits {
        let at_us = visit.at_us;
        let found = match &visit.session {
            Some(session) => spans.iter_mut().find(|(span, _)| span.session == *session),
            None => spans
                .iter_mut()
                .filter(|(span, _)| span.distance(at_us) <= gap_us)
                .min_by_key(|(span, _)| (span.distance(at_us), -span.last_us)),
        };
        match found {
            Some((span, changed)) => {
                *changed |= span.extend(at_us);
                visit.session.get_or_insert_with(|| span.session.clone());
            }
            None => {
                let session = visit
                    .session
                    .get_or_insert_with(|| session_id(project_id, actor, at_us));
                let span = Span {
                    session: session.clone(),
                    first_us: at_us,
                    last_us: at_us,
                };
                spans.push((span, true));
            }
        }
    }
    spans
        .into_iter()
        .filter_map(|(span, changed)| changed.then_some(span))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60_000_000;
    const GAP: i64 = 30 * MINUTE;

    fn visit(minute: i64) -> Visit {
        Visit {
            actor: Some([1; 16]),
            at_us: minute * MINUTE,
            session: None,
        }
    }

    /// Sessions of visits at these minutes, numbered in the order in which they come, and what is remembered.
    fn run(known: Vec<Span>, minutes: &[i64]) -> (Vec<String>, Vec<Span>) {
        let mut visits: Vec<Visit> = minutes.iter().copied().map(visit).collect();
        let mut refs: Vec<&mut Visit> = visits.iter_mut().collect();
        let spans = assign(1, &[1; 16], GAP, known, &mut refs);
        let sessions = visits
            .into_iter()
            .map(|v| v.session.unwrap_or_default())
            .collect();
        (sessions, spans)
    }

    #[test]
    fn a_pause_longer_than_the_gap_begins_a_session() {
        let (s, spans) = run(Vec::new(), &[0, 30, 60, 91, 10]);
        assert_eq!([&s[1], &s[2], &s[4]], [&s[0]; 3]);
        assert_ne!(s[3], s[0]);
        assert_eq!(s[0].len(), 32);
        assert_eq!(spans.len(), 2);
        assert_eq!((spans[0].first_us, spans[0].last_us), (0, 60 * MINUTE));
    }

    #[test]
    fn a_session_goes_on_over_batches() {
        let (first, spans) = run(Vec::new(), &[0, 5]);
        let (second, grown) = run(spans.clone(), &[35]);
        assert_eq!(second[0], first[0]);
        assert_eq!(grown[0].last_us, 35 * MINUTE);
        // Inside of what is known: nothing new to remember. Late, but within the gap: the same session.
        assert_eq!(
            run(spans.clone(), &[3]),
            (vec![first[0].clone()], Vec::new())
        );
        assert_eq!(run(spans.clone(), &[-30]).0[0], first[0]);
        assert_ne!(run(spans.clone(), &[-31]).0[0], first[0]);
        assert_ne!(run(spans, &[36]).0[0], first[0]);
        // The same first event: the same id, whoever computes it.
        assert_eq!(run(Vec::new(), &[0]).0, run(Vec::new(), &[0, 1]).0[..1]);
    }

    #[test]
    fn an_id_that_is_there_is_kept_and_goes_on() {
        let mut visits = [visit(0), visit(10), visit(100)];
        visits[0].session = Some("mine".to_owned());
        let mut refs: Vec<&mut Visit> = visits.iter_mut().collect();
        assign(1, &[1; 16], GAP, Vec::new(), &mut refs);
        assert_eq!(visits[0].session.as_deref(), Some("mine"));
        assert_eq!(visits[1].session.as_deref(), Some("mine"));
        assert_ne!(visits[2].session.as_deref(), Some("mine"));
    }

    #[test]
    fn events_tell_who_and_when() {
        let of = |event: &str| Visit::of(event, 7, 1_000).expect("an object");
        let user = of(r#"{"_user":"ada","_deviceId":"d"}"#);
        assert_eq!(
            user,
            Visit {
                actor: Some(actor("user", "ada")),
                at_us: 7,
                session: None
            }
        );
        assert_eq!(of(r#"{"_user":5}"#).actor, of(r#"{"_user":"5"}"#).actor);
        assert_eq!(
            of(r#"{"_device_id":"ada"}"#).actor,
            Some(actor("device", "ada"))
        );
        assert_ne!(of(r#"{"_device_id":"ada"}"#).actor, user.actor);
        assert_eq!(of(r#"{"_user":"","_session_id":"s"}"#).actor, None);
        assert_eq!(of(r#"{"_session_id":"s"}"#).session.as_deref(), Some("s"));
        assert_eq!(of(r#"{"_time":1000}"#).at_us, 1_001_000);
        assert_eq!(of(r#"{"_time":"soon"}"#).at_us, 7);
        assert!(Visit::of("1", 0, 0).is_err());
    }
}
