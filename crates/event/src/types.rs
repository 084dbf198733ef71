//! The types a field may have: their canonical SQL spelling and their Arrow form.

use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field as ArrowField, TimeUnit};
use serde::{Deserialize, Serialize};

/// The type of a field. It never changes once the field exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FieldType {
    Bool,
    Int4,
    Int8,
    Float4,
    Float8,
    /// Precision 1 to 38, scale 0 to precision.
    Numeric {
        precision: u8,
        scale: u8,
    },
    Text,
    /// Days since 1970-01-01, years 0001 to 9999.
    Date,
    /// Microseconds since 1970-01-01 UTC, years 0001 to 9999.
    Timestamptz,
    Uuid,
    /// As text, in the canonical spelling of Postgres.
    Inet,
    /// As JSON text.
    Jsonb,
    BoolArray,
    Float8Array,
    TextArray,
}

impl FieldType {
    /// The Arrow type in chunks, data files and the engine.
    pub fn arrow(self) -> DataType {
        let list = |item| DataType::List(Arc::new(ArrowField::new("element", item, true)));
        match self {
            Self::Bool => DataType::Boolean,
            Self::Int4 => DataType::Int32,
            Self::Int8 => DataType::Int64,
            Self::Float4 => DataType::Float32,
            Self::Float8 => DataType::Float64,
            Self::Numeric { precision, scale } => DataType::Decimal128(precision, scale as i8),
            Self::Text | Self::Inet | Self::Jsonb => DataType::Utf8,
            Self::Date => DataType::Date32,
            Self::Timestamptz => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Self::Uuid => DataType::FixedSizeBinary(16),
            Self::BoolArray => list(DataType::Boolean),
            Self::Float8Array => list(DataType::Float64),
            Self::TextArray => list(DataType::Utf8),
        }
    }

    /// Reads the canonical spelling that [`fmt::Display`] writes.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "boolean" => Self::Bool,
            "integer" => Self::Int4,
            "bigint" => Self::Int8,
            "real" => Self::Float4,
            "double precision" => Self::Float8,
            "text" => Self::Text,
            "date" => Self::Date,
            "timestamp with time zone" => Self::Timestamptz,
            "uuid" => Self::Uuid,
            "inet" => Self::Inet,
            "jsonb" => Self::Jsonb,
            "boolean[]" => Self::BoolArray,
            "double precision[]" => Self::Float8Array,
            "text[]" => Self::TextArray,
            _ => {
                let inner = name.strip_prefix("numeric(")?.strip_suffix(')')?;
                let (p, s) = inner.split_once(',')?;
                let (precision, scale) = (p.trim().parse().ok()?, s.trim().parse().ok()?);
                if !(1..=38).contains(&precision) || scale > precision {
                    return None;
                }
                Self::Numeric { precision, scale }
            }
        })
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Bool => "boolean",
            Self::Int4 => "integer",
            Self::Int8 => "bigint",
            Self::Float4 => "real",
            Self::Float8 => "double precision",
            Self::Numeric { precision, scale } => return write!(f, "numeric({precision},{scale})"),
            Self::Text => "text",
            Self::Date => "date",
            Self::Timestamptz => "timestamp with time zone",
            Self::Uuid => "uuid",
            Self::Inet => "inet",
            Self::Jsonb => "jsonb",
            Self::BoolArray => "boolean[]",
            Self::Float8Array => "double precision[]",
            Self::TextArray => "text[]",
        };
        f.write_str(name)
    }
}
