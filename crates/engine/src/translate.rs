//! IR expressions → DataFusion physical expressions over the target schema, with PostgreSQL's meaning.
//!
//! What is not obvious: Arrow compares floats by totalOrder, where -0 < 0. A comparison with a literal zero is
//! therefore written with the zero that makes both equal (`x > -0` becomes `x > 0`), which keeps min/max pruning;
//! two columns are compared after adding +0, which turns -0 into 0. NaN literals become the one NaN that
//! totalOrder puts above infinity. Numerics are compared at a common scale, rounding the literal, never the column.

use std::cmp::Ordering;
use std::sync::Arc;

use arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion_common::{Result as DfResult, ScalarValue};
use datafusion_expr::Operator;
use datafusion_physical_expr::expressions::{
    BinaryExpr, CastExpr, Column, InListExpr, IsNotNullExpr, IsNullExpr, LikeExpr, Literal, NotExpr,
};
use datafusion_physical_expr::simplifier::PhysicalExprSimplifier;
use datafusion_physical_expr::{PhysicalExpr, split_conjunction};
use rakam_event::schema::{Field, arrow_field};
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use crate::error::EngineError;
use crate::ir::{CmpOp, Expr};

type Physical = Arc<dyn PhysicalExpr>;

/// Translates expressions over the columns of `targets`.
pub(crate) struct Translator<'a> {
    targets: &'a [Field],
    schema: SchemaRef,
}

/// The rows a filter lets through.
pub(crate) enum Filter {
    All,
    Some(Physical),
    Nothing,
}

impl Filter {
    /// A condition over `schema` with what does not depend on the row worked out. NULL lets no row through.
    pub(crate) fn fold(condition: &Physical, schema: &Schema) -> DfResult<Self> {
        let simplifier = PhysicalExprSimplifier::new(schema);
        let mut left = Vec::new();
        for conjunct in split_conjunction(condition) {
            let conjunct = simplifier.simplify(Arc::clone(conjunct))?;
            match conjunct.downcast_ref::<Literal>().map(Literal::value) {
                Some(ScalarValue::Boolean(Some(true))) => {}
                Some(_) => return Ok(Self::Nothing),
                None => left.push(conjunct),
            }
        }
        Ok(if left.is_empty() {
            Self::All
        } else {
            Self::Some(tree(left, Operator::And))
        })
    }
}

/// A translated expression, its type, and its value if it is a literal (`Some(None)` is NULL).
struct Typed {
    expr: Physical,
    ty: FieldType,
    literal: Option<Option<Scalar>>,
}

impl<'a> Translator<'a> {
    pub(crate) fn new(targets: &'a [Field], schema: SchemaRef) -> Self {
        Self { targets, schema }
    }

    /// A filter of rows.
    pub(crate) fn filter(&self, expr: &Expr) -> Result<Filter, EngineError> {
        Ok(Filter::fold(&self.condition(expr)?, &self.schema)?)
    }

    /// A condition: an expression of type boolean.
    pub(crate) fn condition(&self, expr: &Expr) -> Result<Physical, EngineError> {
        match expr {
            Expr::Cmp { op, left, right } => self.cmp(*op, self.value(left)?, self.value(right)?),
            Expr::And(list) => self.connect(list, Operator::And),
            Expr::Or(list) => self.connect(list, Operator::Or),
            Expr::Not(inner) => Ok(Arc::new(NotExpr::new(self.condition(inner)?))),
            Expr::IsNull(inner) => Ok(Arc::new(IsNullExpr::new(self.any(inner)?))),
            Expr::IsNotNull(inner) => Ok(Arc::new(IsNotNullExpr::new(self.any(inner)?))),
            Expr::Is {
                expr,
                value,
                negated,
            } => {
                let inner = self.condition(expr)?;
                Ok(match (value, negated) {
                    (None, false) => Arc::new(IsNullExpr::new(inner)),
                    (None, true) => Arc::new(IsNotNullExpr::new(inner)),
                    (Some(value), _) => {
                        let op = if *negated {
                            Operator::IsDistinctFrom
                        } else {
                            Operator::IsNotDistinctFrom
                        };
                        binary(inner, op, bool_literal(Some(*value)))
                    }
                })
            }
            Expr::InList {
                expr,
                list,
                negated,
            } => self.in_list(expr, list, *negated),
            Expr::Like {
                expr,
                pattern,
                negated,
            } => {
                let value = self.value(expr)?;
                if value.ty != FieldType::Text {
                    return Err(unsupported("LIKE", value.ty));
                }
                let pattern = Arc::new(Literal::new(ScalarValue::Utf8(Some(pattern.clone()))));
                Ok(Arc::new(LikeExpr::new(
                    *negated, false, value.expr, pattern,
                )))
            }
            Expr::Column(_) | Expr::Literal(_) | Expr::Null(_) | Expr::Param { .. } => {
                let value = self.value(expr)?;
                if value.ty != FieldType::Bool {
                    return Err(unsupported("a condition", value.ty));
                }
                Ok(value.expr)
            }
        }
    }

    /// An expression of any type, for NULL tests.
    fn any(&self, expr: &Expr) -> Result<Physical, EngineError> {
        match expr {
            Expr::Column(_) | Expr::Literal(_) | Expr::Null(_) | Expr::Param { .. } => {
                Ok(self.value(expr)?.expr)
            }
            condition => self.condition(condition),
        }
    }

    /// A column, a literal, or a condition as a value.
    fn value(&self, expr: &Expr) -> Result<Typed, EngineError> {
        match expr {
            Expr::Column(id) => {
                let (index, target) = self
                    .targets
                    .iter()
                    .enumerate()
                    .find(|(_, target)| target.id == *id)
                    .ok_or_else(|| EngineError::Plan(format!("no field {id} in the scan")))?;
                Ok(Typed {
                    expr: Arc::new(Column::new(self.schema.field(index).name(), index)),
                    ty: target.ty,
                    literal: None,
                })
            }
            Expr::Literal(scalar) => {
                let scalar = canonical(scalar.clone());
                let (value, ty) = scalar_value(&scalar);
                Ok(Typed {
                    expr: Arc::new(Literal::new(value)),
                    ty,
                    literal: Some(Some(scalar)),
                })
            }
            Expr::Null(ty) => {
                let value = ScalarValue::try_from(&ty.arrow())?;
                Ok(Typed {
                    expr: Arc::new(Literal::new(value)),
                    ty: *ty,
                    literal: Some(None),
                })
            }
            Expr::Param { index, .. } => {
                Err(EngineError::Plan(format!("parameter {index} is not bound")))
            }
            condition => Ok(Typed {
                expr: self.condition(condition)?,
                ty: FieldType::Bool,
                literal: None,
            }),
        }
    }

    fn connect(&self, list: &[Expr], op: Operator) -> Result<Physical, EngineError> {
        let list = list
            .iter()
            .map(|e| self.condition(e))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(tree(list, op))
    }

    fn cmp(&self, op: CmpOp, left: Typed, right: Typed) -> Result<Physical, EngineError> {
        if left.literal == Some(None) || right.literal == Some(None) {
            return Ok(bool_literal(None));
        }
        if left.literal.is_some() && right.literal.is_none() {
            return self.cmp(op.flip(), right, left);
        }
        if let (
            Some(Some(Scalar::Numeric {
                unscaled: a,
                scale: s,
            })),
            Some(Some(Scalar::Numeric {
                unscaled: b,
                scale: t,
            })),
        ) = (&left.literal, &right.literal)
        {
            return Ok(bool_literal(Some(holds(op, numeric_order(*a, *s, *b, *t)))));
        }
        let operator = operator(op);
        use FieldType as T;
        match (left.ty, right.ty) {
            (T::Float4, T::Float4) | (T::Float8, T::Float8) => Ok(match right.literal {
                Some(Some(value)) => float_cmp(op, left.expr, &value),
                _ => binary(
                    positive_zero(left.expr, left.ty),
                    operator,
                    positive_zero(right.expr, right.ty),
                ),
            }),
            (T::Int4, T::Int8) => Ok(match right.literal {
                Some(Some(Scalar::Int8(v))) if i32::try_from(v).is_ok() => {
                    let narrow = ScalarValue::Int32(i32::try_from(v).ok());
                    binary(left.expr, operator, Arc::new(Literal::new(narrow)))
                }
                _ => binary(cast(left.expr, DataType::Int64), operator, right.expr),
            }),
            (T::Int8, T::Int4) => Ok(match right.literal {
                Some(Some(Scalar::Int4(v))) => {
                    let wide = ScalarValue::Int64(Some(i64::from(v)));
                    binary(left.expr, operator, Arc::new(Literal::new(wide)))
                }
                _ => binary(left.expr, operator, cast(right.expr, DataType::Int64)),
            }),
            (
                T::Numeric { precision, scale },
                T::Numeric {
                    scale: right_scale, ..
                },
            ) => Ok(match right.literal {
                Some(Some(Scalar::Numeric { unscaled, scale: s })) => {
                    numeric_cmp(op, left.expr, precision, scale, unscaled, s)
                }
                _ => {
                    let common = DataType::Decimal256(76, scale.max(right_scale) as i8);
                    binary(
                        cast(left.expr, common.clone()),
                        operator,
                        cast(right.expr, common),
                    )
                }
            }),
            (
                T::Bool | T::Int4 | T::Int8 | T::Text | T::Date | T::Timestamptz | T::Uuid,
                right_ty,
            ) if left.ty == right_ty => Ok(binary(left.expr, operator, right.expr)),
            (left, right) => Err(EngineError::Plan(format!(
                "comparison of {left} with {right}"
            ))),
        }
    }

    /// `x IN (…)`. Literals of plain types go to DataFusion's hashed list; anything else is a chain of comparisons.
    fn in_list(&self, expr: &Expr, list: &[Expr], negated: bool) -> Result<Physical, EngineError> {
        let hashed = match self.value(expr)?.ty {
            FieldType::Numeric { .. } => None,
            ty => self.literals(ty, list)?,
        };
        let Some((literals, has_null)) = hashed else {
            let equal = list
                .iter()
                .map(|item| self.cmp(CmpOp::Eq, self.value(expr)?, self.value(item)?))
                .collect::<Result<Vec<_>, _>>()?;
            let any = tree(equal, Operator::Or);
            return Ok(if negated {
                Arc::new(NotExpr::new(any))
            } else {
                any
            });
        };
        let (op, none) = if negated {
            (Operator::And, true)
        } else {
            (Operator::Or, false)
        };
        let mut parts: Vec<Physical> = Vec::with_capacity(2);
        if !literals.is_empty() {
            let value = self.value(expr)?.expr;
            let list = InListExpr::try_new(value, literals, negated, &self.schema)?;
            parts.push(Arc::new(list));
        }
        if has_null {
            parts.push(bool_literal(None));
        }
        if parts.is_empty() {
            parts.push(bool_literal(Some(none)));
        }
        Ok(tree(parts, op))
    }

    /// The items as literals of type `ty` and whether a NULL was among them; `None` if one is not such a literal.
    fn literals(
        &self,
        ty: FieldType,
        list: &[Expr],
    ) -> Result<Option<(Vec<Physical>, bool)>, EngineError> {
        let mut literals: Vec<Physical> = Vec::with_capacity(list.len());
        let mut has_null = false;
        for item in list {
            let item = self.value(item)?;
            let scalar = match item.literal {
                Some(Some(scalar)) if item.ty == ty => scalar,
                Some(None) => {
                    has_null = true;
                    continue;
                }
                _ => return Ok(None),
            };
            let mut push = |value| literals.push(Arc::new(Literal::new(value)) as Physical);
            match scalar {
                // Lists are compared bit by bit: zero is in it with both signs.
                Scalar::Float4(0.0) => {
                    push(ScalarValue::Float32(Some(0.0)));
                    push(ScalarValue::Float32(Some(-0.0)));
                }
                Scalar::Float8(0.0) => {
                    push(ScalarValue::Float64(Some(0.0)));
                    push(ScalarValue::Float64(Some(-0.0)));
                }
                other => push(scalar_value(&other).0),
            }
        }
        Ok(Some((literals, has_null)))
    }
}

fn unsupported(what: &str, ty: FieldType) -> EngineError {
    EngineError::Plan(format!("{what} on type {ty}"))
}

fn operator(op: CmpOp) -> Operator {
    match op {
        CmpOp::Eq => Operator::Eq,
        CmpOp::Ne => Operator::NotEq,
        CmpOp::Lt => Operator::Lt,
        CmpOp::Le => Operator::LtEq,
        CmpOp::Gt => Operator::Gt,
        CmpOp::Ge => Operator::GtEq,
    }
}

fn holds(op: CmpOp, ordering: Ordering) -> bool {
    match op {
        CmpOp::Eq => ordering.is_eq(),
        CmpOp::Ne => ordering.is_ne(),
        CmpOp::Lt => ordering.is_lt(),
        CmpOp::Le => ordering.is_le(),
        CmpOp::Gt => ordering.is_gt(),
        CmpOp::Ge => ordering.is_ge(),
    }
}

/// The order of `a / 10^s` and `b / 10^t`.
fn numeric_order(a: i128, s: u8, b: i128, t: u8) -> Ordering {
    if s > t {
        return numeric_order(b, t, a, s).reverse();
    }
    let unit = 10_i128.checked_pow(u32::from(t - s));
    match (a, unit.and_then(|unit| a.checked_mul(unit))) {
        (0, _) => 0.cmp(&b),
        (_, Some(a)) => a.cmp(&b),
        // Larger than any i128.
        (a, None) => a.cmp(&0),
    }
}

fn binary(left: Physical, op: Operator, right: Physical) -> Physical {
    Arc::new(BinaryExpr::new(left, op, right))
}

fn cast(expr: Physical, ty: DataType) -> Physical {
    Arc::new(CastExpr::new(expr, ty, None))
}

fn bool_literal(value: Option<bool>) -> Physical {
    Arc::new(Literal::new(ScalarValue::Boolean(value)))
}

/// Joins conditions into a balanced tree, so that a list of thousands does not nest thousands deep.
fn tree(mut list: Vec<Physical>, op: Operator) -> Physical {
    if list.is_empty() {
        return bool_literal(Some(op == Operator::And));
    }
    while list.len() > 1 {
        let mut next = Vec::with_capacity(list.len().div_ceil(2));
        let mut items = list.into_iter();
        while let Some(left) = items.next() {
            next.push(match items.next() {
                Some(right) => binary(left, op, right),
                None => left,
            });
        }
        list = next;
    }
    list.remove(0)
}

/// The one representation of values that compare equal: zero is positive, NaN is the quiet positive one.
fn canonical(scalar: Scalar) -> Scalar {
    match scalar {
        Scalar::Float4(v) if v.is_nan() => Scalar::Float4(f32::NAN),
        Scalar::Float8(v) if v.is_nan() => Scalar::Float8(f64::NAN),
        Scalar::Float4(0.0) => Scalar::Float4(0.0),
        Scalar::Float8(0.0) => Scalar::Float8(0.0),
        other => other,
    }
}

/// The Arrow form of a literal and its type.
pub(crate) fn scalar_value(scalar: &Scalar) -> (ScalarValue, FieldType) {
    match scalar {
        Scalar::Bool(v) => (ScalarValue::Boolean(Some(*v)), FieldType::Bool),
        Scalar::Int4(v) => (ScalarValue::Int32(Some(*v)), FieldType::Int4),
        Scalar::Int8(v) => (ScalarValue::Int64(Some(*v)), FieldType::Int8),
        Scalar::Float4(v) => (ScalarValue::Float32(Some(*v)), FieldType::Float4),
        Scalar::Float8(v) => (ScalarValue::Float64(Some(*v)), FieldType::Float8),
        // Arrow has no scale above 38. A literal that has is only ever compared by its own value.
        Scalar::Numeric { unscaled, scale } => {
            let scale = (*scale).min(38);
            (
                ScalarValue::Decimal128(Some(*unscaled), 38, scale as i8),
                FieldType::Numeric {
                    precision: 38,
                    scale,
                },
            )
        }
        Scalar::Text(v) => (ScalarValue::Utf8(Some(v.clone())), FieldType::Text),
        Scalar::Date(v) => (ScalarValue::Date32(Some(*v)), FieldType::Date),
        Scalar::Timestamptz(v) => (
            ScalarValue::TimestampMicrosecond(Some(*v), Some("UTC".into())),
            FieldType::Timestamptz,
        ),
        Scalar::Uuid(v) => (
            ScalarValue::FixedSizeBinary(16, Some(v.to_vec())),
            FieldType::Uuid,
        ),
    }
}

/// A float column against a literal.
fn float_cmp(op: CmpOp, left: Physical, value: &Scalar) -> Physical {
    let (is_zero, signed): (bool, fn(bool) -> ScalarValue) = match value {
        Scalar::Float4(v) => (*v == 0.0, |negative| {
            ScalarValue::Float32(Some(if negative { -0.0 } else { 0.0 }))
        }),
        Scalar::Float8(v) => (*v == 0.0, |negative| {
            ScalarValue::Float64(Some(if negative { -0.0 } else { 0.0 }))
        }),
        _ => (false, |_| ScalarValue::Null),
    };
    if !is_zero {
        let literal = Arc::new(Literal::new(scalar_value(value).0));
        return binary(left, operator(op), literal);
    }
    let against = |op, negative| -> Physical {
        let zero = Arc::new(Literal::new(signed(negative)));
        binary(Arc::clone(&left), op, zero)
    };
    match op {
        CmpOp::Lt => against(Operator::Lt, true),
        CmpOp::Le => against(Operator::LtEq, false),
        CmpOp::Gt => against(Operator::Gt, false),
        CmpOp::Ge => against(Operator::GtEq, true),
        CmpOp::Eq => binary(
            against(Operator::GtEq, true),
            Operator::And,
            against(Operator::LtEq, false),
        ),
        CmpOp::Ne => binary(
            against(Operator::Lt, true),
            Operator::Or,
            against(Operator::Gt, false),
        ),
    }
}

/// -0 + 0 is 0, every other value stays.
fn positive_zero(expr: Physical, ty: FieldType) -> Physical {
    let zero = match ty {
        FieldType::Float4 => ScalarValue::Float32(Some(0.0)),
        _ => ScalarValue::Float64(Some(0.0)),
    };
    binary(expr, Operator::Plus, Arc::new(Literal::new(zero)))
}

/// A numeric column of the given scale against the literal `value / 10^from`, exactly.
fn numeric_cmp(
    op: CmpOp,
    column: Physical,
    precision: u8,
    scale: u8,
    value: i128,
    from: u8,
) -> Physical {
    // The literal at the column's scale, rounded down, and whether that is exact. A literal too large for the
    // column's scale is beyond every value the column can hold: the largest i128 stands for it, which is too.
    let (floor, exact) = if from <= scale {
        match value.checked_mul(10_i128.pow(u32::from(scale - from))) {
            Some(scaled) => (scaled, true),
            None => (if value < 0 { i128::MIN } else { i128::MAX }, true),
        }
    } else {
        let unit = 10_i128.checked_pow(u32::from(from - scale));
        match unit {
            Some(unit) => (value.div_euclid(unit), value.rem_euclid(unit) == 0),
            None => (if value < 0 { -1 } else { 0 }, value == 0),
        }
    };
    let literal: Physical = Arc::new(Literal::new(ScalarValue::Decimal128(
        Some(floor),
        precision,
        scale as i8,
    )));
    let against = |op| binary(Arc::clone(&column), op, Arc::clone(&literal));
    match (op, exact) {
        // Not `=`: that would ask the file's bloom filter, which DataFusion reads wrongly for wide decimals.
        (CmpOp::Eq, true) => binary(
            against(Operator::GtEq),
            Operator::And,
            against(Operator::LtEq),
        ),
        (CmpOp::Ne, true) => against(Operator::NotEq),
        (CmpOp::Lt, true) => against(Operator::Lt),
        (CmpOp::Le, _) => against(Operator::LtEq),
        (CmpOp::Gt, _) => against(Operator::Gt),
        (CmpOp::Ge, true) => against(Operator::GtEq),
        (CmpOp::Lt, false) => against(Operator::LtEq),
        (CmpOp::Ge, false) => against(Operator::Gt),
        // Never equal, but still NULL for NULL.
        (CmpOp::Eq, false) => binary(against(Operator::Lt), Operator::And, against(Operator::Gt)),
        (CmpOp::Ne, false) => binary(against(Operator::LtEq), Operator::Or, against(Operator::Gt)),
    }
}

/// The target schema's name for a field: its id, so that no file's column is ever taken by its name.
pub(crate) fn target_name(id: i32) -> String {
    format!("#{id}")
}

/// The Arrow schema of a scan over `targets`, in their order.
pub(crate) fn target_schema(targets: &[Field]) -> SchemaRef {
    Arc::new(Schema::new(
        targets
            .iter()
            .map(|target| arrow_field(target.id, &target_name(target.id), target.ty))
            .collect::<Vec<_>>(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numerics_of_any_scale_have_an_order() {
        use Ordering::{Equal, Greater, Less};
        for (a, s, b, t, expect) in [
            (15, 1, 150, 2, Equal),
            (1, 255, 0, 0, Greater),
            (-1, 255, 0, 0, Less),
            (0, 0, 0, 255, Equal),
            (1, 0, i128::MAX, 255, Greater),
            (-1, 0, i128::MIN, 255, Less),
            (i128::MAX, 0, i128::MAX, 1, Greater),
            (i128::MIN, 1, i128::MIN, 0, Greater),
        ] {
            assert_eq!(numeric_order(a, s, b, t), expect, "{a} {s} {b} {t}");
            assert_eq!(numeric_order(b, t, a, s), expect.reverse());
        }
    }
}
