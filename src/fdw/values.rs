//! Datums of constants and parameters → the engine's scalars.

use pgrx::{FromDatum, pg_sys};
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use super::node;
use crate::pg::PG_EPOCH_US;

/// Days from 1970-01-01 to 2000-01-01.
pub const PG_EPOCH_DAYS: i32 = 10_957;

/// A value of an execution; None is NULL.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    One(Option<Scalar>),
    Many(Option<Vec<Option<Scalar>>>),
    /// Of LIMIT and OFFSET.
    Count(Option<i64>),
}

/// A datum of type `ty`; of a numeric, `ty` is that of the column it is compared with. None: the engine cannot
/// compare with this value exactly.
///
/// # Safety
/// The datum is of the Postgres type that `ty` stands for.
pub unsafe fn scalar(datum: pg_sys::Datum, is_null: bool, ty: FieldType) -> Option<Value> {
    if is_null {
        return Some(Value::One(None));
    }
    // SAFETY: as promised by the caller.
    unsafe { one(datum, ty) }.map(|scalar| Value::One(Some(scalar)))
}

/// An array datum with elements of type `ty`, flattened as `= ANY` does.
///
/// # Safety
/// The datum is an array of the Postgres type that `ty` stands for.
pub unsafe fn list(datum: pg_sys::Datum, is_null: bool, ty: FieldType) -> Option<Value> {
    if is_null {
        return Some(Value::Many(None));
    }
    // SAFETY: the array is detoasted; the element's layout is the catalog's.
    unsafe {
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
        let element = (*array).elemtype;
        let (mut len, mut by_value, mut align) = (0, false, 0);
        pg_sys::get_typlenbyvalalign(element, &mut len, &mut by_value, &mut align);
        let (mut datums, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        pg_sys::deconstruct_array(
            array,
            element,
            i32::from(len),
            by_value,
            align,
            &mut datums,
            &mut nulls,
            &mut count,
        );
        let items = (0..count as usize)
            .map(|i| {
                if *nulls.add(i) {
                    Some(None)
                } else {
                    one(*datums.add(i), ty).map(Some)
                }
            })
            .collect::<Option<Vec<_>>>()?;
        Some(Value::Many(Some(items)))
    }
}

unsafe fn one(datum: pg_sys::Datum, ty: FieldType) -> Option<Scalar> {
    // SAFETY: as promised by the callers.
    unsafe {
        Some(match ty {
            FieldType::Bool => Scalar::Bool(datum.value() != 0),
            FieldType::Int4 => Scalar::Int4(datum.value() as i32),
            FieldType::Int8 => Scalar::Int8(datum.value() as i64),
            FieldType::Float4 => Scalar::Float4(f32::from_bits(datum.value() as u32)),
            FieldType::Float8 => Scalar::Float8(f64::from_bits(datum.value() as u64)),
            FieldType::Numeric { precision, scale } => {
                return numeric(&node::output(datum, pg_sys::NUMERICOID), precision, scale);
            }
            FieldType::Text => Scalar::Text(String::from_datum(datum, false)?),
            FieldType::Date => Scalar::Date(unix_days(datum.value() as i32)),
            FieldType::Timestamptz => Scalar::Timestamptz(unix_micros(datum.value() as i64)),
            FieldType::Uuid => {
                let bytes = datum.cast_mut_ptr::<[u8; 16]>();
                Scalar::Uuid(*bytes)
            }
            FieldType::Inet
            | FieldType::Jsonb
            | FieldType::BoolArray
            | FieldType::Float8Array
            | FieldType::TextArray => return None,
        })
    }
}

/// Infinities stay at the ends, beyond every stored date.
fn unix_days(pg: i32) -> i32 {
    match pg {
        i32::MAX | i32::MIN => pg,
        days => days.saturating_add(PG_EPOCH_DAYS),
    }
}

fn unix_micros(pg: i64) -> i64 {
    match pg {
        i64::MAX | i64::MIN => pg,
        micros => micros.saturating_add(PG_EPOCH_US),
    }
}

/// The text form of a numeric as a scalar that compares with every value of numeric(`precision`,`scale`) as the
/// numeric itself does.
fn numeric(text: &str, precision: u8, scale: u8) -> Option<Scalar> {
    const ABOVE: Scalar = Scalar::Numeric {
        unscaled: i128::MAX,
        scale: 0,
    };
    const BELOW: Scalar = Scalar::Numeric {
        unscaled: i128::MIN,
        scale: 0,
    };
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        // Infinity and NaN, which is above everything.
        return Some(if negative { BELOW } else { ABOVE });
    }
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let kept = fraction.len().min(usize::from(scale));
    let sign = if negative { -1 } else { 1 };
    let Ok(mut unscaled) = format!("{whole}{}", &fraction[..kept]).parse::<i128>() else {
        return Some(if negative { BELOW } else { ABOVE });
    };
    let mut own_scale = kept as u8;
    if fraction[kept..].bytes().any(|digit| digit != b'0') {
        // Between two values of the column: anything between them compares alike.
        match unscaled.checked_mul(10) {
            Some(wider) => unscaled = wider + 5,
            None if precision < 38 => return Some(if negative { BELOW } else { ABOVE }),
            None => return None,
        }
        own_scale += 1;
    }
    Some(Scalar::Numeric {
        unscaled: sign * unscaled,
        scale: own_scale,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numerics_keep_their_place_among_the_values_of_a_column() {
        let get = |text: &str, precision, scale| numeric(text, precision, scale);
        let exact = |unscaled, scale| Some(Scalar::Numeric { unscaled, scale });
        assert_eq!(get("12.5", 10, 2), exact(125, 1));
        assert_eq!(get("-0.25", 10, 2), exact(-25, 2));
        assert_eq!(get("12.50000", 10, 2), exact(1250, 2));
        assert_eq!(get("12.501", 10, 2), exact(12505, 3));
        assert_eq!(get("-12.509", 10, 2), exact(-12505, 3));
        assert_eq!(get("7", 10, 2), exact(7, 0));
        assert_eq!(get("NaN", 10, 2), exact(i128::MAX, 0));
        assert_eq!(get("-Infinity", 10, 2), exact(i128::MIN, 0));
        let huge = "9".repeat(60);
        assert_eq!(get(&huge, 10, 2), exact(i128::MAX, 0));
        assert_eq!(get(&format!("-{huge}"), 10, 2), exact(i128::MIN, 0));
        let wide = format!("{}.5", "9".repeat(38));
        assert_eq!(get(&wide, 37, 0), exact(i128::MAX, 0));
        assert_eq!(get(&wide, 38, 0), None);
    }

    #[test]
    fn infinite_times_stay_at_the_ends() {
        assert_eq!(unix_days(0), PG_EPOCH_DAYS);
        assert_eq!(unix_days(i32::MIN), i32::MIN);
        assert_eq!(unix_micros(i64::MAX), i64::MAX);
        assert_eq!(unix_micros(9_223_371_331_200_000_000), i64::MAX);
    }
}
