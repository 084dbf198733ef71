//! A collection's schema: fields with ids that never change meaning.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{Field as ArrowField, Schema as ArrowSchema, SchemaRef};

use crate::types::FieldType;

/// The metadata key under which Arrow and Parquet carry a field's id.
pub const FIELD_ID_KEY: &str = "PARQUET:field_id";
/// User fields have ids from here on; below are the system fields.
pub const FIRST_USER_FIELD_ID: i32 = 16;
/// A list's element needs an id of its own in Iceberg: the field's id plus this.
pub const ELEMENT_ID_OFFSET: i32 = 1_000_000;

pub const TIME: &str = "_time";
pub const USER: &str = "_user";
pub const ID: &str = "_id";
pub const RECEIVED_AT: &str = "_received_at";
pub const EXTRA: &str = "_extra";
/// The top-level transaction id of the event's origin, hidden from users.
pub const XID: &str = "_xid";
pub const XID_FIELD_ID: i32 = 11;

/// The system fields every collection has, in the order of its columns: id, name, type.
/// The hidden `_xid` (bigint) is not among them: it is in chunks and files only.
pub const SYSTEM_FIELDS: [(i32, &str, FieldType); 10] = [
    (1, TIME, FieldType::Timestamptz),
    (2, USER, FieldType::Text),
    (3, ID, FieldType::Text),
    (4, "_device_id", FieldType::Text),
    (5, "_session_id", FieldType::Text),
    (6, "_ip", FieldType::Text),
    (7, "_user_agent", FieldType::Text),
    (8, "_referrer", FieldType::Text),
    (9, RECEIVED_AT, FieldType::Timestamptz),
    (10, EXTRA, FieldType::Jsonb),
];

/// One field of a collection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Field {
    pub id: i32,
    pub name: String,
    pub ty: FieldType,
    /// The schema version that first had it; 0 for system fields.
    pub added_version: i32,
    /// False while the foreign table has no such column yet: the value is then read through `_extra`.
    pub column_ready: bool,
}

impl Field {
    /// Whether it is the project's own, not a system field.
    pub fn is_user(&self) -> bool {
        self.id >= FIRST_USER_FIELD_ID
    }

    /// The Arrow field, nullable, with the id in its metadata.
    pub fn arrow(&self) -> ArrowField {
        arrow_field(self.id, &self.name, self.ty)
    }
}

/// An Arrow field that carries its id (and its element's, for a list).
pub fn arrow_field(id: i32, name: &str, ty: FieldType) -> ArrowField {
    use arrow::datatypes::DataType;
    let with_id = |field: ArrowField, id: i32| {
        field.with_metadata(HashMap::from([(FIELD_ID_KEY.to_owned(), id.to_string())]))
    };
    let data_type = match ty.arrow() {
        DataType::List(item) => DataType::List(Arc::new(with_id(
            item.as_ref().clone(),
            id + ELEMENT_ID_OFFSET,
        ))),
        other => other,
    };
    with_id(ArrowField::new(name, data_type, true), id)
}

/// A field that is no more. Its id is not used again; its name may be, by another field.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DroppedField {
    pub name: String,
    /// The transaction that dropped it, and when.
    pub xid: i64,
    pub at_us: i64,
    /// What was received before may have come from another server, with a dump or a storage: its transaction ids mean nothing
    /// beside those of this one.
    pub own_since_us: i64,
}

impl DroppedField {
    /// The same for events that are made into columns now, by this server: their transaction ids are its own, whatever time
    /// of receipt they are given.
    pub fn for_new(&self) -> Self {
        let is_own = self.at_us >= self.own_since_us;
        Self {
            own_since_us: if is_own { i64::MIN } else { self.own_since_us },
            ..self.clone()
        }
    }

    /// Whether the field was dropped after the event: what the event has under the name is gone. Both marks have
    /// to say so, since a transaction that began before the drop may still send events after it; of what may be from another
    /// server the clock alone.
    pub fn hides(&self, xid: i64, received_at_us: i64) -> bool {
        received_at_us <= self.at_us && (xid < self.xid || received_at_us < self.own_since_us)
    }
}

/// The registry's view of a collection: system fields, then user fields, in the order of their ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    pub version: i32,
    pub fields: Vec<Field>,
    pub dropped: Vec<DroppedField>,
}

impl Schema {
    /// System fields and the given user fields.
    pub fn new(version: i32, mut user_fields: Vec<Field>) -> Self {
        user_fields.sort_by_key(|f| f.id);
        let mut fields: Vec<Field> = SYSTEM_FIELDS
            .iter()
            .map(|&(id, name, ty)| Field {
                id,
                name: name.to_owned(),
                ty,
                added_version: 0,
                column_ready: true,
            })
            .collect();
        fields.extend(user_fields);
        Self {
            version,
            fields,
            dropped: Vec::new(),
        }
    }

    /// With the fields that were dropped.
    pub fn with_dropped(mut self, dropped: Vec<DroppedField>) -> Self {
        self.dropped = dropped;
        self
    }

    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|f| f.name == name)
    }

    /// What chunks and data files hold: every field, then the hidden `_xid`.
    pub fn arrow(&self) -> SchemaRef {
        let mut fields: Vec<ArrowField> = self.fields.iter().map(Field::arrow).collect();
        fields.push(arrow_field(XID_FIELD_ID, XID, FieldType::Int8));
        Arc::new(ArrowSchema::new(fields))
    }
}
