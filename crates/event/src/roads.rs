//! What has to come out the same on two roads, held against each other: by the tests with seeded texts, by the fuzz
//! targets with any. Each function panics where the roads differ.

use arrow::array::{Array, ArrayRef, AsArray, StringArray};

use crate::batch::{BatchBuilder, Built, EventStamp, Layout};
use crate::discovery::Discovery;
use crate::entry::{self, Limits};
use crate::extra;
use crate::json::{self, Cutter};
use crate::keys::{Sight, Walk};
use crate::scan::Scanner;
use crate::schema::{EXTRA, FIRST_USER_FIELD_ID, Field, Schema};
use crate::types::FieldType;

/// Whether the text is an event, on both roads.
pub fn event(text: &str) -> bool {
    let careful = entry::explain_event(text);
    let scanned = entry::scan_event(&mut Scanner::new(text));
    assert_eq!(scanned.is_ok(), careful.is_ok(), "{text}");
    let limits = Limits {
        max_event_bytes: usize::MAX,
        ..Limits::default()
    };
    assert_eq!(entry::check_event(text, &limits), careful, "{text}");
    careful.is_ok()
}

/// Whether the text is a batch, split alike on both roads.
pub fn batch(text: &str, limits: &Limits) -> bool {
    let careful = entry::explain_batch(text, limits);
    assert_eq!(entry::split_batch(text, limits), careful, "{text}");
    careful.is_ok()
}

/// A walk on each road.
pub struct Roads {
    usual: Walk,
    careful: Walk,
}

impl Roads {
    pub fn new(fields: &[&str]) -> Self {
        Self {
            usual: Walk::new(fields.iter().copied()),
            careful: Walk::new(fields.iter().copied()),
        }
    }

    /// Whether the text is an object: the same names, values and refusals are seen in it.
    pub fn walk(&mut self, text: &str) -> bool {
        let Self { usual, careful } = self;
        let scanned = usual.scan(text).is_ok();
        assert_eq!(scanned, careful.read(text).is_ok(), "{text}");
        if !scanned {
            return false;
        }
        assert_eq!(seen(usual, text), seen(careful, text), "{text}");
        assert_eq!(usual.id(text), careful.id(text), "{text}");
        assert_eq!(usual.refused(), careful.refused(), "{text}");
        true
    }
}

fn seen<'a>(walk: &'a Walk, text: &'a str) -> Vec<(&'a str, &'a str)> {
    let name = |sight: &Sight| &*walk.slots()[sight.slot].name;
    walk.sights()
        .iter()
        .map(|sight| (name(sight), sight.raw(text)))
        .collect()
}

/// When these events were received.
pub const STAMP: EventStamp = EventStamp {
    received_at_us: 1_700_000_000_000_000,
    shift_us: 0,
    time_min_us: 1_699_000_000_000_000,
    time_max_us: 1_701_000_000_000_000,
    xid: 42,
};

/// The user fields of these names and types.
pub fn schema(ready: bool, fields: &[(String, FieldType)]) -> Schema {
    let fields = fields.iter().zip(FIRST_USER_FIELD_ID..);
    let fields = fields.map(|((name, ty), id)| Field {
        id,
        name: name.clone(),
        ty: *ty,
        added_version: 1,
        column_ready: ready,
    });
    Schema::new(1, fields.collect())
}

/// The batch of these events, all of which are good.
pub fn build(schema: &Schema, layout: Layout, limits: &Limits, events: &[&str]) -> Built {
    let mut builder = BatchBuilder::new(schema, layout, limits).expect("a builder");
    for event in events {
        assert_eq!(builder.push(event, &STAMP), Ok(()), "{event}");
    }
    assert_eq!(builder.rows(), events.len());
    builder.finish().expect("a batch")
}

pub(crate) fn column<'a>(built: &'a Built, name: &str) -> &'a ArrayRef {
    built.batch.column_by_name(name).expect("a column")
}

/// A row reads the same whenever its fields came: stored before they existed or after, or read from the inbox while they
/// are columns or not yet. `declared` exist from the beginning, the events show the others.
pub fn columns(declared: &[(String, FieldType)], events: &[&str], limits: &Limits) {
    const TABLE: Layout = Layout::Table { projection: None };
    let is_good = |event: &&&str| entry::check_event(event, limits).is_ok();
    let events: Vec<&str> = events.iter().filter(is_good).copied().collect();
    let old = schema(true, declared);
    let mut discovery = Discovery::new(&old, limits.max_fields);
    for event in &events {
        discovery.observe(event, STAMP.xid, STAMP.received_at_us);
    }
    let mut all = declared.to_vec();
    all.extend(discovery.new_fields());
    let ready = schema(true, &all);
    let mut pending = ready.clone();
    for field in &mut pending.fields[old.fields.len()..] {
        field.column_ready = false;
    }
    let limits = Limits {
        max_fields: all.len(),
        ..*limits
    };
    let stored_old = build(&old, Layout::Stored, &limits, &events);
    let stored_new = build(&ready, Layout::Stored, &limits, &events);
    let shown_pending = build(&pending, TABLE, &limits, &events);
    let shown_ready = build(&ready, TABLE, &limits, &events);
    let new: Vec<&Field> = ready.fields[old.fields.len()..].iter().collect();
    let old_extra = column(&stored_old, EXTRA).as_string();
    let new_extra = column(&stored_new, EXTRA).as_string();
    let promoted = extra::promote(old_extra, &new).expect("columns");
    for (field, array) in new.iter().zip(&promoted) {
        assert_eq!(array, column(&stored_new, &field.name), "{}", field.name);
        assert_eq!(array, column(&shown_ready, &field.name), "{}", field.name);
    }
    let add: Vec<(&Field, ArrayRef)> = new.iter().copied().zip(promoted).collect();
    let merged = |stored, drop: &[&Field], add: &[(&Field, ArrayRef)]| {
        extra::merge_extra(stored, drop, add).expect("texts")
    };
    let ready_extra = column(&shown_ready, EXTRA);
    let pending_extra = column(&shown_pending, EXTRA);
    same_extra(&merged(new_extra, &[], &[]), ready_extra, "new rows, ready");
    same_extra(
        &merged(old_extra, &new, &[]),
        ready_extra,
        "old rows, ready",
    );
    same_extra(
        &merged(new_extra, &[], &add),
        pending_extra,
        "new rows, pending",
    );
    same_extra(
        &merged(old_extra, &new, &add),
        pending_extra,
        "old rows, pending",
    );
}

/// The text as its value only, which also shows that it is JSON (serde_json's own values know no 1e400).
pub(crate) fn parsed(text: Option<&str>) -> Option<String> {
    let mut out = String::new();
    json::write_canonical(text?, &mut Cutter::off(), &mut out).expect("JSON");
    Some(out)
}

fn same_extra(left: &StringArray, right: &ArrayRef, what: &str) {
    let right = right.as_string::<i32>();
    assert_eq!(left.len(), right.len(), "{what}");
    for (row, (left, right)) in left.iter().zip(right).enumerate() {
        assert_eq!(parsed(left), parsed(right), "{what}, row {row}");
    }
}
