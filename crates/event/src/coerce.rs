//! A raw JSON value as a value of its field's type, or why it does not fit (SPEC §4).

use std::borrow::Cow;

use crate::column::Plain;
use crate::json::{self, Cutter, Kind};
use crate::net;
use crate::number::{Number, short_whole};
use crate::print;
use crate::time;
use crate::types::FieldType;

/// A value of a field's type.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    Bool(bool),
    Int4(i32),
    Int8(i64),
    Float4(f32),
    Float8(f64),
    /// Unscaled.
    Numeric(i128),
    /// Also inet.
    Text(Cow<'a, str>),
    Date(i32),
    Timestamptz(i64),
    Uuid([u8; 16]),
    /// Compact JSON text.
    Json(Cow<'a, str>),
    BoolArray(Vec<Option<bool>>),
    Float8Array(Vec<Option<f64>>),
    TextArray(Vec<Option<Cow<'a, str>>>),
}

impl From<Plain> for Value<'_> {
    fn from(value: Plain) -> Self {
        match value {
            Plain::Bool(v) => Self::Bool(v),
            Plain::Int4(v) => Self::Int4(v),
            Plain::Int8(v) => Self::Int8(v),
            Plain::Float4(v) => Self::Float4(v),
            Plain::Float8(v) => Self::Float8(v),
            Plain::Numeric(v) => Self::Numeric(v),
            Plain::Date(v) => Self::Date(v),
            Plain::Timestamptz(v) => Self::Timestamptz(v),
            Plain::Uuid(v) => Self::Uuid(v),
        }
    }
}

/// Why a value does not fit its field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    #[error("{kind} is not a value of type {ty}")]
    Kind { kind: Kind, ty: FieldType },
    #[error("text is not a value of type {ty}")]
    Text { ty: FieldType },
    #[error("number is not whole")]
    NotWhole,
    #[error("number is out of range for type {ty}")]
    OutOfRange { ty: FieldType },
}

/// The value of a raw JSON value that is not `null`. Strings of the client are cut by `cutter`.
pub fn coerce<'a>(raw: &'a str, ty: FieldType, cutter: &mut Cutter) -> Result<Value<'a>, Misfit> {
    let kind = json::kind(raw);
    let misfit = || Misfit::Kind { kind, ty };
    let not_text = || Misfit::Text { ty };
    Ok(match ty {
        FieldType::Text => Value::Text(text(raw, cutter).ok_or_else(misfit)?),
        FieldType::Jsonb => Value::Json(json::compact(raw, cutter)),
        FieldType::Bool => Value::Bool(boolean(raw).ok_or_else(misfit)?),
        FieldType::Float8 => Value::Float8(float8(raw, ty)?),
        FieldType::Float4 | FieldType::Int4 | FieldType::Int8 | FieldType::Numeric { .. } => {
            numeric(raw, ty)?
        }
        FieldType::Date | FieldType::Timestamptz | FieldType::Uuid | FieldType::Inet => {
            if kind != Kind::String {
                return Err(misfit());
            }
            let text = json::string(raw).ok_or_else(misfit)?;
            match ty {
                FieldType::Date => Value::Date(time::exact_date(&text).ok_or_else(not_text)?),
                FieldType::Timestamptz => {
                    Value::Timestamptz(time::timestamp(&text).ok_or_else(not_text)?)
                }
                FieldType::Uuid => Value::Uuid(net::parse_uuid(&text).ok_or_else(not_text)?),
                _ => {
                    let inet = net::canonical_inet(&text).ok_or_else(not_text)?;
                    Value::Text(Cow::Owned(inet))
                }
            }
        }
        FieldType::BoolArray => {
            Value::BoolArray(array(raw, ty, |e| boolean(e).ok_or_else(misfit))?)
        }
        FieldType::Float8Array => {
            Value::Float8Array(array(raw, ty, |e| float8(e, FieldType::Float8))?)
        }
        FieldType::TextArray => {
            Value::TextArray(array(raw, ty, |e| text(e, cutter).ok_or_else(misfit))?)
        }
    })
}

/// Anything as text: strings as they are, the rest in the form that depends on the value only.
pub fn text<'a>(raw: &'a str, cutter: &mut Cutter) -> Option<Cow<'a, str>> {
    match json::kind(raw) {
        Kind::String => json::string(raw).map(|text| cutter.cut(text)),
        Kind::Null | Kind::Bool => Some(Cow::Borrowed(raw)),
        Kind::Number | Kind::Array | Kind::Object => {
            let mut out = String::with_capacity(raw.len());
            json::write_canonical(raw, cutter, &mut out).ok()?;
            Some(Cow::Owned(out))
        }
    }
}

fn boolean(raw: &str) -> Option<bool> {
    let text = match json::kind(raw) {
        Kind::Bool => Cow::Borrowed(raw),
        Kind::String => json::string(raw)?,
        _ => return None,
    };
    match text.as_ref() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

fn float8(raw: &str, ty: FieldType) -> Result<f64, Misfit> {
    // The common cases, short and plain, need none of the checks of `Number`. Adding 0 makes -0 to 0.
    if let Some(value) = short_whole(raw, 15) {
        return Ok(value as f64);
    }
    if raw.len() <= 15
        && raw.bytes().all(|b| matches!(b, b'0'..=b'9' | b'.' | b'-'))
        && let Ok(value) = raw.parse::<f64>()
    {
        return Ok(value + 0.0);
    }
    with_number(raw, ty, |number| {
        number.to_f64().ok_or(Misfit::OutOfRange { ty })
    })
}

fn numeric<'a>(raw: &str, ty: FieldType) -> Result<Value<'a>, Misfit> {
    let out_of_range = || Misfit::OutOfRange { ty };
    if let Some(value) = short_whole(raw, 18) {
        match ty {
            FieldType::Int8 => return Ok(Value::Int8(value)),
            FieldType::Int4 => {
                return value
                    .try_into()
                    .map(Value::Int4)
                    .map_err(|_| out_of_range());
            }
            _ => {}
        }
    }
    with_number(raw, ty, |number| match ty {
        FieldType::Float4 => number.to_f32().map(Value::Float4).ok_or_else(out_of_range),
        FieldType::Numeric { precision, scale } => number
            .scaled(scale)
            .filter(|value| value.unsigned_abs() < 10_u128.pow(u32::from(precision)))
            .map(Value::Numeric)
            .ok_or_else(out_of_range),
        _ if !number.is_whole() => Err(Misfit::NotWhole),
        FieldType::Int4 => number
            .to_i64()
            .and_then(|value| value.try_into().ok())
            .map(Value::Int4)
            .ok_or_else(out_of_range),
        _ => number.to_i64().map(Value::Int8).ok_or_else(out_of_range),
    })
}

/// Calls `f` with the number that a raw number or numeric text is.
fn with_number<T>(
    raw: &str,
    ty: FieldType,
    f: impl FnOnce(Number<'_>) -> Result<T, Misfit>,
) -> Result<T, Misfit> {
    let kind = json::kind(raw);
    let text = match kind {
        Kind::Number => Cow::Borrowed(raw),
        Kind::String => json::string(raw).ok_or(Misfit::Kind { kind, ty })?,
        _ => return Err(Misfit::Kind { kind, ty }),
    };
    f(Number::parse(&text).ok_or(Misfit::Text { ty })?)
}

/// The elements of an array, or the one element that a scalar is.
fn array<'a, T>(
    raw: &'a str,
    ty: FieldType,
    mut element: impl FnMut(&'a str) -> Result<T, Misfit>,
) -> Result<Vec<Option<T>>, Misfit> {
    let kind = json::kind(raw);
    match kind {
        Kind::Array => {
            let mut elements = Vec::new();
            let mut misfit = None;
            json::array_elements(raw, |raw| {
                if misfit.is_none() {
                    match json::kind(raw) {
                        Kind::Null => elements.push(None),
                        _ => match element(raw) {
                            Ok(value) => elements.push(Some(value)),
                            Err(e) => misfit = Some(e),
                        },
                    }
                }
            })
            .map_err(|_| Misfit::Kind { kind, ty })?;
            misfit.map_or(Ok(elements), Err)
        }
        Kind::Null | Kind::Object => Err(Misfit::Kind { kind, ty }),
        Kind::Bool | Kind::Number | Kind::String => Ok(vec![Some(element(raw)?)]),
    }
}

impl Value<'_> {
    /// The canonical JSON of the value; `ty` gives a numeric's scale. The same text as
    /// [`print::to_json_text`] of the stored value.
    pub fn write_json(&self, ty: FieldType, out: &mut String) {
        match self {
            Self::Bool(value) => print::write_bool(*value, out),
            Self::Int4(value) => print::write_int(i64::from(*value), out),
            Self::Int8(value) => print::write_int(*value, out),
            Self::Float4(value) => print::write_float4(*value, out),
            Self::Float8(value) => print::write_float8(*value, out),
            Self::Numeric(value) => {
                let scale = match ty {
                    FieldType::Numeric { scale, .. } => scale,
                    _ => 0,
                };
                print::write_numeric(*value, scale, out);
            }
            Self::Text(text) => json::write_string(text, out),
            Self::Date(days) => print::write_date(*days, out),
            Self::Timestamptz(micros) => print::write_timestamp(*micros, out),
            Self::Uuid(uuid) => print::write_uuid(uuid, out),
            Self::Json(text) => out.push_str(text),
            Self::BoolArray(items) => {
                print::write_array(items.iter().copied(), out, print::write_bool);
            }
            Self::Float8Array(items) => {
                print::write_array(items.iter().copied(), out, print::write_float8);
            }
            Self::TextArray(items) => {
                print::write_array(items.iter().map(Option::as_deref), out, json::write_string);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMERIC: FieldType = FieldType::Numeric {
        precision: 5,
        scale: 2,
    };

    fn shown(raw: &str, ty: FieldType) -> Option<String> {
        let mut out = String::new();
        coerce(raw, ty, &mut Cutter::off())
            .ok()?
            .write_json(ty, &mut out);
        Some(out)
    }

    fn check(ty: FieldType, cases: &[(&str, Option<&str>)]) {
        for (raw, expected) in cases {
            assert_eq!(shown(raw, ty).as_deref(), *expected, "{raw} as {ty}");
        }
    }

    #[test]
    fn booleans() {
        check(
            FieldType::Bool,
            &[
                ("true", Some("true")),
                (r#""false""#, Some("false")),
                (r#""yes""#, None),
                ("1", None),
                ("[true]", None),
            ],
        );
        check(
            FieldType::BoolArray,
            &[
                ("[true,null,\"false\"]", Some("[true,null,false]")),
                ("true", Some("[true]")),
                ("[]", Some("[]")),
                ("[null]", Some("[null]")),
                ("[1]", None),
                ("{}", None),
            ],
        );
    }

    #[test]
    fn numbers() {
        check(
            FieldType::Float8,
            &[
                ("1.0", Some("1")),
                ("-0", Some("0")),
                ("-0.0", Some("0")),
                ("0.1", Some("0.1")),
                (r#"" 2.50 ""#, Some("2.5")),
                (r#""NaN""#, None),
                (r#""Infinity""#, None),
                ("1e999", None),
                ("1e-999", None),
                ("9007199254740993", None),
                ("true", None),
                (r#""x""#, None),
                (r#""""#, None),
            ],
        );
        check(
            FieldType::Float4,
            &[("0.1", Some("0.1")), ("1e39", None), ("-0", Some("0"))],
        );
        check(
            FieldType::Int4,
            &[
                ("2147483647", Some("2147483647")),
                ("2147483648", None),
                ("1e2", Some("100")),
                ("1.5", None),
                (r#""12.0""#, Some("12")),
                ("true", None),
            ],
        );
        check(
            FieldType::Int8,
            &[
                ("9223372036854775807", Some("9223372036854775807")),
                ("9223372036854775808", None),
                ("-9223372036854775808", Some("-9223372036854775808")),
            ],
        );
        check(
            NUMERIC,
            &[
                ("1", Some("1.00")),
                ("-0.005", Some("-0.01")),
                ("0.004", Some("0.00")),
                ("999.99", Some("999.99")),
                ("999.995", None),
                (r#""12.3""#, Some("12.30")),
            ],
        );
        check(
            FieldType::Float8Array,
            &[
                (r#"[1, "2", null]"#, Some("[1,2,null]")),
                ("3", Some("[3]")),
                (r#"[1,"x"]"#, None),
                ("[[1]]", None),
            ],
        );
    }

    #[test]
    fn anything_is_text_or_json() {
        check(
            FieldType::Text,
            &[
                (r#""a\u0041""#, Some(r#""aA""#)),
                ("1.0", Some(r#""1""#)),
                ("1e0", Some(r#""1""#)),
                ("true", Some(r#""true""#)),
                (r#"{"b": 1.0, "a": []}"#, Some(r#""{\"a\":[],\"b\":1}""#)),
                ("[1, null]", Some(r#""[1,null]""#)),
            ],
        );
        check(
            FieldType::Jsonb,
            &[
                (r#"{"a": [1.0, " x "]}"#, Some(r#"{"a":[1.0," x "]}"#)),
                ("1.50", Some("1.50")),
                (r#""x y""#, Some(r#""x y""#)),
                ("[]", Some("[]")),
            ],
        );
        check(
            FieldType::TextArray,
            &[
                (
                    r#"["a", 1.0, true, null, {"k": 1}]"#,
                    Some(r#"["a","1","true",null,"{\"k\":1}"]"#),
                ),
                ("5", Some(r#"["5"]"#)),
                ("[]", Some("[]")),
                ("{}", None),
            ],
        );
    }

    #[test]
    fn texts_with_a_form() {
        check(
            FieldType::Timestamptz,
            &[
                (r#""2020-01-02""#, Some(r#""2020-01-02T00:00:00+00:00""#)),
                (
                    r#""2020-01-02 03:04:05.120+01""#,
                    Some(r#""2020-01-02T02:04:05.12+00:00""#),
                ),
                ("1577934245123", None),
                (r#""1577934245123""#, None),
                (r#""soon""#, None),
            ],
        );
        check(
            FieldType::Date,
            &[
                (r#""2020-01-02""#, Some(r#""2020-01-02""#)),
                (r#""2020-01-02T00:00""#, None),
                ("20200102", None),
            ],
        );
        check(
            FieldType::Uuid,
            &[
                (
                    r#""{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}""#,
                    Some(r#""a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11""#),
                ),
                (r#""x""#, None),
                ("1", None),
            ],
        );
        check(
            FieldType::Inet,
            &[(r#""10.0.0.1/32""#, Some(r#""10.0.0.1""#)), ("10", None)],
        );
    }

    #[test]
    fn long_strings_are_cut_and_kept() {
        let mut cutter = Cutter::new(5);
        let value = coerce(r#""ééé""#, FieldType::Text, &mut cutter);
        assert_eq!(value, Ok(Value::Text("éé".into())));
        assert_eq!(cutter.cut_from, Some(6));
        let value = coerce(r#"[["abcdefgh"]]"#, FieldType::Jsonb, &mut Cutter::new(5));
        assert_eq!(value, Ok(Value::Json(r#"[["abcde"]]"#.into())));
    }
}
