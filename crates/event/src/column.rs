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

/// A value that owns no memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Plain {
    Bool(bool),
    Int4(i32),
    Int8(i64),
    Float4(f32),
    Float8(f64),
    /// Unscaled.
    Numeric(i128),
    /// Days since 1970.
    Date(i32),
    /// Microseconds since 1970.
    Timestamptz(i64),
    Uuid([u8; 16]),
}

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
        match value {
            Value::Bool(v) => self.put(row, Plain::Bool(v)),
            Value::Int4(v) => self.put(row, Plain::Int4(v)),
            Value::Int8(v) => self.put(row, Plain::Int8(v)),
            Value::Float4(v) => self.put(row, Plain::Float4(v)),
            Value::Float8(v) => self.put(row, Plain::Float8(v)),
            Value::Numeric(v) => self.put(row, Plain::Numeric(v)),
            Value::Date(v) => self.put(row, Plain::Date(v)),
            Value::Timestamptz(v) => self.put(row, Plain::Timestamptz(v)),
            Value::Uuid(v) => self.put(row, Plain::Uuid(v)),
            Value::Text(v) | Value::Json(v) => self.put_text(row, &v),
            Value::BoolArray(v) => {
                let Builder::BoolArray(b) = &mut self.0 else {
                    return self.misfit(row);
                };
                let bytes = v.len() + 4;
                pad(b, row);
                b.append_value(v);
                bytes
            }
            Value::Float8Array(v) => {
                let Builder::Float8Array(b) = &mut self.0 else {
                    return self.misfit(row);
                };
                let bytes = v.len() * 8 + 4;
                pad(b, row);
                b.append_value(v);
                bytes
            }
            Value::TextArray(v) => {
                let Builder::TextArray(b) = &mut self.0 else {
                    return self.misfit(row);
                };
                let bytes = v.iter().flatten().map(|t| t.len()).sum::<usize>() + v.len() * 4 + 4;
                pad(b, row);
                b.append_value(v);
                bytes
            }
        }
    }

    /// As [`Self::append`]. Inlined, so that nothing is left of the match where the caller knows the variant.
    #[inline(always)]
    pub fn put(&mut self, row: usize, value: Plain) -> usize {
        match (&mut self.0, value) {
            (Builder::Bool(b), Plain::Bool(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Int4(b), Plain::Int4(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Int8(b), Plain::Int8(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Float4(b), Plain::Float4(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Float8(b), Plain::Float8(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Numeric(b), Plain::Numeric(v)) => {
                pad(b, row);
                b.append_value(v);
                return 16;
            }
            (Builder::Date(b), Plain::Date(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Timestamptz(b), Plain::Timestamptz(v)) => {
                pad(b, row);
                b.append_value(v);
            }
            (Builder::Uuid(b), Plain::Uuid(v)) => {
                pad(b, row);
                // 16 bytes into a column of 16 bytes: the only error of this call cannot be.
                if b.append_value(v).is_err() {
                    b.append_null();
                }
                return 16;
            }
            _ => return self.misfit(row),
        }
        8
    }

    /// As [`Self::append`], a text or JSON.
    #[inline]
    pub fn put_text(&mut self, row: usize, text: &str) -> usize {
        let Builder::Text(b) = &mut self.0 else {
            return self.misfit(row);
        };
        pad(b, row);
        b.append_value(text);
        text.len() + 4
    }

    #[cold]
    fn misfit(&mut self, row: usize) -> usize {
        debug_assert!(false, "coercion gives values of the column's type");
        each!(&mut self.0, b => pad(b, row + 1));
        8
    }

    /// The array of so many rows.
    pub fn finish(self, rows: usize) -> ArrayRef {
        each!(self.0, b => {
            let mut b = b;
            pad(&mut b, rows);
            Arc::new(b.finish())
        })
    }
}

/// Appends NULLs up to `row`.
#[inline(always)]
fn pad<B: Nulls>(builder: &mut B, row: usize) {
    let length = builder.rows();
    if length < row {
        builder.nulls(row - length);
    }
}

/// What all builders have, under no common name.
trait Nulls {
    fn rows(&self) -> usize;
    fn nulls(&mut self, n: usize);
}

macro_rules! nulls {
    ($($builder:ty),*) => {
        $(impl Nulls for $builder {
            #[inline(always)]
            fn rows(&self) -> usize {
                self.len()
            }

            fn nulls(&mut self, n: usize) {
                self.append_nulls(n);
            }
        })*
    };
}

nulls!(
    BooleanBuilder,
    Int32Builder,
    Int64Builder,
    Float32Builder,
    Float64Builder,
    Decimal128Builder,
    StringBuilder,
    Date32Builder,
    TimestampMicrosecondBuilder,
    FixedSizeBinaryBuilder,
    ListBuilder<BooleanBuilder>,
    ListBuilder<Float64Builder>,
    ListBuilder<StringBuilder>
);

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
