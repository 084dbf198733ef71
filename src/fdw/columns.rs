//! The columns of a foreign table and the field types they stand for.

use pgrx::pg_sys;
use rakam_event::types::FieldType;

/// A live column.
#[derive(Debug, Clone)]
pub struct Column {
    pub attnum: i16,
    pub name: String,
    pub type_oid: pg_sys::Oid,
    pub typmod: i32,
}

impl Column {
    /// The field type of this column, if there is one.
    pub fn field_type(&self) -> Option<FieldType> {
        field_type(self.type_oid, self.typmod)
    }
}

/// The field type that a Postgres type with its modifier is; None for any other.
pub fn field_type(type_oid: pg_sys::Oid, typmod: i32) -> Option<FieldType> {
    use FieldType as F;
    if type_oid == pg_sys::NUMERICOID {
        return numeric(typmod);
    }
    if typmod != -1 {
        return None;
    }
    Some(match type_oid {
        pg_sys::BOOLOID => F::Bool,
        pg_sys::INT4OID => F::Int4,
        pg_sys::INT8OID => F::Int8,
        pg_sys::FLOAT4OID => F::Float4,
        pg_sys::FLOAT8OID => F::Float8,
        pg_sys::TEXTOID => F::Text,
        pg_sys::DATEOID => F::Date,
        pg_sys::TIMESTAMPTZOID => F::Timestamptz,
        pg_sys::UUIDOID => F::Uuid,
        pg_sys::INETOID => F::Inet,
        pg_sys::JSONBOID => F::Jsonb,
        pg_sys::BOOLARRAYOID => F::BoolArray,
        pg_sys::FLOAT8ARRAYOID => F::Float8Array,
        pg_sys::TEXTARRAYOID => F::TextArray,
        _ => return None,
    })
}

/// numeric(p,s) by its modifier: `((p << 16) | (s & 0x7ff)) + VARHDRSZ`, the scale signed since 15.
fn numeric(typmod: i32) -> Option<FieldType> {
    let packed = typmod.checked_sub(4).filter(|packed| *packed >= 0)?;
    let precision = (packed >> 16) & 0xffff;
    let scale = ((packed & 0x7ff) ^ 1024) - 1024;
    if !(1..=38).contains(&precision) || !(0..=precision).contains(&scale) {
        return None;
    }
    Some(FieldType::Numeric {
        precision: precision as u8,
        scale: scale as u8,
    })
}
