//! The type that a value shows on first sight (SPEC §4).

use crate::json::{self, Kind};
use crate::number::Number;
use crate::time;
use crate::types::FieldType;

/// What a value says about the type of a field that has none yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inferred {
    /// `null`: as if the field had not been sent.
    Absent,
    /// `[]`, `{}`, `[null]`, numbers beyond 64 bits: no column yet, the value stays in `_extra`.
    Untyped,
    Type(FieldType),
}

/// What a raw value shows.
pub fn infer(raw: &str) -> Inferred {
    match json::kind(raw) {
        Kind::Null => Inferred::Absent,
        Kind::Bool => Inferred::Type(FieldType::Bool),
        Kind::Number => infer_number(raw),
        Kind::String => Inferred::Type(infer_string(raw)),
        Kind::Array => infer_array(raw),
        Kind::Object => infer_object(raw),
    }
}

fn infer_number(raw: &str) -> Inferred {
    let Some(number) = Number::parse(raw) else {
        return Inferred::Untyped;
    };
    if !number.is_beyond_float8() {
        Inferred::Type(FieldType::Float8)
    } else if number.to_i64().is_some() {
        Inferred::Type(FieldType::Int8)
    } else {
        Inferred::Untyped
    }
}

fn infer_string(raw: &str) -> FieldType {
    // Any date or date-time starts with a digit; most texts do not, or are told apart without being decoded.
    if !matches!(raw.as_bytes().get(1), Some(b'0'..=b'9' | b'\\')) {
        return FieldType::Text;
    }
    let Some(text) = json::string(raw) else {
        return FieldType::Text;
    };
    if time::exact_date(&text).is_some() {
        FieldType::Date
    } else if time::exact_timestamp(&text).is_some() {
        FieldType::Timestamptz
    } else {
        FieldType::Text
    }
}

fn infer_array(raw: &str) -> Inferred {
    let mut common = Kind::Null;
    let mut mixed = false;
    let walked = json::array_elements(raw, |element| {
        let kind = json::kind(element);
        match kind {
            Kind::Null => {}
            Kind::Array | Kind::Object => mixed = true,
            _ if common == Kind::Null => common = kind,
            _ => mixed |= kind != common,
        }
    });
    match common {
        _ if walked.is_err() => Inferred::Untyped,
        _ if mixed => Inferred::Type(FieldType::Jsonb),
        Kind::Bool => Inferred::Type(FieldType::BoolArray),
        Kind::Number => Inferred::Type(FieldType::Float8Array),
        Kind::String => Inferred::Type(FieldType::TextArray),
        _ => Inferred::Untyped,
    }
}

fn infer_object(raw: &str) -> Inferred {
    let inner = raw.strip_prefix('{').and_then(|r| r.strip_suffix('}'));
    if inner.is_some_and(|inner| json::trim(inner).is_empty()) {
        Inferred::Untyped
    } else {
        Inferred::Type(FieldType::Jsonb)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Inferred::{Absent, Type, Untyped};

    #[test]
    fn types_on_first_sight() {
        for (raw, expected) in [
            ("null", Absent),
            ("true", Type(FieldType::Bool)),
            ("1", Type(FieldType::Float8)),
            ("1.0", Type(FieldType::Float8)),
            ("1.5e3", Type(FieldType::Float8)),
            ("9007199254740992", Type(FieldType::Float8)),
            ("9007199254740993", Type(FieldType::Int8)),
            ("-9007199254740993", Type(FieldType::Int8)),
            ("1e18", Type(FieldType::Int8)),
            ("9223372036854775808", Untyped),
            ("1e300", Untyped),
            ("9223372036854775808.5", Type(FieldType::Float8)),
            (r#""""#, Type(FieldType::Text)),
            (r#""x""#, Type(FieldType::Text)),
            (r#""12""#, Type(FieldType::Text)),
            (r#""2020-01-02""#, Type(FieldType::Date)),
            (r#""\u0032020-01-02""#, Type(FieldType::Date)),
            (r#""2020-02-30""#, Type(FieldType::Text)),
            (r#""2020-01-02 ""#, Type(FieldType::Text)),
            (r#""2020-01-02T03:04Z""#, Type(FieldType::Timestamptz)),
            (r#""2020-01-02T03""#, Type(FieldType::Text)),
            ("[]", Untyped),
            ("[ null , null ]", Untyped),
            ("[true,null]", Type(FieldType::BoolArray)),
            ("[null,1]", Type(FieldType::Float8Array)),
            (r#"["a",null]"#, Type(FieldType::TextArray)),
            (r#"["2020-01-02"]"#, Type(FieldType::TextArray)),
            (r#"["a",1]"#, Type(FieldType::Jsonb)),
            ("[[]]", Type(FieldType::Jsonb)),
            ("[null,{}]", Type(FieldType::Jsonb)),
            ("{}", Untyped),
            ("{ \n }", Untyped),
            (r#"{"a":null}"#, Type(FieldType::Jsonb)),
        ] {
            assert_eq!(infer(raw), expected, "{raw}");
        }
    }
}
