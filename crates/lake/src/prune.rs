//! Whether a file may hold a row that a predicate accepts, by its statistics alone. In doubt: yes.

use std::cmp::Ordering;

use rakam_event::types::FieldType;
use serde::{Deserialize, Serialize};

use crate::scalar::Scalar;
use crate::stats::ColumnStat;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CmpOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// A condition on one column. A comparison with NULL is never true: it needs no file at all and is not expressed here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Predicate {
    Cmp(CmpOp, Scalar),
    In(Vec<Scalar>),
    IsNull,
    IsNotNull,
}

/// False only if no row of the file can satisfy the predicate.
///
/// `stat` is `None` when nothing is known. For a field that the file does not have pass [`ColumnStat::all_null`], but
/// only if the file has no `_extra`: values may wait there for their column.
pub fn may_match(
    stat: Option<&ColumnStat>,
    n_rows: i64,
    ty: FieldType,
    predicate: &Predicate,
) -> bool {
    let Some(stat) = stat else { return true };
    let has_values = stat.null_count < n_rows;
    match predicate {
        Predicate::IsNull => stat.null_count > 0,
        Predicate::IsNotNull => has_values,
        Predicate::Cmp(op, scalar) => has_values && Bounds::of(stat, ty).may(*op, scalar),
        Predicate::In(list) => {
            let bounds = Bounds::of(stat, ty);
            has_values && list.iter().any(|scalar| bounds.may(CmpOp::Eq, scalar))
        }
    }
}

struct Bounds {
    min: Option<Scalar>,
    max: Option<Scalar>,
    exact: bool,
    has_nan: bool,
}

impl Bounds {
    fn of(stat: &ColumnStat, ty: FieldType) -> Self {
        let bound = |bytes: &Option<Vec<u8>>| Scalar::from_bound(ty, bytes.as_deref()?);
        Self {
            min: bound(&stat.min),
            max: bound(&stat.max),
            exact: stat.exact,
            has_nan: stat.nan_count > 0,
        }
    }

    fn may(&self, op: CmpOp, scalar: &Scalar) -> bool {
        // Postgres orders NaN above all values; it is in no bound.
        if self.has_nan || scalar.is_nan() {
            return true;
        }
        let min = self.min.as_ref().and_then(|min| min.compare(scalar));
        let max = self.max.as_ref().and_then(|max| max.compare(scalar));
        let excluded = match op {
            CmpOp::Eq => min == Some(Ordering::Greater) || max == Some(Ordering::Less),
            CmpOp::Ne => self.exact && min == Some(Ordering::Equal) && max == Some(Ordering::Equal),
            CmpOp::Lt => matches!(min, Some(Ordering::Equal | Ordering::Greater)),
            CmpOp::Le => min == Some(Ordering::Greater),
            CmpOp::Gt => matches!(max, Some(Ordering::Equal | Ordering::Less)),
            CmpOp::Ge => max == Some(Ordering::Less),
        };
        !excluded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn int(min: i64, max: i64, null_count: i64) -> ColumnStat {
        ColumnStat {
            field_id: 16,
            null_count,
            nan_count: 0,
            min: Some(min.to_le_bytes().to_vec()),
            max: Some(max.to_le_bytes().to_vec()),
            exact: true,
        }
    }

    fn may(stat: &ColumnStat, ty: FieldType, op: CmpOp, scalar: Scalar) -> bool {
        may_match(Some(stat), 10, ty, &Predicate::Cmp(op, scalar))
    }

    #[test]
    fn bounds_decide() {
        let stat = int(5, 9, 0);
        let table = [
            (CmpOp::Eq, 4, false),
            (CmpOp::Eq, 5, true),
            (CmpOp::Eq, 9, true),
            (CmpOp::Eq, 10, false),
            (CmpOp::Ne, 5, true),
            (CmpOp::Lt, 5, false),
            (CmpOp::Lt, 6, true),
            (CmpOp::Le, 4, false),
            (CmpOp::Le, 5, true),
            (CmpOp::Gt, 9, false),
            (CmpOp::Gt, 8, true),
            (CmpOp::Ge, 10, false),
            (CmpOp::Ge, 9, true),
        ];
        for (op, value, expect) in table {
            assert_eq!(
                may(&stat, FieldType::Int8, op, Scalar::Int8(value)),
                expect,
                "{op:?} {value}"
            );
            assert_eq!(
                may(&stat, FieldType::Int8, op, Scalar::Int4(value as i32)),
                expect
            );
        }
        assert!(!may(
            &int(5, 5, 0),
            FieldType::Int8,
            CmpOp::Ne,
            Scalar::Int8(5)
        ));
        let half = Scalar::Numeric {
            unscaled: 45,
            scale: 1,
        };
        assert!(!may(&stat, FieldType::Int8, CmpOp::Lt, half));
    }

    #[test]
    fn in_doubt_the_file_is_read() {
        let stat = int(5, 9, 0);
        assert!(may(
            &stat,
            FieldType::Int8,
            CmpOp::Eq,
            Scalar::Float8(100.0)
        ));
        assert!(may(
            &stat,
            FieldType::Int8,
            CmpOp::Eq,
            Scalar::Text("x".into())
        ));
        // Bytes of another length than the type's say nothing.
        assert!(may(&stat, FieldType::Int4, CmpOp::Eq, Scalar::Int4(100)));
        assert!(may(
            &stat,
            FieldType::Jsonb,
            CmpOp::Eq,
            Scalar::Text("x".into())
        ));
        let open = ColumnStat {
            max: None,
            exact: false,
            ..int(5, 5, 0)
        };
        assert!(may(&open, FieldType::Int8, CmpOp::Gt, Scalar::Int8(1000)));
        assert!(may(&open, FieldType::Int8, CmpOp::Ne, Scalar::Int8(5)));
        let float = ColumnStat {
            nan_count: 1,
            min: Some(1f64.to_le_bytes().to_vec()),
            max: Some(1f64.to_le_bytes().to_vec()),
            ..int(0, 0, 0)
        };
        assert!(may(
            &float,
            FieldType::Float8,
            CmpOp::Gt,
            Scalar::Float8(5.0)
        ));
    }

    #[test]
    fn nulls() {
        let all = ColumnStat::all_null(16, 10);
        let is =
            |stat: &ColumnStat, predicate| may_match(Some(stat), 10, FieldType::Int8, &predicate);
        assert!(is(&all, Predicate::IsNull) && !is(&all, Predicate::IsNotNull));
        assert!(!is(&all, Predicate::Cmp(CmpOp::Ne, Scalar::Int8(1))));
        assert!(!is(&int(5, 9, 0), Predicate::IsNull));
        assert!(!is(&int(5, 9, 0), Predicate::In(vec![])));
        assert!(!is(
            &int(5, 9, 0),
            Predicate::In(vec![Scalar::Int8(1), Scalar::Int8(10)])
        ));
        assert!(is(
            &int(5, 9, 0),
            Predicate::In(vec![Scalar::Int8(1), Scalar::Int8(7)])
        ));
    }

    #[test]
    fn zeros_are_equal() {
        let stat = |value: f64| ColumnStat {
            min: Some(value.to_le_bytes().to_vec()),
            max: Some(value.to_le_bytes().to_vec()),
            ..int(0, 0, 0)
        };
        for (bound, scalar) in [(0.0, -0.0), (-0.0, 0.0)] {
            let may = |op| may(&stat(bound), FieldType::Float8, op, Scalar::Float8(scalar));
            assert!(may(CmpOp::Eq) && may(CmpOp::Le) && may(CmpOp::Ge));
            assert!(!may(CmpOp::Lt) && !may(CmpOp::Gt) && !may(CmpOp::Ne));
        }
    }
}
