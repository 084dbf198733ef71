//! One typed Arrow builder per column. Rows without a value are filled in when the next value comes, so that
//! an event costs what it has, not what its collection has.

use std::sync::Arc;

use arrow::array::builder::{
    BooleanBuilder, Date32Builder, Decimal128Builder, FixedSizeBinaryBuilder, Float32Builder,
    Float64Builder, Int32Builder, Int64Builder, ListBuilder, StringBuilder,
    TimestampMicrosecondBuilder,
};
use arrow::array::{ArrayBuilder, ArrayRef};
use arrow::datatypes::{DataType, FieldRef};

use crate::coerce::Value;
use crate::error::EventError;

enum Builder {
    Bool(BooleanBuilder),
    Int4(Int32Builder),
    Int8(Int64Builder),
    Float4(Float32Builder),
    Float8(Float64Builder),
    Numeric(Decimal128Builder),
    Text(StringBuilder),
    Date(Date32Builder),
    Timestamptz(TimestampMicrosecondBuilder),
    Uuid(FixedSizeBinaryBuilder),
    BoolArray(ListBuilder<BooleanBuilder>),
    Float8Array(ListBuilder<Float64Builder>),
    TextArray(ListBuilder<StringBuilder>),
}

/// Does the same with whichever builder there is.
macro_rules! each {
    ($builder:expr, $b:ident => $result:expr) => {
        match $builder {
            Builder::Bool($b) => $result,
            Builder::Int4($b) => $result,
            Builder::Int8($b) => $result,
            Builder::Float4($b) => $result,
            Builder::Float8($b) => $result,
            Builder::Numeric($b) => $result,
            Builder::Text($b) => $result,
            Builder::Date($b) => $result,
            Builder::Timestamptz($b) => $result,
            Builder::Uuid($b) => $result,
            Builder::BoolArray($b) => $result,
            Builder::Float8Array($b) => $result,
            Builder::TextArray($b) => $result,
        }
    };
}

pub struct Column(Builder);

impl Column {
    /// A column of exactly this Arrow type, which is one that [`crate::types::FieldType::arrow`] gives (an
    /// element may have metadata).
    pub fn new(data_type: &DataType) -> Result<Self, EventError> {
        let unknown = || EventError::Arrow(format!("no field has the Arrow type {data_type}"));
        Ok(Self(match data_type {
            DataType::Boolean => Builder::Bool(BooleanBuilder::new()),
            DataType::Int32 => Builder::Int4(Int32Builder::new()),
            DataType::Int64 => Builder::Int8(Int64Builder::new()),
            DataType::Float32 => Builder::Float4(Float32Builder::new()),
            DataType::Float64 => Builder::Float8(Float64Builder::new()),
            DataType::Decimal128(..) => {
                Builder::Numeric(Decimal128Builder::new().with_data_type(data_type.clone()))
            }
            DataType::Utf8 => Builder::Text(StringBuilder::new()),
            DataType::Date32 => Builder::Date(Date32Builder::new()),
            DataType::Timestamp(..) => Builder::Timestamptz(
                TimestampMicrosecondBuilder::new().with_data_type(data_type.clone()),
            ),
            DataType::FixedSizeBinary(16) => Builder::Uuid(FixedSizeBinaryBuilder::new(16)),
            DataType::List(element) => list(element).ok_or_else(unknown)?,
            _ => return Err(unknown()),
        }))
    }

    /// Appends NULLs up to `row`, then the value; answers about how many bytes that took. A value of another
    /// type than the column's is NULL.
    pub fn append(&mut self, row: usize, value: Value<'_>) -> usize {
        self.pad(row);
        match (&mut self.0, value) {
            (Builder::Bool(b), Value::Bool(v)) => b.append_value(v),
            (Builder::Int4(b), Value::Int4(v)) => b.append_value(v),
            (Builder::Int8(b), Value::Int8(v)) => b.append_value(v),
            (Builder::Float4(b), Value::Float4(v)) => b.append_value(v),
            (Builder::Float8(b), Value::Float8(v)) => b.append_value(v),
            (Builder::Numeric(b), Value::Numeric(v)) => {
                b.append_value(v);
                return 16;
            }
            (Builder::Text(b), Value::Text(v) | Value::Json(v)) => {
                b.append_value(&v);
                return v.len() + 4;
            }
            (Builder::Date(b), Value::Date(v)) => b.append_value(v),
            (Builder::Timestamptz(b), Value::Timestamptz(v)) => b.append_value(v),
            (Builder::Uuid(b), Value::Uuid(v)) => {
                // 16 bytes into a column of 16 bytes: the only error of this call cannot be.
                if b.append_value(v).is_err() {
                    b.append_null();
                }
                return 16;
            }
            (Builder::BoolArray(b), Value::BoolArray(v)) => {
                let bytes = v.len() + 4;
                b.append_value(v);
                return bytes;
            }
            (Builder::Float8Array(b), Value::Float8Array(v)) => {
                let bytes = v.len() * 8 + 4;
                b.append_value(v);
                return bytes;
            }
            (Builder::TextArray(b), Value::TextArray(v)) => {
                let bytes = v.iter().flatten().map(|t| t.len()).sum::<usize>() + v.len() * 4 + 4;
                b.append_value(v);
                return bytes;
            }
            (builder, _) => {
                debug_assert!(false, "coercion gives values of the column's type");
                each!(builder, b => b.append_nulls(1));
            }
        }
        8
    }

    fn pad(&mut self, rows: usize) {
        each!(&mut self.0, b => {
            let missing = rows.saturating_sub(b.len());
            if missing > 0 {
                b.append_nulls(missing);
            }
        });
    }

    /// The array of so many rows.
    pub fn finish(mut self, rows: usize) -> ArrayRef {
        self.pad(rows);
        each!(self.0, b => {
            let mut b = b;
            Arc::new(b.finish())
        })
    }
}

fn list(element: &FieldRef) -> Option<Builder> {
    let field = Arc::clone(element);
    Some(match element.data_type() {
        DataType::Boolean => {
            Builder::BoolArray(ListBuilder::new(BooleanBuilder::new()).with_field(field))
        }
        DataType::Float64 => {
            Builder::Float8Array(ListBuilder::new(Float64Builder::new()).with_field(field))
        }
        DataType::Utf8 => {
            Builder::TextArray(ListBuilder::new(StringBuilder::new()).with_field(field))
        }
        _ => return None,
    })
}
