//! A typed constant of a filter.

use std::cmp::Ordering;

use rakam_event::types::FieldType;
use serde::{Deserialize, Serialize};

/// A value that is not NULL. Floats and numerics keep every bit on their way through JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Scalar {
    Bool(bool),
    Int4(i32),
    Int8(i64),
    Float4(#[serde(with = "float4_bits")] f32),
    Float8(#[serde(with = "float8_bits")] f64),
    /// `unscaled` × 10^−`scale`.
    Numeric {
        #[serde(with = "i128_text")]
        unscaled: i128,
        scale: u8,
    },
    Text(String),
    /// Days since 1970-01-01.
    Date(i32),
    /// Microseconds since 1970-01-01 UTC.
    Timestamptz(i64),
    Uuid([u8; 16]),
}

/// JSON has neither NaN nor infinities, and serde_json's shortest form is not read back exactly.
mod float4_bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f32, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f32, D::Error> {
        u32::deserialize(d).map(f32::from_bits)
    }
}

mod float8_bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        u64::deserialize(d).map(f64::from_bits)
    }
}

/// serde_json reads whole numbers beyond 64 bits as floats.
mod i128_text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &i128, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<i128, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

impl Scalar {
    /// Reads a bound in Iceberg's single-value form, as [`crate::stats`] writes it; `None` for other bytes and types.
    pub fn from_bound(ty: FieldType, bytes: &[u8]) -> Option<Self> {
        Some(match ty {
            FieldType::Bool => match bytes {
                [0] => Self::Bool(false),
                [1] => Self::Bool(true),
                _ => return None,
            },
            FieldType::Int4 => Self::Int4(i32::from_le_bytes(bytes.try_into().ok()?)),
            FieldType::Int8 => Self::Int8(i64::from_le_bytes(bytes.try_into().ok()?)),
            FieldType::Float4 => Self::Float4(f32::from_le_bytes(bytes.try_into().ok()?)),
            FieldType::Float8 => Self::Float8(f64::from_le_bytes(bytes.try_into().ok()?)),
            FieldType::Numeric { scale, .. } => Self::Numeric {
                unscaled: from_minimal_be(bytes)?,
                scale,
            },
            FieldType::Text => Self::Text(String::from_utf8(bytes.to_vec()).ok()?),
            FieldType::Date => Self::Date(i32::from_le_bytes(bytes.try_into().ok()?)),
            FieldType::Timestamptz => Self::Timestamptz(i64::from_le_bytes(bytes.try_into().ok()?)),
            FieldType::Uuid => Self::Uuid(bytes.try_into().ok()?),
            FieldType::Inet
            | FieldType::Jsonb
            | FieldType::BoolArray
            | FieldType::Float8Array
            | FieldType::TextArray => return None,
        })
    }

    pub fn is_nan(&self) -> bool {
        match self {
            Self::Float4(value) => value.is_nan(),
            Self::Float8(value) => value.is_nan(),
            _ => false,
        }
    }

    /// The order in which Postgres has the two values; `None` when this module cannot tell (other kinds, NaN, numerics
    /// too far apart). Text is ordered by bytes (collation "C"), −0 equals 0.
    pub fn compare(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Bool(a), Self::Bool(b)) => Some(a.cmp(b)),
            (Self::Text(a), Self::Text(b)) => Some(a.as_bytes().cmp(b.as_bytes())),
            (Self::Date(a), Self::Date(b)) => Some(a.cmp(b)),
            (Self::Timestamptz(a), Self::Timestamptz(b)) => Some(a.cmp(b)),
            (Self::Uuid(a), Self::Uuid(b)) => Some(a.cmp(b)),
            _ => match (self.as_float(), other.as_float()) {
                (Some(a), Some(b)) => a.partial_cmp(&b),
                _ => {
                    let ((a, a_scale), (b, b_scale)) = (self.as_exact()?, other.as_exact()?);
                    let scale = a_scale.max(b_scale);
                    Some(rescale(a, a_scale, scale)?.cmp(&rescale(b, b_scale, scale)?))
                }
            },
        }
    }

    fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float4(value) => Some(f64::from(*value)),
            Self::Float8(value) => Some(*value),
            _ => None,
        }
    }

    fn as_exact(&self) -> Option<(i128, u8)> {
        match self {
            Self::Int4(value) => Some((i128::from(*value), 0)),
            Self::Int8(value) => Some((i128::from(*value), 0)),
            Self::Numeric { unscaled, scale } => Some((*unscaled, *scale)),
            _ => None,
        }
    }
}

fn rescale(value: i128, from: u8, to: u8) -> Option<i128> {
    value.checked_mul(10i128.checked_pow(u32::from(to.checked_sub(from)?))?)
}

/// Big-endian two's complement in as few bytes as hold the value: Iceberg's form of a decimal.
pub(crate) fn to_minimal_be(value: i128) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    let fill = if value < 0 { 0xff } else { 0 };
    let mut start = 0;
    while start < 15 && bytes[start] == fill && (bytes[start + 1] ^ fill) & 0x80 == 0 {
        start += 1;
    }
    bytes[start..].to_vec()
}

pub(crate) fn from_minimal_be(bytes: &[u8]) -> Option<i128> {
    if bytes.is_empty() || bytes.len() > 16 {
        return None;
    }
    let fill = if bytes[0] & 0x80 != 0 { 0xff } else { 0 };
    let mut full = [fill; 16];
    full[16 - bytes.len()..].copy_from_slice(bytes);
    Some(i128::from_be_bytes(full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_take_as_few_bytes_as_hold_them() {
        for (value, bytes) in [
            (0, &[0][..]),
            (1, &[1]),
            (127, &[127]),
            (128, &[0, 128]),
            (-1, &[255]),
            (-128, &[128]),
            (-129, &[255, 127]),
        ] {
            assert_eq!(to_minimal_be(value), bytes);
        }
        for value in [i128::MIN, i128::MAX, 10i128.pow(38) - 1, 1 - 10i128.pow(38)] {
            assert_eq!(from_minimal_be(&to_minimal_be(value)), Some(value));
        }
        assert_eq!(from_minimal_be(&[]), None);
        assert_eq!(from_minimal_be(&[0; 17]), None);
    }

    #[test]
    fn order() {
        use Ordering::{Equal, Greater, Less};
        let numeric = |unscaled, scale| Scalar::Numeric { unscaled, scale };
        let check = |a: Scalar, b: Scalar, expect| assert_eq!(a.compare(&b), expect);
        check(Scalar::Int4(1), Scalar::Int8(1), Some(Equal));
        check(Scalar::Int8(2), numeric(150, 2), Some(Greater));
        check(numeric(15, 1), numeric(150, 2), Some(Equal));
        check(numeric(i128::MAX, 0), numeric(1, 1), None);
        check(Scalar::Float8(-0.0), Scalar::Float8(0.0), Some(Equal));
        check(Scalar::Float4(0.1), Scalar::Float8(0.1), Some(Greater));
        check(Scalar::Float8(f64::NAN), Scalar::Float8(0.0), None);
        check(Scalar::Int4(1), Scalar::Float8(1.0), None);
        check(
            Scalar::Text("Z".into()),
            Scalar::Text("a".into()),
            Some(Less),
        );
        check(Scalar::Text("a".into()), Scalar::Date(1), None);
    }

    #[test]
    fn json_keeps_every_bit() {
        for scalar in [
            Scalar::Float8(f64::NEG_INFINITY),
            Scalar::Float8(0.1 + 0.2),
            Scalar::Float4(f32::MIN_POSITIVE),
            Scalar::Numeric {
                unscaled: 10i128.pow(38) - 1,
                scale: 38,
            },
            Scalar::Int8(i64::MIN),
            Scalar::Text("\0ä".into()),
            Scalar::Uuid([7; 16]),
        ] {
            let json = serde_json::to_string(&scalar).unwrap();
            assert_eq!(serde_json::from_str::<Scalar>(&json).unwrap(), scalar);
        }
        let nan = serde_json::to_string(&Scalar::Float8(f64::NAN)).unwrap();
        assert!(serde_json::from_str::<Scalar>(&nan).unwrap().is_nan());
    }
}
