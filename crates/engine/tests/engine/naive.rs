//! PostgreSQL's meaning of the IR, row by row and without Arrow.

use std::cmp::Ordering;

use rakam_engine::{CmpOp, Expr};
use rakam_event::schema::Schema;
use rakam_lake::scalar::Scalar;

use crate::fixture::Row;

pub fn matches(expr: &Expr, schema: &Schema, row: &Row) -> bool {
    condition(expr, schema, row) == Some(true)
}

fn condition(expr: &Expr, schema: &Schema, row: &Row) -> Option<bool> {
    match expr {
        Expr::Cmp { op, left, right } => {
            let ordering = compare(&value(left, schema, row)?, &value(right, schema, row)?);
            Some(match op {
                CmpOp::Eq => ordering.is_eq(),
                CmpOp::Ne => ordering.is_ne(),
                CmpOp::Lt => ordering.is_lt(),
                CmpOp::Le => ordering.is_le(),
                CmpOp::Gt => ordering.is_gt(),
                CmpOp::Ge => ordering.is_ge(),
            })
        }
        Expr::And(list) => all(list.iter().map(|e| condition(e, schema, row))),
        Expr::Or(list) => {
            all(list.iter().map(|e| condition(e, schema, row).map(|v| !v))).map(|v| !v)
        }
        Expr::Not(e) => condition(e, schema, row).map(|v| !v),
        Expr::IsNull(e) => Some(any(e, schema, row).is_none()),
        Expr::IsNotNull(e) => Some(any(e, schema, row).is_some()),
        Expr::Is {
            expr,
            value,
            negated,
        } => Some((condition(expr, schema, row) == *value) != *negated),
        Expr::InList {
            expr,
            list,
            negated,
        } => {
            let any = Expr::Or(
                list.iter()
                    .map(|item| Expr::Cmp {
                        op: CmpOp::Eq,
                        left: expr.clone(),
                        right: Box::new(item.clone()),
                    })
                    .collect(),
            );
            condition(&any, schema, row).map(|v| v != *negated)
        }
        Expr::Like {
            expr,
            pattern,
            negated,
        } => {
            let Scalar::Text(text) = value(expr, schema, row)? else {
                panic!("LIKE on no text")
            };
            let text: Vec<char> = text.chars().collect();
            let pattern: Vec<char> = pattern.chars().collect();
            Some(like(&text, &pattern) != *negated)
        }
        other => match value(other, schema, row)? {
            Scalar::Bool(v) => Some(v),
            other => panic!("{other:?} is no condition"),
        },
    }
}

/// False if one is false, else NULL if one is NULL.
fn all(values: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let values: Vec<_> = values.collect();
    if values.contains(&Some(false)) {
        Some(false)
    } else if values.contains(&None) {
        None
    } else {
        Some(true)
    }
}

fn any(expr: &Expr, schema: &Schema, row: &Row) -> Option<Scalar> {
    match expr {
        Expr::Column(_) | Expr::Literal(_) | Expr::Null(_) => value(expr, schema, row),
        other => condition(other, schema, row).map(Scalar::Bool),
    }
}

fn value(expr: &Expr, schema: &Schema, row: &Row) -> Option<Scalar> {
    match expr {
        Expr::Column(id) => {
            let index = schema.fields.iter().position(|f| f.id == *id).unwrap();
            row[index].clone()
        }
        Expr::Literal(v) => Some(v.clone()),
        Expr::Null(_) => None,
        other => condition(other, schema, row).map(Scalar::Bool),
    }
}

fn compare(a: &Scalar, b: &Scalar) -> Ordering {
    match (a, b) {
        (Scalar::Bool(a), Scalar::Bool(b)) => a.cmp(b),
        (Scalar::Int4(a), Scalar::Int4(b)) => a.cmp(b),
        (Scalar::Int8(a), Scalar::Int8(b)) => a.cmp(b),
        (Scalar::Int4(a), Scalar::Int8(b)) => i64::from(*a).cmp(b),
        (Scalar::Int8(a), Scalar::Int4(b)) => a.cmp(&i64::from(*b)),
        (Scalar::Float4(a), Scalar::Float4(b)) => float(f64::from(*a), f64::from(*b)),
        (Scalar::Float8(a), Scalar::Float8(b)) => float(*a, *b),
        (
            Scalar::Numeric { unscaled, scale },
            Scalar::Numeric {
                unscaled: other,
                scale: other_scale,
            },
        ) => parts(*unscaled, *scale).cmp(&parts(*other, *other_scale)),
        (Scalar::Text(a), Scalar::Text(b)) => a.as_bytes().cmp(b.as_bytes()),
        (Scalar::Date(a), Scalar::Date(b)) => a.cmp(b),
        (Scalar::Timestamptz(a), Scalar::Timestamptz(b)) => a.cmp(b),
        (Scalar::Uuid(a), Scalar::Uuid(b)) => a.cmp(b),
        (a, b) => panic!("{a:?} and {b:?} have no order"),
    }
}

fn float(a: f64, b: f64) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        (false, false) => a.partial_cmp(&b).unwrap(),
    }
}

/// The whole part, the fraction in units of 10^-38 rounded down, and whether something is left below.
fn parts(unscaled: i128, scale: u8) -> (i128, i128, bool) {
    if scale > 38 {
        let unit = 10i128.checked_pow(u32::from(scale - 38));
        let floor = unit.map_or(if unscaled < 0 { -1 } else { 0 }, |unit| {
            unscaled.div_euclid(unit)
        });
        let rest = unit.map_or(unscaled, |unit| unscaled.rem_euclid(unit));
        let (whole, fraction, _) = parts(floor, 38);
        return (whole, fraction, rest != 0);
    }
    let unit = 10i128.pow(u32::from(scale));
    let fraction = unscaled.rem_euclid(unit) * 10i128.pow(u32::from(38 - scale));
    (unscaled.div_euclid(unit), fraction, false)
}

fn like(text: &[char], pattern: &[char]) -> bool {
    match pattern {
        [] => text.is_empty(),
        ['%', rest @ ..] => (0..=text.len()).any(|skip| like(&text[skip..], rest)),
        ['_', rest @ ..] => !text.is_empty() && like(&text[1..], rest),
        ['\\', escaped, rest @ ..] => text.first() == Some(escaped) && like(&text[1..], rest),
        [c, rest @ ..] => text.first() == Some(c) && like(&text[1..], rest),
    }
}
