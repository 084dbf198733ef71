//! What the registry learns from events: new fields and their types, before the events become columns.

use crate::infer::{Inferred, infer};
use crate::keys::{NameKind, Walk};
use crate::schema::{DroppedField, Schema};
use crate::types::FieldType;

/// Collects the new fields of many events against a schema.
pub struct Discovery {
    walk: Walk,
    /// By slot; None while a name has shown no type.
    types: Vec<Option<FieldType>>,
    known: usize,
    /// How many fields the collection may still get.
    room: usize,
    dropped: Vec<DroppedField>,
}

impl Discovery {
    pub fn new(schema: &Schema, max_fields: usize) -> Self {
        let mut types: Vec<Option<FieldType>> = Vec::with_capacity(schema.fields.len());
        types.extend(schema.fields.iter().map(|f| Some(f.ty)));
        Self {
            walk: Walk::new(schema.fields.iter().map(|f| f.name.as_str())),
            known: types.len(),
            types,
            room: room(schema, max_fields),
            dropped: schema.dropped.iter().map(DroppedField::for_new).collect(),
        }
    }

    /// Learns from one event. The first event that shows a typable value of a field decides its type. An event
    /// that [`crate::batch::BatchBuilder::push`] refuses teaches nothing, nor does one from before the drop of a
    /// field about that field. `xid` and `received_at_us` are those of the event.
    pub fn observe(&mut self, event: &str, xid: i64, received_at_us: i64) {
        if self.room == 0 || self.walk.event(event).is_err() {
            return;
        }
        self.types.resize(self.walk.slots().len(), None);
        for sight in self.walk.sights() {
            let ty = &mut self.types[sight.slot];
            let slot = &self.walk.slots()[sight.slot];
            if ty.is_some() || slot.kind != NameKind::Field || self.room == 0 {
                continue;
            }
            let is_dropped =
                |d: &DroppedField| *d.name == *slot.name && d.hides(xid, received_at_us);
            if self.dropped.iter().any(is_dropped) {
                continue;
            }
            if let Inferred::Type(inferred) = infer(sight.raw(event)) {
                *ty = Some(inferred);
                self.room -= 1;
            }
        }
    }

    /// The new fields, sorted by name: names that can be columns, as many as the collection has room for.
    pub fn new_fields(self) -> Vec<(String, FieldType)> {
        let mut fields: Vec<(String, FieldType)> = self
            .walk
            .slots()
            .iter()
            .zip(&self.types)
            .skip(self.known)
            .filter_map(|(slot, ty)| Some((slot.name.to_string(), (*ty)?)))
            .collect();
        fields.sort_by(|a, b| a.0.cmp(&b.0));
        fields
    }
}

/// How many user fields a collection of this schema may still get.
pub(crate) fn room(schema: &Schema, max_fields: usize) -> usize {
    let user_fields = schema.fields.iter().filter(|f| f.is_user()).count();
    max_fields.saturating_sub(user_fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Field;

    fn learnt(schema: &Schema, max_fields: usize, events: &[&str]) -> Vec<(String, FieldType)> {
        let mut discovery = Discovery::new(schema, max_fields);
        for event in events {
            discovery.observe(event, 100, 0);
        }
        discovery.new_fields()
    }

    #[test]
    fn the_first_typable_value_decides() {
        let known = Field {
            id: 16,
            name: "known".to_owned(),
            ty: FieldType::Text,
            added_version: 1,
            column_ready: true,
        };
        let schema = Schema::new(1, vec![known]);
        let fields = learnt(
            &schema,
            500,
            &[
                r#"{"tags":[],"price":null,"known":1,"_time":1,"_user":"u","xmin":1,"big":1e30}"#,
                r#"{"Tags":["a"],"price":"x","price":2,"_new":true,"_id":"1"}"#,
                r#"{"tags":true,"price":"later","bad":1,"_project":"p"}"#,
                r#"{"bad":1"#,
                r#"[1]"#,
            ],
        );
        let expected = [
            ("_new", FieldType::Bool),
            ("price", FieldType::Float8),
            ("tags", FieldType::TextArray),
        ];
        assert!(fields.iter().map(|(n, t)| (n.as_str(), *t)).eq(expected));
    }

    #[test]
    fn an_event_from_before_a_drop_does_not_bring_the_field_back() {
        let dropped = crate::schema::DroppedField {
            name: "color".to_owned(),
            xid: 10,
            at_us: 1_000,
            own_since_us: i64::MIN,
        };
        let schema = Schema::new(1, Vec::new()).with_dropped(vec![dropped]);
        let found = |xid, at_us| {
            let mut discovery = Discovery::new(&schema, 500);
            discovery.observe(r#"{"Color":"red"}"#, xid, at_us);
            discovery.new_fields().len()
        };
        assert_eq!(found(9, 999), 0);
        // A later transaction, and a later call of an earlier one.
        assert_eq!(found(11, 999), 1);
        assert_eq!(found(9, 1_001), 1);
    }

    #[test]
    fn no_more_fields_than_allowed() {
        let schema = Schema::new(1, Vec::new());
        let events = [r#"{"z":1,"a":2}"#, r#"{"b":1}"#];
        let names = |max| -> Vec<String> {
            learnt(&schema, max, &events)
                .into_iter()
                .map(|(name, _)| name)
                .collect()
        };
        assert_eq!(names(0), [""; 0]);
        assert_eq!(names(1), ["z"]);
        assert_eq!(names(2), ["a", "z"]);
        assert_eq!(names(9), ["a", "b", "z"]);
    }
}
