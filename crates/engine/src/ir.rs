//! The relational IR: what a plan says, in values that can be written as JSON and read back.
//!
//! It goes through the plan's private list as text, so it holds no pointer, no role, no snapshot and no file.
//! Semantics are PostgreSQL's: three-valued logic, text compared by bytes (`COLLATE "C"`), -0 = 0, NaN = NaN and
//! above every number, numeric compared exactly. Columns are field ids, never positions or names.

use std::collections::BTreeSet;
use std::ops::Range;

use rakam_event::schema::XID_FIELD_ID;
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;
use serde::{Deserialize, Serialize};

use crate::adapt::RECEIVED_AT_FIELD_ID;
use crate::error::EngineError;

/// How deep a condition may nest: the JSON reader stops at 128 levels, of which one of ours takes up to three.
pub const DEPTH_MAX: usize = 32;
/// Bytes of a LIKE pattern: longer ones may be more than the regular expression they become can hold.
pub const LIKE_PATTERN_BYTES_MAX: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CmpOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

impl CmpOp {
    /// The operator that says the same with the sides exchanged.
    pub fn flip(self) -> Self {
        match self {
            Self::Eq | Self::Ne => self,
            Self::Lt => Self::Gt,
            Self::Le => Self::Ge,
            Self::Gt => Self::Lt,
            Self::Ge => Self::Le,
        }
    }
}

/// A scalar expression over the columns of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Expr {
    Column(i32),
    Literal(Scalar),
    Null(FieldType),
    /// A parameter of the execution; [`ScanPlan::bind`] puts its value in its place.
    Param {
        index: usize,
        ty: FieldType,
    },
    /// Both sides of one type; int4 and int8 mix, and numerics of any precision and scale.
    Cmp {
        op: CmpOp,
        left: Box<Expr>,
        right: Box<Expr>,
    },
    /// True when empty.
    And(Vec<Expr>),
    /// False when empty.
    Or(Vec<Expr>),
    Not(Box<Expr>),
    IsNull(Box<Expr>),
    IsNotNull(Box<Expr>),
    /// `expr IS TRUE` for `Some(true)`, `IS FALSE` for `Some(false)`, `IS UNKNOWN` for `None`; never NULL.
    Is {
        expr: Box<Expr>,
        value: Option<bool>,
        negated: bool,
    },
    InList {
        expr: Box<Expr>,
        list: Vec<Expr>,
        negated: bool,
    },
    /// The pattern is PostgreSQL's with `\` as escape; it must not end in a single escape character.
    Like {
        expr: Box<Expr>,
        pattern: String,
        negated: bool,
    },
}

impl Expr {
    fn children(&self) -> Vec<&Self> {
        match self {
            Self::Column(_) | Self::Literal(_) | Self::Null(_) | Self::Param { .. } => vec![],
            Self::Cmp { left, right, .. } => vec![left, right],
            Self::And(list) | Self::Or(list) => list.iter().collect(),
            Self::Not(e)
            | Self::IsNull(e)
            | Self::IsNotNull(e)
            | Self::Is { expr: e, .. }
            | Self::Like { expr: e, .. } => vec![e],
            Self::InList { expr, list, .. } => std::iter::once(&**expr).chain(list).collect(),
        }
    }

    fn children_mut(&mut self) -> Vec<&mut Self> {
        match self {
            Self::Column(_) | Self::Literal(_) | Self::Null(_) | Self::Param { .. } => vec![],
            Self::Cmp { left, right, .. } => vec![left, right],
            Self::And(list) | Self::Or(list) => list.iter_mut().collect(),
            Self::Not(e)
            | Self::IsNull(e)
            | Self::IsNotNull(e)
            | Self::Is { expr: e, .. }
            | Self::Like { expr: e, .. } => vec![e],
            Self::InList { expr, list, .. } => std::iter::once(&mut **expr).chain(list).collect(),
        }
    }

    /// The fields the expression reads.
    pub fn columns(&self, out: &mut BTreeSet<i32>) {
        if let Self::Column(id) = self {
            out.insert(*id);
        }
        for child in self.children() {
            child.columns(out);
        }
    }

    /// Whether the engine takes the condition as far as its size goes; a planner keeps one that is not for itself.
    pub fn fits(&self) -> bool {
        self.fits_within(DEPTH_MAX)
    }

    fn fits_within(&self, depth: usize) -> bool {
        let pattern_fits = match self {
            Self::Like { pattern, .. } => pattern.len() <= LIKE_PATTERN_BYTES_MAX,
            _ => true,
        };
        depth > 0 && pattern_fits && self.children().iter().all(|c| c.fits_within(depth - 1))
    }

    /// Puts values in the place of parameters; a missing value is an error of the plan.
    fn bind(&mut self, params: &[Option<Scalar>]) -> Result<(), EngineError> {
        if let Self::Param { index, ty } = self {
            let value = params
                .get(*index)
                .ok_or_else(|| EngineError::Plan(format!("no value for parameter {index}")))?;
            *self = match value {
                Some(scalar) => Self::Literal(scalar.clone()),
                None => Self::Null(*ty),
            };
            return Ok(());
        }
        self.children_mut()
            .into_iter()
            .try_for_each(|child| child.bind(params))
    }

    /// Puts an expression in the place of a column.
    pub(crate) fn replace_column(&mut self, id: i32, with: &Self) {
        if matches!(self, Self::Column(column) if *column == id) {
            *self = with.clone();
            return;
        }
        for child in self.children_mut() {
            child.replace_column(id, with);
        }
    }
}

/// A scan of one collection, or of all collections of a project.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScanPlan {
    /// The fields the reader wants, in this order; empty when only the number of rows matters.
    pub columns: Vec<i32>,
    pub filter: Option<Expr>,
    pub limit: Option<u64>,
}

/// The field `_time`.
pub const TIME_FIELD_ID: i32 = 1;

/// Transactions of this server that events came with.
#[derive(Debug, Clone)]
pub struct Transactions {
    /// These ids,
    pub xids: Range<i64>,
    /// and others.
    pub others: Vec<i64>,
    /// What was received before (microseconds since 1970) may have come from another server, with its transaction ids.
    pub own_since_us: i64,
}

impl ScanPlan {
    /// Adds a condition: events from before this time (microseconds since 1970) are left out.
    pub fn leave_out_before(&mut self, from_us: i64) {
        self.require(compare(
            TIME_FIELD_ID,
            CmpOp::Ge,
            Scalar::Timestamptz(from_us),
        ));
    }

    /// Adds a condition: events that came with these transactions are left out.
    pub fn leave_out_of(&mut self, transactions: &Transactions) {
        let Transactions {
            xids,
            others,
            own_since_us,
        } = transactions;
        let own_since = Scalar::Timestamptz(*own_since_us);
        let others = others.iter().map(|&xid| Expr::Literal(Scalar::Int8(xid)));
        let theirs = Expr::And(vec![
            compare(RECEIVED_AT_FIELD_ID, CmpOp::Ge, own_since),
            Expr::Or(vec![
                Expr::And(vec![
                    compare(XID_FIELD_ID, CmpOp::Ge, Scalar::Int8(xids.start)),
                    compare(XID_FIELD_ID, CmpOp::Lt, Scalar::Int8(xids.end)),
                ]),
                Expr::InList {
                    expr: Box::new(Expr::Column(XID_FIELD_ID)),
                    list: others.collect(),
                    negated: false,
                },
            ]),
        ]);
        self.require(Expr::Is {
            expr: Box::new(theirs),
            value: Some(true),
            negated: true,
        });
    }

    fn require(&mut self, condition: Expr) {
        let mut conditions = vec![condition];
        match self.filter.take() {
            Some(Expr::And(list)) => conditions.extend(list),
            Some(filter) => conditions.push(filter),
            None => {}
        }
        self.filter = Some(Expr::And(conditions));
    }

    /// An error if the filter does not [`Expr::fits`].
    pub fn to_json(&self) -> Result<String, EngineError> {
        if self.filter.as_ref().is_some_and(|filter| !filter.fits()) {
            return Err(EngineError::Plan("the condition is too large".to_owned()));
        }
        serde_json::to_string(self).map_err(|e| EngineError::Plan(e.to_string()))
    }

    pub fn from_json(text: &str) -> Result<Self, EngineError> {
        serde_json::from_str(text).map_err(|e| EngineError::Plan(e.to_string()))
    }

    /// The plan with every parameter replaced by its value.
    pub fn bind(mut self, params: &[Option<Scalar>]) -> Result<Self, EngineError> {
        if let Some(filter) = &mut self.filter {
            filter.bind(params)?;
        }
        Ok(self)
    }

    /// The fields that must be read: the wanted ones in their order, then those only the filter needs.
    /// It is also what a batch of [`crate::Broker::tail`] has to hold.
    pub fn needed(&self) -> Vec<i32> {
        let mut needed: Vec<i32> = Vec::with_capacity(self.columns.len());
        let mut in_filter = BTreeSet::new();
        if let Some(filter) = &self.filter {
            filter.columns(&mut in_filter);
        }
        for id in self.columns.iter().copied().chain(in_filter) {
            if !needed.contains(&id) {
                needed.push(id);
            }
        }
        needed
    }
}

fn compare(field: i32, op: CmpOp, with: Scalar) -> Expr {
    Expr::Cmp {
        op,
        left: Box::new(Expr::Column(field)),
        right: Box::new(Expr::Literal(with)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trip_keeps_every_value() {
        let plan = ScanPlan {
            columns: vec![16, 1],
            filter: Some(Expr::And(vec![
                Expr::Cmp {
                    op: CmpOp::Lt,
                    left: Box::new(Expr::Column(17)),
                    right: Box::new(Expr::Literal(Scalar::Float8(-0.0))),
                },
                Expr::InList {
                    expr: Box::new(Expr::Column(18)),
                    list: vec![
                        Expr::Null(FieldType::Int8),
                        Expr::Literal(Scalar::Int8(i64::MIN)),
                    ],
                    negated: true,
                },
                Expr::Is {
                    expr: Box::new(Expr::Column(19)),
                    value: None,
                    negated: true,
                },
            ])),
            limit: Some(3),
        };
        let text = plan.to_json().unwrap();
        assert_eq!(ScanPlan::from_json(&text).unwrap(), plan);
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let plan = ScanPlan {
                columns: vec![],
                filter: Some(Expr::Literal(Scalar::Float8(value))),
                limit: None,
            };
            let back = ScanPlan::from_json(&plan.to_json().unwrap()).unwrap();
            let Some(Expr::Literal(Scalar::Float8(read))) = back.filter else {
                panic!("not a float: {back:?}")
            };
            assert_eq!(read.to_bits(), value.to_bits());
        }
    }

    #[test]
    fn what_can_be_written_can_be_read() {
        let nested = |depth| {
            (1..depth).fold(Expr::Literal(Scalar::Bool(true)), |inner, _| Expr::InList {
                expr: Box::new(Expr::Null(FieldType::Bool)),
                list: vec![inner],
                negated: false,
            })
        };
        let plan = |depth| ScanPlan {
            columns: vec![],
            filter: Some(nested(depth)),
            limit: None,
        };
        let deepest = plan(DEPTH_MAX);
        assert_eq!(
            ScanPlan::from_json(&deepest.to_json().unwrap()).unwrap(),
            deepest
        );
        assert!(plan(DEPTH_MAX + 1).to_json().is_err());
        let long = Expr::Like {
            expr: Box::new(Expr::Column(16)),
            pattern: "_".repeat(LIKE_PATTERN_BYTES_MAX),
            negated: false,
        };
        assert!(long.fits());
    }

    #[test]
    fn parameters_become_values() {
        let plan = ScanPlan {
            columns: vec![16],
            filter: Some(Expr::Not(Box::new(Expr::Cmp {
                op: CmpOp::Eq,
                left: Box::new(Expr::Column(20)),
                right: Box::new(Expr::Param {
                    index: 0,
                    ty: FieldType::Text,
                }),
            }))),
            limit: None,
        };
        assert_eq!(plan.needed(), vec![16, 20]);
        assert!(plan.clone().bind(&[]).is_err());
        let bound = plan.bind(&[None]).unwrap();
        assert!(format!("{bound:?}").contains("Null(Text)"));
    }
}
