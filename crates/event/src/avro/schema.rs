//! The Avro schema of a collection's version, and back.

use serde_json::{Map, Value, json};

use super::AvroError;
use crate::schema::{Field, Schema};
use crate::types::FieldType;

/// What a record holds for a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AvroField {
    pub id: i32,
    pub ty: FieldType,
}

/// The schema as readers of the topic see it. Names that Avro does not allow are spelled in its characters; the field's
/// own name, id and type are in the attributes `rakam-name`, `field-id` and `rakam-type`.
pub fn avro_schema(project: &str, collection: &str, schema: &Schema) -> Value {
    let mut taken = Vec::with_capacity(schema.fields.len());
    let fields = schema
        .fields
        .iter()
        .map(|field| {
            let mut name = avro_name(&field.name);
            if taken.contains(&name) {
                name.push_str(&format!("_f{}", field.id));
            }
            taken.push(name.clone());
            described(field, name)
        })
        .collect();
    record(&avro_name(collection), &format!("rakam.{project}"), fields)
}

/// The fields of a schema that [`avro_schema`] made.
pub fn parse_schema(schema: &Value) -> Result<Vec<AvroField>, AvroError> {
    let invalid = |what: &str| AvroError::Schema(what.to_owned());
    schema
        .get("fields")
        .and_then(Value::as_array)
        .ok_or_else(|| invalid("it has no fields"))?
        .iter()
        .map(|field| {
            let id = field
                .get("field-id")
                .and_then(Value::as_i64)
                .and_then(|id| i32::try_from(id).ok())
                .ok_or_else(|| invalid("a field has no field-id"))?;
            let ty = field
                .get("rakam-type")
                .and_then(Value::as_str)
                .and_then(FieldType::parse)
                .ok_or_else(|| invalid("a field has no rakam-type"))?;
            Ok(AvroField { id, ty })
        })
        .collect()
}

/// The same record with a field's id as its name: what the codec works with, because names may come back.
pub(super) fn by_id(fields: &[AvroField]) -> Value {
    let fields = fields
        .iter()
        .map(|field| json!({"name": id_name(field.id), "type": nullable(avro_type(field.ty))}))
        .collect();
    record("event", "rakam", fields)
}

pub(super) fn id_name(id: i32) -> String {
    format!("f{id}")
}

fn record(name: &str, namespace: &str, fields: Vec<Value>) -> Value {
    json!({"type": "record", "name": name, "namespace": namespace, "fields": fields})
}

fn described(field: &Field, name: String) -> Value {
    let mut object = Map::new();
    object.insert("field-id".into(), field.id.into());
    object.insert("rakam-type".into(), field.ty.to_string().into());
    if name != field.name {
        object.insert("rakam-name".into(), field.name.clone().into());
    }
    object.insert("name".into(), name.into());
    object.insert("type".into(), nullable(avro_type(field.ty)));
    object.insert("default".into(), Value::Null);
    Value::Object(object)
}

fn nullable(ty: Value) -> Value {
    json!(["null", ty])
}

fn avro_type(ty: FieldType) -> Value {
    let list = |item: &str| json!({"type": "array", "items": ["null", item]});
    match ty {
        FieldType::Bool => "boolean".into(),
        FieldType::Int4 => "int".into(),
        FieldType::Int8 => "long".into(),
        FieldType::Float4 => "float".into(),
        FieldType::Float8 => "double".into(),
        FieldType::Numeric { precision, scale } => {
            json!({"type": "bytes", "logicalType": "decimal", "precision": precision, "scale": scale})
        }
        FieldType::Text | FieldType::Inet | FieldType::Jsonb => "string".into(),
        FieldType::Date => json!({"type": "int", "logicalType": "date"}),
        FieldType::Timestamptz => json!({"type": "long", "logicalType": "timestamp-micros"}),
        FieldType::Uuid => json!({"type": "string", "logicalType": "uuid"}),
        FieldType::BoolArray => list("boolean"),
        FieldType::Float8Array => list("double"),
        FieldType::TextArray => list("string"),
    }
}

/// A name in Avro's characters: ASCII letters, digits and `_`, no digit first; others as `_u` and their code point.
fn avro_name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for (position, c) in name.chars().enumerate() {
        match c {
            'a'..='z' | 'A'..='Z' | '_' => out.push(c),
            '0'..='9' if position > 0 => out.push(c),
            '0'..='9' => out.extend(['_', c]),
            other => out.push_str(&format!("_u{:x}_", u32::from(other))),
        }
    }
    out
}
