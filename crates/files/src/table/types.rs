//! The type of Postgres that a column of a file is, and the one that two files have in common.

use std::fmt;

use arrow::datatypes::DataType;
use rakam_event::types::FieldType;

/// The most digits that Arrow's decimals have.
const MAX_PRECISION: u8 = 76;

/// A type without its array form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    /// Precision and scale; None: of any.
    Numeric(Option<(u8, u8)>),
    Text,
    Bytea,
    Date,
    Time,
    Timestamp,
    Timestamptz,
    Uuid,
    Inet,
    Jsonb,
}

/// A type as in CREATE TABLE; its [`fmt::Display`] is the SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqlType {
    pub base: Base,
    pub is_array: bool,
}

/// What a Parquet file says of a column beyond its Arrow type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Annotation {
    None,
    Uuid,
    Json,
}

impl SqlType {
    pub const TEXT: Self = Self::of(Base::Text);

    pub const fn of(base: Base) -> Self {
        Self {
            base,
            is_array: false,
        }
    }

    /// The type of a column of a typed file. None: it has no values, and may be of any type.
    pub fn of_column(ty: &DataType, annotation: Annotation) -> Option<Self> {
        match ty {
            DataType::Null => None,
            DataType::Dictionary(_, value) => Self::of_column(value, annotation),
            DataType::RunEndEncoded(_, value) => Self::of_column(value.data_type(), annotation),
            DataType::List(item)
            | DataType::LargeList(item)
            | DataType::ListView(item)
            | DataType::LargeListView(item)
            | DataType::FixedSizeList(item, _) => {
                // Arrays of Postgres have the same number of elements in each of their parts: lists of lists need not.
                Some(match Self::of_column(item.data_type(), Annotation::None) {
                    Some(Self {
                        base: Base::Jsonb, ..
                    })
                    | Some(Self { is_array: true, .. }) => Self::of(Base::Jsonb),
                    Some(item) => Self {
                        is_array: true,
                        ..item
                    },
                    None => Self::of(Base::Jsonb),
                })
            }
            ty => Some(Self::of(scalar(ty, annotation))),
        }
    }

    /// The type of both; None if there is none. As Postgres takes the types of a UNION: numbers and times widen.
    pub fn union(self, other: Self) -> Option<Self> {
        if self == other {
            return Some(self);
        }
        if self.is_array || other.is_array {
            let same = self.is_array == other.is_array;
            return same
                .then(|| widest(self.base, other.base))
                .flatten()
                .map(|base| Self {
                    base,
                    is_array: true,
                });
        }
        widest(self.base, other.base).map(Self::of)
    }

    /// The type of cells of two files whose values have shown one each: what both can be read as.
    pub fn union_untyped(self, other: Self) -> Self {
        match self.union(other) {
            // A whole number beyond double precision in one file, a fraction in another.
            Some(Self {
                base: Base::Float8,
                is_array: false,
            }) if self.base != other.base => Self::of(Base::Numeric(None)),
            Some(ty) => ty,
            None => {
                let nested = |ty: Self| ty.is_array || ty.base == Base::Jsonb;
                if nested(self) || nested(other) {
                    Self::of(Base::Jsonb)
                } else {
                    Self::TEXT
                }
            }
        }
    }
}

fn scalar(ty: &DataType, annotation: Annotation) -> Base {
    match ty {
        DataType::Boolean => Base::Bool,
        DataType::Int8 | DataType::Int16 | DataType::UInt8 => Base::Int2,
        DataType::Int32 | DataType::UInt16 => Base::Int4,
        DataType::Int64 | DataType::UInt32 => Base::Int8,
        DataType::UInt64 => Base::Numeric(Some((20, 0))),
        DataType::Float16 | DataType::Float32 => Base::Float4,
        DataType::Float64 => Base::Float8,
        DataType::Decimal32(p, s)
        | DataType::Decimal64(p, s)
        | DataType::Decimal128(p, s)
        | DataType::Decimal256(p, s) => Base::Numeric(
            u8::try_from(*s)
                .ok()
                .filter(|s| s <= p)
                .map(|scale| (*p, scale)),
        ),
        DataType::Date32 | DataType::Date64 => Base::Date,
        DataType::Time32(_) | DataType::Time64(_) => Base::Time,
        DataType::Timestamp(_, Some(_)) => Base::Timestamptz,
        DataType::Timestamp(_, None) => Base::Timestamp,
        DataType::FixedSizeBinary(16) if annotation == Annotation::Uuid => Base::Uuid,
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => Base::Bytea,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
            if annotation == Annotation::Json =>
        {
            Base::Jsonb
        }
        DataType::Struct(_) | DataType::Map(..) | DataType::Union(..) => Base::Jsonb,
        _ => Base::Text,
    }
}

fn widest(a: Base, b: Base) -> Option<Base> {
    if a == b {
        return Some(a);
    }
    let whole = |base| match base {
        Base::Int2 => Some(2),
        Base::Int4 => Some(4),
        Base::Int8 => Some(8),
        _ => None,
    };
    let is_number = |base| {
        whole(base).is_some() || matches!(base, Base::Float4 | Base::Float8 | Base::Numeric(_))
    };
    if let (Some(left), Some(right)) = (whole(a), whole(b)) {
        return Some(if left > right { a } else { b });
    }
    if is_number(a) && is_number(b) {
        let float = |base| matches!(base, Base::Float4 | Base::Float8);
        return Some(if float(a) || float(b) {
            Base::Float8
        } else {
            match (a, b) {
                (Base::Numeric(Some((p, s))), Base::Numeric(Some((q, t)))) => {
                    let scale = s.max(t);
                    let precision = (p - s).max(q - t) + scale;
                    Base::Numeric((precision <= MAX_PRECISION).then_some((precision, scale)))
                }
                _ => Base::Numeric(None),
            }
        });
    }
    match (a, b) {
        (Base::Date, time @ (Base::Timestamp | Base::Timestamptz))
        | (time @ (Base::Timestamp | Base::Timestamptz), Base::Date) => Some(time),
        (Base::Timestamp, Base::Timestamptz) | (Base::Timestamptz, Base::Timestamp) => {
            Some(Base::Timestamptz)
        }
        _ => None,
    }
}

impl From<FieldType> for SqlType {
    fn from(ty: FieldType) -> Self {
        use FieldType as F;
        let base = match ty {
            F::Bool | F::BoolArray => Base::Bool,
            F::Int4 => Base::Int4,
            F::Int8 => Base::Int8,
            F::Float4 => Base::Float4,
            F::Float8 | F::Float8Array => Base::Float8,
            F::Numeric { precision, scale } => Base::Numeric(Some((precision, scale))),
            F::Text | F::TextArray => Base::Text,
            F::Date => Base::Date,
            F::Timestamptz => Base::Timestamptz,
            F::Uuid => Base::Uuid,
            F::Inet => Base::Inet,
            F::Jsonb => Base::Jsonb,
        };
        Self {
            base,
            is_array: matches!(ty, F::BoolArray | F::Float8Array | F::TextArray),
        }
    }
}

impl fmt::Display for SqlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numeric;
        let name = match self.base {
            Base::Bool => "boolean",
            Base::Int2 => "smallint",
            Base::Int4 => "integer",
            Base::Int8 => "bigint",
            Base::Float4 => "real",
            Base::Float8 => "double precision",
            Base::Numeric(None) => "numeric",
            Base::Numeric(Some((p, s))) => {
                numeric = format!("numeric({p},{s})");
                &numeric
            }
            Base::Text => "text",
            Base::Bytea => "bytea",
            Base::Date => "date",
            Base::Time => "time without time zone",
            Base::Timestamp => "timestamp without time zone",
            Base::Timestamptz => "timestamp with time zone",
            Base::Uuid => "uuid",
            Base::Inet => "inet",
            Base::Jsonb => "jsonb",
        };
        f.write_str(name)?;
        f.write_str(if self.is_array { "[]" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use arrow::datatypes::{Field, TimeUnit};

    #[test]
    fn columns_of_files_are_columns_of_postgres() {
        let list = |item| DataType::List(Arc::new(Field::new("item", item, true)));
        for (ty, sql) in [
            (DataType::Int16, "smallint"),
            (DataType::UInt32, "bigint"),
            (DataType::UInt64, "numeric(20,0)"),
            (DataType::Float32, "real"),
            (DataType::Decimal256(50, 3), "numeric(50,3)"),
            (DataType::Decimal128(5, -2), "numeric"),
            (DataType::LargeUtf8, "text"),
            (DataType::Binary, "bytea"),
            (DataType::Date32, "date"),
            (
                DataType::Time64(TimeUnit::Microsecond),
                "time without time zone",
            ),
            (
                DataType::Timestamp(TimeUnit::Nanosecond, None),
                "timestamp without time zone",
            ),
            (
                DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into())),
                "timestamp with time zone",
            ),
            (list(DataType::Int32), "integer[]"),
            (list(list(DataType::Int32)), "jsonb"),
            (DataType::Struct(arrow::datatypes::Fields::empty()), "jsonb"),
            (
                DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8)),
                "text",
            ),
        ] {
            let found = SqlType::of_column(&ty, Annotation::None).map(|ty| ty.to_string());
            assert_eq!(found.as_deref(), Some(sql), "{ty}");
        }
        assert_eq!(SqlType::of_column(&DataType::Null, Annotation::None), None);
        let uuid = SqlType::of_column(&DataType::FixedSizeBinary(16), Annotation::Uuid);
        assert_eq!(uuid, Some(SqlType::of(Base::Uuid)));
    }

    #[test]
    fn two_files_have_a_type_in_common() {
        let of = SqlType::of;
        for (a, b, both) in [
            (Base::Int2, Base::Int8, Some(Base::Int8)),
            (Base::Int4, Base::Float4, Some(Base::Float8)),
            (
                Base::Numeric(Some((5, 2))),
                Base::Numeric(Some((6, 0))),
                Some(Base::Numeric(Some((8, 2)))),
            ),
            (
                Base::Int4,
                Base::Numeric(Some((5, 2))),
                Some(Base::Numeric(None)),
            ),
            (Base::Date, Base::Timestamp, Some(Base::Timestamp)),
            (Base::Text, Base::Int4, None),
        ] {
            assert_eq!(of(a).union(of(b)), both.map(of), "{a:?} {b:?}");
            assert_eq!(of(b).union(of(a)), both.map(of), "{b:?} {a:?}");
        }
        let untyped = |a, b| of(a).union_untyped(of(b)).base;
        assert_eq!(untyped(Base::Float8, Base::Int8), Base::Numeric(None));
        assert_eq!(untyped(Base::Date, Base::Timestamptz), Base::Timestamptz);
        assert_eq!(untyped(Base::Bool, Base::Float8), Base::Text);
        assert_eq!(untyped(Base::Jsonb, Base::Float8), Base::Jsonb);
    }
}
